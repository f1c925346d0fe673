"""Settings, names of runs, errors in one line, what a run leaves behind."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import train
from senetv2 import build_model
from test_senetv2 import HERE, SMALL, eight_steps, rows
from tests.conftest import complaint, finished_flags, folder_flags, no_network


def test_a_run_keeps_its_rows_and_settings_and_is_trained_only_once(finished, capsys):
    said, (_, last) = finished.with_name("said").read_text(), rows(finished)
    lines = said.splitlines()
    printed = [line.split()[:2] for line in lines if line.startswith("epoch ")]
    assert printed == [["epoch", row["epoch"]] for row in rows(finished)]
    for next_step in ("evaluate", "predict"):
        line, = [line for line in lines if f"make {next_step} CHECKPOINT={finished}" in line]
        assert (f"PYTHON={sys.executable}" in line) == (sys.prefix != str(HERE / ".venv"))
    rate = 0.5e-4 * (1 + math.cos(math.pi * 10 / 11))   # in step 11 of 0 to 11; one warms up
    assert float(last["lr"]) == pytest.approx(rate)

    settings = json.loads((finished / "config.json").read_text())["settings"]
    wanted = dict(model="senetv2", layers="1,1,1,1", batch_size=32, epochs=2, train_images=192)
    assert settings.items() >= wanted.items()

    before = (finished / "last.pt").stat()
    train.main(finished_flags(finished))
    again = capsys.readouterr().out
    assert all(f"{float(last['top1']):.2f}%" in printed for printed in (said, again))
    assert "finished" in again and "epoch 2" not in again
    assert (finished / "last.pt").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("flags, said", [
    ("--dataset cifar11", "cifar100"), ("--stem tiny", "cifar"), ("--model senetv3", "senetv2"),
    *[(f"--layers {layers}", "four positive") for layers in (
        "3,4,6", "3,4,0,3", "3,4,-6,3", "3,4,-6,6,3", "1,x,1,1,1", "1,1,1,1,", "\u00b2,1,1,1")],
    ("--image-size 500000", "from 32 to"),
    ("--epochs 0", "from 1 to"), ("--batch-size x", "number"), ("--train-images -5", "from 0 to"),
    ("--lr nan", "from 0 to"), ("--lr inf", "from 0 to"), ("--weight-decay -1", "from 0 to 1"),
    ("--image-size 31", "from 32 to"), (f"--seed {2**63}", str(2**63 - 1)),

    # What only the data, the network or the disk can tell.
    ("--reduction 257", "number of channels, 256"), ("--batch-size 13000", "images, 12000"),
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


def test_help_shows_the_defaults_that_count(capsys):
    for flags, epochs in (
            ("", 3), ("--dataset cifar10", 30), ("--dataset cifar10 --recipe strong", 100)):
        with pytest.raises(SystemExit):
            train.main([*flags.split(), "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"passes over the training images (default: {epochs})" in text


@pytest.mark.parametrize("flags, said, name", [
    ("--dataset cifar10 --epochs 3 --train-images 5000", "",
     "cifar10-senetv2-paper-epochs3-train_images5000-seed0"),
    ("--weights C:\\nets/mine --seed 2", "", "shapes-senetv2-paper-weightsC__nets_mine-seed2"),
    ("--model senet --reduction 16", "", "shapes-senet-paper-reduction16-seed0"),

    # A setting without use stays at its default.
    ("--model resnet --reduction 16", "reduction 16 is not used by", "shapes-resnet-paper-seed0"),
    ("--model senet --cardinality 8", "cardinality 8 is not used by", "shapes-senet-paper-seed0"),
    ("--model resnet --zero-init", "", "shapes-resnet-paper-zero_initTrue-seed0"),
    ("--model vit --zero-init", "zero_init True is not used by", "shapes-vit-paper-seed0"),
    ("--model vit --layers 3,4,6,3", "layers 3,4,6,3 is not used by", "shapes-vit-paper-seed0"),
    ("--dataset cifar10 --image-size 64", "image_size 64 is not", "cifar10-senetv2-paper-seed0"),
])
def test_a_run_is_named_by_what_defines_its_result(flags, said, name, capsys):
    args, settings = train.parse_args(flags.split())
    assert said in (printed := capsys.readouterr().out) and bool(printed) == bool(said)
    assert args.out == Path("runs", name)
    unused = said.split(" ")[0]
    assert not said or settings[unused] == train.defaults("paper", args.dataset)[unused]


def test_layers_have_one_form_however_they_are_typed():
    args, settings = train.parse_args(["--layers", " 3, 04,6 ,3", "--dataset", "cifar10"])
    assert settings["layers"] == "3,4,6,3" and "layers" not in args.out.name


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.OPTIONS, "device", ("cuda", ("cpu", "cuda"), "where"))
    monkeypatch.setattr(train, "LOCAL_WORLD", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = complaint(capsys, "--out", tmp_path)
    assert "more processes than GPUs; start fewer, or pass --device cpu" in text


def test_a_batch_size_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    args, settings = train.parse_args(["--batch-size", "33", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    with pytest.raises(ValueError, match="33; it must be a multiple of .* processes, 2,"):
        train.run_training(args, settings, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe, kind, decay", [("paper", torch.optim.Adam, 0.0),
                                                 ("strong", torch.optim.SGD, 5e-4)])
def test_a_recipes_optimiser_decays_neither_norms_nor_biases(recipe, kind, decay):
    _, settings = train.parse_args(["--recipe", recipe])
    net = build_model("senetv2", 10, SMALL)
    optimizer = train.make_optimizer(net, settings)
    first, second = optimizer.param_groups

    assert type(optimizer) is kind and optimizer.defaults.get("nesterov", True)
    assert first["weight_decay"] == decay and second["weight_decay"] == 0
    assert {p.ndim for p in first["params"]} == {2, 4} and {p.ndim for p in second["params"]} == {1}
    assert len(first["params"]) + len(second["params"]) == len(list(net.parameters()))


def test_only_a_gpu_that_computes_in_bfloat16_does(monkeypatch):
    for native in (True, False):                # a T4, say, only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: native or including_emulation)
        assert train.trains_in_bfloat16(torch.device("cuda")) is native
        assert train.trains_in_bfloat16(torch.device("cpu")) is False


def test_a_loss_that_is_no_number_stops_the_run(whole, tmp_path, capsys):
    text = complaint(capsys, *eight_steps("folder", whole, tmp_path, "--lr", "1e30"))
    assert "before step 4, a loss" in text and not (tmp_path / "last.pt").exists()


def test_a_batch_of_one_is_refused_only_where_it_cannot_be_normalised(folder, tmp_path, capsys):
    flags = [*folder_flags(folder, tmp_path / "run"), "--batch-size", "1", "--train-images", "2"]
    assert "too few for batch norm" in complaint(capsys, *flags)
    train.main([*flags, "--image-size", "64"])
    assert "done: top-1" in capsys.readouterr().out
