"""One finding of each notebook, in Markdown, with the figure that shows it: numbers from the CSVs in ``figures/``."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..arguments import Real
from .analysis import CLUSTERED, CORRELATED, REPAIRED
from .few_bits import gains_at_equal_size, weighed
from .tables import at_half, equally_tuned, gains_of_ends, is_own, networks, newest, small_and_pruned

RECONSTRUCTED, ALLOCATED = REPAIRED
ANEW = f"{ALLOCATED}, drawn anew"
UNREPAIRED = "elimination, allocated by sensitivity"  # as `ALLOCATED`, without its reconstruction
DRAWN, FOLDED = "random channels", ["Model Folding", "Model Folding, repaired"]
# Ways to choose channels, to merge them or to make up for them, with the same share in every block, without training.
CHOICES = (
    *("smallest L1 norm", "smallest L2 norm", "geometric median", "elimination", "k-means of activations, medoids", "Neuron Merging"),
    *("GRAIL after folding", "GRAIL after removal", *FOLDED, *CLUSTERED, CORRELATED),
)


def notebooks(figures: Path) -> str:
    """What each notebook shows: a link, a sentence or two, a figure."""
    parts = []
    for notebook, (figure, shows, finding) in FINDINGS.items():
        parts.append(f"### [{notebook}](../notebooks/{notebook}.ipynb)\n\n{finding(figures)}\n\n![{shows}](../figures/{figure}.png)")
    return "\n\n".join(parts)


def in_short(figures: Path) -> str:
    """What was found, in three points."""
    untrained, tuned = newest(figures / "untrained.csv"), equally_tuned(figures)
    before, layers = at_half(untrained), pd.read_csv(figures / "analysis_redundancy.csv")
    others = before[~is_own(before.index)].drop(DRAWN)
    small, _, _, longest = small_and_pruned(figures)
    base, steps = pd.read_csv(figures / "base_seeds.csv").accuracy[0], pd.read_csv(figures / "worth_of_steps.csv")
    merged = before[[*CLUSTERED]].idxmax()
    return (
        f"1. **Filters hardly repeat.** Half as many clusters as filters leave {layers.inertia.mean():.0f} % of a layer's variance. With "
        f"half of the MACs, a network whose clusters of weights are merged keeps {_kept(untrained, merged, fmt='{:.0f}')} accuracy, one "
        f"with channels removed at random {_kept(untrained, DRAWN, fmt='{:.0f}')}. After the same fine-tuning, they have "
        f"{_kept(tuned, merged)} and {_kept(tuned, DRAWN)}.\n"
        "2. **What pays is reconstruction:** each block is trained, without labels, to compute what it did before. With half of the MACs, "
        f"{_kept(untrained, f'{DRAWN}, reconstruction', fmt='{:.0f}')} then remain, even with random channels; the best of {len(others)} "
        f"variants of other methods, none of which trains at this stage, keeps {others.max():.0f} %. After {tuned.epochs.max()} epochs of "
        f"fine-tuning, reconstruction is still worth {_worth(steps, 'reconstruction')}.\n"
        "3. **Half of the MACs are not free, and pruning is not the only way to save them.** The best pruned network has "
        f"{_with_seeds(longest)}) after {longest.epochs:.0f} epochs in all, a small network that is trained from the start "
        f"{_with_seeds(small)}) after {small.epochs:.0f}, the unpruned one {base:.2f} %."
    )


def _worth(steps: pd.DataFrame, change: str, level: Real = 0.5) -> str:
    """What a step is worth after fine-tuning, on average over the methods that it is added to, with its interval: from the rows of
    ``worth_of_steps.csv``."""
    (row,) = steps[(steps.change == change) & (steps.level == level)].itertuples()
    return f"{row.difference:.1f} points (95 % interval {row.lowest:.1f} to {row.highest:.1f})"


def finding(figures: Path) -> str:
    """What was found, with its numbers."""
    untrained, tuned = newest(figures / "untrained.csv"), equally_tuned(figures)
    before, after, layers = at_half(untrained), at_half(tuned), pd.read_csv(figures / "analysis_redundancy.csv")
    others = before[~is_own(before.index)].drop(DRAWN)
    choices = after[[name for name in CHOICES if name in after]]
    small, shallower, pruned, longest = small_and_pruned(figures)
    everything = newest(figures / "currencies.csv")
    anew = everything[everything.method == ANEW]
    as_short, most = (everything[everything.epochs == epochs] for epochs in (anew.epochs.max(), everything.epochs.max()))
    steps = pd.read_csv(figures / "worth_of_steps.csv")
    rivals = after[~is_own(after.index)].drop(DRAWN)
    size = 100 * tuned[tuned.level == 0.5].groupby("method").parameters_share.mean()
    merged = [_kept(tuned, name, 0.25) for name in (*CLUSTERED, CORRELATED)]

    return (
        "- **Filters hardly repeat, and merging them is not worth it.** By their weights, half as many clusters as filters leave "
        f"{layers.inertia.mean():.0f} % of a layer's variance, {layers.shuffled.mean():.0f} % if the weights of each filter are shuffled. "
        f"At half of the MACs, before fine-tuning, random channels keep {_kept(untrained, DRAWN)} accuracy; clusters of weights, merged, "
        f"{_kept(untrained, before[[*CLUSTERED]].idxmax())}, Model Folding {_kept(untrained, before[FOLDED].idxmax())}, and filters merged "
        f"because their outputs correlate {_kept(untrained, CORRELATED)}. Channels that are removed, not merged, keep more if they are "
        f"chosen by what they do on images: {_kept(untrained, 'elimination')} by *elimination*, which always removes the one that the next "
        "layer can best do without.\n"
        "- **At half of the MACs, reconstruction decides, not the choice of channels.** Each block is trained for 400 steps, on 2,048 "
        f"images without labels, to compute what it did before. Then elimination keeps {_kept(untrained, RECONSTRUCTED)}, channels of "
        f"large norm {_kept(untrained, 'smallest L2 norm, reconstruction')}, and random ones "
        f"{_kept(untrained, f'{DRAWN}, reconstruction')}. More channels where the network is sensitive: {_kept(untrained, ALLOCATED)}, "
        f"with {size[ALLOCATED]:.0f} instead of {size[RECONSTRUCTED]:.0f} % of the parameters. These are {_kept(untrained, UNREPAIRED)} "
        f"without reconstruction; the best of {len(others)} variants of other methods, none of which trains at this stage, has "
        f"{others.max():.1f} % with {size[others.idxmax()]:.0f} % of the parameters. At a quarter of the MACs, reconstructed, elimination "
        f"keeps {_kept(untrained, RECONSTRUCTED, 0.25)}, random channels {_kept(untrained, f'{DRAWN}, reconstruction', 0.25)}.\n"
        f"- **After {tuned.epochs.max()} epochs of fine-tuning, little of this is left at half of the MACs.** Random channels have "
        f"{_kept(tuned, DRAWN)}; {len(choices)} ways to choose them, to merge them or to make up for them, with the same share in every "
        f"block, {choices.min():.1f} to {choices.max():.1f} %. On average over several methods, reconstruction is worth "
        f"{_worth(steps, 'reconstruction')}, and more channels where the network is sensitive "
        f"{_worth(steps, 'allocation by sensitivity')} at equal MACs, with more parameters; at equal parameters, they are behind. "
        f"Both together: {_kept(tuned, ALLOCATED)}, next to {_kept(tuned, rivals.idxmax())} for the best variant of other methods (a tie) "
        f"and {_control(tuned):.1f} % for the unpruned network. At a quarter of the MACs, methods still differ: "
        f"{_kept(tuned, DRAWN, 0.25)} at random, {_kept(tuned, 'smallest L2 norm', 0.25)} by the smallest norm, {', '.join(merged[:-1])} "
        f"and {merged[-1]} merged, {_kept(tuned, rivals.idxmax(), 0.25)} by the variant of other methods that was best at half, "
        f"{_kept(tuned, ALLOCATED, 0.25)} reconstructed and allocated by sensitivity. Allocation is worth "
        f"{_worth(steps, 'allocation by sensitivity', 0.25)} there, reconstruction {_worth(steps, 'reconstruction', 0.25)}, "
        f"elimination instead of random channels {_worth(steps, 'elimination instead of random channels', 0.25)}.\n"
        "- **With half of the MACs, a small network that is trained from the start is at least as good.** With narrower stages and "
        f"{100 * small.parameters_share:.0f} % of the parameters, it has {_with_seeds(small)}) after {small.epochs:.0f} epochs; with fewer "
        f"blocks instead, {_with_seeds(shallower)}). A pruned network has {_with_seeds(pruned)}, {100 * pruned.parameters_share:.0f} % of "
        f"the parameters) after as many in all; another one, fine-tuned for longer, {_with_seeds(longest)}, "
        f"{100 * longest.parameters_share:.0f} %) after {longest.epochs:.0f}, and no more after "
        f"{most.epochs.max() - anew.epochs.max()} further epochs, {_kept(most, ALLOCATED)}. The weights that "
        f"pruning keeps save epochs: with {anew.epochs.max()} of fine-tuning, this last one has {_kept(as_short, ALLOCATED)}, new weights "
        f"in its shape, with {anew.epochs.max()} in all, {_kept(as_short, ANEW)}."
    )


def _kept(table: pd.DataFrame, name: str, level: Real = 0.5, fmt: str = "{:.1f}") -> str:
    """The mean accuracy of a method at a share of the MACs, with the lowest and the highest of its seeds."""
    accuracy = table[(table.method == name) & (table.level == level)].accuracy
    lowest, highest = fmt.format(accuracy.min()), fmt.format(accuracy.max())
    return f"{fmt.format(accuracy.mean())} %" + (f" ({lowest} to {highest})" if lowest != highest else "")


def _with_seeds(row: pd.Series) -> str:
    return f"{row.accuracy:.2f} % ({'one seed' if row.seeds == 1 else f'mean of {row.seeds:.0f} seeds'}"


def _control(tuned: pd.DataFrame) -> float:
    """The mean accuracy of the unpruned network after the same fine-tuning."""
    return float(tuned[tuned.method == "not pruned"].accuracy.mean())


def _clustered_by_half(figures: Path) -> pd.Series:
    """The accuracy with centroids of half of the filters in every layer, by distance, weighting and batch-norm statistics."""
    half = newest(figures / "prune_uniform.csv").query("images == 'test' and plan == 'uniform fraction' and level == 0.5")
    return half[half.representative == "centroid"].groupby(["distance", "weighting", "batch_norm"]).accuracy.median()


def _training(figures: Path) -> str:
    seeds = pd.read_csv(figures / "base_seeds.csv")
    teacher = pd.read_csv(figures / "other_networks.csv").set_index("network").minutes["resnet20_wide"]
    straightforward, quickest = pd.read_csv(figures / "benchmark_accuracy.csv").itertuples()
    return (
        "The data, the network, how the recipe was chosen, the training, its mistakes. "
        f"**ResNet-20 ends at {seeds.accuracy.mean():.2f} % (mean of {len(seeds)} seeds) after {seeds.epochs[0]} epochs, in "
        f"{seeds.minutes.min():.0f} to {seeds.minutes.max():.0f} minutes on one CPU thread, and {teacher:.0f} for its teacher.** "
        f"{quickest.epochs} epochs, a number that was chosen on test images, reach {quickest.accuracy:.2f} % in {quickest.minutes:.0f} "
        f"minutes on two threads (mean of {quickest.seeds:.0f} seeds); {straightforward.accuracy:.2f} % by the published "
        f"64,000 steps would take {straightforward.minutes:.0f} in a straightforward loop, by an estimate."
    )


def _uniform_plans(figures: Path) -> str:
    accuracy = _clustered_by_half(figures)
    return (
        "The same number, or the same share, of clusters in every layer; centroids or medoids; five distances. "
        f"**Half of the filters in every layer: {accuracy['raw', 0, 'as trained']:.1f} %; with re-estimated batch-norm statistics "
        f"{accuracy['raw', 0, 're-estimated']:.1f} %; clustered by how the filters' outputs correlate, weighted by how much the logits "
        f"depend on them, {accuracy['correlation', 0.5, 're-estimated']:.1f} %.**"
    )


def _ends(figures: Path) -> str:
    gains = gains_of_ends(figures).groupby(["distance", "measure"]).mean().loc["correlation", "MACs"]
    return (
        "Each layer alone, and plans that keep more filters at the ends or at the borders of stages. "
        f"**At equal MACs, clustered by correlation, whole last layers are worth {gains['last-heavy']:+.1f} pp on average, "
        f"whole first layers {gains['first-heavy']:+.1f} pp, the ends chosen on training images {gains['chosen']:+.1f} pp.**"
    )


def _fine_tuning(figures: Path) -> str:
    untrained, tuned = newest(figures / "untrained.csv"), equally_tuned(figures)
    before, after = at_half(untrained), at_half(tuned)
    best = after[after.index.str.startswith(("tied", "projected"))].idxmax()
    return (
        "Fine-tuning while filters stay clustered, tied or projected, next to networks that are made smaller first. "
        f"**Half of the MACs, “{best}”: {before[best]:.1f} % before fine-tuning and {after[best]:.2f} % after {tuned.epochs.max()} epochs, "
        f"next to {after[RECONSTRUCTED]:.2f} % if the same share of each block's channels is removed and the blocks are reconstructed, "
        f"and {_control(tuned):.2f} % for the unpruned network, fine-tuned for as many epochs.**"
    )


def _analysis(figures: Path) -> str:
    worth = pd.read_csv(figures / "analysis_ladder.csv").set_index("step").worth.nlargest(2)
    return (
        "What all of it says: a question, a figure and an answer at a time, and a list of ideas. **At half of the MACs, two steps recover "
        f"most: {' and '.join(f'{step} ({value:+.1f} pp)' for step, value in worth.items())}.**"
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


def _baselines(figures: Path) -> str:
    tuned = equally_tuned(figures)
    stages = {"before fine-tuning": newest(figures / "untrained.csv"), f"after the same {tuned.epochs.max()} epochs": tuned}
    parts = []
    for words, table in stages.items():
        means = at_half(table)
        others = means[~is_own(means.index)].drop("random channels")
        parts.append(
            f"{words} {means[ALLOCATED]:.2f} %, next to {means['random channels']:.2f} % for random channels and {others.max():.2f} % for "
            f"the best of {len(others)} methods of others ({others.idxmax()})"
        )
    return (
        "Removal, folding, Torch-Pruning and clustering at the same MACs, nearly all fine-tuned by one protocol; published results. "
        "**Reconstruction leads by far before fine-tuning; after it, the best methods are close, and the first two a tie.** "
        f"Half of the MACs, “{ALLOCATED}”: {'; '.join(parts)}."
    )


def _quantization(figures: Path) -> str:
    learned = pd.read_csv(figures / "quantize_bits.csv").set_index("way").loc["own, blocks"]
    changes = ", ".join(f"{bits} {learned[bits]:+.2f} pp" for bits in ("W8A8", "W4A8", "W4A4", "W2A8", "W2A2"))
    return (
        "Custom post-training quantization at 16 to 2 bits, next to PyTorch's; pruning and quantization together. "
        f"**Change of accuracy with learned rounding, without fine-tuning: {changes}.**"
    )


def _compact_networks(figures: Path) -> str:
    change = newest(figures / "compact_allocation.csv").query("level == 0.5").groupby("plan").change.median()
    table = networks(figures)
    planned = table[table.index.str.startswith("resnet20_fast")].sort_values("batch 256").iloc[-1]
    loss = planned["accuracy in int8"] - table.accuracy["resnet20"]
    return (
        "Networks that are really smaller: repair, allocation among channels, blocks and streams, plans for time, four runtimes. "
        f"**Half of the MACs before fine-tuning: {change['by sensitivity, inside blocks']:+.2f} pp with channels allocated by sensitivity, "
        f"{change['uniform fraction']:+.2f} pp with the same share in every block.** The fastest of the networks planned for time and "
        f"fine-tuned for {planned.epochs:.0f} epochs keeps {planned.macs:.0f} % of the MACs. In OpenVINO with 8-bit integers, it is "
        f"{planned['batch 256']:.1f} times as fast as the unpruned one there, and {planned['overall 256']:.1f} times as fast as that in "
        f"PyTorch's compiled float32 (batches of 256 images), at {loss:+.2f} pp."
    )


def _few_bytes(figures: Path) -> str:
    table = networks(figures)
    trained = table[table.index.str.match("resnet20_w.a.$")]
    changes = ", ".join(
        f"{name.removeprefix('resnet20_').upper()} {row.change:+.2f} pp ({row.epochs:.0f} epochs)" for name, row in trained.iterrows()
    )
    coded, smallest = table.loc["resnet20_32kB"], table.loc["resnet20_16kB"]
    before = weighed(pd.read_csv(figures / "bytes.csv")).accuracy
    gains = before[1.0] - before[0.0]
    counted = gains_at_equal_size(pd.read_csv(figures / "entropy_constrained.csv"))["kernel"]
    return (
        "Codebooks of pieces smaller than a filter, and training with the quantizer in the loop. "
        f"**Change of accuracy, with an 8-bit residual stream: {changes}; weights composed of shared rows of kernels in "
        f"{coded.kB:.0f} kB, {coded.change:+.2f} pp, in {smallest.kB:.0f} kB, {smallest.change:+.2f} pp "
        f"({coded.epochs:.0f} epochs).** Before training, k-means gains "
        f"{gains.min():.1f} to {gains.max():.1f} pp if errors are weighted by what they cost the logits, and codebooks of kernels "
        f"{counted.min():.1f} to {counted.max():.1f} pp more, at equal size, if the bits of indices are counted as well."
    )


# By notebook: a figure, what it shows, for those who cannot see it, and the finding.
FINDINGS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "01_train": ("learning_curves", "Loss, learning rate and accuracy in each epoch of the training", _training),
    "02_prune_uniform": ("prune_uniform_distances", "Accuracy by the share of filters that is kept, for five distances", _uniform_plans),
    "03_prune_first_last_heavy": (
        "prune_ends_correlation",
        "Gain of plans with heavier ends over the uniform plan, at equal MACs and at equal numbers of distinct filters",
        _ends,
    ),
    "04_fine_tune": (
        "fine_tune_ways",
        "Accuracy with half of the MACs after fine-tuning, by what is required of the filters",
        _fine_tuning,
    ),
    "05_analysis": ("analysis_ladder", "Accuracy after each step, from merged clusters to the fine-tuned network", _analysis),
    "06_optimizers": ("optimizers_curves", "Accuracy by epoch for each optimizer, at constant rates and with a schedule", _optimizers),
    "07_baselines": (
        "baselines_change",
        "Change of accuracy of each method with half of the MACs, before and after fine-tuning",
        _baselines,
    ),
    "08_quantize": ("quantize_pareto", "Accuracy by size of the file, pruned and not pruned, with 8 to 2 bits", _quantization),
    "09_compact": ("compact_speed", "Accuracy by speed-up in two runtimes, for each committed network", _compact_networks),
    "10_codebooks": (
        "bytes_on_disk",
        "Accuracy by bytes on disk, for integers and codebooks, and published networks (bytes of their weights); the best are labelled",
        _few_bytes,
    ),
}
