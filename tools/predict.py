"""The five most likely classes of images.

    python -m tools.predict --image cat.jpg --checkpoint runs/NAME
"""
import torch

import train
from data import read_image
from train import load, say


@torch.no_grad()
def run_prediction(args, settings, device):
    """Print the five most likely classes of each image."""
    net = load(args.checkpoint).to(device, memory_format=torch.channels_last)
    for path in args.predict:
        logits = net(net.preprocess(read_image(path)).to(device))[0]
        best = logits.double().softmax(0).topk(min(5, len(net.classes)))
        say(path)
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            say(f"{probability:8.2%}  {net.classes[index]}")
