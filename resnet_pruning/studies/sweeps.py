"""Sweeps: compute one row of a CSV for each point, resumable, on one machine or on a cluster.

A point is an instance of a frozen dataclass. Its fields are the first columns of the CSV, and their defaults are the usual choices.
`expanded` makes a grid of points. The results for a point follow its fields in the same row.

A sweep runs through joblib. Inside one of joblib's contexts, the same call runs in many processes or on many machines::

    with joblib.parallel_config(backend="dask"):      # after distributed.Client("scheduler:8786")
        run_sweep(runs.measure, points, "figures/sweep.csv")

and likewise with ``backend="ray"`` after ``ray.util.joblib.register_ray()``. Workers import this package, and read the
checkpoint and the data set at the same paths.
"""

import csv
import dataclasses
import io
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from sklearn.model_selection import ParameterGrid
from tqdm.auto import tqdm

from ..arguments import Real
from ..files import locked, required, write_table, written_whole

Point = TypeVar("Point")


def expanded(point: Point, **choices: Iterable) -> list[Point]:
    """Copies of a point with each combination of the choices: ``expanded(point, seed=[0, 1], distance=["raw"])``.

    Raises
    ------
    ValueError : choices for fields that the point does not have, or a text instead of several choices
    """
    names = [field.name for field in dataclasses.fields(point)]
    if texts := [name for name, values in choices.items() if isinstance(values, str)]:
        raise ValueError(f"{texts[0]} is {choices[texts[0]]!r}, expected a list of choices")
    if unknown := sorted(set(choices) - set(names)):
        raise ValueError(f"choices has {', '.join(unknown)}, expected some of {', '.join(names)}")
    plain = {name: [value.item() if isinstance(value, np.generic) else value for value in values] for name, values in choices.items()}
    return [dataclasses.replace(point, **choice) for choice in ParameterGrid(plain)]


def run_sweep(
    function: Callable[[Point], Mapping[str, Any]], points: Sequence[Point], path: str | Path, progress: bool = True
) -> pd.DataFrame:
    """Call ``function(point)`` for each point that has no row in the CSV yet, and return the rows of all points in order.

    A row is the point and what the function returned. It is appended when its point is done, so an interrupted sweep loses
    only the points in flight. A file that does not fit is copied to ``NAME.aside-1.csv`` with a warning. It is then
    started anew if it has other columns or is not UTF-8 text, or repaired if lines are cut off. If the file lacks a field that has a
    default, its rows get the default. Only one process at a time writes to a file. If all points have rows, the file is only read, which
    works while another process writes to it.

    Parameters
    ----------
    function : must be picklable if joblib uses processes. It returns the same names for every point, with numbers, text or None. A table
        among them, such as ``{"epochs": DataFrame}``, goes to its own CSV, here NAME_epochs.csv, see `read_details`; it may be empty
    points : instances of one frozen dataclass, with fields of type str, int, float, bool, ``tuple[int, ...]`` or such a dataclass; equal
        points are computed once
    path : the CSV
    progress : whether to show a progress bar, with the remaining time

    Raises
    ------
    ValueError : no points; points of several kinds; a function that returns the name of a field of the point, other names than for the
        point before, or a value that a CSV cannot hold unchanged
    RuntimeError : another process writes to the file
    """
    path, kind, points = Path(path), _kind(points), list(dict.fromkeys(points))
    for point in points:
        _line(_key(point))
    done = _rows(path, kind, repair=False)
    if any(_key(point) not in done for point in points):
        done = _completed(function, points, path, kind, progress)
    return _table(points, [done[_key(point)][-1] for point in points])


def _completed(
    function: Callable[[Point], Mapping[str, Any]], points: Sequence[Point], path: Path, kind: type, progress: bool
) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Compute the points that have no row, and return `_rows` of the file."""
    columns: dict[Path, list[str]] = {}
    with locked(path):
        done = _rows(path, kind)
        n_done = sum(_key(point) in done for point in points)
        with tqdm(total=len(points), initial=n_done, desc=path.stem, unit="point", disable=not progress) as bar:
            while missing := [point for point in points if _key(point) not in done]:  # repeated if a file was set aside in the meantime
                for point, result in _results(function, missing):
                    tables = {name: value for name, value in result.items() if isinstance(value, pd.DataFrame)}
                    if len(tables) == len(result):
                        raise ValueError(f"the function returned {', '.join(result) or 'nothing'}, expected numbers or texts for a row")
                    row = _joined(point, {name: value for name, value in result.items() if name not in tables})
                    details = {name: [_joined(point, row) for row in table.to_dict("records")] for name, table in tables.items()}
                    for name, rows in details.items():
                        _append(_beside(path, name), rows, columns, kind)
                    _append(path, [row], columns, kind)
                    bar.update()
                done = _rows(path, kind)
    return done


def finished(points: Sequence[Point], path: str | Path) -> list[Point]:
    """Those of the points that have a row in the CSV, for a sweep that is run by its own command and read while it is under way."""
    done = _rows(Path(path), _kind(points), repair=False)
    return [point for point in points if _key(point) in done]


def read_details(path: str | Path, name: str, points: Sequence[Point]) -> pd.DataFrame:
    """The table `name` that a function returned for these points, after their fields. The first column of the table identifies its rows.
    The file is only read.

    Raises
    ------
    ValueError : no points, or a point without details
    """
    path, kind = _beside(Path(path), name), _kind(points)
    done = _rows(path, kind, repair=False)
    whose, rows = [], []
    for point in dict.fromkeys(points):
        if _key(point) not in done:
            raise ValueError(f"{path} has no rows for {point}, expected some: see run_sweep")
        # If a point was interrupted between its details and its row, its details were written twice.
        last = {next(iter(row.values())): row for row in done[_key(point)]}
        whose += [point] * len(last)
        rows += last.values()
    return _table(whose, rows)


def read_or_measure(path: str | Path, measure: Callable[[], pd.DataFrame], anew: bool = False, base: str = "") -> pd.DataFrame:
    """The table in a CSV. If there is no CSV, or with `anew`, the table that `measure` returns is written there first.

    `base` is the network that the table is measured on, by `files.fingerprint`, if there is one. It becomes the first column. A table of
    another network is measured again, with a warning.
    """
    path = Path(path)
    table = pd.read_csv(path) if path.exists() and not anew else None
    found = {base} if table is None or not base else set(table.get("base", ["an unknown network"]))
    if found != {base}:
        warnings.warn(f"{path} was measured on {', '.join(sorted(found))}, expected {base}: it is measured anew", stacklevel=2)
        table = None
    if table is None:
        table = measure()
        if base:
            table = table.assign(base=base)[["base", *table]]
        write_table(table, path)
        table = pd.read_csv(path)
    return table


def _kind(points: Sequence[Any]) -> type:
    kinds = {type(point) for point in points}
    if not kinds:
        raise ValueError("points is empty, expected at least one")
    if len(kinds) > 1:
        raise ValueError(f"points are of {', '.join(sorted(kind.__name__ for kind in kinds))}, expected one kind")
    return kinds.pop()


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}_{name}{path.suffix}")


def _results(function: Callable[[Point], Mapping[str, Any]], points: Sequence[Point]) -> Iterator[tuple[Point, Mapping[str, Any]]]:
    """Yield each point with its result as soon as it is done, by joblib's active backend."""
    joblib = required("joblib", "studies")
    calls = [joblib.delayed(_call)(function, point) for point in points]
    try:
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
    except ValueError as error:
        if "return_as" not in str(error):
            raise
        # Backends on multiprocessing, including Ray's, return whole lists only: compute one slice at a time.
        parallel = joblib.Parallel(batch_size=1)
        width = joblib.effective_n_jobs(parallel.n_jobs)
        for i in range(0, len(calls), width):
            yield from parallel(calls[i : i + width])


def _call(function: Callable[[Point], Mapping[str, Any]], point: Point) -> tuple[Point, Mapping[str, Any]]:
    return point, function(point)


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a point by column. A field that is a dataclass is replaced by its own fields."""
    fields = {}
    for field in dataclasses.fields(kind):
        fields |= _fields(field.type) if dataclasses.is_dataclass(field.type) else {field.name: field}
    return fields


def _columns(point: Any) -> dict[str, Any]:
    """The values of a point by column."""
    columns = {}
    for field in dataclasses.fields(point):
        value = getattr(point, field.name)
        columns |= _columns(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return columns


def _joined(point: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    columns = _columns(point)
    if clashing := sorted(set(columns) & set(result)):
        raise ValueError(f"the function returned {', '.join(clashing)}, expected other names than those of the point's fields")
    for name, value in result.items():
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"the function returned {name} = {value!r}, a {type(value).__name__}, expected a number, text or None")
        again = _value(_text(value))
        if type(again) is not type(value) or not (again == value or math.isnan(value)):
            raise ValueError(f"the function returned {name} = {value!r}, which a CSV gives back as {again!r}, expected other text")
    return columns | dict(result)


def _key(point: Any) -> tuple[str, ...]:
    """The key of a row: the point's values as text in a CSV, with integers in float fields written as floats."""
    fields = _fields(type(point))
    return tuple(_text(float(value) if fields[name].type in (float, Real) else value) for name, value in _columns(point).items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _value(cell: str) -> Any:
    """The value of a cell of a CSV."""
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for number in (int, float):
        try:
            return number(cell)
        except ValueError:
            pass
    return cell


def _table(points: Sequence[Any], rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """The points' values, unconverted, and the values of their rows."""
    results = [{name: _value(cell) for name, cell in row.items()} for row in rows]
    return pd.concat([pd.DataFrame([_columns(point) for point in points]), pd.DataFrame(results)], axis=1)


def _line(values: Iterable[Any]) -> str:
    cells = [_text(value) for value in values]
    if broken := [cell for cell in cells if set(cell) & set("\r\n\0")]:
        raise ValueError(f"{broken[0]!r} is to go into a CSV, expected text on one line")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _append(path: Path, rows: Sequence[Mapping[str, Any]], columns: dict[Path, list[str]], kind: type) -> None:
    """Append all rows at once. A file with other columns is set aside and replaced; rows with other names than `columns` are refused."""
    if not rows:  # an empty table
        return
    expected = columns.get(path, list(rows[0]))
    if odd := [row for row in rows if set(row) != set(expected)]:
        raise ValueError(f"the function returned {', '.join(odd[0])} for one point, expected {', '.join(expected)}, as for the one before")
    names = list(rows[0])
    if path not in columns:
        _rows(path, kind)  # repairs the file, and adds fields that have a default
        columns[path] = _read(path)[0]
        if set(columns[path]) != set(names):
            if columns[path]:
                _set_aside(path, f"it has the columns {', '.join(columns[path])}, expected {', '.join(names)}. It is started anew")
            columns[path] = names
            _write(path, columns[path], [])
    text = "".join(_line(row[name] for name in columns[path]) for row in rows)
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _rows(path: Path, kind: type, repair: bool = True) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The rows of a CSV, without the point's columns, by the point's key; none if the file does not fit.

    With `repair`, for which the file must be locked, a file that does not fit is set aside, and one that lacks something is rewritten.
    Without it, the file stays as it is: another process may be writing to it.
    """
    fields = _fields(kind)
    header, rows = _read(path, repair)
    if not header:
        return {}
    added = [name for name, field in fields.items() if name not in header and field.default is not dataclasses.MISSING]
    results = [name for name in header if name not in fields]
    if not results or set(header) != {*fields, *results} - {*added} or len(set(header)) < len(header):
        if repair:
            _set_aside(path, f"it has the columns {', '.join(header)}, expected {', '.join(fields)} and results. It is started anew")
            path.unlink()
        return {}
    records = [{name: _text(fields[name].default) for name in added} | dict(zip(header, row, strict=True)) for row in rows]
    if added and repair:
        _write(path, [*fields, *results], [[record[name] for name in (*fields, *results)] for record in records])
    by_key: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for record in records:
        key = tuple(str(float(record[name])) if field.type in (float, Real) else record[name] for name, field in fields.items())
        by_key.setdefault(key, []).append({name: record[name] for name in results})
    return by_key


def _read(path: Path, repair: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV, as text, without lines that are cut off. With `repair`, these are removed from the file, too."""
    if not path.exists() or not path.stat().st_size:
        return [], []
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig", errors="strict")
    except UnicodeDecodeError as error:
        if "unexpected end" not in error.reason:
            if repair:
                _set_aside(path, f"it is not UTF-8 text ({error.reason} at byte {error.start}). It is started anew")
                path.unlink()
            return [], []
        text = data[: error.start].decode("utf-8-sig")  # cut inside a character
    text = text.replace("\0", "")  # a crash of the machine may leave zeros in place of data that was not on disk yet
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    whole = [row for row in rows if len(row) == len(header)]
    if rows and not text.endswith("\n") and whole and whole[-1] is rows[-1]:
        whole.pop()  # all its fields are there, but the last one may be cut
    if len(whole) < len(rows) and repair:
        _set_aside(path, f"{len(rows) - len(whole)} of its {len(rows)} lines are cut off. They are taken out")
        _write(path, header, whole)
    return header, whole


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with written_whole(path) as partial:
        partial.write_text("".join(map(_line, [header, *rows])), encoding="utf-8")


def _set_aside(path: Path, reason: str) -> None:
    n = 1
    while (aside := path.with_name(f"{path.stem}.aside-{n}{path.suffix}")).exists():
        n += 1
    shutil.copy2(path, aside)
    warnings.warn(f"{path}: {reason}; the old file is kept as {aside.name}", stacklevel=3)
