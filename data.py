"""Chapter 2: what the network eats.  Look at your data before you train on it.

    shapes              ten classes of figures, 32x32, drawn here from a fixed seed; nothing to download
    cifar10, cifar100   50,000 + 10,000 images of 32x32, by torchvision (download, md5)
    imagenet            a folder that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG; 250 training images a class, as
                        in the paper, chosen by a hash of their names
    folder              the same layout with images of your own; all of them

The first three are small: they are held whole, as uint8, on the device that trains, and whole batches are
shuffled, cropped, flipped and normalised there.  Folders of JPEGs are decoded by worker processes, turned as
their EXIF orientation says, and made RGB (grayscale and CMYK, too); content, not name, decides the format.

One promise carries exact resume and equality between one process and many: a global batch is a pure function
of (seed, epoch, step).  So all randomness is drawn on the CPU, from seeds made of (seed, epoch): the order of the
epoch, and the crop and flip of every image in it.  Of each batch, every process takes its slice.

The paper does not say how it augments.  We use what is usual: CIFAR and shapes are padded by 4 zeros a side,
cropped back and flipped (arXiv 1512.03385, section 4.2), ImageNet is cropped at random to 8-100 % of its area,
resized and flipped.  Test images are never augmented, the incomplete last training batch is dropped.

    python data.py                                          a contact sheet: each image before and after
    python data.py --dataset cifar10 --data-dir data
    python data.py --benchmark                              images a second, and their share of a training step
"""
import argparse
import hashlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

IN_MEMORY, FOLDERS = ("shapes", "cifar10", "cifar100"), ("imagenet", "folder")
DATASETS = IN_MEMORY + FOLDERS
PAD = 4     # pixels of zeros around a 32-pixel image before it is cropped back

# Mean and standard deviation of each colour over all pixels of all training images, on a scale of 0 to 1.
# (An often-copied 0.2023, 0.1994, 0.2010 for CIFAR-10 averages the images' own deviations: too small.)
STATISTICS = {
    "shapes": ((0.4980, 0.5020, 0.5016), (0.2835, 0.2855, 0.2844)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# ------------------------------------------------------------------------------------------ Sets in memory


class InMemory:
    """A small data set, held whole on `device`.

    train, test     (images, labels): uint8 (N, 3, H, W) and int64 (N,), on the CPU.
    classes         their names.
    statistics      (mean, std) of the three colours, on a scale of 0 to 1.
    erase           side of a square, in pixels, that is greyed somewhere in every augmented image; 0: none.
    batch_size      images of a training step in all processes together.
    rank, world     this process and how many there are; each takes its slice of every batch.
    """

    def __init__(self, train, test, classes, statistics, erase, *, device, batch_size, seed, augment, rank, world):
        self.classes, self.device, self.augment, self.erase = classes, torch.device(device), augment, erase
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        padded = F.pad(train[0].to(device), (PAD,) * 4)
        height, width = train[0].shape[2:]
        both = torch.stack([padded, padded.flip(3)])                    # as they are and mirrored
        self.windows = both.unfold(3, height, 1).unfold(4, width, 1)    # a view (2, N, 3, 9, 9, H, W): all crops
        self.train_labels = train[1].to(device)
        self.test_images, self.test_labels = (tensor.to(device) for tensor in test)
        self.train_size, self.test_size = len(self.train_labels), len(self.test_labels)
        self.steps = self.train_size // batch_size
        self.normalise = Normalise(statistics, device)

    def train_batches(self, epoch, first_step=0):
        """Yield this process's share of every batch: float32 (B, 3, H, W), normalised, and labels (B,)."""
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(self.train_size)
        order = self._send(order)                               # one small copy an epoch, none a step
        draws = self._draws(epoch if self.augment else None)
        for step in range(first_step, self.steps):
            index = order[share(step, self.batch_size, self.rank, self.world)]
            yield self.normalise(self._crop(index, draws)), self.train_labels[index]

    def test_batches(self):
        """Yield this process's share of the test images, each exactly once, as they are."""
        for start in range(0, self.test_size, self.batch_size):
            part = slice(start + self.rank, min(start + self.batch_size, self.test_size), self.world)
            yield self.normalise(self.test_images[part]), self.test_labels[part]

    def view(self, index, epoch=None):
        """Training images `index` as uint8 (n, 3, H, W): as augmented in `epoch`, or as they are."""
        return self._crop(self._send(index), self._draws(epoch))

    def _draws(self, epoch):
        """For every training image its flip, crop and erasure, int64 (5, N): a function of (seed, epoch)."""
        if epoch is None:       # the middle of the padded image, and an erasure out of sight
            draws = np.full((5, self.train_size), [[0], [PAD], [PAD], [-99], [-99]])
        else:
            high = [[2], [2 * PAD + 1], [2 * PAD + 1], *([size] for size in self.windows.shape[5:])]
            draws = np.random.default_rng([self.seed, epoch, AUGMENT]).integers(0, high, (5, self.train_size))
        return self._send(draws)

    def _crop(self, index, draws):
        flip, top, left, row, column = draws[:, index]                  # each (B,)
        images = self.windows[flip, index, :, top, left]                # one gather; separated indices put B first: (B, 3, H, W)
        if self.erase:          # the square has its middle at (row, column), and may hang over the edge
            y, x = (torch.arange(size, device=self.device) - middle[:, None] + self.erase // 2      # (B, H) and (B, W)
                    for size, middle in zip(images.shape[2:], (row, column)))
            hole = ((0 <= y) & (y < self.erase))[:, :, None] & ((0 <= x) & (x < self.erase))[:, None]
            images = images.masked_fill(hole[:, None], 128)
        return images

    def _send(self, array):
        tensor = torch.from_numpy(np.asarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


ORDER, AUGMENT = 0, 1       # two independent streams of random numbers for each (seed, epoch)


def mix(*numbers):
    """One 64-bit seed from several numbers, without the coincidences that adding them would bring."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def share(step, batch_size, rank, world):
    """Where this process's part of a global batch lies in the epoch's order."""
    start, size = step * batch_size, batch_size // world
    return slice(start + rank * size, start + (rank + 1) * size)


class Normalise:
    """uint8 (B, 3, H, W) -> float32, each colour with mean 0 and deviation 1 over the data set."""

    def __init__(self, statistics, device):
        self.mean, self.std = (255 * torch.tensor(values, device=device)[:, None, None] for values in statistics)

    def __call__(self, images):
        return images.float().sub_(self.mean).div_(self.std)


# -------------------------------------------------------------------------------------------------- Shapes


def box(u, v, width, height):
    return np.maximum(abs(u) - width, abs(v) - height)


# About the signed distance from the points (u, v) to the outline of a figure of radius 1; negative inside.
SHAPES = {
    "bar": lambda u, v: box(u, v, 1, 0.3),
    "cross": lambda u, v: np.minimum(box(u, v, 1, 0.3), box(u, v, 0.3, 1)),
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "frame": lambda u, v: abs(box(u, v, 0, 0) - 0.65) - 0.15,
    "half disc": lambda u, v: np.maximum(np.hypot(u, v) - 1, -v),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) - 0.2,
    "square": lambda u, v: box(u, v, 0.75, 0.75),
    "star": lambda u, v: np.hypot(u, v) - 0.4 - 0.6 * abs((np.arctan2(v, u) * 5 / math.pi) % 2 - 1),      # five tips
    "triangle": lambda u, v: np.max([u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)], 0) - 0.5,
    "two discs": lambda u, v: np.hypot(abs(u) - 0.6, v) - 0.4,
}


def draw_shapes(count, seed, size=32):
    """Draw `count` figures: uint8 (count, 3, size, size) and labels (count,), the ten classes in equal numbers.

    Place, size, rotation and both colours vary, so that no pixel on its own says anything about the class.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random(shape, dtype=np.float32)

    labels = rng.permutation(np.arange(count) % len(SHAPES))
    radius = uniform(6, 12, count, 1, 1)                                    # pixels
    centre = size / 2 + uniform(-1, 1, 2, count, 1, 1) * (size / 2 - radius)
    angle = uniform(0, 2 * math.pi, count, 1, 1)
    back = uniform(0, 1, count, 3, 1, 1)
    fore = (back + uniform(0.3, 0.7, count, 3, 1, 1)) % 1                   # differs by 0.3 or more in each colour
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5)[:, None] - centre     # pixels from the centre, (count, H, W)
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius                    # the figure's own axes, its radius 1
    v = (y * np.cos(angle) - x * np.sin(angle)) / radius
    outside = np.empty_like(u)                                              # > 0 outside the figure, < 0 inside
    for label, distance in enumerate(SHAPES.values()):
        mine = labels == label
        outside[mine] = distance(u[mine], v[mine])
    images = (fore - back) * np.clip(0.5 - outside * radius, 0, 1)[:, None]         # by the share of the pixel covered
    images += back
    images += 0.03 * rng.standard_normal(images.shape, dtype=np.float32)
    images = np.rint(255 * images.clip(0, 1, out=images), out=images)
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


# --------------------------------------------------------------------------------------------------- CIFAR


def read_cifar(dataset, root):
    """CIFAR-10 or -100 from the original files below `root`: ((images, labels), (images, labels), classes).

    Raises ValueError where a file is damaged, FileNotFoundError where one is missing and cannot be downloaded.
    """
    source = getattr(datasets, dataset.upper())
    folder = Path(root, source.base_folder)
    for name, md5 in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
        if (folder / name).exists() and not check_integrity(folder / name, md5):
            raise ValueError(f"{folder / name} is truncated or altered (its md5 is not {md5}); "
                             f"delete {folder} and run again to download it anew")
    try:
        train, test = source(root, train=True, download=True), source(root, train=False)    # what is there is not fetched
    except (RuntimeError, OSError) as error:        # URLError is an OSError
        raise FileNotFoundError(f"{dataset} is not in {folder} and cannot be downloaded ({error}); put its original "
                                "files there, or pass --dataset shapes (make: DATASET=shapes), which needs none") from None
    splits = [(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
              for split in (train, test)]
    return *splits, train.classes


# ------------------------------------------------------------------------------------------------- Folders


def read_image(path):
    """uint8 (3, H, W), in the orientation that EXIF asks for; ValueError for what does not decode."""
    try:
        image = torchvision.io.decode_image(str(path), mode="RGB", apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no image that can be decoded ({str(error).splitlines()[0]}); "
                         "replace or remove it") from None
    if image.dtype != torch.uint8 or image.ndim != 3:
        raise ValueError(f"{path} holds several images, or more than 8 bits a colour; convert it")
    return image


def centre(size):
    """Resize the shorter side to 8/7 of `size`, as usual (256 for 224), and cut out the middle."""
    return v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)])


class ImageFiles(Dataset):
    """One split of a folder of images: (epoch, indices) -> a batch, uint8 (B, 3, S, S) and labels (B,); B may be 0.

    In training, S is cut at random from each image by a generator seeded with (seed, epoch, index), whichever
    process does it.  With epoch None the image is resized to 8/7 S and its centre cut out.
    Paths are kept as one numpy array: a list of a million strings would be copied into every worker.
    """

    def __init__(self, folder, size, seed):
        if not folder.is_dir():
            raise FileNotFoundError(f"no {folder.name}/ folder under {folder.parent}; pass --data-dir with a folder "
                                    "that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG")
        try:
            found = datasets.ImageFolder(folder)
        except FileNotFoundError as error:          # torchvision names the empty classes
            raise FileNotFoundError(f"{folder}: {error}") from None
        self.classes, self.seed, self.size = found.classes, seed, size
        self.paths = np.array([os.fsencode(path) for path, _ in found.samples])
        self.labels = np.array(found.targets)
        self.augmented = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
        self.plain = centre(size)

    def keep(self, index):
        self.paths, self.labels = self.paths[index], self.labels[index]

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
    """A data set of image files, decoded by worker processes.  Fields and methods are InMemory's."""

    def __init__(self, root, size, images_per_class, train_images, workers,
                 *, device, batch_size, seed, augment, rank, world):
        self.device, self.augment, self.workers = torch.device(device), augment, workers
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.train, self.test = (ImageFiles(Path(root, name), size, seed) for name in ("train", "val"))
        self.classes = self.train.classes
        if odd := sorted(set(self.classes) ^ set(self.test.classes)):
            raise ValueError(f"train/ and val/ under {root} hold different classes; only in one of them: {', '.join(odd[:5])}")
        if images_per_class:
            self.train.keep(first_of_each_class(self.train, images_per_class, seed))
        self.train.keep(subset(len(self.train.labels), train_images, seed))
        self.train_labels = torch.from_numpy(self.train.labels)
        self.train_size, self.test_size = len(self.train.labels), len(self.test.labels)
        self.steps = self.train_size // batch_size
        self.normalise = Normalise(STATISTICS["imagenet"], device)      # of any photographs, near enough

    def train_batches(self, epoch, first_step=0):
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(self.train_size)
        when = epoch if self.augment else None
        return self._load(self.train, ((when, order[share(step, self.batch_size, self.rank, self.world)])
                                       for step in range(first_step, self.steps)))

    def test_batches(self):
        return self._load(self.test, ((None, np.arange(self.test_size)[start:start + self.batch_size][self.rank::self.world])
                                      for start in range(0, self.test_size, self.batch_size)))

    def view(self, index, epoch=None):
        return self.train[epoch, index][0]

    def _load(self, files, keys):
        loader = DataLoader(files, batch_size=None, sampler=keys, num_workers=self.workers, pin_memory=self.device.type == "cuda")
        try:
            for images, labels in self._ahead(loader):
                yield self.normalise(images), labels
        except ValueError as error:             # a worker's exception carries its traceback; the last line says it
            raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None

    def _ahead(self, batches):
        """On a GPU, copy each batch while the one before it is used.  uint8 travels: a quarter of float32."""
        if self.device.type != "cuda":
            yield from batches
            return
        copies, ready = torch.cuda.Stream(), None
        for batch in batches:
            with torch.cuda.stream(copies):
                coming = [tensor.to(self.device, non_blocking=True) for tensor in batch]
            if ready:
                yield ready
            torch.cuda.current_stream().wait_stream(copies)
            for tensor in coming:
                tensor.record_stream(torch.cuda.current_stream())
            ready = coming
        if ready:
            yield ready


def first_of_each_class(files, count, seed):
    """Indices of `count` images a class, those with the lowest hash of seed and file name: alike on every machine."""
    def key(i):
        return hashlib.md5(b"%d/" % seed + os.path.basename(files.paths[i])).digest()

    kept = [sorted(np.flatnonzero(files.labels == label), key=key)[:count] for label in range(len(files.classes))]
    return np.sort(np.concatenate(kept))


# ------------------------------------------------------------------------------------------------ load_data


def subset(size, count, seed):
    """Indices of the first `count` of a seeded shuffle, in their old order; all of them for 0."""
    if count > size:
        raise ValueError(f"--train-images is {count}, but there are {size} training images")
    return np.sort(np.random.default_rng([seed]).permutation(size)[:count or size])


def load_data(dataset, root="data", *, device="cpu", batch_size=128, seed=0, augment=True, erase=0, train_images=0,
              images_per_class=250, image_size=224, workers=0, rank=0, world=1):
    """A data set ready to train on: an InMemory or a Folder.

    root                where CIFAR's files lie (or go), or the folder that holds train/ and val/.
    batch_size          images a step, in all `world` processes together.
    seed                of order, augmentation and subsets; `shapes` itself is always the same.
    augment, erase      whether training images are cropped and flipped; side of the erased square (in memory only).
    train_images        keep this many training images of a seeded shuffle; 0 keeps all.
    images_per_class, image_size, workers      of folders: 0 takes all images; pixels a side; processes.

    Raises ValueError or FileNotFoundError, in one line that says what to do.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; give one of {', '.join(DATASETS)}")
    common = dict(device=device, batch_size=batch_size, seed=seed, augment=augment, rank=rank, world=world)
    if dataset in FOLDERS:
        data = Folder(root, image_size, images_per_class, train_images, workers, **common)
    else:
        if dataset == "shapes":
            train, test, classes = draw_shapes(8000, seed=1), draw_shapes(1000, seed=2), list(SHAPES)
        else:
            train, test, classes = read_cifar(dataset, root)
        index = subset(len(train[1]), train_images, seed)
        data = InMemory((train[0][index], train[1][index]), test, classes, STATISTICS[dataset], erase, **common)
    return data


# ----------------------------------------------------------------------------------------------------- Look


def contact_sheet(data, columns=5, rows=100):
    """uint8 (3, H, W): a row a class (the first `rows`), each of `columns` images before and after augmentation."""
    labels = data.train_labels.cpu().numpy()
    index = np.concatenate([np.resize(np.flatnonzero(labels == label), columns) for label in range(len(data.classes))[:rows]])
    pictures = torch.stack([data.view(index), data.view(index, epoch=0)], 1).flatten(0, 1).cpu()
    if pictures.shape[-1] < 64:                 # small images twice as large, each pixel a square
        pictures = F.interpolate(pictures, scale_factor=2, mode="nearest")
    return make_grid(pictures, nrow=2 * columns, padding=4, pad_value=255)


def print_benchmark(data):
    """Images a second of the loader alone, and its share of the time of a training step of SENetV2-50."""
    from senetv2 import build_model, interleaved, training_step         # the other chapter, for this comparison only

    def some_batches():
        return sum(1 for _ in zip(range(20), data.train_batches(0)))

    device, size = data.device, data.view([0]).shape[-1]
    net = build_model("senetv2").to(device, memory_format=torch.channels_last)
    count = some_batches()
    loading, training = interleaved([some_batches, training_step(net, data.batch_size, size, device)], 20, device).median(0).values
    print(f"loader: {count * data.batch_size / loading:,.0f} images/s on {device}, in batches of {data.batch_size}; "
          f"training SENetV2-50: {data.batch_size / training:,.0f} images/s; the loader takes {loading / count / training:.2%} "
          "of a training step")


def main():
    parser = argparse.ArgumentParser(description="Draw a contact sheet: each image before and after augmentation.",
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="shapes", help=f"{', '.join(DATASETS)} (default shapes)")
    parser.add_argument("--data-dir", default="data", help="where its files are (default data)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side, for folders (default 224)")
    parser.add_argument("--benchmark", action="store_true", help="measure the loader in the place of drawing the sheet")
    parser.add_argument("--out", help="the PNG to write (default runs/DATASET.png)")
    args = parser.parse_args()
    try:
        if args.benchmark:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return print_benchmark(load_data(args.dataset, args.data_dir, device=device, image_size=args.image_size,
                                             workers=min(8, os.cpu_count())))
        data = load_data(args.dataset, args.data_dir, batch_size=1, image_size=args.image_size)
        out = Path(args.out or f"runs/{args.dataset}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(contact_sheet(data) / 255, out)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: error: {error}")
    for row, name in enumerate(data.classes[:100], start=1):
        print(f"row {row:3d}  {name}")
    print(f"{out}: in each row five images, each before and, right of it, after augmentation")


if __name__ == "__main__":
    main()
