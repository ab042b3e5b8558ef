"""A driver and a TensorRT that exist in memory: engines compute by ONNX's reference evaluator, time is counted.

Device memory is bytes at made-up addresses, and an engine reads and writes the addresses that it was given. So what is
copied to a wrong place, or never, shows as wrong numbers. An inference takes ``ms`` on the device's clock, and more as
often as it has not been warmed up; a graph never less than its launch.

As in the real one, the first logger that is given is used by all, and is not kept alive for that. A context that
manages no memory of its own runs only with as much as its engine wants.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from sluice.core.errors import SluiceError
from sluice.runtime.trt.inspect import node_name

__all__ = ["MS", "FakeCuda", "fake_tensorrt"]

MS = 0.25
COLD_MS = 40.0
SCRATCH = 768
WARM_AFTER = 2
FIRST_ADDRESS = 4096
VECTORS = "in vectors of 8"  # the mark of an input or output whose format was asked for
KINDS = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.DOUBLE: "DOUBLE",
}
DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "DOUBLE": np.float64,
}


class FakeCuda:
    """The calls of `sluice.runtime.base.cuda.Cuda`; ``log`` names them in order."""

    def __init__(self, capturable: bool = True, room: int = 1 << 30, ms: float = MS, launch_ms: float = 0.0) -> None:
        self.capturable, self.room, self.ms, self.launch_ms = capturable, room, ms, launch_ms
        self.log: list[str] = []
        self.memory: dict[int, bytearray] = {}
        self.alive: set[int] = set()
        self.next = FIRST_ADDRESS
        self.now = 0.0
        self.recorded: dict[int, float] = {}
        self.pending: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}

    def _handle(self, what: str) -> int:
        self.log.append(what)
        self.next += FIRST_ADDRESS
        self.alive.add(self.next)
        return self.next

    def _destroy(self, what: str, handle: int) -> None:
        self.log.append(what)
        self.alive.remove(handle)

    def malloc(self, count: int) -> int:
        if count > self.room:
            raise SluiceError("cudaMalloc failed with CUDA error 2 (out of memory); free memory of the device")
        address = self._handle("malloc")
        self.memory[address] = bytearray(count)
        return address

    def free(self, address: int) -> None:
        self._destroy("free", address)
        del self.memory[address]

    def stream(self) -> int:
        return self._handle("stream")

    def destroy_stream(self, stream: int) -> None:
        self._destroy("destroy_stream", stream)

    def event(self) -> int:
        return self._handle("event")

    def destroy_event(self, event: int) -> None:
        self._destroy("destroy_event", event)

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        self.log.append("upload")
        content = array.tobytes()
        self._later(lambda: self._store(address, content))

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        self.log.append("download")
        self._later(lambda: np.copyto(array, np.frombuffer(self.memory[address], array.dtype).reshape(array.shape)))

    def _store(self, address: int, content: bytes) -> None:
        assert len(content) == len(self.memory[address])
        self.memory[address][:] = content

    def _later(self, work: Callable[[], None]) -> None:
        (self.pending if self.capturing is None else self.capturing).append(work)

    def synchronize(self, stream: int) -> None:
        assert stream in self.alive and self.capturing is None
        self.log.append("synchronize")
        self._drain()

    def _drain(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def record(self, event: int, stream: int) -> None:
        assert {event, stream} <= self.alive
        self.log.append("record")
        self._later(lambda: self.recorded.update({event: self.now}))

    def elapsed_ms(self, start: int, end: int) -> float:
        self._drain()
        return self.recorded[end] - self.recorded[start]

    def begin_capture(self, stream: int) -> None:
        assert not self.pending, "work was under way"
        self.log.append("begin_capture")
        self.capturing = []

    def end_capture(self, stream: int) -> int:
        assert self.capturing is not None
        work, self.capturing = self.capturing, None
        if not self.capturable:
            self.log.append("end_capture failed")
            raise SluiceError(
                "cudaStreamEndCapture failed with CUDA error 901 (operation failed due to a previous error)"
            )
        graph = self._handle("end_capture")
        self.graphs[graph] = work
        return graph

    def launch(self, graph: int, stream: int) -> None:
        assert {graph, stream} <= self.alive
        self.log.append("launch")

        def replay() -> None:
            before = self.now
            for work in self.graphs[graph]:
                work()
            self.now = max(self.now, before + self.launch_ms)

        self.pending.append(replay)

    def destroy_graph(self, graph: int) -> None:
        self._destroy("destroy_graph", graph)


def fake_tensorrt(
    cuda: FakeCuda | None = None,
    version: str = "11.4.0.106",
    name: str = "tensorrt",
    *,
    starts: bool = True,
    errors: Sequence[SimpleNamespace] = (),
    build_error: str = "",
    load_error: str = "",
    runs: Callable[[int], bool] = lambda count: True,
    location: str = "DEVICE",
) -> ModuleType:
    """The module; ``calls`` of what it returns says what the builder was told. The arguments put in faults."""
    calls: dict[str, Any] = {"caches": [], "builders": 0, "builds": 0}
    registered: list[weakref.ref[ILogger]] = []
    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    class ILogger:
        Severity = severity

        def log(self, severity: int, message: str) -> None:
            raise AssertionError("a logger must say what it does with messages")

    def say(severity: int, message: str) -> None:
        first = registered[0]()
        assert first is not None, "the logger was freed"
        first.log(severity, message)

    class Cache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> memoryview:
            calls["serialized"] = calls.get("serialized", 0) + 1
            return memoryview(self.content)

    class Config:
        def __init__(self) -> None:
            self.cache = Cache(b"")

        def create_timing_cache(self, content: bytes) -> Cache | None:
            calls["caches"].append(content)
            if content.startswith(b"broken"):
                say(severity.ERROR, "the timing cache is broken")
                return None
            return Cache(content)

        def set_timing_cache(self, cache: Cache | None, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if cache is None:
                raise TypeError("set_timing_cache(): incompatible function arguments")
            if cache.content.startswith(b"foreign"):
                say(severity.ERROR, "the timing cache is foreign")
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> Cache:
            return self.cache

        def set_flag(self, flag: str) -> None:
            calls.setdefault("builder_flags", []).append(flag)

        def set_compute_capability(self, capability: str, index: int) -> None:
            calls.setdefault("capabilities", []).append((capability, index))

        def set_memory_pool_limit(self, pool: str, size: int) -> None:
            calls[pool] = size

        def __setattr__(self, key: str, value: Any) -> None:
            calls[key] = value
            object.__setattr__(self, key, value)

    class Builder:
        def __init__(self, log: ILogger) -> None:
            registered.append(weakref.ref(log))
            if not starts:
                say(severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            calls["builders"] += 1

        def create_network(self, flags: int) -> SimpleNamespace:
            calls["flags"] = flags
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> memoryview | None:
            calls["builds"] += 1
            ports = (*network.inputs, *network.outputs) if network.num_inputs else ()
            calls["formats"] = {port.name: port.allowed_formats for port in ports if port.allowed_formats}
            model = onnx.ModelProto()
            model.CopyFrom(network.model)
            for info in (*model.graph.input, *model.graph.output):
                if info.name in calls["formats"]:
                    info.doc_string = VECTORS
            if build_error:
                say(severity.WARNING, "this is no reason")
                say(severity.ERROR, build_error)
                return None
            content = model.SerializeToString()
            entry = f"[{hash(content) % 1000}]".encode()
            if entry not in config.cache.content:
                config.cache.content += entry
            return memoryview(content)

    class Network:
        model: onnx.ModelProto

        def __init__(self) -> None:
            self.num_inputs = self.num_outputs = 0

        def take(self, model: onnx.ModelProto) -> None:
            self.model = model
            self.inputs, self.outputs = ([port(i) for i in side] for side in (model.graph.input, model.graph.output))
            self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)

        def get_input(self, index: int) -> SimpleNamespace:
            return self.inputs[index]

        def get_output(self, index: int) -> SimpleNamespace:
            return self.outputs[index]

    def port(info: onnx.ValueInfoProto) -> SimpleNamespace:
        kind = info.type.tensor_type
        name = KINDS[kind.elem_type]
        return SimpleNamespace(
            name=info.name,
            dtype=SimpleNamespace(name=name),
            shape=tuple(dim.dim_value for dim in kind.shape.dim),
            allowed_formats=0,
        )

    class OnnxParser:
        def __init__(self, network: Network, log: ILogger) -> None:
            self.network = network
            self.num_errors = len(errors)

        def parse(self, content: bytes) -> bool:
            self.network.take(onnx.load_model_from_string(content))
            return not errors

        def get_error(self, index: int) -> SimpleNamespace:
            return errors[index]

    class Runtime:
        def __init__(self, log: ILogger) -> None:
            registered.append(weakref.ref(log))

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            if load_error:
                say(severity.ERROR, load_error)
                return None
            return Engine(onnx.load_model_from_string(plan))

    class Engine:
        def __init__(self, model: onnx.ModelProto) -> None:
            self.model = model
            self.infos = [*model.graph.output, *model.graph.input]
            self.num_io_tensors = len(self.infos)
            self.device_memory_size_v2 = SCRATCH

        def info(self, name: str) -> onnx.ValueInfoProto:
            return next(info for info in self.infos if info.name == name)

        def get_tensor_name(self, index: int) -> str:
            return self.infos[index].name

        def get_tensor_dtype(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(name=KINDS[self.info(name).type.tensor_type.elem_type])

        def get_tensor_location(self, name: str) -> str:
            return location

        def get_tensor_vectorized_dim(self, name: str) -> int:
            return 1 if self.info(name).doc_string == VECTORS else -1

        def get_tensor_components_per_element(self, name: str) -> int:
            return 8 if self.info(name).doc_string == VECTORS else -1

        def get_tensor_mode(self, name: str) -> str:
            return "OUTPUT" if name in {info.name for info in self.model.graph.output} else "INPUT"

        def create_execution_context(self, given: Any = "STATIC") -> Context | None:
            if isinstance(given, RuntimeConfig):
                assert given.cache is not None
                given.cache.content += b"[kernels]"
                given = given.strategy
            return Context(self, given)

        def create_runtime_config(self) -> RuntimeConfig:
            assert "rtx" in name
            return RuntimeConfig()

        def create_engine_inspector(self) -> SimpleNamespace:
            nodes = self.model.graph.node
            layers = [{"Name": n.output[0], "Metadata": f"[ONNX Layer: {node_name(n)}]"} for n in nodes]
            return SimpleNamespace(get_engine_information=lambda layout: json.dumps({"Layers": layers, "as": layout}))

    class RuntimeConfig:
        cache: RuntimeCache | None = None
        strategy = "STATIC"

        def create_runtime_cache(self) -> RuntimeCache:
            calls["runtime caches"] = calls.get("runtime caches", 0) + 1
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> None:
            self.cache = cache

        def set_execution_context_allocation_strategy(self, strategy: str) -> None:
            self.strategy = strategy

    class RuntimeCache:
        content = b""

        def deserialize(self, content: bytes) -> bool:
            self.content = content
            return not content.startswith(b"foreign")

        def reset(self) -> None:
            self.content = b""

        def serialize(self) -> memoryview:
            return memoryview(self.content)

    class Context:
        def __init__(self, engine: Engine, strategy: str) -> None:
            self.engine, self.addresses = engine, dict[str, int]()
            self.count = self.done = 0
            self.lacks = SCRATCH if strategy == "USER_MANAGED" else 0

        def get_tensor_shape(self, name: str) -> list[int]:
            dims = self.engine.info(name).type.tensor_type.shape.dim
            return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]

        def set_device_memory(self, memory: int, size: int) -> None:
            assert cuda is not None and len(cuda.memory[memory]) == size
            self.lacks -= size

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert cuda is not None
            cuda.log.append(f"address of {name}")
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert cuda is not None and stream in cuda.alive
            assert self.lacks <= 0, "no scratch memory"
            self.count += 1
            cuda.log.append("enqueue")
            if not runs(self.count):
                return False
            cuda._later(self.compute)
            return True

        def compute(self) -> None:
            assert cuda is not None
            feeds = {info.name: self.array(info.name) for info in self.engine.model.graph.input}
            names = [info.name for info in self.engine.model.graph.output]
            for name, value in zip(names, ReferenceEvaluator(self.engine.model).run(names, feeds), strict=True):
                cuda._store(self.addresses[name], np.asarray(value).astype(self.dtype(name)).tobytes())
            self.done += 1
            cuda.now += cuda.ms if self.done > WARM_AFTER else COLD_MS

        def dtype(self, name: str) -> np.dtype:
            return np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name])

        def array(self, name: str) -> np.ndarray:
            assert cuda is not None
            return np.frombuffer(cuda.memory[self.addresses[name]], self.dtype(name)).reshape(
                self.get_tensor_shape(name)
            )

    module = ModuleType(name)
    module.__dict__.update(
        __version__=version,
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        BuilderFlag=SimpleNamespace(**{"REQUIRE_USER_ALLOCATION": "user_allocation"} if "rtx" in name else {}),
        **({"ComputeCapability": SimpleNamespace(CURRENT="current")} if "rtx" in name else {}),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        TensorFormat=SimpleNamespace(HWC=1, HWC8=2, HWC16=3),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        TensorLocation=SimpleNamespace(DEVICE="DEVICE"),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        LayerInformationFormat=SimpleNamespace(JSON="JSON"),
        calls=calls,
    )
    return module
