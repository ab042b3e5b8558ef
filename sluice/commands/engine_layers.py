"""The layers of a whole engine that hold the pieces of a network: what the runtime's compiler fused.

A piece that shares a layer with other pieces is timed apart and runs together; the joints and the calibration stand for
the difference. So this is for reading, when a promise is worse than it should be.
"""

from __future__ import annotations

from sluice.core.address import split_target, target_at
from sluice.core.errors import SluiceError
from sluice.profiler.pieces.weightless import with_weights
from sluice.profiler.view import Profile
from sluice.runtime.trt.inspect import EngineLayers, owners, place_pieces
from sluice.runtime.trt.runner import TensorRtRunner

__all__ = ["check_inspector", "place_profile", "placement_lines"]


def check_inspector(target: str) -> None:
    """Raises `SluiceError` for a target whose runtime does not describe its engines, or not from afar."""
    name, address = split_target(target)
    if address and name == "tensorrt":
        raise SluiceError(f"the layers of an engine are not told over the line to {address}; profile --layers there")
    if target != "tensorrt":
        raise SluiceError(f"{target} does not tell the layers of its engines; leave out --layers, or use tensorrt")


def place_profile(profile: Profile) -> EngineLayers:
    """The layers of the dense engine that hold each piece, by TensorRT's inspector.

    Raises:
        SluiceError: the target is not TensorRT, or the engine cannot be built here.
    """
    check_inspector(target_at(profile.target, profile.address))
    runner = profile.runner()
    assert isinstance(runner, TensorRtRunner)
    partition = profile.partition
    deployed = profile.engine(with_weights(partition.model))
    layers = runner.build(deployed, batch=partition.batch).layers()
    return place_pieces(layers, owners(deployed.graph, {p.name: p.model.graph for p in partition.pieces}))


def placement_lines(placed: EngineLayers) -> list[str]:
    """Lines for people: every piece with its layers, and for each shared layer the number of other pieces in it."""
    lines = [f"layers of the dense engine, by piece; {len(placed.shared)} are shared by several pieces"]
    for piece, layers in placed.pieces.items():
        told = [f"{n} (with {len(placed.shared[n]) - 1} more)" if n in placed.shared else n for n in layers]
        lines.append(f"  {piece}: {', '.join(told) or 'no layer of its own'}")
    if placed.own:
        lines.append(f"  put in by the compiler: {', '.join(placed.own)}")
    return lines
