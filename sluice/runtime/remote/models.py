"""A model that came over the line says everything itself: it names no file of the device.

1. ONNX lets the data of a tensor lie in a file beside the model, and a runtime that is given a model from memory looks
   for it in its working folder. Such a tensor may be anywhere: among the weights, in an attribute, sparse, in a branch
   of the graph, in a function. So all messages in the model are looked through.
2. The node ``EPContext`` may name a file with a compiled network, which a runtime would load; it is refused. The
   metadata of a model may hold settings of ONNX Runtime, so they go.
3. What this release of onnx does not know goes too: a newer runtime might.
"""

from __future__ import annotations

import onnx

from sluice.core.errors import SluiceError, first_line
from sluice.runtime.base.inputs import messages

__all__ = ["model_of"]


def model_of(content: bytes | bytearray) -> onnx.ModelProto:
    """The model in these bytes.

    Raises:
        SluiceError: they are no ONNX model, or it names a file.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(content))
    except Exception as error:  # protobuf's errors share no public base class
        raise SluiceError(f"what was sent is no ONNX model ({first_line(error)}); send the whole file") from None
    model.DiscardUnknownFields()
    del model.metadata_props[:]
    for message in messages(model):
        if isinstance(message, onnx.TensorProto) and (
            message.external_data or message.data_location == onnx.TensorProto.EXTERNAL
        ):
            raise SluiceError(
                f"the tensor {message.name!r} lies in a file beside the model, which the device does not read; send "
                f"the model with its data inside"
            )
        if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
            raise SluiceError(
                f"the node {message.name!r} is an EPContext, which may name a file; send the network itself"
            )
    return model
