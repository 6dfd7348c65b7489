"""Files that are written whole or not at all, checksums that detect damage, and the folders for the results of a run."""

import hashlib
import importlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pandas as pd
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("cifar10", "digits")
PROFILES = ("quick", "full")
PATIENCE = 10.0  # seconds to wait for another process that writes to the same place
_SEAL, _END = b"SHA-256 ", b"PK\x05\x06"  # _END begins the last record of a zip archive, which ends with the length of a comment
_SEAL_LENGTH = len(_SEAL) + 64


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` when the block ends without an error.

    A process killed in between leaves the old file or none, never half of the new one. Of two processes that write at once, the file
    of one is left. A symbolic link keeps pointing to its file, and the file keeps its mode.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    partial.touch(exist_ok=False)
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing to `path`, a file or a folder, while the block runs. A killed process releases the lock.

    Raises
    ------
    RuntimeError : another process writes to it and does not finish within `PATIENCE` seconds
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire(timeout=PATIENCE)
    except Timeout as error:
        raise RuntimeError(f"another process is writing to {path}, expected one at a time: wait until it finishes") from error
    with lock:
        yield


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as a CSV, whole or not at all."""
    with written_whole(path) as partial:
        table.to_csv(partial, index=False)


def sealed(archive: bytes) -> bytes:
    """Add to a zip archive, such as torch.save makes, the SHA-256 of its bytes as its comment, which other readers skip."""
    seal = _SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def unsealed(path: str | Path) -> tuple[bytes, bool]:
    """A file's bytes as they were before `sealed`, and whether they were sealed. If not, damage may go unnoticed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a sealed file that was altered, or a zip archive that was cut off
    """
    path = Path(path)
    data = path.read_bytes()
    if data[-_SEAL_LENGTH:].startswith(_SEAL):
        archive = data[: -_SEAL_LENGTH - 2] + bytes(2)
        if sealed(archive) == data:
            return archive, True
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one written with it")
    end = data.rfind(_END)
    if data.startswith(b"PK") and (end < 0 or data[end + 20 :] != bytes(2)):  # an archive without a comment ends there
        raise ValueError(f"{path} is truncated or damaged: its end is not the one that was written")
    return data, False


def results_folder(dataset: str, profile: str) -> Path:
    """The folder for figures, checkpoints and executed notebooks of a run. CIFAR-10 at ``full`` updates the results in the repository. Any
    other run is kept apart in ``build/``, so that an experiment never replaces a committed result."""
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}, expected one of {', '.join(PROFILES)}")
    return ROOT if (dataset, profile) == ("cifar10", "full") else ROOT / "build" / f"{dataset}-{profile}"


def fingerprint(path: str | Path) -> str:
    """The file's stem and the first 8 digits of the SHA-256 of its content. Results record with it what they were made from."""
    return f"{Path(path).stem} {hashlib.sha256(unsealed(path)[0]).hexdigest()[:8]}"


def required(module: str, extra: str) -> ModuleType:
    """Import a module that comes with an extra of this package.

    Raises
    ------
    ImportError : it is not installed; the message names the extra that installs it
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} is not installed, expected it here: pip install -e '.[{extra}]' brings it") from error
