"""The five most likely classes of images.

    python -m tools.predict --image cat.jpg --checkpoint runs/NAME
"""
import torch

import train
from data import read_image
from support.console import UserError, say
from support.hardware import on_host
from train import load

OPTIONS = {
    "image": ([], str, "image files"),
    "checkpoint": (None, str, "what to predict with: a run's folder or its last.pt; by default the "
                              "folder that the other flags name"),
}


@torch.no_grad()
def run_prediction(args, settings, device):
    """Print the five most likely classes of each image."""
    if not args.image:
        raise UserError("no image; give --image cat.jpg")
    net = load(args.checkpoint or args.out).to(device, memory_format=torch.channels_last)
    if len(net.history) < net.settings["epochs"]:
        say(f"the run is not finished: {len(net.history)} of {net.settings['epochs']} epochs")
    for path in args.image:
        logits = net(net.preprocess(read_image(path)).to(device))[0]
        best = on_host(logits).softmax(0).topk(min(5, len(net.classes)))
        say(path)
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            say(f"{probability:8.2%}  {net.classes[index]}")


def main(argv=None):
    train.main(argv, run_prediction, options=OPTIONS, program="tools.predict",
               description="Print the five most likely classes of images.")


if __name__ == "__main__":
    main()
