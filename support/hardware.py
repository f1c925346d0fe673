"""Processes, number formats, the recording of a GPU."""
import os

PARENT = os.getppid()       # torchrun, if that started us; read before importing torch: seconds

import platform
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
import torchvision

from support.console import UserError, rank, say, world

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
DEVICES = ("cpu", ACCELERATOR.type) if ACCELERATOR else ("cpu",)

# ---------------------------------------------------------------------------------------- Processes


def local_rank():
    """The number of this process among those of its machine; torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def local_world():
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def start_processes(kind):
    """Prepare a kind of device, and meet the other processes.  Returns the device."""
    end_with_launcher()
    if rank() >= world() or world() > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"RANK is {rank()} and WORLD_SIZE {world()}, as after a launcher that has "
                        "gone: unset RANK and WORLD_SIZE, or start several processes by torchrun")
    if kind == "cuda":
        if local_world() > torch.cuda.device_count():
            raise UserError("more processes than GPUs; start fewer, or pass --device cpu")
        torch.cuda.set_device(local_rank())             # what "cuda" means from here on
        torch.backends.cudnn.benchmark = True           # shapes hardly change: try kernels once
        torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
    if world() > 1:
        text = f"waiting for {world() - 1} other processes; are there none, unset WORLD_SIZE"
        others = threading.Timer(10, print, [text], dict(file=sys.stderr, flush=True))
        others.daemon = True
        others.start()
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        others.cancel()
    return torch.device(kind)


def stop_processes():
    if world() > 1:
        dist.destroy_process_group()


def end_with_launcher():
    """On Linux, end when torchrun ends, even by SIGKILL.  A run of one process is left alone."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:                      # it ended before that call
            os._exit(1)


def in_turns(function):
    """What function() returns: called in process 0, then in one of each other machine, then in the
    rest, so that one of them can download what the others find."""
    my_turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for turn in range(3 if world() > 1 else 1):
        if turn == my_turn:
            result = function()
        if world() > 1:
            dist.barrier()
    return result


def from_first_process(function, *args):
    """What function(*args) returns in process 0, in all; the machines need not share a disk."""
    result = [function(*args) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def parallel(model, compiled):
    """The network as the loop calls it: one of several copies that share gradients, compiled."""
    if world() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False     # share_buffers() does; as an argument, deprecated
    return torch.compile(model) if compiled else model


def share_buffers(net):
    """Give all processes the running means of process 0."""
    if world() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def sum_over_processes(*numbers):
    """The sum of each number over all processes."""
    if world() > 1:
        dist.all_reduce(sums := torch.tensor(numbers, dtype=torch.float64))
        return sums.tolist()
    return numbers


def mean_over_processes(tensor):
    if world() > 1:
        tensor = tensor / world()
        dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------- Number formats and machines


def choose_precision(device):
    """The number format of training that the device is made for."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"                                                   # from Ampere on
    volta_or_turing = device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0)
    return "float16" if volta_or_turing else "float32"


def number_format(device, precision):
    """(autocast, scaler): in the first, products are of that precision; the second is for float16
    alone, which rounds small gradients to 0."""
    units = getattr(torch.cpu, "get_capabilities", lambda: dict(bf16=True))()   # not in all torches
    if (device.type, precision) == ("cpu", "bfloat16") and not any(
            units[name] for name in units if "bf16" in name):
        say("this processor has no units for bfloat16: float32 would be faster")
    return (torch.autocast(device.type, getattr(torch, precision), precision != "float32"),
            torch.amp.GradScaler(device.type, enabled=precision == "float16"))


def on_host(tensor):
    """In float64 on the CPU, for exact sums: Apple's GPUs, for example, have no float64.  It waits
    for the device, so ask for it after all work of a batch has been handed over."""
    return tensor.cpu().double()


def say_if_busy(device):
    """On a busy CPU, threads wait for each other: two of them trained 13 images/s instead of 437,
    and one of them 180.  (The load average would count one's own last run, too.)"""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return
    others, cores = [], os.cpu_count()      # both are the machine's, not the container's
    for _ in range(9):                      # the fewest of nine looks: some run for a moment
        time.sleep(0.02)
        others.append(other_threads())
    if min(others) >= cores / 2:
        say(f"this machine is busy ({min(others)} other threads run on {cores} cores): with "
            "OMP_NUM_THREADS=1 before the command, this run may be faster (one thread rounds "
            "differently from two, so give it to all runs that you compare, or to none)")


def other_threads():
    """How many run just now, beside this one; Linux alone tells: "0.20 0.18 0.12 3/80 11206", 2."""
    try:
        with open("/proc/loadavg") as file:
            return max(0, int(file.read().split()[3].partition("/")[0]) - 1)
    except OSError:
        return 0


def describe_machine(device):
    """What config.json says of hardware and versions."""
    hardware = (torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
                + f" {device.type.upper()}, {torch.get_num_threads()} threads")
    return dict(processes=world(), device=hardware, torch=str(torch.__version__),
                torchvision=str(torchvision.__version__), python=platform.python_version())


# ---------------------------------------------------------------------------------------- Recording


class Recording:
    """A function whose work on a GPU is recorded, as a CUDA graph, and replayed.

    On small images, a GPU finishes an operation before Python can issue the next one.  So the first
    call runs as it is (in it, cuDNN tries its kernels), and the second records what Python
    tells the GPU to do, without doing it.  From then on, a call replays the recording, all at once.

    A replay works on the same memory: new inputs are copied into the recorded input tensors, and
    what the last call returned is overwritten.  All that is no tensor, Python's numbers and
    branches too, stays as it was in the recording.  While recording, Python may read no value from
    the GPU.
    """

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 1:
            return self.function(*args)
        if self.calls == 2:
            self.record(args)
        for buffer, value in zip(self.args, args):
            if torch.is_tensor(value):
                buffer.copy_(value)
        self.graph.replay()
        return self.result

    def record(self, args):
        self.args = [value.clone() if torch.is_tensor(value) else value for value in args]
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):   # loader threads
                self.result = self.function(*self.args)
        except Exception:
            say("this step cannot be recorded for the GPU, for the reason below: --no-cuda-graph "
                "runs it as it is")
            raise
