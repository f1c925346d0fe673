"""The five most likely classes of images.

    python -m tools.predict --image cat.jpg --checkpoint runs/NAME
"""
import glob
import os
import sys
from collections import Counter

import torch

import train
from data import ImageError, read_image
from support import flags
from support.console import UserError, explained, say
from support.hardware import on_host
from support.images import images_below
from train import load

OPTIONS = {
    "image": ([], flags.path, "image files, folders of them, or patterns such as 'a/*.png'"),
    "checkpoint": (None, flags.path, "what to predict with: a run's folder or its last.pt; by "
                                     "default the folder that the other flags name"),
}


@torch.no_grad()
def run_prediction(args, settings, device):
    """Print the five most likely classes of each image."""
    if not args.image:
        raise UserError("no image; give --image cat.jpg")
    net = load(args.checkpoint or args.out).to(device, memory_format=torch.channels_last)
    if len(net.history) < net.settings["epochs"]:
        say(f"the run is not finished: {len(net.history)} of {net.settings['epochs']} epochs")
    failed = 0
    for path in dict.fromkeys(path for given in args.image for path in files_of(given)):
        try:
            image = read_image(path)
        except ImageError as error:
            failed += 1
            advice = "" if os.path.exists(path) else (
                "; for several, give a folder or a pattern, or type python -m tools.predict "
                "--image a.png b.png")
            print(f"tools.predict: error: {error}{advice}", file=sys.stderr, flush=True)
            continue
        logits = net(net.preprocess(image).to(device))[0]
        best = on_host(logits).softmax(0).topk(min(5, len(net.classes)))
        say(path)
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            say(f"{probability:8.2%}  {net.classes[index]}")
    if failed:
        sys.exit(1)


def files_of(given):
    """A file as it is; the images of a folder, at any depth; or what a pattern fits."""
    if os.path.isdir(given):
        with explained(f"{given} cannot be listed", "name its images"):
            return images_below(given, Counter()) or [given]        # "Is a directory"
    found = [] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    return [path for place in found for path in files_of(place)] or [given]


def main(argv=None):
    train.main(argv, run_prediction, options=OPTIONS, program="tools.predict",
               description="Print the five most likely classes of images.")


if __name__ == "__main__":
    main()
