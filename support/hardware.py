"""Processes, number formats, the recording of a GPU."""
import os

PARENT = os.getppid()       # torchrun, if that started us; read before importing torch: seconds

import signal
import sys
from unittest import mock

import torch
import torch.distributed as dist

from support.console import RANK, say
from support.checkpoint import explained

# torchrun sets these: the number of this process on its machine, and how many there are.
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD, LOCAL_WORLD = (int(os.environ.get(name + "_SIZE", 1)) for name in ("WORLD", "LOCAL_WORLD"))


def parallel(model, compiled):
    """The network as the loop calls it: one of several copies that share gradients, compiled."""
    if WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False     # evaluate() does; as an argument, this is deprecated
    return torch.compile(model) if compiled else model


def over_processes(value):
    """The mean of a tensor over all processes."""
    if WORLD > 1:
        value = value / WORLD
        dist.all_reduce(value)
    return value


def choose_precision(device, asked=None, saved=None):
    """What was asked for, or the fastest that the device is made for.  But a run keeps what it
    began with: its checkpoint, `saved`, tells.  Raises ValueError if another was asked for."""
    on_gpu, older, usual = device.type == "cuda", "float32", "float32"
    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):      # from Ampere on
        older = usual = "bfloat16"
    elif on_gpu and torch.cuda.get_device_capability() >= (7, 0):
        usual = "float16"       # on Volta and Turing; older code had none, and stored no precision
    precision = (saved["about"] or {}).get("precision", older) if saved else asked or usual
    if asked not in (None, precision):
        raise ValueError(f"this run began with --precision {precision}; pass another --out")
    units = getattr(torch.cpu, "get_capabilities", lambda: dict(bf16=True))()   # not in all torches
    if (device.type, precision) == ("cpu", "bfloat16") and not any(
            units[name] for name in units if "bf16" in name):
        say("this processor has no units for bfloat16: float32 would be faster")
    return precision


class Recorded:
    """A training step whose forward and backward pass are recorded as a CUDA graph, and replayed.

    On small images, a GPU finishes an operation before Python can issue the next one.  So the first
    call runs as it is (in it, cuDNN tries its kernels), and the second records what Python
    tells the GPU to do, without doing it.  From then on, a call replays the recording, all at once.

    A replay works on the same memory: new inputs are copied into the recorded input tensors, and
    what the last call returned is overwritten.  Python's numbers and branches are frozen as they
    were in the recording, and while recording, Python may read no value from the GPU.  The step of
    the optimiser is left out of the recording and follows each replay, because its rate is a Python
    number.
    """

    def __init__(self, function, scaler, optimizer):
        self.function, self.scaler, self.optimizer, self.calls = function, scaler, optimizer, 0

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 1:
            return self.function(*inputs)
        if self.calls == 2:
            self.record(inputs)
        for buffer, tensor in zip(self.buffers, inputs):
            buffer.copy_(tensor)
        self.graph.replay()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.result

    def record(self, inputs):
        self.buffers, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        with explained("the training step cannot be recorded", "pass --no-cuda-graph"), \
                mock.patch.multiple(self.scaler, step=mock.DEFAULT, update=mock.DEFAULT), \
                torch.cuda.graph(self.graph, capture_error_mode="thread_local"):    # loader threads
            self.result = self.function(*self.buffers)


def end_with_launcher():
    """On Linux, end when torchrun ends, even by SIGKILL.  A run of one process is left alone."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:                      # it ended before that call
            os._exit(1)
