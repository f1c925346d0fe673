"""Chapter 3: training.  In every step, make the network a little less wrong.

The weights w start at random.  In a step, the network maps a batch of images to logits, one score
per class.  The loss L says how wrong they are.  Its gradient dL/dw says for each weight in which
direction L grows, so we move the weight a little in the opposite direction; lr is the learning
rate:

    w  <-  w - lr * dL/dw

SGD does just this.  (Ours adds momentum, in Nesterov's form: a part of the last move goes on.)
Adam, the default, takes an average of recent gradients, and divides it by their typical size.

Softmax makes probabilities of the logits: p_k = exp(l_k) / sum over j of exp(l_j).  cross_entropy
does this itself, and returns the mean of -log p over the batch, for the right classes.  backward
applies the chain rule from the loss back to the first layer, and adds dL/dw to w.grad.

    python train.py                                             shapes: minutes on a laptop
    python train.py --dataset cifar100                          SENetV2 with ResNet-50's depth
    torchrun --nproc-per-node 8 train.py --dataset cifar100     the same images per step, on 8 GPUs

A run is a folder, named by its settings: config.json holds these, the code's digests, and the
machine and the versions of its last start; metrics.csv one row per epoch; last.pt all that is
needed to resume.  To stop a run, end its process, however you like.  To go on, give the same
command.  The steps since last.pt was written are repeated, and on a CPU the run ends bit for bit
like one that was never stopped: the batch of a step depends on (seed, epoch, step) alone, and the
random numbers in the network on (seed, process, step since the start).
"""
from support import hardware    # isort: skip  (first, because it must run before torch is imported)

import math
import os

import torch
import torch.nn.functional as F

from data import DATASETS, FOLDERS, ImageError, Preprocess, load_data, mix
from senetv2 import GATES, OURS, PEERS, STEMS, build_model, gate_settings, patch_size
from support import flags, source
from support.checkpoint import (
    State, check_finite, find_checkpoint, lock, read_checkpoint, result_of, save, save_if_due,
    test_images, usable, write_config, write_metrics)
from support.console import Progress, UserError, errors_in_one_line, rank, say, world
from support.flags import four_stages, number, one_of
from support.hardware import (
    Recording, in_turns, from_first_process, mean_over_processes, number_format, on_host, parallel,
    share_buffers, sum_over_processes)
from support.weights import load_weights

# ----------------------------------------------------------------------------------------- The loop


def forward_backward(model, state, autocast, images, labels):
    """dL/dw of a batch, into w.grad.  Returns its mean loss and its share of right answers, (2,).

    A network that knows nothing gives all classes the same probability, 1/classes.  So the first
    loss should be near ln(classes): 2.3 for ten.  A much larger one hints at an error.
    """
    with autocast:              # multiplies in 16 bits, if the run's precision says so
        logits = model(images)                                                  # (B, classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=state.settings["label_smoothing"])
    state.optimizer.zero_grad()             # backward adds to w.grad: forget the last step's
    state.scaler.scale(loss).backward()     # in float16, scaled up, lest small ones become 0
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])


def train(state, model, autocast, compute, data, save_minutes):
    """Train from step `state.step` on.  (last.pt holds `state`: network, optimiser, scaler, ...)

    model       state.net, wrapped: in several processes, backward() also averages their gradients
    compute     forward_backward, or on a GPU its recording
    """
    settings, optimizer, scaler = state.settings, state.optimizer, state.scaler
    total = settings["epochs"] * data.steps
    progress = Progress(state.step, total)

    for epoch in range(len(state.history), settings["epochs"]):
        # In training mode, batch norm uses the mean and deviation of each batch, and dropout drops.
        # In evaluation mode, the norm uses averages over many batches, and nothing is dropped: the
        # answer for an image does not depend on the others.
        state.net.train()
        first = state.step - epoch * data.steps     # above 0 only when resuming within an epoch
        batches = progress.watch(data.train_batches(epoch, first), data.batch_size)

        for i, (images, labels) in enumerate(batches, first):
            seed_step(settings["seed"], state.step)
            set_rate(optimizer, learning_rate(
                state.step, total, settings["warmup"], settings["lr"]))
            measured = compute(model, state, autocast, images, labels)      # and dL/dw, in w.grad

            scaler.unscale_(optimizer)      # the scaler acts in float16 alone
            # Here p.grad of each parameter p is dL/dp, in every number format: clip it, say.
            scaler.step(optimizer)          # move the weights, unless a gradient overflowed
            scaler.update()

            # Saved with the rest, and kept on the device: to read a GPU's number is to wait for it.
            state.measures[:, i] = mean_over_processes(measured)
            state.step += 1
            progress.show(state.step, state.measures[0, i])
            save_if_due(state, save_minutes)

        # Training loss and accuracy are means over the epoch, of weights that still changed and of
        # augmented images; test figures are of the weights at its end, and of images as they are.
        # So early in a run, test results may be better.  (With label smoothing, the training loss
        # includes it, and the test loss does not.)  Training accuracy far above test accuracy means
        # overfitting: the network has memorised its training images.
        check_finite(state)
        loss, accuracy = (row.mean().item() for row in state.measures)
        speed = progress.images_per_second()
        state.history.append(dict(
            epoch=epoch + 1, lr=optimizer.param_groups[0]["lr"], train_loss=loss,
            train_top1=100 * accuracy, **evaluate(state.net, data), images_per_second=speed))
        write_metrics(state)
        progress.show_epoch(state.step, state.history[-1])
        save_if_due(state, save_minutes)            # always after the last epoch


# --------------------------------------------------------------------------------- What a step uses


def learning_rate(step, total, warmup, peak):
    """Rises linearly to `peak` over the first `warmup` share of the steps, then falls as a cosine.

    Up, because at first the gradient changes much from step to step, and Adam has seen too few
    gradients to know their size.  Down, because each batch gives a noisy gradient: with small steps
    the noise averages out, and the weights settle.  (Try --warmup 0, or always return `peak`.)
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:        # all get the same
        group["lr"] = float(rate)               # last.pt holds Python's numbers, not numpy's


def make_optimizer(net, settings):
    """Adam, or SGD with Nesterov momentum.

    Weight decay adds decay * w to each gradient, a pull towards 0: of two networks that fit the
    data alike, we prefer the one with smaller weights.  (A batch norm undoes the size of the
    weights before it; there, the same step changes smaller weights by a larger share.)  Norms
    and biases, which have one axis, do not decay: they only scale and shift.  Adam divides this
    pull by the gradient's size, like the rest.  AdamW (arXiv 1711.05101) would not; we do not use
    it.
    """
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1],
                   weight_decay=settings["weight_decay"]),
              dict(params=[p for p in net.parameters() if p.ndim <= 1], weight_decay=0.0)]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, settings["lr"], momentum=0.9, nesterov=True, fused=True)
    return torch.optim.Adam(groups, settings["lr"], fused=True)


def seed_step(seed, step):
    """What the network draws at random, such as dropout, depends on (seed, process, step) alone."""
    torch.manual_seed(mix(seed, rank(), step))


@torch.no_grad()        # no backward pass follows, so nothing need be kept for it
def evaluate(net, data):
    """The results on the test images, by name.

    test_loss, the mean of -log p of the right class; top1, the share of images whose most likely
    class is right, in %; with more than five classes also top5, the share with the right one among
    the five most likely.

    A run's result is that of its last epoch.  Reporting the best epoch would mean choosing by the
    test images: part of its lead is luck, which it would not have on new images.  The same holds
    for settings.  If you try many, choose by training images that you hold out: --hold-out.
    """
    net.eval()
    share_buffers(net)          # processes have running means of their own; all use the first's
    correct = in_five = loss_sum = count = 0
    for images, labels in data.test_batches():      # a share of each batch, which may be empty
        # Without autocast: in 16 bits, the logits of two classes may be equal.  Sums are float64.
        logits, labels = on_host(net(images)), labels.cpu()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), or fewer
        correct += hits[:, 0].sum().item()
        in_five += hits.sum().item()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)

    correct, in_five, loss_sum, count = sum_over_processes(correct, in_five, loss_sum, count)
    results = dict(test_loss=loss_sum / count, top1=100 * correct / count)
    if len(data.classes) > 5:
        results["top5"] = 100 * in_five / count
    return results


# ----------------------------------------------------------------------------------------- Settings

# The paper says Adam, cross-entropy, ResNet-50 and, in its tables, r = 32 and K = 4.  It does not
# say the rest, so we chose it.  A recipe and a data set change some of the defaults below; if both
# do, the recipe's value wins.
RECIPES = {
    "paper": {},
    "strong": dict(optimizer="sgd", lr=0.1, weight_decay=5e-4, label_smoothing=0.1, epochs=100),
}
FOR_DATASET = {     # the built-in set is for a laptop: the paper's small network, a short run
    "shapes": dict(layers="1,1,1,1", epochs=3, batch_size=64),
    "folder": dict(images_per_class=0),
}

SETTINGS = {        # what defines a result: default, how it is read, meaning
    "dataset": ("shapes", one_of(DATASETS), "what to train on"),
    "model": ("senetv2", one_of(OURS + PEERS), "the network; after senetv2, torchvision's"),
    "recipe": ("paper", one_of(RECIPES), "a set of defaults for what is below; strong takes 100 "
                                         "epochs, on shapes an hour instead of two minutes"),
    "layers": ("3,4,6,3", four_stages, "bottlenecks per stage; 3,4,6,3 is ResNet-50"),
    "stem": ("imagenet", one_of(STEMS), "imagenet: 7x7, stride 2, pooling; cifar: 3x3, stride 1"),
    "reduction": (32, number(int, 1, 256), "r: each hidden layer of a gate has C/r units"),
    "cardinality": (4, number(int, 1), "K: hidden layers side by side in the gate of senetv2"),
    "residual": (False, bool, "multiply by 1 + s, as the released code does, not by s"),
    "zero_init": (False, bool, "start the last batch norm of each bottleneck at 0"),
    "weights": (None, flags.path, "start from: imagenet (torchvision's weights), or a file"),
    "optimizer": ("adam", one_of(("adam", "sgd")), "sgd has Nesterov momentum 0.9"),
    "lr": (1e-3, number(float, 0), "peak learning rate"),
    "warmup": (0.05, number(float, 0, 1), "share of the run in which the rate rises"),
    "weight_decay": (0.0, number(float, 0, 1), "L2 penalty, not on norms and biases"),
    "label_smoothing": (0.0, number(float, 0, 1), "share of the target spread over all classes"),
    "epochs": (30, number(int, 1), "passes over the training images"),
    "batch_size": (128, number(int, 1), "images per step, in all processes together"),
    "train_images": (0, number(int, 0), "train on the first N of a seeded shuffle; 0: all"),
    "images_per_class": (250, number(int, 0), "of imagenet or folder, in training; 0: all"),
    "image_size": (224, number(int, 32, 4096), "imagenet, folder: pixels per side"),
    "augment": (True, bool, "crop and flip at random"),
    "precision": (None, one_of(("float32", "bfloat16", "float16")),
                  "number format of products in training; by default by hardware"),
    "hold_out": (0, number(int, 0), "put so many training images in place of the test images"),
    "seed": (0, number(int, 0, 2**63 - 1), "of weights, order, augmentation, and choice of images"),
    "name": ("", flags.name, "of what you try; it ends the run's name"),
}
USED_BY = {         # settings that only some networks or data sets have
    "layers": OURS, "stem": OURS, "zero_init": OURS, "images_per_class": FOLDERS,
    "image_size": FOLDERS, **{key: [gate for gate in GATES if key in gate_settings(gate)]
                              for key in ("reduction", "cardinality", "residual")},
}

OPTIONS = {         # what is not meant to change a result, beyond rounding
    "data_dir": ("data", flags.path, "where the data set is, or is downloaded to"),
    "workers": (max(1, min(8, hardware.CORES // hardware.local_world())), number(int, 0),
                "imagenet, folder: processes that decode images, per training process"),
    "device": ("cuda" if "cuda" in hardware.DEVICES else "cpu", one_of(hardware.DEVICES),
               "where to compute"),
    "cuda_graph": (True, bool, "on one GPU, record forward and backward, unless --compile"),
    "compile": (False, bool, "use torch.compile; on CPUs, it brought nothing"),
    "out": (None, flags.path, "the run's folder; by default in runs/, named after the settings"),
    "checkpoint_minutes": (1.0, number(float, 0), "minutes between saves"),
    "any_code": (False, bool, "go on with a run even if the code has changed since"),
}


def defaults(recipe, dataset):
    """The settings by name, with the defaults of a recipe and a data set."""
    table = {name: default for name, (default, _, _) in SETTINGS.items()}
    return table | FOR_DATASET.get(dataset, {}) | RECIPES[recipe] | dict(
        recipe=recipe, dataset=dataset)


def completed(settings):
    """The settings of a run, with the defaults of those that its code did not have."""
    return defaults(settings["recipe"], settings["dataset"]) | settings


def used(key, settings):
    """Whether the network or the data set of these settings has the setting `key`."""
    users = USED_BY.get(key)
    return users is None or settings["model"] in users or settings["dataset"] in users


def parse_args(argv=None, options={}, program="train.py", description="Train SENetV2 and networks "
               "to compare with.  The same command, given again, resumes a stopped run."):
    """(args, settings): all flags, and those that define the result, as a dict of plain values."""
    return flags.parse(
        argv, options | SETTINGS | OPTIONS, settings=SETTINGS, used=used, program=program,
        defaults=lambda typed: defaults(typed.recipe, typed.dataset), description=description)


# ----------------------------------------------------------------------------------- Starting a run

# torchvision's name of the network whose weights fit; for all others it is resnet50
TRUNKS = {name: name for name in PEERS} | {"vit": None}


def run_training(args, settings, device):
    """Train, or resume, or print the result of a run that is finished."""
    code = source.digests(settings["weights"])      # now: a file may be edited while it trains
    hardware.say_if_busy(device)
    if settings["model"] in GATES:      # a mistake in one shows before the data are read
        small = settings | dict(layers="1,1,1,1")       # one of each shape
        source.try_gates(build_network(small, ["one", "other"]), pixels(settings))
    data = open_data(args, settings, device)
    share, rest = divmod(settings["batch_size"], world())
    if rest or share < 2 or not data.steps:
        raise UserError(f"--batch-size {settings['batch_size']}: give one that is at most the "
                        f"number of training images, {data.train_size}, and a multiple of that of "
                        f"processes, {world()}, with two or more for each (batch norm)")

    torch.manual_seed(settings["seed"])
    net = build_network(settings, data.classes)
    net = net.to(device, memory_format=torch.channels_last)     # faster convolutions
    optimizer = make_optimizer(net, settings)

    with lock(args.out):
        saved = from_first_process(find_checkpoint, args.out)
        if settings["precision"] is None:           # a run keeps what it began with
            began = saved["settings"] if saved else {}
            settings["precision"] = began.get("precision") or hardware.choose_precision(device)
        autocast, scaler = number_format(device, settings["precision"])
        state = State(args.out, settings, data.classes, data.identity, code, net, optimizer, scaler,
                      measures=torch.zeros(2, data.steps, device=device))
        if saved:
            usual = defaults(settings["recipe"], settings["dataset"])       # of what is new
            saved["settings"] = usual | saved["settings"]
            state.resume(saved, args.any_code)
        elif settings["weights"] and rank() == 0:   # parallel() copies them to the others
            say(load_weights(net, settings["weights"], TRUNKS.get(settings["model"], "resnet50")))
            if settings["zero_init"]:
                say("zero_init: batch norms that are among the weights start from these, not at 0")

        if state.finished:
            say(f"already finished, nothing trained; to train anew, delete {args.out}, or pass "
                "--out")
        else:
            start_training(state, data, args, autocast)
        if os.access(args.out, os.W_OK):            # once more, should one of them be lost
            write_metrics(state)
            write_config(state)
    say(f"done: {result_of(state.settings, state.history)}; saved in {args.out}")


def start_training(state, data, args, autocast):
    """Say what is trained, write it down, and train."""
    settings, net, rest = state.settings, state.net, data.train_size % data.batch_size
    state.machine = dict(parameters=sum(p.numel() for p in net.parameters()), files=data.files,
                         **hardware.describe_machine(data.device))
    write_metrics(state)            # first, lest old rows stand beside the settings of a new run
    write_config(state)
    say(f"{settings['model']} on {settings['dataset']}: {data.train_size:,} training and "
        f"{data.test_size:,} {test_images(settings)} of {len(data.classes)} classes")
    say(" ".join(f"{key}={value}" for key, value in (settings | state.machine).items()
                 if used(key, settings) and value not in (None, "")))
    left_out = f"; each epoch leaves out {rest} images, not always the same" if rest else ""
    say(f"{data.steps} steps per epoch, {data.batch_size // world()} images per process{left_out}")
    if state.step:
        say(f"resuming after step {state.step}")

    # On a GPU, the kernels of the second step are recorded, and from then on replayed without
    # Python: six times as fast on small images.  Python's numbers, such as a loss weight of your
    # own that changes by epoch, stay as they were then.  To change or print them, pass
    # --no-cuda-graph.
    record = (args.cuda_graph and data.device.type == "cuda" and world() == 1
              and not args.compile)
    try:
        train(state, parallel(net, args.compile), autocast,
              Recording(forward_backward) if record else forward_backward, data,
              args.checkpoint_minutes)
    except ImageError as error:
        check_finite(state)
        save(state)                                         # process 0 alone can
        kept = "what was trained is saved" if rank() == 0 else "the last checkpoint is kept"
        raise UserError(f"{error}; {kept}: put the file back as it was and give the same command, "
                        "or train on without it, from these weights, with --out NEW --weights "
                        f"{args.out / 'last.pt'}") from None


def open_data(args, settings, device, **options):
    options |= {key: settings[key] for key in ("batch_size", "seed", "augment", "train_images",
                                              "hold_out", "images_per_class", "image_size")}
    return in_turns(lambda: load_data(
        settings["dataset"], args.data_dir, device=device, rank=rank(), world=world(),
        workers=args.workers, **options))


def pixels(settings):
    return settings["image_size"] if settings["dataset"] in FOLDERS else 32


def build_network(settings, classes):
    size = pixels(settings)
    if settings["model"] == "vit" and size % patch_size(size):
        raise UserError(f"vit cuts images into patches of {patch_size(size)} pixels per side, and "
                        f"--image-size {size} is not a multiple of that")
    return build_model(
        settings["model"], len(classes), tuple(map(int, settings["layers"].split(","))),
        settings["stem"], settings["reduction"], settings["cardinality"], settings["residual"],
        image_size=size, zero_init=settings["zero_init"])


def load(path):
    """The network of a run's folder or checkpoint: on the CPU, in eval mode.

    .classes, .settings    the names of its classes, the settings of its run
    .history, .machine     a dict per epoch; the hardware and the versions of the last start
    .preprocess            turns an image, uint8 (3, H, W), into the batch of one that it expects
    """
    saved = read_checkpoint(path)
    settings = saved["settings"]
    for key, known in dict(dataset=DATASETS, recipe=RECIPES, model=OURS + PEERS).items():
        if settings[key] not in known:
            raise UserError(f"{path} was trained with the {key} {settings[key]!r}, which this code "
                            "does not have")
    settings = completed(settings)
    if files := source.changed(saved["code"], source.digests()):
        say(f"{path} was trained with other code: {files} changed since")
    net = build_network(settings, saved["classes"])
    with usable(path):
        net.load_state_dict(saved["model"])
    net.classes, net.history, net.machine = saved["classes"], saved["history"], saved["machine"]
    net.settings, net.preprocess = settings, Preprocess(settings["dataset"], settings["image_size"])
    return net.eval()


def main(argv=None, action=run_training, **about):
    """Run `action` on the flags; errors become one line.  (Two tools have actions of their own.)"""
    args, settings = parse_args(argv, **about)
    with errors_in_one_line(about.get("program", "train.py"),
                            args.out / "last.pt" if action is run_training else None):
        action(args, settings, hardware.start_processes(args.device))
        hardware.stop_processes()


if __name__ == "__main__":
    main()
