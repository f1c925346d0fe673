"""Worker processes that decode images: their signals, their memory, their errors."""
import errno
import signal

from torch.utils.data import get_worker_info

from support.console import UserError

TOO_MANY_FILES = "too many files are open; raise the limit (ulimit -n 4096), or pass --workers 0"


def shared(*tensors):
    """In a worker, tensors in shared memory; the loader's own thread for it fails unseen."""
    if get_worker_info() is None:
        return tensors
    try:
        return tuple(tensor.share_memory_() for tensor in tensors)
    except RuntimeError as error:
        if "Too many open files" in str(error):
            return UserError(TOO_MANY_FILES)
        return UserError(f"a batch of images finds no room in shared memory ({error}); give the "
                         "container more (--shm-size=1g), or pass --workers 0")


def from_workers(loader):
    """The batches of a loader.  Raises UserError for what went wrong in a worker."""
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, OSError) as error:
        if getattr(error, "errno", None) == errno.EMFILE or "ancdata" in str(error):
            raise UserError(TOO_MANY_FILES) from None
        raise


def ignore_ctrl_c(worker):
    """The terminal sends Ctrl-C to the workers as well; they leave when the main process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
