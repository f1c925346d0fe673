"""Chapter 4: the claims that README and docstrings make, each against an oracle worked out independently.

    make test                                    all of them, in minutes on two cores
    make test ARGS='-k literal_branches'         some of them
"""
import copy
import csv
import ctypes
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps      # torchvision brings it
from torch import nn
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

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),       # README, known limits
              pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")]        # of the hostile checkpoint


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def same_start():
    """Every test draws the same numbers, and leaves the signals as they were."""
    torch.manual_seed(0)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------ The gate


class LiteralBranches(nn.Module):
    """SENetV2's gate as the paper draws it: K dense layers, a ReLU on each, a concatenation."""

    def __init__(self, channels, reduction, cardinality):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(channels, channels // reduction) for _ in range(cardinality))
        self.expand = nn.Linear(cardinality * (channels // reduction), channels)

    def forward(self, x):
        z = F.adaptive_avg_pool2d(x, 1).flatten(1)
        u = torch.cat([torch.relu(branch(z)) for branch in self.branches], dim=1)
        return x * torch.sigmoid(self.expand(u)).unflatten(1, (-1, 1, 1))


@pytest.mark.parametrize("channels, reduction, cardinality", [(64, 8, 4), (60, 7, 3), (256, 32, 1)])
def test_the_wide_matrix_equals_the_literal_branches_in_outputs_gradients_and_training(channels, reduction, cardinality):
    literal = LiteralBranches(channels, reduction, cardinality).double()
    ours = AggregatedSqueezeExcitation(channels, reduction, cardinality).double()

    def stacked(tensor):        # the literal branches' weights, biases or gradients as one
        return torch.cat([tensor(branch) for branch in literal.branches])

    ours.reduce.weight.data, ours.reduce.bias.data = stacked(lambda b: b.weight.data), stacked(lambda b: b.bias.data)
    ours.expand.load_state_dict(literal.expand.state_dict())
    x, target = torch.randn(2, 3, channels, 5, 4, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (literal, ours)]
    for _ in range(10):
        for net, image, optimizer in zip((literal, ours), (a, b), optimizers):
            optimizer.zero_grad()
            F.mse_loss(net(image), target).backward()
        torch.testing.assert_close(ours(b), literal(a))
        torch.testing.assert_close(b.grad, a.grad)
        torch.testing.assert_close(ours.reduce.weight.grad, stacked(lambda b: b.weight.grad))
        torch.testing.assert_close(ours.reduce.bias.grad, stacked(lambda b: b.bias.grad))
        torch.testing.assert_close(ours.expand.weight.grad, literal.expand.weight.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.reduce.weight, stacked(lambda b: b.weight))


def test_the_gate_equals_torchvisions_squeeze_excitation():
    theirs = torchvision.ops.SqueezeExcitation(64, 16).double()         # 1x1 convolutions, ReLU, sigmoid
    for ours in (SqueezeExcitation(64, 4).double(), AggregatedSqueezeExcitation(64, 16, 4).double()):
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
    block(x).square().sum().backward()
    assert block.expand.weight.grad.abs().max() > 0 == block.reduce.weight.grad.abs().max()


def test_an_undecided_gate_is_a_half_and_a_softmax_would_nearly_close_it():
    block = SqueezeExcitation(256, 32)
    nn.init.zeros_(block.expand.weight), nn.init.zeros_(block.expand.bias)
    scale = block.scale(torch.randn(1, 256, 4, 4)).flatten()
    torch.testing.assert_close(scale, torch.full((256,), 0.5))
    torch.testing.assert_close(scale.logit().softmax(0), torch.full((256,), 1 / 256))


def test_the_squeeze_leaves_one_number_a_channel():
    block, seen = AggregatedSqueezeExcitation(64, 8), []
    block.reduce.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(3, 64, 7, 5)
    block(x)
    assert seen[0].shape == (3, 64)
    torch.testing.assert_close(seen[0], F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("cardinality, count", [(1, 4_360), (4, 16_672)])
def test_the_parameters_of_a_gate_grow_with_its_width(cardinality, count):
    width = cardinality * 256 // 32
    assert parameters(AggregatedSqueezeExcitation(256, 32, cardinality)) == 2 * 256 * width + width + 256 == count


@pytest.mark.parametrize("kind", [SqueezeExcitation, AggregatedSqueezeExcitation])
def test_residual_adds_the_input_as_the_released_code_does(kind):
    block, x = kind(32, 8), torch.randn(2, 32, 5, 5)
    released = copy.deepcopy(block)
    released.residual = True
    torch.testing.assert_close(released(x), x + block(x))
    assert 0 < block.scale(x).min() and block.scale(x).max() < 1 < released.scale(x).min()
    assert kind(32, 8, residual=True).residual and released.scale(x).shape == (2, 32, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_block_works_alone_in_any_dtype_and_memory_format(dtype):
    block = AggregatedSqueezeExcitation(64, 8).to(dtype)
    x = torch.randn(2, 64, 6, 5, dtype=dtype)
    y = block(x)
    assert y.shape == x.shape and y.dtype == dtype
    last = block(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


def test_the_block_compiles_whole_exports_and_copies():
    block, x = AggregatedSqueezeExcitation(64, 8).eval(), torch.randn(2, 64, 6, 6)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
    torch.testing.assert_close(copy.deepcopy(block)(x), block(x))


@pytest.mark.parametrize("make, said", [
    (lambda: SqueezeExcitation(16, 32), ("reduction 32", "16 channels", "16 is the largest")),
    (lambda: AggregatedSqueezeExcitation(16, 0), ("reduction 0", "16 channels")),
    (lambda: AggregatedSqueezeExcitation(64, 8, 0), ("cardinality is 0", "1 or more")),
    (lambda: build_model("senetv2", reduction=512), ("reduction 512", "256 channels")),
    (lambda: build_model("senet", layers=(1, 1, 1)), ("1,1,1", "four positive")),
    (lambda: build_model("senet", layers=(1, 1, 0, 1)), ("1,1,0,1", "four positive")),
    (lambda: build_model("resnet", stem="tiny"), ("'tiny'", "imagenet, cifar")),
    (lambda: build_model("senet3"), ("'senet3'", "resnet, senet, senetv2", "convnext_tiny, vit")),
    (lambda: build_model("eficientnet_b1"), ("did you mean efficientnet_b1?",)),
    (lambda: build_model("vit", image_size=130), ("16x16", "130")),
])
def test_impossible_networks_are_refused_in_words_that_name_the_way_out(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- The network


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 32)])
@pytest.mark.parametrize("name", OURS)
def test_stages_have_resnets_shapes(name, stem, side):
    net, x = build_model(name, 7, SMALL, stem), torch.randn(2, 3, 32, 32)
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    assert x.shape == (2, 64, side, side)
    for stage, channels in ((net.layer1, 256), (net.layer2, 512), (net.layer3, 1024), (net.layer4, 2048)):
        x = stage(x)
        assert x.shape == (2, channels, side, side)
        side //= 2
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def gates_by_hand(layers, width):
    """Parameters of two dense layers with biases, C -> width(C) -> C, in every bottleneck."""
    return sum(n * (2 * c * width(c) + width(c) + c) for n, c in zip(layers, (256, 512, 1024, 2048)))


@pytest.mark.parametrize("layers, classes, plain, senet, senetv2, paper", [
    ((3, 4, 6, 3), 10, 23_528_522, 1_273_048, 5_046_880, ("1.28", "5.05")),
    ((3, 4, 6, 3), 100, 23_712_932, 1_273_048, 5_046_880, ("1.28", "5.05")),
    ((3, 4, 6, 3), 1000, 25_557_032, 1_273_048, 5_046_880, ("1.28", "5.05")),
    (SMALL, 10, 8_036_426, 352_120, 1_396_960, ("0.35", "1.40")),
])
def test_parameter_counts_are_those_worked_out_by_hand_and_the_papers(layers, classes, plain, senet, senetv2, paper):
    assert gates_by_hand(layers, lambda c: c // 32) == senet
    assert gates_by_hand(layers, lambda c: 4 * (c // 32)) == senetv2
    with torch.device("meta"):
        count = {name: parameters(build_model(name, classes, layers)) for name in OURS}
        assert parameters(build_model("senet", classes, layers, reduction=8)) == count["senetv2"]
    assert count == {"resnet": plain, "senet": plain + senet, "senetv2": plain + senetv2}
    for added, claim in zip((senet, senetv2), paper):       # two decimals of a difference of two rounded figures
        assert abs(added / 1e6 - float(claim)) <= 0.01


def test_the_table_prints_these_counts(capsys):
    senetv2.print_table(32, "imagenet")
    text = capsys.readouterr().out
    for figure in ("23,712,932", "1,273,048", "5,046,880", "8,036,426", "352,120", "1,396,960", "5.05 M", "0.35 M"):
        assert figure in text


def test_multiply_adds_are_those_worked_out_by_hand():
    net = build_model("senetv2", 10, SMALL)
    # conv1, then per stage: 1x1, 3x3, 1x1, the downsampling 1x1 and the two dense layers; then the classifier
    work, inplanes, side = 16 * 16 * 64 * 3 * 49, 64, 8
    for planes, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        out = side // stride
        work += side**2 * inplanes * planes + out**2 * planes * (9 * planes + 4 * planes) + out**2 * inplanes * 4 * planes
        work += 2 * 4 * planes * 4 * (4 * planes // 32)
        inplanes, side = 4 * planes, out
    assert senetv2.multiply_adds(net, 32) == work + 2048 * 10


def train_steps(net, batches):
    """The losses of steps of Adam, one a batch."""
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


def test_senetv2_is_senet_with_a_quarter_of_the_reduction_bit_for_bit_through_training():
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]
    nets = [from_one_seed("senetv2", reduction=32, cardinality=4), from_one_seed("senet", reduction=8)]
    losses, other_losses = (train_steps(net, batches) for net in nets)
    assert losses == other_losses
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_all_variants_start_from_the_same_trunk():
    trunks = [{k: v for k, v in from_one_seed(name).state_dict().items() if "gate" not in k} for name in OURS]
    torch.testing.assert_close(trunks[1:], [trunks[0]] * 2, rtol=0, atol=0)


def test_torchvisions_resnet50_weights_load_with_only_the_gates_missing():
    with torch.device("meta"):
        net, theirs = build_model("senetv2", 1000), torchvision.models.resnet50()
        result = net.load_state_dict(theirs.state_dict(), strict=False)
    assert result.unexpected_keys == [] and len(result.missing_keys) == 16 * 4      # 16 gates of 2 weights, 2 biases
    assert all(".gate." in key for key in result.missing_keys)


def test_the_bottleneck_gates_the_last_norm_before_the_addition():
    torch.manual_seed(1)
    gated = build_model("senet", 10, SMALL, reduction=16).layer2[0].double()
    plain = torchvision.models.resnet.Bottleneck(256, 128, stride=2, downsample=copy.deepcopy(gated.downsample)).double()
    plain.load_state_dict(gated.state_dict(), strict=False)
    captured = []
    plain.bn3.register_forward_hook(lambda module, args, out: captured.append(out) or gated.gate(out))
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
def test_peers_are_torchvisions_and_fit_both_image_sizes(name):
    for size in (32, 224):
        with torch.device("meta"):
            net = build_model(name, 7, image_size=size) if name == "vit" else build_model(name, 7)
            assert net(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert type(net).__module__.startswith("torchvision.models")


# ------------------------------------------------------------------------------------------ Sets in memory


def numbered(count=200, size=32, **options):
    """A set whose image i is filled with the value i + 1, to see where images go (the padding is 0)."""
    images = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, size, size).contiguous()
    both = images, torch.arange(count) % 10
    options = dict(erase=0, device="cpu", batch_size=32, seed=0, augment=True, rank=0, world=1) | options
    return data.InMemory(both, (images[:50], both[1][:50]), list("abcdefghij"), ((0, 0, 0), (1, 1, 1)), **options)


def epoch_of(source, epoch=0, **options):
    """The whole epoch: images in 0..1 (or normalised), labels."""
    return tuple(torch.cat(part) for part in zip(*source.train_batches(epoch, **options)))


def test_a_batch_is_a_function_of_seed_epoch_and_step():
    images, labels = epoch_of(numbered())
    again, _ = epoch_of(numbered())
    assert torch.equal(images, again)
    for other, other_labels in (epoch_of(numbered(), epoch=1), epoch_of(numbered(seed=1))):
        assert not torch.equal(images, other) and not torch.equal(labels, other_labels)
    late, late_labels = epoch_of(numbered(), first_step=4)
    assert torch.equal(images[4 * 32:], late) and torch.equal(labels[4 * 32:], late_labels)


def test_an_epoch_shows_no_image_twice_and_drops_the_incomplete_batch():
    images, labels = epoch_of(numbered())
    numbers = (images[:, 0, 16, 16] * 255).round().int() - 1
    assert len(images) == 6 * 32 and len(set(numbers.tolist())) == 6 * 32
    assert torch.equal(labels, numbers % 10)


def test_processes_share_each_batch_and_count_each_test_image_once():
    whole = list(numbered().train_batches(0))
    parts = [list(numbered(rank=rank, world=4).train_batches(0)) for rank in range(4)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)
    for world in (1, 3):
        seen = [numbered(rank=rank, world=world).test_batches() for rank in range(world)]
        numbers = sorted(n for part in seen for x, _ in part for n in (x[:, 0, 0, 0] * 255).round().int().tolist())
        assert numbers == list(range(1, 51))


def test_crops_and_flips_are_torchvisions_and_uniform():
    picture = torch.arange(32 * 32, dtype=torch.float32).reshape(1, 32, 32).mul(255 / 1024).round().to(torch.uint8)
    picture = torch.stack([picture[0], picture[0].T, picture[0].flip(1)])           # no two crops of it are alike
    count = 4000
    source = data.InMemory((picture.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64)),
                           (picture[None], torch.zeros(1, dtype=torch.int64)), ["a"], ((0, 0, 0), (1, 1, 1)), 0,
                           device="cpu", batch_size=500, seed=0, augment=True, rank=0, world=1)
    padded, known = F.pad(picture, (4,) * 4), {}
    for top in range(9):
        for left in range(9):
            crop = v2.functional.crop(padded, top, left, 32, 32)
            known[crop.numpy().tobytes()] = (top, left, 0)
            known[v2.functional.horizontal_flip(crop).numpy().tobytes()] = (top, left, 1)
    seen = [known[image.numpy().tobytes()] for image in source.view(np.arange(count), epoch=0)]
    for axis, choices in enumerate((9, 9, 2)):
        counts = np.bincount([draw[axis] for draw in seen], minlength=choices)
        expected, spread = count / choices, math.sqrt(count / choices * (1 - 1 / choices))
        assert (abs(counts - expected) < 4 * spread).all()
    assert len(set(seen)) == 9 * 9 * 2


def test_an_erasure_is_a_grey_square_that_may_hang_over_the_edge():
    source = numbered(200, erase=8)
    holes = (source.view(np.arange(200), epoch=0) == 128).all(1)
    areas = holes.flatten(1).sum(1)
    areas = areas[torch.arange(200) != 127]                                 # that one is grey all over
    assert areas.max() == 64 and areas.min() >= 16 and (areas < 64).any()
    assert not (source.view(np.arange(100)) == 128).any()


def test_test_images_are_never_augmented_and_normalised_as_torchvision_does():
    train_set, test_set = data.draw_shapes(64, seed=1), data.draw_shapes(30, seed=2)
    source = data.InMemory(train_set, test_set, list(data.SHAPES), data.STATISTICS["shapes"], 8,
                           device="cpu", batch_size=16, seed=0, augment=True, rank=0, world=1)
    oracle = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.STATISTICS["shapes"])])
    for _ in range(2):
        seen = torch.cat([images for images, _ in source.test_batches()])
        torch.testing.assert_close(seen, oracle(test_set[0]))
    assert torch.equal(torch.cat([labels for _, labels in source.test_batches()]), test_set[1])


def test_without_augmentation_training_images_stay_as_they_are():
    images, _ = epoch_of(numbered(augment=False))
    assert (images == images[:, :1, :1, :1]).all()


def test_train_images_takes_the_first_of_a_seeded_shuffle():
    small, large = (set(data.subset(1000, count, seed=4).tolist()) for count in (50, 200))
    assert len(small) == 50 and small < large and small != set(data.subset(1000, 50, seed=5).tolist())
    assert len(data.load_data("shapes", train_images=128).train_labels) == 128


# -------------------------------------------------------------------------------------------------- Shapes


def test_shapes_are_always_the_same_and_their_statistics_are_those_in_the_table():
    images, labels = data.draw_shapes(8000, seed=1)
    assert torch.equal(data.draw_shapes(100, seed=2)[0], data.draw_shapes(100, seed=2)[0])
    assert torch.bincount(labels).tolist() == [800] * 10
    pixels = images.double() / 255
    for values, known in zip((pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))), data.STATISTICS["shapes"]):
        torch.testing.assert_close(values.float(), torch.tensor(known), atol=6e-5, rtol=0)


def test_a_linear_classifier_on_the_pixels_fails_on_shapes():
    (x, y), (test_x, test_y) = data.draw_shapes(8000, seed=1), data.draw_shapes(1000, seed=2)
    x, test_x = (F.pad(images.flatten(1).float() / 127.5 - 1, (0, 1), value=1) for images in (x, test_x))
    for ridge in (10, 1000, 100000):        # least squares, closed form
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ F.one_hot(y).float())
        assert ((test_x @ weights).argmax(1) == test_y).float().mean() < 0.25


# --------------------------------------------------------------------------------------------------- CIFAR


def write_cifar(root, dataset, monkeypatch, images=6):
    """Files in the original format, with random pixels; torchvision is told their md5.  Returns (pixels, labels) twice."""
    source, written = getattr(torchvision.datasets, dataset.upper()), []
    key, classes = ("labels", 10) if dataset == "cifar10" else ("fine_labels", 100)
    rng, folder = np.random.default_rng(0), Path(root, source.base_folder)
    folder.mkdir(parents=True)

    def put(name, content):
        (folder / name).write_bytes(blob := pickle.dumps(content))
        return [name, hashlib.md5(blob).hexdigest()]

    for part in ("train_list", "test_list"):
        blocks = [{"data": rng.integers(0, 256, (images, 3 * 32 * 32), dtype=np.uint8),         # a row: red, green, blue planes
                   key: rng.integers(0, classes, images).tolist()} for _ in getattr(source, part)]
        monkeypatch.setattr(source, part, [put(name, block) for (name, _), block in zip(getattr(source, part), blocks)])
        written.append((np.concatenate([block["data"] for block in blocks]).reshape(-1, 3, 32, 32),
                        [label for block in blocks for label in block[key]]))
    _, md5 = put(source.meta["filename"], {source.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5})
    return written


@pytest.mark.parametrize("dataset, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_files_in_the_original_format(dataset, classes, tmp_path, monkeypatch):
    (images, labels), (test_images, test_labels) = write_cifar(tmp_path, dataset, monkeypatch)
    source = data.load_data(dataset, tmp_path, batch_size=2)
    assert np.array_equal(source.view(np.arange(len(images))).numpy(), images) and source.train_labels.tolist() == labels
    assert np.array_equal(source.test_images.numpy(), test_images) and source.test_labels.tolist() == test_labels
    assert source.train_size == len(images) and source.classes[3] == "class 3" and len(source.classes) == classes


def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    broken = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    broken.write_bytes(broken.read_bytes()[:-7])
    with pytest.raises(ValueError, match="data_batch_4 is truncated or altered"):
        data.load_data("cifar10", tmp_path)


def no_network(*args, **kwargs):
    raise URLError("no network")


def test_without_cifar_and_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py.*DATASET=shapes"):
        data.load_data("cifar10", tmp_path)


# ------------------------------------------------------------------------------------------------- Folders


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with three classes: JPEGs of many sizes, grayscale and colour, and a PNG named .JPEG."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 3)):
        for label in ("cat", "dog", "owl"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                size = (1 if i % 4 == 1 else 3, 20 + 7 * i, 60 - 3 * i)
                image = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
                (write_png if i % 4 == 2 else write_jpeg)(image, str(tmp_path / split / label / f"{label}_{i}.JPEG"))
    return tmp_path


def load_folder(root, **options):
    return data.load_data("imagenet", root, **dict(batch_size=8, image_size=32, images_per_class=0) | options)


def test_folder_batches_do_not_depend_on_the_number_of_workers(folder):
    images, labels = epoch_of(load_folder(folder), epoch=3)
    assert images.shape == (32, 3, 32, 32)
    for workers in (1, 2):
        other, other_labels = epoch_of(load_folder(folder, workers=workers), epoch=3)
        assert torch.equal(images, other) and torch.equal(labels, other_labels)
    late, _ = epoch_of(load_folder(folder, workers=2), epoch=3, first_step=2)
    assert torch.equal(images[16:], late)
    source = load_folder(folder)
    assert torch.equal(source.view([5], epoch=3), source.view([5], epoch=3))
    assert not torch.equal(source.view([5], epoch=3), source.view([5], epoch=4))


def test_folder_test_images_are_the_resized_centre(folder):
    source = load_folder(folder)
    path = folder / "val" / "cat" / "cat_0.JPEG"
    oracle = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*data.STATISTICS["imagenet"])])
    images, labels = next(source.test_batches())
    torch.testing.assert_close(images[0], oracle(torchvision.io.decode_image(str(path), mode="RGB")))
    assert sum(len(labels) for _, labels in source.test_batches()) == 9 and labels[0] == 0


def test_processes_without_a_share_of_the_last_test_images_get_an_empty_batch(folder):
    shares = [list(load_folder(folder, rank=rank, world=4, workers=rank % 2).test_batches()) for rank in range(4)]
    assert [[len(labels) for _, labels in share] for share in shares] == [[2, 1], [2, 0], [2, 0], [2, 0]]
    net = build_model("senetv2", 3, SMALL).eval()
    assert shares[1][1][0].shape == (0, 3, 32, 32) and net(shares[1][1][0]).shape == (0, 3)


def test_a_cut_folder_keeps_the_lowest_hashes_of_every_class(folder):
    kept = {os.path.basename(os.fsdecode(path)) for path in load_folder(folder, images_per_class=5).train.paths}
    oracle = {name for label in ("cat", "dog", "owl") for name in
              sorted(os.listdir(folder / "train" / label), key=lambda n: hashlib.md5(f"0/{n}".encode()).hexdigest())[:5]}
    assert kept == oracle


def test_the_oddities_of_the_real_imagenet_are_read_as_pillow_reads_them(tmp_path):
    ramp = np.linspace(0, 255, 40 * 30 * 4).astype(np.uint8).reshape(40, 30, 4)     # smooth: JPEG keeps it, nearly
    colour, exif = Image.fromarray(ramp[..., :3], "RGB"), Image.Exif()
    exif[0x0112] = 6                                                                # orientation: turn right by 90 degrees
    colour.save(tmp_path / "turned.JPEG", exif=exif, quality=95)
    colour.convert("L").save(tmp_path / "gray.JPEG", quality=95)
    Image.fromarray(ramp, "CMYK").save(tmp_path / "cmyk.JPEG", quality=95)
    colour.save(tmp_path / "png.JPEG", format="PNG")
    for path in sorted(tmp_path.iterdir()):
        ours = data.read_image(path)
        oracle = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))).permute(2, 0, 1)
        assert ours.shape == oracle.shape == (3, *((30, 40) if path.name == "turned.JPEG" else (40, 30)))
        assert (ours.float() - oracle.float()).abs().mean() < 3, path.name
        for crop in (data.centre(64), v2.RandomResizedCrop(64)):                    # larger than the image
            assert crop(ours).shape == (3, 64, 64)


def test_a_folder_run_stopped_in_the_middle_of_an_epoch_ends_as_if_it_had_not(folder, tmp_path, monkeypatch):
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--layers", "1,1,1,1", "--image-size", "32", "--batch-size", "8",
             "--epochs", "2", "--workers"]
    train.main([*flags, "0", "--out", str(tmp_path / "whole")])
    stop_at(3, signal.SIGTERM, [*flags, "2", "--out", str(tmp_path / "parts")], monkeypatch, data.Folder)
    train.main([*flags, "1", "--out", str(tmp_path / "parts")])
    assert same_result(tmp_path / "parts", tmp_path / "whole")


def test_evaluation_asks_nothing_of_the_training_images(folder, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--layers", "1,1,1,1", "--image-size", "32", "--epochs", "1"]
    train.main([*flags, "--batch-size", "8", "--train-images", "16", "--out", str(tmp_path)])
    for path in [path for kind in (folder / "train").iterdir() for path in sorted(kind.iterdir())[1:]]:
        path.unlink()       # one a class is left: fewer than a batch, and than --train-images
    train.main(["--evaluate", "--checkpoint", str(tmp_path / "last.pt"), "--data-dir", str(folder), "--workers", "0"])
    assert f"{len(list(folder.glob('val/*/*')))} test images of folder: loss" in capsys.readouterr().out


def test_an_image_that_does_not_decode_stops_the_run_with_its_path(folder, tmp_path, capsys):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    text = complaint(capsys, "--dataset", "folder", "--data-dir", folder, "--layers", "1,1,1,1", "--image-size", "32",
                     "--batch-size", "8", "--workers", "2", "--out", tmp_path / "run")
    assert str(folder / "train" / "cat") in text and "decoded" in text


@pytest.mark.parametrize("spoil, said", [
    (lambda root: (root / "train").rename(root / "other"), "no train/ folder"),
    (lambda root: (root / "val" / "owl").rename(root / "val" / "elk"), "different classes.*elk, owl"),
    (lambda root: [path.unlink() for path in (root / "train" / "dog").iterdir()], "dog"),
    (lambda root: [path.write_bytes(b"no image") for path in (root / "val" / "cat").iterdir()], "cat_0.JPEG is no image"),
    (lambda root: Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "val/cat/cat_0.JPEG", "PNG"), "holds .* 8 bits"),
])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(folder, spoil, said, workers):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        for _ in load_folder(folder, workers=workers).test_batches():
            pass
    assert "\n" not in str(error.value)


def test_the_contact_sheet_has_a_row_a_class_and_pairs_of_before_and_after():
    sheet = data.contact_sheet(data.load_data("shapes", train_images=500))
    assert sheet.shape == (3, 10 * 68 + 4, 10 * 68 + 4) and sheet.dtype == torch.uint8
    before, after = sheet[:, 4:68, 4:68], sheet[:, 4:68, 72:136]
    assert not torch.equal(before, after)


# ------------------------------------------------------------------------------------------------ Training

QUICK = ["--train-images", "192", "--batch-size", "32", "--epochs", "2"]


def run(*flags, **options):
    """train.py as a user starts it."""
    return subprocess.run([sys.executable, HERE / "train.py", *map(str, flags)], capture_output=True, text=True, **options)


def complaint(capsys, *flags):
    """The one line with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None) and "\n" not in text.strip()
    return text


def rows(out):
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_through_the_command_line(tmp_path):
    out = tmp_path / "run"
    first = run(*QUICK, "--out", out)
    assert first.returncode == 0 and first.stderr == "" and "done: top-1" in first.stdout
    assert len([line for line in first.stdout.splitlines() if "/2  " in line]) == 2
    table = rows(out)
    assert [row["epoch"] for row in table] == ["1", "2"] and 0 <= float(table[1]["top1"]) <= 100
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["model"] == "senetv2" and settings["layers"] == "1,1,1,1" and settings["batch_size"] == 32
    again = run(*QUICK, "--out", out)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    judged = run("--evaluate", "--checkpoint", out / "last.pt")
    assert f"top-1 {float(table[1]['top1']):.2f}%" in judged.stdout and len(judged.stdout.splitlines()) == 11 + 5
    net = senetv2.load(out / "last.pt")
    assert net.classes == list(data.SHAPES) and not net.training
    images, labels = data.draw_shapes(1000, seed=2)
    with torch.no_grad():
        logits = net(data.Normalise(data.STATISTICS["shapes"], "cpu")(images))
    assert f"{100 * (logits.argmax(1) == labels).float().mean().item():.2f}" == f"{float(table[1]['top1']):.2f}"


@pytest.mark.parametrize("flags, said", [
    (["--dataset", "cifar11"], ("cifar11", "cifar100")),
    (["--model", "senetv3"], ("senetv3", "senetv2")),
    (["--stem", "tiny"], ("tiny", "cifar")),
    (["--layers", "3,4,6"], ("3,4,6", "four positive")),
    (["--layers", "3,4,0,3"], ("3,4,0,3", "four positive")),
    (["--epochs", "0"], ("--epochs", "0", "positive")),
    (["--epochs", "-1"], ("--epochs", "-1", "positive")),
    (["--batch-size", "0"], ("--batch-size", "positive")),
    (["--batch-size", "x"], ("--batch-size", "x")),
    (["--batch-size", "9000"], ("9000", "8000")),
    (["--train-images", "-5"], ("--train-images", "-5")),
    (["--train-images", "8001"], ("8001", "8000")),
    (["--cardinality", "0"], ("--cardinality", "positive")),
    (["--reduction", "0"], ("--reduction", "positive")),
    (["--reduction", "257"], ("257", "256")),
    (["--lr", "nan"], ("--lr", "positive")),
    (["--weight-decay", "-1"], ("--weight-decay", "between 0 and 1")),
    (["--dataset", "imagenet"], ("train/", "--data-dir")),
    (["--evaluate", "--checkpoint", "nowhere.pt"], ("nowhere.pt", "train first")),
    pytest.param(["--device", "cuda"], ("--device cpu",), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")),
])
def test_bad_input_is_refused_in_one_line_and_leaves_nothing_behind(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = complaint(capsys, *flags)
    assert all(part in text for part in said), text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two short epochs, done in this process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main([*QUICK, "--out", str(out)])
    return out


def test_prediction_names_the_most_likely_classes(finished, tmp_path, capsys):
    images, _ = data.draw_shapes(2, seed=9)
    for i, image in enumerate(images):
        write_png(image, str(tmp_path / f"{i}.png"))
    train.main(["--predict", *(str(tmp_path / f"{i}.png") for i in (0, 1)), "--checkpoint", str(finished / "last.pt")])
    lines = capsys.readouterr().out.splitlines()
    net = senetv2.load(finished / "last.pt")
    with torch.no_grad():
        chances = net(v2.Normalize(*data.STATISTICS["shapes"])(images.float() / 255)).softmax(1)
    for i, row in enumerate(chances):
        best = row.argsort(descending=True)[:5].tolist()
        assert lines[6 * i:6 * i + 6] == [str(tmp_path / f"{i}.png"), *(f"{row[k].item():8.2%}  {net.classes[k]}" for k in best)]


def test_weights_of_another_run_are_taken_where_name_and_shape_agree(finished, tmp_path, capsys):
    given = senetv2.read_checkpoint(finished / "last.pt")["model"]
    net = build_model("senetv2", 7, SMALL)
    before = net.fc.weight.clone()
    line = train.start_from(net, finished / "last.pt", "senetv2")
    assert f"{len(given) - 2} tensors taken" in line and "new: 2 (fc.weight, fc.bias)" in line and "left: 2 (" in line
    assert torch.equal(net.fc.weight, before)
    assert all(torch.equal(value, given[key]) for key, value in net.state_dict().items() if "fc" not in key)
    train.main([*QUICK, "--model", "resnet", "--weights", str(finished / "last.pt"), "--out", str(tmp_path)])
    assert "left: 16 (layer1.0.gate.reduce.weight" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no tensor of .* like network"):
        train.start_from(build_model("vit"), finished / "last.pt", "vit")


def test_weights_that_cannot_be_downloaded_are_said(monkeypatch, capsys):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    assert "resnet50 are not on this disk" in complaint(capsys, *QUICK, "--weights", "imagenet")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize("content", [lambda good: good[:len(good) // 2], lambda good: b"", lambda good: pickle.dumps(Hostile())])
def test_a_damaged_or_hostile_checkpoint_is_refused(content, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "run" / "last.pt"
    bad.parent.mkdir()
    bad.write_bytes(content((finished / "last.pt").read_bytes()))
    for flags in (["--evaluate", "--checkpoint", bad], [*QUICK, "--out", bad.parent]):
        assert "last.pt is damaged" in complaint(capsys, *flags)
    assert not (tmp_path / "hostile").exists()


def test_a_checkpoint_of_other_code_is_refused_in_one_line(finished, monkeypatch, capsys):
    monkeypatch.setitem(senetv2.GATES, "senetv2", lambda channels, **options: SqueezeExcitation(channels, 16))
    text = complaint(capsys, "--evaluate", "--checkpoint", str(finished / "last.pt"))
    assert "does not fit" in text and "layer1.0.gate.reduce.weight" in text and "--restart" in text


def test_a_checkpoint_of_other_settings_is_refused_with_every_difference(finished, capsys):
    before = (finished / "last.pt").read_bytes()
    text = complaint(capsys, *QUICK, "--out", finished, "--lr", "0.01", "--model", "resnet")
    assert "lr was 0.001, is 0.01" in text and "model was senetv2, is resnet" in text
    assert "--out" in text and "--restart" in text and (finished / "last.pt").read_bytes() == before


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path, capsys):
    text = complaint(capsys, *QUICK, "--out", tmp_path, "--lr", "1e30")
    assert "no longer finite at step" in text and not (tmp_path / "last.pt").exists()
    for step, bad in ((5, 3), (6, 3), (6, 6), (8, 7)):          # checked after `step`, in epochs of 6
        losses = torch.zeros(6).index_fill_(0, torch.tensor((bad - 1) % 6), math.nan)
        with pytest.raises(ValueError, match=f"at step {bad};"):
            train.check_finite(losses, nn.Linear(1, 1), step)


# ---------------------------------------------------------------------------- Interrupted equals uninterrupted


def same_result(out, other):
    """Weights, optimiser, history and metrics.csv, bit for bit; seconds are the machine's."""
    (a, b), seconds = (senetv2.read_checkpoint(path / "last.pt") for path in (out, other)), ("seconds", "images_per_second")
    pairs = list(zip(*(torch.utils._pytree.tree_leaves([run["model"], run["optimizer"]]) for run in (a, b))))
    assert a["settings"] == b["settings"] and a["step"] == b["step"] and len(pairs) > 100
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
    histories = [[{k: v for k, v in row.items() if k not in seconds} for row in table]
                 for table in (a["history"], b["history"], rows(out), rows(other))]
    assert histories[0] == histories[1] and histories[2] == histories[3] and len(histories[0]) == len(histories[2]) == 2
    return True


def at_step(number, action, kind=data.InMemory):
    """A train_batches that calls `action` before it hands out the batch of global step `number` (from 1)."""
    def train_batches(self, epoch, first_step=0, inner=kind.train_batches):
        for step, batch in enumerate(inner(self, epoch, first_step), start=epoch * self.steps + first_step + 1):
            if step == number:
                action()
            yield batch
    return train_batches


def stop_at(step, number, flags, monkeypatch, kind=data.InMemory):
    """Train until signal `number` comes in global step `step`: it stops within that step, not an epoch later."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(kind, "train_batches", at_step(step, lambda: os.kill(os.getpid(), number), kind))
        train.main(flags)
    assert stop.value.code == 128 + number and senetv2.read_checkpoint(Path(flags[-1], "last.pt"))["step"] == step


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 4), (signal.SIGINT, 9), (signal.SIGTERM, 6), (signal.SIGINT, 12)])
def test_a_run_that_was_told_to_stop_ends_as_if_it_had_not(number, step, finished, tmp_path, monkeypatch):
    flags = [*QUICK, "--out", str(tmp_path)]
    stop_at(step, number, flags, monkeypatch)
    train.main(flags)
    assert same_result(tmp_path, finished)


def test_a_signal_during_evaluation_stops_there_and_the_epoch_is_judged_once(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        test_batches = data.InMemory.test_batches

        def interrupted(self):
            for batch in test_batches(self):
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch
        patch.setattr(data.InMemory, "test_batches", interrupted)
        with pytest.raises(SystemExit):
            train.main([*QUICK, "--out", str(tmp_path)])
    saved = senetv2.read_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 6 and saved["history"] == []
    train.main([*QUICK, "--out", str(tmp_path)])
    assert same_result(tmp_path, finished)


DRIVER = """
import os, sys
sys.path.insert(0, {here!r})
import data, train, test_senetv2
rank = os.environ.get("RANK", "0")
if rank == {rank!r}:
    data.InMemory.train_batches = test_senetv2.at_step({step}, lambda: os.kill(os.getpid(), {number}))
def spy(args, settings, data, net, *rest, inner=train.train):
    history = inner(args, settings, data, net, *rest)
    train.torch.save(net.state_dict(), os.path.join(args.out, "rank" + rank))
    return history
train.train = spy
train.main(sys.argv[1:])
"""


def drive(out, *flags, step=0, number=0, rank="0", processes=1, **options):
    """Train in a process, or several, of its own; process `rank` gets signal `number` at step `step`."""
    script = out.parent / f"{out.name}.py"
    script.write_text(DRIVER.format(here=str(HERE), step=step, number=int(number), rank=rank))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.run([sys.executable, *launcher, script, *QUICK, "--out", out, *flags],
                          capture_output=True, text=True, **options)


def test_a_run_that_was_killed_ends_as_if_it_had_not(finished, tmp_path):
    often, out = ["--checkpoint-minutes", "0.0001"], tmp_path / "run"
    assert drive(out, *often, step=8, number=signal.SIGKILL).returncode == -signal.SIGKILL
    assert senetv2.read_checkpoint(out / "last.pt")["step"] <= 7
    train.main([*QUICK, "--out", str(out), *often])
    assert same_result(out, finished)


def test_a_full_disk_is_said_and_leaves_the_old_checkpoint_whole(finished, tmp_path):
    out = tmp_path / "run"
    assert drive(out, step=5, number=signal.SIGTERM).returncode == 128 + signal.SIGTERM
    before = (out / "last.pt").read_bytes()
    limit = 20 * 2**20      # bytes a file may have: less than a checkpoint
    full = drive(out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "cannot write" in full.stderr and "room" in full.stderr
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    train.main([*QUICK, "--out", str(out)])
    assert same_result(out, finished)


def without_privileges():
    """Take from root the right to write where its permissions forbid it (capabilities 1 and 2 of prctl's bounding set)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root loses its privileges by a call of Linux")
def test_a_folder_without_write_permission_is_said_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    result = run(*QUICK, "--out", tmp_path / "run", preexec_fn=without_privileges)
    tmp_path.chmod(0o700)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "Permission denied" in result.stderr
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


def test_restart_begins_anew(finished, tmp_path):
    train.main([*QUICK, "--out", str(tmp_path), "--lr", "0.01"])
    train.main([*QUICK, "--out", str(tmp_path), "--restart"])
    assert same_result(tmp_path, finished)


def test_dropout_is_a_function_of_the_step(tmp_path, monkeypatch):
    flags = ["--model", "mobilenet_v2", "--train-images", "64", "--batch-size", "16", "--epochs", "2", "--out"]
    train.main([*flags, str(tmp_path / "whole")])
    stop_at(3, signal.SIGTERM, [*flags, str(tmp_path / "parts")], monkeypatch)
    train.main([*flags, str(tmp_path / "parts")])
    assert same_result(tmp_path / "parts", tmp_path / "whole")


# ------------------------------------------------------------------------------------------ Several processes


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """A run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    result = drive(out, processes=2)
    assert result.returncode == 0 and "FutureWarning" not in result.stderr, result.stderr
    return out, result.stdout


def test_two_processes_end_with_the_same_weights_and_metrics_of_a_single_process(in_two):
    out, printed = in_two
    ranks = [torch.load(out / f"rank{rank}", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    assert printed.count("done: top-1") == 1
    alone = train.evaluate(senetv2.load(out / "last.pt"), data.load_data("shapes", batch_size=32))
    last = rows(out)[-1]
    assert float(last["top1"]) == alone["top1"] and float(last["top5"]) == alone["top5"]
    assert float(last["test_loss"]) == pytest.approx(alone["loss"], rel=1e-6)


def test_a_signal_to_one_process_stops_both_at_the_same_step(in_two, tmp_path):
    out = tmp_path / "run"
    assert drive(out, step=8, number=signal.SIGTERM, rank="1", processes=2).returncode != 0
    assert senetv2.read_checkpoint(out / "last.pt")["step"] == 8 and not list(out.glob("*.tmp"))
    shutil.copytree(out, tmp_path / "alone")
    train.main([*QUICK, "--out", str(tmp_path / "alone")])          # a single process can go on, too
    assert senetv2.read_checkpoint(tmp_path / "alone" / "last.pt")["step"] == 12 and len(rows(tmp_path / "alone")) == 2
    assert drive(out, processes=2).returncode == 0
    assert same_result(out, in_two[0])


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    result = drive(tmp_path / "run", "--batch-size", "33", processes=2)
    assert result.returncode != 0 and "33 does not divide by 2 processes" in result.stderr
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ Evidence


def invent_run(folder, seed, top1, epochs=2, done=2, **settings):
    """A folder as a run leaves it, without weights."""
    settings = dict(dataset="cifar10", model="resnet", recipe="paper", layers="1,1,1,1", stem="imagenet", lr=0.001,
                    epochs=epochs, batch_size=128) | settings | dict(seed=seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(settings=settings, parameters=8036426, device="D", torch="T")))
    lines = [f"{epoch + 1},{top1 if epoch + 1 == done else 99},100" for epoch in range(done)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,top1,images_per_second", *lines]) + "\n")


def test_the_report_averages_last_epochs_and_pairs_differences_by_seed(tmp_path, capsys):
    plain, gated = [70.0, 71.0, 75.0], [71.5, 71.0, 78.0]
    for seed in range(3):
        invent_run(tmp_path / "a" / f"plain{seed}", seed, plain[seed])
        invent_run(tmp_path / "b" / f"gated{seed}", seed, gated[seed], model="senetv2", reduction=32, cardinality=4, residual=False)
    invent_run(tmp_path / "b" / "long", 0, 90.0, epochs=3, done=3)
    invent_run(tmp_path / "b" / "running", 3, 80.0, done=1)
    invent_run(tmp_path / "b" / "copied", 0, plain[0])
    (tmp_path / "config.json").write_text("of another program")
    invent_run(tmp_path / "b" / "edited", 0, 60.0)
    train.main(["--report", str(tmp_path)])
    text = capsys.readouterr().out
    gaps = np.subtract(gated, plain)
    assert f"| {np.mean(plain):.2f} ± {np.std(plain, ddof=1):.2f} | - | - | 77.38 |" in text
    assert (f"| senetv2 r=32 K=4 (= senet r=8) | 8,036,426 | 3 | {np.mean(gated):.2f} ± {np.std(gated, ddof=1):.2f} "
            f"| +{gaps.mean():.2f} ± {gaps.std(ddof=1) / 3**0.5:.2f} | - | 78.6") in text
    assert "### cifar10, all training images, 3 epochs" in text and "| 1 | 90.00 | - |" in text     # a table of its own
    assert "running: 1 of 2 epochs" in text and "80.00" not in text
    assert "edited: top-1 60.00%, where a run of the same settings above has 70.00%" in text and "copied" not in text
    assert f"{tmp_path}: no run of train.py" in text
    assert "line [99.00, 72.00]" in text and text.count("```mermaid") == 2


def test_the_commands_of_the_report_give_the_settings_of_its_rows():
    for flags in (["--model", "senet", "--reduction", "16", "--dataset", "cifar100", "--epochs", "7"],
                  ["--recipe", "strong", "--no-augment", "--model", "resnet", "--dataset", "shapes"],
                  ["--residual", "--train-images", "500", "--dataset", "cifar10", "--layers", "1,1,1,1", "--lr", "0.01"],
                  ["--dataset", "folder", "--data-dir", "mine", "--weight-decay", "5e-5"]):
        _, settings = train.parse_args([*flags, "--seed", "3"])
        words = train.command(settings).split()
        assert words[:2] == ["python", "train.py"] and train.parse_args([*words[2:], "--seed", "3"])[1] == settings


@pytest.mark.parametrize("target, count, words", [
    ("paper", 24, ("--dataset cifar100 --layers 3,4,6,3 --model senetv2 --seed 1", "--dataset cifar10 --layers 1,1,1,1")),
    ("paper LAYERS=1,1,1,1 DATASETS=imagenet EPOCHS=2", 8, ("--dataset imagenet --layers 1,1,1,1", "--epochs 2")),
    ("experiment1", 4, ("--model senet --reduction 16",)), ("experiment2", 8, ("--reduction 2", "cifar100")),
    ("experiment3", 6, ("--model senetv2",)), ("experiment4", 4, ("--residual",)), ("experiment5", 8, ("--model vit",)),
])
def test_experiments_are_lists_of_training_commands_that_parse(target, count, words):
    listed = subprocess.run(["make", "--no-print-directory", "-n", "PYTHON=python3", "SEEDS=0 1", *target.split()],
                            cwd=HERE, capture_output=True, text=True)
    lines = listed.stdout.splitlines()
    assert len(lines) == len({train.parse_args(line.split()[2:])[0].out for line in lines}) == count
    assert all(any(word in line for line in lines) for word in words)
    assert [line.split("--seed ")[1][0] for line in lines] == ["0"] * (count // 2) + ["1"] * (count // 2)   # seed by seed


def test_gates_are_measured_by_class(finished, tmp_path, capsys):
    net, source = senetv2.load(finished / "last.pt"), data.load_data("shapes", batch_size=500, train_images=500)
    train.look_inside(net, source, tmp_path / "gates.png")
    printed = capsys.readouterr().out.splitlines()
    block = create_feature_extractor(net, ["layer3.0.bn3"])
    with torch.no_grad():
        s = torch.cat([net.layer3[0].gate.scale(block(x)["layer3.0.bn3"]).flatten(1) for x, _ in source.test_batches()])
    labels = source.test_labels
    means = torch.stack([s[labels == c].mean(0) for c in range(10)])
    within = torch.stack([s[labels == c].var(0, correction=0) for c in range(10)]).mean(0).sqrt().mean()
    assert printed[2] == (f"layer3: mean gate {means.mean():.3f}; standard deviation between classes {means.std(0).mean():.4f}, "
                          f"between images of a class {within:.4f}")
    assert Image.open(tmp_path / "gates.png").size == (1040, 4 * 108 + 8) and len(net.layer3[0].bn3._forward_hooks) == 0


def test_the_strong_recipe_decays_weights_but_neither_norms_nor_biases():
    _, settings = train.parse_args(["--recipe", "strong"])
    net = build_model("senetv2", 10, SMALL)
    optimizer = train.make_optimizer(net, settings)
    decayed, free = (group["params"] for group in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["nesterov"]
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4 and optimizer.param_groups[1]["weight_decay"] == 0
    assert {p.ndim for p in decayed} == {2, 4} and {p.ndim for p in free} == {1}
    assert len(decayed) + len(free) == len(list(net.parameters()))


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 0.1, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[55] == pytest.approx(1.0) and rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert 0 < rates[99] < 0.01


# ------------------------------------------------------------------------------------------------- README


def fenced(language):
    return re.findall(rf"^```{language}\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_names_tests_files_and_figures_that_exist():
    text = (HERE / "README.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 6 and all(callable(globals().get(name)) for name in named)
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert len(links) >= 8 and all((HERE / link).exists() for link in links)


def test_the_readmes_results_are_the_reports(capsys):
    train.main(["--report", str(HERE / "results")])
    report = capsys.readouterr().out
    figures = re.findall(r"^(\|.* ±.*\|) [^|]+\| [^|]+\|$", report, re.MULTILINE)       # but for paper and speed
    curves = re.findall(r"^    line .*", report, re.MULTILINE)
    text = (HERE / "README.md").read_text()
    assert 0 < len(figures) == len(curves) and all(line in text for line in [*figures, *curves])


@pytest.mark.parametrize("code", fenced("python"))
def test_the_readmes_python_runs(code, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "shapes-senetv2-paper-seed0")        # what `make train` leaves
    exec(compile(code, "README.md", "exec"), {})


# --------------------------------------------------------------------------------------------- Benchmark


class SideBySide(nn.ModuleList):
    def forward(self, z):
        return torch.cat([layer(z) for layer in self], dim=1)


def main():
    """Print what the gate costs as K grows at the same total width: as one matrix, and as K that are run one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(32, 1024, 14, 14, device=device).to(memory_format=torch.channels_last).requires_grad_()

    def both_ways(gate):
        return lambda: gate(x).backward(x)

    print(f"forward and backward of a gate with 128 hidden units on {tuple(x.shape)}, {device}, {torch.get_num_threads()} "
          "threads; milliseconds, median [quartiles]\n\n| K | r | one matrix | K layers and a concatenation |\n|---|---|---|---|")
    sizes = [(cardinality, 8 * cardinality) for cardinality in (1, 4, 16, 64)]
    gates = []
    for k, r in sizes:
        gates += AggregatedSqueezeExcitation(1024, r, k).to(device), AggregatedSqueezeExcitation(1024, r, k).to(device)
        gates[-1].reduce = SideBySide(nn.Linear(1024, 1024 // r) for _ in range(k)).to(device)
    times = 1000 * senetv2.interleaved([both_ways(gate) for gate in gates], 15, device)
    for row, (cardinality, reduction) in enumerate(sizes):
        stacked, apart = (senetv2.spread(times[:, 2 * row + column], ".2f") for column in (0, 1))
        print(f"| {cardinality} | {reduction} | {stacked} | {apart} |")


if __name__ == "__main__":
    main()
