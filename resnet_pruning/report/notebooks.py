"""Run the notebooks from top to bottom: ``python -m resnet_pruning.report.notebooks --dataset digits --profile quick``.

A run for CIFAR-10 at ``full`` replaces the committed notebooks, each one when it has finished. Any other run writes its
executed notebooks to ``build/``, beside its figures and checkpoints.
"""

import argparse
import copy
import time
from collections.abc import Collection
from pathlib import Path

import nbformat

from ..files import DATASETS, PROFILES, ROOT, required, results_folder, written_whole

NOTEBOOKS = ROOT / "notebooks"
ASSIGNMENT = ("01", "02", "03", "04", "05")


def run_notebook(source: Path, dataset: str, profile: str) -> Path:
    """Execute one notebook in a fresh kernel and return the path of the executed one.

    Raises
    ------
    papermill.PapermillExecutionError : a cell failed; the notebook so far is in ``build/``, and the committed one is unchanged
    """
    papermill = required("papermill", "studies")
    folder = results_folder(dataset, profile)
    target = (NOTEBOOKS if folder == ROOT else folder / "notebooks") / source.name
    running = ROOT / "build" / "running" / f"{dataset}-{profile}-{source.name}"
    running.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        source,
        running,
        # CIFAR-10 at "full" is the default of the notebooks' own parameters, and needs no injected cell.
        parameters={} if folder == ROOT else {"dataset": dataset, "profile": profile},
        kernel_name="python3",
        cwd=NOTEBOOKS,
        coalesce_streams=True,  # keeps only the last state of a progress bar
        progress_bar=False,
        extra_arguments=["--log-level=ERROR"],  # of the kernel, which warns that it talks to this process over TCP
    )
    with written_whole(target) as partial:
        nbformat.write(lasting(nbformat.read(running, as_version=4)), partial)
    running.unlink()
    return target


def lasting(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of a notebook without what differs between runs: times, paths, and the state of progress bars, except their text."""
    notebook = copy.deepcopy(notebook)
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "execution", "widgets"):
            part.metadata.pop(name, None)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def chosen_notebooks(only: Collection[str]) -> list[Path]:
    """The notebooks whose names begin with one of `only`, in order; "assignment" stands for 01 to 05, "all" for all of them.

    Raises
    ------
    ValueError : a beginning that fits no notebook
    """
    sources = sorted(NOTEBOOKS.glob("*.ipynb"))
    beginnings = [part for name in only for part in {"assignment": ASSIGNMENT, "all": ("",)}.get(name, (name,))]
    for beginning in beginnings:
        if not any(source.name.startswith(beginning) for source in sources):
            raise ValueError(f"no notebook begins with {beginning!r}, expected one of {', '.join(source.stem for source in sources)}")
    return [source for source in sources if source.name.startswith(tuple(beginnings))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--only", nargs="+", default=["assignment"], help='how names begin, such as 01; "assignment" (01 to 05) or "all"')
    arguments = parser.parse_args()
    try:
        sources = chosen_notebooks(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    begun = time.perf_counter()
    for source in sources:
        start = time.perf_counter()
        print(f"{source.stem:28}", end="", flush=True)
        run_notebook(source, arguments.dataset, arguments.profile)
        print(f"{time.perf_counter() - start:6.0f} s", flush=True)
    folder = results_folder(arguments.dataset, arguments.profile)
    names = ", ".join(str((folder / name).relative_to(ROOT)) + "/" for name in ("notebooks", "figures", "checkpoints"))
    print(f"{'':28}{time.perf_counter() - begun:6.0f} s in all. The executed notebooks and what they made: {names}")


if __name__ == "__main__":
    main()
