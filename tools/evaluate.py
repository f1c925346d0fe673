"""Loss, top-1, top-5 and the accuracy of each class; the gates; and a page to look at.

    python -m tools.evaluate --checkpoint runs/NAME            or the flags it was trained with
    python -m tools.evaluate --checkpoint runs/NAME --data-dir mine

It writes gates.png and page.html beside the checkpoint.  The page is a single file, which a browser
opens by a double click, also offline: curves are SVG, and pictures are PNG inside its text.
"""
import base64
import html
import inspect
import io
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import save_image

import train
from senetv2 import GATES
from support import flags
from support.checkpoint import result_of, test_images
from support.console import UserError, in_words, printable, say, world
from support.hardware import on_host
from train import SETTINGS, evaluate, load, open_data

OPTIONS = {"checkpoint": (None, flags.path, "what to evaluate, as it was trained: a run's folder "
                                            "or its last.pt; by default the folder that the other "
                                            "flags name")}
FEW = 20        # up to so many classes, the page has the whole matrix, and names beside the gates


def run_evaluation(args, settings, device):
    """Print the accuracy of each class and of all, look inside the gates, and write the page."""
    if world() > 1:
        raise UserError("evaluation is for one process; leave torchrun out")
    path = Path(args.checkpoint or args.out)
    folder = path if path.is_dir() else path.parent
    net = load(path).to(device, memory_format=torch.channels_last)
    data = open_data(args, net.settings | dict(train_images=0, hold_out=0), device, only_test=True)
    if data.classes != net.classes:
        different = sorted({*data.classes} ^ {*net.classes})[:5] or "their order"
        raise UserError(f"{path} was trained on classes other than those in {args.data_dir}; only "
                        f"in one of them: {different}")

    test, chances, predicted, means = look(net, data)
    labels = data.labels[data.train_size:].cpu()
    images, right = (torch.bincount(some, minlength=len(data.classes)).tolist()
                     for some in (labels, labels[labels == predicted]))
    result = f"{data.test_size:,} test images of {net.settings['dataset']}: {in_words(test)}"
    say("top-1 of each class:")
    for name, hits, count in zip(data.classes, right, images):
        say(f"{100 * hits / count:7.2f}%  {name}")
    say(result)
    if net.history:
        say(f"its run: {result_of(net.settings, net.history)}")
    gates = draw_gates(means, folder / "gates.png") if net.settings["model"] in GATES else None

    out = folder / "page.html"
    text = page(net, data, result, chances.tolist(), predicted.tolist(), gates)
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        return say(f"no page: {out} cannot be written ({error.strerror})")
    say(f"{out}: curves, confusions, mistakes and more; open it in a browser")


def look(net, data):
    """Evaluate, and keep of each test image the probability and the number of its most likely
    class; and of the last gate of each stage that can tell, the mean factor s of each channel for
    each class, (classes, channels).  Returns (results, (N,), (N,), list)."""
    answers, sums, position = [], {}, 0
    labels = data.labels[data.train_size:]
    last = [getattr(stage[-1], "gate", None) for name, stage in net.named_children()
            if name.startswith("layer")]

    def look_at_gate(gate, inputs):             # before it runs: it may work in place
        factors = gate.scale(*inputs).flatten(1)                                # (B, channels)
        if gate not in sums:
            sums[gate] = factors.new_zeros(len(data.classes), factors.shape[1])
        here = labels[position:position + len(factors)]         # in folders, on the CPU
        sums[gate].index_add_(0, here.to(factors.device), factors)

    def look_at_answer(net, images, logits):
        nonlocal position
        position += len(logits)
        answers.append(on_host(logits).softmax(1).max(1))

    hooks = [gate.register_forward_pre_hook(look_at_gate) for gate in last
             if inspect.ismethod(getattr(gate, "scale", None))]
    hooks.append(net.register_forward_hook(look_at_answer))
    results = evaluate(net, data)
    for hook in hooks:
        hook.remove()
    chances, predicted = (torch.cat(part) for part in zip(*answers))
    counts = on_host(torch.bincount(labels, minlength=len(data.classes)))[:, None]
    return results, chances, predicted, [on_host(sums[gate]) / counts for gate in last
                                         if gate in sums]


def draw_gates(means, path):
    """Draw the mean factor s of each channel for each class, and print how much it varies.

    After arXiv 1709.01507, section 7.2.  One strip per stage, of its last bottleneck: one row per
    class, one column per channel, sorted by mean; from black, 0 (of 1 + s: 1), to white, 1 (or 2).

    Returns the factor that is black, and of each stage its line of text and (classes, channels).
    """
    if len(means) < 4:
        return say("no picture of the gates: not all have a method scale(x), the factor alone")
    strips, black = [], min(mean.min() for mean in means).floor()
    for stage, mean in enumerate(means, start=1):
        words = (f"stage {stage}: mean factor {mean.mean():.3f}, standard deviation across classes "
                 f"{mean.std(0, correction=0).mean():.4f}")
        say(words)
        strips.append((words, mean[:, mean.mean(0).argsort()] - black))
    picture = torch.cat([F.interpolate(strip[None, None], (max(100, len(strip)), 2048))
                         for _, strip in strips])
    try:
        save_image(picture, path, nrow=1, padding=8, pad_value=1)
    except OSError as error:
        say(f"no picture of the gates: {path} cannot be written ({error.strerror})")
    else:
        say(f"{path}: one strip per stage, one row per class, in the order above; one column per "
            f"channel, sorted by mean; black is a factor of {black:.0f}, white of {black + 1:.0f}")
    return black.item(), strips


# ----------------------------------------------------------------------------------------- The page

STYLE = """
:root { color-scheme: light dark; --line: rgb(128 128 128 / 0.4) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1136px; margin: auto; padding: 1rem;
  overflow-wrap: anywhere }   p { max-width: 44rem }   h2 { margin-top: 2.5rem }
svg { width: 100%; max-width: 480px }   text { font-size: 13px; fill: currentColor }
path { stroke: var(--line) }   .chance { stroke: gray; stroke-dasharray: 5 4 }
.training { stroke: #e07000; fill: #e07000 }   .test { stroke: #3b82f6; fill: #3b82f6 }
polyline { stroke-width: 2; fill: none !important }
.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 56rem }
table { border-collapse: collapse; font-size: 0.85rem; overflow-wrap: break-word }
th { font-weight: normal; opacity: 0.75; vertical-align: bottom }
td, th { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child, .words *, .strip bdi { text-align: left }
td bdi { display: inline-block; max-width: 14rem }
td span { display: block; min-width: 2rem; margin: -0.2rem -0.6rem; padding: 0.2rem 0.4rem }
.matrix th bdi { writing-mode: vertical-rl; max-height: 9rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, 128px); gap: 1rem }
figure { margin: 0; font-size: 0.85rem; line-height: 1.3 }   img { image-rendering: pixelated }
.strip { display: flex; gap: 0.5rem; font-size: 0.75rem; line-height: 1rem }
.strip bdi { display: block; height: 1rem; max-width: 7rem; overflow: hidden; white-space: nowrap }
.strip img { flex: 1; min-width: 0; outline: 1px solid var(--line) }
"""


def page(net, data, result, chances, predicted, gates):
    """The page as text, well-formed XML too, of each image's most likely class, and its chance."""
    names = [f"<bdi>{shown(name)}</bdi>" for name in data.classes]      # also from right to left
    labels = data.labels[data.train_size:].tolist()
    counts, images = Counter(zip(labels, predicted)), Counter(labels)   # of (true, predicted); true
    title = f"{net.settings['model']} on {net.settings['dataset']}"
    sections = [
        ("Curves", "Each point is an epoch: training is the mean over it, of augmented images and "
         "of weights that still change; test is the network at its end, on the "
         f"{test_images(net.settings)}; the dashed line is chance. Test loss that rises while "
         "training loss falls means overfitting.",
         curves(net.history, len(names))),
        (matrix if len(names) <= FEW else confusions)(names, counts, images),
        ("Mistakes", "Wrong answers, by class: the true class, what it was taken for, and how "
         "probable that seemed; if there are many, those it was most sure of, a few of each class.",
         mistakes(data, names, labels, chances, predicted)),
        *([("Gates", "Each row is a class and each column a channel, sorted by its mean, in the "
            "last block of a stage; where rows look alike, the gate treats those classes alike.",
            strips(names, *gates))] if gates else []),
        ("Each class", "The bar is the 95% interval: on many more such images, the accuracy would "
         "most likely lie in it; few test images make it wide. Another seed may leave it.",
         shares(names, counts, images)),
        ("Settings, hardware, versions", "With the same settings you can repeat this run; other "
         "hardware or versions change the result a little.",
         origin(net))]
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" /><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width" /><style>{STYLE}</style></head>',
        f"<body><h1>{title}</h1><p>{shown(result)}</p>",
        *(f"<section><h2>{head}</h2><p>{sentence}</p>\n{content}</section>"
          for head, sentence, content in sections), "</body></html>\n"])


def shown(text):
    return html.escape(printable(str(text)))


def table(head, rows, kind):
    rows = [[f"<th>{cell}</th>" for cell in head],
            *([f"<td>{cell}</td>" for cell in row] for row in rows)]
    lines = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{kind}">\n{lines}</table></div>'


def png(image):
    image.save(file := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(history, classes):
    """Loss and accuracy by epoch."""
    if not history:
        return "<p>No epoch is finished yet.</p>"
    chance = math.log(classes)
    losses, accuracies = ([[(row["epoch"], row[key]) for row in history
                            if math.isfinite(row.get(key, math.nan))] for key in keys]
                          for keys in (("train_loss", "test_loss"), ("train_top1", "top1")))
    top = math.ceil(max(1, chance, *(loss for line in losses for _, loss in line)) * 1.1)
    return (chart("loss", losses, top, chance, f"chance: ln {classes} = {chance:.2f}") + chart(
        "accuracy in %", accuracies, 100, 100 / classes, f"chance: {100 / classes:.3g}%"))


def chart(title, lines, top, chance, words):
    """SVG of two lists of (epoch, value), training and test; the values go from 0 to `top`."""
    last = max((epoch for line in lines for epoch, _ in line), default=1)

    def place(epoch, value):
        return round(45 + 420 * epoch / last, 2), round(220 - 190 * value / top, 2)

    def text(x, y, words, anchor="end"):
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>\n'

    (left, y), (right, _) = place(0, chance), place(last, 0)
    svg = text(5, 14, title, "start") + text(right, 256, "epoch") + text(
        right, 14, '<tspan class="training">&#9632;</tspan> training '
                   '<tspan class="test">&#9632;</tspan> test')
    svg += f'<path class="chance" d="M{left} {y}H{right}" />' + text(right, y - 4, words)
    for value in (i * top / 4 for i in range(5)):
        _, y = place(0, value)
        svg += f'<path d="M{left} {y}H{right}" />' + text(left - 6, y + 4, f"{value:g}")
    for epoch in range(0, last + 1, math.ceil(last / 6)):
        svg += text(place(epoch, 0)[0], 238, epoch, "middle")
    for name, line in zip(("training", "test"), lines):
        spots = " ".join("%s,%s" % place(*point) for point in line)
        svg += f'<polyline class="{name}" points="{spots}" />\n'
        for epoch, value in line:           # a mouse over the point shows the title
            svg += ('<circle class="%s" cx="%s" cy="%s" r="3">' % (name, *place(epoch, value))
                    + f"<title>{name}, epoch {epoch}: {value:.4g}</title></circle>\n")
    return f'<svg viewBox="0 0 480 260">\n{svg}</svg>\n'


def matrix(names, counts, images):
    """(heading, how to read it, all counts as a table)"""
    rows = [[name] for name in names]
    for i, row in enumerate(rows):
        for j in range(len(names)):
            colour = "59 130 246" if i == j else "224 112 0"
            row.append(f'<span style="background: rgb({colour} / '
                       f'{0.6 * math.sqrt(counts[i, j] / images[i]):.2f})">{counts[i, j]}</span>')
    return ("Confusion matrix", "A row holds the test images of one class, a column those that the "
            "network took for one class: blue counts are right, orange ones wrong; the stronger a "
            "colour, the larger the share of the row.",
            table(["true \\ predicted", *names], rows, "matrix"))


def confusions(names, counts, images):
    """(heading, how to read it, the ten largest counts of mistakes as a table)"""
    wrong = Counter({(i, j): count for (i, j), count in counts.items() if i != j})
    return ("Confusions", f"Of {len(names)} classes, these are the ten most frequent confusions: "
            "how many test images of the first class the network took for the second.",
            table(["true", "taken for", "images"], [
                [names[i], names[j], f"{count} of {images[i]}"]
                for (i, j), count in wrong.most_common(10)], "words"))


def mistakes(data, names, labels, chances, predicted):
    """Pictures of the wrong answers with the largest probability, sorted by class."""
    chosen, of_class = [], Counter()
    for i in sorted(range(len(labels)), key=lambda i: -chances[i]):
        if predicted[i] != labels[i] and of_class[labels[i]] < max(1, min(4, 40 // len(names))):
            of_class[labels[i]] += 1
            chosen.append(i)
    chosen, figures = sorted(chosen[:40], key=lambda i: labels[i]), []
    images = data.view([data.train_size + i for i in chosen]).cpu() if chosen else []
    for i, image in zip(chosen, map(to_pil_image, images)):
        image.thumbnail((128, 128))         # shrinks alone; the browser enlarges what is small
        figures.append(
            f'<figure><img alt="" width="{128 // image.width * image.width}" src="{png(image)}" />'
            f"<figcaption>{names[labels[i]]}<br />taken for {names[predicted[i]]}, "
            f"{chances[i]:.1%}</figcaption></figure>\n")
    return f'<div class="pictures">{"".join(figures) or "There are none."}</div>'


def strips(names, black, stages):
    """The strips of gates.png, with names beside few rows; of more than 100 rows, some."""
    parts = [f"<p>Black is {black:.0f} (closed), white {black + 1:.0f} (open).</p>"]
    for words, strip in stages:
        strip = (255 * strip[::math.ceil(len(strip) / 100)].clamp(0, 1)).round().byte().cpu()
        beside = f"<div>{''.join(names)}</div>" if len(names) <= FEW else ""
        parts.append(f'<p>{words}</p><div class="strip">{beside}<img alt="" style="height: '
                     f'{min(len(names), FEW)}rem" src="{png(to_pil_image(strip))}" /></div>')
    return "\n".join(parts)


def shares(names, counts, images):
    """Accuracies with Wilson's interval, which has a width also where all answers are right."""
    rows = []
    each = [(name, counts[i, i], images[i]) for i, name in enumerate(names)]
    _, right, total = zip(*each)
    for name, hits, count in (*each, ("all together", sum(right), sum(total))):
        p, w = hits / count, 1.96**2 / count
        half = math.sqrt(w * (p * (1 - p) + w / 4))
        low, high = (100 * (p + w / 2 + end) / (1 + w) for end in (-half, half))
        rows.append([name, hits, count, f"{100 * p:.1f}%", f"{low:.1f} to {high:.1f}%",
                     '<svg viewBox="0 0 100 8" style="width: 10rem"><path d="M0 4H100" /><path '
                     f'class="test" stroke-width="6" d="M{low:.1f} 4H{high:.1f}" /></svg>'])
    return table(["class", "right", "images", "accuracy", "95% interval", "0 to 100%"], rows, "")


def origin(net):
    """The settings of the run and what each means; its hardware and versions."""
    return table(["name", "value", "meaning"], [
        [shown(key), shown(value), shown(SETTINGS[key][2]) if key in SETTINGS else ""]
        for key, value in (net.settings | net.machine).items()
        if value is not None and train.used(key, net.settings)], "words")


def main(argv=None):
    train.main(argv, run_evaluation, options=OPTIONS, program="tools.evaluate",
               description="Print loss and accuracy on the test images, and draw a page of them.")


if __name__ == "__main__":
    main()
