"""Sets in memory: shapes and CIFAR, order and augmentation, what several processes see."""
import functools
import math
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2

import data
from senetv2 import build_model
from support.console import UserError
from test_senetv2 import (
    HERE, SMALL, assert_equal, in_memory, joined, numbered, save_image)
from tests.conftest import STATISTICS, add_image, load_folder, no_network
from tools import look


def test_processes_share_each_batch_and_some_get_an_empty_one(folder):
    for load in (numbered, functools.partial(load_folder, folder, workers=1)):
        shares, whole = [load(rank=rank, world=4) for rank in range(4)], load()
        batches = zip(*(share.train_batches(0) for share in shares))
        assert_equal([joined(parts) for parts in batches], list(whole.train_batches(0)))

        parts = [list(share.test_batches()) for share in shares]
        seen, expected = (sorted((label.item(), image.numpy().tobytes())
                                 for image, label in zip(*joined(batches)))
                          for batches in (sum(parts, []), whole.test_batches()))
        assert seen == expected and {len(part) for part in parts} == {2}

    empty, _ = parts[1][1]      # of 9 images in batches of 8
    net = build_model("senetv2", 3, SMALL).eval()
    assert empty.shape == (0, 3, 32, 32) and net(empty).shape == (0, 3)


def test_train_images_takes_the_first_of_a_seeded_shuffle():
    for count in (3, 0):
        assert [*map(list, data.split(3, count, 0, seed=4))] == [[0, 1, 2], []]
    images, _ = data.draw_shapes(12000, seed=1)
    kept = np.random.default_rng([5]).permutation(12000)[:40]
    source = data.load_data("shapes", train_images=40, seed=5)
    assert torch.equal(source.view(np.arange(40)), images[np.sort(kept)])
    assert (source.train_size, source.test_size) == (40, 1000)


def test_augmentation_is_a_function_of_seed_epoch_and_index_and_can_be_turned_off(folder):
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    save_image(ramp, folder / "train" / "cat" / "cat_0.JPEG")           # it grows to the right
    add_image(folder)                                                   # image 12 is its copy
    for load in (numbered, functools.partial(load_folder, folder)):
        crops, again, *others = (load(seed=seed).view(np.arange(13), epoch)
                                 for seed, epoch in ((0, 3), (0, 3), (1, 3), (0, 4)))
        assert_equal(crops, again)
        assert not any(torch.equal(crops, other) for other in others)

        for augment in (True, False):
            source = load(augment=augment)
            originals = source.normalise(source.view(np.arange(source.train_size)))
            seen, _ = joined([*source.train_batches(0), *source.train_batches(1)])
            seen, originals = ({image.numpy().tobytes() for image in images}
                               for images in (seen, originals))
            assert (len(seen) > source.train_size) == augment == (not seen <= originals)

    # In a folder, each image has a crop of its own, flipped now and then.
    assert not torch.equal(crops[0], crops[12])
    rows = [source.view([0], epoch)[0, 0, 16].int() for epoch in range(20)]
    assert {(row[-1] > row[0]).item() for row in rows} == {True, False}


def test_crops_and_flips_are_torchvisions_and_uniform():
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)     # no two crops are alike
    padded, known, count = F.pad(picture, (4,) * 4), {}, 4000
    for top, left, flip in np.ndindex(9, 9, 2):
        crop = v2.functional.crop(padded, top, left, 32, 32)
        crop = v2.functional.horizontal_flip(crop) if flip else crop
        known[crop.numpy().tobytes()] = top, left, flip

    pictures, labels = picture.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)
    source = in_memory((pictures, labels), (pictures[:1], labels[:1]), ["a"])
    seen = [known[image.numpy().tobytes()] for image in source.view(np.arange(count), epoch=0)]
    for draws, choices in zip(zip(*seen), (9, 9, 2)):
        expected = count / choices
        counts, spread = np.bincount(draws), math.sqrt(expected * (1 - 1 / choices))
        assert len(counts) == choices and (abs(counts - expected) < 4 * spread).all()
    assert len(set(seen)) == 9 * 9 * 2


def test_crops_of_a_folder_take_8_to_100_percent_of_its_images_in_many_forms(folder):
    y, x = torch.meshgrid(*[torch.arange(256, dtype=torch.uint8)] * 2, indexing="ij")
    save_image(torch.stack([x, y, y]), folder / "train/cat/cat_0.JPEG")     # red says where in x
    source = load_folder(folder)
    views = torch.cat([source.view([0], epoch).float() for epoch in range(300)])
    wide, high = (views[:, channel].flatten(1) for channel in (0, 1))
    sides = [(values.amax(1) - values.amin(1)) / 256 * 32 / 31 for values in (wide, high)]
    areas, forms = sides[0] * sides[1], sides[0] / sides[1]
    assert 0.06 < areas.min() < 0.12 and 0.9 < areas.max() < 1.02 and 0.4 < areas.mean() < 0.56
    assert 0.7 < forms.min() < 0.8 and 1.25 < forms.max() < 1.42         # 3/4 to 4/3


def test_another_pixel_label_or_class_is_another_set_in_memory():
    def identity(changed=None):
        parts = [torch.zeros(count, *shape, dtype=torch.uint8) for count, shape in
                 ((4, (3, 32, 32)), (4, ()), (2, (3, 32, 32)), (2, ()), (5, ()))]
        if changed is not None:
            parts[changed].view(-1)[-1] = 1
        return str(in_memory(parts[:2], parts[2:4], str(parts[4].tolist()), batch_size=2).identity)

    assert identity() == identity()
    assert len({identity(changed) for changed in (None, 0, 1, 2, 3, 4)}) == 6


def test_the_contact_sheet_pairs_before_and_after_per_class():
    sheet = look.contact_sheet(numbered())
    assert sheet.shape == (3, 10 * 68 + 4, 10 * 68 + 4) and sheet.dtype == torch.uint8
    tiles = sheet[0, 4:, 4:].unfold(0, 64, 68).unfold(1, 64, 68)        # (10, 10, 64, 64)
    fill = torch.arange(1, 51).reshape(5, 10).T     # image i has class i % 10 and the value i + 1
    assert (tiles[:, ::2] == fill[..., None, None]).all()
    assert (tiles[:, 1::2].amax((2, 3)) == fill).all() and (tiles[:, 1::2] == 0).any()


def test_shapes_are_always_the_same_with_ten_equal_classes_and_the_tables_statistics():
    images, labels = data.draw_shapes(12000, seed=1)
    assert_equal(data.draw_shapes.__wrapped__(12000, seed=1), (images, labels))     # drawn anew
    assert torch.bincount(labels).tolist() == [1200] * 10
    deviation, mean = torch.std_mean(images.double() / 255, (0, 2, 3))
    known = torch.tensor(STATISTICS["shapes"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([mean, deviation]), known, atol=6e-5, rtol=0)


@pytest.mark.parametrize("level", ["X86_V4|AVX512", "X86_V3|X86_V4|AVX|FMA"])
def test_shapes_are_the_same_bits_on_processors_without_newer_instructions(level):
    found = np._core._multiarray_umath
    present = [name for name in found.__cpu_dispatch__ if found.__cpu_features__[name]]
    off = [name for name in present if re.match(level, name)]
    if not off:
        pytest.skip(f"numpy finds none of {level} here")
    code = "import data; print(data.digest_of([data.draw_shapes(300, 1)[0].numpy()]))"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, text=True,
                           env=os.environ | dict(NPY_DISABLE_CPU_FEATURES=" ".join(off)),
                           stdout=subprocess.PIPE)
    assert drawn.stdout.strip() == data.digest_of([data.draw_shapes(300, 1)[0].numpy()])


def test_a_linear_classifier_on_the_pixels_fails_on_shapes():
    (x, y), (test_x, test_y) = data.draw_shapes(12000, seed=1), data.draw_shapes(1000, seed=2)
    x, test_x = (F.pad(images.flatten(1).float() / 127.5 - 1, (0, 1), value=1)
                 for images in (x, test_x))
    products, sums = x.T @ x, x.T @ F.one_hot(y).float()
    for ridge in (10, 1000, 100000):        # least squares, in closed form
        weights = torch.linalg.solve(products + ridge * torch.eye(x.shape[1]), sums)
        assert ((test_x @ weights).argmax(1) == test_y).float().mean() < 0.25


@pytest.mark.parametrize("dataset, key, classes", [("cifar10", "labels", 10),
                                                   ("cifar100", "fine_labels", 100)])
def test_cifar_is_read_in_its_original_format_or_refused_with_the_way_out(
        dataset, key, classes, tmp_path, monkeypatch, capsys):
    source, module = getattr(torchvision.datasets, dataset.upper()), torchvision.datasets.cifar
    pixels = torch.randint(256, (36, 3, 32, 32), dtype=torch.uint8)
    labels, names = torch.randint(classes, (36,)), [f"class {i}" for i in range(classes)]
    files, root = [name for name, _ in source.train_list + source.test_list], source.base_folder
    parts = [whole.chunk(len(files)) for whole in (pixels, labels)]

    # each row holds the red, the green and the blue plane of one image
    content = {name: {"data": part.flatten(1).numpy(), key: some.tolist()}
               for name, part, some in zip(files, *parts)}
    content[source.meta["filename"]] = {source.meta["key"]: names}
    (tmp_path / root).mkdir()
    for name in content:
        (tmp_path / root / name).write_bytes(pickle.dumps(content[name]))

    # Their md5 is not the original's, so they count as damaged.  Then the class names alone do.
    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    for check in (module.check_integrity, lambda path, md5: not path.endswith("meta")):
        monkeypatch.setattr(module, "check_integrity", check)
        said = f"{dataset} is missing or damaged in .*{root} .*--dataset shapes"
        with pytest.raises(UserError, match=said):
            data.load_data(dataset, tmp_path)
    assert "downloading" not in capsys.readouterr().out             # some files were there
    with pytest.raises(UserError, match="--dataset shapes"):
        data.load_data(dataset, tmp_path / "elsewhere")
    assert f"downloading {dataset}" in capsys.readouterr().out

    monkeypatch.setattr(module, "check_integrity", lambda path, md5: True)
    ours, test = data.load_data(dataset, tmp_path, batch_size=2), slice(-36 // len(files), None)
    assert_equal([ours.view(np.arange(36)), ours.labels, ours.classes], [pixels, labels, names])

    # never augmented, in order, and normalised as torchvision does
    oracle = v2.functional.normalize(pixels[test].float() / 255, *STATISTICS[dataset])
    torch.testing.assert_close(joined(ours.test_batches()), (oracle, labels[test]))


@pytest.mark.parametrize("kind", ["memory", "folder"])
@pytest.mark.parametrize("count, per_class", [(0, 0), (7, 0), (0, 6), (5, 6)])
def test_held_out_images_are_never_trained_on_and_alike_for_one_seed(kind, count, per_class,
                                                                    folder):
    def load(**options):
        if kind == "folder":
            return load_folder(folder, images_per_class=per_class, **options)
        return data.load_data("shapes", batch_size=4, **options)

    def images_of(source, numbers):
        return [image.numpy().tobytes() for image in source.view(numbers)]

    everything, few = load(seed=3), load(seed=3, train_images=count, hold_out=10)
    trained = images_of(few, np.arange(few.train_size))
    held_out = images_of(few, np.arange(few.train_size, few.train_size + 10))
    if kind == "folder":        # shapes are too many to look at each
        whole = images_of(everything, np.arange(everything.train_size))
        assert len({*whole}) == everything.train_size == (18 if per_class else 36)
        assert {*trained} | {*held_out} <= {*whole} and len({*held_out}) == 10
    assert few.test_size == 10 and not {*trained} & {*held_out}
    assert few.train_size == (count or everything.train_size - 10)

    # They depend on the seed alone, and are the last of the shuffle of which others are the first.
    again = load(seed=3, train_images=2, hold_out=10)
    assert images_of(again, np.arange(2, 12)) == held_out
    if count:
        plain = load(seed=3, train_images=count)
        assert images_of(plain, np.arange(count)) == trained
    other = load(seed=4, train_images=2, hold_out=10)
    assert images_of(other, np.arange(2, 12)) != held_out
    with pytest.raises(UserError, match="--hold-out"):
        load(train_images=everything.train_size - 9, hold_out=10)
