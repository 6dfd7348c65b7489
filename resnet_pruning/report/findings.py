"""One finding of each notebook, in Markdown, with the figure that shows it: numbers from the CSVs in ``figures/``."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .tables import equally_tuned, gains_of_ends, is_own, networks, newest


def notebooks(figures: Path) -> str:
    """What each notebook shows: a link, a sentence or two, a figure."""
    parts = []
    for notebook, (figure, finding) in FINDINGS.items():
        shown = figure.replace("_", " ")
        parts.append(f"### [{notebook}](../notebooks/{notebook}.ipynb)\n\n{finding(figures)}\n\n![{shown}](../figures/{figure}.png)")
    return "\n\n".join(parts)


def finding(figures: Path) -> str:
    """What was found, in three sentences."""
    half = newest(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction' and level == 0.5")
    half = half[(half.representative == "centroid") & (half.batch_norm == "re-estimated")]
    clustered = half.groupby(["distance", "weighting"]).accuracy.median()
    tuned_rows = equally_tuned(figures)
    (untrained, other), (tuned, other_tuned) = map(_best_at_half, (pd.read_csv(figures / "untrained.csv"), tuned_rows))
    control = tuned_rows[tuned_rows.method == "not pruned"].accuracy.mean()
    return (
        f"**Clustering filters is not enough.** With half of the filters of every layer, {clustered['raw', 0]:.0f} % of the test images "
        f"are still classified correctly, and {clustered.max():.0f} % if filters are clustered by how their outputs correlate. "
        "**What pays is the repair**: if each block is solved for the outputs that it had, and channels go where they matter least, a "
        f"network with half of the MACs has {untrained[1].median():.1f} % without labels and without training; "
        f"the best other method in the comparison has {other[1].median():.1f} %. "
        f"**Fine-tuning removes most of that lead**: after {tuned_rows.epochs.max()} epochs it has {tuned[1].mean():.1f} % (seeds: "
        f"{len(tuned[1])}), the best of the other methods that were trained ({other_tuned[0]}) {other_tuned[1].mean():.1f} %, and the "
        f"whole network, trained on for as long, {control:.1f} %."
    )


def _training(figures: Path) -> str:
    seeds = pd.read_csv(figures / "base_seeds.csv")
    base = seeds.iloc[0]
    quickest = pd.read_csv(figures / "benchmark_accuracy.csv").iloc[1]
    return (
        "The data, the network, how the recipe was chosen, the training, its mistakes. "
        f"**ResNet-20 ends at {seeds.accuracy.mean():.2f} % (mean of {len(seeds)} seeds) after {base.epochs} epochs, "
        f"{base.minutes:.0f} minutes on {base.machine}**; "
        f"its published 91.25 % take {quickest.minutes:.0f} minutes, in a straightforward loop {quickest.ratio:.0f} times as long."
    )


def _uniform_plans(figures: Path) -> str:
    table = newest(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction' and level == 0.5")
    accuracy = table[table.representative == "centroid"].groupby(["distance", "weighting", "batch_norm"]).accuracy.median()
    return (
        "The same number, or the same share, of clusters in every layer; centroids or medoids; five distances. "
        f"**Half of the filters in every layer: {accuracy['raw', 0, 'as trained']:.1f} %; with new batch-norm statistics "
        f"{accuracy['raw', 0, 're-estimated']:.1f} %; clustered by how the filters' outputs correlate, weighted by what the logits make of "
        f"them, {accuracy['correlation', 0.5, 're-estimated']:.1f} %.**"
    )


def _ends(figures: Path) -> str:
    gains = gains_of_ends(figures).groupby(["distance", "measure"]).mean().loc["correlation", "MACs"]
    return (
        "Each layer alone, and plans that keep more filters at the ends or at the borders of stages. "
        f"**At equal MACs, clustered by correlation, whole last layers are worth {gains['last-heavy']:+.1f} pp on average, "
        f"whole first layers {gains['first-heavy']:+.1f} pp, the ends chosen on training images {gains['chosen']:+.1f} pp.**"
    )


def _fine_tuning(figures: Path) -> str:
    untrained, tuned = pd.read_csv(figures / "untrained.csv"), equally_tuned(figures)
    before, after = (table[table.level == 0.5].groupby("method").accuracy.mean() for table in (untrained, tuned))
    control = tuned[tuned.method == "not pruned"].accuracy.mean()
    best = after[after.index.str.startswith(("tied", "projected"))].idxmax()
    return (
        "Training on while filters stay clustered, tied or projected, next to networks that are merged first. "
        f"**Half of the MACs, “{best}”: {before[best]:.1f} % before training and {after[best]:.2f} % after {tuned.epochs.max()} epochs, "
        f"next to {after['merged, reconstruction']:.2f} % for a merged network with the same share in every block, "
        f"and {control:.2f} % for the whole network, trained on for as long.**"
    )


def _analysis(figures: Path) -> str:
    worth = pd.read_csv(figures / "analysis_ladder.csv").set_index("step").worth.nlargest(3)
    return (
        "What all of it says: a question, a figure and an answer at a time, and a list of ideas. **Of all that is done about the loss at "
        f"half of the MACs, most is won by: {'; '.join(f'{step} ({value:+.1f} pp)' for step, value in worth.items())}.**"
    )


def _optimizers(figures: Path) -> str:
    table = pd.read_csv(figures / "optimizers.csv")
    ranked = table.groupby(["schedule", "trial"]).test_accuracy.median().sort_values().reset_index()
    constant, best = ranked[ranked.schedule == "constant"].iloc[-1], ranked.iloc[-1]
    return (
        "SGD, Adam and Adamax at constant rates and with a schedule, AdamW and Muon with a schedule, "
        f"for {table.epochs.max()} epochs each. "
        f"**Ahead with {best.test_accuracy:.2f} %: {best.trial}; "
        f"the best constant rate, {constant.trial}, has {constant.test_accuracy:.2f} %.**"
    )


def _best_at_half(table: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """The name and the accuracies of "by sensitivity, inside blocks" at half of the MACs, and those of the best method of others."""
    accuracy = table[table.level == 0.5].groupby("method").accuracy
    others = accuracy.mean()[lambda means: ~is_own(means.index)]
    return [(name, accuracy.get_group(name)) for name in ("by sensitivity, inside blocks", others.idxmax())]


def _baselines(figures: Path) -> str:
    tuned = equally_tuned(figures)
    stages = {
        "without training": pd.read_csv(figures / "untrained.csv"),
        f"after {tuned.epochs.max()} epochs of the same fine-tuning": tuned,
    }
    parts = []
    for words, table in stages.items():
        (_, ours), (name, theirs) = _best_at_half(table)
        parts.append(f"{words} {ours.mean():.2f} %, next to {theirs.mean():.2f} % ({name})")
    return (
        "Removal, folding, Torch-Pruning and clustering at the same MACs, some of them fine-tuned by one protocol; published results. "
        f"**Half of the MACs: {'; '.join(parts)}.**"
    )


def _quantization(figures: Path) -> str:
    best = pd.read_csv(figures / "quantize_bits.csv").set_index("way").max()
    changes = ", ".join(f"{bits} {best[bits]:+.2f} pp" for bits in ("W8A8", "W4A8", "W4A4", "W2A8", "W2A2"))
    return (
        "Custom post-training quantization at 16 to 2 bits, next to PyTorch's; pruning and quantization together. "
        f"**Change of accuracy without training: {changes}.**"
    )


def _compact_networks(figures: Path) -> str:
    change = pd.read_csv(figures / "compact_allocation.csv").query("level == 0.5").groupby("plan").change.median()
    fastest = networks(figures)
    planned = fastest[fastest.index.str.startswith("resnet20_fast")].sort_values("batch 256").iloc[-1]
    return (
        "Networks that are really smaller: repair, allocation among channels, blocks and streams, plans for time, four runtimes. "
        f"**Half of the MACs without labels and without training: {change.max():+.2f} pp ({change.idxmax()}). Planned for time, it is "
        f"{planned['batch 256']:.1f} times as fast as the unpruned one in compiled float32, of which 8-bit integers in OpenVINO alone give "
        f"{fastest.loc['resnet20', 'batch 256']:.1f} times, and loses {-planned.change:.2f} pp (batches of 256).**"
    )


def _few_bytes(figures: Path) -> str:
    table = networks(figures)
    trained = table[table.index.str.match("resnet20_w.a.$")]
    changes = ", ".join(f"{name.removeprefix('resnet20_').upper()} {row.change:+.2f} pp" for name, row in trained.iterrows())
    coded = table.loc["resnet20_32kB"]
    return (
        "Codebooks of pieces smaller than a filter, and training with the quantizer in the loop. "
        f"**Change of accuracy after {coded.epochs:.0f} epochs: {changes}; weights from 96 kernels, in {coded.kB:.0f} kB, "
        f"{coded.change:+.2f} pp.**"
    )


FINDINGS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "01_train": ("learning_curves", _training),
    "02_prune_uniform": ("prune_uniform_distances", _uniform_plans),
    "03_prune_first_last_heavy": ("prune_ends_correlation", _ends),
    "04_fine_tune": ("fine_tune_ways", _fine_tuning),
    "05_analysis": ("analysis_ladder", _analysis),
    "06_optimizers": ("optimizers_curves", _optimizers),
    "07_baselines": ("baselines_change", _baselines),
    "08_quantize": ("quantize_pareto", _quantization),
    "09_compact": ("compact_speed", _compact_networks),
    "10_codebooks": ("bytes_on_disk", _few_bytes),
}
