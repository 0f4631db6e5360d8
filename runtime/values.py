"""The values that options take: argparse types, each of which refuses with a sentence, and their names in the help."""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

LARGEST = 2**63 - 1  # of whole numbers
Number = TypeVar("Number", int, float)


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        number = _number(text)
        if not number.is_integer():
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, such as 1000 or 1e3") from None
        value = int(number)
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} must be at most {LARGEST:.2g}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def _limited(read: Callable[[str], Number], fits: Callable[[Number], bool], limits: str) -> Callable[[str], Number]:
    """The argparse type of what ``read`` makes of a word, if it ``fits``; else the sentence says its ``limits``."""

    def value_of(text: str) -> Number:
        value = read(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must {limits}")
        return value

    return value_of


# Whole numbers, of which 1e5 is one, and finite ones.
positive = _limited(_whole, lambda value: value >= 1, "be at least 1")
not_negative = _limited(_whole, lambda value: value >= 0, "not be negative")
positive_number = _limited(_number, lambda value: value > 0, "be above 0")
not_negative_number = _limited(_number, lambda value: value >= 0, "not be negative")
fraction = _limited(_number, lambda value: 0 <= value < 1, "be at least 0 and below 1")
noise_level = _limited(_number, lambda value: 0 <= value <= 1, "be between 0 and 1")


MOST = 64 * (os.cpu_count() or 1)  # processes
workers = _limited(not_negative, lambda value: value <= MOST, f"be at most {MOST}, 64 for each core of this machine")


def name(text: str) -> str:
    """argparse type: a word, a path or a name, not an empty one."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("must not be empty")
    if max(len(os.fsencode(part)) for part in text.split("/")) > 255 or len(os.fsencode(text)) > 4000:
        raise argparse.ArgumentTypeError(f"{text[:40]}... must be shorter, no file can be called so")
    return text


file, folder = partial(name), partial(name)  # paths, as text, which the help tells apart

# The help's name for the value of an option of each type.
METAVARS: dict[Any, str] = dict.fromkeys((positive, not_negative, workers), "N")
METAVARS |= dict.fromkeys((positive_number, not_negative_number, fraction), "X")
METAVARS |= {file: "FILE", Path: "FILE", folder: "FOLDER"}
