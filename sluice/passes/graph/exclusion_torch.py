"""Layers that are left alone by their type: a class of modules, or ``type:NAME``, stands for the modules of that type.

A name is that of a class or of one that it derives from. Types that no module with parameters has are an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from sluice.core.errors import SluiceError
from sluice.passes.graph.exclusion import TYPE

__all__ = ["named_by_type"]


def named_by_type(model: nn.Module, patterns: Iterable[object]) -> Sequence[str]:
    """The patterns, types replaced by the names of modules.

    Raises:
        SluiceError: an entry is neither a pattern nor a type, or a type means no module.
    """
    found: list[str] = []
    for each in patterns:
        if isinstance(each, str) and not each.startswith(TYPE):
            found.append(each)
            continue
        if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
            raise SluiceError(
                f"exclude={each!r} is no layer; give names, shell patterns, 'type:LayerNorm', or classes of modules"
            )
        own = [name for name, module in model.named_modules() if name and _is(module, each) and _has_weights(module)]
        if not own:
            raise SluiceError(f"exclude={each!r} means no module with parameters; see `sluice inspect` for the layers")
        found += own
    return found


def _is(module: nn.Module, kind: object) -> bool:
    if isinstance(kind, str):
        return any(base.__name__ == kind.removeprefix(TYPE) for base in type(module).__mro__)
    return isinstance(kind, type) and isinstance(module, kind)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
