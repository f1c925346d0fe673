"""Look at a data set: each image before and after augmentation, one row per class.

    python -m tools.look --dataset cifar10
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

from data import DATASETS, load_data
from support.console import errors_in_one_line, explained, say
from support.flags import number, one_of, parser, path

TABLE = {       # default, how it is read, meaning
    "dataset": ("shapes", one_of(DATASETS), "what to draw"),
    "data_dir": ("data", path, "where its files are"),
    "image_size": (224, number(int, 1, 4096), "pixels per side, for folders"),
    "out": (None, path, "the PNG to write; by default runs/DATASET.png"),
}


def contact_sheet(data, columns=5, rows=100):
    """uint8 (3, H, W): one row per class, each image before and after augmentation."""
    labels = data.labels[:data.train_size].cpu().numpy()
    index = np.concatenate([np.resize(np.flatnonzero(labels == label), columns)
                            for label in range(len(data.classes))[:rows]])
    pictures = torch.stack([data.view(index), data.view(index, epoch=0)], 1).flatten(0, 1).cpu()
    if pictures.shape[-1] < 64:                     # small images are shown at twice their size
        pictures = F.interpolate(pictures, scale_factor=2, mode="nearest")
    return make_grid(pictures, nrow=2 * columns, padding=4, pad_value=255)


def main(argv=None):
    about = "Draw a contact sheet: each image before and after augmentation."
    args = parser("tools.look", about, TABLE).parse_args(argv)
    out = Path(args.out or f"runs/{args.dataset}.png")
    with errors_in_one_line("tools.look"):
        data = load_data(args.dataset, args.data_dir, batch_size=1, image_size=args.image_size)
        sheet = contact_sheet(data) / 255
        with explained(f"cannot write {out}", "give another --out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            save_image(sheet, out)

        for row, name in enumerate(data.classes[:100], start=1):
            say(f"row {row:3d}  {name}")
        say(f"{out}: five images per row, each followed by its augmented version")


if __name__ == "__main__":
    main()
