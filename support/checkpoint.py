"""A run's folder: last.pt, config.json, metrics.csv and the lock."""
import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from support.console import RANK


@dataclasses.dataclass
class Run:
    """What last.pt holds besides the network and the optimiser."""

    settings: dict              # what defines the result, by name
    classes: list               # their names
    data_digest: str            # of the images: a run refuses to resume on others
    about: dict                 # the machine and the versions of the last start
    scaler: torch.amp.GradScaler    # of the loss, in float16
    losses: torch.Tensor        # of each step of the current epoch: the mean loss,
    accuracies: torch.Tensor    # and the share of right answers
    step: int = 0               # steps done, in all epochs
    history: list = dataclasses.field(default_factory=list)     # a dict per finished epoch


class Saver:
    """Writes last.pt if --checkpoint-minutes have passed since it was last written.  At the end of
    an epoch, a sixth of that time is enough; at the end of the run, it is written in any case."""

    def __init__(self, run, net, optimizer, args):
        self.state, self.args, self.saved_at = (run, net, optimizer), args, time.monotonic()

    def if_due(self, epoch_ended):
        run, net, _ = self.state
        now, wait = time.monotonic(), 60 * self.args.checkpoint_minutes
        if epoch_ended:
            wait /= 6
        due = RANK == 0 and now - self.saved_at > wait
        if due or len(run.history) == run.settings["epochs"]:
            if not epoch_ended:             # at the end of an epoch, the loop has checked
                check_finite(run, net)
            save(*self.state, self.args.out)    # other processes wait for this one in the next step
            self.saved_at = now


def save(run, net, optimizer, folder):
    """Write last.pt, the whole state of the run."""
    replace_file(folder / "last.pt", dict(
        settings=run.settings, classes=run.classes, images=run.data_digest, about=run.about,
        step=run.step, history=run.history, losses=run.losses, accuracies=run.accuracies,
        scaler=run.scaler.state_dict(), model=net.state_dict(), optimizer=optimizer.state_dict()))


def replace_file(path, content):
    """Write a dict or a text from process 0.  A crash or a full disk leaves the old file whole."""
    draft = path.with_name(path.name + ".tmp")
    if RANK > 0:
        return
    advice = ("free some disk space, or make its folder writable, then give the command again"
              if path.parent.is_dir() else "its folder has been removed while it was in use")
    with explained(f"cannot write {path}", advice):
        try:
            with open(draft, "wb") as file:
                if isinstance(content, dict):
                    torch.save(content, file)
                else:
                    file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def write_metrics(run, folder):
    """metrics.csv: a row per finished epoch; older rows may lack a column, and leave it empty."""
    columns = [*dict.fromkeys(key for row in run.history[::-1] for key in row)]
    cells = [columns, *([row.get(key) for key in columns] for row in run.history)]
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in cells]
    replace_file(folder / "metrics.csv", "\n".join(lines) + "\n")


def write_config(run, folder):
    text = json.dumps(dict(settings=run.settings, **run.about), indent=1)
    replace_file(folder / "config.json", text + "\n")


def check_finite(run, net):
    """Raises ValueError if a loss or a weight is no longer finite; such weights are never saved."""
    if not all(tensor.isfinite().all() for tensor in (run.losses, *net.state_dict().values())):
        raise ValueError(f"before step {run.step}, a loss or a weight was no longer finite; "
                         "last.pt, if there is one, is older; try a smaller --lr")


def resume(run, net, optimizer, saved, folder):
    """Go on from what save() wrote.  Raises ValueError if it is another run, or does not fit."""
    before = saved["settings"] | dict(images=saved["images"])
    now = run.settings | dict(images=run.data_digest)
    changed = [f"{key}: was {before.get(key)}, is {now.get(key)}"
               for key in before | now if before.get(key) != now.get(key)]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings or data: {'; '.join(changed)}; "
                         "pass another --out, or delete that folder")
    with usable(folder / "last.pt"):
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.losses.copy_(saved["losses"])
        if saved["accuracies"] is not None:         # older code did not store them
            run.accuracies.copy_(saved["accuracies"])
        run.step, run.history = saved["step"], saved["history"]
        run.scaler.load_state_dict(saved["scaler"])


def lock(folder):
    """Keep a second process out of a run's folder until this one ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = open(folder / ".lock", "w")
    except OSError:
        if (folder / "last.pt").exists():       # a read-only folder; a finished run can be shown
            return contextlib.nullcontext()
        raise
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # unlike flock's, not inherited
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is training in {folder}; wait for it, or pass another "
                         "--out") from None
    except (ImportError, OSError):          # Windows, or a disk without locks
        pass
    return file                             # closed by the with statement, which frees the lock


@contextlib.contextmanager
def explained(what, advice):
    """Turn whatever is raised, by torch most often, into one line: what, why, what to do."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); {advice}") from None


def usable(path):
    return explained(f"{path} is damaged, or not a checkpoint of this code",
                     "use the code that wrote it, or name the folder of another run")


def read_checkpoint(path):
    """What save() wrote, from last.pt or the folder that holds it: a dict of tensors and values.

    Raises FileNotFoundError, or ValueError for a file that save() did not write.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or give a run's folder")
    with usable(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)     # no file can run code
        later = dict(about=None, accuracies=None, scaler={})    # older code did not store these
        return later | {key: saved[key] for key in (
            "settings", "classes", "images", "step", "history", "losses", "model", "optimizer",
            *(later.keys() & saved))}
