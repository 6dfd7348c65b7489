"""Tables that compare methods of pruning, for notebooks 05 and 07, from the rows of the latter's sweeps."""

from collections.abc import Collection

import numpy as np
import pandas as pd

from ..arguments import Real

# By the choice of channels: the method that also fits what remains.
FITTED = {
    "random channels": "random channels, reconstruction",
    "smallest L2 norm": "smallest L2 norm, reconstruction",
    "elimination": "elimination, reconstruction",
    "elimination, allocated by sensitivity": "by sensitivity, inside blocks",
}
CURRENCIES = {"macs_share": "MACs", "parameters_share": "parameters", "bytes_share": "bytes"}


def in_currencies(table: pd.DataFrame, methods: Collection[str]) -> dict[str, pd.DataFrame]:
    """The rows of some methods, in this order, once for each of `CURRENCIES`, with the remaining share of it as `share`, in %."""
    rows = pd.concat([table[table.method == method] for method in methods])
    return {words: rows.assign(share=100 * rows[column]) for column, words in CURRENCIES.items()}


def at_equal(table: pd.DataFrame, share: Real) -> pd.DataFrame:
    """The accuracy of each method at an equal share of the MACs, parameters or bytes, between the levels that were measured.

    Means over seeds, interpolated linearly over the logarithm of the share; NaN outside the measured levels.

    Returns
    -------
    DataFrame with a row for each method and a column for each of `CURRENCIES`
    """
    means = table.groupby(["method", "level"], sort=False)[["accuracy", *CURRENCIES]].mean()
    found: dict[str, dict[str, float]] = {words: {} for words in CURRENCIES.values()}
    for method, rows in means.groupby("method", sort=False):
        for column, words in CURRENCIES.items():
            known = rows.sort_values(column)
            value = np.interp(np.log(share), np.log(known[column]), known.accuracy, left=np.nan, right=np.nan)
            found[words][method] = float(value)
    return pd.DataFrame(found).rename_axis("method")


def leaders(table: pd.DataFrame) -> pd.Series:
    """The method with the highest mean accuracy over seeds, by level."""
    means = table.groupby(["level", "method"]).accuracy.mean()
    return means.groupby("level").idxmax().map(lambda key: key[1])


def change_by_stage(table: pd.DataFrame, methods: Collection[str], stages: Collection[str]) -> pd.DataFrame:
    """The mean change of accuracy (pp) of each method, in this order: a column for each level, highest first, and stage."""
    wide = table.pivot_table(index="method", columns=["level", "stage"], values="change").reindex(methods)
    order = [(level, stage) for level in sorted(table.level.unique(), reverse=True) for stage in stages]
    return wide[[column for column in order if column in wide]]


def worth_of_the_fit(table: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over seeds of the methods in `FITTED`, without and with the fit: a row for each choice of channels.

    Returns
    -------
    DataFrame with columns by level, highest first, stage, and fit ("alone" or "fitted"); NaN for what was not measured
    """
    means = table.groupby(["level", "stage", "method"], sort=False).accuracy.mean()
    names = {choice: {"alone": choice, "fitted": fitted} for choice, fitted in FITTED.items()}
    settings = sorted(dict.fromkeys((level, stage) for level, stage, _ in means.index), key=lambda setting: -setting[0])
    columns = {
        (level, stage, fit): {choice: means.get((level, stage, each[fit])) for choice, each in names.items()}
        for level, stage in settings
        for fit in ("alone", "fitted")
    }
    return pd.DataFrame(columns, dtype=float).rename_axis(columns=["level", "stage", "fit"])


def against_others(table: pd.DataFrame, own: Collection[str]) -> pd.DataFrame:
    """The best of this project's methods next to the best of the others, by mean accuracy, and the lead of the first (pp).

    Parameters
    ----------
    table : rows of `studies.method_runs.MethodRuns.measure_method`
    own : this project's methods

    Returns
    -------
    DataFrame by level, highest first, and stage
    """
    means = table.groupby(["level", "stage", "method"], sort=False).accuracy.mean().reset_index()
    sides = {"this project": means[means.method.isin(own)], "others": means[~means.method.isin(own)]}
    best = []
    for name, side in sides.items():
        rows = side.loc[side.groupby(["level", "stage"], sort=False).accuracy.idxmax()].set_index(["level", "stage"])
        best.append(rows.rename(columns={"method": name, "accuracy": f"accuracy of {name} (%)"}))
    joined = pd.concat(best, axis=1, join="inner").sort_index(level="level", ascending=False, sort_remaining=False, kind="stable")
    return joined.assign(**{"lead (pp)": joined["accuracy of this project (%)"] - joined["accuracy of others (%)"]})


def controls(scratch: pd.DataFrame, pruned: pd.DataFrame, whole: pd.Series, base: pd.Series) -> pd.DataFrame:
    """Pruned networks next to others that were trained from scratch, with the epochs of both in all.

    Parameters
    ----------
    scratch : rows of ``base_seeds.csv`` or ``other_networks.csv``, or rows of ``currencies.csv`` whose weights are new
    pruned : with the columns method, epochs (of fine-tuning), macs, parameters and accuracy
    whole : of the network before pruning, with its epochs
    base : of the network that MACs and parameters are shares of

    Returns
    -------
    DataFrame by network and epochs in all: macs_share, parameters_share, accuracy (mean over seeds), lowest, highest, seeds; highest
    accuracy first
    """
    name = scratch.network.str.replace(r"_seed\d+$", "", regex=True) + ", from scratch"
    rows = pd.concat([pruned.assign(network=pruned.method, epochs=pruned.epochs + whole.epochs), scratch.assign(network=name)])
    rows = rows.assign(**{f"{cost}_share": rows[cost] / base[cost] for cost in ("macs", "parameters")})
    over_seeds = {"accuracy": ("accuracy", "mean"), "lowest": ("accuracy", "min"), "highest": ("accuracy", "max")}
    sizes = {share: (share, "mean") for share in ("macs_share", "parameters_share")}
    table = rows.groupby(["network", "epochs"], sort=False).agg(**sizes, **over_seeds, seeds=("accuracy", "count"))
    return table.sort_values("accuracy", ascending=False)


def among_published(published: pd.DataFrame, runs: pd.DataFrame, base_accuracy: Real, network: str) -> pd.DataFrame:
    """Published results, and runs of this project in the same columns.

    Parameters
    ----------
    published : ``figures/published.csv``. Among its columns are option (of the shortcuts, A or B), epoch_read (last or best), epochs
        (in all) and looked_up (whether the numbers were read at the source, or in a table that quotes it)
    runs : with the columns method, epochs (of fine-tuning), epochs_before, accuracy, change and macs_share
    base_accuracy : accuracy of the network that the runs were pruned from
    network : name of that network

    Returns
    -------
    DataFrame with the columns of `published`; change (pp); MACs (%); and group, by which rows are drawn
    """
    names = [f"{method}, +{epochs} epochs" for method, epochs in zip(runs.method, runs.epochs, strict=True)]
    runs = runs.assign(epochs=runs.epochs_before + runs.epochs)
    own = runs.assign(network=network, method=names, year=2026, option="A", epoch_read="last", looked_up="yes", source="this notebook")
    own = own.assign(base_accuracy=round(base_accuracy, 2)).rename(columns={"accuracy": "pruned_accuracy"})
    theirs = published.assign(change=(published.pruned_accuracy - published.base_accuracy).round(2))
    everything = pd.concat([theirs, own], ignore_index=True)[list(theirs)]
    option = everything.option.map({"A": ", option A", "B": ", option B"}).fillna("")
    group = everything.network.where(everything.network == network, everything.network + option + ", published")
    return everything.assign(**{"MACs (%)": 100 * everything.macs_share, "group": group})


def outdone(everything: pd.DataFrame, network: str, by: str) -> pd.Series:
    """For each result on `network`, whether one on network `by` loses no more and has no more MACs; from `among_published`."""
    theirs, ours = (everything[everything.network == name] for name in (network, by))
    return theirs.apply(lambda row: ((ours.macs_share <= row.macs_share) & (ours.change >= row.change)).any(), axis=1)
