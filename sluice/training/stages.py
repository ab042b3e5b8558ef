"""What a run has done is kept, so that the same command goes on there after a crash.

1. A *stage* is arrays and words by a name, one safetensors file in the folder ``<out>.unfinished``, which goes when the
   result is saved.
2. It counts for the same command alone: a file holds a digest of the package's version, the weights, the arguments and
   the form of the first batch. The values of the batches are not compared.
3. With every stage lie the states of the generators of random numbers, torch's on the CPU, numpy's and Python's, and
   they are set where it is found. So what follows draws what it would have drawn. A generator that a loader has to
   itself is the user's.
4. A stage that cannot be written is not kept, and a file that cannot be read is not found: keeping costs no run.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically

__all__ = ["NOTHING", "Stage", "Stages", "described", "seeded", "unfinished_beside", "weights_of"]

OF_TORCH, OF_NUMPY = "generator.torch", "generator.numpy"


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Arrays by name, and words: anything that JSON holds."""

    arrays: Mapping[str, np.ndarray]
    words: Any = None


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one command; without a ``folder`` nothing is kept.

    ``about`` is the digest of rule 2, and ``say`` is told the name of a stage that was found.
    """

    folder: Path | None = None
    about: str = ""
    say: Callable[[str], None] = field(default=lambda name: None, compare=False)

    def for_(self, *more: object) -> Stages:
        """The stages of a part of the command, as of one budget among several."""
        return replace(self, about=_digest([self.about, *map(described, more)]))

    def keep(self, name: str, stage: Stage) -> None:
        if self.folder is None:
            return
        from safetensors.numpy import save

        arrays = {key: np.array(value, order="C") for key, value in stage.arrays.items()}
        state: Any = np.random.get_state(legacy=True)
        kind, keys, *rest = state
        arrays |= {OF_TORCH: torch.get_rng_state().numpy(), OF_NUMPY: keys}
        words = {"stage": stage.words, "numpy": [str(kind), *rest], "python": random.getstate()}
        content = save(arrays, {"about": self.about, "words": json.dumps(words)})
        with suppress(SluiceError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{name}.safetensors", content)

    def find(self, name: str) -> Stage | None:
        """The stage, if it was kept; the generators of random numbers are set as they were then."""
        if self.folder is None or not (self.folder / f"{name}.safetensors").is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / f"{name}.safetensors", "np") as file:
                told = file.metadata()
                if told["about"] != self.about:
                    return None
                arrays = {key: file.get_tensor(key) for key in list(file.keys())}
            words = json.loads(told["words"])  # losses may be infinite
            _set_generators(arrays.pop(OF_TORCH), arrays.pop(OF_NUMPY), words["numpy"], words["python"])
        except (SafetensorError, ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError):
            return None
        self.say(name)
        return Stage(arrays, words["stage"])

    def end(self) -> None:
        """The result is saved: remove the folder."""
        if self.folder is not None and not self.folder.is_symlink():
            for file in self.folder.glob("*.safetensors"):
                file.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()


NOTHING = Stages()


def unfinished_beside(out: Path) -> Path:
    """The folder of the stages of what will be saved in ``out``."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of torch, numpy and Python from this seed; those of the caller go on afterwards.

    Raises:
        SluiceError: it is no seed.
    """
    if seed is None:
        yield
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SluiceError(f"seed={seed!r} is no seed; give a whole number of 0 or more, below 2**32")
    numpy_before, python_before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
        finally:
            np.random.set_state(numpy_before)
            random.setstate(python_before)


def described(value: object) -> Any:
    """A value as JSON that is equal in every process: tensors by form, functions by name and code."""
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(described(getattr(value, each.name)) for each in fields(value))]
    if isinstance(value, Tensor):
        return [str(value.dtype), *value.shape]
    if isinstance(value, Mapping):
        return [[str(key), described(each)] for key, each in value.items()]
    if isinstance(value, (tuple, list)):
        return [described(each) for each in value]
    if callable(value):
        code = getattr(value, "__code__", None)
        own = "" if code is None else hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()
        return [getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__), own]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def weights_of(model: nn.Module) -> str:
    """A digest of all tensors of a module and of its class."""
    found = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(json.dumps([name, described(tensor)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _set_generators(of_torch: np.ndarray, keys: np.ndarray, of_numpy: Any, of_python: Any) -> None:
    """All of them, or an error before the first one."""
    version, inner, gauss = of_python
    kind, *rest = of_numpy
    drawn = random.Random()
    drawn.setstate((version, tuple(inner), gauss))
    np.random.RandomState().set_state((kind, keys, *rest))
    torch.set_rng_state(torch.from_numpy(of_torch.copy()))
    np.random.set_state((kind, keys, *rest))
    random.setstate(drawn.getstate())
