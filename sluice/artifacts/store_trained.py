"""What was trained is on the disk before anything else can fail, and goes when the result is saved.

It lies beside the output, in ``<out>.trained``: ``plan.json`` and ``slim.safetensors``, as `sluice.load` takes them.
Where that cannot be written, or there is no output, a failure leaves it in a folder for temporary files instead.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import fx

from sluice.artifacts.folder import FILES, save_together
from sluice.artifacts.store import save_weights
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan

__all__ = ["kept", "trained_beside"]


def trained_beside(out: str | os.PathLike[str]) -> Path:
    """Where what was trained for ``out`` is kept."""
    out = Path(out)
    return out.with_name(f"{out.name}.trained")


@contextmanager
def kept(out: str | os.PathLike[str] | None, module: fx.GraphModule, plan: Plan) -> Iterator[None]:
    """Keep the trained network until the block ends well.

    Raises:
        SluiceError: that of the block, with the place where the network is.
    """
    place = None if out is None else trained_beside(out)
    if place is not None:
        try:
            _save(place, module, plan)
        except SluiceError:
            place = None
    try:
        yield
    except BaseException as error:
        place = place or Path(tempfile.mkdtemp(prefix="sluice-trained-"))
        if not (place / "slim.safetensors").exists():
            with suppress(SluiceError):
                _save(place, module, plan)
        told = f"what was trained is kept in {str(place)!r}, for sluice.load"
        if isinstance(error, SluiceError):
            raise SluiceError(f"{error}; {told}") from error
        error.add_note(told)
        raise
    if place is not None:
        for name in FILES:
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):
            place.rmdir()


def _save(folder: Path, module: fx.GraphModule, plan: Plan) -> None:
    def write(draft: Path) -> None:
        plan.save(draft / "plan.json")
        save_weights(module, draft / "slim.safetensors")

    save_together(folder, write)
