"""Chapter 4: the claims of README and docstrings, each against an oracle worked out independently.

    make test                                    all of them, in minutes on two cores
    make test ARGS='-k literal_branches'         some of them
    make bench, make faults                      the last two chapters: measure, and interrupt
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps      # torchvision brings it
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.io import write_jpeg, write_png
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import data
import senetv2
import train
from senetv2 import AggregatedSqueezeExcitation, SqueezeExcitation, build_model

HERE = Path(__file__).parent
SMALL = (1, 1, 1, 1)
OURS = ("resnet", "senet", "senetv2")
HANDLERS = {number: signal.getsignal(number) for number in data.STOPPING}

pytestmark = [      # the first is a limit that docs/workshop.md names, the second a hostile file's
    pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]

# ------------------------------------------------------------------------------------------ Helpers


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same numbers, and leaves the signals as they were."""
    torch.manual_seed(0)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def train_steps(net, batches):
    """The losses of steps of Adam, one per batch."""
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for x, y in batches:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def from_one_seed(name, **options):
    torch.manual_seed(3)
    return build_model(name, 10, SMALL, **options)


def in_memory(train, test, classes, statistics=((0, 0, 0), (1, 1, 1)), **options):
    """A data set of these (images, labels); without statistics its batches are in 0..1."""
    options = dict(device="cpu", batch_size=32, seed=0, augment=True, rank=0, world=1) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.STATISTICS, "shapes", statistics)
        return data.InMemory("shapes", train, test, classes, **options)


def numbered(**options):
    """A data set whose image i is filled with the value i + 1, to see where images go."""
    numbers = torch.arange(200)
    images = (numbers + 1).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    labels = numbers % 10
    return in_memory((images, labels), (images[:50], labels[:50]), list("abcdefghij"), **options)


def numbers_in(images):
    """The numbers of the images of `numbered`, from their middle: the padding is 0."""
    return (images[:, 0, 16, 16] * 255).round().long() - 1


def epoch_of(source, epoch=0, **options):
    """The whole epoch: images in 0..1 (or normalised), labels."""
    return tuple(torch.cat(part) for part in zip(*source.train_batches(epoch, **options)))


def assert_equal(actual, expected):
    """Bit for bit, also within lists and dicts."""
    (values, form), (others, other_form) = map(tree_flatten, (actual, expected))
    assert form == other_form
    assert all(torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y
               for x, y in zip(values, others))


def no_network(*args, **kwargs):
    raise URLError("no network")


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ of three classes: JPEGs of many sizes, gray and colour, and PNGs as .JPEG."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 3)):
        for label in ("cat", "dog", "owl"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                size = (1 if i % 4 == 1 else 3, 20 + 7 * i, 60 - 3 * i)
                image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
                write = write_png if i % 4 == 2 else write_jpeg
                write(image, str(tmp_path / split / label / f"{label}_{i}.JPEG"))
    return tmp_path


def folder_flags(folder, out, workers=0, epochs=1):
    """A run on the images of `folder`, of 4 steps per epoch; its own folder comes last."""
    return ["--dataset", "folder", "--data-dir", str(folder), "--layers", "1,1,1,1", "--image-size",
            "32", "--batch-size", "8", "--epochs", str(epochs), "--workers", str(workers), "--out",
            str(out)]


@pytest.fixture
def load_folder(folder):
    """Loads `folder`; what it loaded is closed after the test, also after one that fails."""
    with contextlib.ExitStack() as opened:
        def load(root=folder, **options):
            options = dict(batch_size=8, image_size=32, images_per_class=0) | options
            source = data.load_data("imagenet", root, **options)
            return opened.enter_context(contextlib.closing(source))
        yield load


# ----------------------------------------------------------------------------------------- The gate


class LiteralBranches(nn.Module):
    """SENetV2's gate as the paper draws it: K dense layers, a ReLU on each, a concatenation."""

    def __init__(self, channels, reduction, cardinality):
        super().__init__()
        width = channels // reduction
        self.branches = nn.ModuleList(nn.Linear(channels, width) for _ in range(cardinality))
        self.expand = nn.Linear(cardinality * width, channels)

    def excite(self, z):
        u = torch.cat([torch.relu(branch(z)) for branch in self.branches], dim=1)
        return torch.sigmoid(self.expand(u)).unflatten(1, (-1, 1, 1))

    def forward(self, x):
        return x * self.excite(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("channels, reduction, cardinality",
                         [(64, 8, 4), (60, 7, 3), (256, 32, 1)])
def test_the_wide_matrix_trains_like_the_literal_branches(channels, reduction, cardinality):
    literal = LiteralBranches(channels, reduction, cardinality).double()
    ours = AggregatedSqueezeExcitation(channels, reduction, cardinality).double()

    def stacked(tensor):        # the literal branches' weights, biases or gradients as one
        return torch.cat([tensor(branch) for branch in literal.branches])

    ours.reduce.weight.data = stacked(lambda branch: branch.weight.data)
    ours.reduce.bias.data = stacked(lambda branch: branch.bias.data)
    ours.expand.load_state_dict(literal.expand.state_dict())

    x, target = torch.randn(2, 3, channels, 5, 4, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (literal, ours)]
    for _ in range(10):
        for net, image, optimizer in zip((literal, ours), (a, b), optimizers):
            optimizer.zero_grad()
            F.mse_loss(net(image), target).backward()

        # outputs, and the gradients of the input and of each layer
        torch.testing.assert_close(ours(b), literal(a))
        torch.testing.assert_close(b.grad, a.grad)
        torch.testing.assert_close(ours.reduce.weight.grad, stacked(lambda b: b.weight.grad))
        torch.testing.assert_close(ours.reduce.bias.grad, stacked(lambda b: b.bias.grad))
        torch.testing.assert_close(ours.expand.weight.grad, literal.expand.weight.grad)
        for optimizer in optimizers:
            optimizer.step()

    torch.testing.assert_close(ours.reduce.weight, stacked(lambda b: b.weight))


@pytest.mark.parametrize("ours", [SqueezeExcitation(64, 4), AggregatedSqueezeExcitation(64, 16, 4)],
                         ids=["senet", "senetv2"])
def test_the_gate_equals_torchvisions_squeeze_excitation(ours):
    theirs = torchvision.ops.SqueezeExcitation(64, 16).double()     # of 1x1 convolutions
    ours = copy.deepcopy(ours).double()
    for mine, other in ((ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)):
        mine.weight.data, mine.bias.data = other.weight.data.flatten(1), other.bias.data

    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", [SqueezeExcitation, AggregatedSqueezeExcitation])
@pytest.mark.parametrize("residual, factor", [(False, 0.5), (True, 1.5)])
def test_a_gate_whose_last_layer_is_zero_scales_by_a_half(kind, residual, factor):
    block, x = kind(64, 8, residual=residual), torch.randn(2, 64, 5, 5)
    for p in block.expand.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(block(x), factor * x)

    # In such a gate only the last layer learns at first.
    block(x).square().sum().backward()
    assert block.expand.weight.grad.abs().max() > 0 == block.reduce.weight.grad.abs().max()


def test_a_softmax_would_nearly_close_an_undecided_gate():
    block = SqueezeExcitation(256, 32)
    for p in block.expand.parameters():
        nn.init.zeros_(p)

    scale = block.scale(torch.randn(1, 256, 4, 4)).flatten()
    torch.testing.assert_close(scale, torch.full((256,), 0.5))
    torch.testing.assert_close(scale.logit().softmax(0), torch.full((256,), 1 / 256))


def test_the_squeeze_leaves_one_number_per_channel():
    block, seen = AggregatedSqueezeExcitation(64, 8), []
    block.reduce.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(3, 64, 7, 5)
    block(x)
    assert seen[0].shape == (3, 64)
    torch.testing.assert_close(seen[0], F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("cardinality, count", [(1, 4_360), (4, 16_672)])
def test_the_parameters_of_a_gate_grow_with_its_width(cardinality, count):
    width = cardinality * 256 // 32
    by_hand = 2 * 256 * width + width + 256
    assert parameters(AggregatedSqueezeExcitation(256, 32, cardinality)) == by_hand == count


@pytest.mark.parametrize("kind", [SqueezeExcitation, AggregatedSqueezeExcitation])
def test_residual_adds_the_input_as_the_released_code_does(kind):
    block, x = kind(32, 8), torch.randn(2, 32, 5, 5)
    released = kind(32, 8, residual=True)
    released.load_state_dict(block.state_dict())
    torch.testing.assert_close(released(x), x + block(x))


@pytest.mark.parametrize("kind", [SqueezeExcitation, AggregatedSqueezeExcitation])
@pytest.mark.parametrize("residual, low", [(False, 0), (True, 1)])
def test_the_scale_is_one_number_per_channel_in_its_range(kind, residual, low):
    scale = kind(32, 8, residual=residual).scale(torch.randn(2, 32, 5, 5))
    assert scale.shape == (2, 32, 1, 1)
    assert low < scale.min() and scale.max() < low + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_block_works_in_any_dtype_and_memory_format(dtype):
    block = AggregatedSqueezeExcitation(64, 8).to(dtype)
    x = torch.randn(2, 64, 6, 5, dtype=dtype)
    y = block(x)
    assert y.shape == x.shape and y.dtype == dtype

    last = block(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


@pytest.mark.parametrize("made_of", [
    lambda block, x: torch.compile(block, fullgraph=True, backend="aot_eager"),
    lambda block, x: torch.export.export(block, (x,)).module(),
    lambda block, x: copy.deepcopy(block),
], ids=["compiled", "exported", "copied"])
def test_the_block_compiles_whole_exports_and_copies(made_of):
    block, x = AggregatedSqueezeExcitation(64, 8).eval(), torch.randn(2, 64, 6, 6)
    torch.testing.assert_close(made_of(block, x)(x), block(x))


@pytest.mark.parametrize("make, said", [
    (lambda: SqueezeExcitation(16, 32), ("reduction is 32", "between 1 and", "channels, 16")),
    (lambda: AggregatedSqueezeExcitation(16, 0), ("reduction is 0", "between 1", "channels, 16")),
    (lambda: AggregatedSqueezeExcitation(64, 8, 0), ("cardinality is 0", "1 or more")),
    (lambda: build_model("senetv2", reduction=512), ("reduction is 512", "channels, 256")),
    (lambda: build_model("senet", layers=(1, 1, 1)), ("1,1,1", "four positive")),
    (lambda: build_model("senet", layers=(1, 1, 0, 1)), ("1,1,0,1", "four positive")),
    (lambda: build_model("resnet", stem="tiny"), ("'tiny'", "imagenet, cifar")),
    (lambda: build_model("senet3"), ("'senet3'", "resnet, senet, senetv2", "convnext_tiny, vit")),
    (lambda: build_model("eficientnet_b1"), ("did you mean efficientnet_b1?",)),
    (lambda: build_model("foo"), ("'foo'", "resnet, senet, senetv2", "convnext_tiny, vit")),
    (lambda: build_model("vit", image_size=130), ("16x16", "130")),
])
def test_impossible_networks_are_refused_with_the_way_out(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- The network


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 32)])
@pytest.mark.parametrize("name", OURS)
def test_stages_have_resnets_shapes(name, stem, side):
    net, x = build_model(name, 7, SMALL, stem), torch.randn(2, 3, 32, 32)
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    assert x.shape == (2, 64, side, side)

    stages = (net.layer1, 256), (net.layer2, 512), (net.layer3, 1024), (net.layer4, 2048)
    for stage, channels in stages:
        x = stage(x)
        assert x.shape == (2, channels, side, side)
        side //= 2
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_multiply_adds_are_those_worked_out_by_hand():
    # conv1; then, per stage, 1x1, 3x3, 1x1, the downsampling 1x1, the two dense layers of the gate
    work, inplanes, side = 16 * 16 * 64 * 3 * 49, 64, 8
    for planes, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        channels, out = 4 * planes, side // stride
        work += side**2 * inplanes * planes
        work += out**2 * planes * 9 * planes
        work += out**2 * planes * channels
        work += out**2 * inplanes * channels
        work += 2 * channels * 4 * (channels // 32)
        inplanes, side = channels, out

    classifier = 2048 * 10
    assert senetv2.multiply_adds(build_model("senetv2", 10, SMALL), 32) == work + classifier


def test_senetv2_is_a_senet_bit_for_bit_through_training():
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    nets = [from_one_seed("senetv2", reduction=32, cardinality=4),
            from_one_seed("senet", reduction=8)]
    losses, other_losses = (train_steps(net, batches) for net in nets)
    assert losses == other_losses
    assert_equal(nets[0].state_dict(), nets[1].state_dict())


def test_all_variants_start_from_the_same_trunk():
    trunks = [{key: value for key, value in from_one_seed(name).state_dict().items()
               if "gate" not in key} for name in OURS]
    assert_equal(trunks[1:], [trunks[0]] * 2)


def test_torchvisions_resnet50_weights_fill_all_but_the_gates():
    with torch.device("meta"):
        net, theirs = build_model("senetv2", 1000), torchvision.models.resnet50()
        result = net.load_state_dict(theirs.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert len(result.missing_keys) == 16 * 4       # 16 gates of 2 weights and 2 biases
    assert all(".gate." in key for key in result.missing_keys)


def test_the_bottleneck_gates_the_last_norm_before_the_addition():
    torch.manual_seed(1)
    gated = build_model("senet", 10, SMALL, reduction=16).layer2[0].double()
    downsample = copy.deepcopy(gated.downsample)
    plain = torchvision.models.resnet.Bottleneck(256, 128, stride=2, downsample=downsample).double()
    plain.load_state_dict(gated.state_dict(), strict=False)

    captured = []
    plain.bn3.register_forward_hook(
        lambda module, args, out: captured.append(out) or gated.gate(out))
    x = torch.randn(2, 256, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(gated(x), plain(x))
    assert captured[0].shape == (2, 512, 4, 4)


@pytest.mark.parametrize("name", OURS)
def test_a_single_batch_is_learnt_by_heart(name):
    images, labels = data.draw_shapes(20, seed=3)
    x, net = images.float() / 127.5 - 1, build_model(name, 10, SMALL)
    train_steps(net, [(x, labels)] * 40)
    with torch.no_grad():
        assert (net(x).argmax(1) == labels).all()


@pytest.mark.parametrize("name", [*senetv2.PEERS, "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("size", [32, 224])
def test_peers_are_torchvisions_and_fit_both_image_sizes(name, size):
    options = dict(image_size=size) if name == "vit" else {}
    with torch.device("meta"):
        net = build_model(name, 7, **options)
        assert net(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert type(net).__module__.startswith("torchvision.models")


# ---------------------------------------------------------------------------------------- The table


def gates_by_hand(layers, width):
    """Parameters of two dense layers with biases, C -> width(C) -> C, in every bottleneck."""
    return sum(count * (2 * c * width(c) + width(c) + c)
               for count, c in zip(layers, (256, 512, 1024, 2048)))


@pytest.mark.parametrize("layers, classes, plain, senet, senetv2, paper", [
    ((3, 4, 6, 3), 10, 23_528_522, 1_273_048, 5_046_880, (1.28, 5.05)),
    ((3, 4, 6, 3), 100, 23_712_932, 1_273_048, 5_046_880, (1.28, 5.05)),
    ((3, 4, 6, 3), 1000, 25_557_032, 1_273_048, 5_046_880, (1.28, 5.05)),
    (SMALL, 10, 8_036_426, 352_120, 1_396_960, (0.35, 1.40)),
])
def test_parameter_counts_are_those_by_hand_and_the_papers(layers, classes, plain, senet, senetv2,
                                                           paper):
    assert gates_by_hand(layers, lambda c: c // 32) == senet
    assert gates_by_hand(layers, lambda c: 4 * (c // 32)) == senetv2

    with torch.device("meta"):
        count = {name: parameters(build_model(name, classes, layers)) for name in OURS}
        assert parameters(build_model("senet", classes, layers, reduction=8)) == count["senetv2"]
    assert count == {"resnet": plain, "senet": plain + senet, "senetv2": plain + senetv2}

    # The paper's two decimals are of a difference of two rounded figures.
    for added, claim in zip((senet, senetv2), paper):
        assert abs(added / 1e6 - claim) <= 0.01


def test_the_table_prints_these_counts(capsys):
    senetv2.print_table(32, "imagenet")
    text = capsys.readouterr().out
    for figure in ("23,712,932", "1,273,048", "5,046,880", "8,036,426", "352,120", "1,396,960",
                   "5.05 M", "0.35 M"):
        assert figure in text


# --------------------------------------------------------------------------- Which image comes when


@pytest.mark.parametrize("other", [dict(epoch=1), dict(seed=1), dict(first_step=4)], ids=str)
def test_a_batch_is_a_function_of_seed_epoch_and_step(other):
    images, labels = epoch_of(numbered())
    assert_equal(epoch_of(numbered()), (images, labels))

    seed = other.pop("seed", 0)
    other_images, other_labels = epoch_of(numbered(seed=seed), **other)
    if "first_step" in other:
        assert_equal((other_images, other_labels), (images[4 * 32:], labels[4 * 32:]))
    else:
        assert not torch.equal(images, other_images) and not torch.equal(labels, other_labels)


def test_an_epoch_shows_no_image_twice_and_drops_the_last_batch():
    images, labels = epoch_of(numbered())
    numbers = numbers_in(images)
    assert len(images) == 6 * 32 and len(set(numbers.tolist())) == 6 * 32
    assert torch.equal(labels, numbers % 10)


def test_processes_share_each_training_batch():
    whole = list(numbered().train_batches(0))
    parts = [list(numbered(rank=rank, world=4).train_batches(0)) for rank in range(4)]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*batches)) for batches in zip(*parts)]
    assert_equal(joined, whole)


@pytest.mark.parametrize("world", [1, 3])
def test_processes_count_each_test_image_once(world):
    parts = [numbered(rank=rank, world=world).test_batches() for rank in range(world)]
    seen = torch.cat([numbers_in(images) for part in parts for images, _ in part])
    assert sorted(seen.tolist()) == list(range(50))


def test_train_images_takes_the_first_of_a_seeded_shuffle():
    small, large = (set(data.subset(1000, count, seed=4).tolist()) for count in (50, 200))
    assert len(small) == 50 and small < large
    assert small != set(data.subset(1000, 50, seed=5).tolist())
    assert len(data.load_data("shapes", train_images=128).train_labels) == 128


# ----------------------------------------------------------------------------------- Sets in memory


def test_crops_and_flips_are_torchvisions_and_uniform():
    ramp = torch.arange(32 * 32).reshape(32, 32).mul(255 / 1024).round().to(torch.uint8)
    picture = torch.stack([ramp, ramp.T, ramp.flip(1)])         # no two crops of it are alike
    padded, known = F.pad(picture, (4,) * 4), {}
    for top in range(9):
        for left in range(9):
            crop = v2.functional.crop(padded, top, left, 32, 32)
            known[crop.numpy().tobytes()] = top, left, 0
            known[v2.functional.horizontal_flip(crop).numpy().tobytes()] = top, left, 1

    count = 4000
    pictures, labels = picture.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)
    source = in_memory((pictures, labels), (pictures[:1], labels[:1]), ["a"])
    seen = [known[image.numpy().tobytes()] for image in source.view(np.arange(count), epoch=0)]

    for axis, choices in enumerate((9, 9, 2)):
        counts = np.bincount([draw[axis] for draw in seen], minlength=choices)
        expected, spread = count / choices, math.sqrt(count / choices * (1 - 1 / choices))
        assert (abs(counts - expected) < 4 * spread).all()
    assert len(set(seen)) == 9 * 9 * 2


def test_the_seed_decides_the_crops_in_memory():
    first, second = (numbered(seed=seed).view(np.arange(200), epoch=0) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_test_images_are_normalised_as_torchvision_does():
    statistics = data.STATISTICS["shapes"]
    test_set = data.draw_shapes(30, seed=2)
    source = in_memory(data.draw_shapes(64, seed=1), test_set, list(data.SHAPES), statistics,
                       batch_size=16)
    oracle = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)])
    for _ in range(2):      # never augmented: alike each time
        images, labels = (torch.cat(part) for part in zip(*source.test_batches()))
        torch.testing.assert_close(images, oracle(test_set[0]))
        assert torch.equal(labels, test_set[1])


def test_without_augmentation_training_images_stay_as_they_are():
    images, _ = epoch_of(numbered(augment=False))
    assert (images == images[:, :1, :1, :1]).all()


def changed_in_memory(what):
    """The identity of a small set in memory in which one thing may have changed."""
    tensors = {"training images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
               "training labels": torch.arange(4),
               "test images": torch.ones(2, 3, 32, 32, dtype=torch.uint8),
               "test labels": torch.arange(2)}
    if what in tensors:
        tensors[what].view(-1)[-1] = 3 if "test" in what else 2
    images, labels, test_images, test_labels = tensors.values()
    classes = ["a", "b", "c", "e" if what == "classes" else "d"]
    return in_memory((images, labels), (test_images, test_labels), classes, batch_size=2).identity


@pytest.mark.parametrize("what, said", [
    ("nothing", []), ("classes", ["classes"]),
    ("training images", ["training images"]), ("training labels", ["training images"]),
    ("test images", ["test images"]), ("test labels", ["test images"])])
def test_another_pixel_or_label_is_another_set_in_memory(what, said):
    before, after = changed_in_memory("nothing"), changed_in_memory(what)
    assert [key for key in before if before[key] != after[key]] == said


# ------------------------------------------------------------------------------------------- Shapes


def test_shapes_are_always_the_same_with_ten_equal_classes():
    images, labels = data.draw_shapes(1000, seed=2)
    assert_equal(data.draw_shapes(1000, seed=2), (images, labels))
    assert torch.bincount(labels).tolist() == [100] * 10


def test_the_statistics_of_shapes_are_those_in_the_table():
    images, labels = data.draw_shapes(8000, seed=1)
    assert torch.bincount(labels).tolist() == [800] * 10
    pixels = images.double() / 255
    found = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    for values, known in zip(found, data.STATISTICS["shapes"]):
        torch.testing.assert_close(values.float(), torch.tensor(known), atol=6e-5, rtol=0)


def test_a_linear_classifier_on_the_pixels_fails_on_shapes():
    (x, y), (test_x, test_y) = data.draw_shapes(8000, seed=1), data.draw_shapes(1000, seed=2)
    x, test_x = (F.pad(images.flatten(1).float() / 127.5 - 1, (0, 1), value=1)
                 for images in (x, test_x))
    targets = F.one_hot(y).float()
    for ridge in (10, 1000, 100000):        # least squares, in closed form
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ targets)
        assert ((test_x @ weights).argmax(1) == test_y).float().mean() < 0.25


# -------------------------------------------------------------------------------------------- CIFAR


def write_cifar(root, dataset, monkeypatch, images=6):
    """Random pixels in the original format; torchvision is told their md5.

    Returns (pixels, labels) of the training and of the test images.
    """
    source, written = getattr(torchvision.datasets, dataset.upper()), []
    key, classes = ("labels", 10) if dataset == "cifar10" else ("fine_labels", 100)
    rng, folder = np.random.default_rng(0), Path(root, source.base_folder)
    folder.mkdir(parents=True)

    def put(name, content):
        (folder / name).write_bytes(blob := pickle.dumps(content))
        return [name, hashlib.md5(blob).hexdigest()]

    # Each row holds the red, the green and the blue plane of one image.
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(source, part)]
        blocks = [{"data": rng.integers(0, 256, (images, 3 * 32 * 32), dtype=np.uint8),
                   key: rng.integers(0, classes, images).tolist()} for _ in names]
        monkeypatch.setattr(source, part, list(map(put, names, blocks)))
        pixels = np.concatenate([block["data"] for block in blocks]).reshape(-1, 3, 32, 32)
        written.append((pixels, [label for block in blocks for label in block[key]]))

    names = {source.meta["key"]: [f"class {i}" for i in range(classes)]}
    _, md5 = put(source.meta["filename"], names)
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5})
    return written


@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_files_in_the_original_format(dataset, classes, tmp_path, monkeypatch):
    (images, labels), (test_images, test_labels) = write_cifar(tmp_path, dataset, monkeypatch)
    source = data.load_data(dataset, tmp_path, batch_size=2)

    assert source.train_size == len(images)
    assert np.array_equal(source.view(np.arange(len(images))).numpy(), images)
    assert source.train_labels.tolist() == labels
    assert np.array_equal(source.test_images.numpy(), test_images)
    assert source.test_labels.tolist() == test_labels
    assert source.classes == [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("name", [None, "data_batch_4", "test_batch", "batches.meta"])
def test_cifar_missing_or_damaged_is_refused_with_the_way_out(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    if name:
        write_cifar(tmp_path, "cifar10", monkeypatch)
        broken = tmp_path / "cifar-10-batches-py" / name
        broken.write_bytes(broken.read_bytes()[:-7])
    said = "cifar10 is missing or damaged in .*cifar-10-batches-py.*DATASET=shapes"
    with pytest.raises(FileNotFoundError, match=said):
        data.load_data("cifar10", tmp_path)


# ---------------------------------------------------------------------------- Folders: what is read


@pytest.mark.parametrize("text, shown", [
    ("\033[2Jcat", r"\x1b[2Jcat"),                      # clears a terminal
    ("two\nlines\r", r"two\nlines\r"),
    (os.fsdecode(b"\xff.JPEG"), r"\udcff.JPEG"),        # how Python reads a name that is not UTF-8
    ("Zoë's Übung_1, 猫.jpg", "Zoë's Übung_1, 猫.jpg"),
])
def test_printable_escapes_what_a_terminal_would_obey(text, shown):
    assert data.printable(text) == shown


def test_the_oddities_of_imagenet_are_read_as_pillow_reads_them(tmp_path):
    # A ramp is smooth, so JPEG keeps it, nearly.  Orientation 6 says: turn right by 90 degrees.
    ramp = np.linspace(0, 255, 40 * 30 * 4).astype(np.uint8).reshape(40, 30, 4)
    colour, exif = Image.fromarray(ramp[..., :3], "RGB"), Image.Exif()
    exif[0x0112] = 6
    colour.save(tmp_path / "turned.JPEG", exif=exif, quality=95)
    colour.convert("L").save(tmp_path / "gray.JPEG", quality=95)
    Image.fromarray(ramp, "CMYK").save(tmp_path / "cmyk.JPEG", quality=95)
    colour.save(tmp_path / "png.JPEG", format="PNG")

    for path in sorted(tmp_path.iterdir()):
        ours = data.read_image(path)
        oracle = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        oracle = torch.from_numpy(oracle).permute(2, 0, 1)
        height, width = (30, 40) if path.name == "turned.JPEG" else (40, 30)
        assert ours.shape == oracle.shape == (3, height, width)
        assert (ours.float() - oracle.float()).abs().mean() < 3, path.name
        for crop in (data.centre(64), v2.RandomResizedCrop(64)):        # larger than the image
            assert crop(ours).shape == (3, 64, 64)


@pytest.mark.parametrize("dataset, options, resized, cropped", [
    ("shapes", {}, 32, 32), ("cifar10", {}, 32, 32), ("cifar100", dict(image_size=64), 32, 32),
    ("imagenet", {}, 256, 224), ("folder", dict(image_size=64), 73, 64)])
@pytest.mark.parametrize("size", [(50, 70), (300, 260), (32, 32)])
def test_preprocess_makes_a_batch_as_torchvision_would(dataset, options, resized, cropped, size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    statistics = data.STATISTICS["imagenet" if dataset == "folder" else dataset]
    oracle = v2.Compose([v2.Resize(resized), v2.CenterCrop(cropped),
                         v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)])
    torch.testing.assert_close(data.Preprocess(dataset, **options)(image), oracle(image)[None])


def test_folder_test_images_are_the_resized_centre(folder, load_folder):
    source = load_folder()
    images, labels = next(source.test_batches())
    oracle = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32),
                         v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*data.STATISTICS["imagenet"])])
    path = folder / "val" / "cat" / "cat_0.JPEG"
    torch.testing.assert_close(images[0], oracle(torchvision.io.decode_image(str(path), "RGB")))
    assert sum(len(labels) for _, labels in source.test_batches()) == 9 and labels[0] == 0


def test_a_folder_keeps_the_lowest_hashes_of_every_class(folder, load_folder):
    source = load_folder(images_per_class=5)
    paths = source.files.paths[:source.train_size]

    def key(name):
        return hashlib.md5(f"0/{name}".encode()).hexdigest()

    oracle = {name for label in ("cat", "dog", "owl")
              for name in sorted(os.listdir(folder / "train" / label), key=key)[:5]}
    assert {os.path.basename(os.fsdecode(path)) for path in paths} == oracle


@pytest.mark.parametrize("dataset, count", [("imagenet", 250), ("folder", 300)])
def test_only_imagenet_is_cut_to_250_images_per_class(dataset, count, folder):
    source = folder / "train" / "cat" / "cat_0.JPEG"
    for i in range(288):
        (source.parent / f"more_{i}.JPEG").hardlink_to(source)
    with contextlib.closing(data.load_data(dataset, folder)) as loaded:
        assert torch.bincount(loaded.train_labels).tolist() == [count, 12, 12]


def rename(path, name):
    """Give a file or folder a name in bytes; skip where the file system takes only valid text."""
    path = os.fsencode(path)
    try:
        os.rename(path, os.path.join(os.path.dirname(path), name))
    except (OSError, UnicodeError):
        pytest.skip("this file system refuses names that are not UTF-8")


@pytest.mark.parametrize("workers", [0, 2])
def test_names_that_are_not_utf8_load(folder, load_folder, workers):
    before = [*load_folder().train_batches(0), *load_folder().test_batches()]
    rename(folder / "val" / "owl" / "owl_2.JPEG", b"owl_\xff.JPEG")        # the order stays
    for split in ("train", "val"):
        rename(folder / split / "owl", b"owl\xff")

    source = load_folder(workers=workers)
    assert source.classes == ["cat", "dog", os.fsdecode(b"owl\xff")]
    assert_equal([*source.train_batches(0), *source.test_batches()], before)


def test_an_error_about_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    (tmp_path / "broken").write_bytes(b"no image")
    rename(tmp_path / "broken", b"\xff.JPEG")
    with pytest.raises(ValueError, match=r"\\udcff.JPEG cannot be decoded") as error:
        data.read_image(tmp_path / os.fsdecode(b"\xff.JPEG"))
    str(error.value).encode()       # a broken byte would raise here, as it would in print


def add_image(root):
    shutil.copy(root / "train" / "cat" / "cat_0.JPEG", root / "train" / "dog" / "another.JPEG")


def rename_class(root):
    for split in ("train", "val"):
        (root / split / "owl").rename(root / split / "elk")


@pytest.mark.parametrize("change, said", [
    (add_image, ["training images"]),
    (rename_class, ["classes", "training images", "test images"]),
    (lambda root: os.truncate(root / "train/cat/cat_1.JPEG", 10**5), ["training images"]),
    (lambda root: os.truncate(root / "val/owl/owl_1.JPEG", 10**5), ["test images"])])
def test_another_file_class_or_size_is_another_folder(change, said, folder, load_folder):
    before = load_folder().identity
    change(folder)
    after = load_folder().identity
    assert [key for key in before if before[key] != after[key]] == said


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_that_moved_is_the_same(relative, folder, load_folder, monkeypatch):
    before = load_folder().identity
    elsewhere = folder / "else" / "where"
    elsewhere.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).rename(elsewhere / split)

    monkeypatch.chdir(folder)
    assert load_folder("else/where" if relative else elsewhere).identity == before


@pytest.mark.parametrize("spoil, said", [
    (lambda root: (root / "train").rename(root / "other"), "no train/ folder"),
    (lambda root: (root / "val/owl").rename(root / "val/elk"), "different classes.*elk, owl"),
    (lambda root: [path.rename(path.with_suffix(".bmp"))
                   for path in (root / "train/dog").iterdir()], "dog.*: .jpg, .jpeg, .png, .webp$"),
    (lambda root: [path.write_bytes(b"no image") for path in (root / "val/cat").iterdir()],
     "cat_0.JPEG cannot be decoded"),
    (lambda root: Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(
        root / "val/cat/cat_0.JPEG", "PNG"), "cat_0.JPEG holds .* 8 bits"),
], ids=["no train", "classes", "empty class", "no image", "16 bits"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_useless_folder_is_refused_in_one_line(spoil, said, workers, folder, load_folder):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        list(load_folder(workers=workers).test_batches())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_is_named_in_one_line(workers, folder, load_folder):
    source = load_folder(workers=workers)
    (folder / "val" / "cat" / "cat_0.JPEG").unlink()
    with pytest.raises((ValueError, OSError), match="cat_0.JPEG") as error:
        list(source.test_batches())
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- Folders: workers


def passes(source):
    """All batches of two epochs with the test images between them, as a run sees them."""
    batches = [*source.train_batches(0), *source.test_batches(), *source.train_batches(1)]
    assert sum(len(labels) for _, labels in batches) == 2 * source.steps * source.batch_size + 9
    return batches


def processes(source):
    return list(source.loader._iterator._workers)


def test_a_folders_crop_is_a_function_of_seed_epoch_and_index(folder, load_folder):
    add_image(folder)           # image 12 is a copy of image 0
    first, again, *others = [
        load_folder(seed=seed).view([index], epoch=epoch)
        for seed, epoch, index in ((0, 3, 0), (0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 12))]
    assert_equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_a_folders_images_are_flipped_now_and_then(folder, load_folder):
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    write_png(ramp, str(folder / "train" / "cat" / "cat_0.JPEG"))       # it grows to the right
    source = load_folder()
    crops = [source.view([0], epoch)[0, 0, 16].int() for epoch in range(20)]
    assert {(crop[-1] > crop[0]).item() for crop in crops} == {True, False}


@pytest.mark.parametrize("augment", [True, False])
def test_only_augmented_images_differ_from_epoch_to_epoch(augment, load_folder):
    for source in (numbered(augment=augment), load_folder(augment=augment)):
        seen = {image.numpy().tobytes() for epoch in (0, 1) for image in epoch_of(source, epoch)[0]}
        assert (len(seen) > source.train_size) == augment


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_folder_batches_do_not_depend_on_the_workers(load_folder, workers):
    images, labels = epoch_of(load_folder(), epoch=3)
    assert images.shape == (32, 3, 32, 32)
    assert_equal(epoch_of(load_folder(workers=workers), epoch=3), (images, labels))

    late, _ = epoch_of(load_folder(workers=workers), epoch=3, first_step=2)
    assert_equal(late, images[16:])


def test_two_workers_serve_epochs_and_test_images_in_turn(load_folder):
    assert_equal(passes(load_folder(workers=2)), passes(load_folder()))


def test_a_pass_abandoned_halfway_leaves_the_next_one_right(load_folder):
    source = load_folder(workers=2, batch_size=2)
    for _ in source.train_batches(0):
        break
    assert_equal(passes(source), passes(load_folder(batch_size=2)))


def test_workers_start_once_and_end_with_close(load_folder):
    source, seen = load_folder(workers=2), []
    for batches in (source.train_batches(0), source.test_batches(), source.train_batches(1)):
        list(batches)
        seen.append([process.pid for process in processes(source)])
    assert len(set(seen[0])) == 2 and seen == [seen[0]] * 3

    workers = processes(source)
    assert all(process.is_alive() for process in workers)
    source.close()
    assert not any(process.is_alive() for process in workers)


def show_blocked(worker):
    print(*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows blocks no signals")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_start_with_the_signals_blocked(method, folder):
    program = (f"import multiprocessing, data, {Path(__file__).stem} as test; "
               f"multiprocessing.set_start_method({method!r}); "
               "data.ignore_signals = test.show_blocked; "
               f"source = data.load_data('folder', {str(folder)!r}, workers=1, image_size=32); "
               "list(source.test_batches()); source.close()")
    shown = subprocess.run([sys.executable, "-c", program], cwd=HERE, text=True, check=True,
                           capture_output=True).stdout
    assert {*map(int, shown.split())} == {*map(int, data.STOPPING)}


def test_no_resource_tracker_is_started_where_no_signals_are_blocked(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask", raising=False)       # as on Windows
    monkeypatch.setattr(data.multiprocessing, "get_start_method", lambda: "spawn")
    monkeypatch.setattr(data.resource_tracker, "ensure_running",
                        lambda: pytest.fail("Windows has no such process"))
    with data.signals_blocked():
        pass


@pytest.mark.parametrize("number", data.STOPPING, ids=lambda number: number.name)
def test_a_signal_while_workers_start_is_not_lost(number):
    arrived = threading.Event()
    signal.signal(number, lambda *args: arrived.set())
    with data.signals_blocked():
        os.kill(os.getpid(), number)
    assert arrived.wait(timeout=30)         # another thread may have taken it, a moment later


def test_a_program_that_closes_no_folder_still_ends(folder):
    program = (f"import data; source = data.load_data('folder', {str(folder)!r}, workers=2, "
               "batch_size=8, image_size=32); print(len(list(source.train_batches(0))))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=HERE, text=True,
                               stdout=subprocess.PIPE)
    try:
        assert process.communicate(timeout=60)[0] == "4\n"
    finally:        # its workers notice that they are alone
        process.kill()
        process.wait()


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_without_a_share_get_an_empty_batch(load_folder, workers):
    shares = [list(load_folder(rank=rank, world=4, workers=workers).test_batches())
              for rank in range(4)]
    assert [[len(labels) for _, labels in share] for share in shares] == [[2, 1], *[[2, 0]] * 3]

    empty, _ = shares[1][1]
    net = build_model("senetv2", 3, SMALL).eval()
    assert empty.shape == (0, 3, 32, 32) and net(empty).shape == (0, 3)


# ------------------------------------------------------------------------------------ Contact sheet


def test_the_contact_sheet_pairs_before_and_after_per_class():
    sheet = data.contact_sheet(numbered())
    assert sheet.shape == (3, 10 * 68 + 4, 10 * 68 + 4) and sheet.dtype == torch.uint8
    before, after = sheet[:, 4:68, 4:68], sheet[:, 4:68, 72:136]
    assert not torch.equal(before, after)

    tiles = sheet[0, 4:, 4:].unfold(0, 64, 68).unfold(1, 64, 68)        # (10, 10, 64, 64)
    fill = torch.arange(1, 51).reshape(5, 10).T     # image i has class i % 10 and the value i + 1
    assert (tiles[:, ::2] == fill[..., None, None]).all()
    assert (tiles[:, 1::2].amax((2, 3)) == fill).all() and (tiles[:, 1::2] == 0).any()


# ----------------------------------------------------------------------------------------- Training

QUICK = ["--train-images", "192", "--batch-size", "32", "--epochs", "2"]        # 12 steps


def complaint(capsys, *flags):
    """The one line with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    text = capsys.readouterr().err
    assert stop.value.code not in (0, None) and text.count("\n") == 1, text
    return text


def rows(out):
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two short epochs, and what the command line said."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, subprocess.run([sys.executable, HERE / "train.py", *QUICK, "--out", out],
                               capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(trained):
    return trained[0]


def test_a_run_prints_a_row_per_epoch_and_its_result(trained):
    _, process = trained
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and process.stderr == ""
    assert len([line for line in lines if "/2  " in line]) == 2 and "done: top-1" in lines[-1]


def test_a_run_leaves_its_metrics_and_its_settings(finished):
    table = rows(finished)
    assert [row["epoch"] for row in table] == ["1", "2"] and 0 <= float(table[1]["top1"]) <= 100
    last = 5e-4 * (1 + math.cos(math.pi * 10 / 11))     # step 11 of 0 to 11; one warms up
    assert float(table[1]["lr"]) == pytest.approx(last)

    settings = json.loads((finished / "config.json").read_text())["settings"]
    wanted = dict(model="senetv2", layers="1,1,1,1", batch_size=32, epochs=2, train_images=192)
    assert settings.items() >= wanted.items()


def test_a_finished_run_only_prints_its_result_again(trained, capsys):
    out, process = trained
    before = (out / "last.pt").read_bytes()
    train.main([*QUICK, "--out", str(out)])

    assert capsys.readouterr().out.splitlines() == process.stdout.splitlines()[-1:]
    assert (out / "last.pt").read_bytes() == before


def test_evaluation_prints_what_the_trained_network_finds(finished, capsys):
    net, last = train.load(finished / "last.pt"), rows(finished)[1]
    assert net.classes == list(data.SHAPES) and not net.training
    assert net.settings["batch_size"] == 32

    # The shapes are drawn and normalised without the loader.
    images, labels = data.draw_shapes(1000, seed=2)
    with torch.no_grad():
        logits = net(v2.Normalize(*data.STATISTICS["shapes"])(images.float() / 255)).double()
    right, loss = 100 * (logits.argmax(1) == labels).double(), F.cross_entropy(logits, labels)
    assert f"{right.mean():.2f}" == f"{float(last['top1']):.2f}"
    assert float(last["test_loss"]) == pytest.approx(loss.item(), rel=1e-4)

    train.main(["--evaluate", "--checkpoint", str(finished / "last.pt")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:10] == [f"{right[labels == k].mean():7.2f}%  {name}"
                          for k, name in enumerate(net.classes)]
    assert f"top-1 {right.mean():.2f}%" in lines[10]
    assert len(lines) == 11 + 5         # ten classes and the sum; four stages and the picture


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "cifar11"], ("cifar11", "cifar100")),
    (["--stem", "tiny"], ("tiny", "cifar")),
    (["--layers", "3,4,6"], ("3,4,6", "four positive")),
    (["--layers", "3,4,0,3"], ("3,4,0,3", "four positive")),
    (["--epochs", "0"], ("--epochs", "0", "positive")),
    (["--epochs", "-1"], ("--epochs", "-1", "positive")),
    (["--batch-size", "0"], ("--batch-size", "positive")),
    (["--batch-size", "x"], ("--batch-size", "x")),
    (["--train-images", "-5"], ("--train-images", "-5")),
    (["--cardinality", "0"], ("--cardinality", "positive")),
    (["--reduction", "0"], ("--reduction", "positive")),
    (["--lr", "nan"], ("--lr", "positive")),
    (["--weight-decay", "-1"], ("--weight-decay", "between 0 and 1")),
    (["--seed", "9" * 23], ("--seed", "9" * 23, "from 0 to 2**63 - 1")),
    (["--seed", str(2**63)], ("--seed", "from 0 to 2**63 - 1")),
    # What only the data, the network or the disk can tell.
    (["--model", "senetv3"], ("senetv3", "did you mean senetv2?")),
    (["--model", "foo"], ("unknown model 'foo'", "resnet, senet, senetv2")),
    (["--model", "alexnet"], ("alexnet", "32x32", "too small", "--model")),
    pytest.param(["--model", "googlenet"], ("googlenet", "more than logits", "--model"),
                 marks=pytest.mark.filterwarnings("ignore:The default weight:FutureWarning")),
    (["--reduction", "257"], ("257", "between 1 and the number of channels, 256")),
    (["--batch-size", "9000"], ("9000", "8000")),
    (["--train-images", "8001"], ("8001", "8000")),
    (["--dataset", "imagenet"], ("train/", "--data-dir")),
    (["--evaluate", "--checkpoint", "nowhere.pt"], ("nowhere.pt", "train first")),
    pytest.param(["--device", "cuda"], ("--device cpu",),
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
])
def test_bad_input_is_refused_in_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("it began to train"))
    text = complaint(capsys, *flags)
    assert all(part in text for part in said), text
    assert list(tmp_path.iterdir()) == []       # and leaves nothing behind


@pytest.mark.parametrize("flags, epochs", [([], 10), (["--dataset", "cifar10"], 30),
                                           (["--dataset", "cifar10", "--recipe", "strong"], 100)])
def test_help_shows_the_defaults_that_count(flags, epochs, capsys):
    with pytest.raises(SystemExit):
        train.main([*flags, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"passes over the training images (default: {epochs})" in text


def test_a_batch_size_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    args, settings = train.parse_args(["--batch-size", "33", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(ValueError, match="33 cannot be divided by 2 processes"):
        train.run_training(args, settings, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_does_not_decode_stops_the_run_in_one_line(folder, tmp_path, capsys):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    text = complaint(capsys, *folder_flags(folder, tmp_path / "run", workers=2))
    assert str(folder / "train" / "cat") in text and "decoded" in text


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys):
    text = complaint(capsys, *QUICK, "--out", tmp_path, "--lr", "1e30")
    assert "no longer finite at step" in text and not (tmp_path / "last.pt").exists()


def test_an_interrupt_before_the_first_step_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_data", lambda **options: os.kill(os.getpid(), signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert complaint(capsys, *QUICK, "--out", tmp_path) == "train.py: error: interrupted\n"


@pytest.mark.parametrize("name", [*senetv2.PEERS[:-1], "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_networks_that_fit_the_images_are_let_through(name):
    train.try_out(dict(name=name, num_classes=7), 32)


@pytest.mark.parametrize("step, bad", [(5, 3), (6, 3), (6, 6), (8, 7)])
def test_the_first_step_that_went_wrong_is_named(step, bad):
    losses = torch.zeros(6)             # epochs of 6 steps, checked after `step`
    losses[(bad - 1) % 6] = math.nan
    with pytest.raises(ValueError, match=f"at step {bad};"):
        train.check_finite(losses, nn.Linear(1, 1), step)


@pytest.mark.parametrize("recipe, kind, decay", [("paper", torch.optim.Adam, 0.0),
                                                 ("strong", torch.optim.SGD, 5e-4)])
def test_a_recipes_optimiser_decays_neither_norms_nor_biases(recipe, kind, decay):
    _, settings = train.parse_args(["--recipe", recipe])
    net = build_model("senetv2", 10, SMALL)
    optimizer = train.make_optimizer(net, settings)
    first, second = optimizer.param_groups

    assert type(optimizer) is kind and optimizer.defaults.get("nesterov", True)
    assert first["weight_decay"] == decay and second["weight_decay"] == 0
    assert {p.ndim for p in first["params"]} == {2, 4} and {p.ndim for p in second["params"]} == {1}
    assert len(first["params"]) + len(second["params"]) == len(list(net.parameters()))


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 0.1, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01


@pytest.mark.parametrize("device, native, emulated, wanted", [
    ("cpu", True, True, torch.float32), ("cuda", True, True, torch.bfloat16),
    ("cuda", False, True, torch.float32), ("cuda", False, False, torch.float32),
])
def test_only_a_gpu_that_computes_in_bfloat16_does(device, native, emulated, wanted, monkeypatch):
    def supported(including_emulation=True):    # as on a T4, say, which only emulates it
        return emulated if including_emulation else native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    train.precision.cache_clear()
    assert train.precision(torch.device(device)) == wanted
    train.precision.cache_clear()


# ---------------------------------------------------------------------------- Files and checkpoints


@pytest.mark.parametrize("place", ["a file/run", "a file"])
def test_a_folder_that_cannot_be_made_is_said_in_one_line(place, tmp_path, capsys):
    (tmp_path / "a file").write_text("in the way")
    text = complaint(capsys, *QUICK, "--out", tmp_path / place)
    assert "a file" in text and (tmp_path / "a file").read_text() == "in the way"


def test_weights_are_taken_where_name_and_shape_agree(finished):
    given = train.read_checkpoint(finished / "last.pt")["model"]
    net = build_model("senetv2", 7, SMALL)
    before = net.fc.weight.clone()
    line = train.load_weights(net, finished / "last.pt", "senetv2")

    assert f"{len(given) - 2} tensors taken" in line
    assert "new: 2 (fc.weight, fc.bias)" in line and "unused: 2 (fc.weight, fc.bias)" in line
    assert torch.equal(net.fc.weight, before)
    assert all(torch.equal(value, given[key]) for key, value in net.state_dict().items()
               if "fc" not in key)


def test_a_run_says_which_weights_it_does_not_use(finished, tmp_path, capsys):
    train.main(["--train-images", "32", "--batch-size", "32", "--epochs", "1", "--model", "resnet",
                "--weights", str(finished / "last.pt"), "--out", str(tmp_path)])
    assert "unused: 16 (layer1.0.gate.reduce.weight" in capsys.readouterr().out


def test_weights_that_do_not_fit_at_all_are_refused(finished):
    with pytest.raises(ValueError, match="no tensor of .* similar network"):
        train.load_weights(build_model("vit"), finished / "last.pt", "vit")


def test_weights_that_cannot_be_downloaded_are_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    text = complaint(capsys, *QUICK, "--weights", "imagenet", "--out", tmp_path)
    assert "resnet50 are not on this disk" in text


def ways(way, checkpoint):
    """The flags that read the checkpoint of a QUICK run in one of two ways."""
    return (["--evaluate", "--checkpoint", checkpoint] if way == "evaluate"
            else [*QUICK, "--out", checkpoint.parent])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize("way", ["evaluate", "resume"])
@pytest.mark.parametrize("content", [lambda good: good[:len(good) // 2], lambda good: b"",
                                     lambda good: pickle.dumps(Hostile())])
def test_a_damaged_or_hostile_checkpoint_is_refused(content, way, finished, tmp_path, monkeypatch,
                                                    capsys):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "run" / "last.pt"
    bad.parent.mkdir()
    bad.write_bytes(content((finished / "last.pt").read_bytes()))

    assert "last.pt is not a valid checkpoint" in complaint(capsys, *ways(way, bad))
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("way, change, said", [
    ("evaluate", lambda saved: saved["network"].update(gates=3), "does not fit"),
    ("evaluate", lambda saved: saved["network"].pop("name"), "does not fit"),
    ("evaluate", lambda saved: saved["model"].pop("fc.bias"), "fc.bias"),
    ("evaluate", lambda saved: saved.pop("classes"), "not a valid checkpoint"),
    ("resume", lambda saved: saved["model"].pop("fc.bias"), "fc.bias"),
    ("resume", lambda saved: saved.pop("identity"), "not a valid checkpoint"),
    ("evaluate", lambda saved: saved.update(settings=[]), "not a valid checkpoint"),
    ("resume", lambda saved: saved.update(step="7"), "not a valid checkpoint"),
    ("resume", lambda saved: saved["optimizer"]["param_groups"].pop(), "does not fit"),
    ("resume", lambda saved: saved.update(losses=torch.zeros(7)), "does not fit"),
])
def test_a_checkpoint_of_another_form_is_refused(way, change, said, finished, tmp_path, capsys):
    saved = train.read_checkpoint(finished / "last.pt")
    change(saved)
    torch.save(saved, tmp_path / "last.pt")
    assert said in complaint(capsys, *ways(way, tmp_path / "last.pt"))


def test_a_checkpoint_of_other_code_is_refused(finished, monkeypatch, capsys):
    monkeypatch.setitem(senetv2.GATES, "senetv2", lambda channels, **o: SqueezeExcitation(channels))
    text = complaint(capsys, "--evaluate", "--checkpoint", finished / "last.pt")
    assert "does not fit" in text and "layer1.0.gate.reduce.weight" in text and "--restart" in text


def test_a_run_of_other_settings_is_refused_with_all_of_them(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    text = complaint(capsys, *QUICK, "--out", finished, "--lr", "0.01", "--model", "resnet")
    assert "lr: was 0.001, is 0.01" in text and "model: was senetv2, is resnet" in text
    assert "--out" in text and "--restart" in text
    assert (finished / "last.pt").read_bytes() == before


@pytest.mark.parametrize("change, said", [(add_image, "training images: was 36 "),
                                          (rename_class, "classes: was owl, is elk")])
def test_a_run_does_not_go_on_with_other_data(change, said, folder, tmp_path, monkeypatch, capsys):
    flags = folder_flags(folder, tmp_path / "run")
    stop_at(3, signal.SIGTERM, flags, monkeypatch, data.Folder)
    change(folder)
    assert said in complaint(capsys, *flags)


def test_a_finished_run_is_not_taken_for_one_of_other_data(folder, tmp_path, capsys):
    flags = folder_flags(folder, tmp_path / "run")
    train.main(flags)
    add_image(folder)
    assert "training images: was 36 " in complaint(capsys, *flags)


def test_a_run_goes_on_after_its_folder_has_moved(folder, tmp_path, monkeypatch, capsys):
    stop_at(3, signal.SIGTERM, folder_flags(folder, tmp_path / "run", epochs=2), monkeypatch,
            data.Folder)
    for split in ("train", "val"):
        shutil.move(folder / split, tmp_path / "moved" / split)
    for out in ("run", "run", "whole"):         # the second time, the run is finished
        train.main(folder_flags(tmp_path / "moved", tmp_path / out, epochs=2))
        assert "done: top-1" in capsys.readouterr().out.splitlines()[-1]
    assert same_result(tmp_path / "run", tmp_path / "whole")


def test_a_run_starts_where_files_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fcntl", None)       # as on Windows
    train.main([*QUICK[:-1], "1", "--model", "shufflenet_v2_x0_5", "--out", str(tmp_path / "run")])
    assert len(rows(tmp_path / "run")) == 1


def test_the_name_of_a_run_is_one_folder_on_every_system():
    args, _ = train.parse_args(["--dataset", "folder", "--data-dir", "C:\\photos/mine"])
    assert args.out.name == "folder-senetv2-paper-data_dirC__photos_mine-seed0"


def test_imagenet_from_two_places_is_not_one_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "train", tmp_path / "other" / "train")
    shutil.copytree(folder / "val", tmp_path / "other" / "val")
    add_image(tmp_path / "other")

    flags = [*folder_flags(folder, "")[4:-2], "--dataset", "imagenet", "--data-dir"]
    train.main([*flags, str(folder)])           # the name of the run does not say from where
    assert "training images: was 36 " in complaint(capsys, *flags, tmp_path / "other")


# ----------------------------------------------------------------- Interrupted equals uninterrupted


def same_result(out, other):
    """Weights, optimiser, history and metrics.csv, bit for bit; only seconds are the machine's."""
    a, b = (train.read_checkpoint(path / "last.pt") for path in (out, other))
    tables = [[{key: str(value) for key, value in row.items() if "second" not in key}
               for row in table] for table in (a["history"], b["history"], rows(out), rows(other))]
    assert tables == [tables[0]] * 4
    assert len(tables[0]) == a["settings"]["epochs"] > 0 and len(a["model"]) > 50
    for key in ("settings", "identity", "step", "model", "optimizer"):
        assert_equal(a[key], b[key])
    return True


def at_step(number, action, kind=data.InMemory):
    """A train_batches that calls `action` before the batch of global step `number` (from 1)."""
    def train_batches(self, epoch, first_step=0, inner=kind.train_batches):
        first = epoch * self.steps + first_step + 1
        for step, batch in enumerate(inner(self, epoch, first_step), start=first):
            if step == number:
                action()
            yield batch
    return train_batches


def stop_at(step, number, flags, monkeypatch, kind=data.InMemory):
    """Train until signal `number` comes in global step `step`: it stops after that very step.

    The run's folder is the last of the flags.
    """
    # also where a shell ignores some in the background
    signal.signal(number, lambda *args: pytest.fail("the run did not catch its signal"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(kind, "train_batches",
                      at_step(step, lambda: os.kill(os.getpid(), number), kind))
        train.main(flags)
    assert stop.value.code == 128 + number
    assert train.read_checkpoint(Path(flags[-1], "last.pt"))["step"] == step


@pytest.mark.parametrize("name, step", [("SIGTERM", 4), ("SIGINT", 9), ("SIGTERM", 6),
                                        ("SIGINT", 12), ("SIGHUP", 5)])
def test_a_run_told_to_stop_ends_as_if_it_had_not(name, step, finished, tmp_path, monkeypatch,
                                                  capsys):
    flags = [*QUICK, "--out", str(tmp_path)]
    stop_at(step, signal.Signals[name], flags, monkeypatch)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"saved after step {step}; the same command resumes"
    train.main(flags)
    assert same_result(tmp_path, finished)


class ClosedTerminal:
    """It fails from the first line of progress on."""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        if "\033" in text:
            raise OSError("Input/output error")


def test_a_closed_terminal_does_not_keep_a_run_from_saving(finished, tmp_path, monkeypatch):
    flags = [*QUICK, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ClosedTerminal())
        stop_at(9, signal.SIGHUP, flags, monkeypatch)
    train.main(flags)
    assert same_result(tmp_path, finished)


def test_a_hangup_that_nohup_ignores_changes_nothing(finished, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(data.InMemory, "train_batches",
                        at_step(5, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    train.main([*QUICK, "--out", str(tmp_path)])
    assert same_result(tmp_path, finished)


def test_a_signal_in_evaluation_stops_and_the_epoch_counts_once(finished, tmp_path, monkeypatch):
    def interrupted(self, inner=data.InMemory.test_batches):
        for batch in inner(self):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(data.InMemory, "test_batches", interrupted)
        train.main([*QUICK, "--out", str(tmp_path)])
    saved = train.read_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 6 and saved["history"] == []

    train.main([*QUICK, "--out", str(tmp_path)])
    assert same_result(tmp_path, finished)


def wait_for_a_line():
    print("waiting", flush=True)
    sys.stdin.readline()


ACTIONS = {     # what a driven process can do to itself
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop all": lambda: os.killpg(0, signal.SIGTERM),       # its process group, as Ctrl-C does
    "wait": wait_for_a_line,
}


def drive_inside(flags, step, action, rank):
    """In a process of `driver`: train; process `rank` acts at a step; all keep their weights."""
    if train.RANK == rank:
        for kind in (data.InMemory, data.Folder):
            kind.train_batches = at_step(step, ACTIONS[action], kind)

    def train_and_keep(run, *rest, inner=train.train):
        inner(run, *rest)
        torch.save(run.net.state_dict(), run.folder / f"rank{train.RANK}")

    train.train = train_and_keep
    train.main(flags)


def driver(flags, step=0, action="stop", rank=0, processes=1):
    """The command that runs drive_inside in a process of its own, or in several by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                "--no-python", sys.executable] if processes > 1 else []
    name, words = Path(__file__).stem, json.dumps([[*map(str, flags)], step, action, rank])
    code = f"import json, sys, {name}; {name}.drive_inside(*json.loads(sys.argv[1]))"
    return [sys.executable, *launcher, "-c", code, words]


def drive(flags, step=0, action="stop", rank=0, processes=1, **options):
    return subprocess.run(driver(flags, step, action, rank, processes), cwd=HERE, timeout=300,
                          capture_output=True, text=True, **options)


def test_a_run_that_was_killed_ends_as_if_it_had_not(finished, tmp_path):
    flags = [*QUICK, "--checkpoint-minutes", "0.0001", "--out", str(tmp_path)]
    assert drive(flags, step=8, action="kill").returncode == -signal.SIGKILL
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] <= 7
    train.main(flags)
    assert same_result(tmp_path, finished)


def test_a_stop_of_all_processes_loses_nothing(folder, tmp_path):
    flags = folder_flags(folder, tmp_path / "run", workers=2, epochs=2)
    result = drive(flags, step=3, action="stop all", start_new_session=True)
    assert result.returncode == 128 + signal.SIGTERM and "Traceback" not in result.stderr
    assert train.read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3

    train.main(flags)
    train.main([*flags[:-1], str(tmp_path / "whole")])
    assert same_result(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_is_said_and_leaves_the_old_checkpoint_whole(finished, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    flags = [*QUICK, "--out", str(tmp_path)]
    stop_at(5, signal.SIGTERM, flags, monkeypatch)
    before = (tmp_path / "last.pt").read_bytes()

    limit = 20 * 2**20      # bytes a file may have: less than a checkpoint
    full = drive(flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2))
    assert full.returncode == 1 and full.stderr.count("\n") == 1
    assert "cannot write" in full.stderr and "free some disk space" in full.stderr
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))

    train.main(flags)
    assert same_result(tmp_path, finished)


@pytest.fixture
def occupied(folder, tmp_path):
    """The flags of a run, and a process that has saved two of its steps and waits for a line."""
    flags = ["--checkpoint-minutes", "1e-9", *folder_flags(folder, tmp_path / "run", workers=2)]
    command = driver(flags, step=3, action="wait")
    with subprocess.Popen(command, cwd=HERE, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as first:
        while "waiting" not in (line := first.stdout.readline()):
            assert line, "the process ended early"
        yield flags, first
        first.kill()


def test_a_second_process_is_refused_and_the_first_undisturbed(occupied, tmp_path, capsys):
    flags, first = occupied
    assert "another process is training in" in complaint(capsys, *flags)
    first.communicate("go on\n")
    assert first.returncode == 0

    train.main([*flags[:-1], str(tmp_path / "whole")])
    assert same_result(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_resumes_before_its_workers_have_left(occupied, tmp_path, capsys):
    flags, first = occupied
    first.kill()
    first.wait()            # its two workers notice within seconds
    train.main(flags)
    assert "resuming after step 2" in capsys.readouterr().out

    train.main([*flags[:-1], str(tmp_path / "whole")])
    assert same_result(tmp_path / "run", tmp_path / "whole")


def test_a_folder_run_stopped_in_mid_epoch_ends_as_if_whole(folder, tmp_path, monkeypatch):
    train.main(folder_flags(folder, tmp_path / "whole", workers=0, epochs=2))
    stop_at(3, signal.SIGTERM, folder_flags(folder, tmp_path / "parts", workers=2, epochs=2),
            monkeypatch, data.Folder)
    train.main(folder_flags(folder, tmp_path / "parts", workers=1, epochs=2))
    assert same_result(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_that_appears_before_the_lock_is_resumed(finished, tmp_path, monkeypatch,
                                                              capsys):
    def locked(folder, inner=train.locked):         # another process finishes just in time
        shutil.copytree(finished, folder)
        return inner(folder)

    monkeypatch.setattr(train, "locked", locked)
    train.main([*QUICK, "--out", str(tmp_path / "run")])
    assert len(capsys.readouterr().out.splitlines()) == 1       # the result, and no training


def test_restart_begins_anew(finished, tmp_path, monkeypatch):
    stop_at(2, signal.SIGTERM, [*QUICK, "--lr", "0.01", "--out", str(tmp_path)], monkeypatch)
    train.main([*QUICK, "--out", str(tmp_path), "--restart"])
    assert same_result(tmp_path, finished)


def test_dropout_is_a_function_of_the_step(tmp_path, monkeypatch):
    flags = ["--model", "mobilenet_v2", "--train-images", "64", "--batch-size", "16",
             "--epochs", "2", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    stop_at(3, signal.SIGTERM, [*flags, str(tmp_path / "parts")], monkeypatch)
    train.main([*flags, str(tmp_path / "parts")])
    assert same_result(tmp_path / "parts", tmp_path / "whole")


# -------------------------------------------------------------------------------- Several processes


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """The folder of a run of two processes, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    result = drive([*QUICK, "--out", out], processes=2)
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stderr
    return out, result.stdout


def test_two_processes_end_with_the_same_weights(in_two):
    out, printed = in_two
    first, second = (torch.load(out / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert_equal(first, second)
    assert printed.count("done: top-1") == 1


def test_two_processes_measure_what_a_single_one_does(in_two):
    out, _ = in_two
    alone = train.evaluate(train.load(out / "last.pt"), data.load_data("shapes", batch_size=32))
    last = rows(out)[-1]
    assert float(last["top1"]) == alone["top1"] and float(last["top5"]) == alone["top5"]
    assert float(last["test_loss"]) == pytest.approx(alone["loss"], rel=1e-6)


def test_a_signal_to_one_process_stops_both_at_the_same_step(in_two, tmp_path):
    out, alone = tmp_path / "run", tmp_path / "alone"
    assert drive([*QUICK, "--out", out], step=8, rank=1, processes=2).returncode != 0
    assert train.read_checkpoint(out / "last.pt")["step"] == 8 and not list(out.glob("*.tmp"))

    shutil.copytree(out, alone)
    train.main([*QUICK, "--out", str(alone)])           # a single process can go on, too
    assert train.read_checkpoint(alone / "last.pt")["step"] == 12 and len(rows(alone)) == 2

    assert drive([*QUICK, "--out", out], processes=2).returncode == 0
    assert same_result(out, in_two[0])


def test_an_error_in_one_process_ends_both_and_is_said(folder, tmp_path):
    broken = folder / "train" / "dog" / "dog_3.JPEG"    # one process alone will read it
    broken.write_bytes(broken.read_bytes()[:20])
    result = drive(folder_flags(folder, tmp_path / "run"), processes=2)
    assert result.returncode != 0 and "train.py\", line" not in result.stderr
    assert result.stderr.count(f"train.py: error: {broken} cannot be decoded") == 1


# ----------------------------------------------------------- Evaluating, predicting, looking inside


def most_likely(path, logits, classes):
    """The lines that prediction prints for an image."""
    chances = logits.softmax(0)
    best = chances.argsort(descending=True)[:5].tolist()
    return [str(path), *(f"{chances[k].item():8.2%}  {classes[k]}" for k in best)]


def test_prediction_names_the_most_likely_classes(finished, tmp_path, capsys):
    images, _ = data.draw_shapes(2, seed=9)
    paths = [tmp_path / f"{i}.png" for i in (0, 1)]
    for image, path in zip(images, paths):
        write_png(image, str(path))
    train.main(["--predict", *map(str, paths), "--checkpoint", str(finished / "last.pt")])

    net = train.load(finished / "last.pt")
    with torch.no_grad():
        logits = net(v2.Normalize(*data.STATISTICS["shapes"])(images.float() / 255))
    lines = [most_likely(path, row, net.classes) for path, row in zip(paths, logits)]
    assert capsys.readouterr().out.splitlines() == sum(lines, [])


def test_a_loaded_network_prepares_images_as_prediction_does(folder, tmp_path, capsys):
    train.main(folder_flags(folder, tmp_path))
    image = folder / "val" / "owl" / "owl_0.JPEG"
    capsys.readouterr()
    train.main(["--predict", str(image), "--checkpoint", str(tmp_path / "last.pt")])

    net = train.load(tmp_path / "last.pt")
    x = net.preprocess(data.read_image(image))
    oracle = v2.Compose([v2.Resize(36), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*data.STATISTICS["imagenet"])])
    torch.testing.assert_close(x[0], oracle(torchvision.io.decode_image(str(image), mode="RGB")))

    with torch.no_grad():
        lines = most_likely(image, net(x)[0], net.classes)
    assert capsys.readouterr().out.splitlines() == lines


def test_evaluation_asks_nothing_of_the_training_images(folder, tmp_path, capsys):
    train.main([*folder_flags(folder, tmp_path), "--train-images", "16"])

    # One image per class is left: fewer than a batch, and than --train-images.
    for label in (folder / "train").iterdir():
        for path in sorted(label.iterdir())[1:]:
            path.unlink()
    train.main(["--evaluate", "--checkpoint", str(tmp_path / "last.pt"),
                "--data-dir", str(folder), "--workers", "0"])
    assert "9 test images of folder: loss" in capsys.readouterr().out


def test_names_on_the_disk_do_not_reach_the_terminal_raw(folder, tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):      # a class and a file whose names turn a terminal red
        (folder / split / "owl").rename(folder / split / "\033[31mowl")
    image = (folder / "val/cat/cat_0.JPEG").rename(folder / "val/cat/\033[31mcat.JPEG")

    train.main(folder_flags(folder, tmp_path))
    assert "\033" not in capsys.readouterr().out
    place = ["--checkpoint", str(tmp_path / "last.pt"), "--data-dir", str(folder), "--workers", "0"]

    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "folder", "--data-dir", str(folder),
                                      "--out", str(tmp_path / "sheet.png")])
    for show, names in ((lambda: train.main(["--evaluate", *place]), 1),
                        (lambda: train.main(["--predict", str(image), *place]), 2), (data.main, 1)):
        show()
        printed = capsys.readouterr().out
        assert "\033" not in printed and printed.count("\\x1b[31m") == names


def test_a_single_class_is_evaluated_without_a_warning(folder, tmp_path, capsys, recwarn):
    for path in [*folder.glob("*/dog"), *folder.glob("*/owl")]:
        shutil.rmtree(path)
    train.main(folder_flags(folder, tmp_path))
    train.main(["--evaluate", "--checkpoint", str(tmp_path / "last.pt"), "--data-dir", str(folder),
                "--workers", "0"])
    printed = capsys.readouterr().out
    assert "top-1 100.00%" in printed and "nan" not in printed
    assert [warning for warning in recwarn if "image decoding" not in str(warning.message)] == []


def test_gates_are_measured_by_class(finished, tmp_path, capsys):
    net = train.load(finished / "last.pt")
    source = data.load_data("shapes", batch_size=500, train_images=500)
    train.look_inside(net, source, tmp_path / "gates.png")
    printed = capsys.readouterr().out.splitlines()

    # The oracle cuts the network with torchvision's tool, and keeps every gate.
    block, gate = create_feature_extractor(net, ["layer3.0.bn3"]), net.layer3[0].gate
    with torch.no_grad():
        s = torch.cat([gate.scale(block(x)["layer3.0.bn3"]).flatten(1)
                       for x, _ in source.test_batches()])
    apart = [s[source.test_labels == label] for label in range(10)]
    means = torch.stack([gates.mean(0) for gates in apart])
    within = torch.stack([gates.var(0, correction=0) for gates in apart]).mean(0).sqrt().mean()
    between = means.std(0, correction=0).mean()

    assert printed[2] == (f"layer3: mean gate {means.mean():.3f}; standard deviation between "
                          f"classes {between:.4f}, between images of a class {within:.4f}")
    assert Image.open(tmp_path / "gates.png").size == (2064, 4 * 108 + 8)
    assert len(net.layer3[0].bn3._forward_hooks) == 0


# ------------------------------------------------------------------------------------------- Report

GATED = dict(model="senetv2", reduction=32, cardinality=4, residual=False)
NARROW = dict(model="senet", reduction=32, residual=False)
TEXTBOOK = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042}     # Student's t, two-sided 95 %


def invent_run(folder, seed, top1, epochs=2, done=2, **settings):
    """A folder as a run leaves it, without weights."""
    settings = dict(dataset="cifar10", model="resnet", recipe="paper", layers="1,1,1,1",
                    stem="imagenet", lr=0.001, epochs=epochs, batch_size=128) | settings
    about = dict(settings=settings | dict(seed=seed), parameters=8036426, device="D", torch="T")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    lines = [f"{epoch + 1},{top1 if epoch + 1 == done else 99},100" for epoch in range(done)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,top1,images_per_second", *lines]) + "\n")


def report_of(folder, capsys):
    train.main(["--report", str(folder)])
    return capsys.readouterr().out


def test_the_report_averages_last_epochs_and_pairs_by_seed(tmp_path, capsys):
    plain, gated = [70.0, 71.0, 75.0], [71.5, 71.0, 78.0]
    for seed in range(3):
        invent_run(tmp_path / "a" / f"plain{seed}", seed, plain[seed])
        invent_run(tmp_path / "b" / f"gated{seed}", seed, gated[seed], **GATED)
    text = report_of(tmp_path, capsys)

    gaps = np.subtract(gated, plain)
    mean, half = gaps.mean(), TEXTBOOK[2] * gaps.std(ddof=1) / 3**0.5
    first, second = (f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
                     for values in (plain, gated))
    assert f"| resnet | 8,036,426 | 3 | {first} | - | - | 77.38 |" in text
    assert (f"| senetv2 r=32 K=4 (= senet r=8) | 8,036,426 | 3 | {second} "
            f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] | - | 78.60 |") in text
    assert "line [99.00, 72.00]" in text and text.count("```mermaid") == 1


def test_runs_of_other_settings_have_a_table_of_their_own(tmp_path, capsys):
    invent_run(tmp_path / "short", 0, 70.0)
    invent_run(tmp_path / "long", 0, 90.0, epochs=3, done=3)
    text = report_of(tmp_path, capsys)
    assert "### cifar10, all training images, 3 epochs" in text and text.count("```mermaid") == 2
    assert "| 1 | 90.00 | - |" in text and "| 1 | 70.00 | - |" in text


def test_what_is_in_no_table_is_named(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "copied", 0, 70.0)
    invent_run(tmp_path / "edited", 0, 60.0)
    invent_run(tmp_path / "running", 3, 80.0, done=1)
    invent_run(tmp_path / "newer recipe", 4, 80.0, recipe="newer")
    invent_run(tmp_path / "newer setting", 4, 80.0, erase=8)
    invent_run(tmp_path / "a list", 4, 80.0)
    (tmp_path / "a list" / "config.json").write_text("[1, 2]")
    invent_run(tmp_path / "without top1", 4, 80.0)
    (tmp_path / "without top1" / "metrics.csv").write_text("epoch,top5\n1,80\n2,80\n")
    (tmp_path / "config.json").write_text("of another program")

    table, rest = report_of(tmp_path, capsys).split("\nRuns that are in no table:\n\n")
    foreign = ["a list", "newer recipe", "newer setting", "without top1"]
    assert "| resnet | 8,036,426 | 1 | 70.00 |" in table and "80.00" not in table
    assert sorted(rest.splitlines()) == sorted([
        f"- {tmp_path}: not a run of train.py", f"- {tmp_path / 'running'}: 1 of 2 epochs",
        *(f"- {tmp_path / name}: not a run of train.py" for name in foreign),
        f"- {tmp_path / 'edited'}: top-1 60.00%; the run of this name in the table has 70.00%",
    ])


def test_a_dropped_setting_changes_neither_table_nor_command(tmp_path, capsys):
    invent_run(tmp_path / "old", 0, 70.0, erase=0)
    invent_run(tmp_path / "new", 1, 72.0)
    text = report_of(tmp_path, capsys)
    assert "| resnet | 8,036,426 | 2 | 71.00 ± 1.41 |" in text and "erase" not in text
    assert "for seed in 0 1; do python train.py --dataset cifar10 --model resnet" in text


@pytest.mark.parametrize("flags", [
    ["--model", "senet", "--reduction", "16", "--dataset", "cifar100", "--epochs", "7"],
    ["--recipe", "strong", "--no-augment", "--model", "resnet", "--dataset", "shapes"],
    ["--residual", "--train-images", "500", "--dataset", "cifar10", "--layers", "1,1,1,1"],
    ["--dataset", "folder", "--data-dir", "mine", "--weight-decay", "5e-5", "--lr", "0.01"],
    ["--dataset", "folder", "--data-dir", "a cat's \"best\" $HOME; *", "--weights", "a b.pt"],
])
def test_the_commands_of_the_report_give_its_settings(flags):
    _, settings = train.parse_args([*flags, "--seed", "3"])
    words = shlex.split(train.command(settings))
    assert words[:2] == ["python", "train.py"]
    assert train.parse_args([*words[2:], "--seed", "3"])[1] == settings


@pytest.mark.parametrize("freedom", [*TEXTBOOK, 31, 500])
def test_intervals_are_those_of_students_t(freedom):
    gaps = np.random.default_rng(freedom).normal(size=freedom + 1)
    top1 = {"net": dict(enumerate(gaps)), "base": dict.fromkeys(range(freedom + 1), 0.0)}
    mean, half = train.paired_difference(top1, "net", "base")
    error = np.std(gaps, ddof=1) / (freedom + 1)**0.5
    assert mean == pytest.approx(np.mean(gaps))
    assert half == pytest.approx(TEXTBOOK.get(freedom, 1.960) * error)


def test_a_single_seed_gives_a_difference_without_an_interval(tmp_path, capsys):
    invent_run(tmp_path / "plain", 0, 70.0)
    invent_run(tmp_path / "narrow", 0, 71.0, **NARROW)
    text = report_of(tmp_path, capsys)
    assert "| 71.00 | +1.00 | - | 77.79 |" in text and "The interval" not in text


@pytest.mark.parametrize("name, base, claim", [(GATED, NARROW, 0.81), (NARROW, {}, 0.41)])
@pytest.mark.parametrize("gaps, verdict", [
    ((4.9, 5.0, 5.1), "excludes 0 and the paper's {claim}."),
    ((-5.1, -5.0, -4.9), "excludes 0 and the paper's {claim}."),
    ((0.5, 0.6, 0.7), "excludes 0 and includes the paper's {claim}."),
    ((-0.1, 0.0, 0.1), "excludes the paper's {claim} and includes 0."),
    ((-3.0, 0.5, 4.0), "includes 0 and the paper's {claim}."),
])
def test_a_verdict_says_what_the_interval_excludes(name, base, claim, gaps, verdict, tmp_path,
                                                   capsys):
    for seed, gap in enumerate(gaps):
        invent_run(tmp_path / f"base{seed}", seed, 70.0, **base)
        invent_run(tmp_path / f"name{seed}", seed, 70.0 + gap, **name)

    lines = [line for line in report_of(tmp_path, capsys).splitlines() if "The interval" in line]
    half = TEXTBOOK[2] * np.std(gaps, ddof=1) / 3**0.5
    low, high = np.mean(gaps) - half, np.mean(gaps) + half
    assert len(lines) == 1 and f" {np.mean(gaps):+.2f} [{low:+.2f}, {high:+.2f}].**" in lines[0]
    assert lines[0].endswith(" The interval " + verdict.format(claim=f"{claim:+.2f}"))


def test_fewer_images_are_not_held_against_the_paper(tmp_path, capsys):
    for seed in range(2):
        invent_run(tmp_path / f"plain{seed}", seed, 70.0, train_images=10000)
        invent_run(tmp_path / f"narrow{seed}", seed, 71.0 + seed, train_images=10000, **NARROW)
    text = report_of(tmp_path, capsys)
    assert "The interval includes 0." in text and "the paper's" not in text
    assert "77.38" not in text and "77.79" not in text


# ----------------------------------------------------------------------------------------- Makefile


def make(*words, **environment):
    """The lines that make prints.  PYTHON=... keeps it from installing into .venv."""
    result = subprocess.run(["make", "--no-print-directory", *words], cwd=HERE, text=True,
                            capture_output=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("target, variable, flag", [
    ("train", "DATA_DIR", "--data-dir"), ("look", "DATA_DIR", "--data-dir"),
    ("train", "OUT", "--out"), ("train", "WEIGHTS", "--weights"),
    ("evaluate", "CHECKPOINT", "--checkpoint"), ("predict", "CHECKPOINT", "--checkpoint"),
    ("predict", "IMAGE", "--predict"),
])
def test_a_value_with_spaces_and_quotes_arrives_whole(target, variable, flag):
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    value = "my cat's  \"best\" & (photos); echo *"
    image = ["IMAGE=needed.jpg"] if target == "predict" and variable != "IMAGE" else []
    words = make("--silent", target, f"PYTHON={show}", f"{variable}={value}", *image)
    words = json.loads(words[-1])
    assert words[words.index(flag) + 1] == value


@pytest.mark.parametrize("words, said", [("predict", "needs IMAGE"),
                                         ("train EPOCH=1", "unknown variable EPOCH;")])
def test_what_make_cannot_use_is_refused(words, said):
    words = ["make", "--no-print-directory", "-n", *words.split(), "PYTHON=python3"]
    result = subprocess.run(words, cwd=HERE, text=True, capture_output=True)
    assert result.returncode != 0 and said in result.stderr and result.stdout == ""


@pytest.mark.parametrize("target", ["train", "evaluate", "test", "experiment1"])
def test_variables_of_the_environment_change_nothing(target):
    noise = dict.fromkeys(("ARGS", "CHECKPOINT", "DATASET", "DATA_DIR", "MODEL", "NPROC", "OUT",
                           "PYTHON", "SEED", "SEEDS", "TRAIN", "WEIGHTS"), "noise")
    assert make("-n", target, **noise) == make("-n", target)


def test_an_inner_make_ignores_what_was_typed_for_the_outer():
    inner = "make --no-print-directory -n test PYTHON=python3 #"
    assert make("--silent", "test", f"PYTHON={inner}", "ARGS=-k x") == ["python3 -m pytest -q"]


@pytest.mark.parametrize("words, count, said", [
    ("paper", 24, ("--dataset cifar100 --layers 3,4,6,3 --model senetv2 --seed 1",
                   "--dataset cifar10 --layers 1,1,1,1 --model senet --reduction 16 --seed 0")),
    ("paper LAYERS=1,1,1,1 DATASET=imagenet EPOCHS=2", 8, ("--layers 1,1,1,1 --epochs 2",)),
    ("experiment1", 4, ("cifar10", "--model senet --reduction 16")),
    ("experiment2", 8, ("cifar100", "--reduction 2")), ("experiment3", 6, ("--model senetv2",)),
    ("experiment4", 4, ("--residual",)), ("experiment5", 8, ("--model vit",)),
])
def test_experiments_are_lists_of_commands_that_parse(words, count, said):
    lines = make(*words.split(), "PYTHON=python3", "TRAIN=echo", "SEEDS=0 1")
    parsed = [train.parse_args(shlex.split(line)) for line in lines]
    assert len(lines) == len({args.out for args, _ in parsed}) == count
    assert all(any(part in line for line in lines) for part in said)

    seeds = [settings["seed"] for _, settings in parsed]
    assert seeds == [0] * (count // 2) + [1] * (count // 2)         # whole comparisons first


# ---------------------------------------------------------------------------------- README and docs

PAGES = [page for page in (HERE / "README.md", *sorted(HERE.glob("docs/*.md")),
                           HERE / "results" / "README.md") if page.exists()]
CODE = [pytest.param(code, id=f"{page.name}-{number}") for page in PAGES for number, code in
        enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_pages_link_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|href|srcset)=\"([^\"#]+)", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_pages_name_tests_that_exist():
    named = {name for page in PAGES for name in
             re.findall(r"\b(test_\w+_\w+_\w+)\b(?!\.py)", page.read_text())}
    assert len(named) >= 6 and {name for name in named if name not in globals()} == set()


@pytest.mark.parametrize("code", CODE)
def test_the_python_of_the_pages_runs(code, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "assets", tmp_path / "assets")
    shutil.copytree(finished, tmp_path / "runs" / "shapes-senetv2-paper-seed0")     # `make train`
    exec(compile(code, "a page", "exec"), {})


def test_the_four_lines_of_the_readme_are_the_gate():
    lines, = re.findall(r"^```py\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.DOTALL)
    gate, x = AggregatedSqueezeExcitation(64, 8).double(), torch.randn(2, 64, 5, 5).double()
    names = dict(torch=torch, F=F, x=x, reduce=gate.reduce, expand=gate.expand)
    exec(lines, names)
    torch.testing.assert_close(names["y"], gate(x))


def test_the_results_are_what_the_report_prints(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    train.main(["--report", "results"])
    report = Path("results", "about.md").read_text() + capsys.readouterr().out
    assert Path("results", "README.md").read_text() == report


def test_the_readme_quotes_rows_of_the_results():
    rows = [line for line in (HERE / "README.md").read_text().splitlines()
            if line.startswith("|") and " ± " in line]
    assert rows and set(rows) <= {*(HERE / "results" / "README.md").read_text().splitlines()}


def test_the_readme_is_short():
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 220 and len(text.split()) <= 2000


# --------------------------------------------------------------------------- The scripts themselves

THREE = ("senetv2.py", "data.py", "train.py")
LONGEST = {name: 20 for name in THREE} | {Path(__file__).name: 25}      # lines without a breath


def stretches(path):
    """(first line, length) of each stretch without a blank or comment line, settings apart.

    Settings are the dicts and tuples of the module itself.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    breaths = {number for number, line in enumerate(lines, start=1)
               if not line.strip() or line.strip().startswith("#")}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Dict, ast.Tuple)):
            breaths.update(range(node.lineno, node.end_lineno + 1))

    ends = [0, *sorted(breaths), len(lines) + 1]
    return [(before + 1, after - before - 1) for before, after in zip(ends, ends[1:])]


@pytest.mark.parametrize("name", ["senetv2.py", "data.py"])
def test_the_first_two_scripts_import_none_of_the_others(name):
    tree, imported = ast.parse((HERE / name).read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {(node.module or "").split(".")[0], *("." * bool(node.level))}
    assert "torch" in imported and not imported & {"senetv2", "data", "train", "test_senetv2", "."}


@pytest.mark.parametrize("name", LONGEST)
def test_no_line_is_longer_than_100_columns(name):
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 100] == []


@pytest.mark.parametrize("name", LONGEST)
def test_no_stretch_of_code_runs_long_without_a_breath(name):
    found = [stretch for stretch in stretches(HERE / name) if stretch[1] > LONGEST[name]]
    assert found == []


# --------------------------------------------------------------------------------------- make bench


def training_step(net, batch_size, image_size, device):
    """A function that makes one training step: forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        with train.autocast(device):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def interleaved(functions, seconds, device, repeats=1):
    """Seconds per call, (rounds, functions); a round times all in turn: drift hits all alike."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for function in functions:
        for _ in range(3):      # allocation, compilation, choice of kernels
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


def bench(argv):
    """Print the speed of training, of the loader and of the gates, as median [quartiles]."""
    parser = argparse.ArgumentParser(prog="test_senetv2.py bench",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--layers", type=train.four_numbers, default="3,4,6,3", help="bottlenecks per stage")
    add("--stem", choices=senetv2.STEMS, default="imagenet", help="as in train.py")
    add("--batch-size", type=train.positive, default=128, help="images per step")
    add("--image-size", type=train.positive, default=32, help="pixels per side")
    add("--compile", action="store_true", help="use torch.compile")
    add("--seconds", type=train.amount, default=60, help="how long to measure training")
    add("--dataset", choices=data.DATASETS, default="shapes", help="of the loader")
    add("--data-dir", default="data", help="where its files are")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{train.precision(device)}; median [quartiles]")
    bench_networks(args, device)
    bench_loader(args, device)
    bench_cardinality(device)


def bench_networks(args, device):
    """What the gates cost in a training step."""
    steps = []
    for name in OURS:
        net = build_model(name, 10, tuple(map(int, args.layers.split(","))), args.stem)
        net.to(device, memory_format=torch.channels_last)
        net = torch.compile(net) if args.compile else net
        steps.append(training_step(net, args.batch_size, args.image_size, device))
    times = interleaved(steps, args.seconds, device, repeats=10 if device.type == "cuda" else 1)

    print(f"\ntraining steps of {args.batch_size} images, {args.image_size}x{args.image_size}, "
          f"{args.stem} stem, layers {args.layers}{', compiled' if args.compile else ''}; "
          f"{len(times)} rounds\n\n| network | images/s | speed ÷ resnet |\n|---|---|---|")
    for name, seconds in zip(OURS, times.T):
        print(f"| {name} | {quartiles(args.batch_size / seconds, ',.0f')} "
              f"| {quartiles(times[:, 0] / seconds, '.3f')} |")


def bench_loader(args, device):
    """The loader alone, and its share of a training step of SENetV2-50."""
    size = args.image_size if args.image_size > 32 else 224         # of folders
    with contextlib.closing(data.load_data(
            args.dataset, args.data_dir, device=device, batch_size=args.batch_size,
            image_size=size, workers=train.OPTIONS["workers"][0])) as source:
        if not source.steps:
            raise SystemExit(f"test_senetv2.py: error: {args.dataset} has {source.train_size} "
                             f"training images, fewer than a batch of {args.batch_size}")

        def some_batches():
            return sum(1 for _ in zip(range(20), source.train_batches(0)))

        net = build_model("senetv2").to(device, memory_format=torch.channels_last)
        step = training_step(net, args.batch_size, source.view([0]).shape[-1], device)
        count = some_batches()
        loading, training = interleaved([some_batches, step], 20, device).median(0).values
    print(f"\nloader of {args.dataset}: {count * args.batch_size / loading:,.0f} images/s in "
          f"batches of {args.batch_size}; it takes {loading / count / training:.2%} of a training "
          "step of SENetV2-50")


def bench_cardinality(device):
    """What stacking the K layers buys as K grows, at the same total width."""
    x = torch.randn(32, 1024, 14, 14, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def both_ways(cardinality, reduction):
        stacked = AggregatedSqueezeExcitation(1024, reduction, cardinality).to(device)
        apart = LiteralBranches(1024, reduction, cardinality).to(device)

        def literal():      # with the squeeze of ours, so that the layers alone make the difference
            return x * apart.excite(x.permute(0, 2, 3, 1).mean((1, 2)))
        return [lambda: stacked(x).backward(x), lambda: literal().backward(x)]

    sizes = [(cardinality, 8 * cardinality) for cardinality in (1, 4, 16, 64)]
    times = 1000 * interleaved([way for size in sizes for way in both_ways(*size)], 15, device)
    print(f"\na gate of 128 hidden units on {tuple(x.shape)}, forward and backward, "
          "milliseconds\n\n| K | r | one matrix | K layers and a concatenation |\n"
          "|---|---|---|---|")
    for row, (cardinality, reduction) in enumerate(sizes):
        print(f"| {cardinality} | {reduction} | {quartiles(times[:, 2 * row], '.2f')} "
              f"| {quartiles(times[:, 2 * row + 1], '.2f')} |")


# -------------------------------------------------------------------------------------- make faults

FAULTS = ("SIGKILL", "SIGTERM", "SIGTERM to the group", "SIGHUP", "Ctrl-C twice", "full disk",
          "second process")
MOMENTS = ("start-up", "a step", "a save", "evaluation", "the last step")
FAULT_STEPS = 8         # of a run: two epochs of four


def faults(argv):
    """Interrupt runs in every way at moments drawn from a seed, and print how many survived.

    Each trial disturbs a run and then gives the same command once more.  It survives if the first
    command ends without a traceback and leaves no damaged checkpoint, and if the second one ends
    with the result of an undisturbed run, bit for bit.  It forks, so it does not run on Windows.
    """
    parser = argparse.ArgumentParser(prog="test_senetv2.py faults",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--trials", type=train.positive, default=100, help="runs to disturb")
    parser.add_argument("--seed", type=train.natural, default=0, help="of the moments")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    data.draw_shapes = functools.cache(data.draw_shapes)    # drawn once, here: forks inherit it
    data.draw_shapes(8000, seed=1), data.draw_shapes(1000, seed=2)
    rng, start = np.random.default_rng(args.seed), time.monotonic()
    cases = [(fault, source, world)
             for fault in FAULTS for source in ("shapes", "folder") for world in (1, 2)]
    tried, survived = dict.fromkeys(cases, 0), dict.fromkeys(cases, 0)

    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        draw_folder(root / "images")
        for source in ("shapes", "folder"):
            for world in (1, 2):
                codes, text = start_run(root, f"{source}{world}", source, world)
                assert codes == [0] * world, text

        for number in range(args.trials):
            case = cases[number % len(cases)]
            moment, step = str(rng.choice(MOMENTS)), int(rng.integers(1, FAULT_STEPS))
            trouble = trial(root, *case, moment, step, victim=int(rng.integers(case[2])))
            tried[case] += 1
            survived[case] += not trouble
            if trouble:
                print(f"{case}, in {moment}, step {step}: {trouble}", flush=True)

    print(f"\n{sum(survived.values())} of {args.trials} survived (seed {args.seed}, "
          f"{time.monotonic() - start:.0f} s)\n\n| survived / tried | shapes, 1 process "
          "| shapes, 2 processes | folder, 1 process | folder, 2 processes |\n"
          "|---|---|---|---|---|")
    for fault in FAULTS:
        cells = [f"{survived[fault, *rest]}/{tried[fault, *rest]}"
                 for rest in (("shapes", 1), ("shapes", 2), ("folder", 1), ("folder", 2))]
        print(f"| {fault} | {' | '.join(cells)} |")
    sys.exit(sum(survived.values()) < args.trials)


def draw_folder(root):
    """A folder of drawn figures: two classes of 16 training and 8 test images."""
    images, labels = data.draw_shapes(1000, seed=2)
    for split, first, count in (("train", 0, 16), ("val", 16, 8)):
        for label, name in enumerate(("bar", "cross")):
            (root / split / name).mkdir(parents=True)
            for i, image in enumerate(images[labels == label][first:first + count]):
                write_png(image, str(root / split / name / f"{i}.png"))


def trial(root, fault, source, world, moment, step, victim):
    """What went wrong, in words, or None."""
    name = "trial"
    shutil.rmtree(root / name, ignore_errors=True)
    codes, text = start_run(root, name, source, world, fault, moment, step, victim)
    lines = text.splitlines()
    if "Traceback" in text or len(lines) > world + (fault == "second process"):
        return f"it said: {text.strip()[-500:]}"
    if ("another process is training in" in text) != (fault == "second process"):
        return f"a second process was not refused, or a first one was: {text.strip()[-500:]}"
    if fault == "second process" and codes != [0] * world:
        return f"the first process ended with {codes}"

    codes, text = start_run(root, name, source, world)      # it would refuse a damaged checkpoint
    if codes != [0] * world or text:
        return f"the second command ended with {codes}: {text.strip()[-500:]}"
    try:
        assert same_result(root / name, root / f"{source}{world}")
    except AssertionError:
        return "the result is another one"
    return None


def start_run(root, name, source, world, *fault):
    """Fork `world` processes that train; their exit codes, and what they wrote to stderr.

    As torchrun does, end the others once one has failed.
    """
    flags = ["--model", "shufflenet_v2_x0_5", "--epochs", "2", "--batch-size", "8",
             "--checkpoint-minutes", "1e-6", "--device", "cpu", "--out", str(root / name)]
    flags += (["--dataset", "folder", "--data-dir", str(root / "images"), "--image-size", "32",
               "--workers", "2"] if source == "folder" else ["--train-images", "32"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                       "WORLD_SIZE": str(world)}
    pids = []
    with open(root / "stderr", "w+") as stderr:
        for rank in range(world):
            if (pid := os.fork()) == 0:
                in_child(lambda: (os.setpgid(0, pids[0] if pids else 0),
                                  train_in_fork(rank, world, flags, *fault)), stderr)
            pids.append(pid)
            os.setpgid(pid, pids[0])        # here and there: the second one needs the first's group

        codes = {}
        while len(codes) < world:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0:
                for other in set(pids) - codes.keys():
                    wait_or_kill(other, codes)
        stderr.seek(0)
        return [codes[pid] for pid in pids], stderr.read()


def wait_or_kill(pid, codes, patience=5.0):
    """Wait for a process whose partner has failed, and kill it if it hangs on the partner."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            codes[pid] = os.waitstatus_to_exitcode(status)
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


def in_child(action, stderr):
    """Run `action` in a forked process as if it were a program, and never return."""
    os.dup2(stderr.fileno(), 2)
    sys.stdout = open(os.devnull, "w")
    code = 1
    try:
        action()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_in_fork(rank, world, flags, fault=None, moment=None, step=None, victim=None):
    """Train; process `victim` meets `fault` at `moment` (a step and a save: those of `step`)."""
    os.environ["RANK"] = str(rank)
    train.RANK, train.WORLD = rank, world
    if moment == "a save" or fault == "full disk":      # process 0 alone writes
        victim = 0
    if fault and rank == victim:
        place_of = {"start-up": (train, "describe", 1),
                    "a step": (train.Run, "count", step),
                    "the last step": (train.Run, "count", FAULT_STEPS),
                    "evaluation": (train.Run, "stop_if_asked", FAULT_STEPS // 2 + 1),
                    "a save": (os, "fsync", step)}
        owner, method, turn = place_of[moment]
        before, calls = getattr(owner, method), itertools.count(1)

        def wrapped(*args, **options):
            if next(calls) == turn:
                strike_with(fault, flags)
            return before(*args, **options)
        setattr(owner, method, wrapped)
    train.main(flags)


def strike_with(fault, flags):
    if fault == "full disk":        # no file may grow beyond this, less than a checkpoint
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    elif fault == "second process":
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        subprocess.run([sys.executable, "train.py", *flags], cwd=HERE, env=environment,
                       stdout=subprocess.DEVNULL)
    elif fault == "SIGTERM to the group":
        os.killpg(0, signal.SIGTERM)
    elif fault == "Ctrl-C twice":
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGINT)
    else:
        os.kill(os.getpid(), getattr(signal, fault))


if __name__ == "__main__":
    commands = {"bench": bench, "faults": faults}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit("usage: python test_senetv2.py bench|faults [--help]; the tests: make test")
    commands[sys.argv[1]](sys.argv[2:])
