"""Flags: what is refused, what names a run, and what each setting changes."""
from pathlib import Path

import pytest
import torch
import torchvision

import train
from senetv2 import build_model
from support.console import UserError
from test_senetv2 import SMALL, equal
from tests.conftest import BASE, complaint, no_network, watched


@pytest.mark.parametrize("flags, said", [
    ("--dataset cifar11", "cifar100"), ("--stem tiny", "cifar"), ("--model senetv3", "senetv2"),
    *[(f"--layers {layers}", "four positive") for layers in (
        "3,4,6", "3,4,0,3", "3,4,-6,3", "3,4,-6,6,3", "1,x,1,1,1", "1,1,1,1,", "\u00b2,1,1,1")],
    ("--image-size 500000", "from 32 to"),
    ("--epochs 0", "from 1 to"), ("--batch-size x", "number"), ("--train-images -5", "from 0 to"),
    ("--lr nan", "from 0 to"), ("--lr inf", "from 0 to"), ("--weight-decay -1", "from 0 to 1"),
    ("--lr=-1e-3", "-1e-3 is not a number from 0"),
    (f"--weights {'w/' * 150}x", "pass another --out"),
    ("--name a/b", "letters, digits"), ("--name é", "letters, digits"),
    ("--train-images 11000 --hold-out 1001", "12000 training"), ("--hold-out 12000", "12000"),
    ("--image-size 31", "from 32 to"), (f"--seed {2**63}", str(2**63 - 1)),

    # What only the data, the network or the disk can tell.
    ("--reduction 257", "from 1 to 256"), ("--batch-size 13000", "images, 12000"),
    ("--train-images 12001", "12000 training"), ("--dataset imagenet", "--data-dir"),
    ("--checkpoint nowhere.pt", "--checkpoint"), ("--out file/run", "file/run"),
    ("--out file", "file"), ("--model vit --weights file", "holds no weights"),
    ("--weights imagenet", "resnet50 are not on this disk"),
    *[("--device cuda", "cpu")] * (not torch.cuda.is_available()),
])
def test_bad_input_is_refused_in_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("it began to train"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    Path("file").write_text("in the way")
    text = complaint(capsys, *flags.split())
    assert said in text and (flags.split()[0] in text or ":" in text), text
    assert Path("file").read_text() == "in the way"


@pytest.mark.parametrize("flags, said, name", [
    ("--dataset cifar10 --epochs 3 --train-images 5000", "",
     "cifar10-senetv2-paper-epochs3-train_images5000-seed0"),
    ("--weights C:\\nets/mine --seed 2", "", "shapes-senetv2-paper-weightsC__nets_mine-seed2"),
    # A setting without use stays at its default.
    ("--model resnet --reduction 16", "reduction 16 is not used by", "shapes-resnet-paper-seed0"),
    ("--model senet --cardinality 8", "cardinality 8 is not used by", "shapes-senet-paper-seed0"),
    ("--model resnet --zero-init", "", "shapes-resnet-paper-zero_initTrue-seed0"),
    ("--name a.max --hold-out 9", "", "shapes-senetv2-paper-hold_out9-seed0-a.max"),
    ("--model vit --zero-init", "zero_init True is not used by", "shapes-vit-paper-seed0"),
    ("--model vit --layers 3,4,6,3", "layers 3,4,6,3 is not used by", "shapes-vit-paper-seed0"),
    ("--dataset cifar10 --image-size 64", "image_size 64 is not", "cifar10-senetv2-paper-seed0"),
])
def test_a_run_is_named_by_what_defines_its_result(flags, said, name, capsys):
    args, _ = train.parse_args(flags.split())
    assert said in (printed := capsys.readouterr().out) and bool(printed) == bool(said)
    assert args.out == Path("runs", name)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, settings = train.parse_args("--out ~/run --data-dir ~/images --weights ~/w.pt".split())
    assert (args.out, args.data_dir, settings["weights"]) == (
        tmp_path / "run", f"{tmp_path}/images", f"{tmp_path}/w.pt")


def test_defaults_are_these_as_help_says_and_a_typed_recipe_wins_over_a_data_set(capsys):
    usual = dict(
        dataset="cifar10", model="senetv2", recipe="paper", layers="3,4,6,3", stem="imagenet",
        reduction=32, cardinality=4, residual=False, zero_init=False, weights=None,
        optimizer="adam", lr=0.001, warmup=0.05, weight_decay=0.0, label_smoothing=0.0, epochs=30,
        batch_size=128, train_images=0, images_per_class=250, image_size=224, augment=True,
        precision=None, hold_out=0, seed=0, name="")
    strong = dict(recipe="strong", optimizer="sgd", lr=0.1, weight_decay=0.0005,
                  label_smoothing=0.1, epochs=100)
    shapes = dict(dataset="shapes", layers="1,1,1,1", epochs=3, batch_size=64)
    for words, expected in (
            ("--dataset cifar10", usual), ("--dataset cifar10 --recipe strong", usual | strong),
            ("", usual | shapes), ("--recipe strong", usual | shapes | strong),
            ("--dataset folder", usual | dict(dataset="folder", images_per_class=0)),
            ("--dataset imagenet", usual | dict(dataset="imagenet"))):
        assert train.parse_args(words.split())[1] == expected
        with pytest.raises(SystemExit):
            train.main([*words.split(), "--help"])
        text = capsys.readouterr().out.partition("--epochs")[2].partition("--batch")[0]
        assert f"(default: {expected['epochs']})" in " ".join(text.split())
    args, settings = train.parse_args(["--layers", " 3, 04,6 ,3", "--dataset", "cifar10"])
    assert settings == usual and "layers" not in args.out.name      # however they are typed


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.OPTIONS, "device", ("cuda", str, "where"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = complaint(capsys, "--out", tmp_path)
    assert "more processes than GPUs; start fewer, or pass --device cpu" in text


@pytest.mark.parametrize("size, processes", [(33, 2), (1, 1), (2, 2)])
def test_a_batch_size_that_does_not_divide_into_two_images_or_more_is_refused(
        size, processes, tmp_path, monkeypatch):
    args, settings = train.parse_args(["--batch-size", str(size), "--out", str(tmp_path / "run")])
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with pytest.raises(UserError, match=f"{size}: give one .* a multiple of .* processes, "
                                        f"{processes}, with two or more for each"):
        train.run_training(args, settings, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


CHANGED = {     # setting -> flags, and what differs by them at once; the weights in the end always
    "dataset": ("--dataset shapes", "start batches"), "model": ("--model senet", "start"),
    "recipe": ("--recipe strong", "rates"), "layers": ("--layers 1,1,2,1", "start"),
    "stem": ("--stem cifar", "start"), "reduction": ("--reduction 16", "start"),
    "cardinality": ("--cardinality 2", "start"), "residual": ("--residual", ""),
    "zero_init": ("--zero-init", "start"), "weights": ("--weights w.pt", "start"),
    "optimizer": ("--optimizer sgd", ""), "lr": ("--lr 0.1", "rates"),
    "warmup": ("--warmup 1", "rates"), "weight_decay": ("--weight-decay 0.1", ""),
    "label_smoothing": ("--label-smoothing 0.1", ""),
    "epochs": ("--epochs 2", "batches draws rates"),
    "batch_size": ("--batch-size 2", "batches draws rates"),
    "train_images": ("--train-images 9", "batches"), "augment": ("--no-augment", "batches"),
    "images_per_class": ("--images-per-class 5", "batches"),
    "image_size": ("--image-size 40", "batches"), "precision": ("--precision bfloat16", ""),
    "hold_out": ("--hold-out 2", ""), "seed": ("--seed 1", "start batches draws"),
    "name": ("--name amax", ""),
}
USUAL = {}      # the run without any of them


@pytest.mark.parametrize("key", train.SETTINGS)
def test_every_setting_changes_the_run_and_nothing_but_its_part(key, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(9)
    torch.save(build_model("senetv2", 2, SMALL).state_dict(), "w.pt")
    usual = USUAL.get(0) or USUAL.setdefault(0, watched(
        tmp_path / "usual", monkeypatch, *BASE, whole / "images"))
    flags, parts = CHANGED[key]
    run = watched(tmp_path / "run", monkeypatch, *BASE, whole / "images", *flags.split())

    differ = {part for part in vars(run) if not equal(getattr(run, part), getattr(usual, part))}
    assert differ == {*parts.split(), "end"} - ({"end"} if key in ("hold_out", "name") else set())
    names = [train.parse_args([*BASE, "x", *more.split()])[0].out for more in ("", flags)]
    assert names[0] != names[1]


def test_compile_and_workers_arrive_and_vit_is_told_the_image_size(whole, tmp_path, monkeypatch):
    arrived = []
    monkeypatch.setattr(torch, "compile", lambda net: arrived.append("compile") or net)
    monkeypatch.setattr(train, "load_data", lambda *args, inner=train.load_data, **options: (
        arrived.append(options["workers"]), inner(*args, **options))[1])
    watched(tmp_path, monkeypatch, *BASE, whole / "images", "--compile", "--workers", "1")
    assert arrived == [1, "compile"]
    for words, size in (("--dataset folder --image-size 64", 64), ("--dataset cifar10", 32)):
        _, settings = train.parse_args([*words.split(), "--model", "vit"])
        with torch.device("meta"):
            net = train.build_network(settings, ["a", "b"])
        assert (net.image_size, net.patch_size, net.encoder.layers[0].num_heads) == (size, 4, 6)
