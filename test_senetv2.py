"""Chapter 4: the claims of README and docstrings, each against an oracle worked out independently.

    make test                                    all of them, in minutes on two cores
    make test ARGS='-k literal_branches'         some of them
    make bench, make faults                      the last two chapters: measure, and kill
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import hashlib
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
import time
import traceback
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image       # torchvision brings it
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2

import data
import senetv2
import train
from senetv2 import OURS, AggregatedSqueezeExcitation, SqueezeExcitation, build_model

HERE = Path(__file__).parent
SMALL = (1, 1, 1, 1)

# what torch says of a hostile file
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")

# ------------------------------------------------------------------------------------------ Helpers


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)        # every test draws the same numbers


@pytest.fixture(autouse=True, scope="session")
def shapes_drawn_once():
    data.draw_shapes = functools.cache(data.draw_shapes)        # they take seconds


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """There equality to the bit is promised.  A test that needs the GPU passes --device cuda."""
    train.OPTIONS["device"] = ("cpu", *train.OPTIONS["device"][1:])


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that computes the same bits each time; what main() sets for it ends with the test."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


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


def in_memory(train, test, classes, statistics=((0, 0, 0), (1, 1, 1)), **options):
    """A data set of these (images, labels); without statistics its batches are in 0..1."""
    options = dict(device="cpu", batch_size=32, seed=0, augment=True, rank=0, world=1) | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.STATISTICS, "shapes", statistics)
        return data.InMemory("shapes", train, test, classes, **options)


def numbered(**options):
    """A data set whose image i is filled with the value i + 1, to see where images go."""
    images = torch.arange(1, 201, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 32, 32)
    labels = torch.arange(200) % 10
    return in_memory((images, labels), (images[:50], labels[:50]), list("abcdefghij"), **options)


def joined(batches):
    """Batches as a single one: images in 0..1 (or normalised), labels."""
    return tuple(map(torch.cat, zip(*batches)))


def assert_equal(actual, expected):
    """Bit for bit, also within lists and dicts."""
    (values, form), (others, other_form) = map(tree_flatten, (actual, expected))
    assert form == other_form
    assert all(torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y
               for x, y in zip(values, others))


def no_network(*args, **kwargs):
    raise URLError("no network")


def save_image(image, path, kind="PNG"):
    v2.functional.to_pil_image(image).save(path, kind)


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
                save_image(image, tmp_path / split / label / f"{label}_{i}.JPEG",
                           "PNG" if i % 4 == 2 else "JPEG")
    return tmp_path


def folder_flags(folder, out, workers=0, epochs=1):
    """A run on the images of `folder`, of 4 steps per epoch; its own folder comes last."""
    return ["--dataset", "folder", "--data-dir", str(folder), "--layers", "1,1,1,1", "--image-size",
            "32", "--batch-size", "8", "--epochs", str(epochs), "--workers", str(workers),
            "--device", "cpu", "--out", str(out)]


def load_folder(root, **options):
    return data.load_data("folder", root, **dict(batch_size=8, image_size=32) | options)


def add_image(root):
    shutil.copy(root / "train" / "cat" / "cat_0.JPEG", root / "train" / "dog" / "another.JPEG")


def rename_class(root):
    for split in ("train", "val"):
        (root / split / "owl").rename(root / split / "elk")


def passes(source):
    """All batches of two epochs with the test images between them, as a run sees them."""
    batches = [*source.train_batches(0), *source.test_batches(), *source.train_batches(1)]
    assert sum(len(labels) for _, labels in batches) == 2 * source.steps * source.batch_size + 9
    return batches


def end_workers(source):
    """End workers that failed: left to the garbage collector, it can take ten seconds."""
    if source.loader._iterator:
        source.loader._iterator._shutdown_workers()


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


@pytest.mark.parametrize("sizes", [(64, 8, 4), (60, 7, 3), (256, 32, 1)])
def test_the_wide_matrix_trains_like_the_literal_branches(sizes):
    literal = LiteralBranches(*sizes).double()
    ours = AggregatedSqueezeExcitation(*sizes[:2], cardinality=sizes[2]).double()

    def stacked(tensor):        # the literal branches' weights or gradients as those of one layer
        wide = zip(*(map(tensor, branch.parameters()) for branch in literal.branches))
        return [*map(torch.cat, wide), *map(tensor, literal.expand.parameters())]

    for mine, theirs in zip(ours.parameters(), stacked(lambda p: p.data)):
        mine.data = theirs.clone()

    # the outputs count as logits, one class per number
    a = torch.randn(8, sizes[0], 5, 4, dtype=torch.float64, requires_grad=True)
    b, labels = a.detach().clone().requires_grad_(), torch.randint(sizes[0] * 20, (8,))
    losses, expected = (train_steps(nn.Sequential(net, nn.Flatten()), [(x, labels)] * 10)
                        for net, x in ((ours, b), (literal, a)))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close([ours(b), b.grad], [literal(a), a.grad])
    torch.testing.assert_close([p.grad for p in ours.parameters()], stacked(lambda p: p.grad))
    torch.testing.assert_close([*ours.parameters()], stacked(lambda p: p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, sizes, residual", [
    (SqueezeExcitation, dict(reduction=4), False),
    (AggregatedSqueezeExcitation, dict(reduction=16, cardinality=4), True)])
def test_the_gate_is_torchvisions_and_residual_adds_the_input(kind, sizes, residual, dtype):
    theirs = torchvision.ops.SqueezeExcitation(64, 16).to(dtype)        # of 1x1 convolutions
    ours, x = kind(64, residual=residual, **sizes).to(dtype), torch.randn(2, 64, 6, 5, dtype=dtype)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        mine.data = other.data.reshape(mine.shape)
    expected, last = theirs(x) + residual * x, ours(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)

    others = (torch.compile(ours, fullgraph=True, backend="aot_eager"), copy.deepcopy(ours),
              torch.export.export(ours, (x,)).module())
    for y in (ours(x), last, *(other(x) for other in others)):
        torch.testing.assert_close(y, expected)
    with pytest.raises(AssertionError, match=r"\(B, C, H, W\), not .*64, 6, 5"):
        ours(x[0])
    with pytest.raises(TypeError):
        kind(64, 8, True)       # which of residual and cardinality would that be?
    scale = ours.scale(x)       # one factor per channel, in its range
    assert scale.shape == (2, 64, 1, 1) and residual < scale.min() < scale.max() < residual + 1


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
    block, x, seen = AggregatedSqueezeExcitation(64, 8), torch.randn(3, 64, 7, 5), []
    block.reduce.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(x)
    torch.testing.assert_close(seen, [F.adaptive_avg_pool2d(x, 1).flatten(1)])      # (3, 64)


@pytest.mark.parametrize("cardinality, count", [(1, 4_360), (4, 16_672)])
def test_the_parameters_of_a_gate_grow_with_its_width(cardinality, count):
    width = cardinality * 256 // 32
    by_hand = 2 * 256 * width + width + 256
    block = AggregatedSqueezeExcitation(256, 32, cardinality=cardinality)
    assert parameters(block) == by_hand == count


@pytest.mark.parametrize("name, options, said", [
    ("senetv2", dict(reduction=512), "reduction is 512.* between 1 and .*channels, 256"),
    ("senet", dict(reduction=0), "reduction is 0.* between 1 and .*channels, 256"),
    ("senetv2", dict(cardinality=0), "cardinality is 0.* 1 or more"),
    ("senet", dict(layers=(1, 1, 1)), r"\(1, 1, 1\); give four positive"),
    ("senet", dict(layers=(1, 1, 0, 1)), r"\(1, 1, 0, 1\); give four positive"),
    ("senet", dict(layers="1,1,1,1"), "'1,1,1,1'; give four positive"),
    ("resnet", dict(stem="tiny"), "'tiny'.* imagenet, cifar"),
    ("senet3", {}, "'senet3'.* resnet, senet, senetv2, .*convnext_tiny, vit"),
    ("vit", dict(image_size=130), "16x16.* 130"),
])
def test_impossible_networks_are_refused_with_the_way_out(name, options, said):
    with pytest.raises(ValueError, match=rf"\A.*{said}.*\Z"):       # one line: . is no newline
        build_model(name, **options)


# ------------------------------------------------------------------------ The network and its table


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 32)])
@pytest.mark.parametrize("name", OURS)
def test_stages_have_resnets_shapes(name, stem, side):
    nodes = ["maxpool", "layer1", "layer2", "layer3", "layer4", "fc"]
    cut = create_feature_extractor(build_model(name, 7, SMALL, stem), nodes)
    *maps, logits = cut(torch.randn(2, 3, 32, 32)).values()
    assert logits.shape == (2, 7)
    assert [x.shape for x in maps] == [
        (2, channels, side // stride, side // stride)
        for channels, stride in ((64, 1), (256, 1), (512, 2), (1024, 4), (2048, 8))]


def test_senetv2_is_a_senet_bit_for_bit_through_training():
    batches, states = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)], []
    for name, options in (("senetv2", dict(reduction=32, cardinality=4)),
                          ("senet", dict(reduction=8))):
        torch.manual_seed(3)
        net = build_model(name, 10, SMALL, **options)
        states.append([train_steps(net, batches), net.state_dict()])
    assert_equal(*states)


@pytest.mark.parametrize("name", OURS)
def test_the_trunk_has_torchvisions_names_and_from_one_seed_its_weights(name):
    theirs = ResNet(Bottleneck, SMALL, 10).state_dict()
    torch.manual_seed(0)
    ours = build_model(name, 10, SMALL).state_dict()
    assert_equal({key: ours[key] for key in ours if ".gate." not in key}, dict(theirs))
    assert len(ours) - len(theirs) == 4 * 4 * (name != "resnet")    # 2 weights, 2 biases per gate


def test_the_bottleneck_gates_the_last_norm_before_the_addition():
    gated = build_model("senet", 10, SMALL, reduction=16).layer2[0].double()
    plain = Bottleneck(256, 128, stride=2, downsample=gated.downsample).double()
    plain.load_state_dict(gated.state_dict(), strict=False)
    w1, b1, w2, b2 = gated.gate.parameters()
    plain.bn3.register_forward_hook(lambda module, args, out: torch.einsum(
        "bchw,bc->bchw", out, 1 / (1 + torch.exp(
            -(out.flatten(2).mean(2) @ w1.T + b1).clamp(min=0) @ w2.T - b2))))      # literally

    x = torch.randn(2, 256, 8, 8, dtype=torch.float64, requires_grad=True)
    outputs = gated(x), plain(x)
    torch.testing.assert_close(*outputs)
    learnt = [x, w1, b1, w2, b2, gated.downsample[0].weight]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), learnt) for y in outputs))


@pytest.mark.parametrize("name", OURS)
def test_zero_init_starts_the_last_norms_at_0_and_changes_nothing_else(name):
    states = []
    for zero_init in (False, True):
        torch.manual_seed(1)
        net = build_model(name, 10, (1, 2, 1, 1), zero_init=zero_init)
        states.append(net.state_dict())
    usual, started = states
    last = {key for key in usual if key.endswith("bn3.weight")}
    assert len(last) == 5 and all(usual[key].eq(1).all() for key in last)
    assert_equal(started, type(usual)(
        (key, torch.zeros_like(value) if key in last else value) for key, value in usual.items()))
    block, x = net.layer2[1], torch.randn(2, 512, 4, 4)     # a block without downsample
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("name", senetv2.GATES)
def test_gates_are_called_as_modules_so_hooks_see_them(name):
    net, seen = build_model(name, 10), []
    for block in net.modules():
        if isinstance(block, Bottleneck):
            block.gate.register_forward_hook(
                lambda gate, inputs, out: seen.append((gate, out, out.clone())))
    net(torch.randn(2, 3, 32, 32))
    assert len({gate for gate, _, _ in seen}) == len(seen) == 16

    # What a hook keeps stays as it was: nothing is added to it in place.
    assert all(torch.equal(out, copied) for _, out, copied in seen)


@pytest.mark.parametrize("name", senetv2.PEERS)
@pytest.mark.parametrize("size", [32, 224])
def test_peers_are_torchvisions_and_fit_both_image_sizes(name, size):
    with torch.device("meta"):
        net = build_model(name, 7, **(dict(image_size=size) if name == "vit" else {}))
        assert net(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert type(net).__module__.startswith("torchvision.models")


@pytest.mark.parametrize("name", OURS)
def test_a_single_batch_is_learnt_by_heart(name):
    images, labels = data.draw_shapes(20, seed=3)
    x, net = images.float() / 127.5 - 1, build_model(name, 10, SMALL)
    train_steps(net, [(x, labels)] * 40)
    with torch.no_grad():
        assert (net(x).argmax(1) == labels).all()


@pytest.mark.parametrize("layers, classes, paper", [((3, 4, 6, 3), 100, (1.28, 5.05, 5.05)),
                                                    (SMALL, 10, (0.35, 1.40, 1.40))])
def test_gates_cost_what_they_do_by_hand_in_the_paper_the_readme_and_the_table(layers, classes,
                                                                               paper, capsys):
    senetv2.print_table(32, "imagenet")
    table, readme = capsys.readouterr().out, (HERE / "README.md").read_text()
    with torch.device("meta"):
        plain, published = ResNet(Bottleneck, layers, classes), build_model("resnet", 1000)
        nets = [build_model("senet", classes, layers), build_model("senetv2", classes, layers),
                build_model("senet", classes, layers, reduction=8)]
    count, work = parameters(plain), senetv2.multiply_adds(plain, 32)
    assert f"{count:,}" in table and f"{count:,}" in readme

    channels = np.repeat((256, 512, 1024, 2048), layers)        # of each bottleneck
    labels = "senet r=32", "senetv2 r=32 K=4", "senet r=8"
    for label, net, cardinality, claim in zip(labels, nets, (1, 4, 4), paper):
        units = cardinality * (channels // 32)      # two dense layers with biases, C -> units -> C
        added = (2 * channels * units + units + channels).sum()
        assert parameters(net) - count == added
        assert senetv2.multiply_adds(net, 32) - work == (2 * channels * units).sum()

        # The paper's two decimals are of a difference of two rounded figures.
        assert added / 1e6 == pytest.approx(claim, abs=0.01) and f"{claim:.2f} M" in table
        assert f"{label:22}{count + added:12,}{added:11,} {added / count:+8.1%}" in table
        assert f"{count + added:,}" in readme
    giga = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]
    assert round(senetv2.multiply_adds(published, 224) / 1e9, 3) == giga


# ----------------------------------------------------------------------------------- Sets in memory


def test_a_batch_is_a_function_of_seed_epoch_and_step_and_shows_no_image_twice():
    images, labels = joined(numbered().train_batches(0))
    numbers = (images[:, 0, 16, 16] * 255).round().long() - 1       # the padding is 0
    assert len(set(numbers.tolist())) == len(images) == 6 * 32      # the last batch is dropped
    assert torch.equal(labels, numbers % 10)

    for step in (0, 4):
        late = joined(numbered().train_batches(0, first_step=step))
        assert_equal(late, (images[step * 32:], labels[step * 32:]))
    for seed, epoch in ((0, 1), (1, 0)):
        others, other_labels = joined(numbered(seed=seed).train_batches(epoch))
        assert not torch.equal(others, images) and not torch.equal(other_labels, labels)


def test_processes_share_each_batch_and_some_get_an_empty_one(folder):
    for load in (numbered, functools.partial(load_folder, folder, workers=1)):
        shares, whole = [load(rank=rank, world=4) for rank in range(4)], load()
        batches = zip(*(share.train_batches(0) for share in shares))
        assert_equal([joined(parts) for parts in batches], list(whole.train_batches(0)))

        parts = [list(share.test_batches()) for share in shares]
        seen, expected = (sorted((label.item(), image.numpy().tobytes())
                                 for image, label in zip(*joined(batches)))
                          for batches in (sum(parts, []), whole.test_batches()))
        assert seen == expected and {len(part) for part in parts} == {2}

    empty, _ = parts[1][1]      # of 9 images in batches of 8
    net = build_model("senetv2", 3, SMALL).eval()
    assert empty.shape == (0, 3, 32, 32) and net(empty).shape == (0, 3)


def test_train_images_takes_the_first_of_a_seeded_shuffle():
    small, large = (set(data.subset(1000, count, seed=4).tolist()) for count in (50, 200))
    assert len(small) == 50 and small < large
    assert small != set(data.subset(1000, 50, seed=5).tolist())
    assert data.load_data("shapes", train_images=128).train_size == 128


def test_augmentation_is_a_function_of_seed_epoch_and_index_and_can_be_turned_off(folder):
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    save_image(ramp, folder / "train" / "cat" / "cat_0.JPEG")           # it grows to the right
    add_image(folder)                                                   # image 12 is its copy
    for load in (numbered, functools.partial(load_folder, folder)):
        crops, again, *others = (load(seed=seed).view(np.arange(13), epoch)
                                 for seed, epoch in ((0, 3), (0, 3), (1, 3), (0, 4)))
        assert_equal(crops, again)
        assert not any(torch.equal(crops, other) for other in others)

        for augment in (True, False):
            source = load(augment=augment)
            originals = source.normalise(source.view(np.arange(source.train_size)))
            seen, _ = joined([*source.train_batches(0), *source.train_batches(1)])
            seen, originals = ({image.numpy().tobytes() for image in images}
                               for images in (seen, originals))
            assert (len(seen) > source.train_size) == augment == (not seen <= originals)

    # In a folder, each image has a crop of its own, flipped now and then.
    assert not torch.equal(crops[0], crops[12])
    rows = [source.view([0], epoch)[0, 0, 16].int() for epoch in range(20)]
    assert {(row[-1] > row[0]).item() for row in rows} == {True, False}


def test_crops_and_flips_are_torchvisions_and_uniform():
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)     # no two crops are alike
    padded, known, count = F.pad(picture, (4,) * 4), {}, 4000
    for top, left, flip in np.ndindex(9, 9, 2):
        crop = v2.functional.crop(padded, top, left, 32, 32)
        crop = v2.functional.horizontal_flip(crop) if flip else crop
        known[crop.numpy().tobytes()] = top, left, flip

    pictures, labels = picture.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)
    source = in_memory((pictures, labels), (pictures[:1], labels[:1]), ["a"])
    seen = [known[image.numpy().tobytes()] for image in source.view(np.arange(count), epoch=0)]
    for draws, choices in zip(zip(*seen), (9, 9, 2)):
        expected = count / choices
        counts, spread = np.bincount(draws), math.sqrt(expected * (1 - 1 / choices))
        assert len(counts) == choices and (abs(counts - expected) < 4 * spread).all()
    assert len(set(seen)) == 9 * 9 * 2


def test_another_pixel_label_or_class_is_another_set_in_memory():
    def identity(changed=None):
        parts = [torch.zeros(count, *shape, dtype=torch.uint8) for count, shape in
                 ((4, (3, 32, 32)), (4, ()), (2, (3, 32, 32)), (2, ()), (5, ()))]
        if changed is not None:
            parts[changed].view(-1)[-1] = 1
        return in_memory(parts[:2], parts[2:4], str(parts[4].tolist()), batch_size=2).identity

    assert identity() == identity()
    assert len({identity(changed) for changed in (None, 0, 1, 2, 3, 4)}) == 6


def test_the_contact_sheet_pairs_before_and_after_per_class():
    sheet = data.contact_sheet(numbered())
    assert sheet.shape == (3, 10 * 68 + 4, 10 * 68 + 4) and sheet.dtype == torch.uint8
    tiles = sheet[0, 4:, 4:].unfold(0, 64, 68).unfold(1, 64, 68)        # (10, 10, 64, 64)
    fill = torch.arange(1, 51).reshape(5, 10).T     # image i has class i % 10 and the value i + 1
    assert (tiles[:, ::2] == fill[..., None, None]).all()
    assert (tiles[:, 1::2].amax((2, 3)) == fill).all() and (tiles[:, 1::2] == 0).any()


# --------------------------------------------------------------------------------- Shapes and CIFAR


def test_shapes_are_always_the_same_with_ten_equal_classes_and_the_tables_statistics():
    images, labels = data.draw_shapes(12000, seed=1)
    assert_equal(data.draw_shapes.__wrapped__(12000, seed=1), (images, labels))     # drawn anew
    assert torch.bincount(labels).tolist() == [1200] * 10
    deviation, mean = torch.std_mean(images.double() / 255, (0, 2, 3))
    known = torch.tensor(data.STATISTICS["shapes"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([mean, deviation]), known, atol=6e-5, rtol=0)


def test_a_linear_classifier_on_the_pixels_fails_on_shapes():
    (x, y), (test_x, test_y) = data.draw_shapes(12000, seed=1), data.draw_shapes(1000, seed=2)
    x, test_x = (F.pad(images.flatten(1).float() / 127.5 - 1, (0, 1), value=1)
                 for images in (x, test_x))
    products, sums = x.T @ x, x.T @ F.one_hot(y).float()
    for ridge in (10, 1000, 100000):        # least squares, in closed form
        weights = torch.linalg.solve(products + ridge * torch.eye(x.shape[1]), sums)
        assert ((test_x @ weights).argmax(1) == test_y).float().mean() < 0.25


@pytest.mark.parametrize("dataset, key, classes", [("cifar10", "labels", 10),
                                                   ("cifar100", "fine_labels", 100)])
def test_cifar_is_read_in_its_original_format_or_refused_with_the_way_out(dataset, key, classes,
                                                                          tmp_path, monkeypatch):
    source, module = getattr(torchvision.datasets, dataset.upper()), torchvision.datasets.cifar
    pixels = torch.randint(256, (36, 3, 32, 32), dtype=torch.uint8)
    labels, names = torch.randint(classes, (36,)), [f"class {i}" for i in range(classes)]
    files, root = [name for name, _ in source.train_list + source.test_list], source.base_folder
    parts = [whole.chunk(len(files)) for whole in (pixels, labels)]

    # each row holds the red, the green and the blue plane of one image
    content = {name: {"data": part.flatten(1).numpy(), key: some.tolist()}
               for name, part, some in zip(files, *parts)}
    content[source.meta["filename"]] = {source.meta["key"]: names}
    (tmp_path / root).mkdir()
    for name in content:
        (tmp_path / root / name).write_bytes(pickle.dumps(content[name]))

    # Their md5 is not the original's, so they count as damaged.  Then the class names alone do.
    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    for check in (module.check_integrity, lambda path, md5: not path.endswith("meta")):
        monkeypatch.setattr(module, "check_integrity", check)
        said = f"{dataset} is missing or damaged in .*{root} .*DATASET=shapes"
        with pytest.raises(FileNotFoundError, match=said):
            data.load_data(dataset, tmp_path)

    monkeypatch.setattr(module, "check_integrity", lambda path, md5: True)
    ours, test = data.load_data(dataset, tmp_path, batch_size=2), slice(-36 // len(files), None)
    assert_equal([ours.view(np.arange(36)), ours.labels, ours.classes], [pixels, labels, names])

    # never augmented, in order, and normalised as torchvision does
    oracle = v2.functional.normalize(pixels[test].float() / 255, *data.STATISTICS[dataset])
    torch.testing.assert_close(joined(ours.test_batches()), (oracle, labels[test]))


# ------------------------------------------------------------------------------------------ Folders


def test_images_of_every_kind_are_read_as_they_look(tmp_path):
    ramp = np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(40, 30, 3)
    colour, grey = Image.fromarray(ramp), np.repeat(ramp[..., :1], 3, axis=2)
    turn_right = Image.Exif()
    turn_right[0x0112] = 6
    sixteen = Image.fromarray(ramp[..., 0].astype(np.uint16) * 257)     # 50 % stays 50 %
    other, clear = Image.fromarray(255 - ramp), Image.fromarray(ramp).convert("RGBA")
    clear.putalpha(7)
    kinds = {       # file -> the image, how it is saved, how it looks
        "png.JPEG": (colour, dict(format="PNG"), ramp), "a.bmp": (colour, {}, ramp),
        "a.TIFF": (colour, {}, ramp), "a.ppm": (colour, {}, ramp), "alpha.png": (clear, {}, ramp),
        "lossless.webp": (colour, dict(lossless=True), ramp),
        "turned.png": (colour, dict(exif=turn_right), np.rot90(ramp, -1)),
        "grey.jpg": (colour.getchannel(0), dict(quality=95), grey),
        "cmyk.jpg": (colour.convert("CMYK"), dict(quality=95), ramp),
        "16 bits.png": (sixteen, {}, grey), "16 bits.tif": (sixteen, {}, grey),
        "moving.webp": (colour, dict(save_all=True, append_images=[other], lossless=True), ramp)}

    for name, (image, how, looks) in kinds.items():
        image.save(tmp_path / name, **how)
        ours = data.read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert ours.shape == looks.shape and ours.dtype == np.uint8
        off = abs(ours.astype(int) - looks).mean()
        assert off == 0 or "jpg" in name and off < 3, name


def test_a_folder_takes_what_imagefolder_takes_but_nothing_hidden(folder, capsys):
    before = load_folder(folder)
    for place in ("train", "val", "train/cat", "val/dog"):          # what other programs leave
        shutil.copytree(folder / "train/cat", folder / place / ".ipynb_checkpoints")
        (folder / place / "._cat_0.JPEG").write_bytes(b"of macOS")
        (folder / place / ".DS_Store").touch()
    (folder / "val/list.csv").touch()
    assert_equal(passes(load_folder(folder)), passes(before))
    assert load_folder(folder).identity == before.identity and load_folder(folder).left_out == {}

    for name in ("a.BMP", "b.tiff", "c.heic", "d.HEIC", "e.txt"):
        shutil.copy(folder / "train/cat/cat_2.JPEG", folder / "train/owl" / name)
    source = load_folder(folder)
    oracle = torchvision.datasets.ImageFolder(folder / "train")
    paths = [os.fsdecode(path) for path in source.loader.dataset.paths[:source.train_size]]
    assert paths == [path for path, label in oracle.samples if "/." not in path]
    assert source.train_size == 36 + 2 and source.left_out == {".heic": 2, ".txt": 1}

    train.main(folder_flags(folder, folder / "run"))
    printed = capsys.readouterr().out
    assert "files left out, by ending: {'.heic': 2, '.txt': 1}" in printed
    assert "each epoch leaves out 6 images" in printed        # 38 in batches of 8


@pytest.mark.parametrize("change, said", [
    (lambda root: [shutil.rmtree(root / "val" / name) for name in ("cat", "dog", "owl")]
     + [(root / "val/1.png").touch()], r"val/CLASS/ \(.*/val holds 0 folders \[\] and 1 files"),
    (lambda root: (root / "val").rename(root / "valid"),
     r"val/CLASS/ \(.* holds 2 folders \['train', 'valid'\] and 0 files"),
    (lambda root: [shutil.rmtree(root / "val"), *((root / "train" / name).rename(root / name)
                                                  for name in ("cat", "dog", "owl"))],
     r"train/CLASS/ \(.*/train holds 0 folders|holds 4 folders"),
    (lambda root: [(root / "deep").mkdir(), (root / "train").rename(root / "deep/train")],
     r"train/CLASS/ \(.* holds 2 folders \['deep', 'val'\] and 0 files"),
    (shutil.rmtree, "No such file or directory"),
])
def test_a_layout_that_is_none_of_ours_is_named_with_the_way_out(change, said, folder, capsys):
    change(folder)
    text = complaint(capsys, *folder_flags(folder, folder.parent / "run"))
    assert re.search(said, text) and "--data-dir names the folder" in text and "layouts" in text


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


def test_a_folder_keeps_the_lowest_hashes_of_every_class_and_all_test_images(folder):
    def key(name):
        return hashlib.md5(f"0/{name}".encode()).digest()

    source = load_folder(folder, images_per_class=5)
    oracle = {name for label in ("cat", "dog", "owl")
              for name in sorted(os.listdir(folder / "train" / label), key=key)[:5]}
    paths = source.loader.dataset.paths[:source.train_size]
    assert {os.path.basename(os.fsdecode(path)) for path in paths} == oracle
    for dataset, count in (("imagenet", 250), ("folder", 0)):
        assert train.parse_args(["--dataset", dataset])[1]["images_per_class"] == count

    prepare, labels = data.Preprocess("folder", 32), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    images = [prepare(data.read_image(path)) for path in sorted(folder.glob("val/*/*"))]
    torch.testing.assert_close(joined(source.test_batches()), (torch.cat(images), labels))


@pytest.mark.skipif(sys.platform != "linux", reason="not every system takes such names")
@pytest.mark.parametrize("workers", [0, 2])
def test_names_that_are_not_utf8_or_would_clear_a_terminal_load_and_are_escaped(workers, folder):
    before = passes(load_folder(folder))
    name = os.fsdecode(b"owl's \xff\n\r\033[2J") + "Übung_1, 猫"
    for split in ("train", "val"):
        (folder / split / "owl").rename(folder / split / name)
    source = load_folder(folder, workers=workers)
    assert source.classes == ["cat", "dog", name]
    assert_equal(passes(source), before)

    (folder / "val" / name / "owl_0.JPEG").write_bytes(b"no image")
    said = re.escape(r"/owl's \udcff\n\r\x1b[2JÜbung_1, 猫/owl_0.JPEG cannot be decoded")
    with pytest.raises(ValueError, match=said):
        list(source.test_batches())
    end_workers(source)


@pytest.mark.parametrize("change, same", [
    (lambda root: None, True), (add_image, False), (rename_class, False),
    (lambda root: os.truncate(root / "train/cat/cat_1.JPEG", 10**5), False),
    (lambda root: os.truncate(root / "val/owl/owl_1.JPEG", 10**5), False)])
def test_another_file_class_or_size_is_another_folder_wherever_it_lies(change, same, folder,
                                                                       monkeypatch):
    before = load_folder(folder).identity
    change(folder)
    shutil.copytree(folder, folder / "moved")
    monkeypatch.chdir(folder)
    for root in (folder, folder / "moved", "moved"):
        assert (load_folder(root).identity == before) == same


@pytest.mark.parametrize("spoil, said", [
    (lambda root, image: (root / "train/owl").rename(root / "train/elk"), "classes.*elk, owl"),
    (lambda root, image: (root / "train/elk").mkdir(), "no valid file for the classes elk"),
    (lambda root, image: (root / "train/cat/gone.png").symlink_to("nowhere"),
     "gone.png cannot be read .*remove it"),
    (lambda root, image: image.write_bytes(b"no image"), "cat_0.JPEG cannot be decoded"),
    (lambda root, image: os.truncate(image, 200), "cat_0.JPEG cannot be decoded .*(T|t)runcated"),
    (lambda root, image: image.unlink(), "cat_0.JPEG is not found"),
    (lambda root, image: Image.new("1", (20000, 20000)).save(image, "PNG"),
     "cat_0.JPEG cannot be decoded .*decompression bomb"),
])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_useless_folder_or_image_is_refused_in_one_line(spoil, said, workers, folder):
    source = load_folder(folder, workers=workers)
    spoil(folder, folder / "val" / "cat" / "cat_0.JPEG")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        list(source.test_batches())     # says what is wrong with an image
        load_folder(folder)             # and this, what is wrong with the folder
    *before, last = str(error.value).strip().splitlines()       # a worker's traceback comes before
    assert re.search(said, last) and (workers or not before)
    end_workers(source)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_folder_batches_do_not_depend_on_the_workers_which_start_once(workers, folder):
    alone, source = (load_folder(folder, batch_size=2, workers=count) for count in (0, workers))
    expected, started = passes(alone), set()
    for _ in range(2):
        next(source.train_batches(0))       # a pass abandoned halfway leaves the next one right
        assert_equal(passes(source), expected)
        running = getattr(source.loader._iterator, "_workers", [])
        started.add(tuple(worker.pid for worker in running))
    assert len(started) == 1 and len(*started) == workers

    assert_equal(list(source.train_batches(1, first_step=2)), expected[-16:])
    assert list(source.train_batches(1, first_step=18)) == []       # resumed before the evaluation


# ----------------------------------------------------------------------------------------- Training


QUICK = ["--train-images", "192", "--batch-size", "32", "--epochs", "2",        # 12 steps
         "--device", "cpu"]


def complaint(capsys, *flags):
    """The one line with which train.py refuses these flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    text = capsys.readouterr().err
    assert stop.value.code not in (0, None) and text.count("\n") == 1, text
    return text


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two short epochs; what the command line said lies beside it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    process = subprocess.run([sys.executable, HERE / "train.py", *QUICK, "--out", out],
                             capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    out.with_name("said").write_text(process.stdout)
    return out


def test_a_run_keeps_its_rows_and_settings_and_is_trained_only_once(finished, capsys):
    lines, (_, last) = finished.with_name("said").read_text().splitlines(), rows(finished)
    printed = [line.split()[:2] for line in lines if line.startswith("epoch ")]
    assert printed == [["epoch", row["epoch"]] for row in rows(finished)]
    assert f"done: top-1 {float(last['top1']):.2f}%" in lines[-3]
    for line, next_step in zip(lines[-2:], ("evaluate", "predict")):
        assert f"make {next_step} CHECKPOINT={finished}" in line
        assert (f"PYTHON={sys.executable}" in line) == (sys.prefix != str(HERE / ".venv"))
    rate = 5e-4 * (1 + math.cos(math.pi * 10 / 11))     # in step 11 of 0 to 11; one warms up
    assert float(last["lr"]) == pytest.approx(rate)

    settings = json.loads((finished / "config.json").read_text())["settings"]
    wanted = dict(model="senetv2", layers="1,1,1,1", batch_size=32, epochs=2, train_images=192)
    assert settings.items() >= wanted.items()

    before = (finished / "last.pt").stat()
    train.main([*QUICK, "--out", str(finished)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert "already finished, nothing trained" in first and rest == lines[-3:]
    assert (finished / "last.pt").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("flags, said", [
    ("--dataset cifar11", "cifar100"), ("--stem tiny", "cifar"), ("--model senetv3", "senetv2"),
    ("--layers 3,4,6", "four positive"), ("--layers 3,4,0,3", "four positive"),
    ("--epochs 0", "from 1 to"), ("--batch-size x", "number"), ("--train-images -5", "from 0 to"),
    ("--lr nan", "from 0 to"), ("--lr inf", "from 0 to"), ("--weight-decay -1", "from 0 to 1"),
    ("--image-size 31", "from 32 to"), (f"--seed {2**63}", str(2**63 - 1)),

    # What only the data, the network or the disk can tell.
    ("--reduction 257", "number of channels, 256"), ("--batch-size 13000", "images, 12000"),
    ("--train-images 12001", "12000 training"), ("--dataset imagenet", "--data-dir"),
    ("--evaluate --checkpoint nowhere.pt", "train first"), ("--out file/run", "file/run"),
    ("--out file", "file"), ("--model vit --weights file", "holds no weights"),
    ("--weights imagenet", "resnet50 are not on this disk"),
    *[("--device cuda", "cpu")] * (not torch.cuda.is_available()),
])
def test_bad_input_is_refused_in_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("it began to train"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    Path("file").write_text("in the way")
    text = complaint(capsys, *flags.split())
    assert said in text and (flags.split()[0] in text or ":" in text), text
    assert Path("file").read_text() == "in the way"


def test_help_shows_the_defaults_that_count(capsys):
    for flags, epochs in (
            ("", 3), ("--dataset cifar10", 30), ("--dataset cifar10 --recipe strong", 100)):
        with pytest.raises(SystemExit):
            train.main([*flags.split(), "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"passes over the training images (default: {epochs})" in text


@pytest.mark.parametrize("flags, said, name", [
    ("--dataset cifar10 --epochs 3 --train-images 5000", "",
     "cifar10-senetv2-paper-epochs3-train_images5000-seed0"),
    ("--weights C:\\nets/mine --seed 2", "", "shapes-senetv2-paper-weightsC__nets_mine-seed2"),
    ("--model senet --reduction 16", "", "shapes-senet-paper-reduction16-seed0"),

    # A setting without use stays at its default.
    ("--model resnet --reduction 16", "reduction 16 is not used by", "shapes-resnet-paper-seed0"),
    ("--model senet --cardinality 8", "cardinality 8 is not used by", "shapes-senet-paper-seed0"),
    ("--model resnet --zero-init", "", "shapes-resnet-paper-zero_initTrue-seed0"),
    ("--model vit --zero-init", "zero_init True is not used by", "shapes-vit-paper-seed0"),
    ("--model vit --layers 3,4,6,3", "layers 3,4,6,3 is not used by", "shapes-vit-paper-seed0"),
    ("--dataset cifar10 --image-size 64", "image_size 64 is not", "cifar10-senetv2-paper-seed0"),
])
def test_a_run_is_named_by_what_defines_its_result(flags, said, name, capsys):
    args, settings = train.parse_args(flags.split())
    assert said in (printed := capsys.readouterr().out) and bool(printed) == bool(said)
    assert args.out == Path("runs", name)
    unused = said.split(" ")[0]
    assert not said or settings[unused] == train.defaults("paper", args.dataset)[unused]


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.OPTIONS, "device", ("cuda", ("cpu", "cuda"), "where"))
    monkeypatch.setattr(train, "LOCAL_WORLD", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = complaint(capsys, "--out", tmp_path)
    assert "more processes than GPUs; start fewer, or pass --device cpu" in text


def test_a_batch_size_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    args, settings = train.parse_args(["--batch-size", "33", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    with pytest.raises(ValueError, match="33; it must be a multiple of .* processes, 2,"):
        train.run_training(args, settings, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


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
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])


def test_only_a_gpu_that_computes_in_bfloat16_does(monkeypatch):
    for native in (True, False):                # a T4, say, only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: native or including_emulation)
        assert train.bfloat16(torch.device("cuda")) is native
        assert train.bfloat16(torch.device("cpu")) is False


# ------------------------------------------------------------------------ Killed equals undisturbed


def draw_folder(root):
    """A folder of drawn figures: two classes of 16 training and 8 test images."""
    images, labels = data.draw_shapes(1000, seed=2)
    for split, first, count in (("train", 0, 16), ("val", 16, 8)):
        for label, name in enumerate(("bar", "cross")):
            (root / split / name).mkdir(parents=True)
            for i, image in enumerate(images[labels == label][first:first + count]):
                save_image(image, root / split / name / f"{i}.png")


def eight_steps(source, root, out, *more):
    """The flags of a run of two epochs on shapes or on root/images; its network has dropout."""
    kind = (["--train-images", "32"] if source == "shapes" else
            ["--dataset", "folder", "--data-dir", root / "images", "--image-size", "32"])
    return list(map(str, ["--model", "mobilenet_v2", "--epochs", "2", "--batch-size", "8",
                          "--device", "cpu", "--out", out, *kind, *more]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with images and with two runs that were left alone: shapes and folder."""
    root = tmp_path_factory.mktemp("whole")
    draw_folder(root / "images")
    for source in ("shapes", "folder"):
        train.main(eight_steps(source, root, root / source, "--workers", "0"))
    return root


def same_result(out, other):
    """Weights, optimiser, history and metrics.csv, bit for bit; only seconds are the machine's."""
    a, b = (train.read_checkpoint(path / "last.pt") for path in (out, other))
    tables = [[{key: str(value) for key, value in row.items() if "second" not in key}
               for row in table] for table in (a["history"], b["history"], rows(out), rows(other))]
    assert tables == [tables[0]] * 4
    assert len(tables[0]) == a["settings"]["epochs"] > 0 and len(a["model"]) > 50
    for key in ("settings", "images", "step", "model", "optimizer"):
        assert_equal(a[key], b[key])
    return True


def stop_at(step, flags, monkeypatch, saved=None):
    """Train until Ctrl-C after step `step`.  last.pt is of `saved`, (step, evaluations), or of the
    step before."""
    def save(run, *rest, inner=train.save):
        if run.step == step:
            raise KeyboardInterrupt
        if saved in (None, (run.step, len(run.history))):
            inner(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "save", save)
        train.main([*flags, "--checkpoint-minutes", "0"])


@pytest.mark.parametrize("source, saved, step", [
    ("shapes", (3, 0), 4), ("shapes", (4, 1), 6),
    ("folder", (0, 0), 3), ("folder", (1, 0), 4), ("folder", (3, 0), 6),
    ("folder", (4, 0), 5),      # all of the first epoch but its evaluation
    ("folder", (4, 1), 5), ("folder", (7, 1), 8),
])
def test_a_run_that_ended_early_ends_as_if_it_had_not(source, saved, step, whole, tmp_path,
                                                      monkeypatch, capsys):
    stop_at(step, eight_steps(source, whole, tmp_path, "--workers", "2"), monkeypatch, saved)
    ended = "goes on from the last checkpoint" if saved[0] else "starts from scratch"
    assert capsys.readouterr().err == f"train.py: stopped; the same command {ended}\n"

    shutil.copytree(whole / "images", tmp_path / "images")          # a folder may have moved
    train.main(eight_steps(source, tmp_path, tmp_path, "--workers", "1"))
    assert (f"resuming after step {saved[0]}" in capsys.readouterr().out) == (saved[0] > 0)
    assert same_result(tmp_path, whole / source)


@pytest.mark.parametrize("source", ["shapes", "folder"])
@pytest.mark.parametrize("network", ["mobilenet_v2", "senetv2 --stem cifar --layers 1,1,1,1"])
def test_on_a_gpu_replayed_steps_are_eager_ones_also_after_a_kill(network, source, whole, tmp_path,
                                                                  monkeypatch, gpu):
    replayed, inner = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (
        replayed.append(graph), inner(graph)))
    eager, graph, killed = (eight_steps(
        source, whole, tmp_path / name, "--workers", "2", "--device", "cuda", "--model",
        *network.split())
        for name in ("eager", "graph", "killed"))
    train.main([*eager, "--no-cuda-graph"])
    assert not replayed
    train.main(graph)
    assert len(replayed) == 7 and len(set(replayed)) == 1       # the first step runs as it is
    stop_at(6, killed, monkeypatch)
    train.main(killed)
    assert len(replayed) == 7 + 5 + 2
    assert same_result(tmp_path / "graph", tmp_path / "eager")
    assert same_result(tmp_path / "killed", tmp_path / "eager")


@pytest.mark.parametrize("change, more, said", [
    (lambda root: None, ["--lr", "0.01", "--model", "vit"],
     ["lr: was 0.001, is 0.01", "model: was mobilenet_v2, is vit"]),
    (lambda root: (root / "train/bar/0.png").unlink(), [], ["images: was 32 + 16 images of 2 c"]),
    (lambda root: [path.rename(path.with_name("rod")) for path in root.glob("*/bar")], [],
     ["images: was 32 + 16 images of 2 c"]),
])
def test_a_run_does_not_go_on_with_other_settings_or_data(change, more, said, whole, tmp_path,
                                                          capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "images")
    text = complaint(capsys, *eight_steps("folder", tmp_path, tmp_path / "folder"), *more)
    assert all(part in text for part in [*said, "--out, or delete that folder"]), text
    assert same_result(tmp_path / "folder", whole / "folder")       # it is as it was


@contextlib.contextmanager
def start(*flags, processes=1):
    """train.py in a process of its own, or in several by torchrun; none outlives the test."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher * (processes > 1), HERE / "train.py", *flags]
    process = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):       # its group has gone
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(process, text):
    """Read what it prints until a line holds `text`."""
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_run_keeps_others_out_until_it_is_ended_and_then_goes_on(by, whole, tmp_path, capsys):
    flags = eight_steps("folder", whole, tmp_path, "--workers", "2")
    with start(*flags, "--checkpoint-minutes", "0") as first:
        wait_for(first, "epoch 1 ")
        first.send_signal(signal.SIGSTOP)
        before = (tmp_path / "last.pt").read_bytes()
        assert "another process is training in" in complaint(capsys, *flags)
        assert (tmp_path / "last.pt").read_bytes() == before

        if by == signal.SIGINT:
            os.killpg(first.pid, by)            # Ctrl-C reaches its two workers as well
            first.send_signal(signal.SIGCONT)
            said = first.communicate()[1]
            assert said == "train.py: stopped; the same command goes on from the last checkpoint\n"
        else:
            first.kill()                        # its workers notice within seconds
        assert first.wait() in (130, -by)
        train.main(flags)

    assert "resuming after step" in capsys.readouterr().out
    assert same_result(tmp_path, whole / "folder")


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_run_from_before_zero_init_goes_on_without_it(recipe, tmp_path, capsys):
    flags = ["--recipe", recipe, "--layers", "1,1,1,1", "--stem", "imagenet", "--train-images", "8",
             "--batch-size", "8", "--epochs", "1", "--out", str(tmp_path)]
    train.main(flags)
    edited(lambda saved: saved["settings"].pop("zero_init"))(tmp_path / "last.pt")
    train.main(flags)
    assert "already finished" in capsys.readouterr().out
    assert train.load(tmp_path).layer1[0].bn3.weight.all()
    assert "zero_init: was False, is True" in complaint(capsys, *flags, "--zero-init")


def test_weights_overwrite_the_start_at_0_which_is_said(finished, tmp_path, capsys):
    flags = [*QUICK, "--weights", str(finished), "--lr", "0", "--out", str(tmp_path), "--zero-init"]
    train.main(flags)
    assert "zero_init: batch norms start from the weights" in capsys.readouterr().out
    assert train.load(tmp_path).layer1[0].bn3.weight.all()


def test_a_checkpoint_that_appears_before_the_lock_is_resumed(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "lock", lambda folder, inner=train.lock: (       # just in time
        shutil.copytree(whole / "folder", folder, dirs_exist_ok=True), inner(folder))[1])
    train.main(eight_steps("folder", whole, tmp_path))
    assert "already finished" in capsys.readouterr().out


def test_last_pt_is_replaced_only_by_a_whole_checkpoint_on_the_disk(whole, tmp_path, monkeypatch,
                                                                    capsys):
    last, done, resource = tmp_path / "last.pt", [], pytest.importorskip("resource")
    draft = tmp_path / "last.pt.tmp"        # those of metrics.csv and config.json do not count
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, inner=getattr(os, name): (
            draft.exists() and done.append((name, draft.stat().st_size)), inner(*args)))
    stop_at(2, flags := eight_steps("folder", whole, tmp_path), monkeypatch)
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert done == [("fsync", len(before)), ("replace", len(before))]

    try:        # a full disk: no file may grow beyond this, less than a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        text = complaint(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in text and "free some disk space" in text
    assert last.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_loss_that_is_no_number_stops_the_run(whole, tmp_path, capsys):
    text = complaint(capsys, *eight_steps("folder", whole, tmp_path, "--lr", "1e30"))
    assert "before step 4, a loss" in text and not (tmp_path / "last.pt").exists()


# -------------------------------------------------------------------------- Checkpoints and weights


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def edited(change):
    """A function that changes what a checkpoint holds."""
    def spoil(path):
        change(saved := train.read_checkpoint(path))
        torch.save(saved, path)
    return spoil


DAMAGED = [(lambda path: os.truncate(path, path.stat().st_size // 2), ""),
           (lambda path: path.write_bytes(pickle.dumps(Hostile())), ""),
           (edited(lambda saved: saved["model"].pop("classifier.1.bias")), "classifier.1.bias")]


@pytest.mark.parametrize("way, spoil, said", [
    *[(way, *damage) for way in ("evaluate", "resume") for damage in DAMAGED],
    ("evaluate", edited(lambda saved: saved["settings"].update(model="senet3")), "senet3"),
    ("evaluate", edited(lambda saved: saved.update(settings=[])), "TypeError"),
    ("resume", edited(lambda saved: saved["optimizer"]["param_groups"].pop()), "parameter groups"),
    ("resume", edited(lambda saved: saved.update(losses=torch.zeros(7))), "size"),
])
def test_a_damaged_hostile_or_foreign_checkpoint_is_refused(way, spoil, said, whole, tmp_path,
                                                            monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoil(Path(shutil.copy(whole / "folder" / "last.pt", tmp_path)))
    text = complaint(capsys, *(eight_steps("folder", whole, tmp_path) if way == "resume" else
                               ["--evaluate", "--checkpoint", "last.pt"]))
    assert "last.pt is damaged, or not a checkpoint" in text and "the code that wrote it" in text
    assert said in text
    assert not Path("hostile").exists()


def test_a_batch_of_one_is_refused_only_where_it_cannot_be_normalised(folder, tmp_path, capsys):
    flags = [*folder_flags(folder, tmp_path / "run"), "--batch-size", "1", "--train-images", "2"]
    assert "too few for batch norm" in complaint(capsys, *flags)
    train.main([*flags, "--image-size", "64"])
    assert "done: top-1" in capsys.readouterr().out


WRAPPED = {     # how weights lie in the files of other programs
    "torchvision and timm": lambda weights: weights,
    "PyTorch's ImageNet example": lambda weights: dict(
        state_dict={f"module.{key}": value for key, value in weights.items()}, epoch=3),
    "torchvision's references": lambda weights: dict(
        model=weights, args=argparse.Namespace(lr=0.1), epoch=3),
    "compiled": lambda weights: {f"_orig_mod.{key}": value for key, value in weights.items()},
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_taken_as_they_come_where_name_and_shape_agree(wrapped, finished, folder,
                                                                   tmp_path, capsys):
    given = train.read_checkpoint(finished)["model"]
    torch.save(wrapped(given), tmp_path / "weights.pth")
    net = build_model("resnet", 3, SMALL)
    before = net.fc.weight.clone()
    text = train.load_weights(net, tmp_path / "weights.pth", "resnet")

    same = {key for key in given if "gate" not in key and "fc" not in key}
    assert f"{len(same)} tensors taken" in text and "new: 2 ['fc.weight', 'fc.bias']" in text
    assert "unused: 18 ['layer1.0.gate.reduce.weight'" in text      # 4 gates of 4, and fc
    assert len(same) > 80 and torch.equal(net.fc.weight, before)
    assert all(torch.equal(net.state_dict()[key], given[key]) for key in same)


def test_a_run_starts_from_weights_that_fit(finished, tmp_path, capsys):
    flags = [*QUICK, "--weights", str(finished), "--lr", "0", "--out", str(tmp_path / "run")]
    train.main(flags)
    assert "new: 0 []; unused: 0 []" in capsys.readouterr().out
    given, weights = train.load(finished), train.load(tmp_path / "run")     # at a rate of 0
    assert_equal(*(dict(net.named_parameters()) for net in (given, weights)))

    torch.save({"step": 3}, tmp_path / "other.pt")
    for source, said in ((tmp_path / "other.pt", "no tensor of"), (tmp_path / "x", "no checkpoint"),
                         (HERE / "README.md", "holds no weights")):
        assert said in complaint(capsys, *QUICK, "--weights", source, "--out", tmp_path / "else")


def test_two_processes_train_one_network_and_go_on_when_interrupted(whole, tmp_path):
    left, both, alone = (tmp_path / name for name in ("left", "both", "alone"))
    with start(*eight_steps("folder", whole, left), processes=2) as process:
        printed, errors = process.communicate()
    assert printed.count("done: top-1") == 1 and "FutureWarning" not in errors, errors

    # The second process counted half of the test images with its own weights.
    found, _ = train.evaluate(train.load(left), load_folder(whole / "images"))
    assert {key: float(rows(left)[-1][key]) for key in found} == pytest.approx(found, rel=1e-6)

    flags = eight_steps("folder", whole, both)
    with start(*flags, "--checkpoint-minutes", "0", processes=2) as process:
        wait_for(process, "epoch 1 ")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode != 0 and "stopped; the same command goes on" in said
    assert "train.py\", line" not in said

    # Two processes go on, or one.
    shutil.copytree(both, alone)
    train.main(eight_steps("folder", whole, alone))
    assert train.read_checkpoint(alone)["step"] == 8 and len(rows(alone)) == 2
    with start(*flags, processes=2) as process:
        printed, _ = process.communicate()
    assert "resuming after step" in printed and same_result(both, left)


def test_an_error_in_one_process_ends_both_and_is_said(folder, tmp_path):
    broken = folder / "train" / "dog" / "dog_3.JPEG"    # one process alone will read it
    broken.write_bytes(broken.read_bytes()[:20])
    with start(*folder_flags(folder, tmp_path / "run", workers=1), processes=2) as process:
        _, said = process.communicate()
    assert process.returncode != 0 and "train.py\", line" not in said
    assert said.count(f"train.py: error: {broken} cannot be decoded") == 1


# ----------------------------------------------------------- Evaluating, predicting, looking inside


def test_evaluation_prints_what_network_and_gates_find(finished, capsys):
    net, last = train.load(finished), rows(finished)[1]
    assert net.classes == list(data.SHAPES) and net.settings["batch_size"] == 32
    train.main(["--evaluate", "--checkpoint", str(finished)])
    lines = capsys.readouterr().out.splitlines()

    # The shapes are normalised without the loader, and the network cut by torchvision's tool.
    images, labels = data.draw_shapes(1000, seed=2)
    cut, gate = create_feature_extractor(net, ["layer3.0.bn3", "fc"]), net.layer3[0].gate
    with torch.no_grad():
        found = cut(v2.Normalize(*data.STATISTICS["shapes"])(images.float() / 255))
        s = gate.scale(found["layer3.0.bn3"]).flatten(1)
    logits = found["fc"].double()
    better = (logits > logits.gather(1, labels[:, None])).sum(1)     # how many beat the right class
    top1, top5 = (100 * (better < k).double() for k in (1, 5))
    assert float(last["top1"]) == pytest.approx(top1.mean().item())
    assert float(last["top5"]) == pytest.approx(top5.mean().item())
    loss = F.cross_entropy(logits, labels).item()
    assert float(last["test_loss"]) == pytest.approx(loss, rel=1e-4)

    apart = [labels == label for label in range(10)]
    assert lines[1:11] == [f"{top1[mine].mean():7.2f}%  {name}"
                           for mine, name in zip(apart, net.classes)]
    assert f"top1 {top1.mean():.5g}  top5 {top5.mean():.5g}" in lines[11]

    means = torch.stack([s[mine].mean(0) for mine in apart])
    between = means.std(0, correction=0).mean()
    assert lines[14] == (f"stage 3: mean factor {means.mean():.3f}, standard deviation across "
                         f"classes {between:.4f}")

    # The picture's third strip: columns sorted by mean, black is 0 and white is 1.
    picture = np.array(Image.open(finished / "gates.png"))[..., 0]
    assert picture.shape == (4 * 108 + 8, 2064) and len(lines) == 17
    strip = picture[2 * 108 + 8:3 * 108:10, 8:-8:2]                     # (10, 1024)
    off = abs(strip / 255 - means[:, means.mean(0).argsort()].numpy())
    assert off.max() < 0.01


def test_a_gate_of_ones_own_is_any_module(tmp_path, monkeypatch, capsys):
    code, = [code for code in re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.M | re.S)
             if "class Constant" in code]
    exec(code, names := {})
    monkeypatch.setitem(senetv2.GATES, "constant", names["Constant"])
    monkeypatch.setattr(senetv2, "OURS", (*OURS, "constant"))
    monkeypatch.setitem(train.SETTINGS, "model", ("senetv2", (*OURS, "constant"), "a gate"))
    monkeypatch.setitem(train.USED_BY, "layers", ("constant",))
    train.main([*QUICK[:4], "--epochs", "1", "--model", "constant", "--out", str(tmp_path)])
    train.main(["--evaluate", "--checkpoint", str(tmp_path)])
    assert "no picture of the gates" in capsys.readouterr().out.splitlines()[-1]

    other = nn.Sequential(nn.Conv2d(3, 8, 3), names["Constant"](8))         # in another network
    assert other(torch.randn(2, 3, 9, 9)).shape == (2, 8, 7, 7)


@pytest.mark.parametrize("source, statistics, side", [("shapes", "shapes", 32),
                                                      ("folder", "imagenet", 36)])
def test_prediction_names_the_most_likely_classes(source, statistics, side, whole, tmp_path,
                                                  capsys):
    paths = [str(tmp_path / f"{number}.png") for number in (0, 1)]
    for path in paths:
        save_image(torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8), path)
    train.main(["--predict", *paths, "--checkpoint", str(whole / source)])

    net, lines = train.load(whole / source), []
    oracle = v2.Compose([v2.Resize(side), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*data.STATISTICS[statistics])])
    for path in paths:
        x = oracle(v2.functional.pil_to_tensor(Image.open(path)))[None]
        torch.testing.assert_close(net.preprocess(data.read_image(path)), x)
        chances = net(x)[0].softmax(0)
        best = chances.argsort(descending=True)[:5].tolist()
        lines += [path, *(f"{chances[k].item():8.2%}  {net.classes[k]}" for k in best)]
    assert capsys.readouterr().out.splitlines() == lines


def test_one_class_whose_name_is_red_is_trained_on_evaluated_and_drawn(folder, tmp_path, capsys,
                                                                       monkeypatch, recwarn):
    for path in [*folder.glob("*/dog"), *folder.glob("*/owl")]:
        shutil.rmtree(path)
    for split in ("train", "val"):      # a class and a file whose names turn a terminal red
        (folder / split / "cat").rename(folder / split / "\033[31mcat")
    image = (folder / "val/\033[31mcat/cat_0.JPEG").rename(folder / "val/\033[31mcat/\033[31m.JPEG")
    train.main([*folder_flags(folder, tmp_path), "--train-images", "9"])

    # Evaluation asks nothing of the training images: one is left, fewer than those 9 and a batch.
    for path in sorted(folder.glob("train/*/*"))[1:]:
        path.unlink()
    place = ["--checkpoint", str(tmp_path), "--data-dir", str(folder), "--workers", "0"]
    train.main(["--evaluate", *place])
    printed = capsys.readouterr().out
    assert "3 test images of folder: test_loss" in printed and "top1 100" in printed
    assert "nan" not in printed and "top5" not in printed
    assert not recwarn.list

    train.main(["--predict", str(image), *place])
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "folder", "--data-dir", str(folder),
                                      "--out", str(tmp_path / "sheet.png")])
    data.main()
    printed += capsys.readouterr().out
    assert "\033" not in printed and printed.count("\\x1b[31m") == 5


# ------------------------------------------------------------------------------------------- Report


def invent_run(folder, seed, top1, epochs=2, done=2, **settings):
    """A folder as a run leaves it, without weights."""
    settings = dict(dataset="cifar10", model="resnet", recipe="paper", layers="1,1,1,1",
                    stem="imagenet", lr=0.001, epochs=epochs, batch_size=128) | settings
    about = dict(settings=settings | dict(seed=seed), parameters=8036426, device="D", torch="T")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    lines = [f"{epoch + 1},{top1 if epoch + 1 == done else 99}" for epoch in range(done)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,top1", *lines]) + "\n")


def test_the_report_averages_last_epochs_and_pairs_by_seed(tmp_path, capsys):
    plain, gated = {0: 70.0, 1: 71.0, 2: 75.0}, {3: 90.0, 2: 78.0, 1: 71.0, 0: 71.5}
    for values, settings in (
            (plain, {}), (gated, dict(model="senetv2", reduction=32, cardinality=4))):
        for number, (seed, top1) in enumerate(values.items()):      # folders in the dict's order
            invent_run(tmp_path / str(len(values)) / str(number), seed, top1, **settings)
    train.main(["--report", str(tmp_path)])
    text = capsys.readouterr().out

    gaps = [gated[seed] - plain[seed] for seed in plain]
    mean, half = np.mean(gaps), 4.303 * np.std(gaps, ddof=1) / 3**0.5   # Student's t, textbook
    first, second = (f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
                     for values in ([*plain.values()], [*gated.values()]))
    assert f"| resnet | 8,036,426 | 3 | {first} | - | - | 77.38 |" in text
    assert (f"| senetv2 r=32 K=4 (= senet r=8) | 8,036,426 | 4 | {second} "
            f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] | - | 78.60 |") in text
    assert "line [99.00, 72.00]" in text and text.count("```mermaid") == 1


def test_the_report_compares_networks_of_the_same_start(tmp_path, capsys):
    gate = dict(model="senetv2", reduction=32, cardinality=4)
    for number, (top1, settings) in enumerate((
            (60, {}), (63, gate), (64, gate | dict(residual=True)), (70, dict(zero_init=True)),
            (72, gate | dict(zero_init=True)), (71.5, dict(model="senet", reduction=32,
                                                           zero_init=True)))):
        invent_run(tmp_path / str(number), 0, top1, **settings)
    train.main(["--report", str(tmp_path)])
    lines = [line.split(" | ")[:1] + line.split(" | ")[3:]
             for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines == [
        ["| network", "top-1 (%)", "minus resnet", "minus senet r=32",
         "minus the same without zero-init", "in the paper |"],
        ["| resnet", "60.00", "-", "-", "-", "77.38 |"],
        ["| senetv2 r=32 K=4 (= senet r=8)", "63.00", "+3.00", "-", "-", "78.60 |"],
        ["| senetv2 r=32 K=4 residual", "64.00", "+4.00", "-", "-", "- |"],
        ["| resnet zero-init", "70.00", "-", "-", "+10.00", "- |"],
        ["| senetv2 r=32 K=4 (= senet r=8) zero-init", "72.00", "+2.00", "+0.50", "+9.00", "- |"],
        ["| senet r=32 zero-init", "71.50", "+1.50", "-", "-", "- |"]]


def test_intervals_are_those_of_students_t():
    for freedom, t in enumerate(train.T95, start=1):    # 95 % of the density are within t of 0
        x, half = np.linspace(-t, t, 10**5), (freedom + 1) / 2
        density = (1 + x**2 / freedom)**-half * math.gamma(half) / math.gamma(freedom / 2)
        share = density.mean() * 2 * t / math.sqrt(freedom * math.pi)
        assert share == pytest.approx(0.95, abs=5e-5)

    ones = {"net": {0: -1.0, 1: 1.0} | dict.fromkeys(range(2, 99), 0.0)}
    half = train.T95[8] * (2 / 98 / 99)**0.5            # of more than ten runs, a little too wide
    ones["base"] = dict.fromkeys(range(99), 0.0)
    assert train.difference(ones, "net", "base") == f"+0.00 [-{half:.2f}, +{half:.2f}]"


def test_each_comparison_has_a_table_and_what_is_in_none_is_named(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "copied", 0, 60.0)            # the first one counts
    invent_run(tmp_path / "old", 1, 70.0, erase=0)      # a setting that has gone
    invent_run(tmp_path / "long", 0, 90.0, epochs=3, done=3)
    invent_run(tmp_path / "few", 0, 50.0, train_images=10000)
    invent_run(tmp_path / "few narrow", 0, 51.0, train_images=10000, model="senet", reduction=32)
    train.main(["--report", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| resnet | 8,036,426 | 2 | 70.00 ± 0.00 | - | - | 77.38 |" in text
    assert "### cifar10, all training images, 3 epochs" in text and "| 1 | 90.00 | - |" in text
    assert "### cifar10, 10,000 training" in text and "| 1 | 51.00 | +1.00 | - | - |" in text
    assert text.count("```mermaid") == 3

    # Unfinished runs, runs of other code and what is no run.
    for name, more in (("running", dict(done=1)), ("newer", dict(recipe="newer")), ("list", {}),
                       ("without top1", {})):
        invent_run(tmp_path / name, 4, 80.0, **more)
    (tmp_path / "list" / "config.json").write_text("[1, 2]")
    (tmp_path / "without top1" / "metrics.csv").write_text("epoch,top5\n1,80\n2,80\n")
    (tmp_path / "config.json").write_text("of another program")
    train.main(["--report", str(tmp_path)])
    table, rest = capsys.readouterr().out.split("\nRuns that are in no table:\n\n")
    assert text.startswith(table) and "1 of 2 epochs" in rest
    assert "copied: top-1 60.00%; the table uses another run with the same settings (70.00%" in rest
    assert sorted(line.split(": ")[0] for line in rest.splitlines()) == [f"- {tmp_path}", *(
        f"- {tmp_path / name}" for name in ("copied", "list", "newer", "running", "without top1"))]


# ----------------------------------------------------------------------------------------- Makefile


def make(*words, **environment):
    """The lines that make prints.  PYTHON=... keeps it from installing into .venv."""
    result = subprocess.run(["make", "--no-print-directory", *words], cwd=HERE, text=True,
                            capture_output=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("target, variables", [
    ("train", ["DATA_DIR", "OUT", "WEIGHTS"]), ("look", ["DATA_DIR"]),
    ("evaluate", ["CHECKPOINT", "OUT"]), ("predict", ["CHECKPOINT", "IMAGE"])])
def test_values_with_spaces_and_quotes_arrive_whole(target, variables):
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    values = {name: f"my cat's  \"best\" & (photos); echo * {name}" for name in variables}
    lines = make("--silent", target, f"PYTHON={show}", *map("=".join, values.items()))
    words = json.loads(lines[-1])
    for name, value in values.items():
        flag = "--predict" if name == "IMAGE" else "--" + name.lower().replace("_", "-")
        assert words[words.index(flag) + 1] == value


@pytest.mark.parametrize("words, said", [("predict", "needs IMAGE"),
                                         ("train EPOCH=1", "unknown variable EPOCH;")])
def test_what_make_cannot_use_is_refused(words, said):
    words = ["make", "--no-print-directory", "-n", *words.split(), "PYTHON=python3"]
    result = subprocess.run(words, cwd=HERE, text=True, capture_output=True)
    assert result.returncode != 0 and said in result.stderr and result.stdout == ""


@pytest.mark.parametrize("target", ["train", "evaluate", "test", "experiment1"])
def test_only_what_was_typed_for_this_make_counts(target):
    noise = dict.fromkeys(("ARGS", "CHECKPOINT", "DATASET", "DATA_DIR", "MODEL", "NPROC", "OUT",
                           "PYTHON", "SEED", "SEEDS", "TRAIN", "WEIGHTS"), "noise")
    assert make("-n", target, **noise) == make("-n", target)
    inner = f"make --no-print-directory -n {target} PYTHON=python3 #"       # as a test may start it
    assert make("--silent", "test", f"PYTHON={inner}", "ARGS=-k x") == make(
        "-n", target, "PYTHON=python3")


@pytest.mark.parametrize("words, count, said", [
    ("paper", 24, ("--dataset cifar100 --layers 3,4,6,3 --model senetv2 --seed 1",
                   "--dataset cifar10 --layers 1,1,1,1 --model senet --reduction 16 --seed 0")),
    ("paper LAYERS=1,1,1,1 DATASET=imagenet EPOCHS=2", 8, ("--layers 1,1,1,1 --epochs 2",)),
    ("experiment1", 4, ("cifar10", "--model senet --reduction 16")),
    ("experiment2", 8, ("cifar100", "--reduction 2")), ("experiment3", 6, ("--model senetv2",)),
    ("experiment4", 4, ("--residual",)), ("experiment5", 8, ("--model vit",)),
    ("experiment6", 12, ("--model resnet --zero-init", "--model senetv2 --zero-init")),
])
def test_experiments_are_lists_of_commands_that_parse(words, count, said):
    lines = make(*words.split(), "PYTHON=python3", "TRAIN=echo", "SEEDS=0 1")
    parsed = [train.parse_args(shlex.split(line)) for line in lines]
    assert len(lines) == len({args.out for args, _ in parsed}) == count
    assert all(any(part in line for line in lines) for part in said)

    seeds = [settings["seed"] for _, settings in parsed]
    assert seeds == [0] * (count // 2) + [1] * (count // 2)         # whole comparisons first


# -------------------------------------------------------------------------------- Pages and scripts


PAGES = {str(page.relative_to(HERE)): page.read_text() for page in (
    HERE / "README.md", *sorted(HERE.glob("docs/*.md")), *HERE.glob("results/README.md"))}
CODE = [pytest.param(code, id=f"{name}-{number}") for name, text in PAGES.items() for number, code
        in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.DOTALL))]


def test_pages_name_files_and_tests_that_exist():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#\s]+)|(?:src|href|srcset)=\"([^\"#]+)", text)
        local = [link for pair in links for link in pair if link and "://" not in link]
        assert [link for link in local if not (HERE / page).parent.joinpath(link).exists()] == []
    named = set(re.findall(r"\b(test_\w+_\w+_\w+)\b(?!\.py)", "".join(PAGES.values())))
    assert len(named) >= 6 and named <= globals().keys()


@pytest.mark.parametrize("code", CODE)
def test_the_python_of_the_pages_runs(code, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(HERE / "assets")
    Path("runs").mkdir()
    Path("runs", "shapes-senetv2-paper-seed0").symlink_to(finished)         # `make train`
    images = Path("tiny-imagenet-200", "val", "images")
    images.mkdir(parents=True)
    for name in ("val_0.JPEG", "val_1.JPEG", "val_2.JPEG"):
        images.joinpath(name).touch()
    images.with_name("val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\tn0{i % 2}\t0\t1\t62\t63\n" for i in range(3)))

    exec(compile(code, "a page", "exec"), {})
    if "tiny-imagenet" in code:
        assert sorted(str(path) for path in Path("tiny-imagenet-200/val").glob("*/*")) == [
            f"tiny-imagenet-200/val/{name}" for name in
            ("n00/val_0.JPEG", "n00/val_2.JPEG", "n01/val_1.JPEG")]


def test_the_four_lines_of_the_readme_are_the_gate():
    lines, = re.findall(r"^```py\n(.*?)^```", PAGES["README.md"], re.M | re.DOTALL)
    gate, x = AggregatedSqueezeExcitation(64, 8).double(), torch.randn(2, 64, 5, 5).double()
    names = dict(torch=torch, F=F, x=x, reduce=gate.reduce, expand=gate.expand)
    exec(lines, names)
    torch.testing.assert_close(names["y"], gate(x))


def test_the_results_are_what_the_report_prints(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    train.main(["--report", "results"])
    report = Path("results", "about.md").read_text() + capsys.readouterr().out
    assert PAGES["results/README.md"] == report


def test_the_answers_and_the_verdict_follow_from_the_raw_files():
    top1 = {}
    for config in HERE.glob("results/*/*/config.json"):
        settings = json.loads(config.read_text())["settings"]
        if "other-machine" not in str(config):
            width = f" r={settings['reduction']}" if settings["model"] == "senet" else ""
            width += "".join(f" {key.replace('_', '-')}" for key in ("residual", "zero_init")
                             if settings.get(key))
            table = f"{settings['dataset']} | {settings['layers']} | {settings['epochs']}"
            seeds = top1.setdefault((table, settings["model"] + width), {})
            seeds[settings["seed"]] = float(rows(config.parent)[-1]["top1"])

    answers = re.findall(r"^\| (cifar\d+ \| \S+ \| \d+) \| (.+) minus (.+) \| (\d) \| (.+) "
                         r"\| (\S+) \| (.+) \|$", PAGES["results/README.md"], re.M)
    for table, name, base, seeds, said, claim, words in answers:
        name, base = top1[table, name], top1[table, base]
        gaps = [name[seed] - base[seed] for seed in name.keys() & base.keys()]
        mean, deviation = np.mean(gaps), np.std(gaps, ddof=1)
        half = {3: 4.303, 5: 2.776}[len(gaps)] * deviation / len(gaps)**0.5     # Student's t
        assert said == f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        assert seeds == str(len(gaps))
        claims = [("the paper's figure", float(claim))] if claim != "-" else []
        assert words == ", ".join(f"{'ex' if abs(value - mean) > half else 'in'}cludes {text}"
                                  for text, value in [*claims, ("0", 0)])

    verdict = re.search(r"\*\*The verdict\.\*\*(.*?)\n\n", PAGES["README.md"], re.DOTALL)[1]
    number = r"[+-]\d+\.\d\d"
    quoted = "".join(said + claim for *_, said, claim, _ in [answers[i] for i in (0, 3, 4)])
    control, = [said.split()[0] for _, name, *_, said, _, _ in answers if name == "constant"]
    assert re.findall(number, verdict) == [*re.findall(number, quoted), control]


def test_the_readme_is_short_and_quotes_rows_of_the_results():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 220 and len(PAGES["README.md"].split()) <= 2000
    quoted = {line for line in lines if line.startswith("|") and " ± " in line}
    assert quoted and quoted <= {*PAGES["results/README.md"].splitlines()}


LONGEST = {"senetv2.py": 20, "data.py": 20, "train.py": 20, Path(__file__).name: 25}


@pytest.mark.parametrize("name", ["senetv2.py", "data.py"])
def test_the_first_two_scripts_import_none_of_the_others(name):
    imported = re.findall(r"^\s*(?:import|from) +([\w.]+)", (HERE / name).read_text(), re.M)
    assert "torch" in imported and not {*imported} & {"senetv2", "data", "train", "test_senetv2"}


@pytest.mark.parametrize("name", LONGEST)
def test_lines_end_by_column_100_and_code_has_room_to_breathe(name):
    text = (HERE / name).read_text(encoding="utf-8")
    lines, settings = text.splitlines(), set()
    for node in ast.parse(text).body:       # the module's own tables may be long
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Dict, ast.Tuple)):
            settings.update(range(node.lineno, node.end_lineno + 1))
    breaths = [number for number, line in enumerate(lines, start=1)
               if not line.strip() or line.strip().startswith("#") or number in settings]
    ends = [0, *breaths, len(lines) + 1]

    assert [number for number, line in enumerate(lines, start=1) if len(line) > 100] == []
    assert [(before + 1, after - before - 1) for before, after in zip(ends, ends[1:])
            if after - before - 1 > LONGEST[name]] == []        # (first line, length)


# --------------------------------------------------------------------------------------- make bench


def training_step(net, batch_size, image_size, device):
    """A function that makes one training step: forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=train.bfloat16(device)):
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


def bench(argv):
    """Print the speed of training, of the loader and of the gates, as median [quartiles]."""
    parser = argparse.ArgumentParser(prog="test_senetv2.py bench",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, kind, default, meaning in (
            ("layers", str, "3,4,6,3", "bottlenecks per stage"),
            ("stem", str, "imagenet", "as in train.py"),
            ("batch-size", int, 128, "images per step"),
            ("image-size", int, 32, "pixels per side"),
            ("dataset", str, "shapes", "of the loader"),
            ("data-dir", str, "data", "where its files are"),
            ("seconds", float, 60, "how long to measure training")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{'bfloat16' if train.bfloat16(device) else 'float32'}; median [quartiles]")
    for part in (bench_networks, bench_loader, bench_cardinality):
        part(args, device)


def bench_networks(args, device):
    """What the gates cost in a training step."""
    steps = []
    for name in OURS:
        net = build_model(name, 10, tuple(map(int, args.layers.split(","))), args.stem)
        net.to(device, memory_format=torch.channels_last)
        net = torch.compile(net) if args.compile else net
        steps.append(training_step(net, args.batch_size, args.image_size, device))
    times = interleaved(steps, args.seconds, device)

    print(f"\ntraining steps of {args.batch_size} images, {args.image_size}x{args.image_size}, "
          f"{args.stem} stem, layers {args.layers}{', compiled' * args.compile}; "
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
        sys.exit("test_senetv2.py: error: not even one batch; give a smaller --batch-size")
    net = build_model("senetv2").to(device, memory_format=torch.channels_last)
    step = training_step(net, args.batch_size, source.view([0]).shape[-1], device)

    def load():
        list(zip(range(count), source.train_batches(0)))
    loading, training = interleaved([load, step], 20, device).median(0).values
    print(f"\nloader of {args.dataset}: {count * args.batch_size / loading:,.0f} images/s in "
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


# -------------------------------------------------------------------------------------- make faults


SAID = {"SIGKILL": "", "full disk": "cannot write", "second process": "another process is training"}
CASES = [(source, world) for source in ("shapes", "folder") for world in (1, 2)]


def faults(argv):
    """Disturb runs at random moments, and print how many end as if they had been left alone.

    Most are killed twice; some meet a full disk, or the same command typed twice, and must say so.
    A run survives if the command, given once more, ends with the bits of an undisturbed run.  It
    forks, so it does not run on Windows.
    """
    parser = argparse.ArgumentParser(prog="test_senetv2.py faults")
    parser.add_argument("--trials", type=int, default=100, help="runs to disturb (default: 100)")
    trials = parser.parse_args(argv).trials
    torch.set_num_threads(1)
    data.draw_shapes = functools.cache(data.draw_shapes)    # drawn once, here: forks inherit it
    rng, began, late = np.random.default_rng(0), time.monotonic(), []
    seconds, survived = {}, {(fault, case): [] for fault in SAID for case in CASES}

    with tempfile.TemporaryDirectory() as root:
        draw_folder((root := Path(root)) / "images")
        data.draw_shapes(12000, seed=1)
        for case in CASES:
            start = time.monotonic()
            assert not any(wait(launch(root, str(case), case))), (root / "said").read_text()
            seconds[case] = time.monotonic() - start

        for number in range(trials):
            case, fault = CASES[number % 4], [*SAID][max(0, number // 4 % 6 - 3)]
            trouble, step = trial(root, case, fault, rng, seconds[case])
            survived[fault, case].append(not trouble)
            late += [step > 0] * (fault == "SIGKILL")
            if trouble:
                print(f"{fault}, {case}: {trouble}", flush=True)

    total = sum(map(sum, survived.values()))
    print(f"{total} of {trials} survived, in {time.monotonic() - began:.0f} s; of {len(late)} that "
          f"were killed, {sum(late)} went on from a step above 0\n\n| survived / tried | "
          "shapes, 1 process | shapes, 2 processes | folder, 1 process | folder, 2 processes |\n"
          "|---|---|---|---|---|")
    for fault in SAID:
        found = [survived[fault, case] for case in CASES]
        print(f"| {fault} | {' | '.join(f'{sum(row)}/{len(row)}' for row in found)} |")
    sys.exit(total < trials or sum(late) < len(late) / 2)


def trial(root, case, fault, rng, seconds):
    """(what went wrong, in words, or None; the last step that a process resumed after)"""
    shutil.rmtree(root / "trial", ignore_errors=True)
    (root / "said").unlink()
    for _ in range(2 if fault == "SIGKILL" else 1):
        runs = [launch(root, "trial", case, fault) for _ in range(1 + (fault == "second process"))]
        if fault == "SIGKILL":
            time.sleep(rng.uniform(0, seconds))
            for rank in rng.permutation(case[1]):       # one first; then, as torchrun does, others
                runs[0][rank].kill()
        list(map(wait, runs))

    codes, text = wait(launch(root, "trial", case)), (root / "said").read_text()
    step = max(map(int, re.findall(r"resuming after step (\d+)", text)), default=0)
    ours = re.search(r'(train|data)\.py", line', text)       # in a traceback
    if any(codes) or ours or SAID[fault] not in text:
        return f"{codes}: {text}", step
    with contextlib.suppress(AssertionError):
        assert same_result(root / "trial", root / str(case))
        return None, step
    return "the result is another one", step


def launch(root, name, case, fault=None):
    """Fork the processes of a run, on a full disk or not; what they print goes to root/said."""
    source, world = case
    flags = eight_steps(source, root, root / name, "--checkpoint-minutes", "0", "--workers", "2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                       "WORLD_SIZE": str(world)}

    def run(rank):
        for stream in (1, 2):
            os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ["RANK"], train.RANK, train.WORLD = str(rank), rank, world
        if fault == "full disk":        # no file may grow beyond this, less than a checkpoint
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
        train.main(flags)

    fork = torch.multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes):
    return [process.join() or process.exitcode for process in processes]


if __name__ == "__main__":
    if (command := dict(bench=bench, faults=faults).get(" ".join(sys.argv[1:2]))) is None:
        sys.exit("usage: python test_senetv2.py bench|faults [--help]; the tests: make test")
    command(sys.argv[2:])
