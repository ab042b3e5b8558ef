"""A job: one file that carries a network, how to profile it, and the code that does so, to a device without torch.

The device cannot be asked later, so a job fills a complete table (`sluice.profiler.survey`, 3). A zip file, which
Python itself can run (``python job.zip -o table.db``):

    job.json        settings (`Job`), and the version of the format
    model.onnx      the dense network with its parameter names, fp32
    table.db        the points that are known already, if there are any
    __main__.py     puts ``site`` first on the path and starts `sluice.profiler.agent`
    site/           sluice's own torch-free sources, onnx-graphsurgeon, and the licences of both

1. The device needs Python, numpy, onnx and a runtime. Both packages under ``site`` are pure Python and are imported
   from inside the zip file; nothing is unpacked, and code comes only from this file and from the packages that the
   device has installed. A job runs with the rights of the user who starts it, so run jobs of your own.
2. The same network and settings give the same bytes.
3. A file that is damaged, foreign, or of a newer format is refused in one sentence, before anything is measured.
"""

from __future__ import annotations

import ast
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from sluice.core.deployment import Deployment
from sluice.core.errors import SluiceError
from sluice.core.files import JOB, check_output, write_atomically
from sluice.core.schema import Misfit, parse, typed
from sluice.profiler.table.fingerprint import difference
from sluice.profiler.table.latency_table import LatencyTable
from sluice.solver.options import check_methods

__all__ = ["SITE", "Job", "known_table", "read_job", "write_job"]

VERSION = 1
SITE = "site"
DEPLOYMENT = ("target", "batch", "threads", "precision")  # how a device is reached is no business of a job
SETTINGS, MODEL, TABLE, MAIN = "job.json", "model.onnx", "table.db", "__main__.py"
MAX_BYTES = 2**31  # of one ONNX file, and so of anything in here
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first date that a zip file can say

MAIN_SOURCE = f'''"""Profile the network in this file on this device: python FILE.zip -o TABLE.db"""

import sys

if sys.version_info < (3, 11):
    sys.exit("sluice: error: a job needs Python 3.11 or later, not %d.%d; run it with that" % sys.version_info[:2])
sys.path.insert(0, sys.path[0] + "/{SITE}")
try:
    from sluice.core.stdout import keep_stdout
    from sluice.profiler.agent import main
except ModuleNotFoundError as error:
    sys.exit("sluice: error: %s; a job needs numpy, onnx and the runtime, install them on this device" % error)

keep_stdout()
sys.exit(main([sys.path[1], *sys.argv[1:]]))
'''


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of `sluice.profiler.profile.profile_onnx` that do not depend on the device, without the model."""

    deployment: Deployment = field(default_factory=Deployment)
    methods: tuple[str, ...] = ("filter",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if self.deployment.address:
            raise SluiceError(
                f"a job is run on the device itself, not at {self.deployment.address}; pack it for the target "
                f"{self.deployment.target}, or profile over the network without a job"
            )

    def settings(self) -> dict[str, Any]:
        """What ``job.json`` holds but the version of the format, all on one level."""
        deployment = {name: getattr(self.deployment, name) for name in DEPLOYMENT}
        return {**deployment, "methods": self.methods, "exclude": self.exclude}


def write_job(path: str | Path, model: onnx.ModelProto, job: Job, table: bytes | None = None) -> int:
    """Write the job file, whole or not at all; its size in bytes.

    Raises:
        SluiceError: another kind of file is there, or it cannot be written.
    """
    check_output(path, {}, JOB)  # a job that was cut off may go
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        settings = {"format": VERSION, **job.settings()}
        entries: list[tuple[str, bytes]] = [
            (MAIN, MAIN_SOURCE.encode()),
            (SETTINGS, json.dumps(settings, indent=2, sort_keys=True).encode()),
            *((f"{SITE}/{name}", data) for name, data in _code()),
        ]
        for name, data in entries:
            file.writestr(zipfile.ZipInfo(name, LONG_AGO), data, zipfile.ZIP_DEFLATED)
        # Weights do not get smaller.
        file.writestr(zipfile.ZipInfo(MODEL, LONG_AGO), model.SerializeToString(deterministic=True))
        if table is not None:
            file.writestr(zipfile.ZipInfo(TABLE, LONG_AGO), table, zipfile.ZIP_DEFLATED)
    write_atomically(path, content.getvalue())
    return len(content.getvalue())


def read_job(path: str | Path) -> tuple[Job, onnx.ModelProto, bytes | None]:
    """The settings of a job file, its network and the table that it carries, if any.

    Raises:
        SluiceError: the file cannot be read, is damaged, is no job, or is one of a newer format.
    """
    name = str(path)
    try:
        with zipfile.ZipFile(name) as file:
            inside = _checked_names(file, name)
            job = _settings(file.read(SETTINGS), name)
            data = file.read(MODEL)
            table = file.read(TABLE) if TABLE in inside else None
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise SluiceError(f"cannot read {name!r}: {error.strerror or error}; give the path of a job") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise SluiceError(f"{name!r} is not a job or is damaged ({error}); pack it again, or copy it again") from None
    except Exception as error:  # protobuf's and zlib's errors share no public base class
        if isinstance(error, SluiceError):
            raise
        raise SluiceError(f"the job {name!r} is damaged ({error}); pack it again, or copy it again") from None
    return job, model, table


def known_table(path: str | Path, job: Job) -> bytes:
    """The latency table at ``path``, for a job with the same settings.

    Raises:
        SluiceError: it cannot be read, or was measured with other settings. The device may be any.
    """
    with LatencyTable.open(path) as table:
        there = table.fingerprint
    d = job.deployment
    wanted = replace(there, runtime=d.target, threads=d.threads, precision=d.precision, batch=d.batch)
    if differences := difference(there, wanted):
        raise SluiceError(
            f"the table {str(path)!r} does not fit the job: {'; '.join(differences)}; pack under those conditions"
        )
    return Path(path).read_bytes()


def _checked_names(file: zipfile.ZipFile, name: str) -> set[str]:
    """The names in the file, checked to be those of a job: plain relative paths, each once."""
    found: set[str] = set()
    for entry in file.infolist():
        path = PurePosixPath(entry.filename)
        known = entry.filename in (SETTINGS, MODEL, TABLE, MAIN) or path.parts[:1] == (SITE,)
        plain = not path.is_absolute() and ".." not in path.parts and "\\" not in entry.filename
        if not known or not plain or entry.filename in found or entry.file_size >= MAX_BYTES:
            raise SluiceError(f"{name!r} holds {entry.filename!r}, which no job does; pack it again with this release")
        found.add(entry.filename)
    missing = [part for part in (SETTINGS, MODEL) if part not in found]
    if missing:
        raise SluiceError(
            f"{name!r} is not a job, it holds no {missing[0]}; give a file that `sluice profile --pack` made"
        )
    return found


@dataclass(frozen=True, slots=True)
class _Settings:
    """The schema of ``job.json``."""

    format: int
    target: str
    batch: int
    threads: int
    precision: str
    methods: tuple[str, ...]
    exclude: tuple[str, ...]


def _settings(text: bytes, name: str) -> Job:
    try:
        values = parse(text)
        version = values.get("format") if isinstance(values, dict) else None
        if type(version) is int and version > VERSION:
            raise SluiceError(
                f"{name!r} is a job of version {version}, this program knows up to {VERSION}; use a newer release of "
                "sluice"
            )
        found: _Settings = typed(_Settings, values)
    except Misfit as error:
        raise SluiceError(f"the settings of the job {name!r} are none: {error}; pack it again") from None
    if found.format != VERSION:
        raise SluiceError(f"{name!r} is a job of version {found.format}, which there never was; pack it again")
    return Job(Deployment(found.target, found.batch, found.threads, found.precision), found.methods, found.exclude)


def _code() -> Iterator[tuple[str, bytes]]:
    """Paths under ``site`` and their contents."""
    import onnx_graphsurgeon

    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        if "torch" not in _imported(data):
            yield f"sluice/{path.relative_to(root).as_posix()}", data
    yield from _licences("sluice", root.parent, "torch-sluice")
    surgeon = Path(onnx_graphsurgeon.__file__).parent
    for path in sorted(surgeon.rglob("*.py")):
        yield f"onnx_graphsurgeon/{path.relative_to(surgeon).as_posix()}", path.read_bytes()
    yield from _licences("onnx_graphsurgeon", surgeon.parent, "onnx_graphsurgeon")


def _imported(source: bytes) -> set[str]:
    """Top-level packages that a module imports when it is imported."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _licences(package: str, beside: Path, distribution: str) -> Iterator[tuple[str, bytes]]:
    """The licence of an installed package, or of a checkout."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        paths = [Path(str(f.locate())) for f in files(distribution) or () if f.name.upper().startswith("LICEN")]
    except PackageNotFoundError:
        paths = [beside / "LICENSE"]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise SluiceError(
            f"the licence of {distribution} is not installed with it, so a job may not carry it; reinstall it"
        )
    for path in found:
        yield f"{package}.{path.name}", path.read_bytes()
