"""ONNX files: read, fold for deployment, write whole or not at all. No torch.

Folding comes last, since a plan is applied by names: folding merges batch norms into convolutions, and named tensors
disappear. A weight that is stored transposed is called after the weight (`named_transposes`): not by its name, under
which a plan would cut the wrong axis.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.inliner
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from sluice.core.errors import SluiceError, first_line
from sluice.core.files import BESIDE, DATA_HEAD, write_atomically
from sluice.core.weight_bytes import bytes_of_tensor, is_large
from sluice.passes.graph.onnx_graph import INTEGERS, LITERAL, OnnxGraph, hollow, weightless

__all__ = [
    "TRANSPOSED", "buffers_of", "finalize", "load_onnx", "named_transposes", "note_buffers", "quiet", "read_message",
    "save_onnx", "without_defaults",
]  # fmt: skip

TRANSPOSED = ":transposed"
ALIGNED = 4096  # where tensors begin in it, so that runtimes can map them
BUFFERS = "sluice.buffers"
ALLOWZERO = 14  # the first operator set whose Reshape has it


def load_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model in a file; its initialisers are constants (`without_defaults`).

    Local functions are written out.

    Raises:
        SluiceError: the file cannot be read, is no sound ONNX file, or holds branches or loops.
    """
    name, model = os.fspath(path), read_message(path, "one that `sluice export` wrote")
    if not model.graph.node:  # an empty file is a valid message
        raise SluiceError(f"{name!r} is not an ONNX file (it holds no operator); give one that `sluice export` wrote")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        onnx.checker.check_model(weightless(model) if is_large(model) else model)
    except Exception as error:  # the checker's and protobuf's errors share no public base class
        raise SluiceError(
            f"{name!r} is not a sound ONNX file ({first_line(error)}); give one that `sluice export` wrote"
        ) from None
    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise SluiceError(
                f"{name!r} holds {node.op_type} {node.name!r}, whose graph inside is run or not by what is computed; "
                f"export the network without branches and loops that depend on its inputs"
            )
    return without_defaults(model)


def read_message(path: str | os.PathLike[str], wanted: str) -> onnx.ModelProto:
    """The message in a file, with the weights that lie in others beside it.

    Args:
        wanted: what the user is to give in place of something else.
    Raises:
        SluiceError: the file cannot be read or is no ONNX file, or its weights cannot be read.
    """
    name = os.fspath(path)
    try:
        model = onnx.load(name, load_external_data=False)
    except OSError as error:
        raise SluiceError(f"cannot read {name!r}: {error.strerror or error}; give the path of an ONNX file") from None
    except Exception as error:  # protobuf's errors share no public base class
        raise SluiceError(f"{name!r} is not an ONNX file ({first_line(error)}); give {wanted}") from None
    try:
        load_external_data_for_model(model, os.path.dirname(name))
    except Exception as error:  # the checker's and protobuf's errors share no public base class
        raise SluiceError(
            f"cannot read the weights beside {name!r} ({first_line(error)}); give it with plain copies of all its "
            f"files, no links, in one folder"
        ) from None
    return model


def without_defaults(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with constant initialisers; itself if all of them are constant.

    Before IR version 4 every initialiser had to be a graph input as well. Since then an initialiser that is an input
    can be fed another value, so it could neither be folded nor stored in another type.
    """
    kept = list(OnnxGraph(model).inputs.values())
    if len(kept) == len(model.graph.input):
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    done.ir_version = max(done.ir_version, 4)
    del done.graph.input[:]
    done.graph.input.extend(kept)
    return done


def finalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold and clean the graph for deployment.

    The optimiser writes ``allowzero=0`` into every Reshape, which operator sets below 14 do not know. Its rules
    remember the last graph that they looked at, which would hold the numbers of a whole file.
    """
    import onnxscript.optimizer
    from onnxscript import ir

    metadata = list(model.metadata_props)
    with quiet():
        graph = ir.from_proto(named_transposes(model))
        values = list(graph.graph.initializers.values())
        onnxscript.optimizer.optimize(graph)
        done = ir.to_proto(graph)
        for value in (*values, *graph.graph.initializers.values()):
            value.const_value = None
    assert isinstance(done, onnx.ModelProto)
    del done.metadata_props[:]
    done.metadata_props.extend(metadata)
    if any(entry.domain in ("", "ai.onnx") and entry.version < ALLOWZERO for entry in done.opset_import):
        for node in done.graph.node:
            kept = [a for a in node.attribute if node.op_type != "Reshape" or a.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.checker.check_model(weightless(done), full_check=True)
    return done


def named_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with transposed weights called ``WEIGHT:transposed``; itself where there are none."""
    there = OnnxGraph(model)
    taken = {name for node in model.graph.node for name in node.output} | there.initializers.keys()
    names: dict[str, str] = {}
    for node in model.graph.node:
        new = f"{node.input[0]}{TRANSPOSED}" if node.op_type == "Transpose" else ""
        if new and node.input[0] in there.initializers and node.output[0] not in there.outputs and new not in taken:
            names[node.output[0]] = new
            taken.add(new)
    if not names:
        return model
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for node in done.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for info in done.graph.value_info:
        info.name = names.get(info.name, info.name)
    return done


def save_onnx(model: onnx.ModelProto, path: str | os.PathLike[str]) -> int:
    """Write the file, whole or not at all; how many bytes that were.

    Weights beyond the 2 GiB of one protobuf come into a file beside it, ``NAME.onnx.data``, which is written first.
    """
    if not is_large(model):
        content = model.SerializeToString()
        write_atomically(path, content)
        return len(content)
    place = Path(path)
    data = place.with_name(f"{place.name}{BESIDE}")
    light, far, size = _apart(model, data.name)
    content = light.SerializeToString()
    write_atomically(data, _parts(far))
    write_atomically(place, content)
    return size + len(content)


def _apart(model: onnx.ModelProto, location: str) -> tuple[onnx.ModelProto, list[onnx.TensorProto], int]:
    """The model whose large tensors say that their numbers lie in the file ``location``; these; its size."""
    light, far, offset = hollow(model), list[onnx.TensorProto](), len(DATA_HEAD) + -len(DATA_HEAD) % ALIGNED
    for init, full in zip(light.graph.initializer, model.graph.initializer, strict=True):
        if math.prod(init.dims) <= LITERAL or init.data_type in INTEGERS:
            continue
        far.append(full)
        init.data_location = onnx.TensorProto.EXTERNAL
        length = bytes_of_tensor(full)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            init.external_data.add(key=key, value=str(value))
        offset += length + -length % ALIGNED
    return light, far, offset


def _parts(far: Iterable[onnx.TensorProto]) -> Iterator[bytes]:
    """What lies in the file, one tensor in memory at a time."""
    yield DATA_HEAD + bytes(-len(DATA_HEAD) % ALIGNED)
    for full in far:
        yield numpy_helper.to_array(full).tobytes()
        yield bytes(-bytes_of_tensor(full) % ALIGNED)


def note_buffers(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Say in the file which initialisers were buffers: ONNX does not tell parameters from buffers."""
    if noted := sorted(names):
        model.metadata_props.add(key=BUFFERS, value=json.dumps(noted))


def buffers_of(model: onnx.ModelProto) -> frozenset[str]:
    """The initialisers that are known to have been buffers."""
    noted = (entry.value for entry in model.metadata_props if entry.key == BUFFERS)
    return frozenset(name for value in noted for name in json.loads(value))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter, which logs and warns about packages that the user does not need."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
