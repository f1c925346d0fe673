"""What is printed, where, and when."""
import itertools
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from support import console, hardware
from test_senetv2 import HERE, eight_steps


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


@pytest.mark.parametrize("place, code", [("/dev/full", 1), (None, 0)])
def test_output_that_cannot_be_written_is_named_and_a_closed_one_is_no_error(place, code, whole,
                                                                             tmp_path):
    flags = eight_steps("shapes", whole, tmp_path / "run", "--epochs", "1")
    program = shlex.join([sys.executable, str(HERE / "train.py"), *flags])
    result = subprocess.run(["sh", "-c", f"{program} >{place or '&-'}"], text=True,
                            stderr=subprocess.PIPE)
    assert result.returncode == code and result.stderr.count("\n") == code, result.stderr
    assert not code or "standard output cannot be written (No space" in result.stderr
