"""Results that the notebooks on training, plans and optimizers derive from their tables."""

from collections.abc import Mapping

import pandas as pd

from ..arguments import Integer, Real


def frequent_mistakes(counts: pd.DataFrame, n: Integer = 4) -> pd.DataFrame:
    """The `n` most frequent mistakes of one class for another, in % of the true class.

    `counts` is the table of `plots.confusion`: the true class in the first column, then a column for each predicted one.
    """
    long = counts.melt("true class", var_name="predicted class", value_name="images")
    long["share (%)"] = 100 * long.images / long.groupby("true class").images.transform("sum")
    wrong = long[long["true class"] != long["predicted class"]]
    order = {"by": ["share (%)", "true class", "predicted class"], "ascending": [False, True, True]}
    return wrong.sort_values(**order, ignore_index=True).head(n).round(1)


def replaced_rows(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows of ``prune_uniform.csv`` with these values, one for each seed.

    Columns that are not given have their most common values: raw weights, equally weighted filters, centroids, re-estimated batch-norm
    statistics.
    """
    values = {"distance": "raw", "weighting": 0.0, "representative": "centroid", "batch_norm": "re-estimated"} | values
    return table[(table[list(values)] == pd.Series(values)).all(axis=1)]


def with_range(values: pd.Series, average: str = "median") -> str:
    """The median, or another average, of accuracies in %, as text; if there are several, one a seed, with the lowest and the highest."""
    spread = f" ({values.min():.2f} to {values.max():.2f} over {len(values)} seeds)" if len(values) > 1 else ""
    return f"{values.agg(average):.2f} %{spread}"


def changes_by_class(rows: Mapping[str, pd.Series], whole: pd.Series) -> pd.DataFrame:
    """Change of each class's accuracy from the row `whole` of a sweep to others (pp): a row for each class, a column for each name."""
    classes = [column for column in whole.index if column.startswith("class_")]
    changes = {name: row[classes].astype(float) - whole[classes].astype(float) for name, row in rows.items()}
    table = pd.DataFrame(changes).round(2).rename(index=lambda name: name.removeprefix("class_"))
    return table.rename_axis("class")


def summary_of_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """Mean, lowest and highest gain of each family of plans over uniform plans (pp), and the number of comparisons with a gain above zero.

    `gains` is what `tables.gains_over_uniform` returns; the result has a row for each distance, measure and family.
    """
    long = gains.reset_index().melt(["distance", "measure", "level", "seed"], var_name="plan", value_name="gain")
    groups = long.groupby(["distance", "measure", "plan"]).gain
    table = groups.agg(mean="mean", lowest="min", highest="max").round(2)
    table["better than uniform"] = groups.agg(lambda gain: f"{(gain > 0).sum()} of {len(gain)}")
    return table.rename_axis(["distance", "equal", "plan"])


def plans_that_gain(means: pd.DataFrame) -> str:
    """How many families of plans gain over the uniform one at each measure, on average, and which one most, in words.

    `means` has the mean gains over uniform plans (pp): a row for each measure, a column for each family.
    """
    some, none = " plans gain on average", "no plan gains on average"
    parts = []
    for measure, gains in means.iterrows():
        n = (gains > 0).sum()
        most = f" (most: {gains.idxmax()}, {gains.max():+.1f} pp)" if n else ""
        parts.append(f"{f'{n} of {len(gains)}{some}' if n else none} at equal {measure}{most}")
        some, none = "", "none"
    return ", ".join(parts)


def schedule_gains(accuracies: Mapping[str, Real] | pd.Series, settings: Mapping[str, Real] | pd.Series) -> pd.Series:
    """The gain of warm-up and cosine over a constant learning rate (pp), by optimizer.

    Parameters
    ----------
    accuracies : by name of the trial, such as "SGD 0.01, constant" and "SGD 0.01, warm-up and cosine"
    settings : learning rate by optimizer
    """
    names = {optimizer: f"{optimizer} {rate:g}" for optimizer, rate in settings.items()}
    gains = {optimizer: accuracies[f"{name}, warm-up and cosine"] - accuracies[f"{name}, constant"] for optimizer, name in names.items()}
    return pd.Series(gains)
