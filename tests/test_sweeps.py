import dataclasses
import functools
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest

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
    sweeps.run_sweep(function, POINTS[:2], tmp_path / "s.csv", progress=False)
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


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_any_backend_gives_the_same_rows(tmp_path, backend):
    expected = sweeps.run_sweep(square, POINTS, tmp_path / "one.csv", progress=False)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        table = sweeps.run_sweep(square, POINTS, tmp_path / "two.csv", progress=False)
    pd.testing.assert_frame_equal(table, expected)
