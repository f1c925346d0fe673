"""Chapter 3: training.  Forward, loss, backward, step; and a run that survives whatever interrupts it.

    python train.py                                             shapes, minutes on a laptop, no download
    python train.py --dataset cifar10 --model senetv2           the paper's network and recipe
    python train.py --evaluate --checkpoint runs/NAME/last.pt   loss, top-1, top-5, accuracy of each class
    python train.py --predict cat.jpg --checkpoint FILE         the five most likely classes
    python train.py --report runs results                       tables and charts of all runs
    torchrun --nproc-per-node 8 train.py --dataset cifar10      the same run on eight GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

A run lives in runs/NAME, named after what defines its result:

    config.json     its settings, and the hardware and versions that it ran on
    metrics.csv     a row an epoch
    last.pt         everything needed to go on: the same command continues where the run stopped

Interrupted equals uninterrupted, to the bit on a CPU.  It holds because every batch is a function of (seed,
epoch, step), torch is seeded from (seed, process, step) before each step, and last.pt holds all the rest: weights, Adam's
moments, the step, the history and the losses of the epoch that was running.

The accuracy of a run is that of its last epoch, never the best epoch on the test set.
"""
import argparse
import csv
import datetime
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2
from torchvision.utils import save_image

from data import DATASETS, FOLDERS, IN_MEMORY, STATISTICS, Normalise, centre, load_data, mix, read_image
from senetv2 import GATES, OURS, PEERS, STEMS, build_model, fill, load, read_checkpoint

# ------------------------------------------------------------------------------------------------ Settings

# The paper says Adam, cross-entropy, ResNet-50, and r = 32, K = 4 in its tables.  What it leaves open is chosen here.
RECIPES = {
    "paper": dict(stem="imagenet", optimizer="adam", lr=1e-3, warmup=0.05, weight_decay=0.0, label_smoothing=0.0, erase=0,
                  epochs=30, batch_size=128),
    "strong": dict(stem="cifar", optimizer="sgd", lr=0.1, warmup=0.05, weight_decay=5e-4, label_smoothing=0.1, erase=8,
                   epochs=100, batch_size=128),
}
# The embedded set is for a laptop: the paper's small net in the place of ResNet-50, and a short run.
DATASET_DEFAULTS = {"shapes": dict(layers="1,1,1,1", epochs=10, batch_size=64), "folder": dict(images_per_class=0)}

# What defines a result; hardware, workers and compilation do not.  Some of it says nothing for some models and sets.
RESULT = ("dataset", "data_dir", "model", "recipe", "layers", "stem", "reduction", "cardinality", "residual", "weights",
          "optimizer", "lr", "warmup", "weight_decay", "label_smoothing", "epochs", "batch_size", "train_images",
          "images_per_class", "image_size", "augment", "erase", "seed")
ONLY_FOR = {"layers": OURS, "stem": OURS, "reduction": GATES, "residual": GATES, "cardinality": GATES.keys() - {"senet"},
            "data_dir": ("folder",), "images_per_class": FOLDERS, "image_size": FOLDERS, "erase": IN_MEMORY}


def parsed_by(parse, accepts, words):
    """A type for argparse: the text as `parse` reads it, where it `accepts` that; else an error that says `words`."""
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
amount = parsed_by(float, lambda x: 0 < x < math.inf, "a positive number")
fraction = parsed_by(float, lambda x: 0 <= x <= 1, "a number between 0 and 1")
four_numbers = parsed_by(str, lambda text: re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text),
                         "four positive numbers, such as 3,4,6,3 or 1,1,1,1")


def make_parser(recipe="paper", dataset=None):
    """The flags of train.py, with the defaults of a recipe and a data set."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train and evaluate SENetV2 and what it is compared with.",
                                     usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="what to train on")
    add("--data-dir", default="data", help="where its files are, or go")
    add("--train-images", type=natural, default=0, help="train on the first N of a seeded shuffle; 0: all")
    add("--images-per-class", type=natural, default=250, help="imagenet, folder: training images a class; 0: all")
    add("--image-size", type=positive, default=224, help="imagenet, folder: pixels a side")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="random crop and flip")
    add("--erase", type=natural, help="side in pixels of the square erased from each training image; not in folders")
    add("--workers", type=natural, default=min(8, os.cpu_count()), help="imagenet, folder: processes that decode")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="senetv2", help=f"{', '.join(OURS)}; {', '.join(PEERS)}; or any classification network of torchvision")
    add("--layers", type=four_numbers, default="3,4,6,3", help="bottlenecks a stage; shapes has 1,1,1,1")
    add("--stem", choices=STEMS, help="imagenet: 7x7, stride 2, pooling; cifar: 3x3, stride 1")
    add("--reduction", type=positive, default=32, help="r: channels over hidden units of a dense layer in the gate")
    add("--cardinality", type=positive, default=4, help="K: parallel dense layers (senetv2)")
    add("--residual", action=argparse.BooleanOptionalAction, default=False,
        help="gate x by 1 + s, as the released code does, not by s")
    add("--weights", help="start from: imagenet (torchvision's weights of the trunk) or a checkpoint")
    add = parser.add_argument_group("optimisation; defaults from the recipe").add_argument
    add("--recipe", choices=RECIPES, default="paper", help="where the other defaults come from")
    add("--optimizer", choices=("adam", "sgd"), help="sgd: with Nesterov momentum 0.9")
    add("--lr", type=amount, help="learning rate at its peak")
    add("--warmup", type=fraction, help="share of the run in which it rises; it then falls to 0 as a cosine")
    add("--weight-decay", type=fraction, help="L2 penalty on weights; norms and biases have none")
    add("--label-smoothing", type=fraction, help="share of the target spread over all classes")
    add("--epochs", type=positive, help="passes over the training images")
    add("--batch-size", type=positive, help="images a step, in all processes together")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=natural, default=0, help="of weights, order and augmentation")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--compile", action="store_true", help="use torch.compile")
    add("--out", help="the run's folder; by default runs/ and a name made from the settings")
    add("--restart", action="store_true", help="start the run anew, even if it can go on")
    add("--checkpoint-minutes", type=amount, default=5.0, help="minutes between checkpoints")
    add("--evaluate", action="store_true", help="only evaluate --checkpoint, on --data-dir")
    add("--report", nargs="+", metavar="FOLDER", help="print tables and charts of all runs below these folders, as Markdown")
    add("--predict", nargs="+", metavar="IMAGE", help="print the five most likely classes of each image file")
    add("--checkpoint", help="the file to evaluate or predict with; by default the run's last.pt")
    parser.set_defaults(**RECIPES[recipe] | DATASET_DEFAULTS.get(dataset, {}))
    return parser


def parse_args(argv=None):
    """(args, settings): all flags, and what defines the result as a dict of plain values; args.out is the run's folder."""
    chosen, _ = make_parser().parse_known_args(argv)
    parser = make_parser(chosen.recipe, chosen.dataset)
    args, default = parser.parse_args(argv), parser.parse_args([])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no cuda device here; pass --device cpu, or leave it out")
    settings = {key: getattr(args, key) for key in RESULT if getattr(args, key) is not None
                and (key not in ONLY_FOR or args.model in ONLY_FOR[key] or args.dataset in ONLY_FOR[key])}
    changed = [f"{key}{value}".replace("/", "_") for key, value in settings.items()
               if value != getattr(default, key) and key not in ("dataset", "model", "recipe", "seed")]
    name = "-".join([args.dataset, args.model, args.recipe, *changed, f"seed{args.seed}"])
    args.out = Path(args.out or Path("runs", name))
    args.checkpoint = Path(args.checkpoint or args.out / "last.pt")
    return args, settings


# ---------------------------------------------------------------------------------------------- The loop


def train(args, settings, data, net, optimizer, saved, out):
    """Train to the last epoch, from the start or from the checkpoint `saved`; returns the history, a dict an epoch."""
    rank, world = process()
    model = net
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
        model.broadcast_buffers = False     # they go round before they are saved or used, not at every step
    if args.compile:
        model = torch.compile(model)
    step, history, total = 0, [], settings["epochs"] * data.steps
    losses = torch.zeros(data.steps, device=data.device)        # of the running epoch, one a step
    began = time.perf_counter()
    if saved:
        step, history = saved["step"], saved["history"]
        fill(net, saved)
        optimizer.load_state_dict(saved["optimizer"])
        losses.copy_(saved["losses"])
        began -= saved["seconds"]
    watch, progress = Watch(args.checkpoint_minutes), Progress(total, step)

    def gather():
        """Make the buffers alike in all processes; stop if losses or weights are no longer numbers."""
        if world > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        check_finite(losses, net, step)

    def save():
        gather()
        if rank == 0:
            checkpoint = dict(settings=settings, network=network(settings, data.classes), classes=data.classes, step=step,
                              history=history, losses=losses, seconds=time.perf_counter() - began, model=net.state_dict(),
                              optimizer=optimizer.state_dict(), torch=str(torch.__version__))
            write(out / "last.pt", lambda file: torch.save(checkpoint, file))
        watch.last = time.monotonic()

    def save_or_stop(evaluating=False):
        number, due = watch.agree()
        if number or (due and not evaluating):      # evaluation changes nothing that would be worth saving
            save()
        if number:
            if world > 1:       # the first process to leave would get the others killed in the middle of the save
                dist.barrier()
            progress.clear()
            sys.exit(128 + number)      # as shells report a signal

    for epoch in range(len(history), settings["epochs"]):
        net.train()
        for images, labels in data.train_batches(epoch, first_step=step - epoch * data.steps):
            torch.manual_seed(mix(settings["seed"], rank, step))        # so dropout is a function of the step, too
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, settings["warmup"], settings["lr"])
            with autocast(data.device):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step % data.steps] = loss.detach()           # left on the device: reading it would wait for it
            if world > 1:
                dist.all_reduce(losses[step % data.steps])
                losses[step % data.steps] /= world
            step += 1
            progress.show(step, losses, data)
            save_or_stop()
        gather()
        seconds = time.perf_counter() - began
        result = evaluate(net, data, after_batch=lambda: save_or_stop(evaluating=True))
        history.append(dict(epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"], train_loss=losses.mean().item(),
                            test_loss=result["loss"], top1=result["top1"], top5=result["top5"],
                            images_per_second=data.steps * data.batch_size / seconds, seconds=seconds))
        progress.epoch(history[-1], settings["epochs"])
        if rank == 0:
            write(out / "metrics.csv", lambda file: file.write(as_csv(history)))
        losses.zero_()
        began = time.perf_counter()
    save()
    return history


def make_optimizer(net, settings):
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1], weight_decay=settings["weight_decay"]),
              dict(params=[p for p in net.parameters() if p.ndim <= 1], weight_decay=0.0)]    # norms and biases
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, settings["lr"], momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, settings["lr"], fused=True)


def learning_rate(step, total, warmup, peak):
    """Up to `peak` in a straight line over the first `warmup` share of all steps, then down to 0 as a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def autocast(device):
    """On a GPU, convolutions and matrix products run in bfloat16, whose range needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(net, data, after_batch=lambda: None):
    """Over all test images, each once: loss, top1 and top5 (in %), and per_class, the top-1 of each class (in %)."""
    net.eval()
    top = min(5, len(data.classes))
    sums = torch.zeros(2, dtype=torch.float64, device=data.device)                          # loss, top-5 hits
    classes = torch.zeros(2, len(data.classes), dtype=torch.float64, device=data.device)    # top-1 hits, images
    for images, labels in data.test_batches():
        with autocast(data.device):
            logits = net(images)
        hits = logits.topk(top).indices == labels[:, None]                                  # (B, 5)
        sums += torch.stack([F.cross_entropy(logits.double(), labels, reduction="sum"), hits.sum()])
        classes.index_add_(1, labels, torch.stack([hits[:, 0], torch.ones_like(labels)]).double())
        after_batch()
    if process()[1] > 1:
        dist.all_reduce(sums)
        dist.all_reduce(classes)
    (loss, top5), (right, seen) = sums.tolist(), classes
    count = seen.sum().item()
    return dict(loss=loss / count, top1=100 * right.sum().item() / count, top5=100 * top5 / count,
                per_class=(100 * right / seen).tolist())


def check_finite(losses, net, step):
    """End the run where a loss or a weight is no longer a number; called before every save, so last.pt stays good."""
    bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        step = (step - 1) // len(losses) * len(losses) + bad[0] + 1         # counted from 1, as `step` is after a step
    elif all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        return
    raise ValueError(f"the loss or the weights are no longer finite at step {step}; the last checkpoint is from before it; "
                     "try a smaller --lr")


# ----------------------------------------------------------------------------------- Processes and signals


def process():
    """(rank, world): which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Watch:
    """Says when to save and when to stop, alike in all processes.  A second Ctrl-C stops at once."""

    def __init__(self, minutes):
        self.number, self.minutes, self.last = 0, minutes, time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.notice)

    def notice(self, number, frame):
        self.number = number
        if process()[1] == 1:       # torchrun passes Ctrl-C on, so there each process gets it twice
            signal.signal(number, signal.SIG_DFL)

    def agree(self):
        """(the signal that came or 0, whether a checkpoint is due)."""
        due = time.monotonic() - self.last > 60 * self.minutes
        flags = torch.tensor([self.number, due])
        if process()[1] > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)       # on the CPU, by gloo: the GPU does not wait
        return flags.tolist()


# --------------------------------------------------------------------------------------- Progress and files


class Progress:
    """What the terminal shows: a line an epoch, and on a terminal one that moves within the epoch."""

    def __init__(self, total, step):
        self.on = process()[0] == 0
        self.live = self.on and sys.stdout.isatty()
        self.total, self.first, self.step, self.start, self.last = total, step, step, time.monotonic(), 0
        if self.on:
            print("  epoch        lr train loss test loss   top-1   top-5  images/s time left")

    def left(self):
        each = (time.monotonic() - self.start) / max(1, self.step - self.first)
        return str(datetime.timedelta(seconds=round(each * (self.total - self.step))))

    def show(self, step, losses, data):
        self.step = step
        if self.live and time.monotonic() - self.last > 1:      # rarely: reading the loss waits for the device
            self.last = time.monotonic()
            within = (step - 1) % data.steps
            speed = (step - self.first) * data.batch_size / (self.last - self.start)
            print(f"\r\033[Kstep {within + 1}/{data.steps}  loss {losses[within]:.3f}  {speed:,.0f} images/s  "
                  f"{self.left()} left", end="", flush=True)

    def clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)

    def epoch(self, row, epochs):
        self.clear()
        if self.on:
            print(f"{row['epoch']:>3}/{epochs:<3} {row['lr']:>9.2e} {row['train_loss']:>10.4f} {row['test_loss']:>9.4f} "
                  f"{row['top1']:>6.2f}% {row['top5']:>6.2f}% {row['images_per_second']:>9,.0f} {self.left():>9}", flush=True)


def as_csv(history):
    table = [list(row) for row in history[:1]] + [row.values() for row in history]
    return "".join(",".join(map(str, row)) + "\n" for row in table).encode()


def write(path, put):
    """Replace `path` by what put(file) writes, at once: a crash or a full disk leaves the old file whole."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:        # torch reports a full disk as a RuntimeError
        draft.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({str(error).splitlines()[0]}); make room, then the same command goes on "
                      "from the last checkpoint") from None


# -------------------------------------------------------------------------------------------------- Report

PAPER_TOP1 = {("cifar100", "3,4,6,3"): {"resnet": 61.72, "senet r=32": 62.26, "senetv2 r=32 K=4 (= senet r=8)": 63.52},
              ("cifar10", "1,1,1,1"): {"resnet": 77.38, "senet r=32": 77.79, "senetv2 r=32 K=4 (= senet r=8)": 78.60}}
NETWORK = ("model", "reduction", "cardinality", "residual")     # what the rows of a table differ in
COLOURS = dict(grey="#888888", blue="#1f77b4", green="#2ca02c", red="#d62728", orange="#ff7f0e", purple="#9467bd", brown="#8c564b")


def label(settings):
    r, k = settings.get("reduction"), settings.get("cardinality")
    text = settings["model"] + (f" r={r}" if r else "") + (f" K={k}" if k else "")
    if settings["model"] == "senetv2" and 256 % r == 0 == r % k:        # no channel is cut off
        text += f" (= senet r={r // k})"
    return text + " residual" * settings.get("residual", False)


def command(settings):
    """The flags that differ from the defaults of the recipe and data set, without the seed."""
    default = vars(make_parser(settings["recipe"], settings["dataset"]).parse_args([])) | dict(model=None, dataset=None)
    flags = ["python train.py"]
    for key, value in settings.items():
        if key != "seed" and value != default[key]:
            name = key.replace("_", "-")
            flags.append(f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}")
    return " ".join(flags)


def run_report(folders):
    """Print, as Markdown, a table and a chart for all finished runs that differ in network and seed alone.

    A run counts by its config.json and metrics.csv; its accuracy is that of the last epoch.  Of two with all settings alike
    (a copy, or one after an edit of the code) the first folder counts, and the other is named where it differs.
    """
    runs, left_out = {}, []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("config.json")):
        try:
            about = json.loads(path.read_text())
            about["rows"] = list(csv.DictReader(path.with_name("metrics.csv").read_text().splitlines()))
            settings, missing = about["settings"], about["settings"]["epochs"] - len(about["rows"])
        except (ValueError, KeyError, TypeError, OSError):
            left_out.append(f"- {path.parent}: no run of train.py")
            continue
        if missing:
            left_out.append(f"- {path.parent}: {len(about['rows'])} of {settings['epochs']} epochs")
            continue
        shared = tuple((k, v) for k, v in settings.items() if k not in NETWORK + ("seed",))
        first = runs.setdefault(shared, {}).setdefault(label(settings), {}).setdefault(settings["seed"], about)
        top1, other = (float(run["rows"][-1]["top1"]) for run in (about, first))
        if top1 != other:
            left_out.append(f"- {path.parent}: top-1 {top1:.2f}%, where a run of the same settings above has {other:.2f}%")
    for shared, networks in runs.items():
        print_table(dict(shared), dict(sorted(networks.items(), key=lambda item: next(iter(item[1].values()))["parameters"])))
    if left_out:
        print("\nIn no table:\n\n" + "\n".join(left_out))
    if not runs and not left_out:
        raise ValueError(f"no run (a folder with config.json and metrics.csv) under {' '.join(folders)}; train first")


def print_table(shared, networks):
    size = shared.get("train_images", 0)
    print(f"\n### {shared['dataset']}, {f'{size:,}' if size else 'all'} training images, {shared['epochs']} epochs"
          + f", layers {shared['layers']}" * ("layers" in shared) + "\n")
    print(", ".join(f"{key} {shared[key]}" for key in ("recipe", "optimizer", "lr", "batch_size", "stem") if key in shared) + ".\n")
    top1 = {name: {seed: float(run["rows"][-1]["top1"]) for seed, run in seeds.items()} for name, seeds in networks.items()}
    paper = PAPER_TOP1.get((shared["dataset"], shared.get("layers")), {})
    print("| network | parameters | seeds | top-1 (%) | minus resnet | minus senet r=32 | in the paper | images/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seeds in networks.items():
        run = next(iter(seeds.values()))
        speed = statistics.median(float(row["images_per_second"]) for run in seeds.values() for row in run["rows"])
        claim = format(paper[name], ".2f") if name in paper else "-"
        print(f"| {name} | {run['parameters']:,} | {len(seeds)} | {mean_and_spread(top1[name].values())} "
              f"| {difference(top1, name, 'resnet')} | {difference(top1, name, 'senet r=32')} | {claim} | {speed:,.0f} |")
    machines = sorted({f"{run['device']}, torch {run['torch']}" for seeds in networks.values() for run in seeds.values()})
    print("\ntop-1: last epoch, mean ± standard deviation over seeds; differences: paired by seed, mean ± standard error. "
          f"{'; '.join(machines)}.\n\n```bash")
    for seeds in networks.values():
        settings = next(iter(seeds.values()))["settings"]
        print(f"for seed in {' '.join(map(str, sorted(seeds)))}; do {command(settings)} --seed $seed; done")
    epochs = list(range(1, shared["epochs"] + 1))
    palette = json.dumps({"themeVariables": {"xyChart": {"plotColorPalette": ",".join(COLOURS.values())}}})
    print(f"```\n\n```mermaid\n%%{{init: {palette}}}%%\nxychart-beta")
    print(f'    title "{shared["dataset"]}: test top-1 (%) by epoch, mean over seeds"')
    print(f'    x-axis "epoch" {epochs if len(epochs) < 25 else f"1 --> {len(epochs)}"}\n    y-axis "top-1 (%)"')
    for seeds in networks.values():
        columns = zip(*([float(row["top1"]) for row in run["rows"]] for run in seeds.values()))
        print(f"    line [{', '.join(f'{statistics.fmean(column):.2f}' for column in columns)}]")
    print(f"```\n\nLines: {'; '.join(f'{name} {colour}' for name, colour in zip(networks, COLOURS))}.")


def mean_and_spread(values, style=".2f", divisor=1):
    """The mean and, of several values, their standard deviation over `divisor`."""
    values = list(values)
    return f"{statistics.fmean(values):{style}}" + (f" ± {statistics.stdev(values) / divisor:.2f}" if len(values) > 1 else "")


def difference(top1, name, base):
    """Mean and standard error of the differences between runs of the same seed."""
    gaps = [top1[name][seed] - top1[base][seed] for seed in top1[name].keys() & top1.get(base, {}).keys()]
    return mean_and_spread(gaps, "+.2f", math.sqrt(len(gaps))) if gaps and name != base else "-"


# ---------------------------------------------------------------------------------------------------- Runs


def network(settings, classes):
    """The arguments of build_model."""
    arguments = {key: settings[key] for key in ("stem", "reduction", "cardinality", "residual") if key in settings}
    if "layers" in settings:
        arguments["layers"] = tuple(map(int, settings["layers"].split(",")))
    if settings["model"] == "vit":
        arguments["image_size"] = settings.get("image_size", 32)
    return dict(name=settings["model"], num_classes=len(classes), **arguments)


def start_from(net, source, model):
    """Copy into `net` every tensor of `source` that has its name and shape; returns a line that says which."""
    if source == "imagenet":
        name = "resnet50" if model in OURS else model
        try:
            weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"torchvision's weights of {name} are not on this disk and cannot be had ({error}); "
                             "leave --weights out, or give a checkpoint") from None
    else:
        weights = read_checkpoint(source)["model"]
    own = net.state_dict()
    taken = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not taken:
        raise ValueError(f"no tensor of {source} has a name and shape of {model}'s; give weights of a like network")
    net.load_state_dict(taken, strict=False)
    new, left = ([key for key in keys if key not in taken] for keys in (own, weights))
    return f"weights: {len(taken)} tensors taken from {source}; new: {listed(new)}; left: {listed(left)}"


def listed(names):
    return f"{len(names)}" + f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" * bool(names)


def open_data(args, settings, device):
    """The data set that the settings name.  One process of each machine downloads what is missing, the others wait."""
    rank, world = process()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        dist.barrier()
    keys = ("seed", "batch_size", "augment", "erase", "train_images", "images_per_class", "image_size")
    data = load_data(settings["dataset"], args.data_dir, device=device, workers=args.workers, rank=rank, world=world,
                     **{key: settings[key] for key in keys if key in settings})
    if world > 1 and first:
        dist.barrier()
    return data


def run_training(args, settings, device):
    rank, world = process()
    if settings["batch_size"] % world:
        raise ValueError(f"the batch size {settings['batch_size']} does not divide by {world} processes")
    out, saved = args.out, None
    if rank == 0 and (out / "last.pt").exists() and not args.restart:
        saved = read_checkpoint(out / "last.pt")
        before = saved["settings"]
        if odd := [f"{key} was {before.get(key)}, is {settings.get(key)}"
                   for key in {**before, **settings} if before.get(key) != settings.get(key)]:
            raise ValueError(f"{out} holds a run with other settings: {'; '.join(odd)}; "
                             "pass another --out, or --restart to start anew")
    if world > 1:       # one process reads, so the machines need not share a disk; the list is filled in place
        dist.broadcast_object_list(box := [saved])
        saved = box[0]
    if not saved or len(saved["history"]) < settings["epochs"]:
        data = open_data(args, settings, device)
        if not data.steps:
            raise ValueError(f"the batch size {data.batch_size} exceeds the {data.train_size} training images; give a smaller --batch-size")
        torch.manual_seed(settings["seed"])
        net = build_model(**network(settings, data.classes))
        origin = start_from(net, args.weights, args.model) if args.weights and not saved else ""
        net.to(device, memory_format=torch.channels_last)
        optimizer = make_optimizer(net, settings)
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if not saved:
                (out / "last.pt").unlink(missing_ok=True)
            hardware = (torch.cuda.get_device_name() if device.type == "cuda"
                        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
            about = dict(settings=settings, parameters=sum(p.numel() for p in net.parameters()), processes=world,
                         device=hardware, torch=str(torch.__version__), torchvision=str(torchvision.__version__),
                         python=platform.python_version())
            write(out / "config.json", lambda file: file.write(json.dumps(about, indent=1).encode() + b"\n"))
            write(out / "metrics.csv", lambda file: file.write(as_csv(saved["history"] if saved else [])))
            print(" ".join(f"{key}={value}" for key, value in settings.items()))
            if origin:
                print(origin)
            print(f"{about['parameters']:,} parameters on {about['device']}, {data.train_size:,} training and "
                  f"{data.test_size:,} test images, {data.steps} steps an epoch of {settings['batch_size'] // world} images "
                  f"in each of {world} process(es)" + (f"; going on after step {saved['step']}" if saved else ""), flush=True)
        history = train(args, settings, data, net, optimizer, saved, out)
    else:
        history = saved["history"]
    if rank == 0:
        print(f"done: top-1 {history[-1]['top1']:.2f}% on the test images after {len(history)} epochs, "
              f"{sum(row['seconds'] for row in history):.0f} s of training; {out}")


def run_evaluation(args, device):
    net = load(args.checkpoint).to(device, memory_format=torch.channels_last)
    data = open_data(args, net.settings | dict(train_images=0), device)
    if data.classes != net.classes:
        raise ValueError(f"{args.checkpoint} was trained on other classes than {args.data_dir} holds")
    result = evaluate(net, data)
    if process()[0] == 0:
        for name, accuracy in zip(data.classes, result["per_class"]):
            print(f"{accuracy:7.2f}%  {name}")
        print(f"{data.test_size:,} test images of {net.settings['dataset']}: loss {result['loss']:.4f}, "
              f"top-1 {result['top1']:.2f}%" + f", top-5 {result['top5']:.2f}%" * (len(data.classes) > 5))
        if net.settings["model"] in GATES and process()[1] == 1:
            look_inside(net, data, args.checkpoint.with_name("gates.png"))


@torch.no_grad()
def look_inside(net, data, path):
    """Draw the mean gate of every channel for every class, and print how much it varies (as in arXiv 1709.01507, section 7.2).

    A strip a stage, from its last bottleneck: a row a class, a column a channel, the channels sorted by their mean;
    black is the lowest, white the highest gate of the strip.
    """
    blocks = [stage[-1] for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    sums = [torch.zeros(3, len(data.classes), block.conv3.out_channels, dtype=torch.float64, device=data.device)
            for block in blocks]        # of every class and channel: how many gates, their sum, the sum of their squares

    seen = {}
    hooks = [block.bn3.register_forward_hook(lambda module, args, out, block=block: seen.update({block: out}))
             for block in blocks]
    for images, labels in data.test_batches():
        with autocast(data.device):
            net(images)
            gates = [block.gate.scale(seen[block]).flatten(1).double() for block in blocks]         # each (B, C)
        for total, s in zip(sums, gates):
            total.index_add_(1, labels, torch.stack([torch.ones_like(s), s, s * s]))
    strips = []
    for number, (hook, (count, total, square)) in enumerate(zip(hooks, sums), start=1):
        hook.remove()
        mean = total / count                                # (classes, C)
        within = (square / count - mean**2).clamp(min=0).mean(0).sqrt().mean()
        print(f"layer{number}: mean gate {mean.mean():.3f}; standard deviation between classes {mean.std(0).mean():.4f}, "
              f"between images of a class {within:.4f}")
        strip = mean[:, mean.mean(0).argsort()]
        strip = (strip - strip.min()) / (strip.max() - strip.min()).clamp(min=1e-12)
        strips.append(F.interpolate(strip[None, None], (max(100, len(strip)), 1024)))
    save_image(torch.cat(strips), path, nrow=1, padding=8, pad_value=1)
    print(f"{path}: the gates, a strip a stage, a row a class, a column a channel")


def run_prediction(args, device):
    net = load(args.checkpoint).to(device, memory_format=torch.channels_last)
    size = net.settings.get("image_size")
    prepare = centre(size) if size else v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
    normalise = Normalise(STATISTICS.get(net.settings["dataset"], STATISTICS["imagenet"]), device)
    for image in args.predict:
        with torch.no_grad(), autocast(device):
            logits = net(normalise(prepare(read_image(image)).to(device)[None]))[0]
        best = logits.double().softmax(0).topk(min(5, len(net.classes)))
        print(image)
        for probability, index in zip(best.values.tolist(), best.indices.tolist()):
            print(f"{probability:8.2%}  {net.classes[index]}")


def main(argv=None):
    args, settings = parse_args(argv)
    device = torch.device(args.device)
    try:
        if args.device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs here; give one process a GPU")
            torch.cuda.set_device(local)                        # what "cuda" means from here on
            torch.backends.cudnn.benchmark = True               # the shapes never change: find the fastest kernels once
            torch.set_float32_matmul_precision("high")          # TF32 for what stays in float32
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        if args.report:
            run_report(args.report)
        elif args.predict:
            run_prediction(args, device)
        elif args.evaluate:
            run_evaluation(args, device)
        else:
            run_training(args, settings, device)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
