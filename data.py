"""Chapter 2: the data.  Look at it before you train on it.

    shapes              ten classes of figures, 32x32, drawn here from a fixed seed; no download
    cifar10, cifar100   50,000 + 10,000 images of 32x32, read and downloaded by torchvision
    imagenet            a folder that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG; 250 training
                        images per class, as in the paper, chosen by a hash of their names
    folder              the same layout with images of your own; all of them

The first three are small.  They are held whole, as uint8, on the device that trains, and whole
batches are gathered, cropped, flipped and normalised there.  The JPEGs of a folder are decoded by
worker processes, turned as their EXIF orientation says, and made RGB.

One promise makes an interrupted run equal to one that was not, and gives several processes the
batches of one: the batch of a step is a pure function of (seed, epoch, step).  So all randomness is
drawn on the CPU, from seeds made of (seed, epoch): the order of the images, and the crop and the
flip of each.  Every process takes its share of the batch.

The paper does not say how it augments.  We do what is usual.  CIFAR and shapes are padded by 4
zeros per side, cropped back and flipped (arXiv 1512.03385, section 4.2).  Images of folders are
cropped at random to 8-100 % of their area, resized and flipped.  Test images are not augmented.
An incomplete last batch is not trained on.

    python data.py                                          draw a contact sheet of shapes
    python data.py --dataset cifar10 --data-dir data        the same of CIFAR-10
"""
import argparse
import atexit
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

IN_MEMORY = ("shapes", "cifar10", "cifar100")
FOLDERS = ("imagenet", "folder")
DATASETS = IN_MEMORY + FOLDERS

# --------------------------------------------------------------------------------------- Statistics

# Mean and standard deviation of each colour over all pixels of all training images, from 0 to 1.
# The 0.2023, 0.1994, 0.2010 that is often copied for CIFAR-10 averages the deviations within single
# images, and is too small.
STATISTICS = {
    "shapes": ((0.4980, 0.5020, 0.5016), (0.2835, 0.2855, 0.2844)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),     # as its weights expect
}
STATISTICS["folder"] = STATISTICS["imagenet"]       # close enough for any photographs


class Normalise:
    """uint8 (B, 3, H, W) -> float32, each colour with mean 0 and deviation 1 over the data set."""

    def __init__(self, dataset, device="cpu"):
        self.mean, self.std = (255 * torch.tensor(values, device=device)[:, None, None]
                               for values in STATISTICS[dataset])

    def __call__(self, images):
        return images.float().sub_(self.mean).div_(self.std)


# --------------------------------------------------------------------------- Which image comes when

ORDER, AUGMENT = 0, 1       # two independent streams of random numbers for each (seed, epoch)


def mix(*numbers):
    """One 64-bit seed from several numbers, without the coincidences of a sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def shuffled(seed, epoch, size):
    """The order in which an epoch shows the training images: a permutation of 0..size-1."""
    return np.random.default_rng([seed, epoch, ORDER]).permutation(size)


def share(step, batch_size, rank, world):
    """Where this process's part of a training batch lies in the order of the epoch."""
    size = batch_size // world
    start = step * batch_size + rank * size
    return slice(start, start + size)


def shares_of_test(size, batch_size, rank, world):
    """This process's part of each batch of test images; all processes get equally many batches."""
    for start in range(0, size, batch_size):
        yield slice(start + rank, start + batch_size, world)


def subset(size, count, seed):
    """The indices of the first `count` images of a seeded shuffle, sorted; all of them for 0."""
    if count > size:
        raise ValueError(f"--train-images is {count}, but there are {size} training images")
    return np.sort(np.random.default_rng([seed]).permutation(size)[:count or size])


def digest(parts):
    """A short name for a sequence of byte strings: other bytes, another name."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


# ----------------------------------------------------------------------------------- Sets in memory

PAD = 4     # pixels of zeros on each side of a 32-pixel image before it is cropped back


class InMemory:
    """A small data set, held whole on `device`.

    name          one of IN_MEMORY.
    train, test   (images, labels): uint8 (N, 3, H, W) and int64 (N,), on the CPU.
    classes       their names.
    batch_size    images per training step in all processes together.
    rank, world   this process and the number of processes; each takes its share of every batch.

    .identity says what was loaded: a run must not go on with other images.
    """

    def __init__(self, name, train, test, classes, *,
                 device, batch_size, seed, augment, rank, world):
        self.classes, self.device, self.augment = classes, torch.device(device), augment
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.train_size, self.test_size = len(train[1]), len(test[1])
        self.steps = self.train_size // batch_size
        self.normalise = Normalise(name, device)
        self.identity = {"classes": classes} | {
            f"{split} images": f"{len(labels)} ({digest([images.numpy(), labels.numpy()])})"
            for split, (images, labels) in (("training", train), ("test", test))}

        # A view (2, N, 3, 9, 9, H, W) of the padded images and their mirror images holds all crops:
        # to crop and flip a batch is to index it once.
        padded = F.pad(train[0].to(device), (PAD,) * 4)
        height, width = train[0].shape[2:]
        mirrored = torch.stack([padded, padded.flip(3)])
        self.windows = mirrored.unfold(3, height, 1).unfold(4, width, 1)
        self.train_labels = train[1].to(device)
        self.test_images, self.test_labels = (tensor.to(device) for tensor in test)

    def train_batches(self, epoch, first_step=0):
        """Yield this process's share of each batch: float32 (B, 3, H, W) and labels (B,)."""
        order = self._send(shuffled(self.seed, epoch, self.train_size))     # one copy per epoch
        draws = self._draws(epoch if self.augment else None)
        for step in range(first_step, self.steps):
            index = order[share(step, self.batch_size, self.rank, self.world)]
            yield self.normalise(self._crop(index, draws)), self.train_labels[index]

    def test_batches(self):
        """Yield this process's share of the test images, each exactly once and not augmented."""
        for part in shares_of_test(self.test_size, self.batch_size, self.rank, self.world):
            yield self.normalise(self.test_images[part]), self.test_labels[part]

    def view(self, index, epoch=None):
        """Training images `index`, uint8 (n, 3, H, W): as augmented in `epoch`, or as they are."""
        return self._crop(self._send(index), self._draws(epoch))

    def close(self):
        """Nothing to end here; a Folder ends its workers."""

    def _draws(self, epoch):
        """The flip, the top and the left edge of the crop of each training image: int64 (3, N)."""
        if epoch is None:       # not mirrored, and cropped from the middle
            draws = np.full((3, self.train_size), [[0], [PAD], [PAD]])
        else:
            rng = np.random.default_rng([self.seed, epoch, AUGMENT])
            draws = rng.integers(0, [[2], [2 * PAD + 1], [2 * PAD + 1]], (3, self.train_size))
        return self._send(draws)

    def _crop(self, index, draws):
        flip, top, left = draws[:, index]                   # each (B,)
        return self.windows[flip, index, :, top, left]      # separated indices put B first

    def _send(self, array):
        tensor = torch.from_numpy(np.asarray(array))
        if self.device.type == "cuda":                  # a copy from pinned memory does not block
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


# ------------------------------------------------------------------------------------------- Shapes


def rectangle(u, v, width, height):
    return np.maximum(abs(u) - width, abs(v) - height)


def triangle(u, v):
    sides = [u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    return np.max(sides, axis=0) - 0.5


def star(u, v):
    sector = (np.arctan2(v, u) * 5 / math.pi) % 2                           # five tips
    return np.hypot(u, v) - 0.4 - 0.6 * abs(sector - 1)


# Roughly the signed distance from the points (u, v) to the outline of a figure of radius 1; it is
# negative inside the figure.
SHAPES = {
    "bar": lambda u, v: rectangle(u, v, 1, 0.3),
    "cross": lambda u, v: np.minimum(rectangle(u, v, 1, 0.3), rectangle(u, v, 0.3, 1)),
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "frame": lambda u, v: abs(rectangle(u, v, 0, 0) - 0.65) - 0.15,
    "half disc": lambda u, v: np.maximum(np.hypot(u, v) - 1, -v),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) - 0.2,
    "square": lambda u, v: rectangle(u, v, 0.75, 0.75),
    "star": star,
    "triangle": triangle,
    "two discs": lambda u, v: np.hypot(abs(u) - 0.6, v) - 0.4,
}


def draw_shapes(count, seed, size=32):
    """Draw figures, equally many of each class: uint8 (count, 3, size, size) and labels (count,).

    Place, size, rotation and both colours vary, so no single pixel says anything about the class.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random(shape, dtype=np.float32)

    labels = rng.permutation(np.arange(count) % len(SHAPES))
    radius = uniform(6, 12, count, 1, 1)                                    # pixels
    middle = size / 2 + uniform(-1, 1, 2, count, 1, 1) * (size / 2 - radius)
    angle = uniform(0, 2 * math.pi, count, 1, 1)

    # The two colours differ by 0.3 or more in each of red, green and blue.
    back = uniform(0, 1, count, 3, 1, 1)
    fore = (back + uniform(0.3, 0.7, count, 3, 1, 1)) % 1

    # Each pixel's place on the axes of the figure, where its radius is 1; all (count, H, W).
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5)[:, None] - middle
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    outside = np.empty_like(u)                                              # > 0 outside the figure
    for label, distance in enumerate(SHAPES.values()):
        mine = labels == label
        outside[mine] = distance(u[mine], v[mine])

    # Mix the colours by the share of the pixel that the figure covers, and add a little noise.
    images = (fore - back) * np.clip(0.5 - outside * radius, 0, 1)[:, None]
    images += back
    images += 0.03 * rng.standard_normal(images.shape, dtype=np.float32)
    images = np.rint(255 * images.clip(0, 1, out=images), out=images)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


# -------------------------------------------------------------------------------------------- CIFAR


def read_cifar(dataset, root):
    """CIFAR-10 or -100 from its original files: ((images, labels), (images, labels), classes).

    Raises FileNotFoundError where the files are missing or damaged and cannot be downloaded.
    """
    source = getattr(datasets, dataset.upper())
    try:
        train = source(root, train=True, download=True)     # what is there is not downloaded again
        test = source(root, train=False)
    except (RuntimeError, OSError) as error:                # no network is an OSError
        raise FileNotFoundError(
            f"{dataset} is missing or damaged in {Path(root, source.base_folder)} and cannot be "
            f"downloaded ({error}); put its original files there, or pass --dataset shapes "
            "(make: DATASET=shapes), which needs none") from None

    splits = [(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
               torch.tensor(split.targets)) for split in (train, test)]
    return *splits, train.classes


# ------------------------------------------------------------------------------------------ Folders


def printable(text):
    """A name from a disk, safe to print: control characters and broken bytes as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_image(path):
    """uint8 (3, H, W), turned as its EXIF orientation says; ValueError if it is no image."""
    try:    # numpy opens names that are not UTF-8, which torchvision does not
        content = torch.from_numpy(np.fromfile(path, np.uint8))
        image = torchvision.io.decode_image(content, mode="RGB", apply_exif_orientation=True)
    except (RuntimeError, OSError) as error:        # an OSError: it vanished, or may not be read
        reason = str(error).splitlines()[0]
        raise ValueError(f"{printable(str(path))} cannot be decoded as an image ({reason}); "
                         "replace or remove it") from None
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(f"{printable(str(path))} holds several images, or more than 8 bits per "
                         "colour; convert it")
    return image


def centre(size):
    """Resize the shorter side to 8/7 of `size`, as is usual (256 for 224), and crop the middle."""
    return v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)])


class Preprocess:
    """uint8 (3, H, W) of any size -> float32 (1, 3, S, S): the input of a network of `dataset`."""

    def __init__(self, dataset, image_size=224):
        small = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
        self.resize = centre(image_size) if dataset in FOLDERS else small
        self.normalise = Normalise(dataset)

    def __call__(self, image):
        return self.normalise(self.resize(image)[None])


class ImageFiles(Dataset):
    """Image files by (epoch, indices): a batch, uint8 (B, 3, S, S), and labels (B,); B may be 0.

    In training, the crop is drawn by a generator seeded with (seed, epoch, index), so it does not
    matter which process does it.  With epoch None the middle is cropped.
    """

    def __init__(self, paths, labels, size, seed):
        self.paths, self.labels = paths, labels         # arrays: a list would be copied per worker
        self.size, self.seed = size, seed
        self.augmented = v2.Compose([v2.RandomResizedCrop(size, antialias=True),
                                     v2.RandomHorizontalFlip()])
        self.plain = centre(size)

    def __getitem__(self, key):
        epoch, index = key
        images = torch.empty(len(index), 3, self.size, self.size, dtype=torch.uint8)
        for place, i in zip(images, index):
            image = read_image(os.fsdecode(self.paths[i]))
            if epoch is None:
                place.copy_(self.plain(image))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(mix(self.seed, epoch, i))
                place.copy_(self.augmented(image))
        return images, torch.from_numpy(self.labels[index])


class Folder:
    """A data set of image files, decoded by worker processes, with the interface of InMemory."""

    def __init__(self, root, size, images_per_class, train_images, workers, *,
                 device, batch_size, seed, augment, rank, world):
        self.device, self.augment = torch.device(device), augment
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        train, test = list_images(Path(root, "train")), list_images(Path(root, "val"))
        self.classes = train.classes
        if different := sorted(set(train.classes) ^ set(test.classes)):
            raise ValueError(f"train/ and val/ under {root} hold different classes; only in one of "
                             f"them: {printable(', '.join(different[:5]))}")

        # Names are bytes, because a file name need not be valid text.
        paths, test_paths = (np.array([os.fsencode(path) for path, _ in split.samples])
                             for split in (train, test))
        labels, test_labels = np.array(train.targets), np.array(test.targets)
        if images_per_class:
            kept = first_of_each_class(paths, labels, images_per_class, seed)
            paths, labels = paths[kept], labels[kept]
        kept = subset(len(labels), train_images, seed)
        paths, labels = paths[kept], labels[kept]

        self.train_size, self.test_size = len(labels), len(test_labels)
        self.train_labels = torch.from_numpy(labels)
        self.steps = self.train_size // batch_size
        self.normalise = Normalise("folder", device)
        self.identity = {"classes": self.classes} | {
            f"{split} images": f"{len(names)} ({digest_of_files(names, root)})"
            for split, names in (("training", paths), ("test", test_paths))}

        # One loader for both splits, so that its workers start once per run: the training images
        # come first, then the test images.  The list of keys is filled anew for each pass.
        self.files = ImageFiles(np.concatenate([paths, test_paths]),
                                np.concatenate([labels, test_labels]), size, seed)
        self.keys = []
        self.loader = DataLoader(self.files, batch_size=None, sampler=self.keys,
                                 num_workers=workers, persistent_workers=workers > 0,
                                 pin_memory=self.device.type == "cuda",
                                 worker_init_fn=ignore_signals)

    def train_batches(self, epoch, first_step=0):
        order = shuffled(self.seed, epoch, self.train_size)
        parts = [share(step, self.batch_size, self.rank, self.world)
                 for step in range(first_step, self.steps)]
        return self._load([(epoch if self.augment else None, order[part]) for part in parts])

    def test_batches(self):
        numbers = self.train_size + np.arange(self.test_size)
        parts = shares_of_test(self.test_size, self.batch_size, self.rank, self.world)
        return self._load([(None, numbers[part]) for part in parts])

    def view(self, index, epoch=None):
        return self.files[epoch, index][0]

    def close(self):
        """End the workers.  They ignore the signals by which Python would end them at its exit."""
        if self.loader._iterator is not None:       # PyTorch has no public way
            self.loader._iterator._shutdown_workers()
            self.loader._iterator = None
            atexit.unregister(self.close)

    def _load(self, keys):
        self.keys[:] = keys
        try:
            starts = self.loader.num_workers > 0 and self.loader._iterator is None
            with signals_blocked() if starts else nullcontext():
                batches = iter(self.loader)
            if starts:
                atexit.register(self.close)         # for programs that do not close it
            for images, labels in batches:          # uint8 travels: a quarter of float32
                images = images.to(self.device, non_blocking=True)
                yield self.normalise(images), labels.to(self.device, non_blocking=True)
        except ValueError as error:     # a worker's holds its traceback; the last line says it
            raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None


# The signals that stop a run.  Its workers must outlive them, so that it can save and leave first.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
            if hasattr(signal, name)]       # Windows has no SIGHUP


def ignore_signals(worker=None):
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_blocked():
    """No such signal reaches a process that is started here; this one loses none of them."""
    if not hasattr(signal, "pthread_sigmask"):      # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()           # its start unblocks signals: so not below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def list_images(folder):
    """torchvision's DatasetFolder; FileNotFoundError if there is none, or a class is empty."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder.name}/ folder under {folder.parent}; pass --data-dir "
                                "with a folder that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    try:
        return datasets.DatasetFolder(folder, read_image, (".jpg", ".jpeg", ".png", ".webp"))
    except FileNotFoundError as error:              # torchvision names the empty classes
        raise FileNotFoundError(f"{folder}: {error}") from None


def first_of_each_class(paths, labels, count, seed):
    """The indices of `count` images per class, those with the lowest hash of seed and file name.

    The hash makes the choice the same on every machine.
    """
    def key(i):
        return hashlib.md5(b"%d/" % seed + os.path.basename(paths[i])).digest()

    kept = [sorted(np.flatnonzero(labels == label), key=key)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def digest_of_files(paths, root):
    """A digest of relative names and of sizes: a folder that only moved keeps its digest."""
    root = os.fsencode(root)
    return digest(b"%s %d\n" % (os.path.relpath(path, root), os.path.getsize(path))
                  for path in paths)


# ---------------------------------------------------------------------------------------- load_data


def load_data(dataset, root="data", *, device="cpu", batch_size=128, seed=0, augment=True,
              train_images=0, images_per_class=None, image_size=224, workers=0, rank=0, world=1):
    """A data set ready to train on: an InMemory or a Folder.

    root               where CIFAR's files lie (or go), or the folder that holds train/ and val/.
    batch_size         images per step, in all `world` processes together.
    seed               of order, augmentation and subsets; `shapes` itself is always the same.
    augment            whether training images are cropped and flipped at random.
    train_images       keep this many training images of a seeded shuffle; 0 keeps all.
    images_per_class, image_size, workers    of folders: 0 takes all training images, and None takes
                       250 for imagenet and all for others; pixels per side; the number of
                       processes that decode.

    Raises ValueError or FileNotFoundError, in one line that says what to do.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; give one of {', '.join(DATASETS)}")
    common = dict(device=device, batch_size=batch_size, seed=seed, augment=augment, rank=rank,
                  world=world)
    if images_per_class is None:
        images_per_class = 250 if dataset == "imagenet" else 0
    if dataset in FOLDERS:
        return Folder(root, image_size, images_per_class, train_images, workers, **common)

    if dataset == "shapes":
        train, test, classes = draw_shapes(8000, seed=1), draw_shapes(1000, seed=2), list(SHAPES)
    else:
        train, test, classes = read_cifar(dataset, root)
    index = subset(len(train[1]), train_images, seed)
    return InMemory(dataset, (train[0][index], train[1][index]), test, classes, **common)


# ------------------------------------------------------------------------------------ Contact sheet


def contact_sheet(data, columns=5, rows=100):
    """uint8 (3, H, W): one row per class, each image before and after augmentation."""
    labels = data.train_labels.cpu().numpy()
    index = np.concatenate([np.resize(np.flatnonzero(labels == label), columns)
                            for label in range(len(data.classes))[:rows]])
    pictures = torch.stack([data.view(index), data.view(index, epoch=0)], 1).flatten(0, 1).cpu()
    if pictures.shape[-1] < 64:                     # small images are shown at twice their size
        pictures = F.interpolate(pictures, scale_factor=2, mode="nearest")
    return make_grid(pictures, nrow=2 * columns, padding=4, pad_value=255)


def main():
    parser = argparse.ArgumentParser(
        description="Draw a contact sheet: each image before and after augmentation.",
        usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="shapes", help="what to draw")
    parser.add_argument("--data-dir", default="data", help="where its files are")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side, for folders")
    parser.add_argument("--out", help="the PNG to write; by default runs/DATASET.png")
    args = parser.parse_args()

    out = Path(args.out or f"runs/{args.dataset}.png")
    try:
        data = load_data(args.dataset, args.data_dir, batch_size=1, image_size=args.image_size)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(contact_sheet(data) / 255, out)
    except (ValueError, OSError, RuntimeError) as error:    # RuntimeError: an impossible image size
        sys.exit(f"data.py: error: {printable(str(error).splitlines()[0])}")

    for row, name in enumerate(data.classes[:100], start=1):
        print(f"row {row:3d}  {printable(name)}")
    print(f"{out}: five images per row, each before and, right of it, after augmentation")


if __name__ == "__main__":
    main()
