"""The report: rows, differences, and what is in no table."""
import json
import math
import re
import shutil

import numpy as np
import pytest

from tests.conftest import complaint, invent_run
from tools import report


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]


def test_the_report_averages_last_epochs_and_pairs_by_seed(tmp_path, capsys):
    plain, gated = {0: 70.0, 1: 71.0, 2: 75.0}, {3: 90.0, 2: 78.0, 1: 71.0, 0: 71.5}
    for values, settings in (
            (plain, {}), (gated, dict(model="senetv2", reduction=32, cardinality=4))):
        for number, (seed, top1) in enumerate(values.items()):      # folders in the dict's order
            invent_run(tmp_path / str(len(values)) / str(number), seed, top1, **settings)
    report.main([str(tmp_path)])
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
    report.main([str(tmp_path)])
    text = capsys.readouterr().out
    lines = [line.split(" | ")[:1] + line.split(" | ")[3:]
             for line in text.replace(" (seed 0 alone)", "").splitlines() if line.startswith("| ")]
    assert text.count(" (seed 0 alone)") == 7
    assert lines == [
        ["| network", "top-1 (%)", "minus resnet", "minus senet r=32",
         "minus the same without zero-init", "in the paper |"],
        ["| resnet", "60.00", "-", "-", "-", "77.38 |"],
        ["| senetv2 r=32 K=4 (= senet r=8)", "63.00", "+3.00", "-", "-", "78.60 |"],
        ["| senetv2 r=32 K=4 residual", "64.00", "+4.00", "-", "-", "- |"],
        ["| resnet zero-init", "70.00", "-", "-", "+10.00", "- |"],
        ["| senetv2 r=32 K=4 (= senet r=8) zero-init", "72.00", "+2.00", "+0.50", "+9.00", "- |"],
        ["| senet r=32 zero-init", "71.50", "+1.50", "-", "-", "- |"]]


def test_runs_on_other_files_are_in_tables_of_their_own(tmp_path, capsys):
    data = dict(dataset="folder", images_per_class=0, image_size=64)
    for name, settings, files in (("a", {}, "first"), ("b", dict(model="vit"), "second"),
                                  ("c", dict(model="mobilenet_v2"), "first")):
        invent_run(tmp_path / name, 0, 50.0, more=dict(files=files), **data, **settings)
    report.main([str(tmp_path)])
    tables = capsys.readouterr().out.split("### ")[1:]
    assert [sorted(re.findall(r"^\| (resnet|vit|mobilenet_v2) ", table, re.M)) for table in tables
            ] == [["mobilenet_v2", "resnet"], ["vit"]]


@pytest.mark.parametrize("key, value", [
    ("parameters", None), ("device", None), ("torch", None), ("parameters", "many"),
    ("settings.model", ["resnet"]), ("settings.seed", [0]), ("settings.epochs", "2"),
    ("settings.lr", {}), ("settings", None), ("processes", "two")])
def test_one_run_that_cannot_be_read_does_not_hide_the_others(key, value, tmp_path, capsys):
    invent_run(tmp_path / "good", 0, 70.0)
    invent_run(tmp_path / "bad", 1, 60.0)
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    *outer, key = key.split(".")
    place = config[outer[0]] if outer else config
    place.pop(key, None) if value is None else place.update({key: value})
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    report.main([str(tmp_path)])
    table, rest = capsys.readouterr().out.split("in no table")
    assert "| resnet | 8,036,426 | 1 | 70.00 | " in table and f"{tmp_path / 'bad'}: " in rest


def test_intervals_are_those_of_students_t():
    for freedom, t in enumerate(report.T95, start=1):    # 95 % of the density are within t of 0
        x, half = np.linspace(-t, t, 10**5), (freedom + 1) / 2
        density = (1 + x**2 / freedom)**-half * math.gamma(half) / math.gamma(freedom / 2)
        share = density.mean() * 2 * t / math.sqrt(freedom * math.pi)
        assert share == pytest.approx(0.95, abs=5e-5)

    same = dict(machines="M", code=None)
    base = {seed: dict(top1=[0.0], **same) for seed in range(99)}
    net = base | {0: dict(top1=[-1.0], **same), 1: dict(top1=[1.0], **same)}
    half = 2.262 * (2 / 98 / 99)**0.5       # of ten runs; for more than that a little too wide
    said = f"+0.00 [-{half:.2f}, +{half:.2f}]"
    assert report.difference(dict(net=net, base=base), "net", "base") == said


@pytest.mark.parametrize("changed", [dict(device="E"), dict(torch="U"), dict(precision="bfloat16")])
def test_differences_across_machines_say_so(changed, tmp_path, capsys):
    invent_run(tmp_path / "plain", 0, 50.0)
    invent_run(tmp_path / "vit", 0, 51.0, model="vit", more=changed)
    report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "| +1.00 (seed 0 alone, across machines) |" in text
    assert ("told apart): D, torch T; D, torch T, bfloat16." in text) == ("precision" in changed)

    for seed in (1, 2):
        invent_run(tmp_path / f"plain{seed}", seed, 50.0)
        invent_run(tmp_path / f"vit{seed}", seed, 51.0, model="vit")
    report.main([str(tmp_path)])
    assert "| +1.00 [+1.00, +1.00], across machines |" in capsys.readouterr().out


def test_each_comparison_has_a_table_and_what_is_in_none_is_named(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "copied", 0, 60.0)            # the first one counts
    invent_run(tmp_path / "old", 1, 70.0, erase=0)      # a setting that has gone
    invent_run(tmp_path / "long", 0, 90.0, epochs=3, done=3)
    invent_run(tmp_path / "few", 0, 50.0, train_images=10000)
    invent_run(tmp_path / "few narrow", 0, 51.0, train_images=10000, model="senet", reduction=32)
    report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "| resnet | 8,036,426 | 2 | 70.00 ± 0.00 | - | - | 77.38 |" in text
    assert "### cifar10, all training images, 3 epochs" in text and "| 1 | 90.00 | - |" in text
    assert "### cifar10, 10,000 training" in text
    assert "| 1 | 51.00 | +1.00 (seed 0 alone) | - | - |" in text
    assert text.count("```mermaid") == 3

    # Unfinished runs, runs of other code and what is no run.
    for name, more in (("running", dict(done=1)), ("newer", dict(recipe="newer")), ("list", {}),
                       ("without top1", {})):
        invent_run(tmp_path / name, 4, 80.0, **more)
    (tmp_path / "list" / "config.json").write_text("[1, 2]")
    (tmp_path / "without top1" / "metrics.csv").write_text("epoch,top5\n1,80\n2,80\n")
    (tmp_path / "config.json").write_text("of another program")
    report.main([str(tmp_path)])
    table, rest = capsys.readouterr().out.split("\nRuns that are in no table:\n\n")
    assert text.startswith(table) and ": not finished: 1 of 2 epochs" in rest
    assert (f"copied: top-1 60.00%; the table uses {tmp_path / 'a'}, with the same settings (70.00%"
            in rest)
    assert sorted(line.split(": ")[0] for line in rest.splitlines()) == [f"- {tmp_path}", *(
        f"- {tmp_path / name}" for name in ("copied", "list", "newer", "running", "without top1"))]


def test_the_report_compares_what_one_tries_with_what_it_was_made_from(tmp_path, capsys):
    gate = dict(reduction=32, cardinality=4)
    for seed in (0, 1):
        for place, top1, settings in (
                ("plain", 50, {}), ("v2", 60, dict(model="senetv2", **gate)),
                ("named", 62, dict(model="senetv2", name="amax", **gate)),
                ("own", 65 + seed, dict(model="amax", **gate))):
            invent_run(tmp_path / f"{place}{seed}", seed, top1,
                       more=dict(code={"senetv2.py": place}), **settings)
    report.main([str(tmp_path)])
    head, *lines = table_rows(capsys.readouterr().out)
    assert head[4:] == ["minus resnet", "minus senet r=32", "minus the same without a name",
                        "minus senetv2", "in the paper"]
    found = {line[0]: line[3:-1] for line in lines}
    assert found["resnet"] == ["50.00 ± 0.00", "-", "-", "-", "-"]
    assert found["senetv2 r=32 K=4 (= senet r=8), amax"] == [
        "62.00 ± 0.00", "+12.00 [+12.00, +12.00], across code", "-",
        "+2.00 [+2.00, +2.00], across code", "-"]
    assert found["amax"] == [       # it has neither r nor K
        "65.50 ± 0.71", "+15.50 [+9.15, +21.85], across code", "-", "-",
        "+5.50 [-0.85, +11.85], across code"]

    report.main([str(tmp_path), "--minus", "amax"])
    head, *lines = table_rows(capsys.readouterr().out)
    found = {line[0]: line[-2] for line in lines}
    assert head[-2] == "minus amax" and found["amax"] == "-"
    assert found["resnet"] == "-15.50 [-21.85, -9.15], across code"
    text = complaint(capsys, tmp_path, "--minus", "amaxx", main=report.main)
    assert "no row is called 'amaxx'; there are amax; resnet; senetv2 r=32 K=4 (" in text


def test_runs_of_different_code_are_rows_of_their_own_and_of_one_code_the_later_counts(tmp_path,
                                                                                       capsys):
    for number, (seed, top1, code, finished) in enumerate((
            (0, 50.0, None, None), (0, 60.0, "a", "2026-01-01"), (1, 61.0, "a", "2026-01-01"),
            (0, 70.0, "b", "2026-01-03"), (0, 69.0, "b", "2026-01-02"))):
        more = dict(code={"senetv2.py": code}, finished=finished) if code else {}
        invent_run(tmp_path / str(number), seed, top1, more=more)
    invent_run(tmp_path / "vit", 0, 80.0, model="vit")
    report.main([str(tmp_path)])
    text = capsys.readouterr().out
    found = {line[0]: line[2:] for line in table_rows(text)}
    a, b = sorted((name for name in found if ", code " in name), key=lambda name: found[name][1])
    assert found["resnet"][:2] == ["1", "50.00"] and re.fullmatch("resnet, code [0-9a-f]{4}", a)
    assert found[a][:2] == ["2", "60.50 ± 0.71"] and found[b][:2] == ["1", "70.00"]
    assert found["vit"][2] == "+30.00 (seed 0 alone)"       # of equally many seeds, the same code
    report.main([str(tmp_path), "--minus", b])              # a row is named with its code, too
    found = {line[0]: line[-2] for line in table_rows(capsys.readouterr().out)}
    assert found[b] == "-" and found[a] == "-10.00 (seed 0 alone, across code)"
    report.main([str(tmp_path), "--minus", "resnet"])       # or without: then never from itself
    head, *lines = table_rows(capsys.readouterr().out)
    found = {line[0]: line[head.index("minus resnet")] for line in lines}
    assert "-" not in (found["resnet"], found[a], found[b])
    assert f"{tmp_path / '4'}: top-1 69.00%; the table uses {tmp_path / '3'}, with the same" in text

    shutil.rmtree(tmp_path / "0")           # a label of one code needs no code
    shutil.rmtree(tmp_path / "3"), shutil.rmtree(tmp_path / "4")
    report.main([str(tmp_path)])
    found = {line[0]: line[2:] for line in table_rows(capsys.readouterr().out)}
    assert found["resnet"][0] == "2" and found["vit"][2] == "+20.00 (seed 0 alone, across code)"


def test_the_table_of_the_run_that_finished_last_comes_last(tmp_path, capsys):
    for name, epochs, more in (("mine", 2, dict(finished="2026-01-02T00:00:00Z")),
                               ("published", 3, {}),
                               ("yesterday's", 4, dict(finished="2026-01-01T00:00:00Z"))):
        invent_run(tmp_path / name, 0, 70.0, epochs=epochs, done=epochs, more=more)
    report.main([str(tmp_path)])
    assert re.findall(r"^###.* (\d) epochs", capsys.readouterr().out, re.M) == ["3", "4", "2"]


def test_what_has_gone_from_the_code_does_not_join_rows(tmp_path, capsys):
    for name, top1, more in (
            ("a", 60, dict(model="mine")), ("b", 80, dict(model="mine", reduction=8)),
            ("c", 70, dict(model="mine", drop=0.5)), ("d", 75, dict(model="mine", betas=[1, 2]))):
        invent_run(tmp_path / "elsewhere" / name, 0, top1, **more)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    for name in "xyz":                      # each holds itself and the others, without an end
        (tmp_path / "runs" / name).symlink_to(".")
    report.main([str(tmp_path / "runs")])
    text = capsys.readouterr().out
    found = {tuple(line[:4:3]) for line in table_rows(text) if "mine" in line[0]}
    assert found == {("mine", "60.00"), ("mine r=8", "80.00"), ("mine", "70.00"), ("mine", "75.00")}
    assert "layers 1,1,1,1, drop 0.5\n" in text and "layers 1,1,1,1, betas (1, 2)\n" in text
    assert text.endswith("in no table:\n\n- none\n")


def test_the_one_of_two_precisions_that_counts_is_named(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "b", 0, 71.0, more=dict(precision="bfloat16", finished="2026"))
    report.main([str(tmp_path)])
    assert (f"the table uses {tmp_path / 'b'}, with the same settings, on D, torch T, bfloat16 (71."
            in capsys.readouterr().out)


def test_results_on_held_out_images_are_a_table_of_their_own(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "b", 0, 75.0, hold_out=1000)
    report.main([str(tmp_path)])
    first, second = capsys.readouterr().out.split("### ")[1:]
    assert second.splitlines()[0].endswith(", layers 1,1,1,1, hold_out 1000")
    assert "hold_out" not in first and "top-1: of the last" in first and "77.38" in first
    assert "hold_out 1000" in second and "top-1: on held-out images, of the last" in second
    assert "77.38" not in second
