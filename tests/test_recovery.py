"""Killed equals undisturbed, beyond the chapter's cases; checkpoints; several processes."""
import contextlib
import ctypes
import json
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from support import checkpoint, hardware
from support.console import UserError
from test_senetv2 import HERE, eight_steps, rows, same_result, stop_at
from tests.conftest import (
    Hostile, complaint, edited, folder_flags, load_folder, start, wait_for)
from tools import evaluate

# what torch says of a hostile file
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


@pytest.mark.parametrize("source", ["shapes", "folder"])
@pytest.mark.parametrize("network", ["mobilenet_v2", "senetv2 --stem cifar --layers 1,1,1,1"])
def test_on_a_gpu_replayed_steps_are_eager_ones_also_after_a_kill(network, source, whole, tmp_path,
                                                                  monkeypatch, gpu):
    replayed, inner = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (
        replayed.append(graph), inner(graph)))
    eager, graph, killed = (eight_steps(
        source, whole, tmp_path / name, "--workers", "2", "--device", "cuda", "--model",
        *network.split())
        for name in ("eager", "graph", "killed"))
    train.main([*eager, "--no-cuda-graph"])
    assert not replayed
    train.main(graph)
    assert len(replayed) == 7 and len(set(replayed)) == 1       # the first step runs as it is
    stop_at(6, killed, monkeypatch)
    train.main(killed)
    assert len(replayed) == 7 + 5 + 2
    assert same_result(tmp_path / "graph", tmp_path / "eager")
    assert same_result(tmp_path / "killed", tmp_path / "eager")


@pytest.mark.parametrize("change, more, said", [
    (lambda root: None, ["--lr", "0.01", "--model", "vit"],
     ["lr: was 0.001, is 0.01", "model: was mobilenet_v2, is vit"]),
    (lambda root: (root / "train/bar/0.png").unlink(), [], ["images: was 32 + 16 images of 2 c"]),
    (lambda root: [path.rename(path.with_name("rod")) for path in root.glob("*/bar")], [],
     ["images: was 32 + 16 images of 2 c"]),
])
def test_a_run_does_not_go_on_with_other_settings_or_data(change, more, said, whole, tmp_path,
                                                          capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "images")
    text = complaint(capsys, *eight_steps("folder", tmp_path, tmp_path / "folder"), *more)
    assert all(part in text for part in [*said, "--out, or delete that folder"]), text
    assert same_result(tmp_path / "folder", whole / "folder")       # it is as it was


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_run_keeps_others_out_until_it_is_ended_and_then_goes_on(by, whole, tmp_path, capsys):
    flags = eight_steps("folder", whole, tmp_path, "--workers", "2")
    with start(*flags, "--checkpoint-minutes", "0") as first:
        wait_for(first, "epoch 1 ")
        first.send_signal(signal.SIGSTOP)
        before = (tmp_path / "last.pt").read_bytes()
        assert "another process is training in" in complaint(capsys, *flags)
        assert (tmp_path / "last.pt").read_bytes() == before

        if by == signal.SIGINT:
            os.killpg(first.pid, by)            # Ctrl-C reaches its two workers as well
            first.send_signal(signal.SIGCONT)
            said = first.communicate()[1]
            assert said.startswith("train.py: ") and said.count("\n") == 1 and "scratch" not in said
        else:
            first.kill()                        # its workers notice within seconds
        assert first.wait() in (130, -by)
        train.main(flags)

    assert "after step" in capsys.readouterr().out
    assert same_result(tmp_path, whole / "folder")


def test_a_checkpoint_that_appears_before_the_lock_is_resumed(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "lock", lambda folder, inner=train.lock: (       # just in time
        shutil.copytree(whole / "folder", folder, dirs_exist_ok=True), inner(folder))[1])
    train.main(eight_steps("folder", whole, tmp_path))
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("code, killed", [
    ("", True),                                 # torchrun started it, and ends: so does the run
    ("del os.environ['TORCHELASTIC_RUN_ID']", False)])
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_of_torchrun_ends_when_that_is_killed(code, killed, tmp_path):
    inner = ("import os, sys, time; sys.path.insert(0, sys.argv[1]); " + (code or "pass")
             + "; import train; train.hardware.end_with_launcher()"
             "; print(os.getpid(), flush=True); time.sleep(600)")
    outer = ("import subprocess, sys; "
             f"subprocess.run([sys.executable, '-c', {inner!r}, {str(HERE)!r}])")
    launcher = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True,
                                env=os.environ | dict(TORCHELASTIC_RUN_ID="1"))
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    try:        # its pipe closes when it ends; until then, nothing more is to be read
        ready, _, _ = select.select([launcher.stdout], [], [], 20 if killed else 2)
        assert bool(ready) == killed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_launcher_that_died_before_the_call_is_noticed(monkeypatch):
    ended = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *args: 0))
    monkeypatch.setattr(os, "_exit", ended.append)
    hardware.end_with_launcher()
    assert not ended
    monkeypatch.setattr(os, "getppid", lambda: hardware.PARENT + 1)
    hardware.end_with_launcher()
    assert ended == [1]


def test_what_a_start_writes_it_writes_whole(whole, tmp_path, monkeypatch, capsys):
    flags = eight_steps("folder", whole, tmp_path)
    stop_at(6, flags, monkeypatch, saved=(0, 0))        # a row, and no checkpoint
    assert len(rows(tmp_path)) == 1 and not (tmp_path / "last.pt").exists()
    stop_at(2, [*flags, "--lr", "0.1"], monkeypatch, saved=(0, 0))
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["lr"] == 0.1
    assert rows(tmp_path) == []


@pytest.mark.parametrize("lost", ["config.json", "metrics.csv"])
def test_the_records_of_a_finished_run_are_made_again(lost, whole, tmp_path, capsys):
    shutil.copytree(whole / "folder", tmp_path / "run")
    before = (tmp_path / "run" / lost).read_text()
    (tmp_path / "run" / lost).unlink()
    train.main(eight_steps("folder", whole, tmp_path / "run"))
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run" / lost).read_text() == before


def test_a_finished_run_is_shown_from_a_folder_that_cannot_be_written(whole, tmp_path, monkeypatch,
                                                                      capsys):
    def read_only(path, mode="r", *args, inner=open, **kwargs):
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return inner(path, mode, *args, **kwargs)
    shutil.copytree(whole / "folder", tmp_path / "run")
    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(os, "access", lambda *args: False)
    train.main(eight_steps("folder", whole, tmp_path / "run"))
    assert f"{float(rows(whole / 'folder')[-1]['top1']):.2f}%" in capsys.readouterr().out
    assert "Permission denied" in complaint(capsys, *eight_steps("folder", whole, tmp_path / "new"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_costs_nothing_that_was_trained(split, workers, whole, tmp_path, monkeypatch,
                                                       capsys):
    shutil.copytree(whole / "images", tmp_path / "images")
    image, flags = tmp_path / "images" / split / "bar" / "0.png", eight_steps(
        "folder", tmp_path, tmp_path / "run", "--workers", workers)
    good = image.read_bytes()

    def broken_since(*args, inner=train.open_data):
        opened = inner(*args)
        image.write_bytes(good[:60] + bytes(len(good) - 60))
        return opened
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_data", broken_since)
        text = complaint(capsys, *flags)
    assert f"{image} cannot be decoded" in text and f"--weights {tmp_path / 'run/last.pt'}" in text
    assert train.read_checkpoint(tmp_path / "run")["step"] <= 4

    image.write_bytes(good)
    train.main(flags)
    assert same_result(tmp_path / "run", whole / "folder")


def test_a_folder_that_vanishes_is_not_a_full_disk(tmp_path):
    with pytest.raises(UserError, match="removed while it was in use"):
        checkpoint.replace_file(tmp_path / "gone" / "last.pt", "text")


def test_last_pt_is_replaced_only_by_a_whole_checkpoint_on_the_disk(whole, tmp_path, monkeypatch,
                                                                    capsys):
    last, done, resource = tmp_path / "last.pt", [], pytest.importorskip("resource")
    for name in ("fsync", "replace"):       # of an open file, or of a path and what it is to be
        monkeypatch.setattr(os, name, lambda file, *to, name=name, inner=getattr(os, name): (
            done.append((name, os.stat(file).st_size, *to)), inner(file, *to)))
    stop_at(2, flags := eight_steps("folder", whole, tmp_path), monkeypatch)
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    size, files = len(before), {*tmp_path.iterdir()}
    place, = [i for i, entry in enumerate(done) if last in entry]
    assert done[place - 1:place + 1] == [("fsync", size), ("replace", size, last)]

    try:        # a full disk: no file may grow beyond this, less than a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        text = complaint(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt" in text and "disk" in text
    assert last.read_bytes() == before and {*tmp_path.iterdir()} == files


def test_a_checkpoint_without_its_end_replaces_none(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoint.replace_file(path := tmp_path / "a.pt", content := dict(a=torch.zeros(10**5)))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for missing in (1, 10, 50, 500):        # torch writes the last bytes as it closes the file
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - missing, limits[1]))
            with pytest.raises(UserError, match="cannot write .*free some disk space"):
                checkpoint.replace_file(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


DAMAGED = [(lambda path: os.truncate(path, path.stat().st_size // 2), ""),
           (lambda path: path.write_bytes(pickle.dumps(Hostile())), ""),
           (edited(lambda saved: saved["model"].pop("classifier.1.bias")), "classifier.1.bias")]
FOREIGN = "last.pt is damaged, or not a checkpoint of this code .*"


def setting(**values):
    return edited(lambda saved: saved["settings"].update(values))


@pytest.mark.parametrize("way, spoil, said", [
    *[(way, spoil, FOREIGN + said) for way in ("evaluate", "resume") for spoil, said in DAMAGED],
    ("evaluate", edited(lambda saved: saved.update(settings=[])), FOREIGN + "TypeError"),
    ("resume", edited(lambda saved: saved["optimizer"]["param_groups"].pop()),
     FOREIGN + "parameter groups"),
    ("resume", edited(lambda saved: saved.update(measures=torch.zeros(2, 7))), FOREIGN + "size"),
    *[("resume", edited(lambda saved, number=number: saved.update(format=number)),
       f"has format {number}, and this code reads 1: use") for number in (None, 0)],
    ("resume", setting(recipe="mine"), "other settings or data: recipe: was mine, is paper;"),
    ("evaluate", setting(model="amax"), "the model 'amax', which this code does not have"),
    ("evaluate", setting(recipe="mine"), "the recipe 'mine', which this code does not have"),
    ("evaluate", setting(dataset="mnist"), "the dataset 'mnist', which this code does not have"),
])
def test_a_damaged_hostile_or_foreign_checkpoint_is_refused_and_kept(
        way, spoil, said, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoil(path := Path(shutil.copy(whole / "folder" / "last.pt", tmp_path)))
    before = path.read_bytes()
    text = (complaint(capsys, *eight_steps("folder", whole, tmp_path)) if way == "resume" else
            complaint(capsys, "--checkpoint", "last.pt", main=evaluate.main))
    assert re.search(said, text) and ("delete" in text) == ("other settings" in said)
    assert path.read_bytes() == before and not Path("hostile").exists()


def test_two_processes_train_one_network_and_go_on_when_interrupted(whole, tmp_path):
    left, both, alone = (tmp_path / name for name in ("left", "both", "alone"))
    with start(*eight_steps("folder", whole, left), processes=2) as process:
        printed, errors = process.communicate()
    assert printed.count("epoch 2 ") == 1 and "FutureWarning" not in errors, errors

    # The second process counted half of the test images with its own weights.
    found = train.evaluate(train.load(left), load_folder(whole / "images"))
    assert {key: float(rows(left)[-1][key]) for key in found} == pytest.approx(found, rel=1e-6)

    flags = eight_steps("folder", whole, both)
    with start(*flags, "--checkpoint-minutes", "0", processes=2) as process:
        wait_for(process, "epoch 1 ")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode != 0 and "stopped" in said and "train.py\", line" not in said

    # Two processes go on, or one.
    shutil.copytree(both, alone)
    train.main(eight_steps("folder", whole, alone))
    assert train.read_checkpoint(alone)["step"] == 8 and len(rows(alone)) == 2
    with start(*flags, processes=2) as process:
        printed, _ = process.communicate()
    assert "after step" in printed and same_result(both, left)


def test_without_batch_norm_two_processes_find_what_one_does(whole, tmp_path):
    more = ("--model vit --optimizer sgd --epochs 1 --seed 3 --train-images 12 "
            "--batch-size 4").split()
    train.main(eight_steps("folder", whole, tmp_path / "one", *more))
    with start(*eight_steps("folder", whole, tmp_path / "two", *more), processes=2) as process:
        process.communicate()
    one, two = ({key: float(value) for key, value in rows(tmp_path / name)[0].items()
                 if "second" not in key} for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4) and len(one) == 6


def test_an_error_in_one_process_ends_both_and_is_said(folder, tmp_path):
    source = load_folder(folder)
    second = np.random.default_rng([0, 0, 0]).permutation(36)[4]    # the first image of process 1
    broken = Path(os.fsdecode(source.loader.dataset.paths[second]))
    broken.write_bytes(broken.read_bytes()[:20])
    with start(*folder_flags(folder, tmp_path / "run", workers=1), processes=2) as process:
        _, said = process.communicate()
    assert process.returncode != 0 and "train.py\", line" not in said
    assert said.count(f"train.py: error: {broken} cannot be decoded") == 1

    # Process 0 alone can save, and did not.
    assert "is saved" not in said and not (tmp_path / "run" / "last.pt").exists()
