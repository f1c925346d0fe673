"""The Makefile, the pages, and the form of the scripts."""
import ast
import copy
import graphlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from senetv2 import AggregatedSqueezeExcitation
from test_senetv2 import HERE, rows
from tests.conftest import make
from tools import report


@pytest.mark.parametrize("target, variables", [
    ("train", ["DATA_DIR", "OUT", "WEIGHTS"]), ("look", ["DATA_DIR"]),
    ("evaluate", ["CHECKPOINT", "OUT"]), ("predict", ["CHECKPOINT", "IMAGE"])])
def test_values_with_spaces_and_quotes_arrive_whole(target, variables):
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    values = {name: f"my cat's  \"best\" & (photos); echo * {name}" for name in variables}
    lines = make("--silent", target, f"PYTHON={show}", *map("=".join, values.items()))
    words = json.loads(*[line for line in lines if line.startswith("[")])
    for name, value in values.items():
        assert f"--{name.lower().replace('_', '-')}={value}" in words


@pytest.mark.parametrize("words, said", [
    ("predict", "IMAGE"), ("train EPOCHS 3", "EPOCHS is no target"), ("train EPOCH=1", "EPOCH"),
    ("report STEM=cifar", "STEM"),
    ("look MODEL=resnet", "MODEL"), ("test SEED=1", "SEED"), ("train NPROC=0", "'0'"),
    ("train NPROC=two", "'two'"), ("train SEEDS=0 SEED=1", "SEED"), ("train SEEDS=0 OUT=o", "OUT"),
    ("paper SEED=7", "SEED"), ("paper MODEL=vit", "MODEL"), ("paper REDUCTION=8", "REDUCTION"),
    ("experiment2 REDUCTION=8", "REDUCTION"), ("experiment4 OUT=o", "OUT"),
    ("experiment6 MODEL=vit", "MODEL"), ("train WEIGHTS=", "WEIGHTS is empty")])
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


NEXT = "echo 'next: make evaluate, or make predict IMAGE=file, with the same variables{}'"


@pytest.mark.parametrize("words, commands", [
    ("train NPROC=2",
     "p -m torch.distributed.run --standalone --nproc-per-node 2 train.py\n"
     + NEXT.format(" but NPROC")),
    ("train OUT='$HOME/a b'", "p train.py --out='$HOME/a b'\n" + NEXT.format("")),
    ("train DATASET=folder DATA_DIR=d IMAGE_SIZE=64 MODEL=senet RECIPE=strong LAYERS=1,1,1,1 "
     "STEM=cifar REDUCTION=8 CARDINALITY=2 WEIGHTS=w EPOCHS=4 BATCH_SIZE=16 LR=0.2 TRAIN_IMAGES=99 "
     "IMAGES_PER_CLASS=50 HOLD_OUT=9 SEED=7 NAME=n DEVICE=cpu OUT=o "
     "ARGS=--no-augment",
     "p train.py --dataset=folder --data-dir=d --image-size=64 --model=senet --recipe=strong "
     "--layers=1,1,1,1 --stem=cifar --reduction=8 --cardinality=2 --weights=w --epochs=4 "
     "--batch-size=16 --lr=0.2 --train-images=99 --images-per-class=50 --hold-out=9 "
     "--seed=7 --name=n --device=cpu --out=o --no-augment\n" + NEXT.format("")),
    ("evaluate CHECKPOINT=c DATA_DIR=d", "p -m tools.evaluate --checkpoint=c --data-dir=d"),
    ("predict IMAGE=i CHECKPOINT=c", "p -m tools.predict --image=i --checkpoint=c"),
    ("look OUT=o DATASET=cifar10", "p -m tools.look --dataset=cifar10 --out=o"),
    ("table STEM=cifar IMAGE_SIZE=64", "p -m tools.table --stem=cifar --image-size=64"),
    ("bench LAYERS=1,1,1,1 ARGS=--compile", "p -m tools.bench --layers=1,1,1,1 --compile"),
    ("test ARGS=-x", "p -m pytest -q -rs -x"), ("faults", "p -m tools.faults"),
    ("train SEEDS='0 1' MODEL=senet",
     "set -e; for seed in 0 1; do p train.py --model=senet --seed $seed; done\n"
     "echo 'next: make report'"),
    ("report MINUS='senet r=8'", "p -m tools.report runs results --minus='senet r=8'"),
    ("report", "p -m tools.report runs results"),
    ("results", "{ cat results/about.md && p -m tools.report results; } > results/README.tmp\n"
                "mv results/README.tmp results/README.md"),
    ("pictures", "p train.py\np -m tools.evaluate\np -m tools.look --out assets/shapes.png\n"
                 "cp runs/shapes-senetv2-paper-seed0/gates.png assets/gates.png"),
])
def test_make_runs_exactly_these_commands(words, commands):
    printed = make("-n", *shlex.split(words), "PYTHON=p")
    assert list(map(shlex.split, printed)) == list(map(shlex.split, commands.splitlines()))


def test_clean_leaves_runs_and_data_and_help_names_every_target(tmp_path):
    shutil.copy(HERE / "Makefile", tmp_path)
    kept = {"Makefile", "runs", "data", "results", "support", "tools", "tests", "mine"}
    for name in (*kept - {"Makefile"}, ".venv", ".pytest_cache", "tools/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    make("clean", "-C", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert not (tmp_path / "tools" / "__pycache__").exists()
    targets = re.findall(r"^([a-z]+[0-9]?):", (HERE / "Makefile").read_text(), re.M)
    assert len(targets) > 12 and {line.split()[0] for line in make() if line} >= {*targets}


WIDTHS = "resnet; senet; senet --reduction 16; senetv2"


@pytest.mark.parametrize("words, data, networks, typed", [
    ("paper", "cifar100 --layers 3,4,6,3; cifar10 --layers 1,1,1,1; cifar10 --layers 3,4,6,3",
     WIDTHS, ""),
    ("paper LAYERS=1,1,1,1 DATASET=imagenet EPOCHS=2", "imagenet", WIDTHS,
     " --dataset=imagenet --layers=1,1,1,1 --epochs=2"),
    ("experiment1", "cifar10", "senet; senet --reduction 16", ""),
    ("experiment2", "cifar100",
     "senet --reduction 16; senetv2; senet --reduction 4; senet --reduction 2", ""),
    ("experiment3", "cifar10", "senetv2; senet --reduction 16; senet", ""),
    ("experiment4", "cifar10", "senetv2; senetv2 --residual", ""),
    ("experiment5", "cifar100", "mobilenet_v2; efficientnet_b0; resnext50_32x4d; vit", ""),
    ("experiment6", "cifar100", "resnet; resnet --zero-init; senet; senet --zero-init; senetv2; "
     "senetv2 --zero-init", ""),
])
def test_experiments_are_lists_of_commands_that_parse(words, data, networks, typed):
    lines = [" ".join(line.split()) for line in make(*words.split(), "TRAIN=echo")]
    assert lines == [f"--dataset {name} --model {network} --seed {seed}{typed}" for seed in range(5)
                     for name in data.split("; ") for network in networks.split("; ")]
    assert len({train.parse_args(shlex.split(line))[0].out for line in lines}) == len(lines)


PAGES = {str(page.relative_to(HERE)): page.read_text() for page in (
    HERE / "README.md", *sorted(HERE.glob("docs/*.md")), *sorted(HERE.glob("results/[Rh]*.md")))}
CODE = [pytest.param(textwrap.dedent(code), id=f"{name}-{number}") for name, text in PAGES.items()
        for number, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```", text, re.M | re.S))]


def test_pages_name_files_and_tests_that_exist():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#\s]+)|(?:src|href|srcset)=\"([^\"#]+)", text)
        local = [link for pair in links for link in pair if link and "://" not in link]
        assert [link for link in local if not (HERE / page).parent.joinpath(link).exists()] == []
    named = set(re.findall(r"\b(test_\w+_\w+_\w+)\b(?!\.py)", "".join(PAGES.values())))
    tests = [HERE / "test_senetv2.py", *HERE.glob("tests/*.py")]
    defined = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in tests), re.M)
    assert len(named) >= 6 and named <= set(defined)


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
    report.main(["results"])
    page = Path("results", "about.md").read_text() + capsys.readouterr().out
    assert PAGES["results/README.md"].startswith(Path("results", "about.md").read_text())
    written, printed = (re.findall(r"^(?:[|#]|    line).*|^Lines.*|^- .*", text, re.M)
                        for text in (PAGES["results/README.md"], page))
    assert written == printed and len(printed) > 50     # tables, charts, headings and lists


@pytest.fixture(scope="module")
def top1():
    """(data set, layers and epochs, network) -> seed -> top-1 after the last epoch, in %."""
    found = {}
    for config in HERE.glob("results/*/*/config.json"):
        settings = json.loads(config.read_text())["settings"]
        if "other-machine" not in str(config):
            width = f" r={settings['reduction']}" if settings["model"] == "senet" else ""
            width += "".join(f" {key.replace('_', '-')}" for key in ("residual", "zero_init")
                             if settings.get(key))
            table = f"{settings['dataset']} | {settings['layers']} | {settings['epochs']}"
            seeds = found.setdefault((table, settings["model"] + width), {})
            seeds[settings["seed"]] = float(rows(config.parent)[-1]["top1"])
    return found


def gap(network, base):
    """(number of common seeds, mean difference, half of its 95% interval, the two in words)"""
    gaps = [network[seed] - base[seed] for seed in network.keys() & base.keys()]
    error = np.std(gaps, ddof=1) / len(gaps)**0.5
    mean, half = np.mean(gaps), {3: 4.303, 5: 2.776}[len(gaps)] * error     # Student's t
    return len(gaps), mean, half, f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def test_the_answers_follow_from_the_raw_files(top1):
    answers = re.findall(r"^\| (cifar\d+ \| \S+ \| \d+) \| (.+) minus (.+) \| (\d) \| (.+) "
                         r"\| (\S+) \| (.+) \|$", PAGES["results/README.md"], re.M)
    for table, name, base, seeds, said, claim, words in answers:
        count, mean, half, right = gap(top1[table, name], top1[table, base])
        assert (seeds, said) == (str(count), right)
        claims = [("the paper's figure", float(claim))] if claim != "-" else []
        assert words == ", ".join(f"{'ex' if abs(value - mean) > half else 'in'}cludes {text}"
                                  for text, value in [*claims, ("0", 0)])


SMALL10, SMALL100 = "cifar10 | 1,1,1,1 | 15", "cifar100 | 1,1,1,1 | 15"
DEEP, SHORT = "cifar100 | 3,4,6,3 | 15", "cifar100 | 3,4,6,3 | 3"


def test_the_verdict_and_the_table_of_the_readme_follow_from_the_raw_files(top1):
    verdict = re.search(r"\*\*The verdict\.\*\*(.*?)\n\n", PAGES["README.md"], re.DOTALL)[1]
    quoted = "".join(gap(top1[table, "senetv2" + start], top1[table, base + start])[-1] + claim
                     for table, start, base, claim in (
                         (SMALL10, "", "senet r=32", "+0.81"), (DEEP, "", "senet r=32", "+1.26"),
                         (DEEP, " zero-init", "senet r=32", ""),
                         (DEEP, " zero-init", "resnet", "+1.80")))
    number = r"[+-]\d+\.\d\d"
    assert re.findall(number, verdict) == re.findall(number, quoted)

    section = re.search(r"^## Results$.*?^## ", PAGES["README.md"], re.M | re.DOTALL)[0]
    lines = re.findall(r"^\| .+ \| (\d+) \| (\d) \| (.+) \| (.+) \| (.+) \| (.+) \| (.+) \|$",
                       section, re.M)
    tables = [(SMALL10, ""), (SMALL100, ""), (DEEP, ""), (DEEP, " zero-init"), (SHORT, ""),
              (SHORT, " zero-init")]
    assert len(lines) == len(tables)
    for (table, start), line in zip(tables, lines):
        net = top1[table, "senetv2" + start]
        dataset, layers, epochs = table.split(" | ")
        paper = report.PAPER_TOP1.get((dataset, layers)) if epochs == "15" else None
        words = [epochs, str(len(net)), f"{np.mean([*net.values()]):.2f}"]
        for base in ("senet r=32", "resnet"):
            claim = f"{paper[report.SENETV2] - paper[base]:+.2f}" if paper else "-"
            words += [gap(net, top1[table, base + start])[-1], claim]
        assert [*line] == words
    zero = [f"{top1[DEEP, 'senetv2 zero-init'][seed] - base:+.2f}" for seed, base in sorted(
        top1[DEEP, "resnet zero-init"].items()) if seed in top1[DEEP, "senetv2 zero-init"]]
    start = gap(top1[SHORT, "resnet zero-init"], top1[SHORT, "resnet"])[-1]
    assert f"zero-init alone gave it {start}," in " ".join(section.split())
    assert len(zero) == 3 and f"by seed: {zero[0]}, {zero[1]} and {zero[2]}" in " ".join(
        PAGES["results/README.md"].split())


def test_the_table_of_starts_follows_from_the_raw_files(top1):
    section = re.search(r"^## The start$.*?^## ", PAGES["results/README.md"], re.M | re.DOTALL)[0]
    lines = re.findall(r"^\| (.+) \| .+ \| 3 \| (.+) \| (.+) \| (.+) \|$", section, re.M)
    seeds = {name: top1["cifar100 | 3,4,6,3 | 3", name] for name, *_ in lines}
    assert len(seeds) == 8 and lines == [
        (name, f"{np.mean([*found.values()]):.2f} ± {np.std([*found.values()], ddof=1):.2f}",
         *("-" if name == base else gap(found, seeds[base])[-1]
           for base in ("resnet", "resnet zero-init"))) for name, found in seeds.items()]


FLOORS = ("support", "senetv2 data", "train", "test_senetv2", "tools tests")    # from the ground


def test_imports_go_down_the_floors_without_a_circle():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
    scripts = [path.relative_to(HERE) for path in (*HERE.glob("*.py"), *HERE.glob("*/*.py"))]
    assert len(scripts) > 25 and {path.parts[0].removesuffix(".py") for path in scripts} == {*floor}
    inside = {path.stem: set() for path in scripts if path.parts[0] == "support"}
    for path in scripts:
        room = path.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse((HERE / path).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for other, _, rest in (module.partition(".") for module in modules):
                if room == other == "support":
                    inside[path.stem].add(rest.partition(".")[0])
                elif room == other == "tests" or (room, other) == ("tests", "tools"):
                    continue            # tests share what conftest has, and test the tools
                elif other in floor:
                    assert floor[other] < floor[room], f"{path} imports {other}"
    assert inside["console"] == set()
    list(graphlib.TopologicalSorter(inside).static_order())      # CycleError, if there is one


def test_pages_are_short_enough_to_be_read_to_their_end():
    readme, about = PAGES["README.md"], (HERE / "results" / "about.md").read_text()
    assert len(readme.splitlines()) <= 190
    assert len(words_of(readme)) <= 1600 and len(words_of(about)) <= 1700
    for page, text in PAGES.items():        # tables and headings of answers aside
        if page != "results/README.md":
            long = [line for line in text.splitlines() if len(line) > 120]
            assert {line.lstrip()[0] for line in long} <= {*"|<"}, page


def words_of(page):
    """The words of a page, tables and addresses aside."""
    return re.sub(r"^\|.*$|\]\([^)]*\)", "", page, flags=re.M).split()


def test_the_book_tells_nobody_to_skip():
    book = [HERE / f"{name}.py" for name in "senetv2 data train test_senetv2".split()]
    for path in (*book, *HERE.glob("support/*.py")):
        assert not re.search("may skip|on trust|can wait|older code|want to know|need this section|"
                             "mock", path.read_text()), path


def test_lines_end_by_column_100():
    files = [*HERE.glob("*.py"), *HERE.glob("*/*.py")]
    assert len(files) > 10 and [line for path in files for line in path.read_text(
        encoding="utf-8").splitlines() if len(line) > 100] == []


def test_the_page_of_the_first_run_is_right_about_chance_and_overfitting(tmp_path, monkeypatch):
    typed = re.search(r"`make train (TRAIN_IMAGES=.*?)` learns", PAGES["docs/first-run.md"])[1]
    flags = re.sub("(?:^| )([A-Z_]+)=", lambda name: f" --{name[1]} ", typed).lower()
    found, evaluate = [], train.evaluate

    def twice(net, data):       # a network that knows nothing, and the one at the end
        if not found:
            net = copy.deepcopy(net)
            net.fc.weight.data.zero_(), net.fc.bias.data.zero_()
        found.append(found[-1] if 0 < len(found) < 29 else evaluate(net, data))
        return found[-1]
    monkeypatch.setattr(train, "evaluate", twice)
    train.main([*flags.replace("_", "-").split(), "--device", "cpu", "--out", str(tmp_path)])
    first, *_, last = [{key: float(row[key]) for key in row} for row in rows(tmp_path)]
    assert len(found) == 30 and (first["top1"], round(first["test_loss"], 2)) == (10, 2.30)
    assert last["train_top1"] > 90 and last["train_loss"] < 0.3
    assert 10 < last["top1"] < 30 and last["test_loss"] > 4
