"""Where a command runs its runtime: in a process of its own, unless that cannot be or is not wanted.

A runtime that crashes in a process of its own costs a point, not the run. Options that need the session itself keep it
here, and so do files with more weights than one message holds.
"""

from __future__ import annotations

import argparse
import sys

from sluice.commands.specs import is_onnx
from sluice.core.address import LOCAL, split_target, target_at
from sluice.core.errors import SluiceError

__all__ = ["place"]


def place(args: argparse.Namespace) -> str:
    """The target as it is measured."""
    name, address = split_target(args.target)
    here = args.in_process or getattr(args, "pack", False) or getattr(args, "layers", False)
    if address or here:
        return args.target
    if _is_large_file(getattr(args, "model", "")):
        print(
            f"{args.model} is too large to be sent to a process of its own; the runtime runs in this one, as with "
            f"--in-process",
            file=sys.stderr,
        )
        return args.target
    return target_at(name, LOCAL)


def _is_large_file(path: str) -> bool:
    """Is it an ONNX file with more weights than one message holds? One that cannot be read is refused later on."""
    if not is_onnx(path):
        return False
    from sluice.core.weight_bytes import is_large
    from sluice.runtime.base.inputs import parsed

    try:
        return is_large(parsed(path))
    except SluiceError:
        return False
