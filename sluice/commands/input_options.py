"""Options that name the inputs of a network: their shapes, their types, and numbers that stay."""

from __future__ import annotations

import argparse

__all__ = ["NamedInput", "fix", "named_input", "named_inputs", "onnx_inputs", "shape", "whole"]

NamedInput = tuple[str, tuple[int, ...], str]  # name, sizes, type
TYPES = ("float32", "int64", "int32", "uint8", "bool")


def onnx_inputs(p: argparse.ArgumentParser) -> None:
    """What an ONNX file leaves open."""
    named_inputs(p)
    fix(p)


def named_inputs(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--input", dest="inputs", action="append", type=named_input, default=[], metavar="NAME=SIZES[:TYPE]",
        help="an argument of forward() with all its sizes, the batch included, and its type: ids=2,16:int64; "
        "float32 without one, once for each argument, in place of --shape; of an ONNX file, an input with open sizes",
    )  # fmt: skip


def fix(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fix", dest="fixed", action="append", type=fixed_number, default=[], metavar="NAME=NUMBER",
        help="of an ONNX file: an input, or an open size by its name, that stays that number: sr=16000",
    )  # fmt: skip


def shape(text: str) -> tuple[int, ...]:
    """``3,32,32``."""
    sizes = [whole(part) for part in text.split(",")]
    if any(size is None or size < 1 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; give whole numbers of 1 or more, without the batch, as in 3,32,32"
        )
    return tuple(size for size in sizes if size is not None)


def named_input(text: str) -> NamedInput:
    """``ids=2,16:int64``: name, shape and type."""
    name, equals, rest = text.partition("=")
    sizes, _, dtype = rest.partition(":")
    dtype = dtype or "float32"
    if not (equals and name) or dtype not in TYPES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no input; write NAME=1,3,32,32:TYPE with a type of {', '.join(TYPES)}"
        )
    return name, () if not sizes else shape(sizes), dtype


def fixed_number(text: str) -> tuple[str, float]:
    """``sr=16000``: name and number."""
    name, _, number = text.rpartition("=")
    try:
        return name, float(number) if name else float("")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} fixes nothing; write NAME=NUMBER, sr=16000 for one") from None


def whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
