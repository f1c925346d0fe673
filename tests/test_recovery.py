"""Killed equals undisturbed, beyond the chapter's cases; checkpoints; several processes."""
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from test_senetv2 import eight_steps, rows, same_result, stop_at
from tests.conftest import complaint, edited, folder_flags, load_folder, start, wait_for
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
            assert said == "train.py: stopped; the same command goes on from the last checkpoint\n"
        else:
            first.kill()                        # its workers notice within seconds
        assert first.wait() in (130, -by)
        train.main(flags)

    assert "resuming after step" in capsys.readouterr().out
    assert same_result(tmp_path, whole / "folder")


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_run_from_before_zero_init_goes_on_without_it(recipe, tmp_path, capsys):
    flags = ["--recipe", recipe, "--layers", "1,1,1,1", "--stem", "imagenet", "--train-images", "8",
             "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    train.main(flags)
    edited(lambda saved: saved["settings"].pop("zero_init"))(tmp_path / "last.pt")
    train.main(flags)
    assert "already finished" in capsys.readouterr().out
    assert train.load(tmp_path).layer1[0].bn3.weight.all()
    assert "zero_init: was False, is True" in complaint(capsys, *flags, "--zero-init")


def test_a_checkpoint_that_appears_before_the_lock_is_resumed(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "lock", lambda folder, inner=train.lock: (       # just in time
        shutil.copytree(whole / "folder", folder, dirs_exist_ok=True), inner(folder))[1])
    train.main(eight_steps("folder", whole, tmp_path))
    assert "already finished" in capsys.readouterr().out


def test_last_pt_is_replaced_only_by_a_whole_checkpoint_on_the_disk(whole, tmp_path, monkeypatch,
                                                                    capsys):
    last, done, resource = tmp_path / "last.pt", [], pytest.importorskip("resource")
    draft = tmp_path / "last.pt.tmp"        # those of metrics.csv and config.json do not count
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, inner=getattr(os, name): (
            draft.exists() and done.append((name, draft.stat().st_size)), inner(*args)))
    stop_at(2, flags := eight_steps("folder", whole, tmp_path), monkeypatch)
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert done == [("fsync", len(before)), ("replace", len(before))]

    try:        # a full disk: no file may grow beyond this, less than a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        text = complaint(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in text and "free some disk space" in text
    assert last.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


DAMAGED = [(lambda path: os.truncate(path, path.stat().st_size // 2), ""),
           (lambda path: path.write_bytes(pickle.dumps(Hostile())), ""),
           (edited(lambda saved: saved["model"].pop("classifier.1.bias")), "classifier.1.bias")]


@pytest.mark.parametrize("way, spoil, said", [
    *[(way, *damage) for way in ("evaluate", "resume") for damage in DAMAGED],
    ("evaluate", edited(lambda saved: saved["settings"].update(model="senet3")), "senet3"),
    ("evaluate", edited(lambda saved: saved.update(settings=[])), "TypeError"),
    ("resume", edited(lambda saved: saved["optimizer"]["param_groups"].pop()), "parameter groups"),
    ("resume", edited(lambda saved: saved.update(losses=torch.zeros(7))), "size"),
])
def test_a_damaged_hostile_or_foreign_checkpoint_is_refused(way, spoil, said, whole, tmp_path,
                                                            monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoil(Path(shutil.copy(whole / "folder" / "last.pt", tmp_path)))
    text = (complaint(capsys, *eight_steps("folder", whole, tmp_path)) if way == "resume" else
            complaint(capsys, "--checkpoint", "last.pt", main=evaluate.main))
    assert "last.pt is damaged, or not a checkpoint" in text and "delete" not in text
    assert said in text
    assert not Path("hostile").exists()


def test_two_processes_train_one_network_and_go_on_when_interrupted(whole, tmp_path):
    left, both, alone = (tmp_path / name for name in ("left", "both", "alone"))
    with start(*eight_steps("folder", whole, left), processes=2) as process:
        printed, errors = process.communicate()
    assert printed.count("done: top-1") == 1 and "FutureWarning" not in errors, errors

    # The second process counted half of the test images with its own weights.
    found, _ = train.evaluate(train.load(left), load_folder(whole / "images"))
    assert {key: float(rows(left)[-1][key]) for key in found} == pytest.approx(found, rel=1e-6)

    flags = eight_steps("folder", whole, both)
    with start(*flags, "--checkpoint-minutes", "0", processes=2) as process:
        wait_for(process, "epoch 1 ")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode != 0 and "stopped; the same command goes on" in said
    assert "train.py\", line" not in said

    # Two processes go on, or one.
    shutil.copytree(both, alone)
    train.main(eight_steps("folder", whole, alone))
    assert train.read_checkpoint(alone)["step"] == 8 and len(rows(alone)) == 2
    with start(*flags, processes=2) as process:
        printed, _ = process.communicate()
    assert "resuming after step" in printed and same_result(both, left)


def test_an_error_in_one_process_ends_both_and_is_said(folder, tmp_path):
    broken = folder / "train" / "dog" / "dog_3.JPEG"    # one process alone will read it
    broken.write_bytes(broken.read_bytes()[:20])
    with start(*folder_flags(folder, tmp_path / "run", workers=1), processes=2) as process:
        _, said = process.communicate()
    assert process.returncode != 0 and "train.py\", line" not in said
    assert said.count(f"train.py: error: {broken} cannot be decoded") == 1
