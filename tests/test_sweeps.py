import dataclasses
import functools
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest

from resnet_pruning import files
from resnet_pruning.studies import sweeps


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Number:
    x: int


POINTS = [Point(x, name) for x in (1, 2.5) for name in ("a", 'with "quotes", commas')]


def square(point, calls=None):
    if calls is not None:
        with open(calls, "a") as file:
            file.write(f"{point}\n")
    return {"square": point.x * point.x, "length": len(point.name)}


@pytest.fixture
def counted(tmp_path):
    """`square`, and a function that counts its calls, also those in other processes."""
    calls = tmp_path / "calls"
    calls.touch()
    return functools.partial(square, calls=str(calls)), lambda: len(calls.read_text().splitlines())


def test_a_sweep_gives_a_row_for_each_point_in_their_order(tmp_path):
    table = sweeps.run_sweep(square, POINTS, tmp_path / "new" / "s.csv", progress=False)
    assert table.x.tolist() == [1, 1, 2.5, 2.5] and table.square.tolist() == [1, 1, 6.25, 6.25]
    assert table.name.tolist() == ["a", 'with "quotes", commas'] * 2 and list(table) == ["x", "name", "square", "length"]


def test_points_that_have_their_row_are_skipped(tmp_path, counted):
    function, n_calls = counted
    assert sweeps.finished(POINTS, tmp_path / "s.csv") == []
    sweeps.run_sweep(function, POINTS[:2], tmp_path / "s.csv", progress=False)
    assert sweeps.finished([POINTS[3], POINTS[1], POINTS[0]], tmp_path / "s.csv") == [POINTS[1], POINTS[0]]
    table = sweeps.run_sweep(function, [POINTS[3], POINTS[0], POINTS[0]], tmp_path / "s.csv", progress=False)
    assert n_calls() == 3
    assert table.x.tolist() == [2.5, 1]  # equal points once
    assert len(pd.read_csv(tmp_path / "s.csv")) == 3


def test_the_bar_counts_all_points_and_starts_at_those_done(tmp_path, capsys):
    sweeps.run_sweep(square, POINTS[:3], tmp_path / "s.csv", progress=False)
    assert capsys.readouterr().err == ""
    sweeps.run_sweep(square, POINTS, tmp_path / "s.csv")
    bar = capsys.readouterr().err
    assert "3/4" in bar and "4/4" in bar and "point" in bar


INTERRUPTED = """
import dataclasses, os, signal, sys
from resnet_pruning.studies import sweeps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored

@dataclasses.dataclass(frozen=True)
class Number:
    x: int

def function(point):
    if point.x == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return {"square": point.x * point.x}

sweeps.run_sweep(function, [Number(x) for x in range(6)], sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_an_interrupted_sweep_loses_only_the_point_in_flight(tmp_path, counted, how):
    csv = tmp_path / "s.csv"
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED, csv, how], capture_output=True, text=True)
    assert killed.returncode != 0
    assert csv.read_text() == "x,square\n0,0\n1,1\n2,4\n"
    function, n_calls = counted
    table = sweeps.run_sweep(
        lambda point: {"square": function(Point(point.x))["square"]}, [Number(x) for x in range(6)], csv, progress=False
    )
    assert n_calls() == 3 and table.square.tolist() == [0, 1, 4, 9, 16, 25]


def test_a_point_that_fails_keeps_those_before_it(tmp_path):
    def function(point):
        return {"inverse": 1 / point.x}

    with pytest.raises(ZeroDivisionError):
        sweeps.run_sweep(function, [Number(2), Number(0)], tmp_path / "s.csv", progress=False)
    assert (tmp_path / "s.csv").read_text() == "x,inverse\n2,0.5\n"


@pytest.mark.parametrize("cut", ["2.5,a,6.", "2.5,a,6.25,1", "2", ""])
def test_a_cut_last_line_is_kept_aside_and_computed_again(tmp_path, counted, cut):
    function, n_calls = counted
    csv = tmp_path / "s.csv"
    damaged = f"x,name,square,length\n1,a,1,1\n{cut}"
    csv.write_text(damaged)
    if cut:
        with pytest.warns(
            UserWarning, match="s.csv: 1 of its 2 lines are cut off. They are taken out; the old file is kept as s.aside-1.csv"
        ):
            table = sweeps.run_sweep(function, POINTS, csv, progress=False)
        assert (tmp_path / "s.aside-1.csv").read_text() == damaged
    else:
        table = sweeps.run_sweep(function, POINTS, csv, progress=False)
        assert not (tmp_path / "s.aside-1.csv").exists()
    assert n_calls() == 3 and table.square.tolist() == [1, 1, 6.25, 6.25]
    assert len(csv.read_text().splitlines()) == 5


@pytest.mark.parametrize("header", ["y,name,square,length", "x,name,cube", "x"])
def test_a_file_with_other_columns_is_kept_aside_and_begun_anew(tmp_path, counted, header):
    function, n_calls = counted
    csv = tmp_path / "s.csv"
    old = f"{header}\n{','.join('1' for _ in header.split(','))}\n"
    csv.write_text(old)
    (tmp_path / "s.aside-1.csv").write_text("older still")
    with pytest.warns(UserWarning, match=f"it has the columns {header.replace(',', ', ')}, expected x, name.* kept as s.aside-2.csv"):
        table = sweeps.run_sweep(function, POINTS, csv, progress=False)
    assert (tmp_path / "s.aside-2.csv").read_text() == old and (tmp_path / "s.aside-1.csv").read_text() == "older still"
    assert n_calls() == 4 and len(table) == 4


def test_rows_done_under_other_results_are_computed_again(tmp_path):
    sweeps.run_sweep(lambda point: {"square": point.x**2}, [Number(1), Number(2)], tmp_path / "s.csv", progress=False)
    with pytest.warns(UserWarning, match="columns x, square, expected x, cube"):
        table = sweeps.run_sweep(lambda point: {"cube": point.x**3}, [Number(2), Number(3)], tmp_path / "s.csv", progress=False)
    assert table.to_dict("list") == {"x": [2, 3], "cube": [8, 27]}


@pytest.mark.parametrize("damage", ["", "2.5,a,6.", "2.5,a,6.25,1", "2"])
def test_readers_leave_a_file_as_it_is(tmp_path, damage):
    """Its last line may be one that another process is just writing."""
    csv, details = tmp_path / "s.csv", tmp_path / "s_parts.csv"
    csv.write_text(f"x,name,square,length\n1,a,1,1\n{damage}")
    details.write_text(f"x,name,n,value\n1,a,1,1\n{damage}")
    before = csv.read_bytes(), details.read_bytes()
    assert sweeps.finished(POINTS, csv) == [POINTS[0]]
    assert sweeps.read_details(csv, "parts", [POINTS[0]]).value.tolist() == [1]
    assert sweeps.run_sweep(square, [POINTS[0]], csv, progress=False).square.tolist() == [1]
    assert (csv.read_bytes(), details.read_bytes()) == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("data", [b"y,name,square\n1,a,1\n", "x,square\n1,é\n".encode("utf-16")])
def test_readers_leave_a_file_that_does_not_fit_as_it_is(tmp_path, data):
    csv, details = tmp_path / "s.csv", tmp_path / "s_parts.csv"
    csv.write_bytes(data)
    details.write_bytes(data)
    assert sweeps.finished(POINTS, csv) == []
    with pytest.raises(ValueError, match="s_parts.csv has no rows for Point"):
        sweeps.read_details(csv, "parts", [POINTS[0]])
    assert csv.read_bytes() == details.read_bytes() == data and len(list(tmp_path.iterdir())) == 2


def test_a_field_that_is_added_is_not_written_by_readers(tmp_path):
    csv = tmp_path / "s.csv"
    csv.write_text("x,result\n2,4\n")
    assert sweeps.finished([Newer(2), Newer(2, 3)], csv) == [Newer(2)] and csv.read_text() == "x,result\n2,4\n"


def test_rows_that_are_all_there_are_read_while_another_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    csv = tmp_path / "s.csv"
    expected = sweeps.run_sweep(square, POINTS[:2], csv, progress=False)
    with files.locked(csv):
        assert sweeps.run_sweep(square, POINTS[:2], csv, progress=False).equals(expected)
        with pytest.raises(RuntimeError, match="another process is writing to"):
            sweeps.run_sweep(square, POINTS, csv, progress=False)


def test_points_must_be_alike():
    with pytest.raises(ValueError, match="points is empty, expected at least one"):
        sweeps.run_sweep(square, [], "s.csv")
    with pytest.raises(ValueError, match="points are of Number, Point, expected one kind"):
        sweeps.run_sweep(square, [POINTS[0], Number(2)], "s.csv")


def test_a_function_may_not_overwrite_a_field(tmp_path):
    with pytest.raises(ValueError, match="the function returned x, expected other names"):
        sweeps.run_sweep(lambda point: {"x": 2}, [Number(1)], tmp_path / "s.csv", progress=False)


def test_a_grid_of_choices():
    grid = sweeps.expanded(Point(1.0), x=np.array([1.0, 2.0]), name=["a", "b"])
    assert set(grid) == {Point(x, name) for x in (1.0, 2.0) for name in "ab"} and type(grid[0].x) is float
    with pytest.raises(ValueError, match="name is 'raw', expected a list of choices"):
        sweeps.expanded(Point(1), name="raw")
    with pytest.raises(ValueError, match="choices has y, expected some of x, name"):
        sweeps.expanded(Point(1.0), y=[1])


@dataclasses.dataclass(frozen=True)
class Shape:
    sides: tuple[int, ...]
    solid: bool = True


@dataclasses.dataclass(frozen=True)
class Nested:
    shape: Shape
    label: str = "n"


@dataclasses.dataclass(frozen=True)
class Older:
    x: int


@dataclasses.dataclass(frozen=True)
class Newer:
    x: int
    power: int = 2


def test_fields_keep_their_types_and_nested_ones_are_columns(tmp_path):
    points = [Nested(Shape((3, 4, 5))), Nested(Shape((), False), "NA")]
    for _ in range(2):  # computed, and read again
        table = sweeps.run_sweep(lambda point: {"n": len(point.shape.sides)}, points, tmp_path / "s.csv", progress=False)
        assert table.to_dict("list") == {"sides": [(3, 4, 5), ()], "solid": [True, False], "label": ["n", "NA"], "n": [3, 0]}


def test_a_field_that_is_added_with_a_default_goes_on(tmp_path):
    def power(point):
        return {"result": point.x ** getattr(point, "power", 2)}

    sweeps.run_sweep(power, [Older(2), Older(3)], tmp_path / "s.csv", progress=False)
    table = sweeps.run_sweep(power, [Newer(3), Newer(3, 3)], tmp_path / "s.csv", progress=False)
    assert table.result.tolist() == [9, 27]
    assert (tmp_path / "s.csv").read_text() == "x,power,result\n2,2,4\n3,2,9\n3,3,27\n"


def test_details_go_to_a_file_of_their_own(tmp_path):
    def powers(point):
        return {"square": point.x**2, "powers": pd.DataFrame({"n": [1, 2, 3], "value": [point.x**n for n in (1, 2, 3)]})}

    csv, points = tmp_path / "s.csv", [Number(2), Number(3)]
    assert list(sweeps.run_sweep(powers, points, csv, progress=False)) == ["x", "square"]
    details = sweeps.read_details(csv, "powers", [Number(3)])
    assert details.to_dict("list") == {"x": [3, 3, 3], "n": [1, 2, 3], "value": [3, 9, 27]}
    text = csv.read_text()
    csv.write_text(text[: text.index("3,")])  # killed between the details and the row
    sweeps.run_sweep(powers, points, csv, progress=False)
    assert len(sweeps.read_details(csv, "powers", points)) == 6
    with pytest.raises(ValueError, match=r"no rows for Number\(x=4\)"):
        sweeps.read_details(csv, "powers", [Number(4)])


def test_a_table_of_details_may_be_empty(tmp_path):
    def powers(point):
        return {"square": point.x**2, "powers": pd.DataFrame([{"n": n, "value": point.x**n} for n in range(1, point.x)])}

    csv, points = tmp_path / "s.csv", [Number(1), Number(3), Number(0)]
    assert sweeps.run_sweep(powers, points, csv, progress=False).square.tolist() == [1, 9, 0]
    assert sweeps.read_details(csv, "powers", [Number(3)]).value.tolist() == [3, 9]


def test_details_get_a_field_that_is_added_with_a_default(tmp_path):
    def details(point):
        return {"square": point.x**2, "parts": pd.DataFrame({"n": [1], "value": [point.x ** getattr(point, "power", 2)]})}

    csv = tmp_path / "s.csv"
    sweeps.run_sweep(details, [Older(2)], csv, progress=False)
    sweeps.run_sweep(details, [Newer(2), Newer(2, 3)], csv, progress=False)
    assert sweeps.read_details(csv, "parts", [Newer(2), Newer(2, 3)]).value.tolist() == [4, 8] and len(list(tmp_path.glob("*.csv"))) == 2


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_any_backend_gives_the_same_rows(tmp_path, backend):
    expected = sweeps.run_sweep(square, POINTS, tmp_path / "one.csv", progress=False)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        table = sweeps.run_sweep(square, POINTS, tmp_path / "two.csv", progress=False)
    pd.testing.assert_frame_equal(table, expected)


def test_columns_may_be_in_any_order(tmp_path):
    def function(point):
        result = {"square": point.x**2, "cube": point.x**3}
        return result if point.x % 2 else dict(reversed(result.items()))

    points, csv = [Number(x) for x in range(4)], tmp_path / "s.csv"
    expected = sweeps.run_sweep(function, points, csv, progress=False)
    lines = csv.read_text().splitlines()
    assert len(lines) == 5 and lines[3] == "2,8,4" and lines[0] == "x,cube,square"
    pd.read_csv(csv)[["square", "x", "cube"]].to_csv(csv, index=False)  # as a spreadsheet may leave it
    table = sweeps.run_sweep(function, [*points, Number(4)], csv, progress=False)
    assert table[["x", "square", "cube"]].head(4).equals(expected[["x", "square", "cube"]]) and table.cube.tolist() == [0, 1, 8, 27, 64]
    assert len(csv.read_text().splitlines()) == 6


@pytest.mark.parametrize(("result", "message"), [
    (lambda x: {"a": 1} if x < 2 else {"b": 1}, "the function returned x, b for one point, expected x, a, as for the one before"),
    (lambda x: {"a": 1} | ({"b": 1} if x == 2 else {}), "returned x, a, b for one point, expected x, a"),
    (lambda x: {"a": "two\rlines"}, r"'two.rlines' is to go into a CSV, expected text on one line"),
    (lambda x: {"a": "1"}, "returned a = '1', which a CSV gives back as 1, expected other text"),
    (lambda x: {"a": ""}, "returned a = '', which a CSV gives back as None"),
    (lambda x: {"a": "nan"}, "returned a = 'nan', which a CSV gives back as nan"),
    (lambda x: {}, "the function returned nothing, expected numbers or texts for a row"),
    (lambda x: {"table": pd.DataFrame({"a": [1]})}, "the function returned table, expected numbers or texts for a row"),
    (lambda x: {"a": [1, 2]}, r"returned a = \[1, 2\], a list, expected a number, text or None"),
])  # fmt: skip
def test_what_a_row_cannot_hold_is_refused_at_once(tmp_path, result, message):
    calls = []

    def function(point):
        calls.append(point)
        return result(point.x)

    with pytest.raises(ValueError, match=message):
        sweeps.run_sweep(function, [Number(x) for x in range(1, 9)], tmp_path / "s.csv", progress=False)
    assert len(calls) <= 2
    assert not list(tmp_path.glob("*aside*"))


def test_a_point_that_no_row_can_hold_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="is to go into a CSV, expected text on one line"):
        sweeps.run_sweep(lambda point: {"inverse": 1 / 0}, [Point(1.0, "two\nlines")], tmp_path / "s.csv", progress=False)


def test_values_come_back_as_what_they_were(tmp_path):
    values = {"text": "NA", "number": 0.1 + 0.2, "whole": 7, "yes": True, "large": 10**18, "tiny": 5e-324, "none": None, "null": "null"}
    values["quoted"] = 'a "b", c'
    for _ in range(2):  # computed, and read again
        table = sweeps.run_sweep(lambda point: values, [Number(1)], tmp_path / "s.csv", progress=False)
        row = table.iloc[0]
        assert {name: row[name] for name in values if name != "none"} == {name: value for name, value in values.items() if name != "none"}
        assert pd.isna(row["none"])


@pytest.mark.parametrize(("damage", "lost"), [
    (lambda data: b"\xef\xbb\xbf" + data, 0),  # a byte-order mark
    (lambda data: data.replace(b"\n", b"\r\n"), 0),
    (lambda data: data[:-2], 1),  # inside a character of two bytes
    (lambda data: data[:-3], 1),
    (lambda data: data.decode().encode("utf-16"), 3),
    (lambda data: data.decode().encode("latin-1"), 3),
    (lambda data: data + bytes(20), 0),  # what a file system may leave after a crash
    (lambda data: bytes(len(data)), 3),
], ids=["mark", "windows", "cut in a character", "cut", "utf-16", "latin-1", "zeros", "only zeros"])  # fmt: skip
def test_a_file_that_others_changed_is_repaired_or_kept_aside(tmp_path, counted, damage, lost, recwarn):
    function, n_calls = counted
    points, csv = [Point(1.0, "é"), Point(2.0, "ü"), Point(3.0, "aé")], tmp_path / "s.csv"

    def named(point):
        return {"square": function(point)["square"], "name again": f"{point.name}é"}

    expected = sweeps.run_sweep(named, points, csv, progress=False)
    damaged = damage(csv.read_bytes())
    csv.write_bytes(damaged)
    table = sweeps.run_sweep(named, points, csv, progress=False)
    assert table.equals(expected) and n_calls() == 3 + lost
    kept = list(tmp_path.glob("*aside*"))
    assert ([file.read_bytes() for file in kept] == [damaged] and recwarn) if lost and damaged.strip(b"\0") else True
    assert sweeps.run_sweep(named, points, csv, progress=False).equals(expected) and n_calls() == 3 + lost
