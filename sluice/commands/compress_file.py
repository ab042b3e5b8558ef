"""What the words of ``sluice compress MODEL.onnx`` stand for: examples, figure of merit, settings.

Examples are an ``.npz`` file with an array for every input, a folder of ``.npy`` files called like the inputs,
``package.module:factory`` that returns a mapping, or the word ``random``. A single array serves a file with one input.
Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.commands.input_options import NamedInput
from sluice.core.errors import SluiceError, first_line

if TYPE_CHECKING:
    import onnx


__all__ = ["examples_in", "file_arguments"]

RANDOM, DRAWN = "random", 256
Made = Callable[[str], Any]


def file_arguments(
    args: argparse.Namespace, settings: Mapping[str, Any], made: Made, figure: Callable[[Any], float] | None
) -> dict[str, Any]:
    """The arguments of `sluice.compress_onnx`. Runs are not merged, since that takes activations away for good.

    Args:
        settings: of `sluice.commands.options.settings`.
        made: the result of a factory, by its name.
        figure: of merit, of a session of ONNX Runtime.
    """
    from sluice.core.address import target_at

    deployment = settings["deployment"]
    for wrong, mend in (
        (args.budget is None, "--max-drop searches with training; give --budget for an ONNX file"),
        (
            args.gates or args.gate_epochs or args.progressive,
            "gates and stops are trained, an ONNX file is not; leave out --gates, --gate-epochs and --progressive",
        ),
        (args.rotate, "weights of an ONNX file keep their basis; leave out --rotate"),
        (deployment.precision != "fp32", f"an ONNX file is compressed in fp32; leave out --precision {args.precision}"),
        (args.shape is not None, "an ONNX file has its own shapes; leave out --shape, or name open ones with --input"),
    ):
        if wrong:
            raise SluiceError(mend)
    note = f"{DRAWN} random examples, so prices and channels are chosen blindly" if args.data == RANDOM else ""
    found = {
        "inputs": examples_in(args.data, args.model, args.inputs, made), "note": note, "budget": args.budget,
        "batch": deployment.batch, "target": target_at(deployment.target, deployment.address),
        "threads": deployment.threads, "methods": [m for m in settings["methods"] if m != "merge"],
        "fixed": dict(args.fixed), "loss": args.loss or "auto", "evaluate": figure,
        "refit": args.compensate is not False, "steps": args.steps, "seed": args.seed or 0, "out": args.out,
    }  # fmt: skip
    return {
        **{k: settings[k] for k in ("table", "exclude", "keep", "multiple", "progress", "minutes") if k in settings},
        **found,
    }


def examples_in(spec: str, path: str, sizes: Sequence[NamedInput], made: Made) -> dict[str, np.ndarray]:
    """The examples by input.

    Args:
        path: of the ONNX file.
        sizes: with ``random``, of the inputs whose sizes the file leaves open; the first one is the batch.
    Raises:
        SluiceError: they cannot be read.
    """
    place = Path(spec)
    if spec == RANDOM:
        return _drawn(path, sizes)
    if place.is_dir():
        found = {file.stem: _loaded(file) for file in sorted(place.glob("*.npy"))}
        if not found:
            raise SluiceError(f"{spec!r} holds no .npy file; give a folder with one for every input")
        return _named(found, path)
    if place.suffix in (".npz", ".npy"):
        loaded = _loaded(place)
        return _named(loaded if isinstance(loaded, dict) else {place.stem: loaded}, path)
    if ":" not in spec:
        raise SluiceError(
            f"{spec!r} is no data of an ONNX file; give an .npz file, a folder of .npy files, package.module:factory "
            f"of a mapping from inputs to arrays, or {RANDOM}"
        )
    result = made(spec)
    if not isinstance(result, Mapping):
        raise SluiceError(f"{spec!r} returned {type(result).__name__}; for an ONNX file, let it return arrays by input")
    return _named({str(name): np.asarray(value) for name, value in result.items()}, path)


def _loaded(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SluiceError(f"cannot read {str(path)!r}: {first_line(error)}; give arrays that numpy saved") from None


def _named(found: dict[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    """A single array belongs to the single input, however it is called."""
    inputs = list(_infos(path))
    return {inputs[0]: next(iter(found.values()))} if len(inputs) == len(found) == 1 else found


def _infos(path: str) -> dict[str, onnx.ValueInfoProto]:
    from sluice.passes.files.read import load_whole
    from sluice.passes.graph.onnx_graph import OnnxGraph

    return OnnxGraph(load_whole(path)).inputs


def _drawn(path: str, sizes: Sequence[NamedInput]) -> dict[str, np.ndarray]:
    """Standard normal numbers, and ones of every other type, for `DRAWN` examples."""
    from onnx import helper

    rng, found = np.random.default_rng(0), {}
    given = {name: shape for name, shape, _ in sizes}
    for name, info in _infos(path).items():
        dims = info.type.tensor_type.shape.dim
        shape = given.get(name, tuple(dim.dim_value for dim in dims))
        if len(shape) != len(dims) or not all(shape[1:]):
            raise SluiceError(f"input {name!r} has open sizes; give all of them, --input {name}=1,3,224,224 for one")
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        drawn = rng.standard_normal((DRAWN, *shape[1:])) if shape else np.ones(())
        found[name] = (drawn if np.issubdtype(dtype, np.floating) else np.ones_like(drawn)).astype(dtype)
    return found
