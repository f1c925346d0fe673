"""Folders of images as other people and programs leave them."""
import errno
import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import data
import train
from support.console import UserError
from support.images import as_read
from test_senetv2 import HERE, assert_equal, joined
from tests.conftest import (
    STATISTICS, add_image, complaint, folder_flags, load_folder, passes, rename_class)


def test_images_of_every_kind_are_read_as_they_look(tmp_path):
    ramp = np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(40, 30, 3)
    colour, grey = Image.fromarray(ramp), np.repeat(ramp[..., :1], 3, axis=2)
    turn_right = Image.Exif()
    turn_right[0x0112] = 6
    other, clear = Image.fromarray(255 - ramp), Image.fromarray(ramp).convert("RGBA")
    clear.putalpha(7)
    kinds = {       # file -> the image, how it is saved, how it looks
        "png.JPEG": (colour, dict(format="PNG"), ramp),
        "junk.png": (colour, dict(exif=b"Exif\0\0 no EXIF"), ramp), "a.bmp": (colour, {}, ramp),
        "a.TIFF": (colour, {}, ramp), "a.ppm": (colour, {}, ramp), "alpha.png": (clear, {}, ramp),
        "lossless.webp": (colour, dict(lossless=True), ramp),
        "turned.png": (colour, dict(exif=turn_right), np.rot90(ramp, -1)),
        "grey.jpg": (colour.getchannel(0), dict(quality=95), grey),
        "cmyk.jpg": (colour.convert("CMYK"), dict(quality=95), ramp),
        "moving.webp": (colour, dict(save_all=True, append_images=[other], lossless=True), ramp)}

    for name, (image, how, looks) in kinds.items():
        image.save(tmp_path / name, **how)
        ours = data.read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert ours.shape == looks.shape and ours.dtype == np.uint8
        off = abs(ours.astype(int) - looks).mean()
        assert off == 0 or "jpg" in name and off < 3, name


def exif(orientation, ending):
    """EXIF with this orientation and, where a number belongs, a text: XResolution is "ab".  (A
    TIFF has its own XResolution.)"""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0), b"\x1a\1\2\0\3\0\0\0ab\0\0"
    tags = tags[:1] if ending == "tif" else tags
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


@pytest.mark.parametrize("ending, grey", [("png", False), ("tif", False), ("tif", True)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_even_where_another_exif_tag_is_invalid(orientation, ending, grey,
                                                                       tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    picture = picture[..., :1].repeat(3, axis=2) if grey else picture
    path = tmp_path / f"a.{ending}"
    image = Image.fromarray(picture[..., 0] if grey else picture)
    image.save(path, exif=exif(orientation, ending))
    turned = picture.transpose(1, 0, 2) if orientation > 4 else picture
    upright = {1: turned, 2: turned[:, ::-1], 3: turned[::-1, ::-1], 4: turned[::-1], 5: turned,
               6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}[orientation]
    assert np.array_equal(data.read_image(path).permute(1, 2, 0), upright)
    with Image.open(path) as image:         # and where the image comes from Pillow
        assert np.array_equal(as_read(image).permute(1, 2, 0), upright)


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    values = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369            # 0 to 65535
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray(values).save(tmp_path / "a.tif")
    Image.fromarray(values).save(tmp_path / "a.png")
    for name in ("a.pgm", "a.tif", "a.png"):
        assert np.array_equal(data.read_image(tmp_path / name)[0], values // 257), name
    for kind in (np.int32, np.float32):
        Image.fromarray(values.astype(kind)).save(tmp_path / "b.tif")
        with pytest.raises(data.ImageError, match="32 bits per pixel.*save it with 8 or 16"):
            data.read_image(tmp_path / "b.tif")


def test_a_folder_takes_what_imagefolder_takes_but_nothing_hidden(folder, capsys):
    before = load_folder(folder)
    for place in ("train", "val", "train/cat", "val/dog"):          # what other programs leave
        shutil.copytree(folder / "train/cat", folder / place / ".ipynb_checkpoints")
        (folder / place / "._cat_0.JPEG").write_bytes(b"of macOS")
        (folder / place / ".DS_Store").touch()
    (folder / "val/list.csv").touch()
    assert_equal(passes(load_folder(folder)), passes(before))
    assert load_folder(folder).identity == before.identity
    assert "left out" not in capsys.readouterr().out

    for name in ("a.BMP", "b.tiff", "c.heic", "d.HEIC", "e.txt"):
        shutil.copy(folder / "train/cat/cat_2.JPEG", folder / "train/owl" / name)
    source = load_folder(folder)
    oracle = torchvision.datasets.ImageFolder(folder / "train")
    paths = [os.fsdecode(path) for path in source.loader.dataset.paths[:source.train_size]]
    assert paths == [path for path, label in oracle.samples if "/." not in path]
    assert source.train_size == 36 + 2
    assert capsys.readouterr().out == "files left out, by ending: {'.heic': 2, '.txt': 1}\n"

    train.main(folder_flags(folder, folder / "run"))
    printed = capsys.readouterr().out
    assert "{'.heic': 2, '.txt': 1}" in printed and " 6 images" in printed      # 38 = 4 * 8 + 6


@pytest.mark.parametrize("change, said", [
    (lambda root: [shutil.rmtree(root / "val" / name) for name in ("cat", "dog", "owl")]
     + [(root / "val/1.png").touch()], r"val/CLASS/ \(.*/val holds 0 folders \[\] and 1 files"),
    (lambda root: (root / "val").rename(root / "valid"),
     r"val/CLASS/ \(.* holds 2 folders \['train', 'valid'\] and 0 files"),
    (lambda root: [shutil.rmtree(root / "val"), *((root / "train" / name).rename(root / name)
                                                  for name in ("cat", "dog", "owl"))],
     r"train/CLASS/ \(.*/train holds 0 folders|holds 4 folders"),
    (lambda root: [(root / "deep").mkdir(), (root / "train").rename(root / "deep/train")],
     r"train/CLASS/ \(.* holds 2 folders \['deep', 'val'\] and 0 files"),
    (shutil.rmtree, "No such file or directory"),
    (lambda root: (shutil.rmtree(root), root.touch()), "Not a directory"),
])
def test_a_layout_that_is_none_of_ours_is_named_with_the_way_out(change, said, folder, capsys):
    change(folder)
    text = complaint(capsys, *folder_flags(folder, folder.parent / "run"))
    assert re.search(said, text) and "--data-dir names the folder" in text and "layouts" in text


@pytest.mark.parametrize("dataset, options, resized, cropped", [
    ("shapes", {}, 32, 32), ("cifar10", {}, 32, 32), ("cifar100", dict(image_size=64), 32, 32),
    ("imagenet", {}, 256, 224), ("folder", dict(image_size=64), 73, 64)])
@pytest.mark.parametrize("size", [(50, 70), (300, 260), (32, 32)])
def test_preprocess_makes_a_batch_as_torchvision_would(dataset, options, resized, cropped, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    oracle = v2.Compose([v2.Resize(resized), v2.CenterCrop(cropped),
                         v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS[dataset])])
    torch.testing.assert_close(data.Preprocess(dataset, **options)(image), oracle(image)[None])


def test_a_folder_keeps_the_lowest_hashes_of_every_class_and_all_test_images(folder):
    def kept(**options):
        source = load_folder(folder, images_per_class=5, **options)
        return [os.path.basename(os.fsdecode(path))
                for path in source.loader.dataset.paths[:source.train_size]], source

    for seed in (3, 0):
        lowest = [name for label in ("cat", "dog", "owl") for name in sorted(
            os.listdir(folder / "train" / label),
            key=lambda name: hashlib.md5(f"{seed}/{name}".encode()).digest())[:5]]
        names, source = kept(seed=seed)
        assert sorted(names) == sorted(lowest)
    some = np.sort(np.random.default_rng([4]).permutation(15)[:7])          # of those, 7
    assert kept(seed=4, train_images=7)[0] == [kept(seed=4)[0][i] for i in some]

    prepare, labels = data.Preprocess("folder", 32), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    images = [prepare(data.read_image(path)) for path in sorted(folder.glob("val/*/*"))]
    torch.testing.assert_close(joined(source.test_batches()), (torch.cat(images), labels))


@pytest.mark.skipif(sys.platform != "linux", reason="not every system takes such names")
@pytest.mark.parametrize("workers", [0, 2])
def test_names_that_are_not_utf8_or_would_clear_a_terminal_load_and_are_escaped(workers, folder):
    before = passes(load_folder(folder))
    name = os.fsdecode(b"owl's \xff\n\r\033[2J") + "Übung_1, 猫"
    for split in ("train", "val"):
        (folder / split / "owl").rename(folder / split / name)
    source = load_folder(folder, workers=workers)
    assert source.classes == ["cat", "dog", name]
    assert_equal(passes(source), before)

    (folder / "val" / name / "owl_0.JPEG").write_bytes(b"no image")
    said = re.escape(r"/owl's \udcff\n\r\x1b[2JÜbung_1, 猫/owl_0.JPEG cannot be decoded")
    with pytest.raises(UserError, match=said):
        list(source.test_batches())


def another_end(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1             # name and size stay
    path.write_bytes(content)


@pytest.mark.parametrize("change, same", [
    (lambda root: None, True), (add_image, False), (rename_class, False),
    (lambda root: os.truncate(root / "train/cat/cat_1.JPEG", 10**5), False),
    (lambda root: os.truncate(root / "val/owl/owl_1.JPEG", 10**5), False),
    (lambda root: another_end(root / "val/owl/owl_1.JPEG", 0), False),
    (lambda root: another_end(root / "train/cat/cat_2.JPEG", -1), False)])
def test_another_file_class_or_size_is_another_folder_wherever_it_lies(change, same, folder,
                                                                       monkeypatch):
    with open(folder / "val/owl/owl_1.JPEG", "ab") as file:
        file.write(bytes(5000))         # longer than the two ends that are looked at
    before, some = load_folder(folder), load_folder(folder, images_per_class=5, train_images=7)
    assert some.files == before.files and some.identity != before.identity  # .files: of them all
    change(folder)
    shutil.copytree(folder, folder / "moved")
    monkeypatch.chdir(folder)
    for root in (folder, folder / "moved", "moved"):
        now = load_folder(root)
        assert (now.identity == before.identity) == (now.files == before.files) == same


@pytest.mark.parametrize("spoil, said", [
    (lambda root, image: (root / "train/owl").rename(root / "train/elk"), "train/: elk; .*: owl"),
    (lambda root, image: (root / "train/elk").mkdir(), r"train/CLASS/ \(none in elk\)"),
    (lambda root, image: (root / "train/cat/gone.png").symlink_to("nowhere"),
     "gone.png cannot be read .*remove it"),
    (lambda root, image: image.write_bytes(b"no image"), "cat_0.JPEG cannot be decoded"),
    (lambda root, image: os.truncate(image, 200), "cat_0.JPEG cannot be decoded .*(T|t)runcated"),
    (lambda root, image: image.unlink(), "cat_0.JPEG is not found"),
    (lambda root, image: Image.new("1", (20000, 20000)).save(image, "PNG"),
     "cat_0.JPEG has more pixels than .*make it smaller"),
    (lambda root, image: Image.new("L", (2, 300)).save(image, "PNG"),
     r"cat_0.JPEG cannot be decoded .*2 x 300 pixels: too thin"),
])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_useless_folder_or_image_is_refused_in_one_line(spoil, said, workers, folder):
    source = load_folder(folder, workers=workers)
    spoil(folder, folder / "val" / "cat" / "cat_0.JPEG")
    with pytest.raises(UserError, match=rf"\A.*{said}.*\Z"):         # one line: . is no newline
        list(source.test_batches())     # says what is wrong with an image
        load_folder(folder)             # and this, what is wrong with the folder


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_folder_batches_do_not_depend_on_the_workers_which_start_once(workers, folder):
    alone, source = (load_folder(folder, batch_size=2, workers=count) for count in (0, workers))
    expected, started = passes(alone), set()
    for _ in range(2):
        next(source.train_batches(0))       # a pass abandoned halfway leaves the next one right
        assert_equal(passes(source), expected)
        running = getattr(source.loader._iterator, "_workers", [])
        started.add(tuple(worker.pid for worker in running))
    assert len(started) == 1 and len(*started) == workers

    assert_equal(list(source.train_batches(1, first_step=2)), expected[-16:])
    assert list(source.train_batches(1, first_step=18)) == []       # resumed before the evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_pass_within_the_first_is_refused(workers, folder):
    source = load_folder(folder, workers=workers)       # they share the loader, and its workers
    with pytest.raises(RuntimeError, match="a pass over a folder began before another one ended"):
        for _ in source.train_batches(0):
            list(source.test_batches())


def put_into(root, split, name):
    """A folder too many above the classes of a split."""
    (root / split).rename(root / "away")
    (root / split).mkdir()
    (root / "away").rename(root / split / name)


@pytest.mark.parametrize("change, said", [
    (lambda root: [(root / split / "owl").rename(root / split / name) for split, name in (
        ("train", "cafe\u0301"), ("val", "caf\u00e9"))],         # they look alike
     r"train/: 'cafe\\u0301'; only in val/: 'caf\\xe9'$"),
    (lambda root: shutil.rmtree(root / "val/cat"), "Only in train/: cat; only in val/: none$"),
    (lambda root: put_into(root, "val", "images"), "train/: cat, dog, owl; only in val/: images$"),
    (lambda root: [put_into(root, split, "images") for split in ("train", "val")],
     r"only one class, 'images', under .* too many\?  It holds .* \['cat', 'dog', 'owl'\]"),
    (lambda root: [shutil.rmtree(root / split / name) for split in ("train", "val")
                   for name in ("cat", "dog")], "only one class, 'owl', under [^:]*$")])
def test_classes_that_do_not_fit_are_told_apart(change, said, folder, capsys):
    change(folder)
    assert re.search(said, complaint(capsys, *folder_flags(folder, folder / "run")))


def test_a_link_to_a_folder_that_holds_it_adds_no_images_and_the_order_is_that_of_imagefolder(
        folder):
    for name in ("a", "a-b", "a/c"):                                # "a/c" comes after "a-b"
        shutil.copytree(folder / "val/owl", folder / "train/owl" / name)
    paths, labels = zip(*torchvision.datasets.ImageFolder(folder / "train").samples)
    for name in "xyz":              # torchvision would follow them to each other, without an end
        (folder / "train/cat" / name).symlink_to(".")
    (folder / "away").mkdir()
    for place, target in (("train/dog/up", ".."), ("train/dog/top", "../.."), ("train/all", "."),
                          ("train/dog/left", folder / "away"),      # by the next, it leads back
                          ("away/right", folder / "train/dog"), ("away/all", folder / "train")):
        (folder / place).symlink_to(target)
    source = load_folder(folder)
    assert [os.fsdecode(path) for path in source.loader.dataset.paths[:-9]] == [*paths]
    assert source.labels[:-9].tolist() == [*labels] and source.train_size == 36 + 9

    (folder / "train/dog/more").symlink_to(folder / "val/dog")      # no loop: its images count
    assert load_folder(folder).train_size == 36 + 9 + 3


@pytest.mark.parametrize("image", [
    lambda image: image.float() / 255, lambda image: image.numpy(), lambda image: image[:1],
    lambda image: torch.cat([image, image[:1]]), lambda image: image.permute(1, 2, 0),
    lambda image: image[None], lambda image: image.int(), lambda image: "star.png"])
def test_preprocess_takes_only_what_it_can_tell(image):
    prepare, whole = data.Preprocess("shapes"), torch.randint(0, 256, (3, 40, 50)).byte()
    with pytest.raises(TypeError, match=r"takes what read_image\(path\) returns, uint8"):
        prepare(image(whole))
    picture = v2.functional.to_pil_image(whole)
    assert_equal([prepare(picture), prepare(picture.convert("RGBA"))], [prepare(whole)] * 2)


@pytest.mark.parametrize("program", ["train", "evaluate", "predict"])
def test_little_shared_memory_is_one_line_and_no_hang(program, folder, tmp_path):
    limited = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", limited], capture_output=True).returncode:
        pytest.skip("cannot give a program a /dev/shm of its own here")
    flags = [*folder_flags(folder, tmp_path / "run"), "--image-size", "224"]
    if program != "train":
        train.main(flags)
    flags[flags.index("--workers") + 1] = "2"
    command = dict(
        train=["train.py", *flags],
        evaluate=["-m", "tools.evaluate", *flags],
        predict=["-m", "tools.predict", *flags, "--image", str(folder / "val/cat")])[program]
    line = shlex.join([sys.executable, *command])
    result = subprocess.run(["unshare", "-m", "sh", "-c", f"{limited}; {line}"], cwd=HERE,
                            text=True, capture_output=True, timeout=120)
    assert (result.returncode, result.stderr.count("\n")) == (
        (0, 0) if program == "predict" else (1, 1)), result.stderr
    assert program == "predict" or "--shm-size=1g), or pass --workers 0" in result.stderr


@pytest.mark.parametrize("place", ["forward_backward", "seed_step"])
def test_a_worker_that_is_killed_is_one_line_wherever_the_run_is(place, folder, tmp_path,
                                                                 monkeypatch, capsys):
    def kill(*args, inner=getattr(train, place)):
        for child in multiprocessing.active_children():
            child.kill()
        for child in multiprocessing.active_children():
            child.join()                # torch is told of it by a signal, here
        return inner(*args)
    monkeypatch.setattr(train, place, kill)
    text = complaint(capsys, *folder_flags(folder, tmp_path / "run", workers=2))
    assert re.search("a worker .* was killed.* fewer --workers goes on", text)


def test_too_many_open_files_are_told_with_the_way_out(folder, monkeypatch):
    source = load_folder(folder)
    for error in (OSError(errno.EMFILE, "Too many open files"), RuntimeError("0 items of ancdata")):
        def fails(self, error=error):
            raise error
        monkeypatch.setattr(type(source.loader), "__iter__", fails)
        with pytest.raises(UserError, match="ulimit -n 4096"):
            list(source.test_batches())
