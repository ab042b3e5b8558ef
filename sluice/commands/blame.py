"""Whose fault it is when a command that read ONNX files fails in a way that nobody foresaw.

A file that the ONNX checker, its shape inference or ONNX Runtime refuses, or with a text that is no UTF-8, is damaged:
that is the user's sentence. Of sound files alone such a failure is a fault of this package, and keeps its traceback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sluice.core.errors import SluiceError, first_line

__all__ = ["blamed"]


@contextmanager
def blamed(paths: Sequence[str]) -> Iterator[None]:
    """Turn failures of the block into `SluiceError` where a file, one of ONNX among ``paths``, is damaged.

    Of a folder all such files are looked at.
    """
    try:
        yield
    except (SluiceError, BrokenPipeError):
        raise
    except Exception as error:
        for path in _files(paths):
            if path.endswith(".onnx") and os.path.isfile(path) and (reason := _fault(path)):
                raise SluiceError(
                    f"{path!r} is not a sound ONNX file ({reason}); export it again, or copy it again"
                ) from error
        raise


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        yield from (os.path.join(path, name) for name in inside)
        yield path


def _fault(path: str) -> str:
    """Why the file is damaged; empty where it is sound."""
    import onnx

    from sluice.runtime.base.inputs import messages
    from sluice.runtime.targets import make_runner

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        make_runner("ort-cpu").build(path)
    except Exception as error:
        return first_line(error)
    for message in messages(model):
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                for text in [value] if isinstance(value, (str, bytes)) else value:
                    if isinstance(text, bytes):
                        return f"the {field.name} {text!r:.60} is no text"
    return ""
