"""Any image file, any folder of them, and CIFAR."""
import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
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


THINNEST = 100      # times as long as wide: resized before it is cropped, it could fill the memory


def read_image(path):
    """uint8 (3, H, W), turned as its EXIF orientation says.  Raises ImageError, in one line."""
    try:
        with Image.open(path) as image:                 # of an animation: its first frame
            return rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{printable(str(path))} is not found") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{printable(str(path))} has more pixels than are decoded here, "
                         f"{2 * Image.MAX_IMAGE_PIXELS:,}; make it smaller") from None
    except Exception as error:      # a broken file can make a decoder raise whatever it likes
        raise ImageError(f"{printable(str(path))} cannot be decoded as an image "
                         f"({printable(str(error))})") from None


def rgb(image):
    """uint8 (3, H, W) of Pillow's image."""
    if max(image.size) > THINNEST * min(image.size):
        raise ValueError("{} x {} pixels: too thin; cut it into pieces".format(*image.size))
    sixteen = image.mode.startswith("I;16") or (        # these two formats hold no more
        image.mode == "I" and image.format in ("PNG", "PPM"))
    # Pillow turns a TIFF while it loads it, and drops the tag.  Without this line, it would map an
    # uncompressed one to memory, and scramble what it turns.
    image.filename = ""
    image.load()
    turn = None
    with contextlib.suppress(Exception):                # EXIF that is none
        turn = TURNS.get(image.getexif().get(0x0112))
    if turn is not None:
        image = image.transpose(turn)
    if sixteen:                                         # convert() would clip them to 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, or signed, without an agreed range; save it with 8 or "
                         "16 bits")
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def as_read(image):
    """What a user gives, as read_image would return it.  Raises TypeError for what may have been
    normalised already, or be in another order."""
    if isinstance(image, Image.Image):
        return rgb(image)
    if getattr(image, "dtype", None) == torch.uint8 and image.dim() == 3 and len(image) == 3:
        return image
    found = f"{image.dtype}, {tuple(image.shape)}" if hasattr(image, "dtype") else type(image)
    raise TypeError(f"preprocess takes what read_image(path) returns, uint8 (3, H, W), or an image "
                    f"of Pillow, not {found}")


# ------------------------------------------------------------------------------------------ Folders


def list_splits(root, only_test=False):
    """(classes, (paths, labels) of train/, (paths, labels) of val/) under root."""
    left_out = Counter()
    test_classes, *test = list_images(root, "val", left_out)
    classes, *train = [test_classes, *(part[:0] for part in test)] if only_test else list_images(
        root, "train", left_out)
    if different := set(classes) ^ set(test_classes):
        alike = len({unicodedata.normalize("NFC", name) for name in different}) < len(different)
        train_only, test_only = (
            ", ".join(map(ascii if alike else str, sorted(different.intersection(names))[:5]))
            or "none" for names in (classes, test_classes))
        raise UserError(f"train/ and val/ under {root} hold different classes.  Only in train/: "
                        f"{printable(train_only)}; only in val/: {printable(test_only)}")
    if len(classes) == 1:
        inside = os.scandir(os.path.join(root, "val", *classes))
        below = sorted(entry.name for entry in inside if entry.is_dir())
        advice = f": is it a folder too many?  It holds the folders {below[:3]}" if below else ""
        raise UserError(printable(f"only one class, {classes[0]!r}, under {root}{advice}"))
    if left_out:
        say(f"files left out, by ending: {dict(left_out)}")
    return classes, train, test


def list_images(root, split, left_out):
    """(classes, paths, labels) of root/split/CLASS/: what torchvision's ImageFolder would read.

    Names that begin with a dot are left out in silence, other files that are no images are counted
    in `left_out`, by their ending.  Paths are bytes, because a file name need not be valid text.
    Raises UserError that says what is there instead.
    """
    folder = os.path.join(root, split)
    try:
        looked = folder if os.path.isdir(folder) else root
        inside = sorted(os.scandir(looked), key=lambda entry: entry.name)
        classes = [entry.name for entry in inside if entry.name[0] != "." and entry.is_dir()
                   and not leads_back(entry, [Path(looked).resolve()])]
        if looked == folder and classes:
            paths = [[*map(os.fsencode, images_below(os.path.join(folder, name), left_out))]
                     for name in classes]
            if all(paths):
                return classes, np.concatenate(paths), np.repeat(
                    np.arange(len(classes)), [len(of_class) for of_class in paths])
            problem = "none in " + ", ".join(
                name for name, of_class in zip(classes, paths) if not of_class)
        else:
            problem = (f"{looked} holds {len(classes)} folders {classes[:3]} and "
                       f"{len(inside) - len(classes):,} files")
    except OSError as error:        # no such folder, or a file
        problem = str(error)
    if left_out:
        problem += f"; files left out, by ending: {dict(left_out)}"
    raise UserError(printable(
        f"no images in {folder}/CLASS/ ({problem}); --data-dir names the folder that holds train/ "
        "and val/, each with one folder per class; see 'Images and layouts' in docs/workshop.md"))


def images_below(folder, left_out):
    """The paths of all image files below a folder, in the order of torchvision's ImageFolder; the
    endings of others are counted in `left_out`."""
    found = []
    for path in sorted(files_below(folder), key=os.path.split):
        ending = os.path.splitext(path)[1].lower()
        if ending in datasets.folder.IMG_EXTENSIONS:
            found.append(path)
        else:
            left_out[ending] += 1
    return found


def files_below(folder, above=()):
    """All files below a folder, but nothing hidden, and nothing in a link that leads back."""
    above = *above, Path(folder).resolve()
    for entry in os.scandir(folder):
        if entry.name[0] != "." and not entry.is_dir():
            yield entry.path
        elif entry.name[0] != "." and not leads_back(entry, above):
            yield from files_below(entry.path, above)


def leads_back(entry, above):
    """Whether a folder is a link to one of those above it, or to one that holds them."""
    real = Path(entry).resolve()
    return any(one.is_relative_to(real) for one in above)


def fingerprint(path):
    """The size of a file and a hash of its ends: BMPs of one shape have one size.  Of 64,000 files,
    cold, it took 16 s, and their sizes 1.  Raises UserError for, say, a link to nothing."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(2048), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2048))
            return b"%d %s" % (size, hashlib.md5(start + file.read()).digest())
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
