"""Kill runs at random moments, and see that none is lost.

    python -m tools.faults --trials 20
"""
import argparse
import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import train
from test_senetv2 import draw_folder, eight_steps, same_result


SAID = {"SIGKILL": "", "full disk": "cannot write", "second process": "another process is training",
        "launcher": ""}
CASES = [(source, world) for source in ("shapes", "folder") for world in (1, 2)]


def main(argv=None):
    """Disturb runs at random moments, and print how many end as if they had been left alone.

    Most are killed twice; some meet a full disk, or the same command typed twice, and must say so.
    In one of ten, torchrun is killed, and its processes must end by themselves.  A run survives if
    the command, given once more, ends with the bits of an undisturbed run.  This program forks, so
    it does not run on Windows.
    """
    parser = argparse.ArgumentParser(prog="tools.faults")
    parser.add_argument("--trials", type=int, default=100, help="runs to disturb (default: 100)")
    trials = parser.parse_args(argv).trials
    torch.set_num_threads(1)
    data.draw_shapes = functools.cache(data.draw_shapes)    # drawn once, here: forks inherit it
    rng, began, late = np.random.default_rng(0), time.monotonic(), []
    seconds, survived = {}, {(fault, case): [] for fault in SAID for case in CASES}

    with tempfile.TemporaryDirectory() as root:
        draw_folder((root := Path(root)) / "images")
        data.draw_shapes(12000, seed=1)
        for case in CASES:
            start = time.monotonic()
            assert not any(wait(launch(root, str(case), case))), (root / "said").read_text()
            seconds[case] = time.monotonic() - start

        for number in range(trials):
            case, fault = CASES[number % 4], [*SAID][max(0, number // 4 % 6 - 3)]
            if number % 10 == 9:
                case, fault = CASES[1 + number // 10 % 2 * 2], "launcher"
            trouble, step = trial(root, case, fault, rng, seconds[case])
            survived[fault, case].append(not trouble)
            late += [step > 0] * (fault == "SIGKILL")
            if trouble:
                print(f"{fault}, {case}: {trouble}", flush=True)

    total = sum(map(sum, survived.values()))
    print(f"{total} of {trials} survived, in {time.monotonic() - began:.0f} s; of {len(late)} that "
          f"were killed, {sum(late)} went on from a step above 0\n\n| survived / tried | "
          "shapes, 1 process | shapes, 2 processes | folder, 1 process | folder, 2 processes |\n"
          "|---|---|---|---|---|")
    for fault in SAID:
        found = [survived[fault, case] for case in CASES]
        cells = [f"{sum(row)}/{len(row)}" if row else "-" for row in found]
        print(f"| {fault} | {' | '.join(cells)} |")
    sys.exit(total < trials or sum(late) < len(late) / 2)


def trial(root, case, fault, rng, seconds):
    """(what went wrong, in words, or None; the last step that a process resumed after)"""
    shutil.rmtree(root / "trial", ignore_errors=True)
    (root / "said").unlink(missing_ok=True)
    if fault == "launcher" and not launcher_killed(root, case[0], rng, seconds):
        return "processes outlived torchrun", 0
    for _ in range(dict(SIGKILL=2, launcher=0).get(fault, 1)):
        runs = [launch(root, "trial", case, fault) for _ in range(1 + (fault == "second process"))]
        if fault == "SIGKILL":
            time.sleep(rng.uniform(0.2, 1.2) * seconds)     # most of the first fifth is the start
            for rank in rng.permutation(case[1]):       # one first; then, as torchrun does, others
                runs[0][rank].kill()
        list(map(wait, runs))

    codes, text = wait(launch(root, "trial", case)), (root / "said").read_text()
    step = max(map(int, re.findall(r"resuming after step (\d+)", text)), default=0)
    ours = re.search(r'(train|data|support/\w+)\.py", line', text)       # in a traceback
    if any(codes) or ours or SAID[fault] not in text:
        return f"{codes}: {text}", step
    with contextlib.suppress(AssertionError):
        assert same_result(root / "trial", root / str(case))
        return None, step
    return "the result is another one", step


def launcher_killed(root, source, rng, seconds):
    """Start a run of two processes by torchrun, kill that alone, and see whether they end, too."""
    flags = eight_steps(source, root, root / "trial", "--checkpoint-minutes", "0", "--workers", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "train.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if rng.random() < 0.5:                      # while they start, or
        time.sleep(rng.uniform(5, 12))
    else:                                       # while they train
        any("steps per epoch" in line for line in process.stdout)
        time.sleep(rng.uniform(0, 0.3) * seconds)
    if process.poll() == 0:
        shutil.rmtree(root / "trial")           # too late: once more
        return launcher_killed(root, source, rng, seconds)
    process.kill()
    try:
        process.communicate(timeout=60)         # the pipe closes when the last of them ends
        return True
    except subprocess.TimeoutExpired:
        return False


def launch(root, name, case, fault=None):
    """Fork the processes of a run, on a full disk or not; what they print goes to root/said."""
    source, world = case
    flags = eight_steps(source, root, root / name, "--checkpoint-minutes", "0", "--workers", "2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                       "WORLD_SIZE": str(world)}

    def run(rank):
        for stream in (1, 2):
            os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ["RANK"] = str(rank)
        if fault == "full disk":        # no file may grow beyond this, less than a checkpoint
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
        train.main(flags)

    fork = torch.multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes):
    return [process.join() or process.exitcode for process in processes]


if __name__ == "__main__":
    main()
