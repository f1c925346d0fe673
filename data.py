"""Chapter 2: the data.  Look at it before you train on it.

    shapes              ten classes of figures, 32x32, drawn here from a fixed seed; no download
    cifar10, cifar100   50,000 + 10,000 images of 32x32, read and downloaded by torchvision
    imagenet            a folder that holds images in train/CLASS/ and val/CLASS/
    folder              the same layout with images of your own

Shapes and CIFAR are small.  They are held whole, as uint8, on the device that trains, and whole
batches are gathered, cropped, flipped and normalised there.  The images of a folder are decoded by
worker processes.

The batch of a step is a pure function of (seed, epoch, step).  So a run that was interrupted can
repeat its batches exactly, and several processes can share the batches of one.  For this, all
randomness is drawn on the CPU, from seeds made of (seed, epoch), in folders also of the image's
number: the order of the images, and the crop and the flip of each.  Every process takes its share.

Why shuffle?  A step follows the gradient of its batch, so a batch should look like the whole set.
If images came class by class, the network would learn each class and forget the one before.

Why augment?  A shifted or mirrored cat is a cat, and a network that sees each image a little
differently in each epoch cannot learn its pixels by heart.  Test images are not augmented.

The paper does not say how it augments.  We do what is usual.  CIFAR and shapes are padded by 4
zeros per side, cropped back and flipped (arXiv 1512.03385, section 4.2).  Images of folders are
cropped at random to 8-100% of their area, resized and flipped.
An incomplete last batch is not trained on, so that all steps average over equally many images.

    python -m tools.look                                        draw a contact sheet of shapes
    python -m tools.look --dataset cifar10 --data-dir data      the same of CIFAR-10
"""
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from support.console import UserError
from support.images import (
    ImageError, as_read, fingerprint, first_of_each_class, list_splits, read_cifar, read_image)
from support.shapes import SHAPES, draw_shapes
from support.workers import from_workers, ignore_ctrl_c, shared

FOLDERS = ("imagenet", "folder")
DATASETS = ("shapes", "cifar10", "cifar100", *FOLDERS)

# --------------------------------------------------------------------------------------- Statistics

# Mean and standard deviation of each colour over all pixels of all training images, in 0 to 1; for
# ImageNet, those in common use.  The 0.2023, 0.1994, 0.2010 that is often copied for CIFAR-10
# averages the deviations within single images, and is too small.
STATISTICS = {
    "shapes": ((0.4989, 0.5013, 0.5020), (0.2852, 0.2843, 0.2846)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),     # as its weights expect
}
STATISTICS["folder"] = STATISTICS["imagenet"]       # close enough for any photographs


class Normalise:
    """uint8 (B, 3, H, W) -> float32, each colour with mean 0 and deviation 1 over the data set.

    The initial weights are drawn for inputs of that magnitude, and no colour outweighs the others.
    """

    def __init__(self, dataset, device="cpu"):
        self.mean, self.std = (255 * torch.tensor(values, device=device)[:, None, None]
                               for values in STATISTICS[dataset])

    def __call__(self, images):
        return images.float().sub(self.mean).div_(self.std)


# --------------------------------------------------------------------------- Which image comes when

ORDER, AUGMENT = 0, 1       # two independent streams of random numbers for each (seed, epoch)


def mix(*numbers):
    """One 64-bit seed from several numbers.  A sum would give (1, 2) and (2, 1) the same seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def split(size, count, held_out, seed):
    """The indices of the first `count` and of the last `held_out` images of a seeded shuffle, each
    sorted.  If count is 0, all that are not held out come first."""
    if min(count, held_out) < 0 or count + held_out > max(0, size - (count == 0)):
        more = f", with --hold-out {held_out}" if held_out else ""
        raise UserError(f"--train-images {count}{more}: there are {size} training images")
    order = np.random.default_rng([seed]).permutation(size)
    return np.sort(order[:count or size - held_out]), np.sort(order[size - held_out:])


# ---------------------------------------------------------------------------- The two kinds of sets


class Images:
    """What the two kinds of data sets share.  Images are numbered, training images first.

    classes       the names of the classes.
    labels        int64 (N,), of all images; the first train_size of them are for training.
    content       bytes and arrays that identify what was loaded; .identity is made of them,
                  because a run must not go on with other images.
    batch_size    images per training step in all processes together.
    rank, world   this process and the number of processes; each takes its share of every batch.

    A subclass has gather(epoch, batches): for each array of image numbers in `batches` it yields
    the images, uint8 (B, 3, H, W), as augmented in `epoch` or, if that is None, plain; and the
    labels, (B,).
    """

    files = None        # in folders: a digest of all files, including unused ones

    def __init__(self, dataset, classes, labels, train_size, content, *,
                 device, batch_size, seed, augment, rank, world):
        self.classes, self.labels, self.train_size = classes, labels, train_size
        self.test_size, self.steps = len(labels) - train_size, train_size // batch_size
        self.identity = dict(train=train_size, test=self.test_size, classes=len(classes),
                             digest=digest_of([*map(os.fsencode, classes), *content]))
        self.device, self.batch_size, self.seed = torch.device(device), batch_size, seed
        self.augment, self.rank, self.world = augment, rank, world
        self.normalise = Normalise(dataset, device)

    def train_batches(self, epoch, first_step=0):
        """Yield this process's share of each batch: float32 (B, 3, H, W) and labels (B,)."""
        # Shuffle, cut into batches, and skip those that were trained on before a run was killed.
        order = np.random.default_rng([self.seed, epoch, ORDER]).permutation(self.train_size)
        batches = order[:self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        batches = batches[first_step:]

        # With two processes and a batch of 8, the first takes images 0 to 3 of it.
        share = self.batch_size // self.world
        batches = batches[:, self.rank * share:(self.rank + 1) * share]
        for images, labels in self.gather(epoch if self.augment else None, batches):
            yield self.normalise(images), labels

    def test_batches(self):
        """Yield this process's share of the test images, each exactly once and not augmented."""
        numbers = np.arange(self.train_size, len(self.labels))
        batches = [numbers[start + self.rank:start + self.batch_size:self.world]
                   for start in range(0, self.test_size, self.batch_size)]
        # Every process gets the same number of batches, some of which may be empty.
        for images, labels in self.gather(None, batches):
            yield self.normalise(images), labels

    def view(self, index, epoch=None):
        """Images `index`, uint8 (n, 3, H, W): as they are or, training images, as augmented."""
        return next(iter(self.gather(epoch, [np.asarray(index)])))[0]


def digest_of(content):
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


# ----------------------------------------------------------------------------------- Sets in memory

PAD = 4     # pixels of zeros on each side of a 32-pixel image before it is cropped back


class InMemory(Images):
    """A small data set, held whole on the device.

    train and test are (images, labels): uint8 (N, 3, H, W) and int64 (N,), on the CPU.
    """

    def __init__(self, dataset, train, test, classes, device="cpu", **options):
        labels = torch.cat([train[1], test[1]]).to(device)
        content = [tensor.numpy() for tensor in (*train, *test)]
        super().__init__(dataset, classes, labels, len(train[1]), content, device=device, **options)

        padded = F.pad(torch.cat([train[0], test[0]]), (PAD,) * 4)              # (N, 3, 40, 40)
        self.padded = padded.permute(0, 2, 3, 1).contiguous().to(device)        # channels last

    def gather(self, epoch, batches):
        draws = torch.from_numpy(self._draws(epoch)).to(self.device)
        numbers = np.concatenate([np.empty(0, int), *batches])      # one transfer for all batches
        numbers = torch.from_numpy(numbers).to(self.device)
        size = self.padded.shape[1] - 2 * PAD
        place = torch.arange(size, device=self.device)
        for index in numbers.split([len(batch) for batch in batches]):
            flip, top, left = draws[:, index, None]                             # each (B, 1)

            # Image n of the batch: `size` rows from top[n] on, and columns from left[n] on; to
            # mirror it, the columns are counted from the other side.
            rows, columns = top + place, left + place                           # each (B, size)
            columns = torch.where(flip == 1, size + 2 * PAD - 1 - columns, columns)
            images = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield images.permute(0, 3, 1, 2), self.labels[index]                # (B, 3, H, W)

    def _draws(self, epoch):
        """Flip, top and left edge of the crop of each image (in training: of each training image),
        int64 (3, N)."""
        if epoch is None:       # not mirrored, and cropped from the middle
            return np.full((3, len(self.labels)), [[0], [PAD], [PAD]])
        rng = np.random.default_rng([self.seed, epoch, AUGMENT])
        return rng.integers(0, [[2], [2 * PAD + 1], [2 * PAD + 1]], (3, self.train_size))


# ------------------------------------------------------------------------------------------ Folders


def centre(size):
    """Resize the shorter side to 8/7 of `size`, as is usual (256 for 224), and crop the middle."""
    return v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)])


class Preprocess:
    """An image of any size, uint8 (3, H, W) or Pillow's, -> float32 (1, 3, S, S): the input of a
    network of `dataset`.  Raises TypeError for anything else, and ValueError for an image that is
    too thin or has 32 bits per pixel."""

    def __init__(self, dataset, image_size=224):
        small = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
        self.resize = centre(image_size) if dataset in FOLDERS else small
        self.normalise = Normalise(dataset)

    def __call__(self, image):
        return self.normalise(self.resize(as_read(image))[None])


class ImageFiles(Dataset):
    """Image files by (epoch, indices): a batch, uint8 (B, 3, S, S), and labels (B,); B may be 0.

    In training, the crop is drawn by a generator seeded with (seed, epoch, index), so it does not
    matter which process does it.  With epoch None the middle is cropped.  Where an image cannot be
    read, the error is returned, and raised in the main process.
    """

    def __init__(self, paths, labels, size, seed):
        self.paths, self.labels = paths, labels         # arrays: a list would be copied per worker
        self.size, self.seed = size, seed
        self.augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
        self.plain = centre(size)

    def __getitem__(self, key):
        epoch, index = key
        images = torch.empty(len(index), 3, self.size, self.size, dtype=torch.uint8)
        crop = self.plain if epoch is None else self.augmented
        for image, i in zip(images, index):
            try:
                whole = read_image(os.fsdecode(self.paths[i]))
            except ImageError as error:
                return error
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(mix(self.seed, epoch or 0, i))
                image.copy_(crop(whole))
        return shared(images, torch.from_numpy(self.labels[index]))


class Folder(Images):
    """A data set of image files, decoded by worker processes: `size` pixels per side."""

    def __init__(self, root, size, images_per_class, train_images, hold_out, only_test, workers, *,
                 seed, **options):
        classes, (paths, labels), (test_paths, test_labels) = list_splits(root, only_test)

        # Names, sizes and the ends of the files identify a folder, wherever it lies.
        lines = {path: b"%s %s\n" % (os.path.relpath(path, os.fsencode(root)), fingerprint(path))
                 for path in (*paths, *test_paths)}
        self.files = digest_of(lines.values())

        if images_per_class and len(paths):
            kept = first_of_each_class(paths, labels, images_per_class, seed)
            paths, labels = paths[kept], labels[kept]
        kept, held_out = split(len(labels), train_images, hold_out, seed)
        if hold_out:
            test_paths, test_labels = paths[held_out], labels[held_out]
        paths, labels = paths[kept], labels[kept]

        paths = np.concatenate([paths, test_paths])
        both, content = np.concatenate([labels, test_labels]), [lines[path] for path in paths]
        super().__init__("folder", classes, torch.from_numpy(both), len(labels), content,
                         seed=seed, **options)

        # One loader for both splits, so that its workers start once per run.  The list of keys is
        # filled anew for each pass.
        self.keys = []
        self.loader = DataLoader(
            ImageFiles(paths, both, size, seed), batch_size=None, sampler=self.keys,
            num_workers=workers, persistent_workers=workers > 0, worker_init_fn=ignore_ctrl_c,
            pin_memory=self.device.type == "cuda")

    def gather(self, epoch, batches):
        self.keys[:] = mine = self.current = [(epoch, batch) for batch in batches]
        for images, labels in from_workers(self.loader):    # uint8: a quarter of float32
            yield (images.to(self.device, non_blocking=True),
                   labels.to(self.device, non_blocking=True))
            if self.current is not mine:
                raise RuntimeError("a pass over a folder began before another one ended")


# ---------------------------------------------------------------------------------------- load_data


def load_data(dataset, root="data", *, device="cpu", batch_size=128, seed=0, augment=True,
              train_images=0, hold_out=0, images_per_class=0, image_size=224, only_test=False,
              workers=0, rank=0, world=1):
    """A data set ready to train on: an InMemory or a Folder.

    root                where CIFAR's files lie (or go), or the folder that holds train/ and val/.
    batch_size          images per step, in all `world` processes together.
    seed                of order, augmentation and subsets; `shapes` itself is always the same.
    augment             whether training images are cropped and flipped at random.
    train_images        keep this many training images of a seeded shuffle; 0 keeps all.
    hold_out            so many others come in place of the test images: choose settings by these.
    images_per_class    in folders: keep this many training images of each class; 0 keeps all.
    image_size          in folders: pixels per side.
    only_test           in folders: there need be no training images.
    workers             in folders: processes that decode.

    Raises UserError, in one line that says what to do.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; give one of {', '.join(DATASETS)}")
    common = dict(device=device, batch_size=batch_size, seed=seed, augment=augment, rank=rank,
                  world=world)
    if dataset in FOLDERS:
        return Folder(root, image_size, images_per_class, train_images, hold_out, only_test,
                      workers, **common)

    if dataset == "shapes":
        train, test, classes = draw_shapes(12000, seed=1), draw_shapes(1000, seed=2), list(SHAPES)
    else:
        train, test, classes = read_cifar(dataset, root)
    index, held_out = split(len(train[1]), train_images, hold_out, seed)
    if hold_out:
        test = train[0][held_out], train[1][held_out]
    return InMemory(dataset, (train[0][index], train[1][index]), test, classes, **common)
