"""The reader's own code: where its mistakes show, and what a run knows of it."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
from torch import nn

import data
import senetv2
import train
from support import source
from test_senetv2 import HERE, SMALL, eight_steps, equal, rows, same_result, stop_at
from tests.conftest import complaint
from tools import evaluate, predict

GATE = """
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Linear(channels, channels)

    def forward(self, x):
        {body}
"""
MISTAKES = {        # the body of a gate's forward -> what is said; its line is named, or the def's
    "b, c, n = x.shape; return x": "too many values to unpack",
    "return x * self.reduce(x)": "cannot be multiplied",
    "x * x.mean((2, 3), keepdim=True)": r"line 10\) returned NoneType",
    "return x.mean((2, 3), keepdims=1, dims=2)": "mean",
    "return x * scael(x)": "name 'scael' is not defined",
    "return self.reduce(x.mean((2, 3)))": r"line 10\) returned torch.float32, \(2, 256\)",
    "return self.reduce(x.mean((2, 3)))[..., None, None]": r"line 10\) returned .*\(2, 256, 1, 1\)",
    "return x * (1 // 0)": "division",
    "return x * self.reduce(x.double().mean((2, 3)))[..., None, None]": "dtype",
    "return [x]": r"line 10\) returned list",
    "return x.double()": r"line 10\) returned torch.float64",
    "return x * x.std((2, 3), keepdim=True)": r"Mine returned numbers that are not finite.* 1, 1\)",
}


def load_file(path):
    spec = importlib.util.spec_from_file_location("mine", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def traceback_of(capsys, flags):
    """What the program says of a mistake in code: an error that is not caught."""
    with pytest.raises(Exception) as caught:        # SystemExit is no Exception
        train.main([str(flag) for flag in flags])
    assert capsys.readouterr().err == ""
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")      # of std(), in one
@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_in_a_gate_shows_its_line_before_the_data_are_read(body, whole, tmp_path,
                                                                     monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(GATE.format(body=body))
    monkeypatch.setitem(senetv2.GATES, "senet", load_file(tmp_path / "mine.py").Mine)
    monkeypatch.setattr(train, "open_data", lambda *args: pytest.fail("the data were read"))
    flags = [*eight_steps("shapes", whole, tmp_path / "run"), "--model", "senet"]
    text = traceback_of(capsys, flags)
    assert re.search(MISTAKES[body], text), text
    assert "not finite" in text or re.search(rf'"{tmp_path}/mine.py", line 1[01]\b', text), text
    assert not (tmp_path / "run").exists()


def test_a_gate_may_hold_a_layer_called_gate(monkeypatch):
    class Mine(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gate = nn.Linear(channels, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None]
    monkeypatch.setitem(senetv2.GATES, "senet", Mine)
    source.try_gates(senetv2.build_model("senet", 2, SMALL), 32)


@pytest.mark.parametrize("body", ["return x * torch.sigmoid(x)", "return x", "return x.mul_(0.5)",
                                  "return x * torch.sigmoid(self.reduce(x.mean((2, 3)))"
                                  "[..., None, None])"])
def test_a_gate_that_is_right_is_let_through(body, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(GATE.format(body=body))
    monkeypatch.setitem(senetv2.GATES, "senet", load_file(tmp_path / "mine.py").Mine)
    source.try_gates(senetv2.build_model("senet", 2, SMALL), 32)


def test_a_gate_is_tried_on_maps_of_the_size_that_it_gets(tmp_path, monkeypatch):
    body = "return x * x.std((2, 3), keepdim=True)"         # it cannot work on one pixel
    (tmp_path / "mine.py").write_text(GATE.format(body=body))
    monkeypatch.setitem(senetv2.GATES, "senet", load_file(tmp_path / "mine.py").Mine)
    source.try_gates(senetv2.build_model("senet", 2, SMALL), 33)
    source.try_gates(senetv2.build_model("senet", 2, SMALL, "cifar"), 32)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="32 pixels are one"):
        source.try_gates(senetv2.build_model("senet", 2, SMALL), 32)


@pytest.mark.parametrize("place, name, body", [
    (train, "forward_backward", "def mine(model, state, autocast, images, labels):\n"
                                "    return logits.mean()\n"),
    (train, "learning_rate", "def mine(step, total, warmup, peak):\n    return 1 / (step - 2)\n"),
    (data.ImageFiles, "__getitem__", "def mine(self, key):\n    return self.path[key]\n")])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_step_schedule_or_images_shows_its_line(place, name, body, workers, whole,
                                                             tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(body)
    monkeypatch.setattr(place, name, load_file(tmp_path / "mine.py").mine)
    flags = eight_steps("folder", whole, tmp_path / "run", "--workers", workers)
    text = traceback_of(capsys, flags)
    assert f'{tmp_path}/mine.py", line 2, in mine' in text


# --------------------------------------------------------------------------- A copy that is edited


@pytest.fixture
def copy(tmp_path):
    """A copy of the program, whose commands run in processes of their own."""
    shutil.copytree(HERE / "support", tmp_path / "copy" / "support")
    for name in ("senetv2.py", "data.py", "train.py"):
        shutil.copy(HERE / name, tmp_path / "copy")
    return tmp_path / "copy"


def edit(copy, name, before, after):
    text = (copy / name).read_text()
    assert text.count(before) == 1
    (copy / name).write_text(text.replace(before, after))


def test_with_two_processes_a_mistake_shows_its_line(copy, whole):
    edit(copy, "senetv2.py", "        return x * self.scale(x)\n",
         "        b, c, n = x.shape\n        return x * self.scale(x)\n")
    line = (copy / "senetv2.py").read_text().splitlines().index("        b, c, n = x.shape") + 1
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "train.py", *eight_steps("shapes", whole, copy / "run", "--model", "senet")],
        cwd=copy, text=True, capture_output=True)
    assert result.returncode != 0 and "too many values to unpack" in result.stderr
    assert f'senetv2.py", line {line}, in forward' in result.stderr


def test_a_file_of_ones_own_that_senetv2_imports_is_part_of_the_code(copy):
    digests = load_file(copy / "support" / "source.py").digests
    assert (usual := digests()) == source.digests()
    (copy / "mine").mkdir()
    for name, text in (("gates", "import helper"), ("helper", "a = 1"), ("stranger", ""),
                       ("mine/__init__", "from .inner import x"), ("support/own", ""),
                       ("mine/inner", "from . import last"), ("mine/last", "from .. import gates")):
        (copy / f"{name}.py").write_text(text)
    edit(copy, "senetv2.py", "from torch import nn\n",
         "from torch import nn\nfrom support import own\nimport numpy, mine.last\n")
    before = digests()
    assert before.keys() == {*usual, "gates.py", "helper.py", "support/own.py", *(
        f"mine/{name}.py" for name in ("__init__", "inner", "last"))}
    (copy / "helper.py").write_text("a = 2")
    edit(copy, "train.py", "peak * (step + 1) / rise", "peak * (step + 2) / rise")
    edit(copy, "support/console.py", "min left", "minutes left")        # it only talks
    assert source.changed(before, digests()) == "train.py, helper.py"


def test_a_setting_that_is_new_has_its_default_in_older_runs(whole, tmp_path, monkeypatch, capsys):
    stop_at(6, flags := eight_steps("shapes", whole, tmp_path), monkeypatch)
    monkeypatch.setitem(train.SETTINGS, "drop", (0.0, float, "a setting of one's own"))
    assert "drop: was 0.0, is 0.5;" in complaint(capsys, *flags, "--drop", "0.5")
    train.main(flags)
    assert equal(*(train.read_checkpoint(run)["model"] for run in (tmp_path, whole / "shapes")))


def test_what_is_edited_while_a_run_trains_does_not_count_for_it(whole, tmp_path, monkeypatch):
    began = source.digests()

    def open_data(*args, inner=train.open_data):
        monkeypatch.setattr(source, "digests", lambda *args: began | {"senetv2.py": "edited"})
        return inner(*args)
    monkeypatch.setattr(train, "open_data", open_data)
    train.main(eight_steps("shapes", whole, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["code"] == began
    assert train.read_checkpoint(tmp_path)["code"] == began


@pytest.mark.parametrize("finished", [False, True])
def test_half_of_a_run_is_not_trained_with_other_code_unless_asked(finished, whole, tmp_path,
                                                                   monkeypatch, capsys):
    flags = eight_steps("shapes", whole, tmp_path)
    if finished:
        train.main(flags)
    else:
        stop_at(6, flags, monkeypatch)
    before, code = (tmp_path / "last.pt").read_bytes(), source.digests() | {"data.py": "edited"}
    with monkeypatch.context() as patch:
        patch.setattr(source, "digests", lambda weights=None: code)
        assert re.search("other code: data.py changed since; .*--name MINE.*--any-code",
                         complaint(capsys, *flags))
        assert (tmp_path / "last.pt").read_bytes() == before
        named, _ = train.parse_args([*flags[:flags.index("--out")], "--name", "mine"])
        assert named.out.name.endswith("-mine")

        for tool, more in ((evaluate, []), (predict, ["--image", HERE / "assets" / "star.png"])):
            capsys.readouterr()
            tool.main(["--checkpoint", str(tmp_path), *map(str, more)])
            printed = capsys.readouterr().out
            assert "was trained with other code: data.py changed since" in printed
            assert tool is evaluate or ("not finished: 1 of 2 epochs" in printed) != finished
        train.main([*flags, "--any-code"])
    assert same_result(tmp_path, whole / "shapes")
    trained_by = source.digests() if finished else code
    assert json.loads((tmp_path / "config.json").read_text())["code"] == trained_by


CODE = '''"""A docstring."""
def f(x, *, y=1):
    """Another."""
    a = x + 1       # a comment
    b = [a, 2.5, "text"]
    return a if y else b
'''


@pytest.mark.parametrize("before, after, same", [
    ("", "", True), ("# a comment", "# another one", True), ("Another.", "Reworded.", True),
    ('    """Another."""\n', "", True), ('"""A docstring."""\n', "", True),
    ('    b = [a, 2.5, "text"]\n', '\n    b = [a,\n         2.5, \'text\']\n', True),
    ("x + 1", "(x + 1)", True), ("x + 1", "x + 2", False), ("x + 1", "1 + x", False),
    ("2.5", "2.50001", False), ("y=1", "y=0", False), ('"text"', '"texts"', False),
    ("*, y", "y", False), ("if y", "if not y", False)])
def test_a_digest_sees_another_constant_or_order_and_no_comment_or_layout(before, after, same):
    assert CODE.count(before) or not before
    changed = CODE.replace(before, after) if before else CODE
    assert (source.digest(changed) == source.digest(CODE)) == same


def test_digests_are_alike_under_all_versions_of_python():
    # found with Python 3.9 to 3.13
    assert source.digest(CODE) == "6076fada19284b88"


def test_weights_that_were_replaced_are_noticed(finished, whole, tmp_path, monkeypatch, capsys):
    weights = shutil.copy(finished / "last.pt", tmp_path / "w.pt")
    flags = eight_steps("shapes", whole, tmp_path / "run", "--model", "senetv2", "--epochs", "1",
                        "--weights", weights)
    train.main(flags)
    with open(weights, "ab") as file:
        file.write(b"x")
    assert f"other code: {weights} changed since" in complaint(capsys, *flags)
    weights.write_bytes(weights.read_bytes()[:-1])
    stop_at(2, half := [*flags, "--out", str(tmp_path / "half")], monkeypatch)
    weights.unlink()                # no longer needed
    train.main(half)
    ended = [json.loads((tmp_path / name / "config.json").read_text())["code"]
             for name in ("run", "half")]
    assert ended[0] == ended[1] and str(weights) in ended[0]
    train.main(flags)
    assert "already finished" in capsys.readouterr().out
    evaluate.main(["--checkpoint", str(tmp_path / "run")])
    assert "changed" not in capsys.readouterr().out


def test_evaluation_says_how_its_run_ended_and_on_which_images(whole, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*eight_steps("shapes", whole, out), "--hold-out", "40"])
    top1 = float(rows(out)[-1]["top1"])
    ended = f"top-1 {top1:.2f}% on the held-out images, after 2 of 2 epochs"
    assert ended in capsys.readouterr().out
    evaluate.main(["--checkpoint", str(out)])
    printed = capsys.readouterr().out
    assert f"its run: {ended}" in printed
    assert "1,000 test images of shapes" in printed
    assert os.path.exists(out / "page.html")
