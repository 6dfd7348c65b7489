"""Files that are either whole or not there, and where the results of a run belong."""

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("cifar10", "digits")
PROFILES = ("quick", "full")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` when the block ends without an error.

    A process killed in between leaves the old file, or none, but never half of the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(table, path: str | Path) -> None:
    """Write a pandas table as a CSV, whole or not at all."""
    with written_whole(path) as partial:
        table.to_csv(partial, index=False)


def results_folder(dataset: str, profile: str) -> Path:
    """Where figures, checkpoints and executed notebooks of a run go.

    The real thing, CIFAR-10 at ``full``, refreshes what the repository holds; any other run is kept apart
    in ``build/``, so that trying something out never replaces a committed result.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}, expected one of {', '.join(PROFILES)}")
    return ROOT if (dataset, profile) == ("cifar10", "full") else ROOT / "build" / f"{dataset}-{profile}"


def fingerprint(path: str | Path) -> str:
    """The file's name and the first 8 digits of its SHA-256, by which results say what they were made from."""
    path = Path(path)
    return f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def required(module: str, extra: str) -> ModuleType:
    """Import a module that comes with an extra of this package.

    Raises
    ------
    ImportError : it is not installed; the message says which extra brings it
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{module} is not installed, expected it here: pip install -e '.[{extra}]' brings it") from error
