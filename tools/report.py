"""Tables of finished runs, as Markdown.

    python -m tools.report runs results
"""
import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from data import FOLDERS
from senetv2 import GATES
from support.console import UserError, errors_in_one_line, printable
from train import SETTINGS, defaults


NARROW, SENETV2 = "senet r=32", "senetv2 r=32 K=4 (= senet r=8)"
PAPER_TOP1 = {      # (data set, layers) -> top-1 in %, all training images, the paper's own recipe
    ("cifar100", "3,4,6,3"): {"resnet": 61.72, NARROW: 62.26, SENETV2: 63.52},
    ("cifar10", "1,1,1,1"): {"resnet": 77.38, NARROW: 77.79, SENETV2: 78.60},
}
NETWORK = ("model", "reduction", "cardinality", "residual", "zero_init", "seed",    # of one table
           "precision")             # which counts as a part of the machine
ZERO_INIT = " zero-init"        # ends the names of networks that start so
COLOURS = ("grey", "blue", "green", "red", "orange", "purple", "brown", "hotpink", "black", "gold",
           "teal", "navy", "lime", "crimson")
# Student's t: half of a two-sided 95% interval, in standard errors, for 2 to 10 runs.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run_report(folders):
    """Print, as Markdown, a table and a chart for all finished runs that differ in NETWORK alone.

    If two runs have all settings alike (a copy, or code that was edited), the first one counts.
    """
    tables, left_out = {}, []
    for path in [path for root in folders for path in sorted(Path(root).rglob("config.json"))]:
        try:
            shared, name, seed, run = read_run(path)
        except Exception as reason:         # whatever other programs, and older code, leave
            left_out.append(f"- {printable(str(path.parent))}: {type(reason).__name__}: {reason}")
            continue
        first = tables.setdefault(shared, {}).setdefault(name, {}).setdefault(seed, run)
        if run["top1"][-1] != first["top1"][-1]:
            left_out.append(f"- {printable(str(path.parent))}: top-1 {run['top1'][-1]:.2f}%; the "
                            "table uses another run with the same settings "
                            f"({first['top1'][-1]:.2f}%)")
    if not tables and not left_out:
        raise UserError(f"no runs in {', '.join(folders)}; train first")
    for shared, networks in joined(tables).items():
        print_results(dict(shared), networks)
    print("\nRuns that are in no table:\n\n" + "\n".join(left_out or ["- none"]))


def joined(tables):
    """The tables, with runs that older code wrote without a digest of their files: they join the
    table of equal settings, if there is one."""
    for shared in [shared for shared in tables if shared[-1] == ("files", None)]:
        others = [other for other in tables if other[:-1] == shared[:-1] and other != shared]
        if len(others) == 1:
            for name, seeds in tables.pop(shared).items():
                known = tables[others[0]].setdefault(name, {})
                tables[others[0]][name] = seeds | known
    return tables


def read_run(path):
    """(what a table shares, name of the row, seed, and the run as a dict) of one config.json."""
    run = json.loads(path.read_text())
    settings = run["settings"]                  # older ones may lack some
    settings = defaults(settings["recipe"], settings["dataset"]) | settings
    table = csv.DictReader(path.with_name("metrics.csv").read_text().splitlines())
    run["top1"] = [float(row["top1"]) for row in table]
    if len(run["top1"]) < settings["epochs"]:
        raise ValueError(f"{len(run['top1'])} of {settings['epochs']} epochs")
    run["machine"] = f"{run['device']}, torch {run['torch']}"
    precision = run.get("precision") or settings["precision"] or "float32"
    run["machine"] += f", {precision}" if precision != "float32" else ""
    run["machine"] += f", {run['processes']} processes" if run.get("processes", 1) > 1 else ""
    shared = tuple((key, settings[key]) for key in SETTINGS if key not in NETWORK)
    hash((shared, settings["seed"])), format(run["parameters"], ",")        # raise here if they do
    return (*shared, ("files", run.get("files"))), label(settings), settings["seed"], run


def label(settings):
    """The row's name in a table: the network, and the width of its gate."""
    name, r, k = settings["model"], settings["reduction"], settings["cardinality"]
    if name in GATES:
        name += f" r={r}" + f" K={k}" * (name != "senet") + " residual" * settings["residual"]
    name = SENETV2 if name + " (= senet r=8)" == SENETV2 else name
    return name + ZERO_INIT * settings["zero_init"]


def print_results(shared, networks):
    """The table and the chart of one comparison: networks -> seeds -> what run_report has read."""
    size, usual = shared["train_images"], defaults(shared["recipe"], shared["dataset"])
    print(f"\n### {shared['dataset']}, {f'{size:,}' if size else 'all'} training images, "
          f"{shared['epochs']} epoch{'s' * (shared['epochs'] > 1)}, layers {shared['layers']}\n\n"
          + ", ".join(f"{key} {value}" for key, value in shared.items() if value != usual.get(key)
                      or key in ("recipe", "optimizer", "lr", "batch_size", "stem")
                      or key == "images_per_class" and shared["dataset"] in FOLDERS) + ".\n")
    starts = any(name.endswith(ZERO_INIT) for name in networks)
    print("| network | parameters | seeds | top-1 (%) | minus resnet | minus senet r=32 | "
          + "minus the same without zero-init | " * starts
          + "in the paper |\n" + "|---" * (7 + starts) + "|")

    ordered = sorted(networks, key=lambda name: [*networks[name].values()][0]["parameters"])
    paper = {} if size else PAPER_TOP1.get((shared["dataset"], shared["layers"]), {})
    for name in ordered:
        runs = networks[name].values()
        count, values = [*runs][0]["parameters"], [run["top1"][-1] for run in runs]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        start = ZERO_INIT * name.endswith(ZERO_INIT)    # compare with networks of the same start
        bases = ["resnet" + start, NARROW + start] + [name.removesuffix(ZERO_INIT)] * starts
        print(f"| {name} | {count:,} | {len(runs)} | {statistics.fmean(values):.2f}{spread} | "
              + " | ".join(difference(networks, name, base) for base in bases)
              + f" | {format(paper[name], '.2f') if name in paper else '-'} |")
    machines = sorted({run["machine"] for seeds in networks.values() for run in seeds.values()})
    print("\ntop-1: of the last epoch, mean ± standard deviation over seeds. Differences: paired "
          "by seed, mean [95% confidence interval]. "
          + "In rows with zero-init, the first two subtract a network with it. " * starts
          + f"Ran on (CPUs are not told apart): {'; '.join(machines)}.")

    if not sys.stdout.isatty():         # a chart that GitHub draws
        palette = ",".join(COLOURS[:max(9, len(ordered))])
        theme = {"themeVariables": {"xyChart": {"plotColorPalette": palette}}}
        print(f"\n```mermaid\n%%{{init: {json.dumps(theme)}}}%%\nxychart-beta\n"
              f'    title "{shared["dataset"]}: test top-1 (%) by epoch, mean over seeds"\n'
              f'    x-axis "epoch" 1 --> {shared["epochs"]}\n    y-axis "top-1 (%)"')
        for name in ordered:
            means = map(statistics.fmean, zip(*(run["top1"] for run in networks[name].values())))
            print(f"    line [{', '.join(f'{mean:.2f}' for mean in means)}]")
        lines = map(" ".join, zip(ordered, itertools.cycle(COLOURS)))
        print("```\n\nLines: " + "; ".join(lines) + ".")


def difference(networks, name, base):
    """`name` minus `base` over their common seeds: the mean and its 95% interval, in words."""
    runs, others = networks[name], networks.get(base, {})
    seeds = [seed for seed in runs if seed in others and name != base
             and (base == "resnet" or name.split()[0] != "resnet")]
    gaps = [runs[seed]["top1"][-1] - others[seed]["top1"][-1] for seed in seeds]
    across = ", across machines" * any(runs[seed]["machine"] != others[seed]["machine"]
                                       for seed in seeds)
    if len(gaps) < 2:
        return f"{gaps[0]:+.2f} (seed {seeds[0]} alone{across})" if gaps else "-"
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = T95[min(len(gaps) - 2, len(T95) - 1)] * error        # of more than 10, a little too wide
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]{across}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.report", description="Print tables of the "
                                     "finished runs in these folders, as Markdown.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="by default: runs")
    args = parser.parse_args(argv)
    with errors_in_one_line("tools.report"):
        run_report(args.folders)


if __name__ == "__main__":
    main()
