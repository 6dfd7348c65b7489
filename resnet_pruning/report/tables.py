"""The tables of README.md and docs/results.md, in Markdown, each from the CSVs in ``figures/``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import Real
from .compact_networks import OVER_SEEDS, called, kept
from .few_bits import kinds, numbers_of, shown


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


NAMES = {  # of the others, `called` makes them
    "resnet20_w4a4": "4-bit weights and activations",
    "resnet20_w2a2": "2-bit weights and activations",
    "resnet20_32kB": "64 shared rows of 3×3 kernels",
    "resnet20_16kB": "64 shared rows of 3×3 kernels, costlier bits",
}
FASTEST = {"runtime": "openvino", "precision": "int8"}
GPU_TIMES = "benchmark_inference_gpu.csv"


def networks(figures: Path) -> pd.DataFrame:
    """The committed networks, next to the one before pruning.

    Returns
    -------
    DataFrame by the name of the checkpoint: accuracy (%, mean over seeds), lowest, highest, seeds, change (pp), macs and parameters (% of
    the network before pruning), kB of the file, epochs of further training; in `FASTEST`, the accuracy, and the speed-up over the network
    before pruning in `FASTEST` (batch 256, batch 1) and in compiled float32 (overall 256, overall 1); NaN where it was not timed
    """
    accuracy = pd.read_csv(figures / "base_seeds.csv").accuracy[0]
    whole = {"accuracy": accuracy, "lowest": accuracy, "highest": accuracy, "seeds": 1, "change": 0.0, "epochs": 0}
    whole |= {"macs": 100.0, "parameters": 100.0}
    pruned = kept(newest(figures / "kept_networks.csv"))
    pruned = pruned.assign(macs=100 * pruned.macs_share, parameters=100 * pruned.parameters_share)
    few = pd.read_csv(figures / "bytes.csv")
    settings = [*few.loc[:, "method":"renewals"], *few.loc[:, "stream_bits":"own_steps"], "epochs"]
    few = few.assign(network=few.groupby(settings, dropna=False).checkpoint.transform("first")).dropna(subset="network")
    few = few.groupby("network", sort=False).agg(**OVER_SEEDS, epochs=("epochs", "first"), made_of=("pruned", "first"))
    few = few.assign(**{size: few.made_of.map(pruned[size]).fillna(100.0) for size in ("macs", "parameters")})
    few = few.assign(epochs=few.epochs + few.made_of.map(pruned.epochs).fillna(0).astype(int))  # first pruned, and trained
    table = pd.concat([pd.DataFrame([whole], index=["resnet20"]), pruned[list(whole)], few[list(whole)]])
    table["kB"] = [(figures.parent / "checkpoints" / f"{name}.pt").stat().st_size / 1000 for name in table.index]
    speed, measured = (_in_fastest(table) for table in (timings(figures), newest(figures / "runtime_accuracy.csv")))
    wide = speed.pivot_table(index="network", columns="batch_size", values=["own_speedup", "speedup"])
    names = {"batch": "own_speedup", "overall": "speedup"}
    speedups = pd.DataFrame({f"{name} {size}": wide[column][size] for name, column in names.items() for size in (256, 1)})
    in_fastest = measured.set_index("network").accuracy.rename("accuracy in int8")
    return table.join([in_fastest, speedups]).round(2).rename_axis("network")


def _in_fastest(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table.runtime == FASTEST["runtime"]) & (table.precision == FASTEST["precision"])]


def subject(figures: Path) -> str:
    """The size of the network that everything is about, and its accuracy next to the published one."""
    seeds, published = pd.read_csv(figures / "base_seeds.csv"), pd.read_csv(figures / "benchmark_accuracy.csv").iloc[0]
    base = seeds.iloc[0]
    return (
        f"ResNet-20 has {base.parameters / 1e6:.2f} million parameters and takes {base.macs / 1e6:.0f} million multiply-accumulates "
        f"(MACs) for an image. Trained here for {base.epochs} epochs, taught by a network of twice the width, it has {base.accuracy:.2f} % "
        f"test accuracy (mean of {len(seeds)} seeds {seeds.accuracy.mean():.2f} %). The paper that introduced it has "
        f"{published.accuracy:.2f} %, without a teacher."
    )


def main_result(figures: Path) -> str:
    """The committed networks: accuracy, size, further training, time."""
    rows = []
    for row in networks(figures).reset_index().to_dict("records"):
        speedups = ("" if pd.isna(row[f"batch {size}"]) else f"{row[f'batch {size}']:.1f}×" for size in (256, 1))
        sizes = f"{row['macs']:.0f} %", f"{row['parameters']:.0f} %", f"{row['kB']:,.0f} kB"
        result = _of_seeds(row), f"{row['change']:+.2f} pp"
        rows.append(
            [
                NAMES.get(row["network"]) or called(row["network"]),
                *result,
                *sizes,
                *speedups,
                row["epochs"],
                row["seeds"],
                f"`{_short(row['network'])}`",
            ]
        )
    sizes = ["MACs", "parameters", "file", "speed-up, batches of 256", "speed-up, single images"]
    return _table(["network", "test accuracy", "change", *sizes, "epochs", "seeds", "name"], *rows)


def main_note(figures: Path) -> str:
    """What a reader of `main_result` has to know about its numbers."""
    table, measured = networks(figures), newest(figures / "runtime_accuracy.csv")
    whole, reached = table.loc["resnet20"], table.loc["resnet20_fast2_batch1", "batch 1"]
    exact = measured[measured.runtime == "eager"].set_index("network").accuracy
    by_8_bits = _in_fastest(measured).set_index("network").accuracy - exact
    gpu = timings(figures, GPU_TIMES).query("runtime == 'compiled' and batch_size == 256")
    speedups = gpu.pivot_table(index="network", columns="precision", values="own_speedup")
    half = speedups.loc["resnet20_macs50"]
    return (
        "*Speed-ups* are medians over the unpruned network in OpenVINO with 8-bit integers on two CPU threads; single rounds differ from "
        f"them by a factor of up to {_spread(figures):.1f}. The unpruned network there is "
        f"{whole['overall 256']:.1f} (batches) and {whole['overall 1']:.1f} times (single images) as fast as PyTorch's compiled float32. "
        f"{'The plan for single images missed its goal. ' if reached < 1.8 else ''}8 bits change accuracy by {by_8_bits.min():+.2f} to "
        f"{by_8_bits.max():+.2f} pp (percentage points). On a GPU "
        f"({gpu.machine.iloc[0].split(' ')[1]}, batches), the network with half of the MACs is {half.float32:.1f} times as fast in "
        f"float32, but only {half.bfloat16:.1f} times in bfloat16."
    )


def _spread(figures: Path) -> float:
    """The largest factor between the speed-up of a pruned network in a single round and the median over the rounds, in `FASTEST`."""
    table = _in_fastest(timings(figures)).query("own_speedup != 1")
    return float(pd.concat([table.highest_own_speedup / table.own_speedup, table.own_speedup / table.lowest_own_speedup]).max())


def result(figures: Path) -> str:
    """The trained networks: accuracy, cost, and what their training took."""
    rows = pd.concat([pd.read_csv(figures / f"{name}.csv") for name in ("base_seeds", "other_networks")])
    return _table(
        ["network", "seed", "test accuracy", "parameters", "MACs", "training images", "epochs", "teacher", "time"],
        *(
            [
                row.network,
                row.seed,
                f"{row.accuracy:.2f} %",
                f"{row.parameters:,}",
                f"{row.macs:,}",
                f"{row.n_train_images:,}",
                row.epochs,
                row.teacher if isinstance(row.teacher, str) else "",
                f"{row.minutes:.0f} min",
            ]
            for row in rows.itertuples()
        ),
    )


def speed(figures: Path) -> str:
    """Training throughput, from a straightforward loop to `training.train`."""
    rows = of_last_machine(pd.read_csv(figures / "benchmark_training.csv"), ["batch_size"]).itertuples()
    return _table(
        ["loop", "images/s, median (lowest to highest)", "ratio to the straightforward loop"],
        *(
            [
                row.loop,
                f"{row.images_per_second:,.0f} ({row.lowest:,.0f} to {row.highest:,.0f})",
                f"{row.ratio:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})",
            ]
            for row in rows
        ),
    )


def step(figures: Path) -> str:
    """What a training step consists of, and how near its convolutions come to the machine's peak."""
    rows = pd.read_csv(figures / "benchmark_step.csv")
    peaks = rows.at_peak.map("{:.0f} %".format, na_action="ignore").fillna("")
    cells = zip(rows.part, rows.milliseconds.map("{:.1f} ms".format), rows.share.map("{:.0f} %".format), peaks, strict=True)
    return _table(["part", "time", "share", "of the peak rate"], *map(list, cells))


def time_to_accuracy(figures: Path) -> str:
    """The time to the published accuracy, next to that of a straightforward loop."""
    rows = []
    for row in pd.read_csv(figures / "benchmark_accuracy.csv").itertuples():
        spread = "" if pd.isna(row.seeds) else f" ({row.lowest:.2f} to {row.highest:.2f}, {row.seeds:.0f} seeds)"
        rows.append([row.recipe, row.epochs, f"{row.accuracy:.2f} %{spread}", f"{row.minutes:.1f}", f"{row.ratio:.1f}"])
    return _table(["training", "epochs", "test accuracy", "minutes", "times as fast"], *rows)


def trials(figures: Path) -> str:
    """The short runs that the recipe was chosen by, the longest first."""
    table = pd.read_csv(figures / "training_trials.csv").sort_values(["epochs", "held_out_accuracy"], ascending=False)
    table["time"] = table.seconds.map("{:,.0f} s".format, na_action="ignore").fillna("")
    rows = ([row.trial, row.epochs, row.seed, f"{row.held_out_accuracy:.2f} %", row.time] for row in table.itertuples())
    return _table(["trial", "epochs", "seed", "held-out accuracy", "time"], *rows)


def clustering(figures: Path) -> str:
    """Accuracy with 75 and 50 % of the filters in every layer, by what is clustered and what is done about batch norm."""
    table = newest(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction'")
    table = table[table.level.isin([0.75, 0.5]) & ((table.batch_norm == "re-estimated") | (table.distance == "raw"))]
    table["clustered by"] = table.distance + table.weighting.map(lambda weighting: ", weighted" if weighting else "")
    rows = []
    for key, group in table.groupby(["batch_norm", "representative", "clustered by"]):
        cells = {level: _median_and_range(part.accuracy) for level, part in group.groupby("level")}
        rows.append((group[group.level == 0.5].accuracy.median(), [key[2], cells[0.5], cells[0.75], key[1], key[0]]))
    header = ["clustered by", "50 % of the filters", "75 % of the filters", "replaced by", "batch-norm statistics"]
    return _table(header, *(cells for _, cells in sorted(rows, reverse=True)))


def ends(figures: Path) -> str:
    """What plans that keep more in some layers gain over uniform plans of the same cost, over all budgets and seeds."""
    groups = gains_of_ends(figures).groupby(["distance", "measure"], sort=False)
    rows = (
        [family, *(_with_range(part[family].mean(), part[family].min(), part[family].max(), "{:+.2f}") for _, part in groups)]
        for family in ENDS
    )
    return _table(["plan", *(f"{distance}, equal {measure} (pp)" for (distance, measure), _ in groups)], *rows)


def repair(figures: Path) -> str:
    """What is done about the channels that go: change of accuracy, by how many stay in the first convolution of each block."""
    table = newest(figures / "compact_repair.csv")
    rows = []
    for (selection, batch_norm, way), group in table.groupby(["selection", "batch_norm", "repair"]):
        cells = [_change(group[group.level == level].change) for level in (0.75, 0.5, 0.25)]
        rows.append((group[group.level == 0.5].change.median(), [way, *cells, batch_norm, selection]))
    header = ["repair", *(f"{level} % kept (pp)" for level in (75, 50, 25)), "batch-norm statistics", "kept by"]
    return _table(header, *(cells for _, cells in sorted(rows, reverse=True)))


def allocation(figures: Path) -> str:
    """Plans of the same MACs, by how the channels are divided among layers: change of accuracy."""
    table = newest(figures / "compact_allocation.csv")
    levels = sorted(table.level.unique(), reverse=True)
    rows = []
    for (way, plan), group in table.groupby(["repair", "plan"]):
        rows.append(
            [
                plan.replace("uniform fraction", "the same share in every block"),
                way,
                *(_change(group[group.level == level].change) for level in levels),
            ]
        )
    return _table(["plan", "repair", *(f"{100 * level:g} % of the MACs (pp)" for level in levels)], *rows)


def kept_networks(figures: Path) -> str:
    """The pruned networks that are committed: their plans, and their accuracy before and after fine-tuning."""
    rows = []
    for name, row in kept(newest(figures / "kept_networks.csv")).iterrows():
        sizes = f"{100 * row.macs_share:.1f} %", f"{100 * row.parameters_share:.1f} %"
        rows.append([name, *sizes, f"{row.epochs:.0f}", f"{row.accuracy_before:.2f} %", _of_seeds(row), f"{row.change:+.2f}"])
    header = ["network", "MACs", "parameters", "epochs", "accuracy before", "accuracy after", "change from the trained network (pp)"]
    return _table(header, *rows)


def in_few_bytes(figures: Path) -> str:
    """Networks in few bytes: integers and codebooks that are not trained, then those that are, each by their size on disk."""
    table = pd.read_csv(figures / "bytes.csv").sort_values("bytes_on_disk", ascending=False, kind="stable")
    table = table.assign(kind=kinds(table), what=numbers_of(table), group=2 * (table.epochs > 0) + (table.method == "codebook"))
    table["kind"] += (table.representatives == "random").map({True: ", drawn at random", False: ""})
    rows = []
    alike = ["group", "kind", "what", "epochs", "bit_cost"]
    for (_, kind, what, epochs, _), seeds in table.sort_values("group", kind="stable").groupby(alike, sort=False):
        size, bits, accuracy, change = seeds[["bytes_on_disk", "bits_per_weight", "accuracy", "change"]].mean()
        result = _median_and_range(seeds.accuracy, middle=accuracy), f"{change:+.2f}"
        rows.append([kind, what, f"{size / 1000:.1f} kB", f"{bits:.2f}", epochs, len(seeds), *result])
    return _table(
        ["weights", "bits, or representatives", "file", "bits per parameter", "epochs", "seeds", "test accuracy", "change (pp)"], *rows
    )


def inference(figures: Path) -> str:
    """Speed-up of each pruned network over the trained one in the same runtime and precision, and that of the latter over the first row."""
    table = timings(figures)
    return _own_speedups(table[(table.runtime != "eager") & ((table.runtime != "compiled") | (table.precision == "float32"))])  # readable


def inference_on_gpu(figures: Path) -> str:
    """As `inference`, on a GPU."""
    return _own_speedups(timings(figures, GPU_TIMES))


def _own_speedups(table: pd.DataFrame) -> str:
    networks = list(table.network.unique())
    share = table.groupby("network").macs_share.first()
    rows = []
    for (batch_size, runtime, precision), group in table.groupby(["batch_size", "runtime", "precision"], sort=False):
        row = group.set_index("network")
        cells = (_with_range(r.own_speedup, r.lowest_own_speedup, r.highest_own_speedup) for r in row.loc[networks[1:]].itertuples())
        whole = row.iloc[0]
        rows.append([f"{runtime}, {precision}", batch_size, f"{whole.milliseconds:.2f} ms", f"{whole.speedup:.2f}", *cells])
    limits = ["if MACs were time", "", "", "", *(f"{1 / share[name]:.2f}" for name in networks[1:])]
    return _table(["runtime", "batch size", "not pruned", "not pruned, speed-up", *map(_short, networks[1:])], *rows, limits)


def baselines(figures: Path) -> str:
    """Every way to prune at the same MACs: accuracy before fine-tuning, and after it where it was fine-tuned."""
    untrained, tuned = newest(figures / "untrained.csv"), equally_tuned(figures)
    tuned = tuned.assign(level=tuned.level.replace(1, 0.5))  # what is not pruned stands beside the networks with half of the MACs
    tables = {
        f"{100 * level:g} %{words}": table[table.level == level]
        for level in (0.5, 0.25)
        for words, table in ((", before fine-tuning", untrained), (f", {tuned.epochs.max()} epochs", tuned))
    }
    half = pd.concat([tuned, untrained]).query("level == 0.5").groupby("method", sort=False)
    best = pd.DataFrame({"after": tuned[tuned.level == 0.5].groupby("method").accuracy.mean(), "before": half.accuracy.min()})
    rows = []
    for method in best.sort_values(["after", "before"], ascending=False).index:
        parts = [table[table.method == method].accuracy for table in tables.values()]
        size = f"{100 * half.parameters_share.mean()[method]:.0f} %"
        rows.append([method, size, *(_median_and_range(part, middle=part.mean()) if len(part) else "" for part in parts)])
    return _table(["method", "parameters at 50 % of the MACs", *tables], *rows)


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
        [shown(way), *("" if pd.isna(value) else f"{value:+.2f}" for value in row)]
        for way, row in zip(table.index, table.to_numpy(), strict=True)
    )
    return _table(["way", *(f"{bits} (pp)" for bits in table)], *rows)


def bits_by_layer(figures: Path) -> str:
    """Equal bits, and bits by sensitivity of as many bytes."""
    table = pd.read_csv(figures / "quantize_by_layer.csv")
    table[["rounding", "allocation"]] = table.way.str.split(", ", expand=True)
    wide = table.pivot_table(index=["bits", "rounding", "bytes"], columns="allocation", values="accuracy", sort=False).reset_index()
    kB, ways = (wide["bytes"] / 1000).map("{:.0f} kB".format), [wide[way].map("{:.2f} %".format) for way in ("equal", "by sensitivity")]
    rows = map(list, zip(wide.bits, wide.rounding, kB, *ways, strict=True))
    return _table(["bits", "rounding", "weights", "equal bits", "bits by sensitivity"], *rows)


# By notebook: the tables of its sweeps and training runs that say how long each row took.
SOURCES = {
    "01_train": ("base_seeds", "other_networks", "training_trials"),
    "02_prune_uniform": ("prune_uniform",),
    "03_prune_first_last_heavy": ("prune_sensitivity", "prune_ends", "prune_ends_fine_tuned"),
    "04_fine_tune and 07_baselines": ("untrained", "currencies", "currencies_wide", "baselines_weights", "protocol_trials"),
    "05_analysis": ("analysis_steps",),
    "06_optimizers": ("optimizers", "optimizers_rates"),
    "08_quantize": ("quantize", "quantize_images", "quantize_layers", "quantize_observers", "quantize_pruned", "quantize_pruned_ready"),
    "09_compact": ("compact_repair", "compact_allocation", "kept_networks"),
}


def durations(figures: Path) -> str:
    """How long the rows of each notebook took in all; those that a GPU measured as the median of the others, by epochs and MACs."""

    def hours(name: str) -> float:
        table = pd.read_csv(figures / f"{name}.csv")
        column = next((unit for unit in ("seconds", "minutes") if unit in table), None)
        seconds = table[column] * (60 if column == "minutes" else 1) if column else table.filter(like="seconds_").sum(axis=1)
        on_cpu = table.device == "cpu" if "device" in table else ~table.get("machine", pd.Series("", table.index)).str.contains("NVIDIA")
        if not on_cpu.all():
            effort = table.epochs.clip(lower=1) * table.get("macs", 1)  # 0 epochs: without fine-tuning
            seconds = seconds.where(on_cpu, effort * (seconds / effort)[on_cpu].median())
        return seconds.sum() / 3600

    tuned, coded = pd.read_csv(figures / "currencies.csv").query("device == 'cpu'"), pd.read_csv(figures / "bytes.csv")
    found = {notebook: sum(map(hours, names)) for notebook, names in SOURCES.items()}
    found["10_codebooks"] = coded.epochs.sum() * (tuned.seconds / tuned.epochs).median() / 3600
    rows = [[notebook, f"{value:.1f}"] for notebook, value in found.items()]
    return _table(["notebook", "hours"], *rows, ["all", f"{sum(found.values()):.0f}"])


def pruned_and_quantized(figures: Path) -> str:
    """Pruned and quantized networks, by size."""
    rows = []
    for row in pd.read_csv(figures / "quantize_pareto.csv").sort_values("bytes", ascending=False).itertuples():
        file_bytes = "" if pd.isna(row.file_bytes) else f"{row.file_bytes:,.0f}"
        rows.append([row.pruned, shown(row.what), file_bytes, f"{row.bytes:,}", f"{row.accuracy:.2f} %", f"{row.change_from_base:+.2f}"])
    return _table(
        ["pruned", "numbers", "bytes of the file", "of the tensors", "test accuracy", "change from the trained network (pp)"], *rows
    )


def integer_speed(figures: Path) -> str:
    """Time of PyTorch's 16- and 8-bit networks, compiled."""
    rows = []
    for row in pd.read_csv(figures / "quantize_time.csv").itertuples():
        speedup = _with_range(row.speedup, row.lowest, row.highest)
        rows.append([row.network, row.batch_size, f"{row.milliseconds:.2f} ms", speedup])
    return _table(["numbers", "batch size", "time", "speed-up over float32"], *rows)


def small_and_pruned(figures: Path) -> tuple[pd.Series, pd.Series, pd.Series, pd.Series]:
    """The rows of ``controls.csv`` of the narrower and the shallower network that are trained from the start, of the pruned one with as
    many epochs in all, and of the one that was fine-tuned for longer and ends highest, to a tenth, in the fewest epochs."""
    table = pd.read_csv(figures / "controls.csv").set_index("network", drop=False)
    longest = table[table.network == "by sensitivity, inside blocks"].set_index("epochs", drop=False).sort_index()
    longest = longest.loc[longest.accuracy.round(1).idxmax()]
    narrower, shallower = (table.loc[f"{name}_half, from scratch"] for name in ("resnet20", "resnet14"))
    return narrower, shallower, table.loc["by sensitivity, blocks and streams"], longest


def wide_and_as_long(figures: Path) -> tuple[pd.Series, pd.Series]:
    """The rows of ``controls_wide.csv`` of the best network that is pruned from doubled widths to the base's MACs, and of the base, trained
    from the start for as many epochs."""
    table = pd.read_csv(figures / "controls_wide.csv").set_index("network")
    pruned = table[table.index.str.startswith("doubled widths") & ~table.index.str.endswith("half as many MACs")]
    return pruned.loc[pruned.accuracy.idxmax()], table.loc["resnet20_35epochs, from scratch"]


def newest(path: Path) -> pd.DataFrame:
    """The rows of a sweep that were measured on the network that it was last measured on."""
    table = pd.read_csv(path)
    return table[table.base == table.base.iloc[-1]].reset_index(drop=True)


def timings(figures: Path, csv: str = "benchmark_inference.csv") -> pd.DataFrame:
    """The rows of a CSV of `studies.benchmark.benchmark_inference`, of one machine for each runtime, precision and batch size."""
    return of_last_machine(pd.read_csv(figures / csv), ["runtime", "precision", "batch_size"])


def of_last_machine(table: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """For each combination of `settings`, the rows of the machine that was timed last: times of several machines are not compared."""
    return table[table.machine == table.groupby(settings).machine.transform("last")].reset_index(drop=True)


def at_half(table: pd.DataFrame) -> pd.Series:
    """The mean accuracy over seeds at half of the MACs, by method."""
    return table[table.level == 0.5].groupby("method").accuracy.mean()


def equally_tuned(figures: Path) -> pd.DataFrame:
    """The rows of ``currencies.csv`` that all have the same, smallest number of epochs."""
    table = newest(figures / "currencies.csv")
    return table[table.epochs == table.epochs.min()].reset_index(drop=True)


def _median_and_range(values: pd.Series, fmt: str = "{:.2f}", unit: str = " %", middle: Real | None = None) -> str:
    """The median, or another `middle`, with the range if there are several values."""
    if len(values) == 1:
        return fmt.format(values.iloc[0]) + unit
    return _with_range(values.median() if middle is None else middle, values.min(), values.max(), fmt, unit)


def _with_range(value: Real, lowest: Real, highest: Real, fmt: str = "{:.2f}", unit: str = "") -> str:
    """A value, and its range in brackets in a line of its own: narrow columns can be read on a phone."""
    return f"{fmt.format(value)}{unit}<br>({fmt.format(lowest)} to {fmt.format(highest)})"


def _of_seeds(row: Mapping[str, Any] | pd.Series) -> str:
    """The mean accuracy, with its range if there are several seeds."""
    if row["seeds"] == 1:
        return f"{row['accuracy']:.2f} %"
    return _with_range(row["accuracy"], row["lowest"], row["highest"], unit=" %")


def _short(name: str) -> str:
    """The name of a checkpoint without what all of them begin with."""
    return name.removeprefix("resnet20_")


def _change(values: pd.Series) -> str:
    return _median_and_range(values, "{:+.2f}", "")


def is_own(methods: pd.Index | pd.Series) -> np.ndarray | pd.Series:
    """Which of the names of methods are this project's ways."""
    own = ("k-means", "elimination", "by sensitivity", "tied", "projected")
    return methods.str.startswith(own) | methods.str.endswith(("least squares", "reconstruction"))


def gains_of_ends(figures: Path) -> pd.DataFrame:
    """Accuracy over that of the uniform plan (pp), by distance, measure, level and seed, a column for each family of plans."""
    return gains_over_uniform(newest(figures / "prune_ends.csv").query("images == 'test' and plan != 'as trained'"))


def _table(header: list[str], *rows: list) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


ENDS = ("first-heavy", "last-heavy", "first/last-heavy", "first/last-heavy, 90 %", "borders heavy", "chosen")
TABLES: tuple[Callable[[Path], str], ...] = (
    *(subject, main_result, main_note, result, repair, allocation, kept_networks, baselines, inference, inference_on_gpu, in_few_bytes),
    *(quantization, bits_by_layer, pruned_and_quantized, integer_speed, clustering, ends, trials, speed, step),
    *(time_to_accuracy, optimizers, durations),
)
