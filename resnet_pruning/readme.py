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


def clustering(figures: Path) -> str:
    """Accuracy with 75 and 50 % of the filters in every layer, by what is clustered and what is done about batch norm."""
    table = pd.read_csv(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction'")
    table = table[table.level.isin([0.75, 0.5]) & ((table.batch_norm == "re-estimated") | (table.distance == "raw"))]
    table["clustered by"] = table.distance + table.weighting.map(lambda weighting: ", weighted" if weighting else "")
    rows = []
    for key, group in table.groupby(["batch_norm", "representative", "clustered by"]):
        cells = {level: _median_and_range(part.accuracy) for level, part in group.groupby("level")}
        rows.append((group[group.level == 0.5].accuracy.median(), [key[2], key[1], key[0], cells[0.75], cells[0.5]]))
    header = ["clustered by", "replaced by", "batch-norm statistics", "75 % of the filters", "50 % of the filters"]
    return _table(header, *(cells for _, cells in sorted(rows, reverse=True)))


def ends(figures: Path) -> str:
    """What plans with whole ends gain over uniform plans of the same cost, over all budgets and seeds."""
    table = pd.read_csv(figures / "prune_ends.csv").query("images == 'test' and plan != 'as trained'")
    table[["family", "measure"]] = table.plan.str.split(", ", expand=True)
    wide = table.pivot_table(index=["distance", "measure", "level", "seed"], columns="family", values="accuracy")
    gains = wide.drop(columns="uniform").sub(wide["uniform"], axis=0)
    rows = []
    for (distance, measure), group in gains.groupby(["distance", "measure"], sort=False):
        cells = (f"{group[family].mean():+.2f} ({group[family].min():+.2f} to {group[family].max():+.2f})" for family in ENDS)
        rows.append([distance, measure, *cells])
    return _table(["clustered by", "compared at", *(f"{family} (pp)" for family in ENDS)], *rows)


def checkpoints(figures: Path) -> str:
    """The compact networks that are committed, next to the trained one: size, accuracy, and time where it was measured."""
    table = pd.read_csv(figures / "compact_checkpoints.csv").set_index("network")
    speed = pd.read_csv(figures / "benchmark_inference.csv").query("batch_size == 256 and device == 'cpu'")
    speed = speed.groupby(["model", "runtime"]).speedup.median()
    whole = table.iloc[0]
    rows = []
    for name, row in table.iterrows():
        best = speed[name].idxmax()
        rows.append(
            [
                name,
                *(f"{row[key]:,.0f} ({100 * row[key] / whole[key]:.1f} %)" for key in ("parameters", "macs", "bytes")),
                f"{row.accuracy:.2f} %",
                f"{row.accuracy - whole.accuracy:+.2f}" if name != whole.name else "",
                f"{speed[name, best]:.2f}× ({best})" if name != whole.name else "",
            ]
        )
    return _table(
        ["network", "parameters", "MACs", "bytes", "test accuracy", "change (pp)", "best speed-up on a CPU, batch size 256"], *rows
    )


def compensation(figures: Path) -> str:
    """What is done about the channels that go: change of accuracy, by how many stay in the first convolution of each block."""
    table = pd.read_csv(figures / "compact_compensation.csv")
    rows = []
    for (selection, batch_norm, way), group in table.groupby(["selection", "batch_norm", "compensation"]):
        cells = [_change(group[group.level == level].change) for level in (0.75, 0.5, 0.25)]
        rows.append((group[group.level == 0.5].change.median(), [way, batch_norm, selection, *cells]))
    header = ["compensation", "batch-norm statistics", "kept by", *(f"{level} % kept (pp)" for level in (75, 50, 25))]
    return _table(header, *(cells for _, cells in sorted(rows, reverse=True)))


def allocation(figures: Path) -> str:
    """Plans of the same MACs, by how the channels are divided among layers: change of accuracy."""
    table = pd.read_csv(figures / "compact_allocation.csv")
    levels = sorted(table.level.unique(), reverse=True)
    rows = []
    for (way, plan), group in table.groupby(["compensation", "plan"]):
        rows.append([plan, way, *(_change(group[group.level == level].change) for level in levels)])
    return _table(["plan", "compensation", *(f"{100 * level:g} % of the MACs (pp)" for level in levels)], *rows)


def fine_tuning(figures: Path) -> str:
    """The longer runs: compact networks before and after, and the same network from scratch."""
    table = pd.read_csv(figures / "fine_tune.csv").query("epochs >= 20").sort_values(["way", "level"], ascending=[True, False])
    rows = []
    for row in table.itertuples():
        rows.append(
            [
                row.checkpoint if isinstance(row.checkpoint, str) else f"{row.way}, {row.plan}",
                f"{row.macs:,} ({100 * row.macs_share:.1f} %)",
                f"{row.parameters:,} ({100 * row.parameters_share:.1f} %)",
                row.epochs,
                f"{row.accuracy_before:.2f} %",
                f"{row.accuracy:.2f} %",
                f"{row.change:+.2f}",
            ]
        )
    return _table(
        ["network", "MACs", "parameters", "epochs", "accuracy before", "accuracy after", "change from the trained network (pp)"], *rows
    )


def ways(figures: Path) -> str:
    """The short runs, one for each way to keep to the constraint, at half of the MACs."""
    table = pd.read_csv(figures / "fine_tune.csv").query("epochs < 20 and level == 0.5")
    wide = table.pivot_table(index="way", columns="teacher", values="accuracy").sort_values(True, ascending=False)
    start = table.groupby("way").accuracy_before.first()
    rows = (
        [way, f"{start[way]:.2f} %", *("" if pd.isna(row[teacher]) else f"{row[teacher]:.2f} %" for teacher in (False, True))]
        for way, row in wide.iterrows()
    )
    (n_epochs,) = table.epochs.unique()
    return _table(["way", "before", f"{n_epochs} epochs, labels alone", f"{n_epochs} epochs with distillation"], *rows)


def inference(figures: Path) -> str:
    """Speed-up of each compact network over the trained one, by runtime and batch size."""
    table = pd.read_csv(figures / "benchmark_inference.csv")
    models = list(table.model.unique())[1:]
    share = table.groupby("model").macs_share.first()
    rows = []
    for (machine, runtime, batch_size), group in table.groupby(["machine", "runtime", "batch_size"], sort=False):
        row = group.set_index("model")
        cells = (f"{r.speedup:.2f} ({r.lowest_speedup:.2f} to {r.highest_speedup:.2f})" for r in row.loc[models].itertuples())
        rows.append([machine, runtime, batch_size, f"{row.milliseconds.iloc[0]:.1f} ms", *cells])
    limits = ["", "if MACs were time", "", "", *(f"{1 / share[name]:.2f}" for name in models)]
    return _table(["machine", "runtime", "batch size", "resnet20", *models], *rows, limits)


def _median_and_range(values: pd.Series, fmt: str = "{:.2f}", unit: str = " %") -> str:
    median, lowest, highest = map(fmt.format, (values.median(), values.min(), values.max()))
    return median + unit + (f" ({lowest} to {highest})" if len(values) > 1 else "")


def _change(values: pd.Series) -> str:
    return _median_and_range(values, "{:+.2f}", "")


ENDS = ("first-heavy", "last-heavy", "first/last-heavy", "chosen on training images")
BLOCKS: dict[str, Callable[[Path], str]] = {
    f.__name__: f for f in (result, checkpoints, compensation, allocation, fine_tuning, ways, inference, speed, trials, clustering, ends)
}


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
