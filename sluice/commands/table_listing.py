"""The contents of a latency table: as data, as lines for people, and as rows of a CSV file."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from sluice.core.errors import SluiceError
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing.reference_engine import KEY as REFERENCE_KEY
from sluice.profiler.timing.sm_clock import clock_range

__all__ = ["to_csv", "to_data", "to_lines"]


def to_data(table: LatencyTable) -> dict[str, Any]:
    """Fingerprint, pieces with the ranges of their points, engines and calibration by network, blobs; for JSON."""
    pieces = []
    for key in table.keys():  # noqa: SIM118 (a table is no mapping)
        points = table.points(key)
        if not points:  # a key of letters that SQLite reads back as others
            raise SluiceError(f"{table.path} is damaged: the points of {key!r:.60} are not found; restore a copy")
        ms = [found.ms for found in points.values()]
        pieces.append(
            {
                "key": key,
                "description": table.description(key),
                "points": len(points),
                "extents": [[min(values), max(values)] for values in zip(*points, strict=True)],
                "ms": [min(ms), max(ms)],
            }
        )
    networks = []
    for network in table.networks():
        ms = [found.ms for _, found in table.engines(network)]
        fit = table.get_calibration(network)
        networks.append(
            {
                "key": network,
                "engines": len(ms),
                "ms": [min(ms), max(ms)] if ms else None,
                "calibration": None if fit is None else {"slope": fit[0], "intercept": fit[1], "error": fit[2]},
            }
        )
    reference = table.get(REFERENCE_KEY, ())
    return {
        "fingerprint": asdict(table.fingerprint),
        "clock_mhz": clock_range(table),
        "reference_ms": None if reference is None else reference.ms,
        "points": len(table),
        "pieces": pieces,
        "networks": networks,
        "blobs": table.blobs(),
    }


def to_lines(data: dict[str, Any]) -> list[str]:
    """`to_data` as lines for people."""
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in data["fingerprint"].items()]
    if data["reference_ms"] is not None:
        lines.append(f"reference engine: {data['reference_ms']:.4g} ms")
    if data["clock_mhz"] is not None:
        lines.append("clock while measuring: {} to {} MHz".format(*data["clock_mhz"]))
    lines.append(f"{data['points']} points of {len(data['pieces'])} pieces and joints")
    for piece in data["pieces"]:
        ranges = " x ".join(f"{low}..{high}" for low, high in piece["extents"])
        low, high = piece["ms"]
        at = f" at {ranges}" if ranges else ""
        lines.append(f"  {piece['description'] or piece['key']}: {piece['points']}{at}, {low:.4g}..{high:.4g} ms")
    for network in data["networks"]:
        times = "" if network["ms"] is None else ", {:.4g}..{:.4g} ms".format(*network["ms"])
        lines.append(f"network {network['key']}: {network['engines']} engines{times}")
        if (fit := network["calibration"]) is not None:
            error = ", ".join(f"{name} {value:.3g}" for name, value in fit["error"].items())
            lines.append(f"  calibration: slope {fit['slope']:.4g}, intercept {fit['intercept']:.4g} ms; {error}")
    lines += [f"blob {name}: {size:,} bytes" for name, size in data["blobs"].items()]
    return lines


def to_csv(table: LatencyTable) -> str:
    """A header, and one row per point: key, description, extents (as in ``16x5``), ms, spread, samples."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["key", "description", "extents", "ms", "spread", "samples"])
    for key in table.keys():  # noqa: SIM118 (a table is no mapping)
        for extents, found in table.points(key).items():
            times = (repr(found.ms), repr(found.spread), found.samples)
            rows.writerow([key, table.description(key), "x".join(map(str, extents)), *times])
    return text.getvalue()
