"""A latency budget as the user writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    pass

__all__ = ["parse_budget"]


def parse_budget(spec: str | Mapping[str, str | float], dense_ms: float) -> float:
    """Milliseconds of ``"50%"`` (of dense), ``"2.4ms"``, ``"800us"`` or ``{"latency_ms": 2.4 or "50%"}``."""
    how = "say '50%', '2.4ms' or {'latency_ms': 2.4}"
    value: object = spec
    if isinstance(spec, Mapping):
        unknown = sorted(set(spec) - {"latency_ms"})
        if unknown or not spec:
            raise SluiceError(f"budget {dict(spec)!r} names {unknown or 'nothing'}; only 'latency_ms' is known, {how}")
        value = spec["latency_ms"]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value}ms"
    if not isinstance(value, str):
        raise SluiceError(f"budget {value!r} has no unit; {how}")
    text = value.strip().lower()
    units = {"%": dense_ms / 100, "us": 1e-3, "ms": 1.0, "s": 1e3}
    unit = next((u for u in units if text.endswith(u)), None)
    try:
        number = float(text.removesuffix(unit or ""))
    except ValueError:
        number = math.nan
    if unit is None or not math.isfinite(number):
        raise SluiceError(f"budget {value!r} is not understood; {how}")
    if number <= 0 or (unit == "%" and number > 100):
        raise SluiceError(f"budget {value!r} is out of range; {how}, a share between 0% and 100%")
    return number * units[unit]
