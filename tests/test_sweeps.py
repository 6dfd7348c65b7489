import functools
import subprocess
import sys

import joblib
import pandas as pd
import pytest

from resnet_pruning.studies import sweeps

POINTS = [{"x": x, "name": name} for x in (1, 2.5) for name in ("a", 'with "quotes", commas')]


def square(x, name, calls=None):
    if calls is not None:
        with open(calls, "a") as file:
            file.write(f"{x} {name}\n")
    return {"square": x * x, "length": len(name)}


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
import os, signal, sys
from resnet_pruning.studies import sweeps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored

def function(x):
    if x == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return {"square": x * x}

sweeps.run_sweep(function, [{"x": x} for x in range(6)], sys.argv[1], progress=False)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_an_interrupted_sweep_loses_only_the_point_in_flight(tmp_path, counted, how):
    csv = tmp_path / "s.csv"
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED, csv, how], capture_output=True, text=True)
    assert killed.returncode != 0
    assert csv.read_text() == "x,square\n0,0\n1,1\n2,4\n"
    function, n_calls = counted
    table = sweeps.run_sweep(lambda x: {"square": function(x, "")["square"]}, [{"x": x} for x in range(6)], csv, progress=False)
    assert n_calls() == 3 and table.square.tolist() == [0, 1, 4, 9, 16, 25]


def test_a_point_that_fails_keeps_those_before_it(tmp_path):
    def function(x):
        return {"inverse": 1 / x}

    with pytest.raises(ZeroDivisionError):
        sweeps.run_sweep(function, [{"x": 2}, {"x": 0}], tmp_path / "s.csv", progress=False)
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
    sweeps.run_sweep(lambda x: {"square": x * x}, [{"x": 1}, {"x": 2}], tmp_path / "s.csv", progress=False)
    with pytest.warns(UserWarning, match="columns x, square, expected x, cube"):
        table = sweeps.run_sweep(lambda x: {"cube": x**3}, [{"x": 2}, {"x": 3}], tmp_path / "s.csv", progress=False)
    assert table.to_dict("list") == {"x": [2, 3], "cube": [8, 27]}


def test_points_must_be_alike():
    with pytest.raises(ValueError, match="points is empty, expected at least one"):
        sweeps.run_sweep(square, [], "s.csv")
    with pytest.raises(ValueError, match="a point has x, expected the names of the first point, x, name"):
        sweeps.run_sweep(square, [POINTS[0], {"x": 2}], "s.csv")


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_any_backend_gives_the_same_rows(tmp_path, backend):
    expected = sweeps.run_sweep(square, POINTS, tmp_path / "one.csv", progress=False)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        table = sweeps.run_sweep(square, POINTS, tmp_path / "two.csv", progress=False)
    pd.testing.assert_frame_equal(table, expected)
