"""Patterns of layers that the user wants left alone.

1. A pattern means a tensor if it is, as a shell pattern, the tensor's name, the name of its module, or the name of a
   module around that.
2. A group keeps its size if a pattern means one of the weights that make it: every other tensor on the group would be
   cut together with that weight.
3. A pattern that means no layer is an error.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sluice.core.errors import SluiceError
from sluice.passes.graph.groups import Analysis, module_of, without_groups

__all__ = ["TYPE", "check_meant", "excluded_by", "leave_out"]

TYPE = "type:"  # before the name of a type of layers, in the place of a pattern


def excluded_by(param: str, patterns: Sequence[str]) -> str | None:
    """The first of the patterns that means this tensor (rule 1), None if there is none."""
    module = module_of(param)
    return next(
        (
            pattern
            for pattern in patterns
            if any(fnmatch.fnmatchcase(name, pattern) for name in (param, module)) or module.startswith(f"{pattern}.")
        ),
        None,
    )


def check_meant(word: str, patterns: Iterable[str], analysis: Analysis) -> None:
    """Raises `SluiceError` unless every pattern means a layer (rule 3); ``word`` is what the user calls them."""
    layers = list(dict.fromkeys(param for param, _ in analysis.producers))
    for pattern in patterns:
        if not any(excluded_by(name, [pattern]) for name in layers):
            raise SluiceError(f"{word} pattern {pattern!r} matches no layer; layers are {layers}")


def leave_out(analysis: Analysis, patterns: Sequence[str]) -> Analysis:
    """The analysis without the groups that a pattern means (rule 2).

    Raises:
        SluiceError: a pattern means no layer (rule 3).
    """
    if not patterns:
        return analysis
    check_meant("exclude", patterns, analysis)
    meant = {
        key: f"excluded by {p!r}" for key in analysis.producers if (p := excluded_by(key[0], patterns)) is not None
    }
    reasons = {
        group.name: next(meant[key] for ref in group.refs if (key := (ref.param, ref.axis)) in meant)
        for group in analysis.groups
        if any((ref.param, ref.axis) in meant for ref in group.refs)
    }
    left = without_groups(analysis, reasons)
    named = {module_of(param): why for (param, _), why in meant.items()}
    return replace(left, frozen={**left.frozen, **named})
