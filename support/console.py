"""What the terminal shows: lines, progress, and errors in one line."""
import contextlib
import os
import re
import sys
import time
import traceback

import torch
import torch.distributed as dist


def rank():
    """The number of this process among those of a run; torchrun sets it."""
    return int(os.environ.get("RANK") or 0)


def world():
    """The number of processes of a run; torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def printable(text):
    """A name from a disk, safe to print: control characters and broken bytes as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text, end="\n"):
    """Print from process 0 alone; on a terminal, over the line of progress."""
    if rank() == 0:
        start = "\r\033[K" if on_terminal() else ""
        try:
            print(start + printable(str(text)), end=end, flush=True)
        except OSError as error:
            sys.stdout = None           # or Python complains again as it ends
            raise UserError(f"standard output cannot be written ({error.strerror}); if this is a "
                            "run, the same command goes on from its last checkpoint") from None


def on_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


# ----------------------------------------------------------------------------------------- Progress


class Progress:
    """The clock of a run of `total` steps that goes on from step `first`, and what it prints."""

    def __init__(self, first, total):
        self.first, self.total = first, total
        self.began = self.shown_at = time.monotonic()

    def watch(self, batches, batch_size):
        """Pass on the batches of an epoch, each of `batch_size` images in all processes."""
        self.images, self.waited = 0, 0.0
        self.epoch_began = asked = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - asked
            yield batch
            self.images += batch_size
            asked = time.monotonic()

    def images_per_second(self):
        """In training in this epoch, or None where nothing was left to train."""
        self.seconds = time.monotonic() - self.epoch_began
        return self.images / self.seconds if self.images else None

    def show(self, step, loss):
        """On a terminal, once a second, a line that overwrites itself; elsewhere, one a minute."""
        pause, end = (1, "") if on_terminal() else (60, "\n")
        if time.monotonic() - self.shown_at > pause:
            self.shown_at = time.monotonic()
            say(f"step {step}/{self.total}  loss {loss:.3f}{self.left(step)}", end=end)

    def show_epoch(self, step, row):
        waited = self.waited / max(self.seconds, 1e-9)
        words = f"  waited for images {waited:.0%}" if waited > 0.03 else ""
        say(in_words(row) + words + self.left(step))

    def left(self, step):
        """The time left, at the mean speed so far, evaluations included."""
        seconds = (time.monotonic() - self.began) / max(1, step - self.first)
        return f"  {seconds * (self.total - step) / 60:.1f} min left"


def in_words(row):
    return "  ".join(f"{key} {value:,.5g}" for key, value in row.items()
                     if key != "lr" and value is not None)


# ------------------------------------------------------------------------------------------- Errors


class UserError(ValueError):
    """What a user typed, or a file that he brought, cannot be used; it ends a program in one line.

    All other errors are mistakes in code, and keep their traceback.
    """


# What torch raises in the main process, wherever that is, when a loader's worker has been killed
KILLED = re.compile(r"DataLoader worker \(pid|exited unexpectedly")


@contextlib.contextmanager
def explained(what, advice):
    """Turn whatever is raised, by torch most often, into one line: what, why, what to do."""
    try:
        yield
    except Exception as error:
        if KILLED.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({type(error).__name__}: {reason}); {advice}") from None


@contextlib.contextmanager
def errors_in_one_line(program, checkpoint=None):
    """End the program by one line at a UserError, where a GPU's memory is short, or at Ctrl-C (and
    say what a run will do that has this checkpoint); at all else, by a traceback."""
    try:
        yield
        return
    except KeyboardInterrupt:
        code, message = 130, "stopped"
        if checkpoint:
            message += "; the same command " + ("goes on from the last checkpoint"
                                                if checkpoint.exists() else "starts from scratch")
    except (UserError, torch.OutOfMemoryError) as error:
        code, message = 1, f"error: {str(error).strip().splitlines()[0]}"
    except Exception as error:
        code, message = 1, "error: the traceback above"
        if KILLED.search(str(error)):
            message = ("error: a worker that decodes images was killed, most often for want of "
                       "memory; the same command with fewer --workers goes on")
        elif world() == 1:
            raise
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            message = "error: another process of this run has failed"
        else:
            traceback.print_exc()
    if on_terminal():
        print("\r\033[K", end="", flush=True)       # over the line of progress
    print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)
    (os._exit if world() > 1 else sys.exit)(code)       # never wait for the other processes
