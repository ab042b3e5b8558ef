"""A plan: what is removed from a network, by parameter name. It carries no tensors.

1. A `Slice` keeps some indices of one axis of one named tensor (parameter or buffer).
2. Slices are order-free: at most one per (tensor, axis), and slices of different axes commute.
3. The plan remembers name and shape of every tensor of the model it was made for, so a wrong model is refused
   with the first difference instead of being cut.
4. On disk: JSON, versioned, kept indices as half-open ranges. Old versions load for ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluice.algebra import from_ranges, to_ranges
from sluice.errors import SluiceError
from sluice.files import write_atomically

__all__ = ["InputSpec", "Plan", "Slice"]

VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """Keep the indices ``keep`` of axis ``axis`` (dense length ``size``) of the tensor ``param``."""

    param: str
    axis: int
    size: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        ok = self.keep and list(self.keep) == sorted(set(self.keep)) and self.keep[0] >= 0 and self.keep[-1] < self.size
        if not ok or self.axis < 0:
            raise SluiceError(
                f"bad slice of {self.param!r} axis {self.axis}: kept indices must be a non-empty increasing list "
                f"below {self.size}; make the plan again with `sluice plan`"
            )


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape (batch included) and dtype name of one example input, enough to capture the model again."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Edits for one model. ``fingerprint`` maps every tensor name of the dense model to its shape."""

    fingerprint: Mapping[str, tuple[int, ...]]
    slices: tuple[Slice, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen = [(s.param, s.axis) for s in self.slices]
        if len(set(seen)) != len(seen):
            twice = next(p for p in seen if seen.count(p) > 1)
            raise SluiceError(f"the plan slices {twice[0]!r} axis {twice[1]} twice; make it again with `sluice plan`")
        for s in self.slices:
            shape = self.fingerprint.get(s.param)
            if shape is None or s.axis >= len(shape) or shape[s.axis] != s.size:
                raise SluiceError(
                    f"the plan slices {s.param!r} axis {s.axis} of length {s.size}, but its own model has shape "
                    f"{shape}; the file is damaged, make it again with `sluice plan`"
                )
        object.__setattr__(self, "slices", tuple(sorted(self.slices)))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], complete: bool = True) -> None:
        """Refuse a model whose tensors differ from the fingerprint.

        ``complete=False`` (ONNX files, where unused tensors may be gone) looks only at the tensors that the plan cuts.
        """
        names = self.fingerprint if complete else {s.param: self.fingerprint[s.param] for s in self.slices}
        wrong = [
            f"{name!r} is {shapes.get(name, 'missing')} instead of {shape}"
            for name, shape in names.items()
            if shapes.get(name) != shape
        ]
        if complete:
            wrong += [f"{name!r} {shapes[name]} is unknown to it" for name in shapes if name not in self.fingerprint]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise SluiceError(
                f"the plan was made for another model: {', '.join(wrong[:3])}{more}; "
                "apply it to the dense model that it was made for"
            )

    def to_json(self) -> str:
        data = {
            "format": "sluice-plan",
            "version": VERSION,
            "fingerprint": {name: list(shape) for name, shape in self.fingerprint.items()},
            "inputs": [{"shape": list(i.shape), "dtype": i.dtype} for i in self.inputs],
            "widths": dict(self.widths),
            "slices": [
                {"param": s.param, "axis": s.axis, "size": s.size, "keep": [list(r) for r in to_ranges(s.keep)]}
                for s in self.slices
            ],
        }
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "the plan") -> Plan:
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != "sluice-plan":
                raise KeyError("format")
            version = data["version"]
            if not isinstance(version, int) or version > VERSION:
                raise SluiceError(f"{source} has version {version}, this sluice reads up to {VERSION}; upgrade sluice")
            return Plan(
                fingerprint={name: tuple(shape) for name, shape in data["fingerprint"].items()},
                slices=tuple(
                    Slice(s["param"], int(s["axis"]), int(s["size"]), from_ranges(s["keep"])) for s in data["slices"]
                ),
                inputs=tuple(InputSpec(tuple(i["shape"]), i["dtype"]) for i in data["inputs"]),
                widths={str(k): int(v) for k, v in data["widths"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SluiceError(
                f"{source} is not a readable sluice plan ({type(error).__name__}: {error}); "
                "make it again with `sluice plan`"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, self.to_json().encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SluiceError(
                f"cannot read the plan {os.fspath(path)!r}: {error}; give the path of a plan.json"
            ) from None
        return Plan.from_json(text, source=f"{os.fspath(path)!r}")
