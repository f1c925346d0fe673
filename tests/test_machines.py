"""Number formats, devices, and the ways in which a system starts processes."""
import functools
import importlib.util
import itertools
import json
import multiprocessing
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import data
import train
from senetv2 import build_model
from support import hardware
from test_senetv2 import HERE, eight_steps, equal, rows, same_result, stop_at
from tests.conftest import complaint, folder_flags, load_folder
from tools import evaluate, predict

# ----------------------------------------------------------------------------------- Number formats


def large_scale(monkeypatch, start=2.0 ** 8):
    """float16 in which the first steps overflow, and the scale soon grows again."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(
        torch.amp.GradScaler, init_scale=start, growth_interval=2))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_in_16_bits_that_was_stopped_ends_alike(precision, whole, tmp_path, monkeypatch,
                                                      capsys):
    scales, update = [], torch.amp.GradScaler.update
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: (
        update(self), scales.append(self.get_scale())))
    large_scale(monkeypatch)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    few = ["--train-images", "16", "--batch-size", "4", "--workers", "0"]
    train.main(eight_steps("folder", whole, undisturbed, *few, "--precision", precision))
    if precision == "float16":
        changes = {b / a for a, b in itertools.pairwise(scales)}
        assert changes == {0.5, 1, 2}                   # it fell, stayed and rose
    stop_at(6, eight_steps("folder", whole, stopped, *few, "--precision", precision), monkeypatch)

    # It keeps its format without being told, and refuses another.
    flags = eight_steps("folder", whole, stopped, *few)
    assert f"precision: was {precision}, is float32;" in complaint(
        capsys, *flags, "--precision", "float32")
    train.main(flags)
    assert f"precision={precision}" in capsys.readouterr().out
    assert same_result(stopped, undisturbed)
    assert json.loads((stopped / "config.json").read_text())["settings"]["precision"] == precision
    train.main([*flags, "--precision", "float32", "--out", str(tmp_path / "32")])
    assert not equal(*(train.read_checkpoint(run)["model"] for run in (stopped, tmp_path / "32")))

    # Losses are not scaled; the test images are evaluated in float32.
    assert all(0 < float(row["train_loss"]) < 10 for row in rows(stopped))
    net, source = train.load(stopped), load_folder(whole / "images", batch_size=16)
    with torch.no_grad():
        loss, = (F.cross_entropy(net(images), labels).item()
                 for images, labels in source.test_batches())
    assert float(rows(stopped)[-1]["test_loss"]) == pytest.approx(loss, rel=1e-5)


def test_before_the_weights_move_the_gradient_is_that_of_the_loss_in_every_format(whole, tmp_path,
                                                                                  monkeypatch):
    norms, step = {}, torch.amp.GradScaler.step

    def measure(scaler, optimizer):         # in the place of clipping
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.setdefault(precision, []).append(torch.cat(gradients).norm().item())
        return step(scaler, optimizer)
    monkeypatch.setattr(torch.amp.GradScaler, "step", measure)
    large_scale(monkeypatch, 2.0 ** 4)      # without overflow
    for precision in ("float32", "bfloat16", "float16"):
        train.main(eight_steps("shapes", whole, tmp_path / precision, "--precision", precision,
                               "--epochs", "1", "--train-images", "8", "--model", "senetv2"))
    (exact,), *others = norms.values()
    assert exact > 0 and others == [[pytest.approx(exact, rel=0.1)]] * 2


def test_a_gradient_that_overflows_skips_the_step_and_halves_the_scale(whole, tmp_path,
                                                                       monkeypatch):
    large_scale(monkeypatch, 2.0 ** 60)
    train.main(eight_steps("folder", whole, tmp_path, "--workers", "0", "--precision", "float16"))
    saved = train.read_checkpoint(tmp_path)
    assert saved["step"] == 8 and saved["scaler"]["scale"] == 2.0 ** 52
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = build_model("mobilenet_v2", 2)
    assert all(torch.equal(weight, saved["model"][name])
               for name, weight in start.named_parameters())


@pytest.mark.parametrize("capability, chosen", [
    ((6, 1), "float32"),                        # a GTX 1080
    ((7, 5), "float16"),                        # a T4 only emulates bfloat16
    ((8, 0), "bfloat16"),                       # an A100
])
def test_by_default_a_gpu_uses_the_16_bits_it_is_made_for(capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation or capability >= (8, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert hardware.choose_precision(torch.device("cuda")) == chosen
    assert hardware.choose_precision(torch.device("cpu")) == "float32"


def test_bfloat16_on_a_processor_without_units_for_it_gets_a_warning(monkeypatch, capsys):
    for units, lines in ((dict(avx2=True, avx512_bf16=False), 1), (dict(amx_bf16=True), 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        for precision in ("bfloat16", "float32"):
            hardware.number_format(torch.device("cpu"), precision)
        assert capsys.readouterr().out.count("float32 would be faster") == lines


# ------------------------------------------------------------------------------------------ Devices


@pytest.mark.parametrize("found, offered, taken", [
    (None, ("cpu",), "cpu"), ("cuda", ("cpu", "cuda"), "cuda"), ("mps", ("cpu", "mps"), "cpu")])
def test_the_accelerator_is_offered_and_cuda_taken(found, offered, taken, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: (
        torch.device(found or "cuda") if found or not check_available else None))
    found = module_of("support/hardware.py").DEVICES
    monkeypatch.setattr(hardware, "DEVICES", found)
    default, read, _ = module_of("train.py").OPTIONS["device"]
    assert (default, found) == (taken, offered) == (taken, tuple(map(read, offered)))


def module_of(name):
    """A second copy of a script of ours, as another machine would import it."""
    spec = importlib.util.spec_from_file_location("elsewhere", HERE / name)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_images_in_memory_lie_on_the_device_and_batches_are_made_there():
    source = data.load_data("shapes", device="meta", train_images=64, batch_size=32)
    (images, labels), *_ = source.train_batches(0)
    assert images.shape == (32, 3, 32, 32) and labels.shape == (32,)
    assert {tensor.device.type for tensor in (
        images, labels, source.padded, source.labels, source.view([0]))} == {"meta"}


class NoFloat64(TorchDispatchMode):
    """Refuses float64 that was not made by on_host, and operations on it and on other tensors."""

    def __init__(self):
        super().__init__()
        self.host = {}                  # by id; held, so that no other tensor gets the same

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float64 for x in (*given, *made)):
            floats = [x for x in given if x.is_floating_point()]
            assert floats and all(id(x) in self.host for x in floats), f"float64 in {function}"
            self.host.update((id(x), x) for x in made)
        return results


def test_no_float64_reaches_an_accelerator(folder, tmp_path, monkeypatch):
    forbidden, counted = NoFloat64(), []

    def on_host(tensor, inner=hardware.on_host):
        with _disable_current_modes():
            result = inner(tensor)
        counted.append(forbidden.host.setdefault(id(result), result))
        return result
    for module in (train, evaluate, predict):
        monkeypatch.setattr(module, "on_host", on_host)

    def unscale(*args, inner=torch.amp.GradScaler.unscale_):    # torch avoids float64 on mps itself
        with _disable_current_modes():
            inner(*args)
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    flags = folder_flags(folder, tmp_path / "run", epochs=2)
    with forbidden:
        train.main([*flags, "--label-smoothing", "0.1", "--weight-decay", "0.1"])
        train.main([*flags[:-1], str(tmp_path / "sgd"), "--optimizer", "sgd", "--epochs", "1"])
        train.main(eight_steps("shapes", folder, tmp_path / "16", "--precision", "float16"))
        before = len(counted)
        evaluate.main(["--checkpoint", str(tmp_path / "run"), "--data-dir", str(folder),
                       "--workers", "0"])
        predict.main(["--checkpoint", str(tmp_path / "run"), "--image",
                      *map(str, folder.glob("val/*/*_0.JPEG"))])
    assert len(counted) >= before + 3
    with forbidden, pytest.raises(AssertionError, match="float64"):
        torch.ones(2).double()
    on_device = mock.MagicMock()            # first to the CPU, then to float64
    assert on_host(on_device) is on_device.cpu().double()


# ------------------------------------------------------------------------------- Start of processes


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_start_in_every_way_of_this_python(method, whole, tmp_path):
    flags = eight_steps("folder", whole, tmp_path, "--workers", "2")
    program = ("import multiprocessing, sys, train; "
               f"multiprocessing.set_start_method({method!r}); train.main(sys.argv[1:])")
    process = subprocess.run([sys.executable, "-W", "error", "-c", program, *flags], cwd=HERE,
                             capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    assert same_result(tmp_path, whole / "folder")
