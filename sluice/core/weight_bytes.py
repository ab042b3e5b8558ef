"""How many bytes the weights of an ONNX model have, whether one protobuf can hold them, and weights beside a model.

1. Bytes follow from types and shapes. What lies in ``raw_data`` would be copied to be counted, and a message beyond the
   limit cannot even tell its size.
2. ONNX Runtime reads large tensors where they lie. A model that is given as one message is copied into that message,
   into the runtime's own, and into the runtime's tensors, and Python keeps the message as long as the session.
3. Tensors that have `FILED` bytes together lie in a file while a session is made: the runtime maps it, and gives a
   tensor back when it has packed it. Of 78 MB in products a session so takes 1.2 times that at most and 1.0 times from
   then on; from a message it takes 3.0 and 2.1 times, and from numpy's arrays, which copy what a message holds, 2.2 and
   2.1 times. Convolutions take 1.5 times at most, from a message 3.5. Where the disk has no room, arrays serve.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from sluice.core.drafts import draft_beside

if TYPE_CHECKING:
    import onnx

__all__ = [
    "FILED", "Apart", "Parked", "bytes_of_tensor", "bytes_of_weights", "is_large", "parked", "weights_apart",
    "with_tensors",
]  # fmt: skip

APART = 2**16  # bytes of a tensor that may lie outside of its model
FILED = 2**22
ALIGNED = 2**12  # where tensors begin in a file, as pages do
LARGE = 2**31 - 2**26  # bytes of weights in one protobuf, with room for the graph


def bytes_of_tensor(init: onnx.TensorProto) -> int:
    """Of an initialiser; strings count as nothing."""
    from onnx import TensorProto, helper

    if init.data_type == TensorProto.STRING:
        return 0
    return math.prod(init.dims) * helper.tensor_dtype_to_np_dtype(init.data_type).itemsize


def bytes_of_weights(model: onnx.ModelProto) -> int:
    return sum(map(bytes_of_tensor, model.graph.initializer))


def is_large(model: onnx.ModelProto) -> bool:
    """Is the model too large for one protobuf, as a message that is serialised must be?"""
    return bytes_of_weights(model) >= LARGE


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """A model whose large tensors lie outside of it, and these by name."""

    light: onnx.ModelProto
    tensors: Mapping[str, onnx.TensorProto]

    def loaded(self, options: Any, make: Callable[[bytes | str], Any]) -> Any:
        """A session that ``make`` makes of a message or a path, with the tensors in a file or in memory (rule 3)."""
        if sum(map(bytes_of_tensor, self.tensors.values())) >= FILED:
            with ExitStack() as stack:
                if path := self.filed(stack):
                    return make(path)
        import onnxruntime as ort
        from onnx import numpy_helper

        arrays = {name: numpy_helper.to_array(tensor) for name, tensor in self.tensors.items()}
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), values)
        session = make(self._told({name: 0 for name in arrays}, "in memory").SerializeToString())
        session.weights = arrays  # it reads them where they lie
        return session

    def filed(self, stack: ExitStack) -> str:
        """The path of the model, with its tensors in a file beside it; empty where the disk has no room.

        Both go with the ``stack``, or with the next such file where the process is killed (`sluice.core.drafts`).
        """
        from onnx import numpy_helper

        try:
            folder = stack.enter_context(draft_beside(_own_folder() / "weights"))
            path, data, offsets = folder / "model.onnx", folder / "weights", dict[str, int]()
            with data.open("wb") as file:
                for name, tensor in self.tensors.items():
                    offsets[name] = file.seek(-file.tell() % ALIGNED, 1)
                    numpy_helper.to_array(tensor).tofile(file)
            path.write_bytes(self._told(offsets, data.name).SerializeToString())
        except OSError:
            return ""
        return str(path)

    def _told(self, offsets: Mapping[str, int], location: str) -> onnx.ModelProto:
        """The light model, which says in place where its tensors are."""
        for init in self.light.graph.initializer:
            if init.name in offsets:
                del init.external_data[:]
                told = {"location": location, "offset": offsets[init.name], "length": bytes_of_tensor(init)}
                for key, value in told.items():
                    init.external_data.add(key=key, value=str(value))
        return self.light


class Parked(os.PathLike[str]):
    """The path of a model that lies on the disk as long as somebody has this."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self._path = path
        weakref.finalize(self, stack.close)

    def __fspath__(self) -> str:
        return self._path


def parked(model: onnx.ModelProto) -> onnx.ModelProto | Parked:
    """The model as a file, for engines that are built later on; itself where it is small or the disk has no room."""
    if bytes_of_weights(model) < FILED:
        return model
    stack = ExitStack()
    path = weights_apart(model).filed(stack)
    if path:
        return Parked(path, stack)
    stack.close()
    return model


def _own_folder() -> Path:
    """The folder of this user for temporary files; `OSError` where it is somebody else's."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(gettempdir()) / f"sluice-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != user):
        raise OSError(f"{folder} is not of this user")
    return folder


def weights_apart(model: onnx.ModelProto) -> Apart:
    """The model, for a runtime that reads large tensors where they lie (rule 2)."""
    light = type(model)(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for name in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(light.graph, name).extend(getattr(model.graph, name))
    return with_tensors(light, model.graph.initializer)


def with_tensors(light: onnx.ModelProto, tensors: Iterable[onnx.TensorProto]) -> Apart:
    """A model without initialisers, which gets some in place, and large ones beside it.

    Integers stay inside: shapes may follow from them.
    """
    from onnx import TensorProto

    far = {}
    for init in tensors:
        if bytes_of_tensor(init) < APART or init.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL):
            light.graph.initializer.append(init)
            continue
        far[init.name] = init
        place = light.graph.initializer.add(name=init.name, data_type=init.data_type, dims=init.dims)
        place.data_location = TensorProto.EXTERNAL
    return Apart(light, far)
