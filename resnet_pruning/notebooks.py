"""Run the notebooks top to bottom: ``python -m resnet_pruning.notebooks --dataset digits --profile quick``.

The real thing, CIFAR-10 at ``full``, replaces the committed notebooks, each when it has run to its end; any other run
writes its executed notebooks to ``build/``, beside its figures and checkpoints.
"""

import argparse
from pathlib import Path

import nbformat
import papermill

from .data import DATASETS
from .files import PROFILES, ROOT, results_folder, written_whole

NOTEBOOKS = ROOT / "notebooks"


def run_notebook(source: Path, dataset: str, profile: str) -> Path:
    """Execute one notebook in a fresh kernel and return where the executed one is.

    Raises
    ------
    papermill.PapermillExecutionError : a cell failed; the notebook so far is in ``build/``, the committed one unchanged
    """
    folder = results_folder(dataset, profile)
    target = (NOTEBOOKS if folder == ROOT else folder / "notebooks") / source.name
    running = ROOT / "build" / "running" / f"{dataset}-{profile}-{source.name}"
    running.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        source,
        running,
        # The real thing is what the notebooks' own parameters say, and needs no injected cell.
        parameters={} if folder == ROOT else {"dataset": dataset, "profile": profile},
        kernel_name="python3",
        cwd=NOTEBOOKS,
        coalesce_streams=True,  # of a progress bar only its last state is kept
    )
    notebook = nbformat.read(running, as_version=4)
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)  # times and absolute paths of this machine, different at each run
    with written_whole(target) as partial:
        nbformat.write(notebook, partial)
    running.unlink()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--only", default="", help="run the notebooks whose name begins with this, such as 01")
    arguments = parser.parse_args()
    sources = sorted(NOTEBOOKS.glob(f"{arguments.only}*.ipynb"))
    if not sources:
        parser.error(f"no notebook in {NOTEBOOKS} begins with {arguments.only!r}")
    for source in sources:
        print(run_notebook(source, arguments.dataset, arguments.profile).relative_to(ROOT))


if __name__ == "__main__":
    main()
