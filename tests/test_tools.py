"""Evaluation, prediction, the report and the table of parameters."""
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import data
import train
from senetv2 import build_model
from test_senetv2 import HERE, SMALL, joined, rows, save_image
from tests.conftest import (
    STATISTICS, complaint, edited, folder_flags, invent_run, load_folder, rename_class)
from tools import bench, evaluate, look, predict, report, table


def test_evaluation_prints_what_network_and_gates_find(finished, capsys):
    net, last = train.load(finished), rows(finished)[1]
    assert net.classes == list(data.SHAPES) and net.settings["batch_size"] == 32
    evaluate.main(["--checkpoint", str(finished)])
    printed = capsys.readouterr().out
    words = [line.split() for line in printed.splitlines()]

    # The shapes are normalised without the loader, and the network cut by torchvision's tool.
    images, labels = data.draw_shapes(1000, seed=2)
    cut, gate = create_feature_extractor(net, ["layer3.0.bn3", "fc"]), net.layer3[0].gate
    with torch.no_grad():
        found = cut(v2.Normalize(*STATISTICS["shapes"])(images.float() / 255))
        s = gate.scale(found["layer3.0.bn3"]).flatten(1)
    logits = found["fc"].double()
    better = (logits > logits.gather(1, labels[:, None])).sum(1)     # how many beat the right class
    top1, top5 = (100 * (better < k).double() for k in (1, 5))
    assert float(last["top1"]) == pytest.approx(top1.mean().item())
    assert float(last["top5"]) == pytest.approx(top5.mean().item())
    loss = F.cross_entropy(logits, labels).item()
    assert float(last["test_loss"]) == pytest.approx(loss)

    # Each class has its accuracy; they are not alike.
    apart = [labels == label for label in range(10)]
    per_class = [f"{top1[mine].mean():.2f}%" for mine in apart]
    assert len({*per_class}) > 3
    assert all([number, *name.split()] in words for number, name in zip(per_class, net.classes))
    assert f"top1 {top1.mean():.5g}  top5 {top5.mean():.5g}" in printed

    means = torch.stack([s[mine].mean(0) for mine in apart])
    between = means.std(0, correction=0).mean()
    stage, = [line for line in printed.splitlines() if line.startswith("stage 3")]
    assert between > 0.01 and re.findall(r"\d\.\d+", stage) == [f"{means.mean():.3f}",
                                                                 f"{between:.4f}"]

    # The picture's third strip: columns sorted by mean, black is 0 and white is 1.
    picture = np.array(Image.open(finished / "gates.png"))[..., 0]
    assert picture.shape == (4 * 108 + 8, 2064)
    strip = picture[2 * 108 + 8:3 * 108:10, 8:-8:2]                     # (10, 1024)
    off = abs(strip / 255 - means[:, means.mean(0).argsort()].numpy())
    assert off.max() < 0.01


@pytest.mark.parametrize("source, statistics, side", [("shapes", "shapes", 32),
                                                      ("folder", "imagenet", 36)])
def test_prediction_names_the_most_likely_classes(source, statistics, side, whole, finished,
                                                  tmp_path, capsys):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, image in zip(paths, data.draw_shapes(1000, seed=2)[0]):
        save_image(v2.functional.resize(image, (50, 70)), path)
    run = finished if source == "shapes" else whole / source
    predict.main(["--image", *paths, "--checkpoint", str(run)])

    net, lines = train.load(run), []
    oracle = v2.Compose([v2.Resize(side), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(*STATISTICS[statistics])])
    for path in paths:
        x = oracle(v2.functional.pil_to_tensor(Image.open(path)))[None]
        torch.testing.assert_close(net.preprocess(data.read_image(path)), x)
        chances = net(x)[0].softmax(0)
        best = chances.argsort(descending=True)[:5].tolist()
        lines += [path, *(f"{chances[k].item():.2%} {net.classes[k]}" for k in best)]
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line in lines] == lines
    assert source == "folder" or len({*lines[1::6]}) == 3           # each image has its answer


def test_a_class_whose_name_is_red_is_trained_on_evaluated_and_drawn(folder, tmp_path, capsys,
                                                                     recwarn):
    for path in folder.glob("*/owl"):
        shutil.rmtree(path)
    for split in ("train", "val"):      # a class and a file whose names turn a terminal red
        (folder / split / "cat").rename(folder / split / "\033[31mcat")
    image = (folder / "val/\033[31mcat/cat_0.JPEG").rename(folder / "val/\033[31mcat/\033[31m.JPEG")
    train.main([*folder_flags(folder, tmp_path), "--train-images", "9"])

    place = ["--checkpoint", str(tmp_path), "--data-dir", str(folder), "--workers", "0"]
    evaluate.main([*place])
    printed = capsys.readouterr().out
    assert "6 test images" in printed
    assert "nan" not in printed and "top5" not in printed
    assert not recwarn.list

    predict.main(["--image", str(image), *place])
    look.main(["--dataset", "folder", "--data-dir", str(folder), "--out",
               str(tmp_path / "sheet.png")])
    printed += capsys.readouterr().out
    assert "\033" not in printed and printed.count("\\x1b[31m") == 5

    # Evaluation needs no training images, whatever was chosen of them.
    edited(lambda saved: saved["settings"].update(images_per_class=3))(tmp_path / "last.pt")
    shutil.rmtree(folder / "train")
    evaluate.main([*place])
    assert "6 test images" in capsys.readouterr().out


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
        invent_run(tmp_path / name, 0, 50.0, **data, **settings)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | dict(files=files)))
    report.main([str(tmp_path)])
    tables = capsys.readouterr().out.split("### ")[1:]
    assert [sorted(re.findall(r"^\| (resnet|vit|mobilenet_v2) ", table, re.M)) for table in tables
            ] == [["mobilenet_v2", "resnet"], ["vit"]]

    # A run of older code, which did not write a digest of its files, joins the table of equal
    # settings.
    shutil.rmtree(tmp_path / "b")
    invent_run(tmp_path / "old", 1, 70.0, **data)
    report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("### ") == 1 and "| resnet | 8,036,426 | 2 | 60.00" in text


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


def test_evaluation_looks_at_names_and_prints_where_it_cannot_draw(folder, tmp_path, capsys):
    train.main([*folder_flags(folder, tmp_path / "run"), "--train-images", "8", "--residual",
                "--layers", "1,1,2,1"])
    edited(lambda saved: [saved["model"][f"layer3.1.gate.expand.{kind}"].zero_()
                          for kind in ("weight", "bias")])(tmp_path / "run" / "last.pt")
    place = ["--checkpoint", str(tmp_path / "run"), "--data-dir", str(folder), "--workers", "0"]
    capsys.readouterr()
    (folder / "val/owl/owl_0.JPEG").unlink()        # of owl, two are left
    evaluate.main(place)
    before = capsys.readouterr().out.splitlines()
    images, labels = joined(load_folder(folder).test_batches())
    right = 100 * (train.load(tmp_path / "run")(images).argmax(1) == labels).double()
    assert all([f"{right[labels == k].mean():.2f}%", name] in map(str.split, before)
               for k, name in enumerate(("cat", "dog", "owl")))
    assert re.search(r"stage 3.* 1\.500,.* 0\.0000", "\n".join(before))       # 1 + 1/2, in the last
    picture = np.array(Image.open(file := tmp_path / "run" / "gates.png"))[8:108, 8:-8]
    assert 0 < picture.min() < picture.max() < 255      # from 1 + 0 to 1 + 1
    file.unlink()
    file.mkdir()        # in the way
    evaluate.main(place)
    after = capsys.readouterr().out
    assert "directory" in after
    assert all(line in after for line in before if "gates.png" not in line)

    rename_class(folder)                    # three classes as before
    assert "only in one of them: ['elk', 'owl']" in complaint(capsys, *place, main=evaluate.main)


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
    invent_run(tmp_path / "vit", 0, 51.0, model="vit")
    config = tmp_path / "vit" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    report.main([str(tmp_path)])
    assert "| +1.00 (seed 0 alone, across machines) |" in capsys.readouterr().out

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


def test_the_table_counts_as_one_does_by_hand_and_the_readme_quotes_it(capsys):
    row, found = re.compile(r"^(?:res|se)net.*? {2,}(.*)$", re.M), []
    for words in ([], ["--image-size", "224"], ["--stem", "cifar"]):
        table.main(words)
        found += [line.replace(",", "").replace(" M", "").split()
                  for line in row.findall(capsys.readouterr().out)]
    for rows, layers, plain in ((found[:4], (3, 4, 6, 3), 23_712_932),
                                (found[4:8], SMALL, 8_036_426)):
        channels = np.repeat((256, 512, 1024, 2048), layers)        # of each bottleneck
        for width, (count, added, share, claim, work, _) in zip((0, 1, 4, 4), rows, strict=True):
            units = width * (channels // 32)        # two dense layers with biases, C -> units -> C
            gates = (2 * channels * units + units + channels).sum() * (width > 0)
            assert [int(count), int(added)] == [plain + gates, gates]
            assert claim == "-" or float(claim) == pytest.approx(gates / 1e6, abs=0.01)
            assert int(work) - int(rows[0][4]) == (2 * channels * units).sum()
            said = f"{gates:,} ({share})"
            assert said in (HERE / "README.md").read_text() or layers == SMALL or not width
            assert share == f"{gates / plain:+.1%}"
    assert int(found[16][0]) == 23_712_932 - 64 * 3 * (7 * 7 - 3 * 3)
    work = int(found[8][4]) + 2048 * 900        # for 1000 classes, not 100
    assert round(work / 1e9, 3) == torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]


def test_the_report_names_16_bits(tmp_path, capsys):
    for precision, said in (("float32", "D, torch T."), ("bfloat16", "D, torch T, bfloat16.")):
        invent_run(tmp_path / precision, 0, 50)
        config = tmp_path / precision / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(precision=precision)))
        report.main([str(tmp_path / precision)])
        assert f"Ran on (CPUs are not told apart): {said}" in capsys.readouterr().out


def test_bench_tells_the_loader_from_a_step(monkeypatch, capsys):
    now, loads, draw, inner = [0], [], data.InMemory.train_batches, bench.interleaved

    def known(function):        # runs once; from then on loading takes 1 s, and all else half of it
        before, _ = len(loads), function()
        seconds = 1 if len(loads) > before else 0.5
        return lambda: now.append(now[-1] + seconds)

    for place, name, value in (
            (bench, "time", SimpleNamespace(perf_counter=lambda: now[-1])),
            (bench, "interleaved", lambda ways, *rest: inner([*map(known, ways)], *rest)),
            (bench, "build_model", lambda name, *rest: build_model(name, *(rest or (10, SMALL)))),
            (data.InMemory, "train_batches", lambda *args: loads.append(1) or draw(*args)),
            (torch, "set_float32_matmul_precision", str),
            (torch.backends.cudnn, "benchmark", False)):        # for these two, to last no longer
        monkeypatch.setattr(place, name, value)
    bench.main("--layers 1,1,1,1 --batch-size 2".split())
    printed = capsys.readouterr().out
    assert "| senetv2 | 4 [4, 4] | 1.000 " in printed and "| 64 | 512 | 500.00 [500." in printed
    assert ": 40 images/s in batches of 2; it takes 10.00% of a training step" in printed


def table_rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]


def invent_code(folder, code, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(code=code) | more))


def test_the_report_compares_what_one_tries_with_what_it_was_made_from(tmp_path, capsys):
    gate = dict(reduction=32, cardinality=4)
    for seed in (0, 1):
        for place, top1, settings in (
                ("plain", 50, {}), ("v2", 60, dict(model="senetv2", **gate)),
                ("named", 62, dict(model="senetv2", name="amax", **gate)),
                ("own", 65 + seed, dict(model="amax", **gate))):
            invent_run(tmp_path / f"{place}{seed}", seed, top1, **settings)
            invent_code(tmp_path / f"{place}{seed}", {"senetv2.py": place})
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
    assert "no row begins with 'amaxx'; there are amax; resnet; senetv2 r=32 K=4 (" in text


def test_runs_of_different_code_are_rows_of_their_own_and_of_one_code_the_later_counts(tmp_path,
                                                                                       capsys):
    for number, (seed, top1, code, finished) in enumerate((
            (0, 50.0, None, None), (0, 60.0, "a", "2026-01-01"), (1, 61.0, "a", "2026-01-01"),
            (0, 70.0, "b", "2026-01-03"), (0, 69.0, "b", "2026-01-02"))):
        invent_run(tmp_path / str(number), seed, top1)
        if code:
            invent_code(tmp_path / str(number), {"senetv2.py": code}, finished=finished)
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


def test_results_on_held_out_images_are_a_table_of_their_own(tmp_path, capsys):
    invent_run(tmp_path / "a", 0, 70.0)
    invent_run(tmp_path / "b", 0, 75.0, hold_out=1000)
    report.main([str(tmp_path)])
    first, second = capsys.readouterr().out.split("### ")[1:]
    assert second.splitlines()[0].endswith(", layers 1,1,1,1, hold_out 1000")
    assert "hold_out" not in first and "top-1: of the last" in first and "77.38" in first
    assert "hold_out 1000" in second and "top-1: on held-out images, of the last" in second
    assert "77.38" not in second


def test_prediction_takes_files_folders_and_patterns_and_goes_on_after_a_broken_one(
        finished, tmp_path, capsys, monkeypatch):
    star = HERE / "assets" / "star.png"
    for name in ("a b.png", "sub/c.PNG", "sub/d.png", "x1.jpg", "x2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(star, tmp_path / name)
    (tmp_path / "sub" / "notes.txt").touch()
    (tmp_path / "sub" / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)

    def said(*images):
        code = 0
        try:
            predict.main(["--checkpoint", str(finished), "--image", *images])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return [line for line in out.splitlines() if "%" not in line], err, code
    assert said("a b.png") == (["a b.png"], "", 0)
    assert said("x*.jpg", "a b.png") == (["x1.jpg", "x2.jpg", "a b.png"], "", 0)
    names, error, code = said("sub", "x1.jpg")
    assert (names, code) == (["sub/c.PNG", "sub/d.png", "x1.jpg"], 1)
    assert "sub/broken.png cannot be decoded" in error and error.count("\n") == 1
    names, error, code = said("x1.jpg x2.jpg", "a b.png")
    assert (names, code) == (["a b.png"], 1)
    assert "is not found; for several, give a folder or a pattern, or type python -m" in error
