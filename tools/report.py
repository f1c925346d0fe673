"""Tables of finished runs, as Markdown.

    python -m tools.report runs results
    python -m tools.report --minus "senetv2 r=32 K=4"       with the differences to another row
"""
import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path

from data import FOLDERS
from senetv2 import OURS, PEERS, gate_settings
from support.console import UserError, errors_in_one_line, on_terminal, printable
from train import SETTINGS, completed, defaults


NARROW, SENETV2 = "senet r=32", "senetv2 r=32 K=4 (= senet r=8)"
PAPER_TOP1 = {      # (data set, layers) -> top-1 in %, all training images, the paper's own recipe
    ("cifar100", "3,4,6,3"): {"resnet": 61.72, NARROW: 62.26, SENETV2: 63.52},
    ("cifar10", "1,1,1,1"): {"resnet": 77.38, NARROW: 77.79, SENETV2: 78.60},
}
NETWORK = ("model", "reduction", "cardinality", "residual", "zero_init", "seed", "name",
           "precision")             # of one table; the last counts as a part of the machine
ZERO_INIT = " zero-init"        # in the names of networks that start so
COLOURS = ("grey", "blue", "green", "red", "orange", "purple", "brown", "hotpink", "black", "gold",
           "teal", "navy", "lime", "crimson")
# Student's t: half of a two-sided 95% interval, in standard errors, for 2 to 10 runs.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run_report(folders, minus=None):
    """Print, as Markdown, a table and a chart for all finished runs that differ in NETWORK alone.

    If two runs have all settings and the code alike, the one that finished later counts.
    minus    the row to subtract, beside the usual ones
    """
    found, left_out = {}, []        # (what a table shares, row, seed, code) -> runs
    for path in [path for root in folders for path in sorted(configs(root))]:
        try:
            shared, name, seed, run = read_run(path)
        except Exception as reason:         # whatever other programs, and older code, leave
            kind = "" if isinstance(reason, UserError) else f"{type(reason).__name__}: "
            left_out.append(f"- {printable(str(path.parent))}: {kind}{reason}")
        else:
            found.setdefault((shared, name, seed, run["code"]), []).append(run)

    tables = {}
    for (shared, name, seed, code), runs in found.items():
        # Published runs do not say when they finished: of those, the first of the alphabet counts.
        used = max(runs, key=lambda run: str(run.get("finished") or ""))
        for run in runs:
            if run is not used and run["top1"][-1] != used["top1"][-1]:
                there = "" if run["machines"] == used["machines"] else f", on {used['machines']}"
                left_out.append(
                    f"- {run['place']}: top-1 {run['top1'][-1]:.2f}%; the table uses "
                    f"{used['place']}, with the same settings{there} ({used['top1'][-1]:.2f}%)")
        tables.setdefault(shared, {}).setdefault((name, code), {})[seed] = used

    if not tables and not left_out:
        raise UserError(f"no runs in {', '.join(folders)}; train first")
    tables = {shared: told_apart(rows) for shared, rows in tables.items()}
    if minus and not any(is_called(name, minus) for rows in tables.values() for name in rows):
        names = sorted({name for rows in tables.values() for name in rows})
        raise UserError(f"no row is called {minus!r}; there are {'; '.join(names)}")
    for shared, networks in sorted(tables.items(), key=lambda table: last_finished(table[1])):
        print_results(dict(shared), networks, minus)
    print("\nRuns that are in no table:\n\n" + "\n".join(left_out or ["- none"]))


def configs(root):
    """All config.json below a folder.  Links are followed, and each folder is entered once."""
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
        elif "config.json" in files:
            yield Path(place, "config.json")
        seen.add(real)


def last_finished(networks):
    """When its last run finished; published runs do not say.  So one's own tables come last, where
    a terminal shows them."""
    return max(str(run.get("finished") or "") for seeds in networks.values()
               for run in seeds.values())


def told_apart(rows):
    """(name, code) -> seeds becomes name -> seeds; the code stands in the name where it differs."""
    codes = {}
    for name, code in rows:
        codes.setdefault(name, set()).add(code)
    return {name + (f", code {code}" if code and len(codes[name]) > 1 else ""): seeds
            for (name, code), seeds in rows.items()}


def is_called(row, name):
    """Whether `row` is called `name`, which may leave out code and what stands in brackets."""
    row, name = (text.replace(" (= senet r=8)", "") for text in (row, name))
    return name in (row, bare(row))


def read_run(path):
    """(what a table shares, name of the row, seed, and the run as a dict) of one config.json."""
    run = json.loads(path.read_text())
    settings = run["settings"]                  # older ones may lack some
    settings = completed(settings)
    table = csv.DictReader(path.with_name("metrics.csv").read_text().splitlines())
    run["top1"] = [float(row["top1"]) for row in table]
    if len(run["top1"]) < settings["epochs"]:
        raise UserError(f"not finished: {len(run['top1'])} of {settings['epochs']} epochs")
    run["machines"] = f"{run['device']}, torch {run['torch']}"
    precision = run.get("precision") or settings["precision"] or "float32"
    run["machines"] += f", {precision}" if precision != "float32" else ""
    run["machines"] += f", {run['processes']} processes" if run.get("processes", 1) > 1 else ""
    code = run.get("code")          # published runs have none
    run["code"] = hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:4] if (
        code) else None
    run["place"] = printable(str(path.parent))
    own = sorted(key for key in settings.keys() - SETTINGS.keys() if settings[key])     # have gone
    shared = tuple((key, tuple(value) if isinstance(value := settings[key], list) else value)
                   for key in [*SETTINGS, *own] if key not in NETWORK)
    hash((shared, settings["seed"])), format(run["parameters"], ",")        # raise here if they do
    return (*shared, ("files", run.get("files"))), label(settings), settings["seed"], run


def label(settings):
    """The row's name in a table: the network, the width of its gate, and what its user tried."""
    name, r, k = settings["model"], settings["reduction"], settings["cardinality"]
    known = gate_settings(name)
    if name not in OURS + PEERS:            # a gate that has gone
        known = {key for key in ("reduction", "cardinality", "residual")
                 if settings[key] != SETTINGS[key][0]}
    name += f" r={r}" if "reduction" in known else ""
    name += f" K={k}" if "cardinality" in known else ""
    name += " residual" if "residual" in known and settings["residual"] else ""
    name = SENETV2 if name + " (= senet r=8)" == SENETV2 else name
    name += ZERO_INIT if settings["zero_init"] else ""
    return name + (f", {settings['name']}" if settings["name"] else "")


def print_results(shared, networks, minus):
    """The table and the chart of one comparison: networks -> seeds -> what run_report has read."""
    size, usual = shared["train_images"], defaults(shared["recipe"], shared["dataset"])
    told = ("dataset", "recipe", "train_images", "epochs", "layers", "files")
    more = "".join(f", {key} {value}" for key, value in shared.items()
                   if key not in told and value != usual.get(key))
    print(f"\n### {shared['dataset']}, {f'{size:,}' if size else 'all'} training images, "
          f"{shared['epochs']} epoch{'s' if shared['epochs'] > 1 else ''}, layers "
          f"{shared['layers']}{more}\n\n"
          + ", ".join(f"{key} {value}" for key, value in shared.items() if value != usual.get(key)
                      or key in ("recipe", "optimizer", "lr", "batch_size", "stem")
                      or key == "images_per_class" and shared["dataset"] in FOLDERS) + ".\n")

    bases = {title: base for title, base in BASES.items()
             if title in ALWAYS or any(base(name) for name in networks)}
    if minus:
        bases[minus] = lambda name: minus
    if any(ZERO_INIT in name for name in networks):
        print('In rows with zero-init, "minus resnet" and "minus senet r=32" subtract networks '
              "that start so, too.\n")
    print("| network | parameters | seeds | top-1 (%) | "
          + " | ".join(f"minus {title}" for title in bases) + " | in the paper |\n"
          + "|---" * (5 + len(bases)) + "|")

    ordered = sorted(networks, key=lambda name: [*networks[name].values()][0]["parameters"])
    paper = {} if size or shared["hold_out"] else PAPER_TOP1.get(
        (shared["dataset"], shared["layers"]), {})
    for name in ordered:
        runs = networks[name].values()
        count, values = [*runs][0]["parameters"], [run["top1"][-1] for run in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {name} | {count:,} | {len(runs)} | {statistics.fmean(values):.2f}{spread} | "
              + " | ".join(difference(networks, name, base(name)) for base in bases.values())
              + f" | {format(paper[bare(name)], '.2f') if bare(name) in paper else '-'} |")
    machines = sorted({run["machines"] for seeds in networks.values() for run in seeds.values()})
    where = "on held-out images, " if shared["hold_out"] else ""
    print(f"\ntop-1: {where}of the last epoch, mean ± standard deviation over seeds. Differences: "
          "paired by seed, mean [95% confidence interval]. Ran on (CPUs are not told apart): "
          f"{'; '.join(machines)}.")

    if not on_terminal():               # a chart that GitHub draws
        palette = ",".join(COLOURS[:max(9, len(ordered))])
        theme = {"themeVariables": {"xyChart": {"plotColorPalette": palette}}}
        print(f"\n```mermaid\n%%{{init: {json.dumps(theme)}}}%%\nxychart-beta\n"
              f'    title "{shared["dataset"]}: top-1 (%) by epoch, mean over seeds"\n'
              f'    x-axis "epoch" 1 --> {shared["epochs"]}\n    y-axis "top-1 (%)"')
        for name in ordered:
            means = map(statistics.fmean, zip(*(run["top1"] for run in networks[name].values())))
            print(f"    line [{', '.join(f'{mean:.2f}' for mean in means)}]")
        lines = map(" ".join, zip(ordered, itertools.cycle(COLOURS)))
        print("```\n\nLines: " + "; ".join(lines) + ".")


def network(name):
    return name.split()[0].rstrip(",")


def bare(name):
    """A row's name without its code."""
    return name.partition(", code ")[0]


def start_of(name):
    return ZERO_INIT if bare(name).partition(", ")[0].endswith(ZERO_INIT) else ""


def same_without_a_name(name):
    return bare(name).partition(", ")[0] if ", " in bare(name) else None


BASES = {           # what a column subtracts: from a row's name to another's, or None
    "resnet": lambda name: None if network(name) == "resnet" else "resnet" + start_of(name),
    "senet r=32": lambda name: None if network(name) == "resnet" else NARROW + start_of(name),
    "the same without zero-init": lambda name: (
        bare(name).replace(ZERO_INIT, "") if start_of(name) else None),
    "the same without a name": same_without_a_name,
    "senetv2": lambda name: (None if network(name) in ("resnet", "senet", "senetv2", *PEERS) else
                             SENETV2 + start_of(name)),
}
ALWAYS = ("resnet", "senet r=32")


def difference(networks, name, base):
    """`name` minus `base` over their common seeds: the mean and its 95% interval, in words.  Of
    several rows that are called `base`, with different code, the one of most common seeds; of
    these, the one whose code is most often the same."""
    runs = networks[name]
    rows = [seeds for other, seeds in networks.items()
            if base and is_called(other, base) and seeds is not runs]
    others = max(rows, default={}, key=lambda seeds: (len(seeds.keys() & runs), sum(
        runs[seed]["code"] == seeds[seed]["code"] for seed in seeds.keys() & runs)))
    seeds = [seed for seed in runs if seed in others]
    gaps = [runs[seed]["top1"][-1] - others[seed]["top1"][-1] for seed in seeds]
    across = "".join(f", across {key}" for key in ("machines", "code")
                     if any(runs[seed][key] != others[seed][key] for seed in seeds))
    if len(gaps) < 2:
        return f"{gaps[0]:+.2f} (seed {seeds[0]} alone{across})" if gaps else "-"
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = T95[min(len(gaps) - 2, len(T95) - 1)] * error        # of more than 10, a little too wide
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]{across}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.report", description="Print tables of the "
                                     "finished runs in these folders, as Markdown.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="by default: runs")
    parser.add_argument("--minus", help="a row to subtract, beside the usual ones")
    args = parser.parse_args(argv)
    with errors_in_one_line("tools.report"):
        try:
            run_report(args.folders, args.minus)
            print(end="", flush=True)
        except OSError as error:
            sys.stdout = None           # or Python complains again as it ends
            raise UserError(f"standard output cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()
