"""Chapter 3: training.  Forward, loss, backward, step; and a run that may be killed at any moment.

    python train.py                                             shapes: minutes on a laptop
    python train.py --dataset cifar100                          SENetV2-50, as in the paper
    python train.py --evaluate --checkpoint runs/NAME           loss, top-1, top-5, each class
    python train.py --predict cat.jpg --checkpoint runs/NAME    the five most likely classes
    python train.py --report runs results                       tables of all runs
    torchrun --nproc-per-node 8 train.py --dataset cifar100     the same batches on eight GPUs

A run is a folder, named by what defines its result: config.json holds its settings, and hardware
and versions of its last start; metrics.csv one row per epoch; last.pt all that it needs to go on.

There is one way to stop a run: end its process, by Ctrl-C, by a kill, by a power cut.  There is one
way to start it: give the command, which goes on from last.pt if there is one.  The steps since then
are done once more, and on a CPU the run ends with the bits of one that was never stopped: each
batch is a function of (seed, epoch, step), and what a process draws at random one of (seed, step).

The accuracy of a run is that of its last epoch, never that of its best epoch on the test set.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.utils import save_image

from data import DATASETS, FOLDERS, Preprocess, load_data, mix, printable, read_image
from senetv2 import GATES, OURS, PEERS, STEMS, build_model

# torchrun sets these: which process this is, of how many, and the same within one machine.
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD, LOCAL_WORLD = (int(os.environ.get(name + "_SIZE", 1)) for name in ("WORLD", "LOCAL_WORLD"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# ----------------------------------------------------------------------------------------- Settings


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a finite float from low to high."""
    def number(text):
        if low <= (value := kind(text)) <= high and value < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return number


# The paper says Adam, cross-entropy, ResNet-50 and, in its tables, r = 32 and K = 4.  It does not
# say the rest, so the rest is our choice.  A recipe changes some of the defaults below, and a data
# set wins over the recipe.
RECIPES = {
    "paper": {},
    "strong": dict(stem="cifar", optimizer="sgd", lr=0.1, weight_decay=5e-4, label_smoothing=0.1,
                   epochs=100),
}
FOR_DATASET = {     # the embedded set is for a laptop: the paper's small network, a short run
    "shapes": dict(layers="1,1,1,1", epochs=3, batch_size=64),
    "folder": dict(images_per_class=0),
}

SETTINGS = {        # what defines a result: default, type or choices, meaning
    "dataset": ("shapes", DATASETS, "what to train on"),
    "model": ("senetv2", OURS + PEERS, "the network; the last five are torchvision's"),
    "recipe": ("paper", tuple(RECIPES), "a set of defaults for what is below"),
    "layers": ("3,4,6,3", str, "bottlenecks per stage; 3,4,6,3 is ResNet-50"),
    "stem": ("imagenet", STEMS, "imagenet: 7x7, stride 2, pooling; cifar: 3x3, stride 1"),
    "reduction": (32, number(int, 1), "r: each hidden layer of a gate has C/r units"),
    "cardinality": (4, number(int, 1), "K: hidden layers side by side in the gate of senetv2"),
    "residual": (False, bool, "multiply by 1 + s, as the released code does, not by s"),
    "zero_init": (False, bool, "start the last batch norm of each bottleneck at 0"),
    "weights": (None, str, "start from: imagenet (torchvision's weights), or a file"),
    "optimizer": ("adam", ("adam", "sgd"), "sgd has Nesterov momentum 0.9"),
    "lr": (1e-3, number(float, 0), "peak learning rate"),
    "warmup": (0.05, number(float, 0, 1), "share of the run in which the rate rises"),
    "weight_decay": (0.0, number(float, 0, 1), "L2 penalty, not on norms and biases"),
    "label_smoothing": (0.0, number(float, 0, 1), "share of the target spread over all classes"),
    "epochs": (30, number(int, 1), "passes over the training images"),
    "batch_size": (128, number(int, 1), "images per step, in all processes together"),
    "train_images": (0, number(int, 0), "train on the first N of a seeded shuffle; 0: all"),
    "images_per_class": (250, number(int, 0), "of imagenet or folder, in training; 0: all"),
    "image_size": (224, number(int, 32), "imagenet, folder: pixels per side"),
    "augment": (True, bool, "crop and flip at random"),
    "seed": (0, number(int, 0, 2**63 - 1), "random seed of weights, order and augmentation"),
}
USED_BY = {         # settings that only some networks or data sets have
    "layers": OURS, "stem": OURS, "zero_init": OURS, "reduction": GATES, "residual": GATES,
    "cardinality": GATES.keys() - {"senet"}, "images_per_class": FOLDERS, "image_size": FOLDERS,
}

OPTIONS = {         # what does not define a result
    "data_dir": ("data", str, "where the data set is, or is downloaded to"),
    "workers": (max(1, min(8, CORES // LOCAL_WORLD)), number(int, 0),
                "imagenet, folder: processes that decode images, per training process"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu",
               ("cpu", "cuda")[:1 + torch.cuda.is_available()], "where to compute"),
    "cuda_graph": (True, bool, "on one GPU, record forward and backward, unless --compile"),
    "compile": (False, bool, "use torch.compile"),
    "out": (None, str, "the run's folder; by default runs/ and a name made from the settings"),
    "checkpoint_minutes": (1.0, number(float, 0), "minutes between checkpoints"),
    "evaluate": (False, bool, "only evaluate --checkpoint, and draw gates.png beside it"),
    "predict": (None, list, "print the five most likely classes of these image files"),
    "report": (None, list, "print tables of the runs in these folders, as Markdown"),
    "checkpoint": (None, str, "what to evaluate or predict with; by default the run's folder"),
}


def used(key, settings):
    """Whether the network or the data set of these settings has the setting `key`."""
    return key not in USED_BY or bool({settings["model"], settings["dataset"]} & {*USED_BY[key]})


# ----------------------------------------------------------------------------------------- The loop


def train(run, net, optimizer, data, args):
    """Train `net` from where `run` stands to the last epoch; save now and then, and at the end."""
    settings, model = run.settings, parallel(net, args.compile)
    total = settings["epochs"] * data.steps
    autocast = torch.autocast(data.device.type, torch.bfloat16, enabled=bfloat16(data.device))
    graphed = args.cuda_graph and data.device.type == "cuda" and WORLD == 1 and not args.compile
    captured_at = run.step + 1 if graphed else None     # cuDNN tries its kernels in the first step
    shown_at = saved_at = time.monotonic()

    def forward_backward(images, labels):
        """Leave the gradients of a batch in the parameters' .grad; return its mean loss."""
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
        optimizer.zero_grad()       # captured, too: a replay does not bring back a .grad of None
        loss.backward()
        return loss.detach()

    for epoch in range(len(run.history), settings["epochs"]):
        net.train()
        started, first = time.monotonic(), run.step - epoch * data.steps
        for place, (images, labels) in enumerate(data.train_batches(epoch, first), start=first):
            # What the network draws at random, such as dropout, depends on these alone.
            torch.manual_seed(mix(settings["seed"], RANK, run.step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.step, total, settings["warmup"], settings["lr"])

            if run.step == captured_at:
                forward_backward = capture(forward_backward, images, labels)
            loss = forward_backward(images, labels)
            optimizer.step()

            # The losses stay on the device: to read one is to wait for it.
            run.losses[place] = loss / WORLD
            if WORLD > 1:
                dist.all_reduce(run.losses[place])
            run.step += 1

            now = time.monotonic()
            if sys.stdout.isatty() and now - shown_at > 1:
                left = (now - started) / (place + 1 - first) * (total - run.step)
                say(f"epoch {epoch + 1}  step {place + 1}/{data.steps}  loss {loss:.3f}  "
                    f"{left / 60:.1f} min left", end="")
                shown_at = now
            if RANK == 0 and now - saved_at > 60 * args.checkpoint_minutes:
                save(run, net, optimizer, args.out)     # the others wait for it in their next step
                saved_at = now

        check_finite(run, net)              # it waits for the device, so the clock is right
        speed = (data.steps - first) * data.batch_size / (time.monotonic() - started)
        test, _ = evaluate(net, data)
        row = dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"],
                   train_loss=run.losses.mean().item(), **test, images_per_second=speed)
        run.history.append(row)
        lines = [",".join(map(str, line)) for line in (row.keys(), *map(dict.values, run.history))]
        replace_file(args.out / "metrics.csv", "\n".join(lines) + "\n")
        say(f"{in_words(row)}  {(total - run.step) * data.batch_size / speed / 60:.1f} min left"
            if speed else in_words(row))

        # An epoch that took a sixth of the time between checkpoints is worth one.
        now = time.monotonic()
        if run.step == total or RANK == 0 and now - saved_at > 10 * args.checkpoint_minutes:
            save(run, net, optimizer, args.out)
            saved_at = now


def capture(function, *inputs):
    """Record the kernels that `function` starts as a CUDA graph; return a function that replays it.

    Recording computes nothing, so Python may read no value from the GPU here.  Its numbers and
    branches stay as they are now, and so do all addresses: a call copies its inputs there, and
    overwrites the gradients and what the last call returned.
    """
    buffers, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
    with explained("the training step cannot be recorded", "pass --no-cuda-graph"), \
            torch.cuda.graph(graph, capture_error_mode="thread_local"):     # the loader has threads
        result = function(*buffers)

    def replay(*inputs):
        for buffer, tensor in zip(buffers, inputs):
            buffer.copy_(tensor)
        graph.replay()
        return result
    return replay


def learning_rate(step, total, warmup, peak):
    """Up to `peak` in a line over the first `warmup` share of the steps, then to 0 as a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def make_optimizer(net, settings):
    """Adam, or SGD with Nesterov momentum; matrices and kernels decay, norms and biases do not."""
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1],
                   weight_decay=settings["weight_decay"]),
              dict(params=[p for p in net.parameters() if p.ndim <= 1], weight_decay=0.0)]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, settings["lr"], momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, settings["lr"], fused=True)


def bfloat16(device):
    """Whether we train in it: on Ampere GPUs and later.  It needs no loss scaling."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def evaluate(net, data):
    """(test_loss, top1 and, of more than five classes, top5, by name; top1 of each class), in %.

    Without bfloat16: rounded to it, the largest logits of an image are equal now and then.
    """
    if WORLD > 1:       # all processes evaluate with the running means of process 0
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)

    def results(images, labels):
        logits = net(images)
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        hits = logits.topk(min(5, len(data.classes))).indices == labels[:, None]    # (B, 5)
        return torch.stack([torch.ones_like(loss), loss, hits[:, 0], hits.any(1)], dim=1)

    table = sums_per_class(net, data, results)                                      # (classes, 4)
    count, loss, top1, top5 = table.sum(0).tolist()
    test = dict(test_loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)
    if len(data.classes) <= 5:
        del test["top5"]
    return test, (100 * table[:, 2] / table[:, 0]).tolist()


@torch.no_grad()
def sums_per_class(net, data, results):
    """Sum results(images, labels), (B, n), over the test images of each class: (classes, n)."""
    net.eval()
    sums = 0
    for images, labels in data.test_batches():
        rows = results(images, labels).double()
        sums += rows.new_zeros(len(data.classes), rows.shape[1]).index_add_(0, labels, rows)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums


def in_words(row):
    return "  ".join(f"{key} {value:,.5g}" for key, value in row.items() if key != "lr")


def say(text, end="\n"):
    """Print from process 0 alone; on a terminal, over the line of progress."""
    if RANK == 0:
        print("\r\033[K" * sys.stdout.isatty() + printable(text), end=end, flush=True)


# -------------------------------------------------------------------------- Checkpoints and weights


def save(run, net, optimizer, folder):
    """Write last.pt, the whole state of the run."""
    check_finite(run, net)
    state = dict(vars(run), model=net.state_dict(), optimizer=optimizer.state_dict())
    replace_file(folder / "last.pt", state)


def replace_file(path, content):
    """Write a dict or a text from process 0.  A crash or a full disk leaves the old file whole."""
    draft = path.with_name(path.name + ".tmp")
    if RANK > 0:
        return
    with explained(f"cannot write {path}", "free some disk space, then give the command again"):
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


def check_finite(run, net):
    """Raises ValueError if a loss or a weight is no longer finite: last.pt never holds such."""
    if not all(tensor.isfinite().all() for tensor in (run.losses, *net.state_dict().values())):
        raise ValueError(f"before step {run.step}, a loss or a weight was no longer finite; "
                         "last.pt, if there is one, is older; try a smaller --lr")


def resume(run, net, optimizer, saved, folder):
    """Go on from what save() wrote.  Raises ValueError if it is another run, or does not fit."""
    before = saved["settings"] | dict(images=saved["images"])
    now = run.settings | dict(images=run.images)
    changed = [f"{key}: was {before.get(key)}, is {now.get(key)}"
               for key in before | now if before.get(key) != now.get(key)]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings or data: {'; '.join(changed)}; "
                         "pass another --out, or delete that folder")
    with usable(folder / "last.pt"):
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.losses.copy_(saved["losses"])
        run.step, run.history = saved["step"], saved["history"]


def lock(folder):
    """Keep a second process out of a run's folder until this one ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
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
                     "use the code that wrote it, or delete it to train anew")


def checkpoint_file(path):
    """The path itself, or last.pt in a run's folder.  Raises FileNotFoundError."""
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or give a run's folder")
    return path


def read_checkpoint(path):
    """What save() wrote: a dict of tensors and plain values.  Raises ValueError for other files."""
    path = checkpoint_file(path)
    with usable(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)     # no file can run code
        saved["settings"] = completed(saved["settings"])
        return {key: saved[key] for key in ("settings", "classes", "images", "step", "history",
                                            "losses", "model", "optimizer")}


def load(path):
    """The network of a run's folder or checkpoint: on the CPU, in eval mode.

    .classes, .settings    the names of its classes, the settings of its run
    .preprocess            makes an image, uint8 (3, H, W), the batch of one that it predicts from
    """
    saved = read_checkpoint(path)
    with usable(path):
        net = build_network(saved["settings"], saved["classes"])
        net.load_state_dict(saved["model"])
        net.classes, net.settings = saved["classes"], saved["settings"]
        net.preprocess = Preprocess(net.settings["dataset"], net.settings["image_size"])
    return net.eval()


def load_weights(net, source, model):
    """Copy into `net` all tensors of `source` that fit by name and shape.  Returns a line about it.

    source    "imagenet": torchvision's weights of the network or its trunk.  Or a file: a state
              dict, alone or as "model" or "state_dict" of a checkpoint, also with the prefixes
              that DataParallel and torch.compile put before the names.

    Raises ValueError or FileNotFoundError for weights that cannot be read or do not fit at all.
    """
    if source == "imagenet":
        name = "resnet50" if model in OURS else model
        with explained(f"torchvision's weights of {name} are not on this disk and cannot be "
                       "downloaded", "leave --weights out, or give a file"):
            weights = torchvision.models.get_model_weights(name).DEFAULT
            weights = weights.get_state_dict(check_hash=True)
    else:
        source = checkpoint_file(source)
        # torchvision's own training script stores its command line beside the weights
        with explained(f"{source} holds no weights", "give a file with a state dict"), \
                torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(source, map_location="cpu", weights_only=True)
            weights = weights.get("model", weights.get("state_dict", weights))
            weights = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value
                       for key, value in weights.items() if torch.is_tensor(value)}

    own = net.state_dict()
    fitting = {key: value for key, value in weights.items()
               if key in own and own[key].shape == value.shape}
    if not fitting:
        raise ValueError(f"no tensor of {source} has a name and shape of {model}'s; give the "
                         "weights of a similar network")
    net.load_state_dict(fitting, strict=False)
    new, unused = ([key for key in keys if key not in fitting] for keys in (own, weights))
    return (f"weights: {len(fitting)} tensors taken from {source}; new: {len(new)} {new[:3]}; "
            f"unused: {len(unused)} {unused[:3]}")


# ----------------------------------------------------------------------------------- Starting a run


def run_training(args, settings, device):
    """Train, or resume, or print the result of a run that is finished."""
    data = open_data(args, settings, device)
    if settings["batch_size"] % WORLD or not data.steps:
        raise ValueError(f"--batch-size is {settings['batch_size']}; it must be a multiple of the "
                         f"number of processes, {WORLD}, and at most that of training images, "
                         f"{data.train_size}")

    torch.manual_seed(settings["seed"])
    net = build_network(settings, data.classes).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, settings)

    # All that last.pt holds beside the network and the optimiser: what makes it this run and no
    # other, the steps done, a dict per finished epoch, and the losses of the running epoch.
    run = SimpleNamespace(settings=settings, classes=data.classes, images=data.identity, step=0,
                          history=[], losses=torch.zeros(data.steps, device=device))
    with lock(args.out) if RANK == 0 else contextlib.nullcontext():
        saved = [None]                      # a list, which broadcast_object_list fills
        if RANK == 0 and (args.out / "last.pt").exists():
            saved = [read_checkpoint(args.out)]
        if WORLD > 1:                       # the machines need not share a disk
            dist.broadcast_object_list(saved)
        if saved[0]:
            resume(run, net, optimizer, saved.pop(), args.out)
        elif settings["weights"] and RANK == 0:         # parallel() copies them to the others
            say(load_weights(net, settings["weights"], settings["model"]))
            if settings["zero_init"]:
                say("zero_init: batch norms start from the weights, where these hold them, not at 0")

        if len(run.history) < settings["epochs"]:
            describe(run, net, data, args.out)
            train(run, net, optimizer, data, args)
        else:
            say(f"already finished, nothing trained; to train anew, delete {args.out} or pass "
                "--out (make: OUT=)")
    say(f"done: top-1 {run.history[-1]['top1']:.2f}% on the test images; saved in {args.out}")
    python = f" PYTHON={sys.executable}" * (Path(sys.prefix) != Path(__file__).with_name(".venv"))
    place = f" DATA_DIR={args.data_dir}" * (args.data_dir != "data") + python
    say(f"next: make evaluate CHECKPOINT={args.out}{place}")
    say(f"      make predict CHECKPOINT={args.out} IMAGE=FILE{python}")


def open_data(args, settings, device):
    """The data set.  One process downloads what is missing, then one of each other machine."""
    options = {key: settings[key] for key in ("batch_size", "seed", "augment", "train_images",
                                              "images_per_class", "image_size")}
    my_turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for turn in range(3 if WORLD > 1 else 1):
        if turn == my_turn:
            data = load_data(settings["dataset"], args.data_dir, device=device, rank=RANK,
                             world=WORLD, workers=args.workers, **options)
        if WORLD > 1:
            dist.barrier()
    return data


def build_network(settings, classes):
    layers = [int(number) for number in settings["layers"].split(",") if number.isdigit()]
    return build_model(
        settings["model"], len(classes), layers, settings["stem"], settings["reduction"],
        settings["cardinality"], settings["residual"],
        image_size=settings["image_size"] if settings["dataset"] in FOLDERS else 32,
        zero_init=settings["zero_init"])


def parallel(model, compiled):
    """The network as the loop calls it: one of several copies that share gradients, compiled."""
    if WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.broadcast_buffers = False     # evaluate() does; as an argument, this is deprecated
    return torch.compile(model) if compiled else model


def describe(run, net, data, folder):
    """Print what is about to be trained, and write config.json."""
    hardware = (torch.cuda.get_device_name() if data.device.type == "cuda"
                else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    about = dict(
        parameters=sum(p.numel() for p in net.parameters()), processes=WORLD, device=hardware,
        precision="bfloat16" if bfloat16(data.device) else "float32",
        torch=str(torch.__version__), torchvision=str(torchvision.__version__),
        python=platform.python_version())
    text = json.dumps(dict(settings=run.settings, **about), indent=1)
    replace_file(folder / "config.json", text + "\n")

    say(f"{run.settings['model']} on {run.settings['dataset']}: {data.train_size:,} training and "
        f"{data.test_size:,} test images")
    say(" ".join(f"{key}={value}" for key, value in (run.settings | about).items()
                 if used(key, run.settings)))
    say(f"{data.steps} steps per epoch, {data.batch_size // WORLD} images per step and process; "
        f"each epoch leaves out {data.train_size % data.batch_size} images, not always the same")
    if run.step:
        say(f"resuming after step {run.step}")
    if data.left_out:
        say(f"files left out, by ending: {data.left_out}")


# ----------------------------------------------------------- Evaluating, predicting, looking inside


# ------------------------------------------------------------------------------------------- Report


# ------------------------------------------------------------------------------------- Command line


def defaults(recipe, dataset):
    """The settings by name, with the defaults of a recipe and a data set."""
    table = {name: default for name, (default, _, _) in SETTINGS.items()}
    return table | RECIPES[recipe] | FOR_DATASET.get(dataset, {}) | dict(recipe=recipe,
                                                                         dataset=dataset)


def completed(settings):
    """The settings of a run, with the defaults of what older code did not store."""
    return defaults(settings["recipe"], settings["dataset"]) | settings


def parse_args(argv=None):
    """(args, settings): all flags, and those that define the result, as a dict of plain values."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train and evaluate SENetV2 and networks to compare with.",
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, (default, kind, meaning) in (SETTINGS | OPTIONS).items():
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool
               else dict(nargs="+") if kind is list
               else dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind))
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=meaning, **how)

    # Once for recipe and data set, because the other defaults (and --help) depend on them.
    words = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    default = defaults(first.recipe, first.dataset)
    parser.set_defaults(**default)
    args = parser.parse_args(words)

    # What the network or the data set does not use goes back to its default.
    for key in USED_BY:
        if getattr(args, key) != default[key] and not used(key, vars(args)):
            say(f"{key} {getattr(args, key)} is not used by {args.model} on {args.dataset}")
            setattr(args, key, default[key])
    settings = {key: getattr(args, key) for key in SETTINGS}
    changed = [re.sub(r"[/\\:]", "_", f"{key}{value}") for key, value in settings.items()
               if value != default[key] and key not in ("model", "seed")]
    name = "-".join([args.dataset, args.model, args.recipe, *changed, f"seed{args.seed}"])
    args.out = Path(args.out or Path("runs", name))
    args.checkpoint = Path(args.checkpoint or args.out)
    return args, settings


def main(argv=None):
    args, settings = parse_args(argv)
    code = 1
    try:
        if args.device == "cuda":
            if LOCAL_WORLD > torch.cuda.device_count():
                raise ValueError("more processes than GPUs; start fewer, or pass --device cpu")
            torch.cuda.set_device(LOCAL_RANK)               # what "cuda" means from here on
            torch.backends.cudnn.benchmark = True           # shapes hardly change: try kernels once
            torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        action = (run_report if args.report else run_prediction if args.predict
                  else run_evaluation if args.evaluate else run_training)
        action(args, settings, torch.device(args.device))
        if WORLD > 1:
            dist.destroy_process_group()
        return

    except KeyboardInterrupt:
        saved = (args.out / "last.pt").exists()
        message, code = "stopped; the same command " + (
            "goes on from the last checkpoint" if saved else "starts from scratch"), 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        last = str(error).strip().rpartition("\n")[2]       # that of a worker holds its traceback
        message = printable(last.removeprefix("ValueError: "))
        if "more than 1 value per channel" in message:      # batch norm's complaint
            message = ("one image per step and process is too few for batch norm, where the last "
                       "maps have one pixel; give a larger --batch-size")
    except Exception as error:
        lost = isinstance(error, dist.DistError) or WORLD > 1 and "gloo" in str(error)
        message = "another process of this run has failed" if lost else traceback.format_exc()
    print(f"train.py: {'error: ' * (code == 1)}{message}", file=sys.stderr, flush=True)
    (os._exit if WORLD > 1 else sys.exit)(code)     # never wait for the other processes


if __name__ == "__main__":
    main()
