"""Chapter 4: the claims of the README, each against an oracle worked out independently.

An oracle says what the right answer is without asking the code under test: another implementation,
a count by hand, a run that was left alone.  A test that repeats the code's formula sees nothing.

    make test ARGS=test_senetv2.py               this chapter, in less than a minute
    make test ARGS='-k literal_branches'         some tests
    make test                                    these and those of tests/, which hold the details
"""

import copy
import csv
import functools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.transforms import v2

import data
import train
from senetv2 import OURS, AggregatedSqueezeExcitation, SqueezeExcitation, build_model
from support import checkpoint

HERE = Path(__file__).parent
SMALL = (1, 1, 1, 1)

# ------------------------------------------------------------------------------------------ Helpers


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)        # every test draws the same numbers


@pytest.fixture(autouse=True, scope="session")
def plain_machine():
    """On the CPU, equality to the bit is promised; two threads would wait for others' programs."""
    train.OPTIONS["device"] = ("cpu", *train.OPTIONS["device"][1:])
    os.environ["OMP_NUM_THREADS"] = "1"                         # of child processes
    torch.set_num_threads(1)
    data.draw_shapes = functools.cache(data.draw_shapes)        # they take seconds


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


def equal(actual, expected):
    """Bit for bit, also within lists and dicts."""
    (values, form), (others, other_form) = map(tree_flatten, (actual, expected))
    return form == other_form and all(
        torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y
        for x, y in zip(values, others))


def assert_equal(actual, expected):
    assert equal(actual, expected)


def save_image(image, path, kind="PNG"):
    v2.functional.to_pil_image(image).save(path, kind)


# ----------------------------------------------------------------------------------------- The gate


class LiteralBranches(nn.Module):
    """SENetV2's gate as the paper draws it: K hidden layers, a ReLU on each, a concatenation."""

    def __init__(self, channels, reduction=32, cardinality=4):
        super().__init__()
        width = channels // reduction
        self.branches = nn.ModuleList(nn.Linear(channels, width) for _ in range(cardinality))
        self.expand = nn.Linear(cardinality * width, channels)

    def excite(self, z):                                        # (B, C) -> (B, C, 1, 1)
        u = torch.cat([F.relu(branch(z)) for branch in self.branches], dim=1)   # (B, K*C/r)
        return torch.sigmoid(self.expand(u))[..., None, None]

    def forward(self, x):                                       # (B, C, H, W) -> (B, C, H, W)
        return x * self.excite(x.mean((2, 3)))


@pytest.mark.parametrize("sizes", [(64, 8, 4), (60, 7, 3), (256, 32, 1)])
def test_the_wide_matrix_trains_like_the_literal_branches(sizes):
    literal = LiteralBranches(*sizes).double()
    ours = AggregatedSqueezeExcitation(*sizes[:2], cardinality=sizes[2]).double()

    def stacked(tensor):        # the literal branches' weights or gradients as those of one layer
        wide = zip(*(map(tensor, branch.parameters()) for branch in literal.branches))
        return [*map(torch.cat, wide), *map(tensor, literal.expand.parameters())]

    for mine, theirs in zip(ours.parameters(), stacked(lambda p: p.data), strict=True):
        mine.data.copy_(theirs)
        assert mine.shape == theirs.shape

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


# ------------------------------------------------------------------------ The network and its table


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 32)])
@pytest.mark.parametrize("name", OURS)
def test_stages_have_resnets_shapes(name, stem, side):
    nodes = ["maxpool", "layer1", "layer2", "layer3", "layer4", "fc"]
    cut = create_feature_extractor(net := build_model(name, 7, SMALL, stem), nodes)
    assert parameters(net.conv1) == 64 * 3 * (7 * 7 if stem == "imagenet" else 3 * 3)   # no bias
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


@pytest.mark.parametrize("name", ["resnet", "senet", "senetv2"])
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


@pytest.mark.parametrize("name", OURS)
def test_a_single_batch_is_learnt_by_heart(name):
    images, labels = data.draw_shapes(20, seed=3)
    x, net = images.float() / 127.5 - 1, build_model(name, 10, SMALL)
    train_steps(net, [(x, labels)] * 5)
    with torch.no_grad():
        assert (net(x).argmax(1) == labels).all()


@pytest.mark.parametrize("layers, classes, paper", [((3, 4, 6, 3), 100, (1.28, 5.05, 5.05)),
                                                    (SMALL, 10, (0.35, 1.40, 1.40))])
def test_gates_add_what_they_do_by_hand_and_in_the_paper(layers, classes, paper):
    with torch.device("meta"):
        count = parameters(ResNet(Bottleneck, layers, classes))
        nets = [build_model("senet", classes, layers), build_model("senetv2", classes, layers),
                build_model("senet", classes, layers, reduction=8)]

    channels = np.repeat((256, 512, 1024, 2048), layers)        # of each bottleneck
    for net, cardinality, claim in zip(nets, (1, 4, 4), paper):
        units = cardinality * (channels // 32)      # two dense layers with biases, C -> units -> C
        added = (2 * channels * units + units + channels).sum()
        assert parameters(net) - count == added

        # The paper's two decimals are of a difference of two rounded figures.
        assert added / 1e6 == pytest.approx(claim, abs=0.01)


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


# ----------------------------------------------------------------------------------------- Training


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 0.1, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])


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
    """The flags of a run of two epochs on shapes or on root/images; its network has dropout, and
    its last test batch is not full."""
    kind = (["--train-images", "32", "--hold-out", "19"] if source == "shapes" else
            ["--dataset", "folder", "--data-dir", root / "images", "--image-size", "32"])
    return list(map(str, ["--model", "mobilenet_v2", "--epochs", "2", "--batch-size", "8",
                          "--device", "cpu", "--out", out, *kind, *more]))


@pytest.fixture(scope="session")
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
    for key in ("settings", "images", "step", "measures", "model", "optimizer", "scaler"):
        assert_equal(a[key], b[key])
    return True


def stop_at(step, flags, monkeypatch, saved=None):
    """Train until Ctrl-C after step `step`.  last.pt is of the step before, or of `saved`, (step,
    evaluations); (0, 0) means that there is none."""
    def save(state, inner=checkpoint.save):
        if state.step == step:
            raise KeyboardInterrupt
        if saved in (None, (state.step, len(state.history))):
            inner(state)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(checkpoint, "save", save)
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
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("scratch" in said) == (saved[0] == 0)

    shutil.copytree(whole / "images", tmp_path / "images")          # a folder may have moved
    train.main(eight_steps(source, tmp_path, tmp_path, "--workers", "1"))
    assert (f"after step {saved[0]}" in capsys.readouterr().out) == (saved[0] > 0)
    assert same_result(tmp_path, whole / source)
