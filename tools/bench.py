"""Measure training, loading and the gates.

    python -m tools.bench --layers 1,1,1,1
"""
import time

import torch
import torch.nn.functional as F

import data
import train
from senetv2 import OURS, AggregatedSqueezeExcitation, build_model
from support.console import UserError, errors_in_one_line
from support.flags import number, one_of, parser
from support.hardware import choose_precision
from test_senetv2 import LiteralBranches


TABLE = {key: (train.SETTINGS | train.OPTIONS)[key] for key in (        # as in train.py
    "layers", "stem", "data_dir", "compile", "precision")} | {
    "dataset": ("shapes", one_of(data.DATASETS), "whose loader to measure"),
    "batch_size": (128, number(int, 2), "images per step"),
    "image_size": (32, number(int, 1), "pixels per side"),
    "seconds": (60.0, number(float, 0), "how long to measure training")}


def training_step(net, batch_size, image_size, device, precision):
    """A function that makes one training step: forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def interleaved(functions, seconds, device):
    """Seconds per call, (rounds, functions); a round times all in turn: drift hits all alike."""
    repeats, wait = (10, torch.cuda.synchronize) if device.type == "cuda" else (1, lambda: None)
    for function in functions * 3:      # allocation, compilation, choice of kernels
        function()

    rounds, start = [], time.perf_counter()
    while len(rounds) < 5 or time.perf_counter() - start < seconds:
        rounds.append([])
        for function in functions:
            wait()
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            wait()
            rounds[-1].append((time.perf_counter() - began) / repeats)
    return torch.tensor(rounds, dtype=torch.float64)


def quartiles(values, style):
    low, middle, high = (format(values.quantile(q).item(), style) for q in (0.25, 0.5, 0.75))
    return f"{middle} [{low}, {high}]"


def main(argv=None):
    """Print the speed of training, of the loader and of the gates, as median [quartiles]."""
    args = parser("tools.bench", "Measure training, loading and the gates.", TABLE).parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    args.precision = args.precision or choose_precision(device)
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{args.precision}; median [quartiles]")
    with errors_in_one_line("tools.bench"):
        for part in (bench_loader, bench_networks, bench_cardinality):
            part(args, device)


def bench_networks(args, device):
    """What the gates cost in a training step."""
    steps = []
    for name in OURS:
        net = build_model(name, 10, tuple(map(int, args.layers.split(","))), args.stem)
        net.to(device, memory_format=torch.channels_last)
        net = torch.compile(net) if args.compile else net
        steps.append(training_step(net, args.batch_size, args.image_size, device, args.precision))
    times = interleaved(steps, args.seconds, device)

    print(f"\ntraining steps of {args.batch_size} images, {args.image_size}x{args.image_size}, "
          f"{args.stem} stem, layers {args.layers}{', compiled' if args.compile else ''}; "
          f"{len(times)} rounds\n\n| network | images/s | speed ÷ resnet |\n|---|---|---|")
    for name, seconds in zip(OURS, times.T):
        print(f"| {name} | {quartiles(args.batch_size / seconds, ',.0f')} "
              f"| {quartiles(times[:, 0] / seconds, '.3f')} |")


def bench_loader(args, device):
    """The loader alone, and its share of a training step of SENetV2-50."""
    source = data.load_data(args.dataset, args.data_dir, device=device, batch_size=args.batch_size,
                            image_size=args.image_size if args.image_size > 32 else 224,
                            workers=train.OPTIONS["workers"][0])
    if not (count := min(20, source.steps)):
        raise UserError("not even one batch; give a smaller --batch-size")
    net, size = build_model("senetv2"), source.view([0]).shape[-1]
    net.to(device, memory_format=torch.channels_last)
    step = training_step(net, args.batch_size, size, device, args.precision)

    def load():
        list(zip(range(count), source.train_batches(0)))
    loading, training = interleaved([load, step], 20, device).median(0).values
    print(f"\nloader of {args.dataset}, {size} pixels per side: "
          f"{count * args.batch_size / loading:,.0f} images/s in "
          f"batches of {args.batch_size}; it takes {loading / count / training:.2%} of a training "
          "step of SENetV2-50")


def bench_cardinality(args, device):
    """What stacking the K layers buys as K grows, at the same total width."""
    x = torch.randn(32, 1024, 14, 14, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    ways, sizes = [], (1, 4, 16, 64)
    for cardinality in sizes:
        stacked, apart = (kind(1024, 8 * cardinality, cardinality=cardinality).to(device)
                          for kind in (AggregatedSqueezeExcitation, LiteralBranches))

        # The same squeeze as ours, so that the layers alone make the difference.
        ways += [lambda gate=stacked: gate(x).backward(x), lambda gate=apart: (
            x * gate.excite(x.permute(0, 2, 3, 1).mean((1, 2)))).backward(x)]

    times = (1000 * interleaved(ways, 15, device)).unflatten(1, (-1, 2))
    print(f"\na gate of 128 hidden units on {tuple(x.shape)}, forward and backward, in ms\n\n"
          "| K | r | one matrix | K layers and a concatenation |\n|---|---|---|---|")
    for row, cardinality in enumerate(sizes):
        print(f"| {cardinality} | {8 * cardinality} | {quartiles(times[:, row, 0], '.2f')} "
              f"| {quartiles(times[:, row, 1], '.2f')} |")


if __name__ == "__main__":
    main()
