"""A budget is parsed once, where the user hands it in; everything behind takes the parsed value.

A budget is a set of upper bounds, one for each kind of cost that it limits. The one kind so far is ``latency_ms``; a
further kind is a row of `UNITS` and a method that says what its amount comes to. A negative number without a unit is no
budget: it asks for the least latency at which a figure of merit drops by no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sluice.core.errors import SluiceError

__all__ = ["AllowedDrop", "Bound", "BudgetSpec", "parse_budget"]

SHARE = "%"
# By kind, the units that a bound may have; a number without one has the unit that ends the name of the kind.
UNITS: Mapping[str, Mapping[str, float]] = {"latency_ms": {"us": 1e-3, "ms": 1.0, "s": 1e3}}
HOW = "say '50%', '2.4ms' or {'latency_ms': 2.4}"


@dataclass(frozen=True, slots=True)
class Bound:
    """At most ``number`` of ``unit``, which is one of the kind's `UNITS`, or ``%`` of what the dense network has."""

    number: float
    unit: str

    def __str__(self) -> str:
        return f"{self.number:.4g}%" if self.unit == SHARE else f"{self.number:.4g} {self.unit}"


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """What a network may cost: ``(kind, bound)`` for every kind that is limited."""

    bounds: tuple[tuple[str, Bound], ...]

    @classmethod
    def parse(cls, spec: str | Mapping[str, str | float]) -> BudgetSpec:
        """From ``"50%"`` (of dense), ``"2.4ms"``, ``"800us"`` or ``{"latency_ms": 2.4 or "50%"}``.

        Raises:
            SluiceError: a kind or a unit that there is not, an amount out of range, or a drop (`AllowedDrop`).
        """
        if (drop := AllowedDrop.parse(spec)) is not None:
            raise SluiceError(f"budget {spec!r} allows a drop of {drop.amount:g}, which is for sluice.compress; {HOW}")
        if not isinstance(spec, Mapping):
            return cls((("latency_ms", _bound("latency_ms", spec)),))
        unknown = sorted(set(spec) - UNITS.keys())
        if unknown or not spec:
            raise SluiceError(f"budget {dict(spec)!r} names {unknown or 'nothing'}; only 'latency_ms' is known, {HOW}")
        return cls(tuple((kind, _bound(kind, value, bare=kind.rpartition("_")[2])) for kind, value in spec.items()))

    def ms(self, dense_ms: float) -> float:
        """Milliseconds that the network may take, where the dense one takes ``dense_ms``."""
        bound = dict(self.bounds)["latency_ms"]
        return bound.number * (dense_ms / 100 if bound.unit == SHARE else UNITS["latency_ms"][bound.unit])

    def of(self, share: float) -> BudgetSpec:
        """The same budget, a bound in percent being one of ``share`` of what the dense network has."""
        return BudgetSpec(tuple((k, Bound(b.number * share, b.unit) if b.unit == SHARE else b) for k, b in self.bounds))

    def __str__(self) -> str:
        return ", ".join(f"{kind.partition('_')[0]} {bound}" for kind, bound in self.bounds)


@dataclass(frozen=True, slots=True)
class AllowedDrop:
    """The least latency is wanted at which a figure of merit is at most ``amount`` below the dense network's."""

    amount: float

    @classmethod
    def parse(cls, spec: object) -> AllowedDrop | None:
        """From ``"-1.0"``, a negative number without a unit; None for anything else."""
        if not isinstance(spec, str) or not spec.strip().startswith("-"):
            return None
        try:
            amount = -float(spec)
        except ValueError:
            return None
        return cls(abs(amount)) if math.isfinite(amount) else None


def parse_budget(spec: str | Mapping[str, str | float]) -> BudgetSpec | AllowedDrop:
    """A budget, or the drop that takes its place.

    Raises:
        SluiceError: neither.
    """
    drop = AllowedDrop.parse(spec)
    return BudgetSpec.parse(spec) if drop is None else drop


def _bound(kind: str, value: object, bare: str = "") -> Bound:
    """``value`` as the user wrote it; ``bare`` is the unit of a number, where one may stand for itself."""
    if bare and isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value}{bare}"
    if not isinstance(value, str):
        raise SluiceError(f"budget {value!r} has no unit; {HOW}")
    text = value.strip().lower()
    unit = next((u for u in (SHARE, *UNITS[kind]) if text.endswith(u)), None)
    try:
        number = float(text.removesuffix(unit or ""))
    except ValueError:
        number = math.nan
    if unit is None or not math.isfinite(number):
        raise SluiceError(f"budget {value!r} is not understood; {HOW}")
    if number <= 0 or (unit == SHARE and number > 100):
        raise SluiceError(f"budget {value!r} is out of range; {HOW}, a share between 0% and 100%")
    return Bound(number, unit)
