"""What the tests share beside what test_senetv2.py has."""
import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

import data
import train
from senetv2 import build_model
from support import checkpoint
from test_senetv2 import (  # noqa
    HERE, SMALL, plain_machine, same_start, save_image, whole)


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


STATISTICS = {      # mean and deviation, copied from where they are published
    "shapes": ((0.4989, 0.5013, 0.5020), (0.2852, 0.2843, 0.2846)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
EXPECTED = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()   # by its weights
STATISTICS |= dict.fromkeys(("imagenet", "folder"), (EXPECTED.mean, EXPECTED.std))


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


@pytest.fixture(autouse=True)
def end_workers(monkeypatch):
    """End the workers of runs that failed.  Left to the garbage collector, which comes in some
    later test, this takes ten seconds, and one that was killed is an error there."""
    iterators = []
    monkeypatch.setattr(DataLoader, "_get_iterator", lambda loader, inner=DataLoader._get_iterator:
                        iterators.append(inner(loader)) or iterators[-1])
    yield
    for iterator in iterators:
        getattr(iterator, "_shutdown_workers", int)()


ONE_STEP = ["--train-images", "32", "--batch-size", "32", "--epochs", "1", "--device", "cpu"]


def complaint(capsys, *flags, main=train.main):
    """The one line with which train.py, or a tool, refuses these flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    text = capsys.readouterr().err
    assert stop.value.code not in (0, None) and text.count("\n") == 1, text
    return text


BASE = ("--dataset folder --image-size 32 --layers 1,1,1,1 --train-images 8 --batch-size 4 "
        "--epochs 1 --workers 0 --device cpu --data-dir").split()


def watched(out, monkeypatch, *flags):
    """A run: the weights at its start, what the network saw, random seeds, rates, and the end."""
    seen = SimpleNamespace(start=None, batches=[], draws=[], rates=[], end=None)

    def look(net, inputs):
        seen.batches.append(*inputs)
        seen.draws.append(torch.initial_seed())

    def parallel(net, compiled, inner=train.parallel):
        seen.start = copy.deepcopy(net.state_dict())
        net.register_forward_pre_hook(look)
        return inner(net, compiled)

    with monkeypatch.context() as patch:
        patch.setattr(train, "parallel", parallel)
        patch.setattr(train, "set_rate", lambda optimizer, rate, inner=train.set_rate: (
            seen.rates.append(rate), inner(optimizer, rate)))
        patch.setattr(train, "evaluate", lambda net, data: net.eval() and dict(top1=0.0))
        patch.setattr(checkpoint, "save", lambda state: setattr(
            seen, "end", state.net.state_dict()))
        train.main([*map(str, flags), "--out", str(out)])
    return seen


def finished_flags(out):
    """12 steps, at a small rate because the running means must keep up with the weights."""
    return [*ONE_STEP, "--train-images", "192", "--epochs", "2", "--lr", "1e-4", "--weights",
            str(out.with_name("start.pt")), "--out", str(out)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of two short epochs; what the command line said lies beside it.

    Its first weights are exaggerated: gates and answers differ from image to image.
    """
    out = tmp_path_factory.mktemp("finished") / "run"
    torch.manual_seed(0)
    net = build_model("senetv2", 10, SMALL)
    for name, weight in net.named_parameters():
        if name.endswith("gate.expand.weight"):
            weight.data *= 30
    net.fc.weight.data *= 5
    torch.save(net.state_dict(), out.with_name("start.pt"))
    process = subprocess.run([sys.executable, HERE / "train.py", *finished_flags(out)],
                             capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    out.with_name("said").write_text(process.stdout)

    net, images = train.load(out), data.draw_shapes(1000, seed=2)[0][:200]
    predicted = net(torch.cat([*map(net.preprocess, images)])).argmax(1)
    assert len(predicted.unique()) > 5, "a network that answers alike shows no error"
    return out


@contextlib.contextmanager
def start(*flags, processes=1):
    """train.py in a process of its own, or in several by torchrun; none outlives the test.  Ctrl-C
    reaches them even where it is ignored, as in a job that a script puts in the background."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher * (processes > 1), HERE / "train.py", *flags]
    process = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
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


def edited(change):
    """A function that changes what a checkpoint holds."""
    def spoil(path):
        change(saved := train.read_checkpoint(path))
        torch.save(saved, path)
    return spoil


def invent_run(folder, seed, top1, epochs=2, done=2, more={}, **settings):
    """A folder as a run leaves it, without weights; config.json holds `more`, too."""
    settings = dict(dataset="cifar10", model="resnet", recipe="paper", layers="1,1,1,1",
                    stem="imagenet", lr=0.001, epochs=epochs, batch_size=128) | settings
    about = dict(settings=settings | dict(seed=seed), parameters=8036426, device="D", torch="T")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about | more))
    lines = [f"{epoch + 1},{top1 if epoch + 1 == done else 99}" for epoch in range(done)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,top1", *lines]) + "\n")


def make(*words, **environment):
    """The lines that make prints.  PYTHON=... keeps it from installing into .venv."""
    result = subprocess.run(["make", "--no-print-directory", *words], cwd=HERE, text=True,
                            capture_output=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)
