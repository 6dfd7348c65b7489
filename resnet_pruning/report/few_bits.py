"""Tables on quantized networks, for notebooks 08 and 10, from the rows of their sweeps."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..arguments import Real

# What tables and figures show instead of words in CSVs.
SHOWN = {"own, ": "custom, ", "ready, ": "PyTorch, ", ", by layer": ", by sensitivity", "mse": "squared error"}

METHODS = {
    "rounded to nearest": "integers, rounded",
    "rounding learned": "integers, rounding learned",
    "learned steps": "integers, trained",
}
PIECES = {
    "filter": "codebook of filters",
    "pair of kernels": "codebook of pairs of kernels",
    "kernel": "codebook of kernels",
    "row": "codebook of rows of kernels",
    "weight": "codebook of weights",
}


def bits(table: pd.DataFrame) -> pd.Series:
    """The bits of each row as text: W4A8 is 4 for weights, 8 for activations."""
    return "W" + table.weight_bits.astype(str) + "A" + table.activation_bits.astype(str)


def ways(table: pd.DataFrame) -> pd.Series:
    """How the network of each row was quantized, as text: the rounding, and whether biases were corrected."""
    rounded = table.rounding.replace({"nearest": "own, nearest", "block": "own, blocks"})
    return rounded + table.bias_correction.map({True: ", biases", False: ""})


def side_by_side(own: pd.DataFrame, ready: pd.DataFrame) -> pd.DataFrame:
    """The change of accuracy (pp), with a row for each way and a column for each combination of bits.

    Parameters
    ----------
    own : rows of `studies.quantization_runs.QuantizationRuns.measure_quantized`, including some with 16 and with 8 bits
    ready : rows of its `measure_ready`
    """
    named = own.assign(bits=bits(own), way=ways(own))
    table = named.pivot_table(index="way", columns="bits", values="change", sort=False)
    changes = ready.set_index("kind").change
    for kind, column in (("float16", "W16A16"), ("bfloat16", "W16A16"), ("torchao int8", "W8A8")):
        table.loc[f"ready, {kind}", column] = changes[kind]
    return table[list(dict.fromkeys([*named.bits, *table.columns]))]


def pruned_and_quantized(quantized: pd.DataFrame, floats: pd.DataFrame) -> pd.DataFrame:
    """The rows of both, with the kind of numbers (`what`) and the share of MACs (`pruned`) as text.

    Parameters
    ----------
    quantized : rows of `studies.quantization_runs.QuantizationRuns.measure_quantized` for some networks
    floats : rows of its `measure_ready`
    """
    divided = quantized.allocation.map({"equal": "", "by sensitivity": ", by layer"})
    everything = pd.concat([quantized.assign(what=bits(quantized) + divided), floats.assign(what=floats.kind)], ignore_index=True)
    share = everything.network.str.removeprefix("resnet20_macs")
    return everything.assign(pruned=("MACs: " + share + " %").where(everything.network != "", "not pruned"))


def one_allocation(everything: pd.DataFrame) -> pd.DataFrame:
    """Of networks that differ only in how bits are allocated to layers, the one with bits by sensitivity; all others as they are.

    The rule does not look at accuracies, because these are of test images. `everything` is from `pruned_and_quantized`.
    """
    same = everything.assign(bits=everything.what.str.removesuffix(", by layer"))
    first = same.loc[same.what.str.endswith(", by layer").sort_values(ascending=False, kind="stable").index]
    return first.drop_duplicates(["pruned", "bits"]).sort_index()


def front(table: pd.DataFrame, size: str, accuracy: str, margin: Real = 0.0) -> pd.DataFrame:
    """The rows that are more accurate, by more than a margin, than all rows of at most their size, the smallest first."""
    ordered = table.sort_values([size, accuracy], ascending=[True, False], kind="stable")
    return ordered[ordered[accuracy] > ordered[accuracy].cummax().shift(fill_value=-np.inf) + margin]


def shown(text: str) -> str:
    """The name of a way to quantize in tables and figures, from the one in CSVs."""
    for word, other in SHOWN.items():
        text = text.replace(word, other)
    return text


def sizes(own: pd.DataFrame, ready: pd.DataFrame) -> pd.DataFrame:
    """Bytes of the tensors and of the file, by the kind of numbers; arguments as in `side_by_side`."""
    nearest = own[ways(own) == "own, nearest"]
    numbers = pd.concat([ready.kind, bits(nearest)])
    return pd.concat([ready, nearest])[["bytes", "file_bytes"]].set_axis(pd.Index(numbers, name="numbers"))


def shortfall(table: pd.DataFrame, column: str) -> Mapping[str, float]:
    """The loss of accuracy (pp) with the fewest images instead of the most, by the values of a column; for `n_images` that all have."""
    wide = table.pivot_table(index="n_images", columns=column, values="accuracy").dropna()
    return dict(wide.iloc[-1] - wide.iloc[0])


def kinds(table: pd.DataFrame) -> pd.Series:
    """What the weights of each row of ``bytes.csv`` consist of, as text: integers, by how they were found, or pieces of a codebook."""
    renewed = table.renewals.gt(0).map({True: ", renewed", False: ""})
    weighted = table.weighting.map(lambda power: "" if power == 0 else ", weighted" + ("" if power == 1 else f" to the power of {power:g}"))
    counted = table.bit_cost.gt(0).map({True: ", entropy-constrained", False: ""})
    contexts = table.contexts.map({True: ", coded in contexts", False: ""})
    finer = table.own_steps.map({True: ", representatives with steps of their own", False: ""})
    scope = table.scope.map({"network": "", "stage": ", one per stage", "layer": ", one per layer"})
    return table.method.map(METHODS).fillna(table.granularity.map(PIECES)) + scope + weighted + counted + renewed + contexts + finer


def numbers_of(table: pd.DataFrame, pieces: bool = False) -> pd.Series:
    """The bits of each row of ``bytes.csv``, such as W4A8, or the number of its representatives, as text; the bits of the residual stream,
    if it has others; and of which pruned network. With `pieces`, what is represented is named, as in "96 kernels"."""
    representatives = table.n_representatives.astype(str)
    if pieces:
        representatives += " " + table.granularity.map(PIECES).str.removeprefix("codebook of ")
    pruned = table.pruned.fillna("").str.replace("resnet20_", ", ", regex=False)
    stream = (", " + table.stream_bits.astype(str) + "-bit stream").where(table.stream_bits > 0, "")
    return bits(table).where(table.method != "codebook", representatives) + stream + pruned


def weighed(table: pd.DataFrame) -> pd.DataFrame:
    """The accuracy and the bytes of codebooks of the whole network before training, by piece and number of representatives, with errors
    that all cost the same (column 0.0) and with errors weighted by what they cost the logits (1.0): from rows of ``bytes.csv``."""
    untrained = table[(table.method == "codebook") & (table.epochs == 0) & (table.scope == "network")]
    pieces = ["granularity", "n_representatives"]
    return untrained.pivot_table(index=pieces, columns="weighting", values=["accuracy", "bytes_on_disk"], sort=False)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The mean accuracy and size of each codebook in rows of ``entropy_constrained.csv``."""
    codebooks = table.groupby(["granularity", "n_representatives", "bit_cost"], as_index=False, sort=False)
    return codebooks[["bytes_on_disk", "bits_per_weight", "accuracy"]].mean()


def gains_at_equal_size(table: pd.DataFrame) -> pd.Series:
    """How much more accurate (pp) entropy-constrained codebooks are than others of the same pieces, by granularity and bytes on disk.

    Both are means over seeds. The accuracy of the others is interpolated between their sizes; codebooks outside of these are left out.
    """
    table, gains = over_seeds(table), {}
    for granularity, rows in table[table.bit_cost > 0].groupby("granularity", sort=False):
        known = table[(table.bit_cost == 0) & (table.granularity == granularity)].sort_values("bytes_on_disk")
        expected = np.interp(rows.bytes_on_disk, known.bytes_on_disk, known.accuracy, left=np.nan, right=np.nan)
        gains |= {(granularity, size): gain for size, gain in zip(rows.bytes_on_disk, rows.accuracy - expected, strict=True)}
    return pd.Series(gains).rename_axis(["granularity", "bytes_on_disk"]).dropna()


def error_at(distortions: pd.DataFrame, bits_per_weight: Real) -> pd.Series:
    """The error (%) at equal bits, by granularity, between the numbers of representatives that were measured; NaN outside of them.

    `distortions` is from `studies.size_runs.distortions`, for one kind of representatives.
    """
    found = {}
    for granularity, rows in distortions.groupby("granularity", sort=False):
        known = rows.sort_values("bits_per_weight")
        found[granularity] = float(np.interp(bits_per_weight, known.bits_per_weight, known.error, left=np.nan, right=np.nan))
    return pd.Series(found)
