"""Settings, names of runs, errors in one line, what a run leaves behind."""
import contextlib
import copy
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

import data
import train
from senetv2 import build_model
from support import checkpoint, console, hardware
from support.console import UserError
from test_senetv2 import HERE, SMALL, eight_steps, equal, rows
from tests.conftest import complaint, finished_flags, no_network


def test_a_run_keeps_its_rows_and_settings_and_is_trained_only_once(finished, capsys):
    said, (_, last) = finished.with_name("said").read_text(), rows(finished)
    printed = [line.split()[:2] for line in said.splitlines() if line.startswith("epoch ")]
    assert printed == [["epoch", row["epoch"]] for row in rows(finished)]
    assert said.splitlines()[-1].endswith(f"saved in {finished}")
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


BASE = ("--dataset folder --image-size 32 --layers 1,1,1,1 --train-images 8 --batch-size 4 "
        "--epochs 1 --workers 0 --device cpu --data-dir").split()


def watched(out, monkeypatch, *flags):
    """A run: the weights at its start, what the network saw, random seeds, rates, and the end."""
    seen = SimpleNamespace(start=None, batches=[], draws=[], rates=[], end=None)

    def look(net, inputs):
        seen.batches.append(*inputs)
        seen.draws.append(torch.initial_seed())

    def parallel(net, compiled, inner=train.parallel):
        seen.start = copy.deepcopy(net.state_dict())
        net.register_forward_pre_hook(look)
        return inner(net, compiled)

    with monkeypatch.context() as patch:
        patch.setattr(train, "parallel", parallel)
        patch.setattr(train, "set_rate", lambda optimizer, rate, inner=train.set_rate: (
            seen.rates.append(rate), inner(optimizer, rate)))
        patch.setattr(train, "evaluate", lambda net, data: net.eval() and dict(top1=0.0))
        patch.setattr(checkpoint, "save", lambda state: setattr(
            seen, "end", state.net.state_dict()))
        train.main([*map(str, flags), "--out", str(out)])
    return seen


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


@pytest.mark.parametrize("kind, options", [("Adam", {}),
                                           ("SGD", dict(momentum=0.9, nesterov=True))])
def test_a_run_is_a_plain_loop_where_norms_and_biases_do_not_decay(kind, options, whole, tmp_path,
                                                                   monkeypatch):
    root, images = whole / "images", dict(train_images=8, image_size=32)
    run = watched(tmp_path, monkeypatch, *BASE, root, *"--seed 3 --lr 0.01 --epochs 2 "
                  "--weight-decay 0.5 --label-smoothing 0.2 --warmup 0.5 --optimizer".split(),
                  kind.lower())
    torch.manual_seed(3)
    net = build_model("senetv2", 2, SMALL).to(memory_format=torch.channels_last)
    groups = [dict(params=[p], weight_decay=0.5 * (p.ndim > 1)) for p in net.parameters()]
    optimizer = getattr(torch.optim, kind)(groups, lr=1, fused=True, **options)
    batches = [batch for epoch in (0, 1) for batch in data.load_data(
        "folder", root, batch_size=4, seed=3, **images).train_batches(epoch)]
    steps = []
    for (x, y), rate in zip(batches, (0.005, 0.01, 0.01, 0.005), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        wanted = F.one_hot(y, 2) * 0.8 + 0.1        # 0.2 are shared by both classes
        loss = -(wanted * (logits := net(x)).log_softmax(1)).sum(1).mean()
        steps.append([loss.item(), 100 * (logits.argmax(1) == y).float().mean().item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(run.end, net.state_dict())
    for row, (first, second) in zip(rows(tmp_path), (steps[:2], steps[2:]), strict=True):
        assert [2 * float(row["train_loss"]), 2 * float(row["train_top1"])] == pytest.approx(
            [first[0] + second[0], first[1] + second[1]], rel=1e-5)


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


def test_checkpoints_come_by_the_clock_and_at_the_end(monkeypatch):
    saved, now = [], 0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(checkpoint, "check_finite", lambda state: None)
    monkeypatch.setattr(checkpoint, "replace_file", lambda path, content: saved.append(now))
    state = SimpleNamespace(finished=False, saved_at=0, folder=Path(), state_dict=dict, machine={})
    for now in range(0, 310, 10):
        state.finished = now == 300
        checkpoint.save_if_due(state, 2)
    assert saved == [130, 260, 300]


def test_dropout_differs_by_seed_process_and_step(monkeypatch):
    drawn = set()
    for seed, rank, step in itertools.product((0, 1), repeat=3):
        monkeypatch.setenv("RANK", str(rank))
        train.seed_step(seed, step)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 8


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


def test_a_recorded_function_runs_twice_and_is_replayed_from_the_second_call_on(monkeypatch):
    done = []
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: contextlib.nullcontext())
    recorded = hardware.Recording(lambda net, x: (done.append("python"), 2 * x)[1])
    results = [recorded("net", x).item() for x in torch.arange(4.0)]
    assert done == ["python", "python", "replay", "replay", "replay"]
    assert results == [0, 2, 2, 2] and recorded.args == ["net", 3]     # this graph computes nothing


def test_a_step_that_cannot_be_recorded_shows_its_line_and_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: contextlib.nullcontext())
    recorded = hardware.Recording(lambda x: 1 // x.item())
    recorded(torch.ones(()))
    with pytest.raises(ZeroDivisionError):
        recorded(torch.zeros((), dtype=torch.int64))
    assert "--no-cuda-graph" in capsys.readouterr().out


@pytest.mark.parametrize("minutes, steps", [("1", "4"), ("0", "[23]")])    # or within an epoch
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(minutes, steps, whole, tmp_path,
                                                                 capsys):
    flags = eight_steps("folder", whole, tmp_path, "--lr", "1e30", "--checkpoint-minutes", minutes)
    assert re.search(f"step {steps}, ", complaint(capsys, *flags))
    saved = train.read_checkpoint(tmp_path)["model"] if (tmp_path / "last.pt").exists() else {}
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("spoil", [
    lambda state: state.measures.fill_(math.nan),
    lambda state: state.net.classifier[1].bias.data.fill_(math.inf),
    lambda state: next(state.net.buffers()).fill_(math.nan)])
def test_nothing_infinite_is_saved_at_a_broken_image(spoil, whole, tmp_path, monkeypatch, capsys):
    def fails(state, *rest):
        spoil(state)
        raise data.ImageError("broken")
    monkeypatch.setattr(train, "train", fails)
    assert "no longer finite" in complaint(capsys, *eight_steps("shapes", whole, tmp_path))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("terminal, lines", [(True, 4), (False, 1)])
def test_progress_comes_each_second_on_a_terminal_and_each_minute_elsewhere(terminal, lines,
                                                                            monkeypatch, capsys):
    now, shown = 0.0, 0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(console.sys.stdout, "isatty", lambda: terminal, raising=False)
    progress = console.Progress(0, 100)
    for now in (0.5, 1.1, 1.9, 2.3, 61.0, 61.5, 62.5):
        progress.show(1, 2.5)
    printed = capsys.readouterr().out
    shown = printed.count("step 1/100  loss 2.500")
    assert shown == lines and printed.count("\n") == (0 if terminal else lines)


@pytest.mark.parametrize("loading, said", [(0.0, ""), (0.001, ""), (3.0, "waited for images 75%")])
def test_the_row_of_an_epoch_says_how_long_it_waited_for_images(loading, said, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))

    def batches():
        nonlocal now
        for _ in range(5):
            now += loading
            yield "batch"
    progress = console.Progress(0, 5)
    for _ in progress.watch(batches(), 16):
        now += 1.0                                          # a training step
    assert progress.images_per_second() == pytest.approx(16 / (1 + loading))
    progress.show_epoch(5, dict(epoch=1))
    printed = capsys.readouterr().out
    assert said in printed and ("waited" in printed) == bool(said)
    assert list(progress.watch([], 16)) == [] and progress.images_per_second() is None


@pytest.mark.parametrize("running, threads, said", [
    ([0, 0], 2, False), ([1, 1], 1, False), ([1, 2], 2, True),
    ([3, 0], 2, False)])        # others that ran for a moment
def test_a_busy_machine_is_told_with_what_to_type(running, threads, said, monkeypatch, capsys):
    assert hardware.other_threads() >= 0
    counts = itertools.cycle(running)
    monkeypatch.setattr(hardware, "other_threads", lambda: next(counts))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    hardware.say_if_busy(torch.device("cpu"))
    assert ("OMP_NUM_THREADS=1 before the command" in capsys.readouterr().out) == said
    hardware.say_if_busy(torch.device("cuda"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("left, said", [
    (dict(RANK="1"), "RANK is 1 and WORLD_SIZE 1"), (dict(WORLD_SIZE="2"), "WORLD_SIZE 2"),
    (dict(RANK="", WORLD_SIZE="", LOCAL_RANK=""), None)])
def test_what_a_launcher_has_left_is_named(left, said, whole, tmp_path):
    flags = eight_steps("shapes", whole, tmp_path / "run", "--epochs", "1")
    result = subprocess.run([sys.executable, HERE / "train.py", *flags], text=True,
                            env=os.environ | left, capture_output=True)
    assert (result.returncode == 0) == (said is None)
    if said:
        assert said in result.stderr and "unset RANK" in result.stderr
        assert result.stderr.count("\n") == 1


def test_who_waits_for_other_processes_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    timers = []
    monkeypatch.setattr(hardware.threading, "Timer", lambda seconds, *call: timers.append(
        (seconds, call)) or SimpleNamespace(start=int, cancel=lambda: timers.append("cancelled")))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: timers.append(
        backend))
    hardware.start_processes("cpu")
    (seconds, (function, *args)), *rest = timers
    assert seconds <= 10 and rest == ["gloo", "cancelled"]
    function(*args[0], **args[1])
    assert capfd.readouterr().err == (
        "waiting for 1 other processes; are there none, unset WORLD_SIZE\n")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, settings = train.parse_args("--out ~/run --data-dir ~/images --weights ~/w.pt".split())
    assert (args.out, args.data_dir, settings["weights"]) == (
        tmp_path / "run", f"{tmp_path}/images", f"{tmp_path}/w.pt")


@pytest.mark.parametrize("place, code", [("/dev/full", 1), (None, 0)])
def test_output_that_cannot_be_written_is_named_and_a_closed_one_is_no_error(place, code, whole,
                                                                             tmp_path):
    flags = eight_steps("shapes", whole, tmp_path / "run", "--epochs", "1")
    program = shlex.join([sys.executable, str(HERE / "train.py"), *flags])
    result = subprocess.run(["sh", "-c", f"{program} >{place or '&-'}"], text=True,
                            stderr=subprocess.PIPE)
    assert result.returncode == code and result.stderr.count("\n") == code, result.stderr
    assert not code or "standard output cannot be written (No space" in result.stderr
