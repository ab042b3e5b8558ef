"""Whose fault it is when a command that read ONNX files fails in a way that nobody foresaw.

A file that the ONNX checker, its shape inference or ONNX Runtime refuses is damaged: that is the user's sentence. Of
sound files alone such a failure is a fault of this package, and keeps its traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sluice.core.errors import SluiceError, first_line

__all__ = ["blamed"]


@contextmanager
def blamed(paths: Sequence[str]) -> Iterator[None]:
    """Turn failures of the block into `SluiceError` where a file, one of ONNX among ``paths``, is damaged."""
    try:
        yield
    except (SluiceError, BrokenPipeError):
        raise
    except Exception as error:
        for path in paths:
            if path.endswith(".onnx") and os.path.isfile(path) and (reason := _fault(path)):
                raise SluiceError(
                    f"{path!r} is not a sound ONNX file ({reason}); export it again, or copy it again"
                ) from error
        raise


def _fault(path: str) -> str:
    """Why the file is damaged; empty where it is sound."""
    import onnx

    from sluice.runtime.targets import make_runner

    try:
        onnx.checker.check_model(onnx.load(path), full_check=True)
        make_runner("ort-cpu").build(path)
    except Exception as error:
        return first_line(error)
    return ""
