"""Interleaved timings: ``python -m resnet_pruning.studies.benchmark training``, ``step``, ``accuracy`` or
``inference``.

*training* compares a straightforward loop (a DataLoader with workers, torchvision's transforms on PIL images,
float32, eager) with `training.train`, adding one improvement at a time. Each loop runs in its own process, and the loops
take turns, so that a change of the machine's speed affects all of them alike. On a GPU, float32 here means PyTorch's default:
convolutions in TF32.

*step* divides the time of a training step among its parts, and compares its convolutions with the machine's peak.

*accuracy* measures the time to the accuracy that He et al. (2015) published for this network, with the shortest of our training runs that
reaches it. It estimates the time that the straightforward loop needs for their training.

*inference* compares the trained network with the pruned ones of `kept_networks`, in each runtime and at each batch size. Where there is a
GPU, it is what is timed.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm.auto import tqdm

from .. import cost, evaluation
from ..arguments import Count, Integer
from ..checkpoints import load_checkpoint
from ..data import Images, load_images
from ..deployment import bounds, runtimes, timing
from ..deployment.runtimes import prepared
from ..files import DATASETS, ROOT, fingerprint, locked, results_folder, write_table
from ..hardware import can_compile, default_device, has_fast_bfloat16, machine
from ..model import ResNet
from ..quantization import pytorch
from ..training import Execution, Recipe, train
from .base import base_checkpoint
from .sweeps import read_or_measure
from .trials import LONG

STRAIGHTFORWARD = "straightforward loop: DataLoader, float32, eager"
CROPS = "+ crops of 24×24 pixels"  # used in two thirds of the epochs of `trials.LONG`
GRAPHS = "whole images, CUDA graphs instead of torch.compile"
# How `train` is called: each line adds one improvement, but the last.
STEPS = {
    "data as one tensor on the device": Execution(amp=False, channels_last=False, compile=False, cuda_graphs=False, reuse_memory=False),
    "+ freed memory kept": Execution(amp=False, channels_last=False, compile=False, cuda_graphs=False),
    "+ channels_last": Execution(amp=False, compile=False, cuda_graphs=False),
    "+ bfloat16 autocast": Execution(amp=True, compile=False, cuda_graphs=False),
    "+ torch.compile": Execution(amp=True, compile=True),
    CROPS: Execution(amp=True, compile=True),
    GRAPHS: Execution(amp=True, compile=False, cuda_graphs=True),
}

# He et al. (2015), section 4.2: the accuracy of ResNet-20 (%), and the number of steps of 128 images.
PUBLISHED, PUBLISHED_STEPS = 91.25, 64_000
SHORTEST = dataclasses.replace(LONG, epochs=26)

BATCH_SIZES = (1, 256)
# The others are compared with the first: the fastest of PyTorch's own in float32.
SETTINGS = tuple(
    sorted(
        ((runtime, precision) for runtime, precisions in runtimes.PRECISIONS.items() for precision in precisions),
        key=lambda setting: setting != ("compiled", "float32"),
    )
)


class PILImages(Dataset):
    """`Images` as a map-style data set of PIL images, transformed one by one, as torchvision's data sets are."""

    def __init__(self, images: Images):
        self.arrays, self.labels = images.pixels.permute(0, 2, 3, 1).cpu().numpy(), images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                *([transforms.RandomHorizontalFlip()] if images.flips else []),
                transforms.ToTensor(),
                transforms.Normalize(images.mean, images.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Integer):
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def straightforward_loop(images: Images, batch_size: Count, device: torch.device):
    """A straightforward training loop. Each call of the returned function trains an epoch and returns images/s."""
    model = ResNet(n_classes=len(images.classes)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = DataLoader(
        PILImages(images),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )

    def epoch() -> float:
        start = time.perf_counter()
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the GPU
        return len(loader) * batch_size / (time.perf_counter() - start)

    return epoch


def this_loop(images: Images, batch_size: Count, device: torch.device, name: str):
    """`train` itself, with the images on the device, in one of `STEPS`. Each call trains two epochs; the first is a warm-up."""
    model, images, execution = ResNet(n_classes=len(images.classes)), images.to(device), STEPS[name]
    recipe = Recipe(epochs=2, batch_size=batch_size, small_share=float(name == CROPS))

    def epoch() -> float:
        return train(model, images, recipe, progress=False, execution=execution).images_per_second.iloc[1]

    return epoch


def _serve(pipe: Connection, name: str, dataset: str, batch_size: Count, n_steps: Count) -> None:
    """In a child process, train an epoch of `n_steps` steps at each request, and answer with its images/s, until the pipe is closed."""
    device = default_device()
    images = load_images(dataset)[0][: n_steps * batch_size]
    epoch = straightforward_loop(images, batch_size, device) if name == STRAIGHTFORWARD else this_loop(images, batch_size, device, name)
    epoch()
    with contextlib.suppress(EOFError, ConnectionError):  # the other end is closed, maybe in the middle of an epoch
        pipe.send("ready")
        while pipe.recv():
            pipe.send(epoch())


@contextlib.contextmanager
def _loops(
    names: Sequence[str], dataset: str, batch_size: Count, n_steps: Count, progress: bool = True
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start each loop in its own process. Yields a function for each name: a call trains an epoch and returns its images/s. The processes
    end with the block, also after an error."""
    context = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():  # one process imports everything, and is forked for each loop
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    pipes, processes = {}, []

    def epoch(pipe: Connection) -> float:
        pipe.send(True)
        return pipe.recv()

    try:
        for name in tqdm(names, desc="starting the loops", disable=not progress):
            pipes[name], child = context.Pipe()
            with child:  # closed here, so that the wait for a child ends if it dies
                process = context.Process(target=_serve, args=(child, name, dataset, batch_size, n_steps))
                process.start()
                processes.append(process)
            pipes[name].recv()
        yield {name: functools.partial(epoch, pipe) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


def benchmark_training(
    dataset: str, batch_size: Count = 128, n_steps: Count = 40, rounds: Integer = 5, progress: bool = True
) -> pd.DataFrame:
    """Time the straightforward loop and each step from it to `train`.

    Returns
    -------
    DataFrame with a row per loop: median, lowest and highest over the rounds, of its images/s and of their ratio to those of
    the straightforward loop in the same round. Loops that the machine cannot run are left out, with a message.
    """
    device = default_device()
    names = [STRAIGHTFORWARD, *(name for name in STEPS if device.type == "cuda" or name != GRAPHS)]
    if not has_fast_bfloat16(device):
        print("This machine has no bfloat16 instructions: the loops that use it are left out.")
        names = [name for name in names if name == STRAIGHTFORWARD or not STEPS[name].amp]
    elif not can_compile(device.type):
        names = [name for name in names if name == STRAIGHTFORWARD or not STEPS[name].compile]
    with _loops(names, dataset, batch_size, n_steps, progress) as loops:
        speeds = pd.DataFrame([{name: epoch() for name, epoch in loops.items()} for _ in tqdm(range(rounds), disable=not progress)])
    ratios = speeds.div(speeds[STRAIGHTFORWARD], axis=0)
    return pd.DataFrame(
        {
            "machine": machine(device),
            "torch": torch.__version__,
            "dataset": dataset,
            "batch_size": batch_size,
            "loop": names,
            "images_per_second": speeds.median().round(0).to_numpy(),
            "lowest": speeds.min().round(0).to_numpy(),
            "highest": speeds.max().round(0).to_numpy(),
            "ratio": ratios.median().round(2).to_numpy(),
            "lowest_ratio": ratios.min().round(2).to_numpy(),
            "highest_ratio": ratios.max().round(2).to_numpy(),
            "rounds": rounds,
        }
    )


def benchmark_step(dataset: str, batch_size: Count = 128, n_steps: Count = 100, depth: Count = 20) -> pd.DataFrame:
    """Profile the steps of a training of ResNet-`depth` by `SHORTEST` with whole images, compiled, on the CPU, in bfloat16 if it has that.

    Returns
    -------
    DataFrame with a row for each part of a step and for the whole: milliseconds, their share (%), and for convolutions at_peak: the time
    that their multiply-accumulates take at the machine's peak (`deployment.bounds.peaks`), as a share (%) of the time that they took

    Raises
    ------
    RuntimeError : no compiler works here
    """
    if not can_compile("cpu"):
        raise RuntimeError("no compiler works here, expected one for C++: the parts of a step are those of its compiled graph")
    images = load_images(dataset)[0][: n_steps * batch_size]
    network = ResNet(depth, n_classes=len(images.classes))
    n_steps = len(images) // batch_size
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    after_epoch = iter([lambda: None, profiler.start, profiler.stop])  # in the first, everything is compiled; the second is a warm-up
    recipe = dataclasses.replace(SHORTEST, epochs=3, batch_size=batch_size, small_share=0.0)
    execution = Execution(amp=has_fast_bfloat16("cpu"), compile=True)
    history = train(network, images, recipe, watch=lambda _: next(after_epoch)() or {}, execution=execution, progress=False)

    events = profiler.key_averages()

    def milliseconds(name: str, time: str = "self_cpu_time_total") -> float:
        return sum(getattr(event, time) for event in events if name in event.key) / 1000 / n_steps

    backward = milliseconds("convolution_backward")
    parts = {
        "convolutions, backward": backward,
        "convolutions, forward": milliseconds("convolution") - backward,
        "batch norm, ReLU and additions, fused": milliseconds("CompiledFxGraph"),
        "optimizer": milliseconds("Optimizer.step#", "cpu_time_total"),
        "average of weights": milliseconds("_foreach_lerp_", "cpu_time_total"),
    }
    whole = 1000 * history.seconds.iloc[-1] / n_steps
    parts |= {"augmentation, loss and calls": whole - sum(parts.values()), "the whole step": whole}
    counts = cost.macs_by_layer(network)
    forward = sum(count for name, count in counts.items() if name != "fc")
    # Backward, each multiply-accumulate has two, but the gradient of the images is not needed.
    macs = {"convolutions, forward": forward, "convolutions, backward": 2 * forward - counts["conv1"]}
    peak = bounds.peaks()["bfloat16" if execution.amp else "float32"]
    rows = [
        {
            "part": part,
            "milliseconds": round(time, 2),
            "share": round(100 * time / whole, 1),
            "at_peak": round(100 * 1000 * macs[part] * batch_size / peak / time, 1) if part in macs else None,
        }
        for part, time in parts.items()
    ]
    return pd.DataFrame(rows).assign(machine=machine("cpu"), torch=torch.__version__, batch_size=batch_size)


def benchmark_accuracy(
    dataset: str, recipe: Recipe = SHORTEST, n_seeds: Count = 3, n_steps: Count = 40, progress: bool = True
) -> pd.DataFrame:
    """The time of training runs, from the first step to the last including compilation, and their final accuracy.

    Returns
    -------
    DataFrame with two rows. For the straightforward loop, the accuracy is the published one, and the minutes are an estimate: the published
    number of steps, at the median speed of the loop in epochs of `n_steps` steps, one before each training. For `recipe`: minutes (median
    over seeds), mean, lowest and highest test accuracy in %, and the ratio of the straightforward loop's minutes to these.
    """
    images, test_images = load_images(dataset, device=default_device())
    speeds, minutes, accuracies = [], [], []
    with _loops([STRAIGHTFORWARD], dataset, 128, n_steps, progress) as loops:
        for seed in range(n_seeds):
            speeds.append(loops[STRAIGHTFORWARD]())
            torch.manual_seed(seed)
            network = ResNet(n_classes=len(images.classes))
            torch.compiler.reset()
            start = time.perf_counter()
            train(network, images, recipe, seed=seed, progress=progress)
            minutes.append((time.perf_counter() - start) / 60)
            accuracies.append(evaluation.accuracy(network, test_images))
    estimate = PUBLISHED_STEPS * 128 / float(np.median(speeds)) / 60
    published = {"recipe": f"{STRAIGHTFORWARD}; He et al. (2015), time estimated", "epochs": round(PUBLISHED_STEPS * 128 / len(images))}
    ours = {"recipe": f"{recipe.optimizer}, {recipe.learning_rate:g}", "epochs": recipe.epochs}
    found = {"accuracy": np.mean(accuracies), "lowest": min(accuracies), "highest": max(accuracies), "seeds": n_seeds}
    rows = [
        published | {"minutes": estimate, "accuracy": PUBLISHED, "ratio": 1.0},
        ours | {"minutes": float(np.median(minutes))} | found | {"ratio": estimate / float(np.median(minutes))},
    ]
    digits = {"minutes": 1, "accuracy": 2, "lowest": 2, "highest": 2, "ratio": 1}
    columns = ["recipe", "epochs", "minutes", "accuracy", "lowest", "highest", "seeds", "ratio"]
    return pd.DataFrame(rows)[columns].round(digits).astype({"seeds": "Int64"}).assign(machine=machine(), torch=torch.__version__)


def working_settings(settings: Sequence[tuple[str, str]] = SETTINGS) -> list[tuple[str, str]]:
    """The `settings` (runtimes and precisions) that this machine can run. Prints which ones are left out, and why."""
    reasons = {setting: _lacking(*setting) for setting in settings}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(f"Left out: {', '.join(' in '.join(setting) for setting in settings if reasons[setting] == reason)}: {reason}.")
    return [setting for setting in settings if not reasons[setting]]


def _lacking(runtime: str, precision: str) -> str:
    """What this machine lacks for a runtime and a precision, or ""."""
    device = default_device().type
    if runtime == "compiled" and not can_compile(device):
        return "no compiler works here"
    if runtime in ("onnxruntime", "openvino") and importlib.util.find_spec(runtime) is None:
        return "pip install -e '.[export,openvino]' brings it"
    if precision == "bfloat16" and not has_fast_bfloat16("cpu" if runtime == "openvino" else device):
        return "this processor has no instructions for bfloat16"
    return ""


def benchmark_inference(
    networks: Mapping[str, nn.Module],
    batch_sizes: Sequence[Integer] = BATCH_SIZES,
    settings: Sequence[tuple[str, str]] = SETTINGS,
    *,
    bounded: bool = True,
    rounds: Integer = 15,
    progress: bool = True,
) -> pd.DataFrame:
    """Time networks in every runtime and precision that works here, with lower bounds on their time.

    Parameters
    ----------
    networks : by name; the others are compared with the first
    batch_sizes : images per batch
    settings : runtimes and precisions; `speedup` is relative to the first network in the first of them
    bounded : whether to measure lower bounds too, which takes networks of this package
    rounds, progress : see `deployment.timing.latency`

    Returns
    -------
    The rows of `deployment.timing.latency`, with macs_share (relative to the first network), threads and torch; and if `bounded` and on a
    CPU, lower bounds on the time of a batch by MACs and by memory (compute_milliseconds, memory_milliseconds, see `deployment.bounds`)
    """
    settings = working_settings(settings)
    tables = [timing.latency(networks, size, settings, rounds=rounds, progress=progress) for size in batch_sizes]
    table = pd.concat(tables, ignore_index=True)
    counts = {name: cost.macs(network) for name, network in networks.items()}
    whole = next(iter(counts.values()))
    table.insert(table.columns.get_loc("milliseconds"), "macs_share", table.network.map(lambda name: round(counts[name] / whole, 4)))
    if bounded and (table.device == "cpu").all():
        peaks, bandwidth = bounds.peaks(), bounds.bandwidth()
        least = [
            bounds.least_milliseconds(networks[row.network], row.batch_size, row.precision, peaks, bandwidth) for row in table.itertuples()
        ]
        table = table.assign(**pd.DataFrame(least).round(3).add_suffix("_milliseconds"))
    return table.assign(threads=torch.get_num_threads(), torch=torch.__version__)


def accuracy_by_runtime(
    networks: Mapping[str, nn.Module],
    images: Images,
    calibration: Images,
    settings: Sequence[tuple[str, str]] = SETTINGS,
    progress: bool = True,
) -> pd.DataFrame:
    """The accuracy (%) of networks in every runtime and precision that works here: a row for each, with runtime, precision and network.

    Parameters
    ----------
    images : test images
    calibration : training images for the ranges of int8
    """
    cells = list(itertools.product(working_settings(settings), networks))
    rows = []
    for (runtime, precision), name in tqdm(cells, desc="accuracy", disable=not progress):
        logits = runtimes.predict(networks[name], images, runtime, precision, calibration)
        accuracy = round(evaluation.accuracy_of(logits, images.labels.cpu()), 2)
        rows.append({"network": name, "runtime": runtime, "precision": precision, "accuracy": accuracy})
    return pd.DataFrame(rows)


def benchmark_numbers(
    networks: Mapping[str, nn.Module], batch_sizes: Sequence[Integer] = (1, 256), rounds: Integer = 20, compiles: bool = True
) -> pd.DataFrame:
    """Time networks with different kinds of numbers on the CPU, which has the integer kernels that `quantization.pytorch.to_int8` targets.

    Parameters
    ----------
    networks : by the kind of their numbers; the others are compared with the first
    rounds : number of rounds, in which the networks take turns
    compiles : whether to compile networks, with their weights as constants; otherwise, integers are only simulated

    Returns
    -------
    DataFrame with a row for each batch size and network: milliseconds, the median over the rounds; and the median, lowest and highest
    speed-up over the first network in the same round
    """
    tables = []
    for batch_size in batch_sizes:
        inputs = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        runs = {
            name: pytorch.compiled(network, inputs) if compiles else prepared(network, inputs, "eager")[0]
            for name, network in networks.items()
        }
        table = timing.compared(runs, rounds, progress=False).drop(columns=["lowest", "highest"])
        table = table.rename(columns={"model": "network", "lowest_speedup": "lowest", "highest_speedup": "highest"})
        table.insert(0, "batch_size", batch_size)
        tables.append(table)
    everything = pd.concat(tables, ignore_index=True)
    everything.insert(0, "runtime", "compiled" if compiles else "eager")
    everything.insert(0, "machine", machine("cpu"))
    return everything


def record(table: pd.DataFrame, csv: Path) -> None:
    """Write `table` to `csv`, in place of earlier rows of the same machine, batch size and (if any) runtime and precision; others stay."""
    with locked(csv):
        if csv.exists():
            old = pd.read_csv(csv)
            key = [name for name in ("machine", "batch_size", "runtime", "precision") if name in table]
            table = pd.concat([old[~old[key].apply(tuple, axis=1).isin(table[key].apply(tuple, axis=1))], table])
        write_table(table, csv)


def recorded(csv: Path, networks: Sequence[str]) -> pd.DataFrame:
    """The newest rows from `benchmark_inference` and `record` for these networks. For each setting and batch size, they are from one
    machine, the last that timed all of these networks. Empty if there are none."""
    if not csv.exists():
        return pd.DataFrame()
    table = pd.read_csv(csv)
    setting = ["runtime", "precision", "batch_size"]
    whole = table.groupby([*setting, "machine"]).filter(lambda rows: set(networks) <= set(rows.network))
    newest = whole.groupby(setting).machine.transform("last")
    return whole[(whole.machine == newest) & whole.network.isin(networks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["training", "step", "accuracy", "inference"])
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="of the training loops")
    parser.add_argument("--batch-size", type=int, help="128 for training, 1 and 256 for inference, if not given")
    parser.add_argument("--steps", type=int, default=40, help="steps of training per turn")
    parser.add_argument("--rounds", type=int, help="turns of each: 5 for training, 15 for inference, if not given")
    arguments = parser.parse_args()
    if arguments.what == "training":
        table = benchmark_training(arguments.dataset, arguments.batch_size or 128, arguments.steps, arguments.rounds or 5)
        record(table, results_folder(arguments.dataset, "full") / "figures" / "benchmark_training.csv")
        print(table.drop(columns=["torch", "dataset", "rounds"]).to_string(index=False))
    elif arguments.what == "step":
        table = benchmark_step(arguments.dataset, arguments.batch_size or 128)
        write_table(table, results_folder(arguments.dataset, "full") / "figures" / "benchmark_step.csv")
        print(table.drop(columns=["torch", "batch_size"]).to_string(index=False))
    elif arguments.what == "accuracy":
        table = benchmark_accuracy(arguments.dataset, n_steps=arguments.steps)
        write_table(table, results_folder(arguments.dataset, "full") / "figures" / "benchmark_accuracy.csv")
        print(table.to_string(index=False))
    else:
        batch_sizes = (arguments.batch_size,) if arguments.batch_size else BATCH_SIZES
        trained, (training, test) = base_checkpoint("cifar10", "full"), load_images("cifar10")
        networks, on_gpu = pruned_checkpoints(trained), default_device().type == "cuda"
        # The other runtimes compute on the CPU, and have no place in a comparison of what a GPU does.
        settings = [setting for setting in SETTINGS if not on_gpu or setting[0] in ("eager", "compiled")]
        table = benchmark_inference(networks, batch_sizes, settings, rounds=arguments.rounds or 15)
        record(table, ROOT / "figures" / f"benchmark_inference{'_gpu' if on_gpu else ''}.csv")
        print(table.drop(columns=["torch", "rounds"]).to_string(index=False))
        if on_gpu:
            return
        measure = functools.partial(accuracy_by_runtime, networks, test, training)
        read_or_measure(ROOT / "figures" / "runtime_accuracy.csv", measure, anew=True, base=fingerprint(trained))


def pruned_checkpoints(trained: Path) -> dict[str, nn.Module]:
    """The trained network and those of `kept_networks` beside it, by file name, the one with the most MACs first."""
    paths = [trained, *trained.parent.glob("resnet20_macs*.pt"), *trained.parent.glob("resnet20_fast*.pt")]
    models = {path.stem: load_checkpoint(path)[0] for path in paths}
    return dict(sorted(models.items(), key=lambda item: cost.macs(item[1]), reverse=True))


if __name__ == "__main__":
    main()
