"""Gates and networks beyond the README's claims, peers, weights from elsewhere."""
import argparse
import functools
import pickle
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import senetv2
import train
from senetv2 import OURS, AggregatedSqueezeExcitation, SqueezeExcitation, build_model
from support.console import UserError
from support.weights import load_weights
from test_senetv2 import HERE, SMALL, assert_equal, eight_steps, same_result, stop_at
from tests.conftest import ONE_STEP, Hostile, complaint, folder_flags
from tools import evaluate

# what torch says of a hostile file
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


def test_a_softmax_would_nearly_close_an_undecided_gate():
    block = SqueezeExcitation(256, 32)
    for p in block.expand.parameters():
        nn.init.zeros_(p)
    scale = block.scale(torch.randn(1, 256, 4, 4)).flatten()
    torch.testing.assert_close(scale, torch.full((256,), 0.5))
    torch.testing.assert_close(scale.logit().softmax(0), torch.full((256,), 1 / 256))


@pytest.mark.parametrize("name, options, said", [
    ("senetv2", dict(reduction=512), "reduction is 512.* between 1 and .*channels, 256"),
    ("senet", dict(reduction=0), "reduction is 0.* between 1 and .*channels, 256"),
    ("senetv2", dict(cardinality=0), "cardinality is 0.* 1 or more"),
    ("senetv2", dict(reduction=32.0), "reduction is 32.0.* whole number"),
    ("senetv2", dict(cardinality=2.5), "cardinality is 2.5.* whole number"),
    ("senet", dict(layers=(1, 1, 1)), r"\(1, 1, 1\); give four positive"),
    ("senet", dict(layers=(1, 1, 0, 1)), r"\(1, 1, 0, 1\); give four positive"),
    ("senet", dict(layers="1,1,1,1"), "'1,1,1,1'; give four positive"),
    ("resnet", dict(stem="tiny"), "'tiny'.* imagenet, cifar"),
    ("senet3", {}, "'senet3'.* resnet, .*senet, senetv2, .*convnext_tiny, vit"),
    ("vit", dict(image_size=130), "16x16.* 130"), ("vit", dict(image_size=34), "4x4.* 34"),
])
def test_impossible_networks_are_refused_with_the_way_out(name, options, said):
    with pytest.raises(ValueError, match=rf"\A.*{said}.*\Z"):       # one line: . is no newline
        build_model(name, **options)


@pytest.mark.parametrize("name", senetv2.PEERS)
@pytest.mark.parametrize("size", [32, 224])
def test_peers_are_torchvisions_and_fit_both_image_sizes(name, size):
    with torch.device("meta"):
        net = build_model(name, 7, image_size=size)
        assert net(torch.empty(2, 3, size, size)).shape == (2, 7)
    assert type(net).__module__.startswith("torchvision.models")


def test_a_gate_of_ones_own_is_any_module(folder, tmp_path, monkeypatch, capsys):
    page = (HERE / "docs" / "exercises.md").read_text()
    names = dict(torch=torch, nn=nn, F=F, AggregatedSqueezeExcitation=AggregatedSqueezeExcitation)
    for code in re.findall(r"^ *```py\n(.*?)^ *```", page, re.M | re.S):      # as in senetv2.py
        exec(textwrap.dedent(code), names)
    x = torch.randn(2, 64, 5, 5)
    scale = names["Softmax"](64).scale(x)
    assert scale.shape == (2, 64, 1, 1)
    torch.testing.assert_close(scale.sum(1).flatten(), torch.ones(2))
    monkeypatch.setitem(senetv2.GATES, "constant", names["Constant"])
    monkeypatch.setattr(senetv2, "OURS", (*OURS, "constant"))
    monkeypatch.setitem(train.SETTINGS, "model", ("senetv2", str, "a gate"))
    monkeypatch.setattr(train, "OURS", (*OURS, "constant"))
    monkeypatch.setitem(train.USED_BY, "layers", ("constant",))
    train.main([*folder_flags(folder, tmp_path / "run"), "--model", "constant"])
    evaluate.main(["--checkpoint", str(tmp_path / "run"), "--data-dir", str(folder)])
    assert "no picture of the gates" in capsys.readouterr().out

    other = nn.Sequential(nn.Conv2d(3, 8, 3), names["Constant"](8))         # in another network
    assert other(torch.randn(2, 3, 9, 9)).shape == (2, 8, 7, 7)


def test_a_block_refuses_a_gate_that_returns_another_shape():
    net = build_model("senet", 10, SMALL)
    net.layer2[0].gate = nn.AdaptiveAvgPool2d(1)        # (B, C, 1, 1) could be added to a map
    with pytest.raises(AssertionError, match="another shape than it was given"):
        net(torch.randn(2, 3, 32, 32))


WRAPPED = {     # how weights lie in the files of other programs
    "torchvision and timm": lambda weights: weights,
    "ImageNet example": lambda weights: dict(state_dict=prefixed("module.", weights), epoch=3),
    "torchvision's references": lambda weights: dict(
        model=weights, args=argparse.Namespace(lr=0.1), epoch=3),
    "compiled": lambda weights: prefixed("_orig_mod.", weights),
    "compiled in part": lambda weights: {
        key.replace("layer2.0.", "layer2.0._orig_mod."): value for key, value in weights.items()},
    "pytorch-cifar": lambda weights: dict(net=weights, acc=93.0, epoch=3),
    "PyTorch's tutorial": lambda weights: dict(
        epoch=3, model_state_dict=weights, loss=0.4,
        optimizer_state_dict={"state": {0: {"exp_avg": torch.zeros(3)}}}),
    "a name beside them": lambda weights: dict(model="resnet50", state_dict=weights),
    "Lightning": lambda weights: dict(state_dict=prefixed("model.", weights)),
    "mmpretrain": lambda weights: dict(meta={}, state_dict=prefixed("backbone.", weights)),
    "moco": lambda weights: dict(state_dict=prefixed("module.encoder_q.", weights) | {
        key: value + 1 for key, value in prefixed("module.encoder_k.", weights).items()}),
    "timm with an average": lambda weights: dict(state_dict=weights, state_dict_ema={
        key: value + 1 for key, value in weights.items()}),
}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_taken_as_they_come_where_name_and_shape_agree(kind, finished, tmp_path):
    given = train.read_checkpoint(finished)["model"]
    torch.save(WRAPPED[kind](given), tmp_path / "weights.pth")
    net = build_model("resnet", 3, SMALL)
    before = net.fc.weight.clone()
    text = load_weights(net, tmp_path / "weights.pth", "resnet50")

    same = {key for key in given if "gate" not in key and "fc" not in key}
    assert f"{len(same)} tensors taken" in text and "new: 2 ['fc.weight', 'fc.bias']" in text
    assert "'layer1.0.gate.reduce.weight'" in text      # is unused
    assert kind != "mmpretrain" or "['state_dict']" in text and "backbone." in text
    assert len(same) > 80 and torch.equal(net.fc.weight, before)
    assert all(torch.equal(net.state_dict()[key], given[key]) for key in same)


def test_a_run_starts_from_weights_that_fit(finished, tmp_path, capsys):
    start = ["--weights", str(finished), "--lr", "0", "--zero-init"]
    train.main([*ONE_STEP, *start, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "new: 0 []; unused: 0 []" in said
    given, weights = train.load(finished), train.load(tmp_path / "run")     # at a rate of 0
    assert_equal(*(dict(net.named_parameters()) for net in (given, weights)))
    # So the norms do not start at 0, which is said.
    assert given.layer1[0].bn3.weight.all() and re.search("^zero_init: ", said, re.M)

    torch.save({"step": 3}, tmp_path / "other.pt")
    torch.save({"bn1.num_batches_tracked": torch.tensor(3)}, tmp_path / "counter.pt")
    for source, said in ((tmp_path / "other.pt", "no tensor of"),
                         (tmp_path / "counter.pt", "no tensor of"),
                         (tmp_path / "x", "there is no file"),
                         (HERE / "README.md", "holds no weights")):
        assert said in complaint(capsys, *ONE_STEP, "--weights", source, "--out", tmp_path / "a")


def test_weights_that_cannot_be_read_are_refused_with_what_to_give_instead(tmp_path, monkeypatch):
    net = build_model("resnet", 3, SMALL)
    monkeypatch.chdir(tmp_path)
    torch.save(net, "whole.pth")                        # a pickled network could run code
    Path("hostile.pth").write_bytes(pickle.dumps(Hostile()))
    Path("a.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for source, said in (("whole.pth", r"torch.save\(net.state_dict\(\), path\)"),
                         ("hostile.pth", "no weights"), ("a.safetensors", "install .*safetensors"),
                         ("gone.pth", "no file gone.pth"), ("vit", "no weights of this")):
        with pytest.raises(UserError, match=rf"\A.*{said}.*\Z"):
            load_weights(net, "imagenet" if source == "vit" else source,
                         train.TRUNKS.get(source, "resnet50"))
    assert not Path("hostile").exists()

    library = SimpleNamespace(load_file=lambda path: {**net.state_dict(), "a": torch.ones(3)})
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)      # it was missing
    assert "new: 0 []; unused: 1 ['a']" in load_weights(net, "a.safetensors", "resnet50")


def test_gates_of_timm_are_taken_and_those_of_cadene_refused(finished, tmp_path):
    given, theirs = train.read_checkpoint(finished)["model"], {}
    for key, value in given.items():
        name = key.replace("gate.reduce", "se.fc1").replace("gate.expand", "se.fc2")
        theirs[name] = value[:, :, None, None] if ".se." in name and value.dim() == 2 else value
    torch.save(dict(state_dict=theirs), tmp_path / "timm.pth")
    assert "layer1.0.se.fc1.weight" in theirs
    net = build_model("senetv2", 10, SMALL)
    assert "new: 0 []; unused: 0 []" in load_weights(net, tmp_path / "timm.pth", "resnet50")
    assert_equal(dict(net.state_dict()), dict(given))

    said = load_weights(build_model("senet", 10, SMALL), tmp_path / "timm.pth", "resnet50")
    assert said.startswith("weights: 12 tensors of trained gates fit none of this network's")
    torch.save({key.replace(".se.", ".se_module."): value for key, value in theirs.items()},
               tmp_path / "cadene.pth")
    with pytest.raises(UserError, match="another SE network.*of timm's seresnet50"):
        load_weights(net, tmp_path / "cadene.pth", "resnet50")


class Holder(nn.Module):
    """A gate of one's own that holds torchvision's, under the name that timm has for its gates."""

    def __init__(self, channels):
        super().__init__()
        self.se = torchvision.ops.SqueezeExcitation(channels, 8)

    def forward(self, x):
        return self.se(x)


def test_gates_of_ones_own_keep_their_weights_and_what_partial_has_set(tmp_path, monkeypatch):
    wide = functools.partial(senetv2.AggregatedSqueezeExcitation, cardinality=8)
    monkeypatch.setattr(senetv2, "GATES", senetv2.GATES | dict(holder=Holder, wide=wide))
    monkeypatch.setattr(senetv2, "OURS", ("resnet", *senetv2.GATES))
    nets = [build_model("holder", 10, SMALL) for _ in range(2)]
    torch.save(nets[0].state_dict(), tmp_path / "w.pt")
    assert "new: 0 []; unused: 0 []" in load_weights(nets[1], tmp_path / "w.pt", "resnet50")
    assert_equal(*(dict(net.state_dict()) for net in nets))
    gate = build_model("wide", 10, SMALL, reduction=16).layer1[0].gate
    assert gate.reduce.out_features == 8 * 256 // 16


@pytest.mark.parametrize("name", senetv2.GATES)
def test_any_gate_keeps_the_shape_and_lets_gradients_through(name):
    gate = build_model(name, 10, SMALL).layer1[0].gate
    x = torch.randn(2, 256, 5, 4, requires_grad=True)
    y = gate(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0 and x.grad.isfinite().all()
    for name, weight in gate.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("name", senetv2.GATES)
def test_any_gate_in_a_run_that_was_stopped_ends_as_in_one_that_was_not(name, whole, tmp_path,
                                                                        monkeypatch):
    whole_run, stopped = (eight_steps("shapes", whole, tmp_path / place, "--model", name)
                          for place in ("whole", "stopped"))
    train.main(whole_run)
    stop_at(6, stopped, monkeypatch)
    train.main(stopped)
    assert same_result(tmp_path / "stopped", tmp_path / "whole")
