"""What the builder of TensorRT may use, and what the times of its engines depend on.

Engines of a table, of `sluice bench`, `serve` and `export --engine` are built with the settings in the environment
variable `VARIABLE`, such as ``SLUICE_TENSORRT="level=4,workspace=2048"``: a process has one device and one builder, and
every way to an engine leads through it. They are part of a table's fingerprint, so no table mixes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sluice.core.errors import SluiceError

__all__ = ["VARIABLE", "Settings"]

VARIABLE = "SLUICE_TENSORRT"
NAMES = {
    "workspace": "workspace_mib", "level": "optimization_level", "streams": "aux_streams", "timings": "timings",
}  # fmt: skip

LEVELS = range(6)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the builder may use: MiB of scratch memory (None: all), optimization level 0 to 5 (None: TensorRT's).

    ``aux_streams`` are those beside the first (rule 8). ``timings`` is how often the builder times a kernel that it may
    choose.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    aux_streams: int = 0
    timings: int = 8

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise SluiceError(f"cannot build with workspace_mib={self.workspace_mib}; give 1 or more")
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise SluiceError(f"there is no optimization level {self.optimization_level}; give 0 to {LEVELS[-1]}")
        if self.aux_streams < 0 or self.timings < 1:
            raise SluiceError(
                f"cannot build with aux_streams={self.aux_streams} and timings={self.timings}; "
                f"give 0 streams or more, and 1 timing or more"
            )

    def __str__(self) -> str:
        """What the times of engines depend on, for fingerprints."""
        level = "" if self.optimization_level is None else f"level {self.optimization_level}, "
        scratch = "" if self.workspace_mib is None else f"{self.workspace_mib} MiB, "
        return f"{level}{scratch}streams {1 + self.aux_streams}, timings {self.timings}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings in `VARIABLE`, the usual ones where it is not set.

        ``workspace`` is MiB, ``level`` 0 to 5, ``streams`` those beside the first, ``timings`` a count.

        Raises:
            SluiceError: it holds something else.
        """
        found: dict[str, int] = {}
        for word in environment.get(VARIABLE, "").replace(",", " ").split():
            name, _, value = word.partition("=")
            if name not in NAMES or not value.isdecimal() or NAMES[name] in found:
                raise SluiceError(
                    f"{VARIABLE} holds {word!r}; give {', '.join(NAMES)}, each at most once, as level=4,streams=0"
                )
            found[NAMES[name]] = int(value)
        return cls(**found)

    def trtexec(self) -> list[str]:
        """The same as options of ``trtexec``."""
        options = [f"--maxAuxStreams={self.aux_streams}", f"--avgTiming={self.timings}"]
        if self.optimization_level is not None:
            options.append(f"--builderOptimizationLevel={self.optimization_level}")
        if self.workspace_mib is not None:
            options.append(f"--memPoolSize=workspace:{self.workspace_mib}M")
        return options
