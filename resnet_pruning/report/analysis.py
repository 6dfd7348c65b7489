"""The questions of notebook 05: each function takes tables from ``figures/`` and returns the rows that a figure shows."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..arguments import Integer, Real
from .comparisons import replaced_rows
from .few_bits import one_allocation, shown
from .style import as_array
from .tables import equally_tuned, newest

ALONE = "alone, half of the filters (pp)"
MEASURES = {
    "inertia": "variance within clusters",
    "effective_rank": "effective rank",
    "rank_90": "number of directions that hold 90 % of the variance",
    "neighbour": "similarity to the most similar filter",
}
MAIN = {
    "by sensitivity, inside blocks": "elimination, reconstructed, allocated by sensitivity",
    "elimination, reconstruction": "elimination, reconstructed, the same share in every block",
    "random channels, reconstruction": "random channels, reconstructed",
    "elimination": "elimination",
    "k-means of activations, medoids": "k-means of activations, one of each cluster kept",
    "k-means, centroids": "k-means of weights, merged (the assignment)",
    "random channels": "random channels",
    "smallest L2 norm": "channels of the smallest L2 norm",
}
REMOVED = ("random channels", "smallest L2 norm", "geometric median", "Neuron Merging")
CLUSTERED = ("k-means, centroids", "k-means of unit filters, centroids")
CORRELATED = "k-means of correlation, centroids"
CHOSEN = ("k-means of activations, medoids", "elimination")
REPAIRED = ("elimination, reconstruction", "by sensitivity, inside blocks")
GROUPS = ["pruned", "quantized", "both"]
NEW_STATISTICS = "new batch-norm statistics"


def rows_of(path: str | Path, base: str) -> pd.DataFrame:
    """The rows of a CSV that were measured on the base network `base`, see `files.fingerprint`.

    Raises
    ------
    ValueError : there are no such rows
    """
    table = pd.read_csv(path)
    rows = table[table.base == base]
    if rows.empty:
        raise ValueError(f"{path} has rows for {', '.join(table.base.unique())}, expected some for {base}: run its notebook first")
    return rows.reset_index(drop=True)


def compared_methods(figures: Path) -> pd.DataFrame:
    """The rows of ``untrained.csv``, and those of ``currencies.csv`` that were trained for equally many epochs."""
    return pd.concat([newest(figures / "untrained.csv"), equally_tuned(figures)], ignore_index=True)


def main_result(methods: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of the methods in `MAIN`, named as there in the column `what`: a panel for each share of the MACs with both stages.

    What keeps most before fine-tuning comes first.

    Parameters
    ----------
    methods : from `compared_methods`; rows without training have 0 epochs
    """
    shown = pd.concat([methods[methods.method == method].assign(what=what) for method, what in MAIN.items()])
    at_first = shown[shown.stage == NEW_STATISTICS].groupby("what").accuracy.max()
    shown = shown.assign(first=shown.what.map(at_first)).sort_values("first", ascending=False, kind="stable").drop(columns="first")
    before, after = (set(shown[shown.stage == stage].level) for stage in (NEW_STATISTICS, "fine-tuned"))
    levels = sorted(before & after, reverse=True)
    return {f"{100 * level:g} % of the MACs": shown[shown.level == level] for level in levels}


def share_curves(uniform: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``prune_uniform.csv`` with the same share of filters in every layer, with their `way` and the share as `kept (%)`."""
    rows = uniform[uniform.plan == "uniform fraction"]
    parts = {
        "raw weights, statistics as trained": replaced_rows(rows, batch_norm="as trained"),
        "raw weights, statistics re-estimated": replaced_rows(rows),
        "correlation, weighted, statistics re-estimated": replaced_rows(rows, distance="correlation", weighting=0.5),
    }
    table = pd.concat([part.assign(way=way) for way, part in parts.items()])
    return table.assign(**{"kept (%)": 100 * table.level})


def knee(curve: pd.Series) -> tuple[float, float] | None:
    """The x at which a curve is furthest above the straight line between its ends, and by how much; None if it never is above it.

    The index of `curve` is x, sorted.
    """
    x, y = curve.index.to_numpy(), curve.to_numpy()
    above = y - (y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]))
    furthest = above.argmax()
    return None if furthest in (0, len(x) - 1) else (float(x[furthest]), float(above[furthest]))


def knees(curves: pd.DataFrame, at_least: Integer = 6) -> dict[str, tuple[float, float] | None]:
    """The `knee` of each way in `share_curves` that was measured at `at_least` shares or more."""
    medians = {way: rows.groupby("kept (%)").accuracy.median() for way, rows in curves.groupby("way", sort=False)}
    return {way: knee(curve) for way, curve in medians.items() if len(curve) >= at_least}


def allocations(uniform: pd.DataFrame, budgets: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows by panel, with accuracy, `MACs (%)` and `what`: how clusters are divided among layers.

    Parameters
    ----------
    uniform : ``prune_uniform.csv``
    budgets : ``compact_allocation.csv``
    """
    replaced = replaced_rows(uniform)
    replaced = replaced.assign(what=replaced.plan.replace({"uniform": "equal numbers", "uniform fraction": "equal shares"}))
    compressed = budgets[budgets.repair == "reconstruction"]
    compressed = compressed.assign(what=compressed.plan.replace({"uniform fraction": "equal shares, inside blocks"}))
    panels = {"replaced by centroids, statistics re-estimated": replaced, "removed and reconstructed": compressed}
    return {name: rows.assign(**{"MACs (%)": _percent_of_macs}) for name, rows in panels.items()}


def accuracy_at(rows: pd.DataFrame, what: str, macs: Real) -> float:
    """The median accuracy of one `what` in a panel of `allocations`, interpolated to this share of the MACs (%)."""
    curve = rows[rows.what == what].groupby("MACs (%)").accuracy.median()
    return float(np.interp(macs, curve.index, curve))


def each_gain(gains: pd.DataFrame) -> pd.DataFrame:
    """The gains of `tables.gains_over_uniform` as rows: distance, measure, level, seed, family, gain (pp); the best family comes first."""
    by_family = gains[gains.mean().sort_values(ascending=False).index]
    return by_family.melt(var_name="family", value_name="gain (pp)", ignore_index=False).reset_index().dropna(subset="gain (pp)")


def mean_gains(each: pd.DataFrame) -> pd.DataFrame:
    """The mean over budgets and seeds, best first, from `each_gain`: family, distance, measure, gain (pp)."""
    means = each.groupby(["family", "distance", "measure"])["gain (pp)"].mean()
    return means.sort_values(ascending=False).reset_index()


def ladder(methods: pd.DataFrame, steps: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """The steps of the method at half of the MACs, each adding or replacing one thing: step, accuracy (mean over seeds), worth (pp).

    Parameters
    ----------
    methods : from `compared_methods`
    steps : ``analysis_steps.csv``, the rows that only this needs
    tuned : ``currencies.csv``
    """
    rows = pd.concat([methods, steps])
    half = rows[rows.level == 0.5].groupby(["method", "stage"]).accuracy.mean()
    own = tuned[(tuned.level == 0.5) & (tuned.method == "by sensitivity, inside blocks")]
    trained = own.groupby("epochs").accuracy.agg(["mean", "count"])
    trained = trained["mean"][trained["count"] == trained["count"].max()]  # the mean of fewer seeds is no step from that of more
    found = {
        "k-means, centroids, merged": half["k-means, centroids", "as pruned"],
        "new batch-norm statistics": half["k-means, centroids", NEW_STATISTICS],
        "channels removed at random instead of merged": half["random channels", NEW_STATISTICS],
        "next layer by least squares": half["random channels, least squares", NEW_STATISTICS],
        "each block reconstructed": half["random channels, reconstruction", NEW_STATISTICS],
        "channels chosen by elimination instead": half["elimination, reconstruction", NEW_STATISTICS],
        "channels allocated by sensitivity": half["by sensitivity, inside blocks", NEW_STATISTICS],
    }
    found |= {f"{epochs} epochs of fine-tuning in all": accuracy for epochs, accuracy in trained.items()}
    table = pd.DataFrame({"step": list(found), "accuracy": list(found.values())})
    return table.assign(worth=table.accuracy.diff())


def by_distance(uniform: pd.DataFrame, shares: Collection[Real] = (0.75, 0.5)) -> pd.DataFrame:
    """Median accuracy in ``prune_uniform.csv`` by distance and representative: a column for each share, sorted by the last, best first."""
    rows = uniform[(uniform.plan == "uniform fraction") & uniform.level.isin(shares) & (uniform.batch_norm == "re-estimated")]
    weighted = rows.weighting.map(lambda weighting: ", weighted" if weighting else "")
    rows = rows.assign(what=rows.distance + weighted + " · " + rows.representative)
    wide = rows.pivot_table(index="what", columns="level", values="accuracy", aggfunc="median")[list(shares)]
    return wide.sort_values(shares[-1], ascending=False)


def alone_and_redundancy(alone: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    """The change of accuracy when one layer alone has half as many clusters as filters, and its redundancy: a row for each layer.

    Parameters
    ----------
    alone : ``prune_sensitivity.csv``
    measures : from `studies.redundancy.redundancy`
    """
    half = measures.set_index("layer").n_filters // 2
    losses = alone[alone.level == alone.plan.map(half)].groupby("plan").change.median()
    table = measures.set_index("layer")[["inertia", "shuffled", "effective_rank", "rank_90", "neighbour"]]
    table.insert(0, ALONE, losses)
    return table


def grown_mistakes(before: ArrayLike, after: ArrayLike, classes: Collection[str]) -> pd.DataFrame:
    """How often each class is mistaken for each other one, before and after: true, predicted, before, after and more; largest growth first.

    `before` and `after` (n_classes, n_classes) are counts by true and predicted class.
    """
    before, after = as_array(before), as_array(after)
    true, predicted = np.nonzero(~np.eye(len(classes), dtype=bool))
    names = np.array(classes)
    table = pd.DataFrame({"true": names[true], "predicted": names[predicted]})
    table["before"], table["after"] = before[true, predicted], after[true, predicted]
    return table.assign(more=table.after - table.before).sort_values("more", ascending=False, ignore_index=True, kind="stable")


def time_by_macs(speed: pd.DataFrame) -> pd.DataFrame:
    """`time (%)` and `MACs (%)` of the networks in ``benchmark_inference.csv`` whose plan has a budget of MACs, by `how` they are run."""
    rows = speed[(speed.device == "cpu") & ~speed.network.str.startswith("resnet20_fast")]
    named = rows.runtime + ", " + rows.precision
    how = named + ", batch " + rows.batch_size.astype(str)
    return rows.assign(how=how, **{"run in": named, "time (%)": 100 / rows.own_speedup, "MACs (%)": 100 * rows.macs_share})


def saved_time(times: pd.DataFrame) -> pd.Series:
    """The per cent of the time saved for each per cent of the MACs saved, median over networks, by `how`; from `time_by_macs`."""
    fewer = times[times.macs_share < 1]
    return ((100 - fewer["time (%)"]) / (100 - fewer["MACs (%)"])).groupby(fewer.how).median()


def removal(methods: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy of removal, clustering, choice on images and repair at half of the MACs: a column for each stage."""
    wide = methods[methods.level == 0.5].pivot_table(index="method", columns="stage", values="accuracy")
    return wide.reindex([*REMOVED, *CLUSTERED, CORRELATED, *CHOSEN, *REPAIRED])[[NEW_STATISTICS, "fine-tuned"]]


def pruned_quantized_both(pareto: pd.DataFrame, least_change: Real = -6) -> pd.DataFrame:
    """Networks of ``quantize_pareto.csv`` with a change above `least_change` (pp), by `group`: "pruned", "quantized" or "both".

    Of networks that differ only in how their bits are divided among layers, that by sensitivity is kept. Adds `kB` (of the file, or of the
    tensors of networks in floats), `bits` and `text`.
    """
    whole, plain = pareto.pruned == "not pruned", pareto.what == "float32"
    group = np.select([plain, whole], GROUPS[:2], GROUPS[2])
    table = pareto.assign(kB=(pareto.file_bytes.fillna(pareto.bytes) / 1000).round(1), group=group)
    table = table.sort_values("group", key=lambda names: names.map(GROUPS.index), kind="stable", ignore_index=True)
    table = one_allocation(table)
    table = table[table.change_from_base > least_change]
    return table.assign(text=table.pruned.str.removeprefix("MACs: ") + ", " + table.what.map(shown))


def _percent_of_macs(table: pd.DataFrame) -> pd.Series:
    return (100 * table.macs_share).round(1)


def trained_integers(figures: Path, weight_bits: Integer, activation_bits: Integer) -> pd.Series:
    """The row of ``bytes.csv`` of the unpruned network with so many bits that was trained with learned steps for the fewest epochs."""
    table = pd.read_csv(figures / "bytes.csv")
    bits = (table.weight_bits == weight_bits) & (table.activation_bits == activation_bits)
    rows = table[bits & (table.method == "learned steps") & table.pruned.isna()]
    return rows.sort_values("epochs").iloc[0]
