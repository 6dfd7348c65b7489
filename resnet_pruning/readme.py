"""Write the README's numbers from the CSVs in ``figures/``: ``python -m resnet_pruning.readme``, or ``make readme``.

A block of the README between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->`` is what the function NAME below returns.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .files import ROOT, written_whole


def result(figures: Path) -> str:
    """The trained network: accuracy, cost, and what its training took."""
    base = pd.read_csv(figures / "resnet20.csv").iloc[0]
    return _table(
        ["network", "test accuracy", "parameters", "MACs", "trained on", "epochs", "time", "machine"],
        [
            "ResNet-20",
            f"**{base.test_accuracy:.2f} %**",
            f"{base.parameters:,}",
            f"{base.macs:,}",
            f"{base.n_train_images:,} images",
            base.epochs,
            f"{base.minutes:.0f} min",
            base.machine,
        ],
    )


def speed(figures: Path) -> str:
    """Training throughput, from the loop that one would write first to `training.train`."""
    rows = pd.read_csv(figures / "benchmark_training.csv").itertuples()
    return _table(
        ["machine", "batch size", "loop", "images/s, median (lowest to highest)", "ratio to the first loop"],
        *(
            [
                row.machine,
                row.batch_size,
                row.loop,
                f"{row.images_per_second:,.0f} ({row.lowest:,.0f} to {row.highest:,.0f})",
                f"{row.ratio:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})",
            ]
            for row in rows
        ),
    )


def trials(figures: Path) -> str:
    """The short runs that the recipe was chosen by."""
    table = pd.read_csv(figures / "training_trials.csv").sort_values("held_out_accuracy", ascending=False)
    rows = ([row.trial, f"{row.held_out_accuracy:.2f} %", f"{row.seconds:.0f} s"] for row in table.itertuples())
    return _table(["trial", "held-out accuracy", "time"], *rows)


BLOCKS: dict[str, Callable[[Path], str]] = {f.__name__: f for f in (result, speed, trials)}


def filled(text: str, figures: Path) -> str:
    """`text` with each block's content made anew.

    Raises
    ------
    ValueError : a block with an unknown name, or one that is not closed
    """

    def content(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"README block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"<!-- begin:{name} -->\n{BLOCKS[name](figures)}\n<!-- end:{name} -->"

    pattern = r"<!-- begin:(?P<name>\w+) -->\n.*?<!-- end:(?P=name) -->"
    if len(re.findall(pattern, text, re.DOTALL)) != text.count("<!-- begin:"):
        raise ValueError("a README block is not closed: each <!-- begin:NAME --> needs its <!-- end:NAME -->")
    return re.sub(pattern, content, text, flags=re.DOTALL)


def _table(header: list[str], *rows: list) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    path = ROOT / "README.md"
    text = filled(path.read_text(encoding="utf-8"), ROOT / "figures")
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
