"""From tables of settings to argparse, and to the name of a run."""
import argparse
import math


def within(kind, low, high=math.inf):
    """A type for argparse: an int or a finite float from low to high."""
    def number(text):       # argparse shows this name: "invalid number value"
        if low <= (value := kind(text)) <= high and value < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return number


def four_stages(text):
    """A type for argparse: "3, 4, 6, 3" becomes "3,4,6,3"."""
    counts = [part.strip() for part in text.split(",")]
    if len(counts) == 4 and all(c.isascii() and c.isdigit() and int(c) for c in counts):
        return ",".join(str(int(count)) for count in counts)
    raise argparse.ArgumentTypeError(f"{text!r} is not four positive numbers, such as 3,4,6,3")
