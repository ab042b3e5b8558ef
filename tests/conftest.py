"""What tests have in common is made once.

What is the same at every export is worked out once per process. Files that many tests read are shared by the processes
of a run (`tests.shared`). What stays until the end is not searched for garbage.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.shared import FOLDER

CYCLES = (50_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    """Workers have the environment of the process that starts them."""
    if not hasattr(config, "workerinput") and FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="sluice-tests-")
        os.environ[FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(FOLDER))


def pytest_collection_finish() -> None:
    """Modules stay until the end, and exports make objects by the million, few of them in cycles.

    To search all of them again and again took a fifth of the time of tests that export, and a collection that a test
    asks for took a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*CYCLES)


@pytest.fixture(autouse=True, scope="module")
def what_other_modules_left_is_not_searched() -> None:
    """Compressing a file collects between its stages, which took seconds where thousands of tests had gone before."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def exporters_read_their_operators_once() -> Iterator[None]:
    """For each export torch.onnx reads the sources of 500 ONNX Script functions anew, and torch lists its operators.

    That is a third of the time which the export of a small network takes. Nothing adds operators while tests run, and
    every export has its own copy of what was read.
    """
    if "sluice.passes.graph.capture" not in sys.modules:  # no collected test exports
        yield
        return
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **options: Any) -> ONNXRegistry:
        known = read.cache_info().currsize
        registry = copy.copy(read(*args, **options))
        if read.cache_info().currsize > known:
            gc.freeze()
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        yield
