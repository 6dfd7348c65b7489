import papermill
import pytest
from filelock import FileLock
from nbformat import v4, write

from resnet_pruning.files import ROOT
from resnet_pruning.report import notebooks
from resnet_pruning.studies import base


@pytest.fixture(scope="module", autouse=True)
def checkpoints():
    """What several notebooks start from is made once, whichever of the tests' processes comes first."""
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "tests.lock"):
        base.base_checkpoint("digits", "quick")
        base.choosing_checkpoint("digits", "quick")


@pytest.mark.parametrize("name", sorted(path.name for path in notebooks.NOTEBOOKS.glob("*.ipynb")))
def test_each_notebook_runs_quickly_on_digits(name):
    target = notebooks.run_notebook(notebooks.NOTEBOOKS / name, "digits", "quick")
    assert target.parent == ROOT / "build" / "digits-quick" / "notebooks" and target.exists()


def test_notebooks_are_chosen_by_how_their_names_begin():
    names = [path.stem for path in notebooks.chosen_notebooks(["assignment"])]
    assert [name[:2] for name in names] == ["01", "02", "03", "04", "05"]
    assert [path.stem[:2] for path in notebooks.chosen_notebooks(["08", "02"])] == ["02", "08"]
    assert len(notebooks.chosen_notebooks(["all"])) == len(list(notebooks.NOTEBOOKS.glob("*.ipynb"))) > 5
    with pytest.raises(ValueError, match="no notebook begins with '99', expected one of 01_train, "):
        notebooks.chosen_notebooks(["01", "99"])


def test_what_differs_at_each_run_is_left_out():
    cell = v4.new_code_cell("bar()", metadata={"tags": ["kept"], "execution": {"iopub.status.busy": "12:00"}, "papermill": {"duration": 1}})
    cell.outputs = [v4.new_output("display_data", {"text/plain": "100 %", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}})]
    notebook = v4.new_notebook(
        cells=[cell, v4.new_markdown_cell("text")],
        metadata={"widgets": {"state": {}}, "kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    left = notebooks.lasting(notebook)
    assert left.metadata == {"kernelspec": {"name": "python3", "display_name": "Python 3"}} and left.cells[0].metadata == {"tags": ["kept"]}
    assert left.cells[0].outputs[0].data == {"text/plain": "100 %"} and "widgets" in notebook.metadata
    assert notebooks.lasting(left) == left


def test_a_failing_notebook_names_its_error_and_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    bad = v4.new_notebook(cells=[v4.new_code_cell("raise RuntimeError('on purpose')")])
    write(bad, tmp_path / "99_bad.ipynb")
    before = (tmp_path / "99_bad.ipynb").read_bytes()
    with pytest.raises(papermill.PapermillExecutionError, match="on purpose"):
        notebooks.run_notebook(tmp_path / "99_bad.ipynb", "cifar10", "full")
    assert (tmp_path / "99_bad.ipynb").read_bytes() == before
