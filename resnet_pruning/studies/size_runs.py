"""Networks in few bytes, as points of a sweep: trained ones with learned steps or codebooks, and post-training ones for comparison.

``python -m resnet_pruning.studies.size_runs`` measures the rows of ``figures/bytes.csv``. Bytes are those of the file on disk: numbers in
few bits, deflated, and everything else that the network requires. ``--trials`` measures the trials that the learning rates are chosen by,
on held-out images, with a network that was not trained on them.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from .. import calibration, cost, evaluation, quantization
from ..arguments import Count, Real, Seed
from ..files import fingerprint, required, results_folder
from ..hardware import can_compile
from ..model import OwnNetwork, convolutions
from ..training import Execution
from .base import base_checkpoint, choosing_checkpoint
from .finetuning_runs import FineTuningRuns
from .protocol import TEACHER
from .sweeps import expanded, run_sweep

EPOCHS, LONGER = 5, 30  # of the networks that are compared, and of those that are kept
BETWEEN = 15  # of some rows of kernels
LONGEST = 60  # for 2 bits: are the epochs of the kept ones too few?
STREAM = 8  # bits of the residual stream, where it is not as coarse as the inputs of convolutions
RENEWALS = 50  # of assignments in each epoch, of the numbers in `trial_points` the best one
# Learning rates, see `trial_points`: with learned steps by bits of the weights, with codebooks by renewals in each epoch. None was better
# in the trials by more than chance.
RATES = {"learned steps": {2: 0.003, 3: 0.001, 4: 0.0003}, "codebook": {0: 0.03, RENEWALS: 0.003}}
SMALLER_RATE = 0.0015  # of codebooks whose bits are counted, and of rows of kernels; see the trials of `EPOCHS`
# Of rows whose bits are counted, by epochs. The longer a training, the smaller its rate: weights grow with each step, and a bit becomes
# cheap beside the errors of larger weights.
ROW_RATES = {EPOCHS: SMALLER_RATE, BETWEEN: 0.0009, LONGER: 0.0006}
# Of errors by what they cost the logits, in k-means: the best of the trials before training, where bits cost nothing and where they do.
WEIGHTING, COUNTED_WEIGHTING = 1.0, 0.5
# Representatives of codebooks that are not trained, by what shares one, so that the files have similar sizes.
UNTRAINED = {
    "network": {"kernel": (96, 256, 1024), "row": (16, 64), "weight": (4, 8)},
    "stage": {"kernel": (48, 128, 512), "row": (16, 64), "weight": (4, 8)},
    "layer": {"kernel": (16, 48, 128), "row": (8, 16, 32), "weight": (4, 8)},
}
# The same, for sizes by fewer representatives, or by what a bit costs with the most of them.
COUNTED = {"kernel": (48, 96, 128, 192, 256), "row": (8, 16, 32, 64), "weight": (3, 4, 6, 8)}
BIT_COSTS = (0.03, 0.06, 0.1, 0.15, 0.2)
# Trials of the weighting where bits are counted: before training, at prices of a bit that give files of about 30 kB.
COUNTED_WEIGHTINGS = {1.0: 0.18, 0.75: 0.28, 0.5: 0.36, 0.25: 0.43, 0.0: 0.43}
# Trials of rows for half an epoch, which is too short to compare pieces: their number, price of a bit, and learning rate. Then of rows and
# single weights for `EPOCHS`.
BRIEF_TRIALS = (
    (64, 0.2, 0.003),
    (64, 0.2, 0.0015),
    (128, 0.25, 0.003),
    (32, 0.2, 0.003),
    (256, 0.3, 0.003),
    (64, 0.5, 0.003),
)
TRIALS = (
    ("row", 64, 0.2, 0.0015),
    ("row", 64, 0.2, 0.00075),
    ("row", 64, 0.25, 0.0015),
    ("row", 128, 0.25, 0.003),
    ("weight", 8, 0.22, 0.0015),
)
METHODS = ("rounded to nearest", "rounding learned", "learned steps", "codebook")


@dataclasses.dataclass(frozen=True)
class SizePoint:
    """A network in a file of few bytes.

    Attributes
    ----------
    base : the network's checkpoint, by `files.fingerprint`
    images : on which accuracy is measured, see `FineTuningRuns.fine_tuning_points`
    method : one of `METHODS`
    pruned : the name of the checkpoint in ``checkpoints/`` that it is made from, or "" for the network before pruning
    weight_bits, activation_bits : of `quantization.quantize` and `quantization.aware`; 0 for codebooks, whose activations are floats
    stream_bits : of the residual stream; 0: as the other activations
    granularity, n_representatives, scope, representatives : of `quantization.coded`; "weight" and 0 for the other methods
    renewals : how often pieces move to the nearest representative in each epoch, at equal distances; 0: never
    epochs, learning_rate : of the training, 0 for none
    n_images : number of training images, 0 for all
    seed : of k-means, rounding and batches
    checkpoint : name under which the result is saved, or ""
    weighting, bit_cost : see `quantization.coded`
    compact_file, contexts : whether the file is compact, and its indices have a code of their own, see `quantization.save_coded`; False for
        the other methods
    own_steps : of representatives in a compact file, see `quantization.save_coded`; False in rows that are older than these steps
    """

    base: str
    images: str
    method: str
    pruned: str = ""
    weight_bits: int = 0
    activation_bits: int = 0
    granularity: str = "weight"
    n_representatives: int = 0
    scope: str = "network"
    representatives: str = "k-means"
    renewals: int = 0
    epochs: int = 0
    learning_rate: float = 0.0
    n_images: int = 0
    seed: int = 0
    checkpoint: str = ""
    stream_bits: int = 0
    weighting: float = 0.0
    bit_cost: float = 0.0
    compact_file: bool = False
    contexts: bool = False
    own_steps: bool = False


@dataclasses.dataclass(frozen=True)
class SizeRuns(FineTuningRuns):
    """Networks in few bytes, made from one checkpoint or from networks that were pruned from it."""

    def size_points(self, method: str, images: str = "test", pruned: Sequence[str] = ("",), **choices: Sequence) -> list[SizePoint]:
        """Points for `measure_size`: each combination of choices for fields of `SizePoint`."""
        start = [SizePoint(fingerprint(self.path(name)), images, method, name) for name in pruned]
        return [point for each in start for point in expanded(each, **choices)]

    def measure_size(self, point: SizePoint) -> dict[str, Any]:
        """Accuracy in %, its change in pp from the network in floats before pruning, bytes on disk, and bits per parameter of the latter.

        The network is evaluated as it is read back from the file. An interrupted training resumes where it stopped.
        """
        if point.method not in METHODS:
            raise ValueError(f"method is {point.method!r}, expected one of {', '.join(METHODS)}")
        training = self.material.trained_on(point.images)
        training = training[: point.n_images or len(training)]
        network = self._coarse(point, len(training))
        if point.epochs:
            recipe = self.recipe(point.epochs, point.learning_rate)
            n_steps = point.epochs * (len(training) // recipe.batch_size)
            # The average must not reach back to the start of a short training.
            recipe = dataclasses.replace(recipe, ema=max(0.0, min(recipe.ema, 1 - 5 / n_steps)))
            # Rounding is many small operations: compiled, a step takes three fifths of the time, and compilation takes 200 to 300 steps.
            compiled = point.method == "learned steps" and n_steps >= 1000 and training.device.type == "cpu" and can_compile("cpu")
            self.fine_tune(network, training, recipe, point, Execution(compile=compiled or None))
        if point.epochs or point.method == "codebook":  # an average of weights has other statistics than the average of theirs
            network = calibration.reestimate_batch_norm(network, self.material.calibration)
        judged = self.material.images(point.images)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.pt"
            small = self._written(path, network, point, {})
            accuracy = round(evaluation.accuracy(small.to(judged.device), judged), 2)
            kept = "test_accuracy" if point.images == "test" else "held_out_accuracy"
            facts = dataclasses.asdict(point) | {kept: accuracy, "dataset": self.dataset}
            if point.checkpoint:
                path = self.path(point.checkpoint)
            self._written(path, network, point, facts)
            n_bytes = path.stat().st_size
        return {
            "bytes_on_disk": n_bytes,
            "bits_per_weight": round(8 * n_bytes / cost.parameters(self.material.network), 3),
            "accuracy": accuracy,
            "change": round(accuracy - self.base_accuracy(point.images), 2),
            "chosen_on": "held-out training images",
        }

    def _coarse(self, point: SizePoint, n_images: int) -> nn.Module:
        whole, calibration_images = self.network(point.pruned), self.material.calibration
        if point.method == "codebook":
            steps = max(n_images // self.recipe(1, 0.01).batch_size // point.renewals, 1) if point.renewals else 0
            settings = {"pieces": point.granularity, "scope": point.scope, "representatives": point.representatives, "seed": point.seed}
            settings["bit_cost"] = point.bit_cost
            if point.weighting:
                statistics = self.material.statistics
                if point.pruned:
                    statistics = calibration.layer_statistics(whole, self.material.fitted_to[:500])
                settings |= {"weighting": point.weighting, "statistics": statistics}
            return quantization.coded(whole, point.n_representatives, renew_every=steps, **settings)
        bits, stream = (point.weight_bits, point.activation_bits), {"stream_bits": point.stream_bits or None}
        if point.method == "learned steps":
            return quantization.aware(whole, calibration_images, *bits, **stream)
        n_steps = 200 if self.profile == "full" else 2
        learned = {"rounding": "block", "n_steps": n_steps} if point.method == "rounding learned" else {}
        return quantization.quantize(whole, calibration_images, *bits, **stream, end_bits=8, seed=point.seed, progress=False, **learned)

    def _written(self, path: Path, network: nn.Module, point: SizePoint, facts: dict[str, Any]) -> nn.Module:
        """Write a network to a file, and return the network that is read back from it."""
        if point.method == "codebook":
            file = {"compact": point.compact_file, "contexts": point.contexts, "own_steps": point.own_steps}
            quantization.save_coded(path, network, facts, **file)
            return quantization.load_coded(path)[0]
        small = quantization.integers(network) if point.method == "learned steps" else network
        quantization.save_quantized(path, small, facts)
        return quantization.load_quantized(path)[0]


@torch.no_grad()
def distortions(network: OwnNetwork, numbers: Mapping[str, Sequence[Count]], representatives: str = "k-means") -> pd.DataFrame:
    """How well one codebook for the whole network represents the pieces, before training.

    Parameters
    ----------
    network : is not changed
    numbers : numbers of representatives, by the kind of piece, see `quantization.coded`

    Returns
    -------
    DataFrame with a row for each kind and number: granularity, representatives, n_representatives, bits_per_weight (the entropy of the
    indices and 16 bits for each value of the codebooks, divided by the number of weights), error (squared error of the weights, in % of
    their squares)
    """
    layers, rows = convolutions(network), []
    for granularity, counts in numbers.items():
        for n_representatives in counts:
            settings = {"pieces": granularity, "representatives": representatives}
            small = quantization.coded(network, n_representatives, **settings)
            codes = {name: conv.parametrizations.weight[0] for name, conv in convolutions(small).items() if name != "conv1"}
            books: dict[nn.Module, list[torch.Tensor]] = {}
            for code in codes.values():
                books.setdefault(code.codebook, []).append(code.labels)
            bits = sum(book.bits[torch.cat(labels)].sum().item() + 16 * book.representatives.numel() for book, labels in books.items())
            pairs = [(layers[name].weight, small.get_submodule(name).weight) for name in codes]
            error = sum((before - after).square().sum() for before, after in pairs) / sum(before.square().sum() for before, _ in pairs)
            n_weights = sum(before.numel() for before, _ in pairs)
            row = {"bits_per_weight": round(bits / n_weights, 4), "error": round(100 * error.item(), 3)}
            rows.append({"granularity": granularity, "representatives": representatives, "n_representatives": n_representatives} | row)
    return pd.DataFrame(rows)


def untrained_points(runs: SizeRuns, numbers: Mapping[str, Mapping[str, Sequence[Count]]] = UNTRAINED) -> list[SizePoint]:
    """Codebooks before training, whose k-means minimises what errors of the weights cost the logits; those of the whole network, also
    with errors that all cost the same. `numbers` of representatives are by scope and kind of piece."""
    points = []
    for scope, pieces in numbers.items():
        for granularity, counts in pieces.items():
            weightings = [0.0, WEIGHTING] if scope == "network" else [WEIGHTING]
            choices = {"granularity": [granularity], "n_representatives": counts, "scope": [scope], "weighting": weightings}
            points += runs.size_points("codebook", **choices)
    return points


def counted_points(
    runs: SizeRuns,
    numbers: Mapping[str, Sequence[Count]] = COUNTED,
    bit_costs: Sequence[Real] = BIT_COSTS,
    seeds: Sequence[Seed] = (0, 1, 2),
) -> list[SizePoint]:
    """Codebooks before training, in files of several sizes: with several `numbers` of representatives, by kind of piece; with the most of
    them, but bits that cost something. `seeds` are those of k-means."""
    points = []
    for granularity, counts in numbers.items():
        choices = {"granularity": [granularity], "weighting": [WEIGHTING], "compact_file": [True], "seed": seeds}
        points += runs.size_points("codebook", n_representatives=counts, **choices)
        points += runs.size_points("codebook", n_representatives=[max(counts)], bit_cost=bit_costs, **choices)
    return points


def counted_trained_points(runs: SizeRuns) -> list[SizePoint]:
    """Codebooks that are trained while their bits are counted: kernels and rows of kernels, with all MACs and with half of them."""
    half = {"pruned": ["resnet20_macs50"]}
    renewed = {"renewals": [RENEWALS], "compact_file": [True], "weighting": [WEIGHTING]}
    kernels = renewed | {"granularity": ["kernel"], "n_representatives": [256]}
    few_kernels = kernels | {"n_representatives": [128]}
    briefly = {"epochs": [EPOCHS], "learning_rate": [RATES["codebook"][RENEWALS]]}
    longer = {"epochs": [LONGER], "learning_rate": [SMALLER_RATE]}
    points = runs.size_points("codebook", **kernels, **briefly, bit_cost=[0.11, 0.065])
    points += runs.size_points("codebook", **kernels, **longer, bit_cost=[0.065])
    points += runs.size_points("codebook", **half, **few_kernels, **briefly, bit_cost=[0.2, 0.11])
    points += runs.size_points("codebook", **half, **few_kernels, **longer, bit_cost=[0.11])
    rows = renewed | {"granularity": ["row"], "n_representatives": [64], "epochs": [EPOCHS], "learning_rate": [SMALLER_RATE]}
    in_contexts = rows | {"contexts": [True]}
    points += runs.size_points("codebook", **half, **in_contexts, bit_cost=[0.2, 0.215])
    points += runs.size_points("codebook", **rows, bit_cost=[0.212, 0.22])  # the last one is the next network in another file
    points += runs.size_points("codebook", **in_contexts, bit_cost=[0.22], seed=[0, 1, 2])
    points += runs.size_points("codebook", **in_contexts, bit_cost=[0.188])
    gently = in_contexts | {"weighting": [COUNTED_WEIGHTING]}
    points += runs.size_points("codebook", **half, **gently, bit_cost=[0.46, 0.49])
    points += runs.size_points("codebook", **gently, bit_cost=[0.6, 0.85])
    points += runs.size_points("codebook", **gently, bit_cost=[0.385, 0.79], seed=[0, 1, 2])
    finer = gently | {"own_steps": [True]}
    points += runs.size_points("codebook", **finer, bit_cost=[0.385], checkpoint=["resnet20_32kB"])
    points += runs.size_points("codebook", **finer, bit_cost=[0.6, 0.85])  # these and the next ones are networks from above in other files
    points += runs.size_points("codebook", **finer, bit_cost=[0.79], checkpoint=["resnet20_16kB"])
    points += runs.size_points("codebook", **finer, bit_cost=[0.79], seed=[1, 2])
    for epochs, bit_costs in ((BETWEEN, [0.415, 0.79, 0.865]), (LONGER, [0.88])):
        longer = {"epochs": [epochs], "learning_rate": [ROW_RATES[epochs]]}
        points += runs.size_points("codebook", **finer | longer, bit_cost=bit_costs)
    return points


def all_points(runs: SizeRuns) -> list[SizePoint]:
    """The points of ``figures/bytes.csv``, the most important ones first."""
    points = untrained_points(runs)
    kernels = {"granularity": ["kernel"], "n_representatives": [96]}
    fixed, renewed = ({"renewals": [n], "learning_rate": [rate]} for n, rate in RATES["codebook"].items())
    points += counted_trained_points(runs)
    points += runs.size_points("codebook", pruned=["", "resnet20_macs25"], **kernels, **renewed, epochs=[LONGER])

    def trained(bits: int, activation_bits: int, **choices: Sequence) -> list[SizePoint]:
        rate = RATES["learned steps"][bits]
        return runs.size_points("learned steps", weight_bits=[bits], activation_bits=[activation_bits], learning_rate=[rate], **choices)

    for bits, name in ((2, "resnet20_w2a2"), (3, ""), (4, "resnet20_w4a4")):
        points += trained(bits, bits, stream_bits=[STREAM], epochs=[LONGER], checkpoint=[name])
    points += trained(2, 2, epochs=[LONGER]) + trained(2, 2, stream_bits=[STREAM], epochs=[LONGEST])
    for bits in (2, 3, 4):
        points += trained(bits, bits, stream_bits=[STREAM], epochs=[LONGER], seed=[1, 2])
    for bits, activation_bits in ((4, 4), (3, 3), (2, 2), (2, 8)):
        points += trained(bits, activation_bits, epochs=[EPOCHS])
    for ways in (fixed, renewed):
        coded = {"epochs": [EPOCHS], **ways}
        points += runs.size_points("codebook", **kernels, **coded, representatives=["k-means", "random"])
        points += runs.size_points("codebook", granularity=["kernel"], n_representatives=[16], **coded)
    # Are pruning and few bits better together? With half of the MACs, and with a quarter.
    points += runs.size_points("codebook", pruned=["resnet20_macs50", "resnet20_macs25"], **kernels, **renewed, epochs=[EPOCHS])
    points += trained(4, 4, pruned=["resnet20_macs50"], epochs=[EPOCHS])
    points += runs.size_points("codebook", granularity=["weight"], n_representatives=[4, 2], epochs=[EPOCHS], **fixed)
    points += runs.size_points("codebook", granularity=["row"], n_representatives=[4, 16], epochs=[EPOCHS], **fixed)
    for granularity in ("kernel", "pair of kernels"):
        points += runs.size_points("codebook", granularity=[granularity], n_representatives=[256], epochs=[EPOCHS], **fixed)
    for bits in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4), (3, 3), (2, 2)):
        streams = [0, STREAM] if bits[0] == bits[1] < STREAM else [0]
        for method in METHODS[:2]:
            points += runs.size_points(method, weight_bits=[bits[0]], activation_bits=[bits[1]], stream_bits=streams)
    return points


def trial_points(runs: SizeRuns, n_images: int = 25_600) -> list[SizePoint]:
    """The points of ``figures/bytes_trials.csv``: none or an epoch with some of the images, evaluated on held-out training images."""
    trained = {"epochs": [1], "n_images": [n_images]}
    rates = [0.003, 0.01, 0.001, 0.03, 0.1]
    kernels = {"granularity": ["kernel"], "n_representatives": [96]}
    points = []
    for granularity, numbers in (("kernel", [96, 256]), ("row", [16]), ("weight", [4])):
        coded = {"granularity": [granularity], "n_representatives": numbers}
        points += runs.size_points("codebook", "training", **coded, weighting=[0.0, 0.5, 1.0])
    points += runs.size_points("codebook", "training", **kernels, learning_rate=rates, **trained)
    points += runs.size_points(
        "codebook", "training", **kernels, renewals=[5, 50, 200], learning_rate=[0.01, 0.003, 0.03, 0.001], **trained
    )
    values = {"granularity": ["kernel"], "weighting": [WEIGHTING], "compact_file": [False, True]}
    points += runs.size_points("codebook", "training", n_representatives=[128, 256], bit_cost=[0.05, 0.1, 0.2], **values)
    renewed = {"renewals": [RENEWALS], "learning_rate": [RATES["codebook"][RENEWALS]], "weighting": [WEIGHTING]}
    rows = {"granularity": ["row"], "n_representatives": [64], "compact_file": [True], "contexts": [True]}
    for n_kernels, bit_cost in ((128, 0.0), (256, 0.15), (64, 0.4)):
        coded = {"granularity": ["kernel"], "n_representatives": [n_kernels], "bit_cost": [bit_cost]}
        points += runs.size_points("codebook", "training", **coded, **renewed, **trained)
    for weighting, bit_cost in COUNTED_WEIGHTINGS.items():
        points += runs.size_points("codebook", "training", **rows, weighting=[weighting], bit_cost=[bit_cost])
    trained_rows = {"bit_cost": [COUNTED_WEIGHTINGS[COUNTED_WEIGHTING]], "epochs": [EPOCHS], "learning_rate": [SMALLER_RATE]}
    points += runs.size_points("codebook", "training", **rows, weighting=[COUNTED_WEIGHTING], renewals=[RENEWALS], **trained_rows)
    for n_kernels, bit_cost in ((512, 0.15), (256, 0.08)):
        coded = {"granularity": ["kernel"], "n_representatives": [n_kernels], "bit_cost": [bit_cost], "compact_file": [True]}
        points += runs.size_points("codebook", "training", **coded, weighting=[WEIGHTING])
        points += runs.size_points("codebook", "training", **coded, **renewed, **trained)
    coded = {"granularity": ["kernel"], "n_representatives": [256], "bit_cost": [0.08], "compact_file": [True]}
    rates = [*renewed["learning_rate"], SMALLER_RATE, SMALLER_RATE / 2]
    points += runs.size_points("codebook", "training", **coded, **renewed | {"learning_rate": rates}, epochs=[EPOCHS])
    for length, tried in ((trained, [("row", *trial) for trial in BRIEF_TRIALS]), ({"epochs": [EPOCHS]}, TRIALS)):
        for granularity, number, bit_cost, rate in tried:
            coded = {"granularity": [granularity], "n_representatives": [number], "bit_cost": [bit_cost], "compact_file": [True]}
            points += runs.size_points("codebook", "training", **coded, **renewed | {"learning_rate": [rate]}, **length)
    for renewals, rate in RATES["codebook"].items():
        weighted = {"weighting": [WEIGHTING], "renewals": [renewals], "learning_rate": [rate]}
        points += runs.size_points("codebook", "training", **kernels, **weighted, **trained)
    for bits, rates in ((4, [0.001, 0.003, 0.0003, 0.0001]), (2, [0.003, 0.01, 0.001, 0.03]), (3, [0.003, 0.001, 0.01, 0.0003])):
        points += runs.size_points("learned steps", "training", weight_bits=[bits], activation_bits=[bits], learning_rate=rates, **trained)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", action="store_true", help="the trials by which the learning rates are chosen")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    arguments = parser.parse_args()
    checkpoint = choosing_checkpoint if arguments.trials else base_checkpoint
    runs = SizeRuns(str(checkpoint("cifar10", "full")), "cifar10", taught_by=TEACHER)
    points, csv = (trial_points(runs), "bytes_trials.csv") if arguments.trials else (all_points(runs), "bytes.csv")
    with required("joblib", "studies").parallel_config(n_jobs=arguments.jobs):
        print(run_sweep(runs.measure_size, points, results_folder("cifar10", "full") / "figures" / csv).to_string())


if __name__ == "__main__":
    main()
