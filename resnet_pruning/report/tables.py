"""The tables of README.md and docs/results.md, in Markdown, each from the CSVs in ``figures/``."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd


def gains_over_uniform(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of plans over that of uniform ones at an equal measure (pp), a column for each family of plans.

    Parameters
    ----------
    table : rows of `studies.pruning_runs.PruningRuns.measure` for the plan "uniform" and others, at the same levels

    Returns
    -------
    DataFrame by distance, measure, level and seed
    """
    wide = table.pivot_table(index=["distance", "measure", "level", "seed"], columns="plan", values="accuracy")
    return wide.drop(columns="uniform").sub(wide["uniform"], axis=0)


NAMES = {
    "resnet20_first": "before pruning",
    "resnet20_finetuned70": "70 % of the MACs",
    "resnet20_finetuned50_long": "half of the MACs",
    "resnet20_finetuned50_fast": "half of the MACs, from inside the blocks",
    "resnet20_finetuned25_long": "a quarter of the MACs",
    "resnet20_100kB": "half of the MACs, 4-bit weights",
}


def main_result(figures: Path) -> str:
    """The networks that are committed, next to the trained one: size, fine-tuning, accuracy, time."""
    tuned = pd.read_csv(figures / "fine_tune.csv").set_index("checkpoint").epochs
    quantized = pd.read_csv(figures / "quantize_kept.csv").set_index("checkpoint").network
    rows = []
    for row in pd.read_csv(figures / "main_networks.csv").to_dict("records"):
        name = row["network"]
        sizes = f"{row['macs'] / 1e6:.1f} M", f"{row['parameters'] / 1000:.0f} k", f"{row['bytes'] / 1000:,.0f} kB"
        epochs = tuned.get(quantized.get(name, name), 0)
        speedup = "" if pd.isna(row["own_speedup"]) else f"{row['own_speedup']:.2f}×"
        rows.append([f"{NAMES[name]} (`{name}`)", *sizes, epochs, f"{row['accuracy']:.2f} %", f"{row['change']:+.2f} pp", speedup])
    return _table(["network", "MACs", "parameters", "bytes", "epochs of fine-tuning", "test accuracy", "change", "speed-up"], *rows)


def result(figures: Path) -> str:
    """The trained networks: accuracy, cost, and what their training took."""
    rows = pd.concat([pd.read_csv(figures / f"{name}.csv") for name in ("base_seeds", "other_networks")])
    return _table(
        ["network", "seed", "test accuracy", "parameters", "MACs", "trained on", "epochs", "teacher", "time", "machine"],
        *(
            [
                row.network,
                row.seed,
                f"{row.accuracy:.2f} %",
                f"{row.parameters:,}",
                f"{row.macs:,}",
                f"{row.n_train_images:,} images",
                row.epochs,
                row.teacher if isinstance(row.teacher, str) else "",
                f"{row.minutes:.0f} min",
                row.machine,
            ]
            for row in rows.itertuples()
        ),
    )


def speed(figures: Path) -> str:
    """Training throughput, from a straightforward loop to `training.train`."""
    rows = pd.read_csv(figures / "benchmark_training.csv").itertuples()
    return _table(
        ["machine", "batch size", "loop", "images/s, median (lowest to highest)", "ratio to the straightforward loop"],
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
    rows = ([row.trial, row.seed, f"{row.held_out_accuracy:.2f} %", f"{row.seconds:.0f} s"] for row in table.itertuples())
    return _table(["trial", "seed", "held-out accuracy", "time"], *rows)


def clustering(figures: Path) -> str:
    """Accuracy with 75 and 50 % of the filters in every layer, by what is clustered and what is done about batch norm."""
    table = newest(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction'")
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
    rows = []
    for (distance, measure), group in gains_of_ends(figures).groupby(["distance", "measure"], sort=False):
        cells = (f"{group[family].mean():+.2f} ({group[family].min():+.2f} to {group[family].max():+.2f})" for family in ENDS)
        rows.append([distance, f"equal {measure}", *cells])
    return _table(["clustered by", "compared at", *(f"{family} (pp)" for family in ENDS)], *rows)


def checkpoints(figures: Path) -> str:
    """The compact networks that are committed, next to the trained one: size, accuracy, and time where it was measured."""
    table = pd.read_csv(figures / "compact_checkpoints.csv").set_index("network")
    speed = pd.read_csv(figures / "benchmark_inference.csv").query("batch_size == 256 and device == 'cpu'")
    speed = speed.groupby(["network", "runtime"]).own_speedup.median()
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


def repair(figures: Path) -> str:
    """What is done about the channels that go: change of accuracy, by how many stay in the first convolution of each block."""
    table = pd.read_csv(figures / "compact_repair.csv")
    rows = []
    for (selection, batch_norm, way), group in table.groupby(["selection", "batch_norm", "repair"]):
        cells = [_change(group[group.level == level].change) for level in (0.75, 0.5, 0.25)]
        rows.append((group[group.level == 0.5].change.median(), [way, batch_norm, selection, *cells]))
    header = ["repair", "batch-norm statistics", "kept by", *(f"{level} % kept (pp)" for level in (75, 50, 25))]
    return _table(header, *(cells for _, cells in sorted(rows, reverse=True)))


def allocation(figures: Path) -> str:
    """Plans of the same MACs, by how the channels are divided among layers: change of accuracy."""
    table = pd.read_csv(figures / "compact_allocation.csv")
    levels = sorted(table.level.unique(), reverse=True)
    rows = []
    for (way, plan), group in table.groupby(["repair", "plan"]):
        rows.append([plan, way, *(_change(group[group.level == level].change) for level in levels)])
    return _table(["plan", "repair", *(f"{100 * level:g} % of the MACs (pp)" for level in levels)], *rows)


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
    networks = list(table.network.unique())
    share = table.groupby("network").macs_share.first()
    rows = []
    for (machine, runtime, precision, batch_size), group in table.groupby(["machine", "runtime", "precision", "batch_size"], sort=False):
        row = group.set_index("network")
        columns = row.loc[networks[1:]].itertuples()
        cells = (f"{r.own_speedup:.2f} ({r.lowest_own_speedup:.2f} to {r.highest_own_speedup:.2f})" for r in columns)
        rows.append([machine, runtime, precision, batch_size, f"{row.milliseconds.iloc[0]:.1f} ms", *cells])
    limits = ["", "if MACs were time", "", "", "", *(f"{1 / share[name]:.2f}" for name in networks[1:])]
    return _table(["machine", "runtime", "precision", "batch size", *networks], *rows, limits)


def baselines(figures: Path) -> str:
    """Every way to prune at the same MACs: accuracy without training, and after the same fine-tuning."""
    table = pd.read_csv(figures / "baselines_methods.csv")
    n_epochs = table.epochs.max()
    columns = {f"{100 * level:g} %": ("new batch-norm statistics", level) for level in (0.75, 0.5, 0.25)}
    columns |= {f"50 %, {n_epochs} epochs of fine-tuning": ("fine-tuned", 0.5)}
    by_column = {name: table[(table.stage == stage) & (table.level == level)] for name, (stage, level) in columns.items()}
    order = by_column[list(columns)[-1]].groupby("method").accuracy.median().sort_values(ascending=False).index
    rows = []
    for method in order:
        parts = [part[part.method == method].accuracy for part in by_column.values()]
        rows.append([method, *(_median_and_range(part) if len(part) else "" for part in parts)])
    return _table(["method", *columns], *rows)


def optimizers(figures: Path) -> str:
    """The optimizers side by side, after the same number of epochs."""
    table = pd.read_csv(figures / "optimizers.csv").sort_values("test_accuracy", ascending=False)
    rows = (
        [trial, _median_and_range(group.test_accuracy), f"{(group.seconds / group.epochs).median():.1f} s"]
        for trial, group in table.groupby("trial", sort=False)
    )
    return _table(["optimizer, learning rate and schedule", f"test accuracy after {table.epochs.max()} epochs", "time per epoch"], *rows)


def quantization(figures: Path) -> str:
    """Change of accuracy by bits, custom and PyTorch's."""
    table = pd.read_csv(figures / "quantize_bits.csv").set_index("way")
    rows = (
        [way, *("" if pd.isna(value) else f"{value:+.2f}" for value in row)] for way, row in zip(table.index, table.to_numpy(), strict=True)
    )
    return _table(["way", *(f"{bits} (pp)" for bits in table)], *rows)


def pruned_and_quantized(figures: Path) -> str:
    """Pruned and quantized networks, by size."""
    rows = []
    for row in pd.read_csv(figures / "quantize_pareto.csv").sort_values("bytes", ascending=False).itertuples():
        file_bytes = "" if pd.isna(row.file_bytes) else f"{row.file_bytes:,.0f}"
        rows.append([row.pruned, row.what, f"{row.bytes:,}", file_bytes, f"{row.accuracy:.2f} %", f"{row.change_from_base:+.2f}"])
    return _table(["pruned", "numbers", "bytes", "deflated, in a file", "test accuracy", "change from the trained network (pp)"], *rows)


def integer_speed(figures: Path) -> str:
    """Time of PyTorch's 16- and 8-bit networks, compiled."""
    rows = []
    for row in pd.read_csv(figures / "quantize_time.csv").itertuples():
        rows.append(
            [
                row.machine,
                row.batch_size,
                row.network,
                f"{row.milliseconds:.2f} ms",
                f"{row.speedup:.2f} ({row.lowest:.2f} to {row.highest:.2f})",
            ]
        )
    return _table(["machine", "batch size", "numbers", "time", "speed-up over float32"], *rows)


def newest(path: Path) -> pd.DataFrame:
    """The rows of a sweep that were measured on the network that it was last measured on."""
    table = pd.read_csv(path)
    return table[table.base == table.base.iloc[-1]].reset_index(drop=True)


def _median_and_range(values: pd.Series, fmt: str = "{:.2f}", unit: str = " %") -> str:
    median, lowest, highest = map(fmt.format, (values.median(), values.min(), values.max()))
    return median + unit + (f" ({lowest} to {highest})" if len(values) > 1 else "")


def _change(values: pd.Series) -> str:
    return _median_and_range(values, "{:+.2f}", "")


def is_own(methods: pd.Index | pd.Series) -> np.ndarray | pd.Series:
    """Which of the names of methods in ``baselines_methods.csv`` are this project's ways."""
    return methods.str.startswith(("k-means", "merged", "by sensitivity"))


def gains_of_ends(figures: Path) -> pd.DataFrame:
    """Accuracy over that of the uniform plan (pp), by distance, measure, level and seed, a column for each family of plans."""
    return gains_over_uniform(newest(figures / "prune_ends.csv").query("images == 'test' and plan != 'as trained'"))


def _table(header: list[str], *rows: list) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


ENDS = ("first-heavy", "last-heavy", "first/last-heavy", "chosen on training images")
TABLES: tuple[Callable[[Path], str], ...] = (
    *(main_result, result, checkpoints, repair, allocation, fine_tuning, ways, baselines, inference),
    *(quantization, pruned_and_quantized, integer_speed, clustering, ends, trials, speed, optimizers),
)
