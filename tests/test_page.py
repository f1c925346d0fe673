"""The page of a run, read as data: it is well-formed XML."""
import base64
import csv
import io
import math
import shutil
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import data
import train
from senetv2 import build_model
from support.console import printable
from test_senetv2 import SMALL, in_memory
from tests.conftest import edited, folder_flags
from tools import evaluate, look, predict

NAMES = list(data.SHAPES)


def sections_after_evaluation(folder, *flags):
    """The sections of the page by heading.  It holds no script and loads nothing."""
    evaluate.main(["--checkpoint", str(folder), *flags])
    text = (folder / "page.html").read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert not {element.tag for element in root.iter()} & {"script", "link", "iframe"}
    for key, value in [pair for element in root.iter() for pair in element.items()]:
        assert key[:2] != "on" and (key not in ("src", "href") or value[:15] == "data:image/png;")
    assert printable(text) == text.replace("\n", "\\n") and "url(" not in text
    return {section.find("h2").text: section for section in root.iter("section")}


def cells(element):
    return [["".join(cell.itertext()) for cell in row] for row in element.iter("tr")]


@pytest.fixture(scope="module")
def looked(finished, tmp_path_factory):
    """(sections, logits and labels found without the loader), of a network that finds the nearest
    mean: |x - m|^2 is smallest where 2 m x - |m|^2 is largest.  (The run's takes all for one.)"""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("page") / "run")
    images, labels = data.draw_shapes(1000, seed=2)
    x = v2.Normalize(*data.STATISTICS["shapes"])(images.float() / 255)
    with torch.no_grad():
        found = create_feature_extractor(train.load(folder), ["flatten"])(x)["flatten"]
        mean = torch.stack([found[labels == label].mean(0) for label in range(10)]) * 10
        edited(lambda saved: saved["model"].update(
            {"fc.weight": 20 * mean, "fc.bias": -mean.square().sum(1)}))(folder / "last.pt")
        return sections_after_evaluation(folder), train.load(folder)(x).double(), labels


def test_matrix_and_accuracies_are_an_independent_count(looked):
    page, logits, labels = looked
    assert len(logits.argmax(1).unique()) > 5
    counts = Counter(zip(labels.tolist(), logits.argmax(1).tolist()))
    assert cells(page["Confusion matrix"]) == [["true \\ predicted", *NAMES], *(
        [name, *(str(counts[i, j]) for j in range(10))] for i, name in enumerate(NAMES))]

    *each, (name, right, images, share, *_) = cells(page["Each class"])[1:]
    found = sum(counts[i, i] for i in range(10))
    assert [name, right, images] == ["all together", str(found), "1000"]
    assert share == f"{found / 10:.1f}%"
    for i, (name, right, images, share, interval, _) in enumerate(each):
        assert [name, right, images] == [NAMES[i], str(counts[i, i]), "100"]
        assert share == f"{counts[i, i]:.1f}%"
        for end in interval.strip("%").split(" to "):       # 1.96 of its own deviations away
            away = 1.96 * math.sqrt(float(end) * (100 - float(end)) / 100)
            assert abs(counts[i, i] - float(end)) == pytest.approx(away, abs=0.15)


def test_mistakes_are_those_of_most_confidence_with_their_pixels(looked):
    page, logits, labels = looked
    chances, predicted = logits.softmax(1).max(1)
    images, expected = data.draw_shapes(1000, seed=2)[0], []
    for label in range(10):
        wrong = ((labels == label) & (predicted != label)).nonzero()[:, 0].tolist()
        expected += sorted(wrong, key=lambda i: -chances[i])[:4]
    for i, figure in zip(expected, page["Mistakes"].iter("figure"), strict=True):
        assert "".join(figure.itertext()).strip() == (
            f"{NAMES[labels[i]]}taken for {NAMES[predicted[i]]}, {chances[i]:.1%}")
        png = base64.b64decode(figure.find("img").get("src").split(",")[1])
        assert np.array_equal(Image.open(io.BytesIO(png)), images[i].permute(1, 2, 0))


def test_curves_follow_the_rows_of_a_run_also_where_one_lacks_a_value(finished, tmp_path):
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    path = shutil.copytree(finished, tmp_path, dirs_exist_ok=True) / "last.pt"
    edited(lambda saved: saved["history"][0].pop("train_top1"))(path)
    rows[0]["train_top1"] = ""
    page = sections_after_evaluation(tmp_path)
    assert ["torch", torch.__version__, ""] in cells(page["Settings, hardware, versions"])
    for svg, keys, chance in zip(page["Curves"].iter("svg"), (
            ("train_loss", "test_loss"), ("train_top1", "top1")), (math.log(10), 10), strict=True):
        texts = [(float(e.get("x")), float(e.get("y")) - 4, e.text) for e in svg.iter("text")]
        epoch_at, value_at = (      # the two axes, as the numbers beside them say
            np.poly1d(np.polyfit(*zip(*[(place[i], float(place[2])) for place in texts
                                        if place[1 - i] == same]), 1))
            for i, same in ((0, 234), (1, 39)))
        for key, line in zip(keys, svg.iter("polyline"), strict=True):
            x, y = zip(*(map(float, point.split(",")) for point in line.get("points").split()))
            there = [row for row in rows if row[key]]
            assert epoch_at(x) == pytest.approx([int(row["epoch"]) for row in there], abs=0.01)
            assert value_at(y) == pytest.approx([float(row[key]) for row in there], rel=0.01)
        height = svg.find("path[@class='chance']").get("d").split()[1].partition("H")[0]
        assert value_at(float(height)) == pytest.approx(chance, rel=0.01)


def test_curves_of_few_or_infinite_values_are_drawn_all_the_same():
    assert evaluate.curves([], 10) == "<p>No epoch is finished yet.</p>"
    for row in (dict(test_loss=math.inf, top1=50), dict(train_loss=1.0), {}):
        svg = ElementTree.fromstring(f"<p>{evaluate.curves([dict(epoch=1) | row], 10)}</p>")
        assert len([*svg.iter("polyline")]) == 4


def test_names_of_classes_break_neither_page_nor_terminal(folder, tmp_path, capsys, recwarn):
    names = ["<script>alert(1)<img src=x onerror=y>", "\"a\" & 'b' &lt;",
             "\u202eשלום\033[31m\n"]
    for path in [*folder.glob("*/*")]:
        path.rename(path.with_name(names[("cat", "dog", "owl").index(path.name)]))
    run, place = tmp_path / "run", ["--data-dir", str(folder)]
    train.main(folder_flags(folder, run))
    look.main(["--dataset", "folder", *place, "--out", str(tmp_path / "sheet.png")])
    predict.main(["--checkpoint", str(run), "--image", str(folder / "val" / names[2])])

    # Evaluation needs no training images, whatever was chosen of them.
    edited(lambda saved: saved["settings"].update(images_per_class=3))(run / "last.pt")
    shutil.rmtree(folder / "train")
    page = sections_after_evaluation(run, *place, "--workers", "0")
    printed = capsys.readouterr().out
    assert "\033" not in printed and printed.count("\\x1b[31m") >= 5 and not recwarn.list
    assert "9 test images" in printed and "top5" not in printed and "nan" not in printed
    shown = sorted([*names[:2], "\\u202eשלום\\x1b[31m\\n"])
    assert sorted(cells(page["Confusion matrix"])[0][1:]) == shown
    assert sorted(row[0] for row in cells(page["Each class"])[1:-1]) == shown
    assert sorted(name.text for name in page["Gates"].iter("bdi")) == sorted(4 * shown)


def test_above_twenty_classes_the_ten_most_frequent_confusions_are_listed(
        finished, tmp_path, monkeypatch, capsys):
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8)     # PNG cannot shrink it
    names, net = [f"class {i}" for i in range(100)], build_model("senetv2", 100, SMALL).eval()
    with torch.no_grad():                   # the last hundred are right, and most others wrong
        predicted = net(images / 255).argmax(1)
    labels = torch.cat([torch.arange(100), torch.randint(100, (300,)), predicted[400:]])
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    edited(lambda saved: saved.update(classes=names, model=net.state_dict()))(tmp_path / "last.pt")
    monkeypatch.setattr(evaluate, "open_data", lambda *args, **options: in_memory(
        (images[:64], labels[:64]), (images, labels), names))
    page = sections_after_evaluation(tmp_path)

    wrong = Counter((names[i], names[j]) for i, j in zip(labels, predicted) if i != j)
    rows = cells(page["Confusions"])[1:]
    assert all(words == f"{wrong[true, taken]} of {(labels == names.index(true)).sum()}"
               for true, taken, words in rows)
    assert [wrong[true, taken] for true, taken, _ in rows] == [n for _, n in wrong.most_common(10)]
    assert len([*page["Mistakes"].iter("figure")]) == 40
    assert (tmp_path / "page.html").stat().st_size < 2e6

    # Where it cannot be written.
    before = capsys.readouterr().out.partition(str(tmp_path / "page.html"))[0]
    (tmp_path / "page.html").unlink()
    (tmp_path / "page.html").mkdir()
    evaluate.main(["--checkpoint", str(tmp_path)])
    after = capsys.readouterr().out
    assert after.startswith(before + "no ") and "cannot be written (Is a directory)" in after
