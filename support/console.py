"""What the terminal shows."""
import os
import sys
import time

# torchrun sets this: the number of this process.
RANK = int(os.environ.get("RANK", 0))


def printable(text):
    """A name from a disk, safe to print: control characters and broken bytes as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Progress:
    """On a terminal, once a second, a line that overwrites itself."""

    def __init__(self, run, total):
        self.run, self.total, self.first, self.shown_at = run, total, run.step, time.monotonic()
        self.began = self.shown_at

    def show(self, loss):
        if sys.stdout.isatty() and time.monotonic() - self.shown_at > 1:
            self.shown_at = time.monotonic()
            say(f"step {self.run.step}/{self.total}  loss {loss:.3f}{self.left()}", end="")

    def left(self):
        """The time left, at the mean speed so far, evaluations included."""
        seconds = (time.monotonic() - self.began) / max(1, self.run.step - self.first)
        return f"  {seconds * (self.total - self.run.step) / 60:.1f} min left"


def percent(share):
    """In %, or None if some steps were not measured: older code did not."""
    return None if share.isnan() else 100 * share.item()


def in_words(row):
    return "  ".join(f"{key} {value:,.5g}" for key, value in row.items()
                     if key != "lr" and value is not None)


def say(text, end="\n"):
    """Print from process 0 alone; on a terminal, over the line of progress."""
    if RANK == 0:
        print("\r\033[K" * sys.stdout.isatty() + printable(text), end=end, flush=True)
