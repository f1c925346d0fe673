"""Chapter 3: training.  In every step, make the network a little less wrong.

The weights w start at random.  In a step, the network maps a batch of images to logits, one score
per class.  The loss L says how wrong they are.  Its gradient dL/dw says for each weight in which
direction L grows, so we move the weight a little in the opposite direction; lr is the learning
rate:

    w  <-  w - lr * dL/dw

SGD does just this.  (Ours adds Nesterov momentum: a part of the last move goes on.)  Adam, the
default, takes an average of recent gradients instead of the last one, and divides it by their
typical size.  The textbook step is these five lines:

    logits = net(images)                        # forward: (B, 3, H, W) -> (B, classes)
    loss = F.cross_entropy(logits, labels)      # -log of the probability of the right class
    optimizer.zero_grad()                       # gradients add up: forget those of the last step
    loss.backward()                             # backward: dL/dw of every weight
    optimizer.step()                            # move the weights

Softmax makes probabilities of the logits: p_k = exp(l_k) / sum over j of exp(l_j).  cross_entropy
does this itself, and returns the mean of -log p over the batch, for the right classes.  backward
applies the chain rule from the loss back to the first layer, and adds dL/dw to w.grad.

The five lines are the body of `training_step` below.  (There, a scaler comes in between for float16
alone.)  Around it, the loop does three more things, in two sections of their own: it can run in
several processes, it records its step for a GPU, and it saves checkpoints.  Read "The loop" and
"What a step uses" first, then the settings.  `run_training` makes data, network and optimiser.

    python train.py                                             shapes: minutes on a laptop
    python train.py --dataset cifar100                          SENetV2-50, as in the paper
    torchrun --nproc-per-node 8 train.py --dataset cifar100     the same images per step, on 8 GPUs

A run is a folder, named by what defines its result: config.json holds its settings, and the
machine and the versions of its last start; metrics.csv one row per epoch; last.pt all that is
needed to resume.

There is one way to stop a run: end its process, by Ctrl-C, by a kill, by a power cut.  There is one
way to start it: give the command, which resumes from last.pt if there is one.  The steps since then
are repeated, and on a CPU the run ends bit for bit like one that was never stopped: the batch of a
step depends on (seed, epoch, step) alone, and the random numbers in the network on (seed, process,
step since the start).
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

from support import hardware  # noqa: first, see there

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from data import DATASETS, FOLDERS, ImageError, Preprocess, load_data, mix, printable
from senetv2 import GATES, OURS, PEERS, STEMS, build_model
from support import checkpoint
from support.checkpoint import (Run, Saver, check_finite, lock, read_checkpoint, replace_file,
                                resume, save, usable, write_config, write_metrics)
from support.console import RANK, Progress, in_words, percent, say
from support.flags import four_stages, within
from support.hardware import (LOCAL_RANK, LOCAL_WORLD, WORLD, Recorded, choose_precision,
                              end_with_launcher, over_processes, parallel)
from support.weights import load_weights

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# ----------------------------------------------------------------------------------------- The loop


def train(run, net, optimizer, data, args):
    """Train `net` from step `run.step` on; save now and then, and at the end.  (Run: see below.)

    Without what serves speed, several processes and resuming, it is:

        for epoch in range(epochs):
            net.train()
            for images, labels in data.train_batches(epoch):
                set_rate(optimizer, learning_rate(...))
                training_step(images, labels)
            evaluate(net, data)
    """
    settings, model = run.settings, parallel(net, args.compile)     # model is net, wrapped
    total, scaler, precision = settings["epochs"] * data.steps, run.scaler, run.about["precision"]
    autocast = torch.autocast(data.device.type, getattr(torch, precision), precision != "float32")

    def training_step(images, labels):
        """The mean loss of a batch before the step, and its share of right answers.

        A network that knows nothing gives all classes the same probability, 1/classes.  So the
        first loss should be near ln(classes): 2.3 for ten.  A much larger one hints at an error.

        The scaler acts in float16 alone, which rounds small gradients to 0: it scales the loss up
        and then the gradients down.  If one of them is infinite, it leaves the step out.
        """
        with autocast:                                      # on GPUs, products of 16-bit floats
            logits = model(images)                                              # (B, classes)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])
        optimizer.zero_grad()       # else each step would follow the sum of all gradients so far
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), (logits.argmax(1) == labels).float().mean()

    # On a GPU, Python runs this function only twice; later calls replay what it told the GPU to do,
    # and then move the weights.  So code that needs the new weights belongs in the loop.  To
    # print from this function, or to debug it, pass --no-cuda-graph.
    if args.cuda_graph and data.device.type == "cuda" and WORLD == 1 and not args.compile:
        training_step = Recorded(training_step, scaler, optimizer)
    checkpoint, progress = Saver(run, net, optimizer, args), Progress(run, total)

    for epoch in range(len(run.history), settings["epochs"]):
        # In training mode, batch norm uses the mean and deviation of each batch, and dropout drops.
        # In evaluation mode, the norm uses averages over many batches, and nothing is dropped: the
        # answer for an image does not depend on the others.  (Take this line out: after the first
        # evaluation, training goes on in evaluation mode.  Watch the test loss; on a GPU, with
        # --no-cuda-graph.)
        net.train()
        first_step = run.step - epoch * data.steps  # above 0 only when resuming within an epoch
        began = time.monotonic()

        for i, (images, labels) in enumerate(data.train_batches(epoch, first_step), first_step):
            seed_step(settings["seed"], run.step)
            set_rate(optimizer, learning_rate(run.step, total, settings["warmup"], settings["lr"]))
            loss, accuracy = training_step(images, labels)

            # Both stay on the device: reading a number from a GPU means waiting for it.
            run.losses[i], run.accuracies[i] = over_processes(loss), over_processes(accuracy)
            run.step += 1
            progress.show(loss)
            checkpoint.if_due(epoch_ended=False)

        check_finite(run, net)                  # it waits for the device, so the clock is right
        speed = (data.steps - first_step) * data.batch_size / (time.monotonic() - began)
        test, _ = evaluate(net, data)

        # Training loss and accuracy are means over the epoch, of weights that still changed and of
        # augmented images; test figures are of the weights at its end, and of images as they are.
        # With label smoothing, the training loss includes it, and the test loss does not.
        # So early in a run, test results may be better.  If training accuracy is far above test
        # accuracy, the network overfits: it has memorised its training images.
        run.history.append(dict(
            epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"],
            train_loss=run.losses.mean().item(), train_top1=percent(run.accuracies.mean()),
            **test, images_per_second=speed))
        write_metrics(run, args.out)
        say(in_words(run.history[-1]) + progress.left())
        checkpoint.if_due(epoch_ended=True)     # always after the last epoch


# --------------------------------------------------------------------------------- What a step uses


def learning_rate(step, total, warmup, peak):
    """Rises linearly to `peak` over the first `warmup` share of the steps, then falls as a cosine.

    Up, because at first the gradient changes much from step to step, and Adam has seen too few
    gradients to know their size.  Down, because each batch gives a noisy gradient: with small steps
    the noise averages out, and the weights settle.  (Try --warmup 0, or always return `peak`.)

    Two steps have the peak rate: the last of the rise and the first after it.  No step has rate 0.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(net, settings):
    """Adam, or SGD with Nesterov momentum.

    Weight decay adds decay * w to each gradient, a pull towards 0: of two networks that fit the
    data alike, we prefer the one with smaller weights.  Norms and biases do not decay: they only
    scale and shift, and there are too few of them to memorise images.  Adam divides this pull
    by the gradient's size, like the rest.  AdamW (arXiv 1711.05101) would not; we do not use it.
    """
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1],
                   weight_decay=settings["weight_decay"]),
              dict(params=[p for p in net.parameters() if p.ndim <= 1], weight_decay=0.0)]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, settings["lr"], momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, settings["lr"], fused=True)


def seed_step(seed, step):
    """What the network draws at random, such as dropout, depends on (seed, process, step) alone."""
    torch.manual_seed(mix(seed, RANK, step))


def evaluate(net, data):
    """(results on the test images by name, top-1 of each class in %).

    The results: test_loss, the mean of -log p of the right class; top1, the share of images whose
    most likely class is right, in %; with more than five classes also top5, the share with the
    right one among the five most likely.

    A run's result is that of its last epoch.  Reporting the best epoch would mean choosing by the
    test images: part of its lead is luck, which it would not have on new images.  The same holds
    for settings.  If you try many, choose by images that you hold back from training.

    In short: top1 = 100 * (net(images).argmax(1) == labels).float().mean(), in evaluation mode.
    The code sums by class, which also gives the accuracy of each class.
    """
    if WORLD > 1:       # all processes evaluate with the running means of process 0
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)

    def measures(images, labels):       # without autocast: in 16 bits, large logits may be equal
        logits, labels = on_host(net(images)), labels.cpu()
        loss = F.cross_entropy(logits, labels, reduction="none")
        hits = logits.topk(min(5, len(data.classes))).indices == labels[:, None]    # (B, 5)
        return torch.stack([torch.ones_like(loss), loss, hits[:, 0], hits.any(1)], dim=1)

    # One row per class; its columns are the number of images, and the sums of what was measured.
    table = sums_per_class(net, data, measures)                                     # (classes, 4)
    count, loss, top1, top5 = table.sum(0).tolist()
    test = dict(test_loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)
    if len(data.classes) <= 5:
        del test["top5"]
    return test, (100 * table[:, 2] / table[:, 0]).tolist()


@torch.no_grad()        # no backward pass follows, so nothing need be kept for it
def sums_per_class(net, data, measures):
    """Sum measures(images, labels), (B, n), over the test images of each class: (classes, n)."""
    net.eval()
    sums = 0
    for images, labels in data.test_batches():
        rows = on_host(measures(images, labels))
        # row c += the rows of all images whose label is c
        sums += rows.new_zeros(len(data.classes), rows.shape[1]).index_add_(0, labels.cpu(), rows)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums


def on_host(tensor):
    """In float64 on the CPU, for exact sums: Apple's GPUs, for example, have no float64.  It waits
    for the device, so ask for it after all work of a batch has been handed over."""
    return tensor.cpu().double()


# ----------------------------------------------------------------------------------------- Settings




# The paper says Adam, cross-entropy, ResNet-50 and, in its tables, r = 32 and K = 4.  It does not
# say the rest, so we chose it.  A recipe changes some of the defaults below.  A data set
# can change them, too; if both do, the data set's value wins.
RECIPES = {
    "paper": {},
    "strong": dict(stem="cifar", optimizer="sgd", lr=0.1, weight_decay=5e-4, label_smoothing=0.1,
                   epochs=100),
}
FOR_DATASET = {     # the built-in set is for a laptop: the paper's small network, a short run
    "shapes": dict(layers="1,1,1,1", epochs=3, batch_size=64),
    "folder": dict(images_per_class=0),
}

SETTINGS = {        # what defines a result: default, type or choices, meaning
    "dataset": ("shapes", DATASETS, "what to train on"),
    "model": ("senetv2", OURS + PEERS, "the network; those after senetv2 are torchvision's"),
    "recipe": ("paper", tuple(RECIPES), "a set of defaults for what is below"),
    "layers": ("3,4,6,3", four_stages, "bottlenecks per stage; 3,4,6,3 is ResNet-50"),
    "stem": ("imagenet", STEMS, "imagenet: 7x7, stride 2, pooling; cifar: 3x3, stride 1"),
    "reduction": (32, within(int, 1), "r: each hidden layer of a gate has C/r units"),
    "cardinality": (4, within(int, 1), "K: hidden layers side by side in the gate of senetv2"),
    "residual": (False, bool, "multiply by 1 + s, as the released code does, not by s"),
    "zero_init": (False, bool, "start the last batch norm of each bottleneck at 0"),
    "weights": (None, str, "start from: imagenet (torchvision's weights), or a file"),
    "optimizer": ("adam", ("adam", "sgd"), "sgd has Nesterov momentum 0.9"),
    "lr": (1e-3, within(float, 0), "peak learning rate"),
    "warmup": (0.05, within(float, 0, 1), "share of the run in which the rate rises"),
    "weight_decay": (0.0, within(float, 0, 1), "L2 penalty, not on norms and biases"),
    "label_smoothing": (0.0, within(float, 0, 1), "share of the target spread over all classes"),
    "epochs": (30, within(int, 1), "passes over the training images"),
    "batch_size": (128, within(int, 1), "images per step, in all processes together"),
    "train_images": (0, within(int, 0), "train on the first N of a seeded shuffle; 0: all"),
    "images_per_class": (250, within(int, 0), "of imagenet or folder, in training; 0: all"),
    "image_size": (224, within(int, 32, 4096), "imagenet, folder: pixels per side"),
    "augment": (True, bool, "crop and flip at random"),
    "seed": (0, within(int, 0, 2**63 - 1), "random seed of weights, order and augmentation"),
}
USED_BY = {         # settings that only some networks or data sets have
    "layers": OURS, "stem": OURS, "zero_init": OURS, "reduction": GATES, "residual": GATES,
    "cardinality": GATES.keys() - {"senet"}, "images_per_class": FOLDERS, "image_size": FOLDERS,
}

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)     # None: there is none
DEVICES = ("cpu", ACCELERATOR.type) if ACCELERATOR else ("cpu",)
OPTIONS = {         # what is not meant to change a result, beyond rounding
    "data_dir": ("data", str, "where the data set is, or is downloaded to"),
    "workers": (max(1, min(8, CORES // LOCAL_WORLD)), within(int, 0),
                "imagenet, folder: processes that decode images, per training process"),
    "device": ("cuda" if "cuda" in DEVICES else "cpu", DEVICES, "where to compute"),
    "precision": (None, ("float32", "bfloat16", "float16"), "in training; by default by hardware"),
    "cuda_graph": (True, bool, "on one GPU, record forward and backward, unless --compile"),
    "compile": (False, bool, "use torch.compile; on CPUs, it brought nothing"),
    "out": (None, str, "the run's folder; by default runs/ and a name made from the settings"),
    "checkpoint_minutes": (1.0, within(float, 0), "minutes between saves; after an epoch, a sixth"),
}


def defaults(recipe, dataset):
    """The settings by name, with the defaults of a recipe and a data set."""
    table = {name: default for name, (default, _, _) in SETTINGS.items()}
    return table | RECIPES[recipe] | FOR_DATASET.get(dataset, {}) | dict(recipe=recipe,
                                                                         dataset=dataset)


def completed(settings):
    """The settings of a run, with the defaults of what older code did not store."""
    return defaults(settings["recipe"], settings["dataset"]) | settings


def used(key, settings):
    """Whether the network or the data set of these settings has the setting `key`."""
    return key not in USED_BY or bool({settings["model"], settings["dataset"]} & {*USED_BY[key]})


def load(path):
    """The network of a run's folder or checkpoint: on the CPU, in eval mode.

    .classes, .settings    the names of its classes, the settings of its run
    .preprocess            turns an image, uint8 (3, H, W), into the batch of one that it expects
    """
    saved = read_checkpoint(path)
    with usable(path):
        net = build_network(saved["settings"], saved["classes"])
        net.load_state_dict(saved["model"])
        net.classes, net.settings = saved["classes"], saved["settings"]
        net.preprocess = Preprocess(net.settings["dataset"], net.settings["image_size"])
    return net.eval()


# ---------------------------------------------------------------------------------- Starting a run
# You need this section to know in which order a run is put together.


def run_training(args, settings, device):
    """Train, or resume, or print the result of a run that is finished."""
    data = open_data(args, settings, device)
    if settings["batch_size"] % WORLD or not data.steps:
        raise ValueError(f"--batch-size is {settings['batch_size']}; it must be a multiple of the "
                         f"number of processes, {WORLD}, and at most that of training images, "
                         f"{data.train_size}")
    if settings["batch_size"] == WORLD:
        check_single_image(settings, data.classes)

    torch.manual_seed(settings["seed"])
    net = build_network(settings, data.classes).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, settings)

    with lock(args.out) if RANK == 0 else contextlib.nullcontext():
        saved = [None]                      # a list, which broadcast_object_list fills
        if RANK == 0 and (args.out / "last.pt").exists():
            saved = [read_checkpoint(args.out)]
        if WORLD > 1:                       # the machines need not share a disk
            dist.broadcast_object_list(saved)
        precision = choose_precision(device, args.precision, saved[0])
        run = Run(settings, data.classes, data.digest, describe_machine(net, data, precision),
                  torch.amp.GradScaler(device.type, enabled=precision == "float16"),
                  losses=torch.zeros(data.steps, device=device),
                  accuracies=torch.full((data.steps,), math.nan, device=device))    # none measured
        if saved[0]:
            resume(run, net, optimizer, saved[0], args.out)
            if len(run.history) == settings["epochs"]:
                run.about = saved[0]["about"] or run.about
        elif settings["weights"] and RANK == 0:         # parallel() copies them to the others
            say(load_weights(net, settings["weights"], settings["model"]))
            if settings["zero_init"]:
                say("zero_init: batch norms that are among the weights start from these, not at 0")

        if len(run.history) < settings["epochs"]:
            start_training(run, net, optimizer, data, args)
        else:
            say(f"already finished, nothing trained; to train anew, delete {args.out} or pass "
                "--out (make: OUT=)")
            if os.access(args.out, os.W_OK):            # rewrite what was lost
                write_metrics(run, args.out)
                if saved[0]["about"] or not (args.out / "config.json").exists():
                    write_config(run, args.out)
    say(f"done: top-1 {run.history[-1]['top1']:.2f}% on the test images; saved in {args.out}")
    out, place, python = map(shlex.quote, (str(args.out), args.data_dir, sys.executable))
    place = f" DATA_DIR={place}" * (args.data_dir != "data")
    python = f" PYTHON={python}" * (Path(sys.prefix) != Path(__file__).with_name(".venv"))
    say(f"next: make evaluate CHECKPOINT={out}{place}{python}")
    say(f"      make predict CHECKPOINT={out} IMAGE=FILE{python}")


def start_training(run, net, optimizer, data, args):
    """Say what is about to be trained, write it down, and train."""
    settings = run.settings
    write_metrics(run, args.out)            # first: no rows of one run beside settings of another
    write_config(run, args.out)
    say(f"{settings['model']} on {settings['dataset']}: {data.train_size:,} training and "
        f"{data.test_size:,} test images")
    say(" ".join(f"{key}={value}" for key, value in (settings | run.about).items()
                 if used(key, settings) and value is not None))
    rest = data.train_size % data.batch_size
    say(f"{data.steps} steps per epoch, {data.batch_size // WORLD} images per step and process"
        + f"; each epoch leaves out {rest} images, not always the same" * (rest > 0))
    if run.step:
        say(f"resuming after step {run.step}")
    if data.left_out:
        say(f"files left out, by ending: {data.left_out}")

    try:
        train(run, net, optimizer, data, args)
    except ImageError as error:             # from a worker: a traceback, then the message
        check_finite(run, net)
        save(run, net, optimizer, args.out)             # process 0 alone can
        kept = "what was trained is saved" if RANK == 0 else "the last checkpoint is kept"
        raise ValueError(f"{str(error).rstrip()}; {kept}: put the file back and give the same "
                         "command, or train on without it, from these weights, with --out NEW "
                         f"--weights {args.out / 'last.pt'}") from None


def describe_machine(net, data, precision):
    """What config.json holds besides the settings."""
    hardware = (torch.cuda.get_device_name() if data.device.type == "cuda" else platform.machine()
                + f" {data.device.type.upper()}, {torch.get_num_threads()} threads")
    return dict(
        parameters=sum(p.numel() for p in net.parameters()), processes=WORLD, device=hardware,
        precision=precision, torch=str(torch.__version__), torchvision=str(torchvision.__version__),
        python=platform.python_version(), files=data.files)


def open_data(args, settings, device):
    """The data set.  One process downloads what is missing, then one on each other machine."""
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


def input_size(settings):
    return settings["image_size"] if settings["dataset"] in FOLDERS else 32


def build_network(settings, classes):
    return build_model(
        settings["model"], len(classes), tuple(map(int, settings["layers"].split(","))),
        settings["stem"], settings["reduction"], settings["cardinality"], settings["residual"],
        image_size=input_size(settings), zero_init=settings["zero_init"])


def check_single_image(settings, classes):
    """Raises ValueError where one image per step and process leaves batch norm a single value."""
    with torch.device("meta"):              # shapes alone: nothing is computed
        net, size = build_network(settings, classes).train(), input_size(settings)
        try:
            net(torch.empty(1, 3, size, size))
        except ValueError:
            raise ValueError("one image per step and process is too few for batch norm, where the "
                             "last maps have one pixel; give a larger --batch-size") from None


# ------------------------------------------------------------------------------------ Command line


def parse_args(argv=None, options={}, program="train.py", description="Train SENetV2 and networks "
               "to compare with.  The same command, given again, resumes a stopped run."):
    """(args, settings): all flags, and those that define the result, as a dict of plain values."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, (default, kind, meaning) in (options | SETTINGS | OPTIONS).items():
        reading = (dict(action=argparse.BooleanOptionalAction) if kind is bool
                   else dict(nargs="+") if kind is list
                   else dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind))
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=meaning, **reading)

    # Once for recipe and data set, because the other defaults (and --help) depend on them.
    words = sys.argv[1:] if argv is None else argv
    chosen, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    default = defaults(chosen.recipe, chosen.dataset)
    parser.set_defaults(**default)
    args = parser.parse_args(words)

    # What the network or the data set does not use is reset to its default.
    for key in USED_BY:
        if getattr(args, key) != default[key] and not used(key, vars(args)):
            say(f"{key} {getattr(args, key)} is not used by {args.model} on {args.dataset}")
            setattr(args, key, default[key])
    settings = {key: getattr(args, key) for key in SETTINGS}
    changed = [re.sub(r"[/\\:]", "_", f"{key}{value}") for key, value in settings.items()
               if value != default[key] and key not in ("model", "seed")]
    name = "-".join([args.dataset, args.model, args.recipe, *changed, f"seed{args.seed}"])
    args.out = Path(args.out or Path("runs", name))
    return args, settings


def main(argv=None, action=run_training, **about):
    """Run `action` on the flags of train.py, and on those of a tool; errors become one line."""
    args, settings = parse_args(argv, **about)
    code = 1
    try:
        end_with_launcher()
        if args.device == "cuda":
            if LOCAL_WORLD > torch.cuda.device_count():
                raise ValueError("more processes than GPUs; start fewer, or pass --device cpu")
            torch.cuda.set_device(LOCAL_RANK)               # what "cuda" means from here on
            torch.backends.cudnn.benchmark = True           # shapes hardly change: try kernels once
            torch.set_float32_matmul_precision("high")      # TF32 for what stays in float32
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        action(args, settings, torch.device(args.device))
        if WORLD > 1:
            dist.destroy_process_group()
        return

    except KeyboardInterrupt:
        message, code = "stopped", 130
        if action is run_training:
            message += "; the same command " + ("goes on from the last checkpoint" if
                                                (args.out / "last.pt").exists() else
                                                "starts from scratch")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        last = str(error).strip().rpartition("\n")[2]       # that of a worker holds its traceback
        message = printable(re.sub(r"^(data\.)?(ValueError|ImageError): ", "", last))
    except Exception as error:
        lost = isinstance(error, dist.DistError) or WORLD > 1 and "gloo" in str(error)
        message = "another process of this run has failed" if lost else traceback.format_exc()
    program = about.get("program", "train.py")
    print(f"{program}: {'error: ' * (code == 1)}{message}", file=sys.stderr, flush=True)
    (os._exit if WORLD > 1 else sys.exit)(code)     # never wait for the other processes


if __name__ == "__main__":
    main()
