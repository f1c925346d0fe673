"""The loop, what a run leaves behind, and what stops it."""
import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from senetv2 import build_model
from support import checkpoint, hardware
from support.console import UserError
from test_senetv2 import SMALL, eight_steps, rows
from tests.conftest import BASE, complaint, finished_flags, watched


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


def test_numbers_of_torch_and_numpy_are_written_as_pythons(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda net, data: {
        "right, of star": torch.tensor(0.5), "top1": np.float32(2)})
    monkeypatch.setattr(train, "learning_rate", lambda *args: np.float64(1e-3))
    train.main(eight_steps("shapes", whole, tmp_path, "--epochs", "1"))
    (row,), (saved,) = rows(tmp_path), train.read_checkpoint(tmp_path)["history"]
    assert (row["right, of star"], row["top1"]) == ("0.5", "2.0") and saved["top1"] == 2


def test_dropout_differs_by_seed_process_and_step(monkeypatch):
    drawn = set()
    for seed, rank, step in itertools.product((0, 1), repeat=3):
        monkeypatch.setenv("RANK", str(rank))
        train.seed_step(seed, step)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 8


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


def test_a_buffer_may_hold_infinity_but_no_nan():
    net = torch.nn.BatchNorm1d(2)
    net.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))      # as of attention
    checkpoint.check_finite(state := SimpleNamespace(measures=torch.zeros(2, 4), net=net, step=1))
    net.mask[0, 0] = math.nan
    with pytest.raises(UserError, match="before step 1, "):
        checkpoint.check_finite(state)


@pytest.mark.parametrize("spoil", [
    lambda state: state.measures.fill_(math.nan),
    lambda state: state.net.classifier[1].bias.data.fill_(math.inf),
    lambda state: next(state.net.buffers()).fill_(math.inf)])
def test_nothing_infinite_is_saved_at_a_broken_image(spoil, whole, tmp_path, monkeypatch, capsys):
    def fails(state, *rest):
        spoil(state)
        raise data.ImageError("broken")
    monkeypatch.setattr(train, "train", fails)
    assert "no longer finite" in complaint(capsys, *eight_steps("shapes", whole, tmp_path))
    assert not (tmp_path / "last.pt").exists()
