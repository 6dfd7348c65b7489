"""One finding of each notebook, in Markdown, with the figure that shows it: numbers from the CSVs in ``figures/``."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .tables import gains_of_ends, is_own, newest


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
    (untrained, other), (tuned, other_tuned) = (_best_at_half(figures, stage) for stage in ("new batch-norm statistics", "fine-tuned"))
    spread = tuned[1].max() - tuned[1].min()
    n_epochs = pd.read_csv(figures / "baselines_methods.csv").epochs.max()
    return (
        f"**Clustering filters is not enough.** With half of the filters of every layer, {clustered['raw', 0]:.0f} % of the test images "
        f"are still classified correctly, and {clustered.max():.0f} % if filters are clustered by how their outputs correlate. "
        "**What pays is the repair**: if each block is solved for the outputs that it had, and channels go where they matter least, a "
        f"network with half of the MACs has {untrained[1].median():.1f} % without labels and without training; "
        f"the best other method in the comparison has {other[1].median():.1f} %. "
        f"**Fine-tuning removes most of that lead**: after {n_epochs} epochs it is {tuned[1].median() - other_tuned[1].median():.1f} pp "
        f"({len(tuned[1])} seeds, which differ by {spread:.1f} pp)."
    )


def _training(figures: Path) -> str:
    seeds = pd.read_csv(figures / "base_seeds.csv")
    base, first = seeds.iloc[0], pd.read_csv(figures / "resnet20_first.csv").iloc[0]
    ratio = pd.read_csv(figures / "benchmark_training.csv").ratio.max()
    return (
        "The data, the network, how the recipe was chosen, the training, its mistakes. "
        f"**ResNet-20 ends at {seeds.accuracy.mean():.2f} % (seeds: {len(seeds)}) after {base.epochs} epochs, "
        f"{base.minutes:.0f} minutes on {base.machine}**; "
        f"notebooks 03 to 09 still measure the first network, with {first.test_accuracy:.2f} %; "
        f"the training loop is {ratio:.1f} times as fast as a straightforward one."
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
        "Each layer alone, and plans that keep the first layers whole, the last ones, or both. "
        f"**At equal MACs, clustered by correlation, whole last layers are worth {gains['last-heavy']:+.1f} pp on average, "
        f"whole first layers {gains['first-heavy']:+.1f} pp, both {gains['first/last-heavy']:+.1f} pp.**"
    )


def _fine_tuning(figures: Path) -> str:
    table = pd.read_csv(figures / "fine_tune.csv").query("epochs >= 20")
    compact = table[(table.way == "compact") & (table.plan == "by sensitivity")].sort_values("epochs")
    changes = compact.groupby("level").change.last()[::-1].items()
    scratch = table[table.way == "from scratch"].iloc[0]
    pruned = compact[(compact.level == scratch.level) & (compact.epochs == scratch.epochs)].iloc[0]
    return (
        "Training on while filters stay clustered, in four ways, with and without distillation. "
        f"**After fine-tuning: {', '.join(f'{change:+.2f} pp at {100 * level:g} %' for level, change in changes)} of the MACs**; "
        "the smallest network, trained from scratch with the same epochs and teacher, ends "
        f"{pruned.accuracy - scratch.accuracy:.1f} pp lower."
    )


def _analysis(figures: Path) -> str:
    worth = pd.read_csv(figures / "analysis_ladder.csv").set_index("step").worth.nlargest(3)
    return (
        "What all of it says: a question, a figure and an answer at a time, and a list of ideas. **Of all that is done about the loss at "
        f"half of the MACs, most is won by: {'; '.join(f'{step} ({value:+.1f} pp)' for step, value in worth.items())}.**"
    )


def _optimizers(figures: Path) -> str:
    table = pd.read_csv(figures / "optimizers.csv").query("seed == 0").sort_values("test_accuracy")
    constant, best = table[table.schedule == "constant"].iloc[-1], table.iloc[-1]
    return (
        "SGD, Adam and Adamax at constant rates and with a schedule, AdamW and Muon with a schedule, "
        f"for {table.epochs.max()} epochs each. "
        f"**Ahead with {best.test_accuracy:.2f} %: {best.trial}; "
        f"the best constant rate, {constant.trial}, has {constant.test_accuracy:.2f} %.**"
    )


def _best_at_half(figures: Path, stage: str) -> list[tuple[str, pd.Series]]:
    """The name and the accuracies of "by sensitivity" at half of the MACs, and those of the best method that is not this project's."""
    table = pd.read_csv(figures / "baselines_methods.csv").query("level == 0.5 and stage == @stage")
    accuracy = table.groupby("method").accuracy
    others = accuracy.median()[lambda medians: ~is_own(medians.index)]
    return [(name, accuracy.get_group(name)) for name in ("by sensitivity", others.idxmax())]


def _baselines(figures: Path) -> str:
    n_epochs = pd.read_csv(figures / "baselines_methods.csv").epochs.max()
    stages = {"new batch-norm statistics": "without training", "fine-tuned": f"after {n_epochs} epochs of the same fine-tuning"}
    parts = []
    for stage, words in stages.items():
        (_, ours), (name, theirs) = _best_at_half(figures, stage)
        parts.append(f"{words} {ours.median():.2f} %, next to {theirs.median():.2f} % ({name})")
    return (
        "Weight pruning, unit pruning, Torch-Pruning and Neuron Merging next to this project's ways; published results. "
        f"**Half of the MACs: {'; '.join(parts)}.**"
    )


def _quantization(figures: Path) -> str:
    best = pd.read_csv(figures / "quantize_bits.csv").set_index("way").max()
    kept = pd.read_csv(figures / "quantize_kept.csv").iloc[0]
    changes = ", ".join(f"{bits} {best[bits]:+.2f} pp" for bits in ("W8A8", "W4A8", "W4A4", "W2A8", "W2A2"))
    return (
        "Custom post-training quantization at 16 to 2 bits, next to PyTorch's; pruning and quantization together. "
        f"**Change of accuracy: {changes}; a pruned and quantized network in a file of {kept.file_bytes / 1000:.0f} kB has "
        f"{kept.accuracy:.2f} % ({kept.change_from_base:+.2f} pp).**"
    )


def _compact_networks(figures: Path) -> str:
    table = pd.read_csv(figures / "compact_allocation.csv").query("level == 0.5 and repair == 'reconstruction'")
    change = table.groupby("plan").change.median()
    speed = (
        pd.read_csv(figures / "benchmark_inference.csv").query("network == 'resnet20_compact50' and batch_size == 256").own_speedup.max()
    )
    return (
        "Networks that are really smaller: exactness, repair, allocation by sensitivity and by time, three runtimes, ONNX. "
        f"**Half of the MACs without labels and without training: {change['by sensitivity']:+.2f} pp; from inside the blocks only "
        f"{change['by sensitivity, inside blocks']:+.2f} pp, and {speed:.2f} times as fast.**"
    )


FINDINGS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "01_train": ("learning_curves", _training),
    "02_prune_uniform": ("prune_uniform_distances", _uniform_plans),
    "03_prune_first_last_heavy": ("prune_ends_correlation", _ends),
    "04_fine_tune": ("fine_tune_macs", _fine_tuning),
    "05_analysis": ("analysis_ladder", _analysis),
    "06_optimizers": ("optimizers_curves", _optimizers),
    "07_baselines": ("baselines_change", _baselines),
    "08_quantize": ("quantize_pareto", _quantization),
    "09_compact": ("compact_allocation_accuracy", _compact_networks),
}
