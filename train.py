"""Chapter 3: training.  Forward, loss, backward, step; and a run that survives interruptions.

    python train.py                                             shapes: minutes on a laptop
    python train.py --dataset cifar100                          SENetV2-50, as in the paper
    python train.py --evaluate --checkpoint runs/NAME/last.pt   loss, top-1, top-5, each class
    python train.py --predict cat.jpg --checkpoint FILE         the five most likely classes
    python train.py --report runs results                       tables and charts of all runs
    torchrun --nproc-per-node 8 train.py --dataset cifar100     the same batches on eight GPUs

A run lives in runs/NAME, and the name says what defines its result:

    config.json     its settings, and the hardware and versions that it last ran on
    metrics.csv     one row per epoch
    last.pt         everything needed to resume: give the same command again

Interrupted equals uninterrupted, to the bit on a CPU.  This holds because each batch is a function
of (seed, epoch, step), because torch is seeded from (seed, process, step) before each step, and
because last.pt holds the rest: weights, the optimiser's state, the step, the history and the losses
of the epoch so far.

The accuracy of a run is that of its last epoch, never that of its best epoch on the test set.
"""
import argparse
import contextlib
import csv
import datetime
import errno
import functools
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.utils import save_image

from data import DATASETS, FOLDERS, STOPPING, Preprocess, load_data, mix, printable, read_image
from senetv2 import GATES, OURS, PEERS, STEMS, build_model

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

# torchrun sets these: which process this is, of how many, and the same within one machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get("LOCAL_RANK", 0)),
                           int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

# ----------------------------------------------------------------------------------------- Settings


def parsed_by(parse, accepts, words):
    """A type for argparse: the text as `parse` reads it, if it `accepts` that value."""
    def read(text):
        try:
            if accepts(value := parse(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return read


natural = parsed_by(int, lambda n: n >= 0, "a whole number of 0 or more")
positive = parsed_by(int, lambda n: n > 0, "a positive whole number")
any_seed = parsed_by(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")
amount = parsed_by(float, lambda x: 0 < x < math.inf, "a positive number")
fraction = parsed_by(float, lambda x: 0 <= x <= 1, "a number between 0 and 1")
four_numbers = parsed_by(str, lambda text: re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text),
                         "four positive numbers, such as 3,4,6,3 or 1,1,1,1")

# The paper says Adam, cross-entropy, ResNet-50 and, in its tables, r = 32 and K = 4.  It does not
# say the rest, so the rest is our choice.  A recipe changes some of the defaults below, and a data
# set wins over the recipe.
RECIPES = {
    "paper": {},
    "strong": dict(stem="cifar", optimizer="sgd", lr=0.1, weight_decay=5e-4, label_smoothing=0.1,
                   epochs=100),
}
FOR_DATASET = {     # the embedded set is for a laptop: the paper's small net and a short run
    "shapes": dict(layers="1,1,1,1", epochs=10, batch_size=64),
    "folder": dict(images_per_class=0),
}

SETTINGS = {        # what defines a result: default, type or choices, meaning
    "dataset": ("shapes", DATASETS, "what to train on"),
    "data_dir": ("data", str, "where its files are, or go"),
    "model": ("senetv2", str, f"{', '.join(OURS)}; {', '.join(PEERS)}; or any other classification "
              "network of torchvision"),
    "recipe": ("paper", tuple(RECIPES), "where the defaults of optimiser and stem come from"),
    "layers": ("3,4,6,3", four_numbers, "bottlenecks per stage; 3,4,6,3 is ResNet-50"),
    "stem": ("imagenet", STEMS, "imagenet: 7x7, stride 2, pooling; cifar: 3x3, stride 1"),
    "reduction": (32, positive, "r: channels per hidden unit of one dense layer in the gate"),
    "cardinality": (4, positive, "K: dense layers side by side in the gate of senetv2"),
    "residual": (False, bool, "gate by 1 + s, as the released code does, instead of s"),
    "weights": (None, str, "start from: imagenet (torchvision's weights) or a checkpoint"),
    "optimizer": ("adam", ("adam", "sgd"), "sgd has Nesterov momentum 0.9"),
    "lr": (1e-3, amount, "learning rate at its peak"),
    "warmup": (0.05, fraction, "share of the run in which it rises; then it falls as a cosine"),
    "weight_decay": (0.0, fraction, "L2 penalty on weights; norms and biases have none"),
    "label_smoothing": (0.0, fraction, "share of the target that is spread over all classes"),
    "epochs": (30, positive, "passes over the training images"),
    "batch_size": (128, positive, "images per step, in all processes together"),
    "train_images": (0, natural, "train on the first N of a seeded shuffle; 0: all"),
    "images_per_class": (250, natural, "in folders: training images per class; 0: all"),
    "image_size": (224, positive, "in folders: pixels per side"),
    "augment": (True, bool, "crop and flip at random"),
    "seed": (0, any_seed, "of weights, order and augmentation"),
}
ONLY_FOR = {        # settings that matter for these models or data sets alone
    "layers": OURS, "stem": OURS, "reduction": GATES, "residual": GATES,
    "cardinality": GATES.keys() - {"senet"},
    "data_dir": ("folder",),        # for the others it is a place, not a part of the result
    "images_per_class": FOLDERS, "image_size": FOLDERS,
}
OPTIONS = {         # what does not define a result
    "workers": (max(1, min(8, os.cpu_count() // LOCAL_WORLD)), natural,
                "in folders: processes that decode images, per training process"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", ("cpu", "cuda"), "where to compute"),
    "compile": (False, bool, "use torch.compile"),
    "out": (None, str, "the run's folder; by default runs/ and a name made from the settings"),
    "restart": (False, bool, "start anew, even if the run could resume"),
    "checkpoint_minutes": (5.0, amount, "minutes between checkpoints"),
    "evaluate": (False, bool, "only evaluate --checkpoint, and draw gates.png beside it"),
    "predict": (None, list, "print the five most likely classes of these image files"),
    "report": (None, list, "print tables and charts of the runs in these folders, as Markdown"),
    "checkpoint": (None, str, "what to evaluate or predict with; by default the run's last.pt"),
}


# ----------------------------------------------------------------------------------------- The loop


def train(run, model, data):
    """Train from where `run` stands to the last epoch.  `model` is run.net, perhaps wrapped."""
    settings, optimizer = run.settings, run.optimizer
    total = settings["epochs"] * data.steps

    for epoch in range(len(run.history), settings["epochs"]):
        run.net.train()
        for images, labels in data.train_batches(epoch, first_step=run.step - epoch * data.steps):
            # What the network draws at random, such as dropout, depends on these alone.
            torch.manual_seed(mix(settings["seed"], RANK, run.step))
            lr = learning_rate(run.step, total, settings["warmup"], settings["lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr

            with autocast(data.device):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            run.count(loss)
            run.save_or_stop()

        run.check()
        run.count_time()        # check has waited for the device, so this is all of the training
        run.finish_epoch(evaluate(run.net, data, after_batch=run.stop_if_asked))
    run.save()


def learning_rate(step, total, warmup, peak):
    """Up to `peak` in a line over the first `warmup` share of the steps, then to 0 as a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def make_optimizer(net, settings):
    """Adam, or SGD with Nesterov momentum; matrices and kernels decay, norms and biases do not."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    free = [p for p in net.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed, weight_decay=settings["weight_decay"]),
              dict(params=free, weight_decay=0.0)]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, settings["lr"], momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, settings["lr"], fused=True)


@functools.cache
def precision(device):
    """bfloat16 on a GPU that computes in it (Ampere and later), float32 everywhere else."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    """Convolutions and matrix products in precision(device); bfloat16 needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) != torch.float32)


@torch.no_grad()
def evaluate(net, data, after_batch=lambda: None):
    """Mean loss over the test images, and in %: top1, top5, and per_class, top1 of each class."""
    net.eval()
    top = min(5, len(data.classes))
    exact = dict(dtype=torch.float64, device=data.device)
    sums = torch.zeros(2, **exact)                          # loss, top-5 hits
    classes = torch.zeros(2, len(data.classes), **exact)    # of each class: top-1 hits, images

    for images, labels in data.test_batches():
        with autocast(data.device):
            logits = net(images)
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        hits = logits.topk(top).indices == labels[:, None]                          # (B, top)
        sums += torch.stack([loss, hits.sum()])
        classes.index_add_(1, labels, torch.stack([hits[:, 0], torch.ones_like(labels)]).double())
        after_batch()

    if WORLD > 1:
        dist.all_reduce(sums)
        dist.all_reduce(classes)
    loss, top5 = sums.tolist()
    right, seen = classes
    count = seen.sum().item()
    return dict(loss=loss / count, top1=100 * right.sum().item() / count, top5=100 * top5 / count,
                per_class=(100 * right / seen).tolist())


# ----------------------------------------------------------------------------------- Starting a run


def run_training(args, settings, device):
    """Train, or resume, or print the result of a run that is finished."""
    if settings["batch_size"] % WORLD:
        raise ValueError(f"the batch size {settings['batch_size']} cannot be divided by {WORLD} "
                         "processes")
    with contextlib.closing(open_data(args, settings, device)) as data:
        if not data.steps:
            raise ValueError(f"the batch size {data.batch_size} exceeds the {data.train_size} "
                             "training images; give a smaller --batch-size")

        arguments = network_of(settings, data.classes)
        if settings["model"] not in OURS:
            try_out(arguments, settings.get("image_size", 32))
        torch.manual_seed(settings["seed"])
        net = build_model(**arguments)
        net.to(device, memory_format=torch.channels_last)
        optimizer = make_optimizer(net, settings)

        with locked(args.out):          # before last.pt is looked for: another process may write it
            run = Run(args.out, settings, data, net, optimizer, args.checkpoint_minutes)
            checkpoint = args.out / "last.pt"
            saved = [None]
            if RANK == 0 and checkpoint.exists() and not args.restart:
                saved = [read_checkpoint(checkpoint)]
            if WORLD > 1:               # the machines need not share a disk
                dist.broadcast_object_list(saved)

            if saved[0]:
                run.resume(saved[0])
            elif settings.get("weights") and RANK == 0:     # parallel() copies them to the others
                print(load_weights(net, settings["weights"], settings["model"]))
            del saved                                       # as large as the network and Adam

            if len(run.history) < settings["epochs"]:
                if RANK == 0 and args.restart:              # not before all is known to be in order
                    checkpoint.unlink(missing_ok=True)
                describe(run, data, device)
                run.begin()
                train(run, parallel(net, args.compile), data)

    if RANK == 0:
        seconds = sum(row["seconds"] for row in run.history)
        print(f"done: top-1 {run.history[-1]['top1']:.2f}% on the test images after "
              f"{len(run.history)} epochs, {seconds:.0f} s of training; {printable(str(args.out))}")


def open_data(args, settings, device):
    """The data set that the settings name.

    One process downloads what is missing.  Then one of each machine does, in case the machines do
    not share a disk.  The rest come last.
    """
    my_turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for turn in range(3 if WORLD > 1 else 1):
        if turn == my_turn:
            data = load_data(root=args.data_dir, device=device, workers=args.workers, rank=RANK,
                             world=WORLD, **accepted_by(load_data, settings))
        if WORLD > 1:
            dist.barrier()
    return data


def network_of(settings, classes):
    """The arguments of build_model."""
    arguments = accepted_by(build_model, settings)
    if "layers" in arguments:
        arguments["layers"] = tuple(map(int, arguments["layers"].split(",")))
    if settings["model"] == "vit":
        arguments["image_size"] = settings.get("image_size", 32)
    return dict(name=settings["model"], num_classes=len(classes), **arguments)


def accepted_by(function, settings):
    """The settings that are arguments of a function, so that no name needs to be listed twice."""
    names = inspect.signature(function).parameters
    return {key: value for key, value in settings.items() if key in names}


def try_out(arguments, size):
    """Raises ValueError if a network of torchvision cannot be trained on images of this size."""
    net = build_model(**arguments).to("meta")       # nothing is computed there
    try:
        logits = net(torch.empty(2, 3, size, size, device="meta"))
        reason = "" if torch.is_tensor(logits) else "it returns more than logits"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise ValueError(f"{arguments['name']} cannot be trained here on images of {size}x{size} "
                         f"pixels ({reason}); give another --model")


def parallel(model, compiled):
    """The network as the loop calls it: one of several copies that share gradients, compiled."""
    if WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
        # Run.check copies the buffers, once per epoch; as an argument, this is deprecated.
        model.broadcast_buffers = False
    return torch.compile(model) if compiled else model


def describe(run, data, device):
    """Print what is about to be trained; write config.json, and metrics.csv as far as it goes."""
    if RANK > 0:
        return
    hardware = (torch.cuda.get_device_name() if device.type == "cuda"
                else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    count = sum(p.numel() for p in run.net.parameters())
    about = dict(settings=run.settings, parameters=count, processes=WORLD, device=hardware,
                 torch=str(torch.__version__), torchvision=str(torchvision.__version__),
                 python=platform.python_version())
    write(run.folder / "config.json", json.dumps(about, indent=1).encode() + b"\n")
    write(run.folder / "metrics.csv", as_csv(run.history))

    print(" ".join(f"{key}={printable(str(value))}" for key, value in run.settings.items()))
    kind = str(precision(device)).removeprefix("torch.")
    print(f"{count:,} parameters on {hardware}, in {kind}; {data.train_size:,} training and "
          f"{data.test_size:,} test images; {data.steps} steps per epoch of "
          f"{data.batch_size // WORLD} images in each of {WORLD} process(es)"
          + (f"; resuming after step {run.step}" if run.step else ""), flush=True)


def load_weights(net, source, model):
    """Copy into `net` all tensors of `source` that fit by name and shape.  Returns a line about it.

    source    "imagenet", torchvision's weights of the network or its trunk; or a checkpoint's path.

    Raises ValueError or FileNotFoundError for weights that cannot be read or do not fit at all.
    """
    if source == "imagenet":
        name = "resnet50" if model in OURS else model
        try:
            weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(
                check_hash=True)
        except (OSError, ValueError, RuntimeError) as error:    # RuntimeError: damaged on the way
            raise ValueError(f"torchvision's weights of {name} are not on this disk and cannot be "
                             f"downloaded ({error}); leave --weights out, or give a checkpoint"
                             ) from None
    else:
        weights = read_checkpoint(source)["model"]

    own = net.state_dict()
    fitting = {key: value for key, value in weights.items()
               if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"no tensor of {source} has a name and shape of {model}'s; give the "
                         "weights of a similar network")
    net.load_state_dict(fitting, strict=False)
    new, unused = (listed([key for key in keys if key not in fitting]) for keys in (own, weights))
    return f"weights: {len(fitting)} tensors taken from {source}; new: {new}; unused: {unused}"


def listed(names):
    if not names:
        return "0"
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


# -------------------------------------------------------------------------- The run, which survives


class Run:
    """A run in progress: a network, its optimiser, and what else a checkpoint must hold.

    settings, classes    the flags, and the names of the classes
    identity             what the data set says of its images
    step                 training steps done
    history              one dict per finished epoch, the rows of metrics.csv
    losses               one per step of the running epoch, (steps,), on the device
    seconds              of training in the running epoch, with checkpoints and without evaluation
    """

    def __init__(self, folder, settings, data, net, optimizer, minutes=5.0):
        self.folder, self.net, self.optimizer, self.minutes = folder, net, optimizer, minutes
        self.settings, self.classes, self.identity = settings, data.classes, data.identity
        self.step, self.history, self.seconds = 0, [], 0.0
        self.losses = torch.zeros(data.steps, device=data.device)
        self.stop_signal = 0            # the number of the signal that asked the run to stop

    def save(self):
        """Write last.pt: what resume() reads, in tensors and plain values only."""
        self.check()
        if RANK == 0:
            state = dict(settings=self.settings, identity=self.identity, classes=self.classes,
                         network=network_of(self.settings, self.classes),
                         model=self.net.state_dict(), optimizer=self.optimizer.state_dict(),
                         step=self.step, history=self.history, losses=self.losses,
                         seconds=self.seconds, torch=str(torch.__version__))
            write(self.folder / "last.pt", lambda file: torch.save(state, file))
        self.saved_at = time.monotonic()

    def resume(self, saved):
        """Go on from what save() wrote.  Raises ValueError if it is another run, or other code."""
        before, now = saved["settings"] | saved["identity"], self.settings | self.identity
        changed = [what_changed(key, before.get(key), now.get(key))
                   for key in {**before, **now}
                   if before.get(key) != now.get(key) and key != "data_dir"]    # it may have moved
        if changed:
            raise ValueError(f"{self.folder} holds a run with other settings or data: "
                             f"{'; '.join(changed)}; pass another --out, or --restart")

        with explained(self.folder / "last.pt"):
            self.net.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.losses.copy_(saved["losses"])
        self.step, self.history, self.seconds = saved["step"], saved["history"], saved["seconds"]

    def begin(self):
        """Start the clocks and the table; from here on a signal only asks the run to stop."""
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores SIGHUP
                signal.signal(number, self.on_signal)
        self.saved_at, self.counted_at = time.monotonic(), time.perf_counter()
        self.progress = Progress(self)

    def on_signal(self, number, frame):
        """Remember the signal for save_or_stop.  In a single process, its second one kills."""
        self.stop_signal = number
        if WORLD == 1:      # several are killed by torchrun, if need be
            signal.signal(number, signal.SIG_DFL)

    def count(self, loss):
        """Count a training step, its loss (the mean over all processes) and its time."""
        place = self.step % len(self.losses)
        self.losses[place] = loss.detach()      # stays on the device: reading it would wait
        if WORLD > 1:
            dist.all_reduce(self.losses[place])
            self.losses[place] /= WORLD
        self.step += 1
        self.count_time()
        self.progress.show(place)

    def count_time(self):
        now = time.perf_counter()
        self.seconds += now - self.counted_at
        self.counted_at = now

    def save_or_stop(self):
        """Save when it is time; save and leave if a signal came."""
        self.stop_if_asked(or_save=time.monotonic() - self.saved_at > 60 * self.minutes)

    def stop_if_asked(self, or_save=False):
        """Save and leave if a signal came; else save if told to.  All processes do the same."""
        wishes = torch.tensor([self.stop_signal, or_save])
        if WORLD > 1:                   # what one process wishes, all do
            dist.all_reduce(wishes, dist.ReduceOp.MAX)      # on the CPU: the GPU does not wait
        number, or_save = wishes.tolist()

        if number or or_save:
            self.save()
        if number:
            if WORLD > 1:               # torchrun ends the others as soon as one has left
                dist.barrier()
            self.progress.say(f"saved after step {self.step}; the same command resumes")
            sys.exit(128 + number)      # as shells report a signal

    def check(self):
        """Raises ValueError if a loss or a weight is no longer finite: last.pt never holds such.

        First, every process takes the buffers of process 0 (the running means of batch norm), so
        that all processes evaluate and judge the same network.
        """
        if WORLD > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        check_finite(self.losses, self.net, self.step)

    def finish_epoch(self, result):
        """Append a row to the history, write metrics.csv and print the row."""
        self.history.append(dict(
            epoch=len(self.history) + 1, lr=self.optimizer.param_groups[0]["lr"],
            train_loss=self.losses.mean().item(), test_loss=result["loss"],
            top1=result["top1"], top5=result["top5"],
            images_per_second=len(self.losses) * self.settings["batch_size"] / self.seconds,
            seconds=self.seconds))
        if RANK == 0:
            write(self.folder / "metrics.csv", as_csv(self.history))
        self.progress.row(self.history[-1])

        self.losses.zero_()
        self.seconds, self.counted_at = 0.0, time.perf_counter()


def check_finite(losses, net, step):
    """Raises ValueError, with the step's number, if a loss or a weight is no longer finite."""
    bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
    if not bad and all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        return
    if bad:         # the first bad loss says when it began; steps are counted from 1
        step = (step - 1) // len(losses) * len(losses) + bad[0] + 1
    raise ValueError(f"the loss or the weights are no longer finite at step {step}; "
                     "any checkpoint is from before it; try a smaller --lr")


def what_changed(key, before, now):
    """How a setting, or a list of classes, differs from what it was, in words."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = (", ".join(sorted(set(a) - set(b))[:5]) or "without these"
                       for a, b in ((before, now), (now, before)))
    return f"{key}: was {before}, is {now}"


@contextlib.contextmanager
def locked(folder):
    """Keep a second process out of a run's folder.  Raises ValueError if one is in there.

    The system frees the lock when the process ends, even if it is killed.  lockf's lock belongs to
    this process alone, while flock's would also be held by workers that outlive it for a moment.
    """
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if RANK > 0 or not fcntl:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):     # else: a disk without locks
                raise ValueError(f"another process is training in {folder}; wait for it, or pass "
                                 "another --out") from None
        yield


class Progress:
    """What the terminal shows: a row per epoch and, on a terminal, a line of progress."""

    def __init__(self, run):
        self.run, self.first, self.start, self.shown = run, run.step, time.monotonic(), 0
        self.live = RANK == 0 and sys.stdout.isatty()
        self.say("  epoch        lr train loss test loss   top-1   top-5  images/s time left")

    def left(self):
        per_step = (time.monotonic() - self.start) / max(1, self.run.step - self.first)
        steps = self.run.settings["epochs"] * len(self.run.losses) - self.run.step
        return str(datetime.timedelta(seconds=round(per_step * steps)))

    def show(self, place):
        if self.live and time.monotonic() - self.shown > 1:     # rarely: it waits for the device
            self.shown = time.monotonic()
            self.say(f"step {place + 1}/{len(self.run.losses)}  "
                     f"loss {self.run.losses[place]:.3f}  {self.left()} left", end="")

    def row(self, row):
        self.say(f"{row['epoch']:>3}/{self.run.settings['epochs']:<3} {row['lr']:>9.2e} "
                 f"{row['train_loss']:>10.4f} {row['test_loss']:>9.4f} {row['top1']:>6.2f}% "
                 f"{row['top5']:>6.2f}% {row['images_per_second']:>9,.0f} {self.left():>9}")

    def say(self, text, end="\n"):
        """Print over the line of progress.  A closed terminal must not keep a run from saving."""
        if RANK == 0:
            try:
                print("\r\033[K" * self.live + text, end=end, flush=True)
            except OSError:
                sys.stdout = open(os.devnull, "w")


# -------------------------------------------------------------------------------------------- Files


def write(path, content):
    """Replace a file at once: a crash or a full disk leaves the old one whole.

    content    bytes, or a function that writes to the open file it is given.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:        # torch reports a full disk as a RuntimeError
        draft.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({str(error).splitlines()[0]}); free some disk space, "
                      "then run the same command to resume from the last checkpoint") from None


def as_csv(history):
    table = [list(row) for row in history[:1]] + [row.values() for row in history]
    return "".join(",".join(map(str, row)) + "\n" for row in table).encode()


CHECKPOINT = dict(settings=dict, identity=dict, classes=list, network=dict, model=dict,
                  optimizer=dict, step=int, history=list, losses=torch.Tensor, seconds=float)


def read_checkpoint(path):
    """What a run saved in `path`, a dict.  Raises FileNotFoundError, or ValueError for other files.

    weights_only: it holds tensors and plain values, and a file that would run code is refused.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or give the path of a last.pt")
    with open(path, "rb") as file, contextlib.suppress(Exception):  # whatever a hostile file raises
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if all(isinstance(saved[key], kind) for key, kind in CHECKPOINT.items()):
            return saved
    raise ValueError(f"{path} is not a valid checkpoint of this version; give another one, or pass "
                     "--restart to train anew")


@contextlib.contextmanager
def explained(path):
    """Turn what torch raises for a checkpoint that does not fit into one line."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        # the second line, where there is one: torch's first is a heading
        reason = (str(error).splitlines() or [""])[:2][-1].strip()
        raise ValueError(f"{path} does not fit the network that this code builds ({reason}); undo "
                         "what was edited since, or train anew with --restart or another --out"
                         ) from None


def load(path):
    """The network of a checkpoint: on the CPU, in eval mode.

    .classes       the names of its classes
    .settings      the settings of its run
    .preprocess    makes an image, uint8 (3, H, W), the batch of one that it predicts from
    """
    saved = read_checkpoint(path)
    with explained(path):
        net = build_model(**saved["network"])
        net.load_state_dict(saved["model"])
        net.classes, net.settings = saved["classes"], saved["settings"]
        net.preprocess = Preprocess(net.settings["dataset"], net.settings.get("image_size", 224))
    return net.eval()


# ----------------------------------------------------------- Evaluating, predicting, looking inside


def run_evaluation(args, device):
    net = load(args.checkpoint).to(device, memory_format=torch.channels_last)
    data = open_data(args, net.settings | dict(train_images=0), device)     # 0 is always possible
    if data.classes != net.classes:
        raise ValueError(f"{args.checkpoint} was trained on classes other than those in "
                         f"{args.data_dir}")
    with contextlib.closing(data):
        result = evaluate(net, data)
        if RANK == 0:
            for name, accuracy in zip(data.classes, result["per_class"]):
                print(f"{accuracy:7.2f}%  {printable(name)}")
            top5 = f", top-5 {result['top5']:.2f}%" if len(data.classes) > 5 else ""
            print(f"{data.test_size:,} test images of {net.settings['dataset']}: "
                  f"loss {result['loss']:.4f}, top-1 {result['top1']:.2f}%{top5}")
        if net.settings["model"] in GATES and WORLD == 1:
            look_inside(net, data, args.checkpoint.with_name("gates.png"))


@torch.no_grad()
def look_inside(net, data, path):
    """Draw the mean gate of each channel for each class, and print how much the gates vary.

    After arXiv 1709.01507, section 7.2.  One strip per stage, of its last bottleneck: one row per
    class, one column per channel, sorted by mean; from black, the strip's lowest gate, to white.
    """
    blocks = [stage[-1] for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    seen = {}       # last batch norm -> its output, the input of the gate

    def keep(module, args, out):
        seen[module] = out

    # Of each stage, class and channel: the number of gates, their sum, the sum of their squares.
    sums = [torch.zeros(3, len(data.classes), block.conv3.out_channels, dtype=torch.float64,
                        device=data.device) for block in blocks]
    hooks = [block.bn3.register_forward_hook(keep) for block in blocks]
    for images, labels in data.test_batches():
        with autocast(data.device):
            net(images)
        gates = [block.gate.scale(seen[block.bn3].float()).flatten(1).double() for block in blocks]
        for total, s in zip(sums, gates):                                           # s is (B, C)
            total.index_add_(1, labels, torch.stack([torch.ones_like(s), s, s * s]))
    for hook in hooks:
        hook.remove()

    strips = []
    for number, (count, total, square) in enumerate(sums, start=1):
        mean = total / count                                                        # (classes, C)
        between = mean.std(0, correction=0).mean()
        within = (square / count - mean**2).clamp(min=0).mean(0).sqrt().mean()
        print(f"layer{number}: mean gate {mean.mean():.3f}; standard deviation between classes "
              f"{between:.4f}, between images of a class {within:.4f}")

        strip = mean[:, mean.mean(0).argsort()]
        strip = (strip - strip.min()) / (strip.max() - strip.min()).clamp(min=1e-12)
        strips.append(F.interpolate(strip[None, None], (max(100, len(strip)), 2048)))
    save_image(torch.cat(strips), path, nrow=1, padding=8, pad_value=1)
    print(f"{printable(str(path))}: the gates, one strip per stage, one row per class, one column "
          "per channel")


@torch.no_grad()
def run_prediction(args, device):
    net = load(args.checkpoint).to(device, memory_format=torch.channels_last)
    for path in args.predict:
        with autocast(device):
            logits = net(net.preprocess(read_image(path)).to(device))[0]
        best = logits.double().softmax(0).topk(min(5, len(net.classes)))
        print(printable(path))
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            print(f"{probability:8.2%}  {printable(net.classes[index])}")


# ------------------------------------------------------------------------------------------- Report

NARROW, SENETV2 = "senet r=32", "senetv2 r=32 K=4 (= senet r=8)"
PAPER_TOP1 = {      # (data set, layers) -> top-1 in %, all training images, the paper's own recipe
    ("cifar100", "3,4,6,3"): {"resnet": 61.72, NARROW: 62.26, SENETV2: 63.52},
    ("cifar10", "1,1,1,1"): {"resnet": 77.38, NARROW: 77.79, SENETV2: 78.60},
}
NETWORK = ("model", "reduction", "cardinality", "residual", "seed")   # differ within one table
DROPPED = {"erase": 0}      # settings of earlier versions, with the value that equals today's code
COLOURS = {"grey": "#888888", "blue": "#1f77b4", "green": "#2ca02c", "red": "#d62728",
           "orange": "#ff7f0e", "purple": "#9467bd", "brown": "#8c564b", "pink": "#e377c2",
           "olive": "#bcbd22", "cyan": "#17becf", "black": "#000000", "gold": "#ffd700"}

# Student's t: half of a two-sided 95 % interval in standard errors, for 1 to 30 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
       2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
       2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def run_report(folders):
    """Print, as Markdown, one table, verdict and chart for all finished runs that are alike in
    everything but network and seed.

    A run counts by its config.json and metrics.csv, and its accuracy is that of the last epoch.  If
    two runs have all settings alike (a copy, or code that was edited), the first folder of the
    alphabet counts.  Networks without layers and stem have a table of their own.
    """
    tables, left_out = {}, []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("config.json")):
        try:
            run = read_run(path)
        except ValueError as reason:
            left_out.append(f"- {printable(str(path.parent))}: {reason}")
            continue
        networks = tables.setdefault(run["shared"], {})
        first = networks.setdefault(run["label"], {}).setdefault(run["settings"]["seed"], run)
        if run["top1"][-1] != first["top1"][-1]:
            left_out.append(f"- {printable(str(path.parent))}: top-1 {run['top1'][-1]:.2f}%; the "
                            f"run of this name in the table has {first['top1'][-1]:.2f}%")

    for shared, networks in tables.items():
        print_results(dict(shared), networks)
    if left_out:
        print("\nRuns that are in no table:\n\n" + "\n".join(left_out))
    if not tables and not left_out:
        raise ValueError("no run (a folder with config.json and metrics.csv) in "
                         f"{', '.join(folders)}; train first")


def read_run(path):
    """What the report needs of a run.  Raises ValueError, with the reason, if unfinished."""
    try:
        run = json.loads(path.read_text())
        settings = {key: value for key, value in run["settings"].items()
                    if (key, value) not in DROPPED.items()}
        rows = list(csv.DictReader(path.with_name("metrics.csv").read_text().splitlines()))
        run |= dict(
            settings=settings | dict(seed=int(settings["seed"]), dataset=str(settings["dataset"])),
            parameters=int(run["parameters"]), label=label(settings), command=command(settings),
            machine=f"{run['device']}, torch {run['torch']}",
            shared=tuple((k, v) for k, v in settings.items() if k not in NETWORK),
            top1=[float(row["top1"]) for row in rows])
        missing = settings["epochs"] - len(rows)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ValueError("not a run of train.py") from None
    if missing:
        raise ValueError(f"{len(rows)} of {settings['epochs']} epochs")
    return run


def label(settings):
    """The row's name in a table: the network, and the width of its gate."""
    r, k = settings.get("reduction"), settings.get("cardinality")
    text = settings["model"] + (f" r={r}" if r else "") + (f" K={k}" if k else "")
    if settings["model"] == "senetv2" and not 256 % r and not r % k:    # C/r and r/K are whole
        text += f" (= senet r={r // k})"
    return text + (" residual" if settings.get("residual") else "")


def command(settings):
    """The command that trains these settings, without the seed."""
    default = defaults(settings["recipe"], settings["dataset"])
    default |= dict(model=None, dataset=None, recipe="paper")      # the command names the first two
    words = ["python", "train.py"]
    for key, value in settings.items():
        if key == "seed" or value == default[key]:
            continue
        flag = key.replace("_", "-")
        words += ([f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False
                  else [f"--{flag}", str(value)])
    return shlex.join(words)


def print_results(shared, networks):
    """The table of one comparison: networks -> seeds -> what read_run returned."""
    networks = dict(sorted(networks.items(), key=lambda item: min(
        run["parameters"] for run in item[1].values())))
    size = shared.get("train_images", 0)
    title = [shared["dataset"], f"{size:,} training images" if size else "all training images",
             f"{shared['epochs']} epochs"]
    title += [f"layers {shared['layers']}"] if "layers" in shared else []
    recipe = [f"{key} {shared[key]}" for key in ("recipe", "optimizer", "lr", "batch_size", "stem")
              if key in shared]
    print(f"\n### {', '.join(title)}\n\n{', '.join(recipe)}.\n")

    top1 = {name: {seed: run["top1"][-1] for seed, run in seeds.items()}
            for name, seeds in networks.items()}
    paper = {} if size else PAPER_TOP1.get((shared["dataset"], shared.get("layers")), {})
    print("| network | parameters | seeds | top-1 (%) | minus resnet | minus senet r=32 "
          "| in the paper |\n|---|---|---|---|---|---|---|")
    for name, seeds in networks.items():
        count = next(iter(seeds.values()))["parameters"]
        print(f"| {name} | {count:,} | {len(seeds)} | {mean_and_deviation(top1[name].values())} "
              f"| {with_interval(paired_difference(top1, name, 'resnet'))} "
              f"| {with_interval(paired_difference(top1, name, NARROW))} "
              f"| {format(paper[name], '.2f') if name in paper else '-'} |")
    machines = sorted({run["machine"] for seeds in networks.values() for run in seeds.values()})
    print("\ntop-1: of the last epoch, mean ± standard deviation over seeds. Differences: paired "
          f"by seed, mean [95 % interval]. Ran on: {'; '.join(machines)}.\n")

    for name, base in ((SENETV2, NARROW), (NARROW, "resnet")):
        print_verdict(top1, paper, name, base)
    print("```bash")
    for seeds in networks.values():
        words = next(iter(seeds.values()))["command"]
        print(f"for seed in {' '.join(map(str, sorted(seeds)))}; do {words} --seed $seed; done")
    print("```\n")
    print_chart(shared, networks)


def mean_and_deviation(values):
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def paired_difference(top1, name, base):
    """(mean, half of the 95 % interval) of the differences between runs of one seed.

    One seed gives no interval: half is None.  Without a common seed there is no difference, and
    none is given of resnet, which the others are compared with: None.
    """
    seeds = top1.get(name, {}).keys() & top1.get(base, {}).keys()
    if not seeds or name in (base, "resnet"):
        return None
    gaps = [top1[name][seed] - top1[base][seed] for seed in seeds]
    if len(gaps) == 1:
        return gaps[0], None
    freedom = len(gaps) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.960       # the normal's
    return statistics.fmean(gaps), quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))


def with_interval(gap):
    if not gap:
        return "-"
    mean, half = gap
    interval = f" [{mean - half:+.2f}, {mean + half:+.2f}]" if half is not None else ""
    return f"{mean:+.2f}{interval}"


def print_verdict(top1, paper, name, base):
    """What the interval of a difference excludes: 0, the paper's difference, both or neither."""
    gap = paired_difference(top1, name, base)
    if not gap or gap[1] is None:
        return
    values = {"0": 0.0}
    if {name, base} <= paper.keys():
        claim = paper[name] - paper[base]
        values[f"the paper's {claim:+.2f}"] = claim
    excluded = [text for text, value in values.items() if abs(value - gap[0]) > gap[1]]
    included = [text for text in values if text not in excluded]
    verdict = [f"{verb} {' and '.join(texts)}"
               for verb, texts in (("excludes", excluded), ("includes", included)) if texts]
    print(f"**{name} minus {base}: {with_interval(gap)}.** The interval {' and '.join(verdict)}.\n")


def print_chart(shared, networks):
    """Test accuracy by epoch, mean over seeds, as a chart that GitHub draws."""
    epochs = shared["epochs"]
    axis = list(range(1, epochs + 1)) if epochs < 25 else f"1 --> {epochs}"
    theme = {"themeVariables": {"xyChart": {"plotColorPalette": ",".join(COLOURS.values())}}}
    print(f"```mermaid\n%%{{init: {json.dumps(theme)}}}%%\nxychart-beta\n"
          f'    title "{shared["dataset"]}: test top-1 (%) by epoch, mean over seeds"\n'
          f'    x-axis "epoch" {axis}\n    y-axis "top-1 (%)"')
    for seeds in networks.values():
        means = map(statistics.fmean, zip(*(run["top1"] for run in seeds.values())))
        print(f"    line [{', '.join(f'{mean:.2f}' for mean in means)}]")
    lines = "; ".join(f"{name} {colour}" for name, colour in zip(networks, COLOURS))
    print(f"```\n\nLines: {lines}.")


# ------------------------------------------------------------------------------------- Command line


def defaults(recipe, dataset):
    """All settings and options by name, with the defaults of a recipe and a data set."""
    table = {name: default for name, (default, _, _) in (SETTINGS | OPTIONS).items()}
    return table | dict(recipe=recipe) | RECIPES[recipe] | FOR_DATASET.get(dataset, {})


def make_parser(default, add_help=True):
    """The flags of train.py: one per row of SETTINGS and OPTIONS."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train and evaluate SENetV2 and what it is compared with.",
        usage=argparse.SUPPRESS, add_help=add_help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, (_, kind, meaning) in (SETTINGS | OPTIONS).items():
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool
               else dict(nargs="+") if kind is list
               else dict(choices=kind) if isinstance(kind, tuple)
               else dict(type=kind))
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default[name], help=meaning, **how)
    return parser


def parse_args(argv=None):
    """(args, settings): all flags, and those that define the result, as a dict of plain values.

    Unless given, args.out, the run's folder, is runs/, then data set, network, recipe, all that is
    not at its default, and the seed.
    """
    # Once for recipe and data set alone, because the other defaults (and --help) depend on them.
    first, _ = make_parser(defaults("paper", None), add_help=False).parse_known_args(argv)
    default = defaults(first.recipe, first.dataset)
    parser = make_parser(default)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no cuda device here; pass --device cpu, or leave "
                     "it out")

    def matters(key):
        return key not in ONLY_FOR or args.model in ONLY_FOR[key] or args.dataset in ONLY_FOR[key]

    settings = {key: value for key, value in vars(args).items()
                if key in SETTINGS and value is not None and matters(key)}
    changed = [re.sub(r"[/\\:]", "_", f"{key}{value}") for key, value in settings.items()
               if value != default[key] and key not in ("dataset", "model", "recipe", "seed")]
    name = "-".join([args.dataset, args.model, args.recipe, *changed, f"seed{args.seed}"])
    args.out = Path(args.out or Path("runs", name))
    args.checkpoint = Path(args.checkpoint or args.out / "last.pt")
    return args, settings


def start_processes(args):
    """Choose this process's GPU, and meet the other processes that torchrun has started."""
    if args.device == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(f"there are more processes than the {torch.cuda.device_count()} GPUs "
                             "here; start one process per GPU")
        torch.cuda.set_device(LOCAL_RANK)                   # what "cuda" means from here on
        torch.backends.cudnn.benchmark = True               # shapes hardly change: try kernels once
        torch.set_float32_matmul_precision("high")          # TF32 for what stays in float32
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")


def give_up(message, code=1):
    """Print one line and leave, without waiting for processes that may be waiting for this one."""
    print(f"train.py: error: {printable(message)}", file=sys.stderr, flush=True)
    if WORLD > 1:
        os._exit(code)              # torchrun ends the others
    sys.exit(code)


def leave_processes():
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()


def main(argv=None):
    args, settings = parse_args(argv)
    device = torch.device(args.device)

    try:
        start_processes(args)
        if args.report:
            run_report(args.report)
        elif args.predict:
            run_prediction(args, device)
        elif args.evaluate:
            run_evaluation(args, device)
        else:
            run_training(args, settings, device)

    except SystemExit:              # a signal: all processes leave together
        leave_processes()
        raise
    except KeyboardInterrupt:       # before Run.begin there is nothing new to save
        give_up("interrupted", 128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        give_up(str(error))
    except RuntimeError as error:
        if WORLD == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        give_up("another process of this run has failed; give the same command again to resume")
    leave_processes()


if __name__ == "__main__":
    main()
