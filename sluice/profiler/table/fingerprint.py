"""The fingerprint of a latency table: times are comparable only where all of its fields are equal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from sluice.core.errors import SluiceError
from sluice.runtime.base.runner import Clock

__all__ = ["Fingerprint", "difference"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Device, runtime with its version, threads inside an operator, precision, batch size and clock of a table."""

    device: str
    runtime: str
    runtime_version: str
    threads: int
    precision: str
    batch: int
    clock: Clock

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The value written by `to_json`; `SluiceError` where the text is anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise SluiceError(f"the fingerprint {text[:60]!r} is not JSON ({error}); measure again") from error
        expected = {field.name: int if field.name in ("threads", "batch") else str for field in fields(cls)}
        # type() rather than isinstance: JSON's true would pass for 1.
        sound = (
            isinstance(values, dict)
            and values.keys() == expected.keys()
            and all(type(values[name]) is kind for name, kind in expected.items())
        )
        if not sound:
            raise SluiceError(f"the fingerprint {text[:60]!r} does not hold {', '.join(expected)}; measure again")
        return cls(**values)


def difference(a: Fingerprint, b: Fingerprint) -> tuple[str, ...]:
    """One sentence per field in which ``a`` (the one at hand) differs from ``b`` (the one wanted)."""
    return tuple(
        f"{field.name.replace('_', ' ')} is {getattr(a, field.name)!r}, not {getattr(b, field.name)!r}"
        for field in fields(Fingerprint)
        if getattr(a, field.name) != getattr(b, field.name)
    )
