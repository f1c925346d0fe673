"""Any image file, any folder of them, and CIFAR."""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image       # torchvision brings it
from torchvision import datasets
from torchvision.transforms import v2

from support.console import UserError, explained, printable, say

# EXIF's orientation: 1 is upright, and these ways lead back to it.  (Pillow's own function rewrites
# the other tags as well, and fails where one of them is invalid.)
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))


class ImageError(UserError):
    """An image that cannot be read."""


def read_image(path):
    """uint8 (3, H, W), turned as its EXIF orientation says.  Raises ImageError, in one line."""
    try:
        with Image.open(path) as image:                 # of an animation: its first frame
            sixteen = image.mode.startswith("I;16") or (    # these two formats hold no more
                image.mode == "I" and image.format in ("PNG", "PPM"))
            if (turn := TURNS.get(image.getexif().get(0x0112))) is not None:
                image = image.transpose(turn)
            if sixteen:                                 # convert() would clip them to 255
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("32 bits per pixel, without an agreed range; save it with 8 or 16")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise ImageError(f"{printable(str(path))} is not found") from None
    except Exception as error:      # a broken file can make a decoder raise whatever it likes
        raise ImageError(f"{printable(str(path))} cannot be decoded as an image "
                         f"({printable(str(error))})") from None


def list_images(root, split, left_out):
    """(classes, paths, labels) of root/split/CLASS/: what torchvision's ImageFolder would read.

    Names that begin with a dot are left out in silence, other files that are no images are counted
    in `left_out`, by their ending.  Paths are bytes, because a file name need not be valid text.
    Raises UserError that says what is there instead.
    """
    folder = os.path.join(root, split)

    def is_image(path):
        ending = os.path.splitext(path)[1].lower()
        if os.sep + "." in path[len(folder):]:
            return False
        if ending not in datasets.folder.IMG_EXTENSIONS:
            left_out[ending] += 1
            return False
        return True

    try:
        looked = folder if os.path.isdir(folder) else root
        inside = sorted(os.scandir(looked), key=lambda entry: entry.name)
        classes = [entry.name for entry in inside if entry.is_dir() and entry.name[0] != "."]
        if looked == folder and classes:
            samples = datasets.folder.make_dataset(
                folder, {name: label for label, name in enumerate(classes)}, is_valid_file=is_image)
            paths, labels = zip(*samples)
            return classes, np.array([os.fsencode(path) for path in paths]), np.array(labels)
        problem = (f"{looked} holds {len(classes)} folders {classes[:3]} and "
                   f"{len(inside) - len(classes):,} files")
    except OSError as error:        # no such folder, a file, or a class without images
        problem = str(error)
        if left_out:
            problem += f", files left out, by ending: {dict(left_out)}"
    raise UserError(printable(
        f"no images in {folder}/CLASS/ ({problem}); --data-dir names the folder that holds train/ "
        "and val/, each with one folder per class; see 'Images and layouts' in docs/workshop.md"))


def size_of(path):
    """The size of a file in bytes.  Raises UserError for, say, a link to nothing."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{printable(os.fsdecode(path))} cannot be read ({error.strerror}); "
                         "remove it") from None


def first_of_each_class(paths, labels, count, seed):
    """The indices of `count` images per class, those with the lowest hash of seed and file name.

    The hash makes the choice the same on every machine.
    """
    def key(i):
        return hashlib.md5(b"%d/" % seed + os.path.basename(paths[i])).digest()

    kept = [sorted(np.flatnonzero(labels == label), key=key)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def read_cifar(dataset, root):
    """CIFAR-10 or -100 from its original files: ((images, labels), (images, labels), classes).

    Raises UserError where the files are missing or damaged and cannot be downloaded.
    """
    source = getattr(datasets, dataset.upper())
    place = Path(root, source.base_folder)
    if not place.exists():
        say(f"downloading {dataset}, 170 MB, to {root}")
    with explained(f"{dataset} is missing or damaged in {place} and cannot be downloaded",
                   "put its original files there, or pass --dataset shapes, which needs none"):
        train = source(root, train=True, download=True)     # only what is not there yet
        test = source(root, train=False)

    splits = [(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
               torch.tensor(split.targets)) for split in (train, test)]
    return *splits, train.classes
