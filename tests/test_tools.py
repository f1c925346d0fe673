"""Evaluation, prediction, and the table of parameters."""
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

import data
import train
from senetv2 import SqueezeExcitation, build_model
from test_senetv2 import HERE, SMALL, joined, rows, save_image
from tests.conftest import (
    STATISTICS, complaint, edited, folder_flags, load_folder, rename_class)
from tools import bench, evaluate, predict, table


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


def test_evaluation_looks_at_names_and_prints_where_it_cannot_draw(folder, tmp_path, monkeypatch,
                                                                   capsys):
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
    monkeypatch.setattr(SqueezeExcitation, "forward", lambda gate, x: x.mul_(gate.scale(x)))
    evaluate.main(place)                    # a gate that works in place is looked at before
    after = capsys.readouterr().out
    assert "directory" in after
    assert all(line in after for line in before if "gates.png" not in line)
    monkeypatch.setattr(SqueezeExcitation, "scale", nn.Linear(2, 2))        # no method
    monkeypatch.setattr(SqueezeExcitation, "forward", lambda gate, x: x)
    evaluate.main(place)
    assert "no picture of the gates: not all have a method scale(x)" in capsys.readouterr().out

    rename_class(folder)                    # three classes as before
    assert "only in one of them: ['elk', 'owl']" in complaint(capsys, *place, main=evaluate.main)


def test_the_table_counts_as_one_does_by_hand_and_the_readme_quotes_it(capsys):
    row, found = re.compile(r"^(?:res|se)net.*? {2,}(.*)$", re.M), []
    for words in ([], ["--image-size", "224"], ["--stem", "cifar"]):
        table.main(words)
        found += [line.replace(",", "").replace(" M", "").split()
                  for line in row.findall(capsys.readouterr().out)]
    for lines, layers, plain in ((found[:4], (3, 4, 6, 3), 23_712_932),
                                 (found[4:8], SMALL, 8_036_426)):
        channels = np.repeat((256, 512, 1024, 2048), layers)        # of each bottleneck
        for width, (count, added, share, claim, work, _) in zip((0, 1, 4, 4), lines, strict=True):
            units = width * (channels // 32)        # two dense layers with biases, C -> units -> C
            gates = (2 * channels * units + units + channels).sum() * (width > 0)
            assert [int(count), int(added)] == [plain + gates, gates]
            assert claim == "-" or float(claim) == pytest.approx(gates / 1e6, abs=0.01)
            assert int(work) - int(lines[0][4]) == (2 * channels * units).sum()
            said = f"{gates:,} ({share})"
            assert said in (HERE / "README.md").read_text() or layers == SMALL or not width
            assert share == f"{gates / plain:+.1%}"
    assert int(found[16][0]) == 23_712_932 - 64 * 3 * (7 * 7 - 3 * 3)
    work = int(found[8][4]) + 2048 * 900        # for 1000 classes, not 100
    assert round(work / 1e9, 3) == torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"]


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
    (tmp_path / "empty").mkdir()
    names, error, code = said("sub", "empty", "x1.jpg")
    assert (names, code) == (["sub/c.PNG", "sub/d.png", "x1.jpg"], 1)
    assert "sub/broken.png cannot be decoded" in error and error.count("\n") == 2
    assert re.search("empty cannot be decoded as an image .*Is a directory", error)
    names, error, code = said("x1.jpg x2.jpg", "a b.png")
    assert (names, code) == (["a b.png"], 1)
    assert "is not found; for several, give a folder or a pattern, or type python -m" in error
