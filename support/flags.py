"""From tables of settings to argparse, and to the name of a run.

A table maps a name to (default, a function from text to value, meaning).
"""
import argparse
import math
import os
import re
import sys
from pathlib import Path

from support.console import say

# --------------------------------------------------------------------- Functions from text to value


def one_of(words):
    def word(text):
        if text in words:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(words)}")
    word.metavar = f"{{{','.join(words)}}}"             # what --help shows
    return word


def number(kind, low, high=math.inf):
    """An int or a finite float from low to high."""
    def number(text):       # argparse shows this name: "invalid number value"
        if low <= (value := kind(text)) <= high and value < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return number


def four_stages(text):
    """"3, 4, 6, 3" becomes "3,4,6,3"."""
    counts = [part.strip() for part in text.split(",")]
    if len(counts) == 4 and all(c.isascii() and c.isdigit() and int(c) for c in counts):
        return ",".join(str(int(count)) for count in counts)
    raise argparse.ArgumentTypeError(f"{text!r} is not four positive numbers, such as 3,4,6,3")


def path(text):
    return os.path.expanduser(text)     # make passes ~ on as it is


def name(text):
    """What may stand at the end of a folder's name."""
    if re.fullmatch(r"[\w.+-]{0,60}", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} has more than letters, digits and . _ + -, "
                                     "or more than 60 of them")


# ------------------------------------------------------------------------------------- Command line


def parser(program, description, table):
    """A parser with a flag for each row; where the default is a bool, --name and --no-name."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, (default, read, meaning) in table.items():
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else
                dict(type=read, metavar=getattr(read, "metavar", None)))
        if isinstance(default, list):
            kind["nargs"] = "+"
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=meaning, **kind)
    return parser


def parse(argv, table, *, settings, defaults, used, program, description):
    """(args, settings): all flags, and those that define the result, as a dict of plain values.

    settings            the names of the latter; `table` has them, too
    defaults(args)      all settings by name, where some are typed that others depend on
    used(key, args)     whether the run has a use for this setting
    """
    reader = parser(program, description, table)
    words = sys.argv[1:] if argv is None else argv
    chosen, _ = reader.parse_known_args([word for word in words if word not in ("-h", "--help")])
    reader.set_defaults(**(default := defaults(chosen)))        # --help shows them, too
    args = reader.parse_args(words)

    # What the network or the data set does not use is reset to its default.
    for key in settings:
        if getattr(args, key) != default[key] and not used(key, vars(args)):
            say(f"{key} {getattr(args, key)} is not used by {args.model} on {args.dataset}")
            setattr(args, key, default[key])
    chosen = {key: getattr(args, key) for key in settings}
    args.out = Path(args.out or Path("runs", run_name(chosen, default)))
    return args, chosen


def run_name(settings, default):
    """The data set, the network, the recipe, what is not at its default, the seed, the name."""
    changed = [re.sub(r"[/\\:]", "_", f"{key}{value}") for key, value in settings.items()
               if value != default[key] and key not in ("model", "seed", "name")]
    parts = [settings["dataset"], settings["model"], settings["recipe"], *changed,
             f"seed{settings['seed']}", settings["name"]]
    return "-".join(filter(None, parts))
