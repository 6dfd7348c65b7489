"""Tables on compact networks, for notebook 09, from the rows of its sweeps."""

from collections.abc import Collection, Mapping

import pandas as pd

from ..arguments import Integer

# The columns of rows that differ in their seeds only, for `DataFrame.agg`.
OVER_SEEDS = {
    "seeds": ("seed", "nunique"),
    "accuracy": ("accuracy", "mean"),
    "lowest": ("accuracy", "min"),
    "highest": ("accuracy", "max"),
    "change": ("change", "mean"),
}


def by_share(table: pd.DataFrame, values: str, widths: Mapping[str, Integer]) -> pd.DataFrame:
    """A row for each layer and a column for each share of its filters that is kept (%, as text, in increasing order).

    Parameters
    ----------
    table : with the columns layer, n_clusters and `values`
    widths : the number of filters of each layer; may have more layers than `table`
    """
    shares = (100 * table.n_clusters / table.layer.map(widths)).round(2)
    grid = table.assign(share=shares).pivot_table(index="layer", columns="share", values=values, sort=False).sort_index(axis=1)
    return grid.rename(columns="{:g}".format)


def time_by_share(timings: pd.DataFrame, widths: Mapping[str, Integer]) -> pd.DataFrame:
    """The time of blocks with fewer channels inside, in % of the whole block's: `by_share`, with one row for blocks of the same shape.

    Parameters
    ----------
    timings : from `compression.part_timings`
    widths : the number of filters of each layer
    """
    percent = 100 * timings.seconds / timings.groupby("layer").seconds.transform("last")
    inside_blocks = timings.assign(percent=percent)[timings.layer.str.endswith(".conv1")]
    return by_share(inside_blocks, "percent", widths).drop_duplicates()


def removed(plans: Mapping[str, Mapping[str, Integer]], widths: Mapping[str, Integer]) -> pd.DataFrame:
    """The share of each layer's filters that a plan removes (%), with a column for each named plan.

    A dropped block loses all filters. A layer that writes a narrower stream loses at least the channels that the stream lacks.
    """

    def kept(plan: Mapping[str, Integer], name: str) -> int:
        block, _, part = name.rpartition(".")
        if block and plan.get(f"{block}.conv1") == 0:
            return 0
        stream = (block or "layer1").split(".")[0] if part == "conv2" or not block else ""
        return min(plan.get(name, widths[name]), plan.get(stream, widths[name]))

    columns = {title: {name: 100 * (1 - kept(plan, name) / n) for name, n in widths.items()} for title, plan in plans.items()}
    return pd.DataFrame(columns).rename_axis("layer")


def gain(table: pd.DataFrame, column: str, new: str, old: str, keys: Collection[str]) -> pd.DataFrame:
    """The gain of one choice over another (pp), by the first of `keys`: mean, lowest and highest over rows that are equal in `keys`."""
    wide = table.pivot_table(index=[*keys], columns=column, values="accuracy")
    return (wide[new] - wide[old]).dropna().groupby(keys[0], sort=False).agg(["mean", "min", "max"])


def called(network: str) -> str:
    """What figures call a network of ``kept_networks.csv``: "planned 2×, batches of 256" for ``resnet20_fast2_batch256``."""
    goal, _, batch = network.removeprefix("resnet20").removeprefix("_").partition("_batch")
    if goal.startswith("macs"):
        return f"{goal.removeprefix('macs')} % of the MACs"
    images = "single images" if batch == "1" else f"batches of {batch}"
    return f"planned {goal.removeprefix('fast')}×, {images}" if goal else "not pruned"


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """The networks of ``kept_networks.csv``: a row for each plan, with the mean, lowest and highest accuracy (%) over seeds.

    Returns
    -------
    DataFrame by the name of the checkpoint, with the columns macs_share, parameters_share, epochs, accuracy_before (fine-tuning), seeds,
    accuracy, lowest, highest and change (pp)
    """
    first = {name: (name, "first") for name in ("macs_share", "parameters_share", "epochs")}
    before = {"accuracy_before": ("accuracy_before", "mean")}
    named = table.assign(network=table.groupby(["plan", "measure", "level"]).checkpoint.transform("first"))
    return named.groupby("network", sort=False).agg(**first, **before, **OVER_SEEDS).round(4)
