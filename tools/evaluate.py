"""Loss, top-1, top-5 and the accuracy of each class; and a look inside the gates.

    python -m tools.evaluate --checkpoint runs/NAME            or the flags it was trained with
    python -m tools.evaluate --checkpoint runs/NAME --data-dir mine
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import train
from senetv2 import GATES
from train import RANK, evaluate, in_words, load, open_data, say, sums_per_class

OPTIONS = {"checkpoint": (None, str, "what to evaluate: a run's folder or its last.pt; by default "
                                     "the folder that the other flags name")}


def run_evaluation(args, settings, device):
    """Print the accuracy of each class and of all, and look inside the gates."""
    path = Path(args.checkpoint or args.out)
    net = load(path).to(device, memory_format=torch.channels_last)
    data = open_data(args, net.settings | dict(train_images=0), device)     # none is used here
    if data.classes != net.classes:
        raise ValueError(f"{path} was trained on classes other than those in {args.data_dir}")
    test, per_class = evaluate(net, data)
    say("top-1 of each class:")
    for name, top1 in zip(data.classes, per_class):
        say(f"{top1:7.2f}%  {name}")
    say(f"{data.test_size:,} test images of {net.settings['dataset']}: {in_words(test)}")
    if net.settings["model"] in GATES:
        look_inside(net, data, (path if path.is_dir() else path.parent) / "gates.png")


def look_inside(net, data, path):
    """Draw the mean factor s of each channel for each class, and print how much it varies.

    After arXiv 1709.01507, section 7.2.  One strip per stage, of its last bottleneck: one row per
    class, one column per channel, sorted by mean; from black, 0 (of 1 + s: 1), to white, 1 (or 2).
    """
    last = [stage[-1].gate for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    if not all(hasattr(gate, "scale") for gate in last):
        return say("no picture of the gates: not all have a method scale(x), the factor alone")
    gates = []
    hooks = [gate.register_forward_hook(lambda gate, inputs, out: gates.append(
        gate.scale(*inputs).flatten(1))) for gate in last]

    def factors(images, labels):
        gates.clear()
        net(images)
        return torch.cat([torch.ones_like(gates[0][:, :1]), *gates], dim=1)     # (B, 1 + channels)

    sums, strips = sums_per_class(net, data, factors), []
    for hook in hooks:
        hook.remove()
    means = sums[:, 1:] / sums[:, :1]                                   # (classes, channels)
    black = means.min().floor()
    for stage, mean in enumerate(means.split([gate.shape[1] for gate in gates], 1), start=1):
        say(f"stage {stage}: mean factor {mean.mean():.3f}, standard deviation across classes "
            f"{mean.std(0, correction=0).mean():.4f}")
        strip = mean[None, None, :, mean.mean(0).argsort()]
        strips.append(F.interpolate(strip, (max(100, len(mean)), 2048)))
    try:
        if RANK == 0:
            save_image(torch.cat(strips) - black, path, nrow=1, padding=8, pad_value=1)
    except OSError as error:
        return say(f"no picture of the gates: {path} cannot be written ({error.strerror})")
    say(f"{path}: one strip per stage, one row per class, in the order above; one column per "
        f"channel, sorted by mean; black is a factor of {black:.0f}, white of {black + 1:.0f}")


def main(argv=None):
    train.main(argv, run_evaluation, options=OPTIONS, program="tools.evaluate",
               description="Print loss and accuracy on the test images, and draw the gates.")


if __name__ == "__main__":
    main()
