"""Models whose tensors lie beside them: in a file while a session is made, or in memory where there is no room."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core import weight_bytes
from sluice.core.weight_bytes import Parked, parked, weights_apart
from sluice.runtime.base.compare import assert_close
from sluice.runtime.ort.cpu import OrtRunner

MEMORY = """
import sys
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from sluice.core import weight_bytes
from sluice.core.heap import give_back_blocks
from sluice.runtime.ort.cpu import OrtRunner

def told(word):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(word))
    return int(line.split()[1]) * 1024

give_back_blocks()
rng, size = np.random.default_rng(0), 1024
def chain(layers):
    names = [f"v{k}" for k in range(layers + 1)]
    nodes = [helper.make_node("MatMul", [a, f"w{k}"], [b]) for k, (a, b) in enumerate(zip(names, names[1:]))]
    weights = [numpy_helper.from_array(rng.random((size, size), np.float32), f"w{k}") for k in range(layers)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

runner = OrtRunner(timed=sys.argv[1] == "timed")
runner.build(chain(1)).run({"v0": np.ones((1, size), np.float32)})
if sys.argv[2] == "message":
    weight_bytes.FILED = 2**40
    import sluice.runtime.ort.session
    sluice.runtime.ort.session.FILED = 2**40
model = chain(8)
start, weights = told("VmRSS"), 8 * 4 * size**2
Path("/proc/self/clear_refs").write_text("5")
session = runner.build(model)
print((told("VmHWM") - start) / weights, (told("VmRSS") - start) / weights)
"""


def model(size: int = 160, table: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((size, size)).astype(np.float32), name) for name in "vw"]
    nodes = [helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    if table:
        weights.append(numpy_helper.from_array(np.arange(table, dtype=np.int64) % size, "places"))
        nodes.append(helper.make_node("Gather", ["y", "places"], ["z"], axis=1))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, None]) for name in "xz"]
    ends[0].type.tensor_type.shape.dim[1].dim_value = size
    ends[1].name = "z" if table else "y"
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def sessions(given: onnx.ModelProto) -> tuple[ort.InferenceSession, list[bytes | str]]:
    asked, options = list[bytes | str](), ort.SessionOptions()

    def made(source: bytes | str) -> ort.InferenceSession:
        asked.append(source)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return weights_apart(given).loaded(options, made), asked


def test_a_session_reads_large_tensors_from_a_file_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model(table=2**14)
    monkeypatch.setattr(weight_bytes, "FILED", 2 * 4 * 160**2)
    session, (path,) = sessions(given)
    assert isinstance(path, str) and not Path(path).parent.exists() and not hasattr(session, "weights")
    x = np.random.default_rng(1).standard_normal((3, 160)).astype(np.float32)
    v, w, places = (numpy_helper.to_array(init) for init in given.graph.initializer)
    assert_close(session.run(None, {"x": x}), [(x @ v @ w)[:, places]], 1e-5)


def test_memory_serves_where_the_disk_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_bytes, "FILED", 1)

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    given = model()
    session, (message,) = sessions(given)
    assert isinstance(message, bytes) and set(session.weights) == {"v", "w"}
    x = np.ones((3, 160), np.float32)
    v, w = (numpy_helper.to_array(init) for init in given.graph.initializer)
    assert_close(session.run(None, {"x": x}), [x @ v @ w], 1e-5)
    assert parked(given) is given


def test_a_parked_model_lies_on_the_disk_as_long_as_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model(table=2**14)
    assert parked(given) is given  # it is small
    monkeypatch.setattr(weight_bytes, "FILED", 1)
    done = parked(given)
    assert isinstance(done, Parked)
    folder, feeds = Path(os.fspath(done)).parent, {"x": np.ones((3, 160), np.float32)}
    want = OrtRunner().build(given).run(feeds)
    assert_close(list(OrtRunner().build(done).run(feeds).values()), list(want.values()), 1e-6)
    assert folder.is_dir()
    del done
    gc.collect()
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["timed", "lean"])
def test_a_session_takes_its_weights_once(kind: str) -> None:
    def taken(way: str) -> tuple[float, float]:
        done = subprocess.run([sys.executable, "-c", MEMORY, kind, way], check=True, stdout=subprocess.PIPE, text=True)
        most, left = map(float, done.stdout.split())
        return most, left

    most, left = taken("file")
    assert most < 1.5 and left < 1.2
    most, left = taken("message")
    assert most > 1.9 and left > 1.9  # the case is one in which it matters


KILLED = """
import os, sys
import onnx
from sluice.core import weight_bytes
weight_bytes.FILED = 1
held = weight_bytes.parked(onnx.load(sys.argv[1]))
os._exit(0 if os.path.exists(held) else 1)
"""


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    onnx.save(given, tmp_path / "given.onnx")
    ran = [sys.executable, "-c", KILLED, str(tmp_path / "given.onnx")]
    subprocess.run(ran, check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    (left,) = tmp_path.glob("sluice-*/.weights.*.draft")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(weight_bytes, "FILED", 1)
    done = parked(given)
    assert not left.exists() and Path(os.fspath(done)).is_file()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)  # the folder of somebody else
    (tmp_path / f"sluice-{os.getuid()}").mkdir()
    assert parked(given) is given
