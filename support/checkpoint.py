"""A run's folder: the state of training in last.pt, config.json, metrics.csv, and the lock."""
import contextlib
import csv
import dataclasses
import io
import json
import os
import time
from pathlib import Path

import torch

from support.console import UserError, explained, rank
from support.source import changed

FORMAT = 1      # of last.pt; a change that this code cannot read back gets another number


@dataclasses.dataclass
class State:
    """All that training changes, and what it must agree with to go on."""

    folder: Path                # of the run
    settings: dict              # what defines the result, by name
    classes: list               # their names
    images: dict                # what identifies them: a run refuses to resume on others
    code: dict                  # what identifies it, by file
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # of the loss, in float16
    measures: torch.Tensor      # (2, steps of an epoch): mean loss and share of right answers
    step: int = 0               # steps done, in all epochs
    history: list = dataclasses.field(default_factory=list)     # a dict per finished epoch
    machine: dict = dataclasses.field(default_factory=dict)     # of the last start; versions, too
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def finished(self):
        return len(self.history) == self.settings["epochs"]

    def state_dict(self):
        """Tensors and plain values, which torch.load reads without running code."""
        return dict(
            format=FORMAT, settings=self.settings, classes=self.classes, images=self.images,
            code=self.code, model=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(), measures=self.measures, step=self.step,
            history=[{key: plain(value) for key, value in row.items()} for row in self.history],
            machine=self.machine)

    def load_state_dict(self, saved):
        self.net.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.measures.copy_(saved["measures"])
        self.step, self.history, self.machine = saved["step"], saved["history"], saved["machine"]

    def resume(self, saved, any_code=False):
        """Go on from what save() wrote.  Raises UserError if it is another run, or does not fit."""
        before, now = ({**settings, "images": "{train:,} + {test:,} images of {classes} classes, "
                        "digest {digest}".format(**images)} for settings, images in (
                            (saved["settings"], saved["images"]), (self.settings, self.images)))
        other = [f"{key}: was {before.get(key)}, is {now.get(key)}"
                 for key in before | now if before.get(key) != now.get(key)]
        if other:
            raise UserError(f"{self.folder} holds a run with other settings or data: "
                            f"{'; '.join(other)}; pass another --out, or delete that folder")
        if (files := changed(saved["code"], self.code)) and not any_code:
            raise UserError(f"{self.folder} holds a run of other code: {files} changed since; give "
                            "what you try a name, --name MINE, or, if the change cannot matter, "
                            "go on with --any-code")
        with usable(self.folder / "last.pt"):
            self.load_state_dict(saved)
        # A finished run is trained by no other code; a file of weights may have gone since.
        self.code = saved["code"] if self.finished else self.code | {
            file: digest for file, digest in saved["code"].items() if not file.endswith(".py")}


def plain(value):
    """A number, also of a tensor or of numpy, as Python's own."""
    return value.item() if hasattr(value, "item") else value


def test_images(settings):
    return "held-out images" if settings["hold_out"] else "test images"


def result_of(settings, history):
    """The last epoch's result, in words."""
    return (f"top-1 {history[-1]['top1']:.2f}% on the {test_images(settings)}, after "
            f"{len(history)} of {settings['epochs']} epochs")


# -------------------------------------------------------------------------------------- Write, read


def save_if_due(state, minutes):
    """Write last.pt if so many minutes have passed since it was last written, or the run has ended.

    Process 0 alone writes; the others wait for it in the next step.
    """
    late = rank() == 0 and time.monotonic() - state.saved_at > 60 * minutes
    if late or state.finished:
        check_finite(state)
        if state.finished:
            state.machine["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        save(state)


def save(state):
    """Write last.pt, the whole state of the run."""
    replace_file(state.folder / "last.pt", state.state_dict())
    state.saved_at = time.monotonic()


def check_finite(state):
    """Raises UserError if a loss or a weight is no longer finite; such weights are never saved."""
    tensors = state.measures, *state.net.parameters(), *(
        buffer for name, buffer in state.net.named_buffers() if "running_" in name)
    if not all(tensor.isfinite().all() for tensor in tensors) or any(
            buffer.isnan().any() for buffer in state.net.buffers()):    # a mask may hold infinity
        raise UserError(f"before step {state.step}, a loss or a weight was no longer finite; "
                        "last.pt, if there is one, is older; try a smaller --lr, or, after an "
                        "edit, look there first")


def replace_file(path, content):
    """Write a dict or a text from process 0.  A crash or a full disk leaves the old file whole."""
    draft = path.with_name(path.name + ".tmp")
    if rank() > 0:
        return
    advice = ("free some disk space, or make its folder writable, then give the command again"
              if path.parent.is_dir() else "its folder has been removed while it was in use")
    with explained(f"cannot write {path}", advice):
        try:
            if isinstance(content, dict):
                torch.save(content, draft)      # given an open file, it takes Ctrl-C for its error
            else:
                draft.write_bytes(content.encode())
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def write_metrics(state):
    """metrics.csv: one row per finished epoch."""
    columns = [*dict.fromkeys(key for row in state.history for key in row)]
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([plain(row.get(key)) for key in columns] for row in state.history)
    replace_file(state.folder / "metrics.csv", text.getvalue())


def write_config(state):
    text = json.dumps(dict(settings=state.settings, **state.machine, code=state.code), indent=1)
    replace_file(state.folder / "config.json", text + "\n")


def usable(path):
    return explained(f"{path} is damaged, or not a checkpoint of this code",
                     "use the code that wrote it, or name the folder of another run")


def read_checkpoint(path):
    """What save() wrote, from last.pt or the folder that holds it: a dict of tensors and values.

    Raises UserError where there is no such file, or save() did not write it.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint {path}; train first, or give the flags of a run, or its "
                        "folder")
    with usable(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)     # no file can run code
        written, _ = saved.get("format"), dict(**saved["settings"])         # or it is not ours
    if written != FORMAT:
        raise UserError(f"{path} has format {written}, and this code reads {FORMAT}: use the code "
                        "that wrote it, or name the folder of another run")
    return saved


def find_checkpoint(folder):
    return read_checkpoint(folder) if (folder / "last.pt").exists() else None


def lock(folder):
    """Keep a second process out of a run's folder until this one ends, however it ends."""
    if rank() > 0:
        return contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        if os.path.exists(folder / "last.pt"):  # a read-only folder; a finished run can be shown
            return contextlib.nullcontext()
        raise UserError(f"{folder} cannot be a run's folder ({error.strerror}); pass another --out"
                        ) from None
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # unlike flock's, not inherited
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training in {folder}; wait for it, or pass another "
                        "--out") from None
    except (ImportError, OSError):          # Windows, or a disk without locks
        pass
    return file                             # closed by the with statement, which frees the lock
