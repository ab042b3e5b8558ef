"""Table -> `LatencyModel`: every piece of the graph is a term, every joint a term of weight -1."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from sluice.latency import LatencyModel, Term
from sluice.profiler.joints import find_joints
from sluice.profiler.pieces import Dissection
from sluice.profiler.sweep import Staircase, joint_points, knots_of
from sluice.profiler.table import LatencyTable

__all__ = ["assemble"]


def assemble(dissection: Dissection, stairs: Mapping[str, Staircase], table: LatencyTable) -> LatencyModel:
    """The uncalibrated model.

    Raises:
        SluiceError: the table lacks a point.
    """
    terms = []
    for piece in dissection.pieces:
        knots = knots_of(piece, dissection, stairs)
        ms = [table.require(piece.key, point).ms for point in itertools.product(*knots)]
        shape = tuple(len(k) for k in knots)
        arrays = tuple(np.array(k, dtype=np.float64) for k in knots)
        terms.append(Term(piece.name, piece.extents, arrays, np.array(ms, dtype=np.float64).reshape(shape)))
    values: dict[str, list[tuple[int, ...]]] = {}
    for joint, extents in joint_points(dissection, stairs):
        values.setdefault(joint.tensor, []).append(extents)
    for joint in find_joints(dissection):
        points = values[joint.tensor]
        saved = np.array([table.require(joint.key, point).ms for point in points])
        if joint.extent is None:
            terms.append(Term(f"joint {joint.tensor}", (), (), saved.reshape(()), -1.0))
        else:
            knots_array = np.array([p[0] for p in points], dtype=np.float64)
            terms.append(Term(f"joint {joint.tensor}", (joint.extent,), (knots_array,), saved, -1.0))
    levels = {group: stair.levels for group, stair in stairs.items()}
    return LatencyModel(tuple(terms), dissection.dense, levels)
