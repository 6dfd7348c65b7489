"""Sweeps: a grid of points → one row each in a CSV, resumable, on one machine or on a cluster.

A sweep runs through joblib, so the same call goes to many processes or machines inside a context that says so::

    with joblib.parallel_config(backend="dask"):      # after distributed.Client("scheduler:8786")
        run_sweep(experiment.measure, points, "figures/sweep.csv")

and likewise with ``backend="ray"`` after ``ray.util.joblib.register_ray()``. Workers import this package, and read the
checkpoint and the data set at the same paths.
"""

import csv
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from tqdm.auto import tqdm

from ..files import written_whole

Point = Mapping[str, str | int | float | bool]


def run_sweep(function: Callable[..., Mapping[str, Any]], points: Sequence[Point], path: str | Path, progress: bool = True) -> pd.DataFrame:
    """Call ``function(**point)`` for each point that has no row in the CSV yet, and return the rows of all points in order.

    A row is the point and what the function returned; it is appended when its point is done, so an interrupted sweep loses
    only the points in flight. A file that does not fit is copied to ``NAME.aside-1.csv`` with a warning, and then
    begun anew if it has other columns, or repaired if lines are cut off. One process at a time may write to a file.

    Parameters
    ----------
    function : must be picklable where joblib uses processes
    points : plain values under the same names in each; equal points are computed once
    path : the CSV
    progress : whether to show a bar, with the time that is left

    Raises
    ------
    ValueError : no points, or points whose names differ
    """
    path = Path(path)
    if not points:
        raise ValueError("points is empty, expected at least one")
    keys = list(points[0])
    for point in points:
        if list(point) != keys:
            raise ValueError(f"a point has {', '.join(point)}, expected the names of the first point, {', '.join(keys)}")
    by_text = {_text(point.values()): point for point in points}
    header, rows = _read(path)
    if header and header[: len(keys)] != keys:
        _set_aside(path, f"it has the columns {', '.join(header)}, expected {', '.join(keys)} and results. It is begun anew")
        path.unlink()
        header, rows = [], []
    done = {tuple(row[: len(keys)]) for row in rows}
    missing = [point for text, point in by_text.items() if text not in done]
    with tqdm(total=len(by_text), initial=len(by_text) - len(missing), desc=path.stem, unit="point", disable=not progress) as bar:
        for row in _results(function, missing):
            if header != list(row):
                if header:
                    _set_aside(path, f"it has the columns {', '.join(header)}, expected {', '.join(row)}. It is begun anew")
                header = list(row)
                with written_whole(path) as partial:
                    partial.write_text(_line(header), encoding="utf-8")
            with open(path, "a", encoding="utf-8", newline="") as file:
                file.write(_line(row.values()))
                file.flush()
                os.fsync(file.fileno())
            bar.update()
    header, rows = _read(path)
    line = {tuple(row[: len(keys)]): i for i, row in enumerate(rows)}
    if any(text not in line for text in by_text):  # a file with other results was set aside on the way
        return run_sweep(function, points, path, progress)
    return pd.read_csv(path).iloc[[line[text] for text in by_text]].reset_index(drop=True)


def _results(function: Callable[..., Mapping[str, Any]], points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Point and result together, as they are done, by joblib's active backend."""
    calls = [joblib.delayed(_call)(function, point) for point in points]
    try:
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
    except ValueError as error:
        if "return_as" not in str(error):
            raise
        # Backends on multiprocessing, Ray's among them, return whole lists only: one slice at a time.
        parallel = joblib.Parallel(batch_size=1)
        width = joblib.effective_n_jobs(parallel.n_jobs)
        for i in range(0, len(calls), width):
            yield from parallel(calls[i : i + width])


def _call(function: Callable[..., Mapping[str, Any]], point: Point) -> dict[str, Any]:
    return {**point, **function(**point)}


def _text(values) -> tuple[str, ...]:
    """Values as a CSV holds them."""
    return tuple("" if value is None else str(value) for value in values)


def _line(values) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(_text(values))
    return buffer.getvalue()


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV, as text; lines that are cut off are taken out of the file."""
    if not path.exists() or not path.stat().st_size:
        return [], []
    text = path.read_text(encoding="utf-8")
    header, *rows = csv.reader(io.StringIO(text))
    whole = [row for row in rows if len(row) == len(header)]
    if rows and not text.endswith("\n") and whole and whole[-1] is rows[-1]:
        whole.pop()  # all its fields are there, but the last one may be cut
    if len(whole) < len(rows):
        _set_aside(path, f"{len(rows) - len(whole)} of its {len(rows)} lines are cut off. They are taken out")
        with written_whole(path) as partial:
            partial.write_text("".join(map(_line, [header, *whole])), encoding="utf-8")
    return header, whole


def _set_aside(path: Path, reason: str) -> None:
    n = 1
    while (aside := path.with_name(f"{path.stem}.aside-{n}{path.suffix}")).exists():
        n += 1
    shutil.copy2(path, aside)
    warnings.warn(f"{path}: {reason}; the old file is kept as {aside.name}", stacklevel=3)
