"""A network of two convolutions, its data, and a simulated device on which it is profiled in no time.

The device's milliseconds are a function of the graph: a call costs 1 us, a multiply-accumulate 100 ns. What tests of
the whole way check is what is done with times; that real ones are taken well is tested where they are taken.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sluice
from sluice.artifacts.macs import count_macs
from sluice.commands import place
from sluice.core.deployment import Deployment
from sluice.models import enliven
from sluice.models.resnet import BasicBlock
from sluice.passes.cut.export import to_onnx
from sluice.passes.files.read import OnnxFile, read_onnx_file
from sluice.passes.files.rows import Rows, rows_of
from sluice.passes.graph.onnx_file import save_onnx
from sluice.passes.graph.static_shapes import static_graph
from sluice.profiler.profile import profile_onnx
from sluice.runtime.ort.cpu import OrtRunner, OrtSession
from sluice.solver.options import METHODS
from tests.shared import shared

BATCH = 3
CALL_MS, MAC_MS = 1e-3, 1e-4


class Tiny(nn.Module):
    """(N, 3, 9, 9) to (N, 5)."""

    def __init__(self, middle: int = 13) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.conv2 = nn.Conv2d(10, middle, 3)
        self.fc = nn.Linear(middle, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class TinyResidual(nn.Module):
    """(N, 3, 9, 9) to (N, 5): two residual blocks between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 11, 3, padding=1)
        self.block1, self.block2 = BasicBlock(11, 11), BasicBlock(11, 11)
        self.conv2, self.fc = nn.Conv2d(11, 13, 3), nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.conv1(x))))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = TinyResidual()
    return enliven(model, 5, (inputs(),))


def _seeded(middle: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(middle)
        return enliven(Tiny(middle), middle)


def model() -> nn.Module:
    return _seeded(13)


def other_model() -> nn.Module:
    return _seeded(11)


def uncuttable() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(243, 5))


@shared
def plain_file() -> bytes:
    """`residual` as torch's own exporter writes it, its batch open."""
    program = torch.onnx.export(
        residual().eval(), (inputs(),), dynamo=True, verbose=False, input_names=["picture"],
        dynamic_shapes=({0: torch.export.Dim("n")},), output_names=["scores"], opset_version=18,
    )  # fmt: skip
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def plain_file_and_rows(count: int) -> tuple[OnnxFile, Rows]:
    """The file of `plain_file`, read, and so many random examples."""
    examples = {"picture": np.random.default_rng(3).standard_normal((count, 3, 9, 9)).astype(np.float32)}
    file = read_onnx_file(onnx.load_model_from_string(plain_file()), examples)
    return file, rows_of(file, examples)


def inputs(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(4)
    return [(torch.randn(4, 3, 9, 9, generator=g), torch.randint(5, (4,), generator=g)) for _ in range(6)]


def data_with_nan() -> list[tuple[Tensor, Tensor]]:
    batches = data()
    batches[3][0][0, 0, 0, 0] = float("nan")
    return batches


def data_of_another_shape() -> list[tuple[Tensor, Tensor]]:
    return [(x[:, :2], y) for x, y in data()]


def data_without_labels() -> list[Tensor]:
    return [x for x, _ in data()]


def data_once() -> Iterator[tuple[Tensor, Tensor]]:
    return iter(data())


def no_data() -> list[Tensor]:
    return []


def raises() -> nn.Module:
    raise RuntimeError("no checkpoint\nfound here")


def returns_a_number() -> int:
    return 7


class _Simulated:
    def __init__(self, real: OrtSession, ms: float) -> None:
        self._real, self._ms, self.clock = real, ms, real.clock

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._real.run(feeds)

    def sample(self, repeats: int) -> float:
        return self._ms


@contextmanager
def simulated_device() -> Iterator[None]:
    """Engines run as ever, their times are computed."""
    real = OrtRunner.build

    def build(self: OrtRunner, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> Any:
        session = real(self, model, batch=batch, feeds_shapes=feeds_shapes)
        if not isinstance(model, onnx.ModelProto):
            return session
        return _Simulated(session, CALL_MS + MAC_MS * count_macs(static_graph(model, batch or 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtRunner, "build", build)
        patch.setattr(OrtRunner, "build_part", build)
        patch.setattr(place, "LOCAL", "")  # a process of its own would have the real device
        yield


@shared
def table_bytes() -> bytes:
    """The table of `model` on the simulated device, as `sluice.profile` fills it."""
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        path = Path(folder) / "t.db"
        sluice.profile(model(), inputs(), path, batch=BATCH, progress=False)
        return path.read_bytes()


@shared
def dense_table_bytes() -> bytes:
    """The same with nothing but the dense network."""
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        path = Path(folder) / "t.db"
        dense = onnx.load_model_from_string(_dense_bytes())
        profile_onnx(dense, path, deployment=Deployment(batch=BATCH), methods=METHODS, progress=False)
        return path.read_bytes()


@shared
def residual_table_bytes() -> bytes:
    """The table of `residual`."""
    with tempfile.TemporaryDirectory() as folder, simulated_device():
        path = Path(folder) / "t.db"
        sluice.profile(residual(), inputs(), path, batch=BATCH, progress=False)
        return path.read_bytes()


def table_in(folder: Path, content: bytes | None = None) -> Path:
    """A file with the table of `model`, or with that of ``content``."""
    path = folder / "t.db"
    path.write_bytes(table_bytes() if content is None else content)
    return path


@shared
def _dense_bytes() -> bytes:
    return to_onnx(model(), inputs()).SerializeToString()


@shared
def _residual_bytes() -> bytes:
    return to_onnx(residual(), inputs()).SerializeToString()


def residual_onnx() -> onnx.ModelProto:
    """`residual` with its parameter names."""
    return onnx.load_model_from_string(_residual_bytes())


def dense_onnx_in(folder: Path) -> Path:
    """The dense network with its parameter names."""
    path = folder / "dense.onnx"
    save_onnx(onnx.load_model_from_string(_dense_bytes()), path)
    return path


@cache
def _compressed() -> Mapping[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_compressed_bytes())) as content:
        return {name: content.read(name) for name in content.namelist()}


@shared
def _compressed_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as name, simulated_device():
        folder = Path(name)
        sluice.compress(
            model(), inputs(), budget="60%", data=data(), table=table_in(folder), out=folder / "out", batch=BATCH,
            methods=("filter",), gate_epochs=0, epochs=1, progress=False,
        )  # fmt: skip
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as written:
            for place, part in files_of(folder / "out").items():
                written.writestr(place, part)
        return content.getvalue()


def compressed_in(folder: Path) -> Path:
    """What `sluice.compress` wrote for `model`, of which only widths were to change."""
    out = folder / "slim"
    out.mkdir()
    for name, content in _compressed().items():
        (out / name).write_bytes(content)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def words(*parts: object) -> Sequence[str]:
    """Arguments of the command line; a text is split at blanks."""
    return [word for part in parts for word in (part.split() if isinstance(part, str) else [str(part)])]
