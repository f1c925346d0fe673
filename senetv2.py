"""Chapter 1: the network.  A gate that looks at the whole image and turns each channel up or down.

For a feature map x of shape (B, C, H, W), with reduction r and cardinality K:

    squeeze    z = mean of x over H and W                            (B, C)
    excite     u = relu(W1 z + b1)                                   (B, C/r)      SENet
               u = concat of relu(W1k z + b1k) for k = 1..K          (B, K*C/r)    SENetV2
               s = sigmoid(W2 u + b2)                                (B, C)
    scale      y = x * s

The K dense layers of SENetV2 all read the same z, and a ReLU works on each number alone.  So stacking
their matrices W11..W1K on top of each other gives one dense layer with the same output: SENetV2 with
r = 32 and K = 4 *is* SENet with r = 8, in function, in parameters and, bit for bit, through training.
We run it as that one matrix; the K separate layers live in test_senetv2.py, which checks the claim.

Papers: SENetV2 (arXiv 2311.10807), SENet (arXiv 1709.01507), ResNet (arXiv 1512.03385).
Where we differ: the authors' Keras code returns x + x * s, their text and figure x * s.  We follow the
text; residual=True gives the code.  Dense layers have biases, as in both, and C/r is C // r, as in the code.

    python senetv2.py                     the table: parameters and multiply-adds beside the paper's
    python senetv2.py --image-size 224    the same at another image size
    python senetv2.py --benchmark         what the gates cost in time
"""
import argparse
import difflib
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet

# ------------------------------------------------------------------------------------------------ Blocks


class SqueezeExcitation(nn.Module):
    """The gate of SENet (arXiv 1709.01507, equations 2 to 4): (B, C, H, W) -> (B, C, H, W).

    channels    C of the input.
    reduction   r: the gate's hidden layer has channels // reduction units.
    residual    return x + x * s, as the released SENetV2 code does, in the place of x * s.
    cardinality K: how many such hidden layers stand side by side; 1 is SENet.

    Raises ValueError where a hidden layer would be empty or there is none.
    """

    def __init__(self, channels, reduction=32, residual=False, cardinality=1):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction {reduction} leaves no unit for {channels} channels; "
                             f"give 1 to {channels}: {channels} is the largest reduction that works")
        if cardinality < 1:
            raise ValueError(f"cardinality is {cardinality}; it counts parallel dense layers, so give 1 or more")
        width = cardinality * (channels // reduction)
        self.reduce = nn.Linear(channels, width)                # W1, or W11..W1K stacked
        self.expand = nn.Linear(width, channels)                # W2
        self.residual = residual

    def scale(self, x):
        """The factor alone, (B, C, 1, 1): s in (0, 1), or 1 + s in (1, 2) with residual=True.

        The permutation moves no data: in channels_last memory it makes C the last dimension, as it lies, and
        the gate and the addition ran 1.2 to 1.3 times as fast, forward and backward, as with x.mean((2, 3)) (two
        x86-64 cores, torch 2.14.1, the Makefile's allocator settings, each stage of ResNet-50 at 224 pixels, medians).
        """
        z = x.permute(0, 2, 3, 1).mean((1, 2))                  # squeeze (B, C, H, W) -> (B, C)
        u = F.relu(self.reduce(z))                              # all K branches at once -> (B, K*C/r)
        s = torch.sigmoid(self.expand(u))[..., None, None]      # excite -> (B, C, 1, 1)
        return 1 + s if self.residual else s

    def forward(self, x):
        return x * self.scale(x)


class AggregatedSqueezeExcitation(SqueezeExcitation):
    """The gate of SENetV2 (arXiv 2311.10807, section 3): K dense layers side by side, run as one K times as wide.

    They start alike too: nn.Linear draws its weights by its number of inputs, which is C for the wide
    layer as for each narrow one.  Arguments, shapes and errors as above.
    """

    def __init__(self, channels, reduction=32, cardinality=4, residual=False):
        super().__init__(channels, reduction, residual, cardinality)


# ----------------------------------------------------------------------------------------------- Network

# To try a gate of your own, add a line here: a module with these arguments whose .scale(x) is (B, C, 1, 1).
GATES = {
    "senet": lambda channels, cardinality, **options: SqueezeExcitation(channels, **options),
    "senetv2": AggregatedSqueezeExcitation,
}
OURS = ("resnet", *GATES)
PEERS = ("mobilenet_v2", "efficientnet_b0", "resnext50_32x4d", "convnext_tiny", "vit")
STEMS = ("imagenet", "cifar")


class GatedBottleneck(Bottleneck):
    """torchvision's bottleneck with a gate on the last batch norm's output, before the residual addition.

    build_model adds self.gate, once the whole trunk has drawn its weights.
    """

    def forward(self, x):                                       # (B, inplanes, H, W)
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))                # 1x1 -> (B, planes, H, W)
        out = self.relu(self.bn2(self.conv2(out)))              # 3x3 -> (B, planes, H/stride, W/stride)
        out = self.bn3(self.conv3(out))                         # 1x1 -> (B, 4*planes, H/stride, W/stride)
        out = torch.addcmul(identity, out, self.gate.scale(out))        # identity + out * s, in one pass
        return self.relu(out)


def build_model(name, num_classes=10, layers=(3, 4, 6, 3), stem="imagenet", reduction=32, cardinality=4,
                residual=False, **options):
    """A network that maps images (B, 3, H, W) to logits (B, num_classes).

    name        resnet, senet or senetv2; else a peer to compare with, which takes num_classes and options alone.
    layers      bottlenecks per stage: (3, 4, 6, 3) is ResNet-50, (1, 1, 1, 1) the paper's small net.
    stem        "imagenet": 7x7 stride 2 and max-pooling, so 32x32 images reach layer1 as 8x8 maps;
                "cifar": 3x3 stride 1 without pooling, so they stay 32x32.
    options     the rest of torchvision's constructor, such as norm_layer or replace_stride_with_dilation.

    Raises ValueError for an unknown name or stem, layers that are not four positive numbers, and a
    reduction or cardinality that leaves a gate empty.

    The trunk draws its weights first and the gates after it: from one seed, resnet, senet and senetv2
    start with the same convolutions.  Parameter names of the trunk are torchvision's.
    """
    if name not in OURS:
        return build_peer(name, num_classes, **options)
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; give one of {', '.join(STEMS)}")
    if len(layers) != 4 or min(layers) < 1:
        raise ValueError(f"layers are {','.join(map(str, layers))}; give four positive numbers, "
                         "such as 3,4,6,3 (ResNet-50) or 1,1,1,1")
    model = ResNet(GatedBottleneck if name in GATES else Bottleneck, list(layers), num_classes, **options)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")    # as ResNet does
        model.maxpool = nn.Identity()
    for block in model.modules():
        if isinstance(block, GatedBottleneck):
            channels = block.conv3.out_channels
            block.gate = GATES[name](channels, reduction=reduction, cardinality=cardinality, residual=residual)
    return model


def build_peer(name, num_classes, **options):
    """A classification network of torchvision by its name there, or "vit".  Raises ValueError for an unknown name.

    vit is torchvision's VisionTransformer in the size of ViT-S (21 M parameters, about ResNet-50's), for images of
    image_size (default 32), with patches of 4x4 pixels up to 64x64 and of 16x16 above; the size must divide by them.
    """
    if name == "vit":
        size = options.pop("image_size", 32)
        patch = 4 if size <= 64 else 16
        if size % patch:
            raise ValueError(f"vit cuts images into patches of {patch}x{patch}, and {size} does not divide by {patch}; "
                             "give another image size")
        return torchvision.models.VisionTransformer(size, patch, num_layers=12, num_heads=6, hidden_dim=384,
                                                    mlp_dim=1536, num_classes=num_classes, **options)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, [*OURS, *PEERS, *known], 1)
        raise ValueError(f"unknown model {name!r}; give {', '.join(OURS)}, or to compare {', '.join(PEERS)} or another "
                         "classification network of torchvision" + f"; did you mean {near[0]}?" * bool(near))
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def read_checkpoint(path):
    """What train.py saved in `path`, a dict.  Raises FileNotFoundError, or ValueError for anything but such a file.

    weights_only: a checkpoint holds tensors and plain values, and a file that would run code is refused.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or give the path of a run's last.pt")
    with open(path, "rb") as file, suppress(Exception):     # whatever a damaged or hostile file makes of the reader
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved.keys() >= {"network", "model", "classes", "settings"}:
            return saved
    raise ValueError(f"{path} is damaged or no checkpoint of train.py; give another, or pass --restart to train anew")


def fill(model, saved):
    """Load the weights of a checkpoint.  Raises ValueError where the network is not the one that was saved."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the network that this code builds ({str(error).splitlines()[1].strip()}); "
                         "undo what was edited since, or train anew with --restart or another --out") from None


def load(path):
    """The network of a checkpoint of train.py, on the CPU, in eval mode, with its class names as .classes, and .settings."""
    saved = read_checkpoint(path)
    model = build_model(**saved["network"])
    fill(model, saved)
    model.classes, model.settings = saved["classes"], saved["settings"]
    return model.eval()


# ------------------------------------------------------------------------------------------------- Table

ROWS = {"resnet": {}, "senet r=32": dict(reduction=32), "senetv2 r=32 K=4": dict(reduction=32, cardinality=4),
        "senet r=8": dict(reduction=8)}
PAPER = {   # layers -> title, classes, and what each row adds to the plain net in the paper's tables
    (3, 4, 6, 3): ("ResNet-50, 100 classes", 100, (None, "1.28 M", "5.05 M", None)),
    (1, 1, 1, 1): ("the small net (layers 1,1,1,1), 10 classes", 10, (None, "0.35 M", "1.40 M", None)),
}


def multiply_adds(model, image_size):
    """Multiply-adds of one image's forward pass, from torch.utils.flop_counter (which counts each as 2)."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() // 2


def print_table(image_size, stem):
    for layers, (title, classes, paper) in PAPER.items():
        print(f"\n{title}, {image_size}x{image_size} pixels, {stem} stem")
        print(f"{'network':<22}{'parameters':>12}{'added':>20}{'in the paper':>14}{'multiply-adds':>16}{'added':>8}")
        plain = None
        for (label, settings), claim in zip(ROWS.items(), paper):
            with torch.device("meta"):      # shapes without storage: nothing is initialised or computed
                model = build_model(label.split()[0], classes, layers, stem, **settings)
            count, work = sum(p.numel() for p in model.parameters()), multiply_adds(model, image_size)
            plain = plain or (count, work)
            print(f"{label:<22}{count:>12,}{count - plain[0]:>11,} {count / plain[0] - 1:>+8.1%}"
                  f"{claim or '-':>14}{work:>16,}{work / plain[1] - 1:>+8.1%}")


# --------------------------------------------------------------------------------------------- Benchmark


def training_step(net, batch_size, image_size, device):
    """A function that makes one whole training step (forward, loss, backward, Adam) on a batch that is already there."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def interleaved(functions, seconds, device, repeats=1):
    """Seconds a call, (rounds, functions): each round times all, one after the other, so that drift hits all alike."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for function in functions:
        function(), function(), function()      # warm-up: allocation, compilation, choice of kernels
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


def print_benchmark(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    steps, flops, memory = [], [], []
    for name in OURS:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        net = build_model(name, 10, tuple(map(int, args.layers.split(","))), args.stem)
        step = training_step(net.to(device, memory_format=torch.channels_last), args.batch_size, args.image_size, device)
        with FlopCounterMode(display=False) as counter:
            step()
        flops.append(counter.get_total_flops())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            memory.append(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f} MiB")
        steps.append(training_step(torch.compile(net), args.batch_size, args.image_size, device) if args.compile else step)
    times = interleaved(steps, args.seconds, device, repeats=10 if device.type == "cuda" else 1)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"training steps of {args.batch_size} images, {args.image_size}x{args.image_size}, {args.stem} stem, "
          f"layers {args.layers}{', compiled' * args.compile}; {where}, torch {torch.__version__}; "
          f"median [quartiles] of {len(times)} rounds")
    print(f"{'network':<10}{'images/s':>22}{'TFLOP/s':>10}{'of resnet':>22}{'peak memory':>14}")
    for name, seconds, work, peak in zip(OURS, times.T, flops, memory or 3 * "-"):
        print(f"{name:<10}{spread(args.batch_size / seconds, ',.0f'):>22}{work / seconds.median() / 1e12:>10.2f}"
              f"{spread(times[:, 0] / seconds, '.3f'):>22}{peak:>14}")
    if not memory:
        import resource     # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"peak memory of the process, all three networks in it: {peak:,.0f} MiB")


def spread(values, style):
    low, middle, high = (format(values.quantile(q).item(), style) for q in (0.25, 0.5, 0.75))
    return f"{middle} [{low}, {high}]"


def main():
    parser = argparse.ArgumentParser(description="Print parameters and multiply-adds, or with --benchmark the speed.",
                                     usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side")
    parser.add_argument("--stem", choices=STEMS, default="imagenet", help="as in build_model")
    parser.add_argument("--benchmark", action="store_true", help="time whole training steps, network by network in turn")
    parser.add_argument("--layers", default="3,4,6,3", help="of the benchmark: bottlenecks a stage")
    parser.add_argument("--batch-size", type=int, default=128, help="of the benchmark: images a step")
    parser.add_argument("--compile", action="store_true", help="of the benchmark: with torch.compile")
    parser.add_argument("--seconds", type=float, default=60, help="of the benchmark: about how long to measure")
    args = parser.parse_args()
    try:
        if args.benchmark:
            print_benchmark(args)
        else:
            print_table(args.image_size, args.stem)
    except (ValueError, RuntimeError) as error:     # a size that fits no network
        sys.exit(f"senetv2.py: error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
