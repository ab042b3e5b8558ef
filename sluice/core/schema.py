"""Values from JSON, checked against a declared type: the dataclass that they become is the schema.

``bool``, ``int`` (no ``bool``, below 2^63), ``float`` (or a whole number, finite), ``str``, ``None``, unions, ``Any``,
``tuple[T, ...]``, ``tuple[A, B]``, ``Mapping[str, T]`` and dataclasses. A dataclass comes from an object that has its
fields and no others; fields with a default may be absent. The first value that is of another type is told by its path.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

__all__ = ["Misfit", "parse", "typed"]


class Misfit(ValueError):
    """A value is not of the type that is declared for it."""


def parse(text: str | bytes) -> Any:
    """JSON without NaN and infinities.

    Raises:
        Misfit: it is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise Misfit("it is nested too deeply") from None
    except ValueError as error:
        raise Misfit(f"it is not JSON: {error}") from None


def typed(kind: Any, value: Any, path: str = "") -> Any:
    """``value`` as ``kind``.

    Raises:
        Misfit: it is of another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return typed(next(each for each in inner if each is not type(None)), value, path)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            raise Misfit(f"{path or 'it'} holds {len(value)} values instead of {len(kinds)}")
        return tuple(typed(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping and isinstance(value, dict):
        return {name: typed(inner[1], item, f"{path}.{name:.40}") for name, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, path)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (bool, int, str, float) and type(value) is kind and (kind is not int or abs(value) < 2**63):
        return value
    raise Misfit(f"{path.lstrip('.') or 'it'} is {json.dumps(value)[:40]} instead of {_word(kind)}")


def _record(kind: type, value: dict[str, Any], path: str) -> Any:
    hints = _hints(kind)
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    wrong = sorted((hints.keys() - optional - value.keys()) | (value.keys() - hints.keys()))
    if wrong:
        lacks = "lacks" if wrong[0] in hints else "has the unknown"
        raise Misfit(f"{path.lstrip('.') or 'it'} {lacks} {wrong[0]!r:.60}")
    return kind(**{name: typed(hints[name], item, f"{path}.{name}") for name, item in value.items()})


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return "a list"
    if typing.get_origin(kind) is Mapping or is_dataclass(kind):
        return "an object"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    return words.get(kind, str(kind))


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")
