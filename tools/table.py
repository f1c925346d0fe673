"""Parameters and multiply-adds of the networks, beside the paper's.

    python -m tools.table                     images of 32x32 pixels
    python -m tools.table --image-size 224    another image size
"""
import torch
from torch.utils.flop_counter import FlopCounterMode

from senetv2 import STEMS, build_model
from support.console import errors_in_one_line, say
from support.flags import number, one_of, parser

TABLE = {"image_size": (32, number(int, 1), "pixels per side"),
         "stem": ("imagenet", one_of(STEMS), "first layer")}
ROWS = {    # label -> settings of build_model
    "resnet": {},
    "senet r=32": dict(reduction=32),
    "senetv2 r=32 K=4": dict(reduction=32, cardinality=4),
    "senet r=8": dict(reduction=8),
}
PAPER = {   # layers -> title, classes, and the parameters that each row adds in the paper
    (3, 4, 6, 3): ("ResNet-50, 100 classes", 100, ("-", "1.28 M", "5.05 M", "-")),
    (1, 1, 1, 1): ("the small network (layers 1,1,1,1), 10 classes", 10,
                   ("-", "0.35 M", "1.40 M", "-")),
}


def multiply_adds(model, image_size):
    """Multiply-adds of one image's forward pass.  The flop counter counts each of them as two."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() // 2


def print_table(image_size, stem):
    for layers, (title, classes, paper) in PAPER.items():
        say("")
        say(f"{title}, {image_size}x{image_size} pixels, {stem} stem")
        say(f"{'network':<22}{'parameters':>12}{'added':>20}{'in the paper':>14}"
            f"{'multiply-adds':>16}{'added':>8}")

        plain = None
        for (label, settings), claim in zip(ROWS.items(), paper):
            # tensors on the meta device have a shape and no storage: nothing is computed
            with torch.device("meta"):
                model = build_model(label.split()[0], classes, layers, stem, **settings)
            count = sum(p.numel() for p in model.parameters())
            work = multiply_adds(model, image_size)
            plain = plain or (count, work)          # of the first row, resnet

            say(f"{label:<22}{count:>12,}{count - plain[0]:>11,} {count / plain[0] - 1:>+8.1%}"
                f"{claim:>14}{work:>16,}{work / plain[1] - 1:>+8.1%}")


def main(argv=None):
    about = "Print parameters and multiply-adds of the networks, beside the paper's."
    args = parser("tools.table", about, TABLE).parse_args(argv)
    with errors_in_one_line("tools.table"):
        print_table(args.image_size, args.stem)


if __name__ == "__main__":
    main()
