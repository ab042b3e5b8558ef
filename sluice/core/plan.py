"""A plan: the edits of one network, by parameter name. It carries no tensors.

1. A `Slice` keeps some indices of one axis of one named tensor (parameter or buffer).
2. A `Drop` removes a residual branch, a `Merge` turns a run of convolutions into fewer, a `Factorize` one weight into
   two. They name tensors of the dense model as well; a weight takes part in at most one of them.
3. The plan is order-free: there is at most one slice per (tensor, axis), slices of different axes commute, and no
   tensor is named by two of the other edits. Rewriters carry out slices first, then drops, merges and factorizations.
4. The plan remembers name and shape of every tensor of the model it was made for, so a wrong model is refused
   with the first difference instead of being cut.
5. On disk: JSON, versioned, kept indices as half-open ranges. Old versions load for ever.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from sluice.core.algebra import from_ranges, to_ranges
from sluice.core.errors import SluiceError
from sluice.core.files import read_text, write_atomically
from sluice.core.schema import Misfit, parse, typed

__all__ = ["FORMS", "Drop", "Edits", "Factorize", "InputSpec", "Merge", "Plan", "Slice"]

VERSION = 2
MOST_KEPT = 2**23  # indices of all slices of a file together: a network of 10^9 weights keeps some 10^6
FORMS = ("kxk-1x1", "1x1-kxk", "kx1-1xk")


@lru_cache(maxsize=64)
def _increases(keep: tuple[int, ...]) -> bool:
    """The axes of one group keep the same indices, one after the other, so they are looked at once."""
    return bool(keep) and list(keep) == sorted(set(keep))


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """Keep the indices ``keep`` of axis ``axis`` (dense length ``size``) of the tensor ``param``."""

    param: str
    axis: int
    size: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _increases(self.keep) or self.keep[0] < 0 or self.keep[-1] >= self.size or self.axis < 0:
            raise SluiceError(
                f"bad slice of {self.param!r} axis {self.axis}: kept indices must be a non-empty increasing list "
                f"below {self.size}; make the plan again with `sluice plan`"
            )


@dataclass(frozen=True, slots=True, order=True)
class Factorize:
    """The weight ``param`` becomes two of inner size ``rank``, in one of the `FORMS` (first layer - second layer)."""

    param: str
    form: str
    rank: int

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.rank < 1:
            raise SluiceError(
                f"bad factorization of {self.param!r}: form {self.form!r}, rank {self.rank}; the form must be one of "
                f"{list(FORMS)} and the rank positive; make the plan again with `sluice plan`"
            )


@dataclass(frozen=True, slots=True, order=True)
class Drop:
    """The residual branch whose own tensors are ``params`` (sorted) goes; ``name`` is its name in reports."""

    name: str
    params: tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class Merge:
    """The convolutions ``layers`` (their weights, in order) lose the activations between them.

    Every run of ``runs`` becomes one convolution; a convolution in no run is removed, as if it were the identity.
    """

    layers: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        kept = [name for run in self.runs for name in run]
        known = set(kept)
        if not kept or not all(self.runs) or [n for n in self.layers if n in known] != kept:
            raise SluiceError(
                f"bad merge of {list(self.layers)}: its runs {[list(r) for r in self.runs]} must be non-empty and name "
                "its layers in order; make the plan again with `sluice plan`"
            )

    @property
    def name(self) -> str:
        return f"{self.layers[0]}..{self.layers[-1]}"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape (batch included) and dtype name of one example input, enough to capture the model again.

    ``name``: of a keyword argument; "" for a positional one.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Edits for one model. ``fingerprint`` maps every tensor name of the dense model to its shape."""

    fingerprint: Mapping[str, tuple[int, ...]]
    slices: tuple[Slice, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    factorizations: tuple[Factorize, ...] = ()
    drops: tuple[Drop, ...] = ()
    merges: tuple[Merge, ...] = ()

    def __post_init__(self) -> None:
        seen = Counter((s.param, s.axis) for s in self.slices)
        if len(seen) != len(self.slices):
            twice = next(at for at, count in seen.items() if count > 1)
            raise SluiceError(f"the plan slices {twice[0]!r} axis {twice[1]} twice; make it again with `sluice plan`")
        for s in self.slices:
            shape = self.fingerprint.get(s.param)
            if shape is None or s.axis >= len(shape) or shape[s.axis] != s.size:
                raise SluiceError(
                    f"the plan slices {s.param!r} axis {s.axis} of length {s.size}, but its own model has shape "
                    f"{shape}; the file is damaged, make it again with `sluice plan`"
                )
        named = [f.param for f in self.factorizations]
        named += [p for drop in self.drops for p in drop.params] + [p for merge in self.merges for p in merge.layers]
        counts = Counter(named)
        for name in named:
            if name not in self.fingerprint:
                raise SluiceError(
                    f"the plan changes {name!r}, which its own model lacks; the file is damaged, make it again with "
                    "`sluice plan`"
                )
            if counts[name] > 1:
                raise SluiceError(f"the plan changes {name!r} twice; make it again with `sluice plan`")
        for f in self.factorizations:
            if f.rank > (most := _full_rank(self.fingerprint[f.param])):
                raise SluiceError(
                    f"the plan gives {f.param!r} {self.fingerprint[f.param]} the rank {f.rank}, above {most}, which "
                    "no factorization of it has; the file is damaged, make it again with `sluice plan`"
                )
        for kind in ("slices", "factorizations", "drops", "merges"):
            object.__setattr__(self, kind, tuple(sorted(getattr(self, kind))))

    def edited(self) -> set[str]:
        """Every tensor that some edit names."""
        own = {p for drop in self.drops for p in drop.params} | {p for merge in self.merges for p in merge.layers}
        return own | {s.param for s in self.slices} | {f.param for f in self.factorizations}

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], complete: bool = True) -> None:
        """Refuse a model whose tensors differ from the fingerprint.

        ``complete=False`` (ONNX files, where unused tensors may be gone) looks only at the tensors that the plan cuts.
        """
        names = self.fingerprint if complete else {name: self.fingerprint[name] for name in sorted(self.edited())}
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
            "inputs": [
                {"shape": list(i.shape), "dtype": i.dtype, **({"name": i.name} if i.name else {})} for i in self.inputs
            ],
            "widths": dict(self.widths),
            "slices": [
                {"param": s.param, "axis": s.axis, "size": s.size, "keep": [list(r) for r in to_ranges(s.keep)]}
                for s in self.slices
            ],
            "drops": [{"name": d.name, "params": list(d.params)} for d in self.drops],
            "merges": [{"layers": list(m.layers), "runs": [list(r) for r in m.runs]} for m in self.merges],
            "factorizations": [{"param": f.param, "form": f.form, "rank": f.rank} for f in self.factorizations],
        }
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "the plan") -> Plan:
        return read_plan(text, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(path, self.to_json().encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        text = read_text(path, "a plan.json")
        return Plan.from_json(text, source=f"{os.fspath(path)!r}")


def _full_rank(shape: tuple[int, ...]) -> int:
    """An upper bound of the rank of a weight in any form: that of the sizes of its first two axes with the kernel."""
    if len(shape) < 2:
        return 0
    kernel = math.prod(shape[2:])
    return min(math.prod(shape[:1]), math.prod(shape[1:2])) * kernel


@dataclass(frozen=True, slots=True)
class _SliceRow:
    param: str
    axis: int
    size: int
    keep: tuple[tuple[int, int], ...]

    def indices(self) -> tuple[int, ...]:
        """The kept indices, of ranges that lie within the axis."""
        for start, stop in self.keep:
            if not 0 <= start < stop <= self.size:
                raise Misfit(f"the slice of {self.param!r} axis {self.axis} keeps {start} to {stop} of {self.size}")
        return from_ranges(self.keep)


@dataclass(frozen=True, slots=True)
class _PlanFile:
    """The file as it is written; the fields that have a default came later."""

    format: str
    version: int
    fingerprint: Mapping[str, tuple[int, ...]]
    inputs: tuple[InputSpec, ...]
    widths: Mapping[str, int]
    slices: tuple[_SliceRow, ...]
    drops: tuple[Drop, ...] = ()
    merges: tuple[Merge, ...] = ()
    factorizations: tuple[Factorize, ...] = ()


def read_plan(text: str, source: str) -> Plan:
    """The plan in a file.

    Raises:
        SluiceError: the text is no plan of these versions, or one of sizes that no model has.
    """
    try:
        data = parse(text)
        version = data.get("version") if isinstance(data, dict) and data.get("format") == "sluice-plan" else None
        if type(version) is int and version > VERSION:
            raise SluiceError(f"{source} has version {version}, this sluice reads up to {VERSION}; upgrade sluice")
        if type(version) is not int or version < 1:
            raise Misfit(f"its version is {version!r:.20}" if isinstance(data, dict) else "it is no object")
        file: _PlanFile = typed(_PlanFile, data)
        sizes = [size for shape in file.fingerprint.values() for size in shape]
        rows = [*sizes, *(size for spec in file.inputs for size in spec.shape)]
        if any(not 0 <= size < 2**31 for size in rows):
            raise Misfit("it holds sizes that no tensor has")
        for s in file.slices:
            shape = file.fingerprint.get(s.param, ())
            if not 0 <= s.axis < len(shape) or shape[s.axis] != s.size:
                raise Misfit(f"it slices {s.param!r:.60} axis {s.axis} of length {s.size}, its own model has {shape}")
        if (kept := sum(stop - start for s in file.slices for start, stop in s.keep)) > MOST_KEPT:
            raise Misfit(f"it keeps {kept:,} channels of all tensors together, more than {MOST_KEPT:,}")
        slices = tuple(Slice(s.param, s.axis, s.size, s.indices()) for s in file.slices)
        return Plan(file.fingerprint, slices, file.inputs, file.widths, file.factorizations, file.drops, file.merges)
    except Misfit as error:
        raise SluiceError(
            f"{source} is not a readable sluice plan ({error}); it is damaged, make it again with `sluice plan`"
        ) from None


@dataclass(frozen=True, slots=True)
class Edits:
    """The structural edits of one configuration."""

    factorizations: tuple[Factorize, ...] = ()
    drops: tuple[Drop, ...] = ()
    merges: tuple[Merge, ...] = ()
