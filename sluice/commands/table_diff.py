"""Two latency tables side by side: the same device at two times, two settings, or two devices.

1. A piece's *effect* is the total difference of its common points, ``sum |ms_b - ms_a|``; pieces come in the order of
   it.
2. Ratios are ``ms_b / ms_a``, over points whose time is positive in both.
3. Nothing is scaled. The ratio of the reference engines, one engine in both tables, says how far apart the machines
   were.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from sluice.profiler.table.fingerprint import difference
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY

__all__ = ["diff_data", "diff_lines"]


def diff_data(a: LatencyTable, b: LatencyTable) -> dict[str, Any]:
    """The differences of two tables, which may be of different devices; for JSON."""
    references = [None if (found := table.get(REFERENCE_KEY, ())) is None else found.ms for table in (a, b)]
    pieces = [_piece(a, b, key) for key in dict.fromkeys([*a.keys(), *b.keys()])]
    return {
        "fingerprints": [asdict(a.fingerprint), asdict(b.fingerprint)],
        "differences": list(difference(b.fingerprint, a.fingerprint)),
        "reference_ms": references,
        "pieces": sorted(pieces, key=lambda piece: (-piece["effect_ms"], piece["key"])),
    }


def _piece(a: LatencyTable, b: LatencyTable, key: str) -> dict[str, Any]:
    in_a, in_b = a.points(key), b.points(key)
    common = [(in_a[at].ms, in_b[at].ms) for at in in_a if at in in_b]
    ratios = [there / here for here, there in common if here > 0 and there > 0]
    return {
        "key": key,
        "description": a.description(key) or b.description(key),
        "common": len(common),
        "ratio": [float(f(ratios)) for f in (np.median, np.min, np.max)] if ratios else None,
        "effect_ms": float(sum(abs(there - here) for here, there in common)),
        "only_a": len(in_a) - len(common),
        "only_b": len(in_b) - len(common),
    }


def diff_lines(data: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """`diff_data` as lines for people; ``names`` are those of the two tables."""
    lines = [f"a: {names[0]}", f"b: {names[1]}"]
    lines += [f"in b the {sentence}" for sentence in data["differences"]] or ["measured under equal conditions"]
    if None not in data["reference_ms"]:
        here, there = data["reference_ms"]
        lines.append(f"reference engine: {here:.4g} and {there:.4g} ms, ratio {there / here:.3f}")
    lines.append("ratio b/a: median (least..largest), points in both; only in a, only in b")
    for piece in data["pieces"]:
        ratio = "no ratio"
        if piece["ratio"] is not None:
            ratio = "{:.3f} ({:.3f}..{:.3f})".format(*piece["ratio"])
        name = piece["description"] or piece["key"]
        lines.append(f"  {ratio}, {piece['common']}; {piece['only_a']}, {piece['only_b']}: {name}")
    return lines
