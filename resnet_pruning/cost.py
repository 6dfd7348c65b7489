"""What a network costs: parameters, multiply-accumulates, bytes, time."""

import gzip
import io
import time
from collections.abc import Callable, Mapping
from fractions import Fraction

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .hardware import default_device, keep_freed_memory, machine
from .model import batch_norms, convolutions
from .runtimes import prepared


def parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and the linear layer for one 32×32 image."""
    return sum(macs_by_layer(model).values())


def macs_by_layer(model: nn.Module) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one 32×32 image, by name, front to back."""
    training, device = model.training, next(model.parameters()).device
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    model.train(training)
    # The counter names a layer Class.name, and counts a multiply-accumulate as two operations.
    counts = {name.partition(".")[2]: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    return {name: counts[name] for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def of_plan(model: nn.Module, plan: Mapping[str, int], merged: bool = False) -> tuple[int, int]:
    """Parameters and MACs of a model whose filters are replaced by this plan, each distinct filter stored and computed once.

    What follows a layer still sees all its channels, so this saves in the layer itself and in no other; unless `merged`, as in
    `compensation.merge`: then the channels inside a block are as many as its ``conv1`` has clusters, which saves in ``conv2`` too.
    """
    convs, norms, macs = convolutions(model), batch_norms(model), macs_by_layer(model)
    shares = {name: Fraction(min(plan.get(name, conv.out_channels), conv.out_channels), conv.out_channels) for name, conv in convs.items()}
    n_parameters, n_macs = parameters(model), sum(macs.values())
    for name, conv in convs.items():
        share = shares[name]
        if merged and name.endswith(".conv1"):
            n_parameters -= round((1 - share) * 2 * norms[name].num_features)
        if merged and name.endswith(".conv2"):
            share *= shares[name.replace("conv2", "conv1")]
        n_parameters -= round((1 - share) * conv.weight.numel())
        n_macs -= round((1 - share) * macs[name])
    return n_parameters, n_macs


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint stores, batch-norm statistics included."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def gzip_bytes(model: nn.Module) -> int:
    """Bytes of the file that holds those tensors, as gzip packs it: zeros take next to none."""
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, buffer)
    return len(gzip.compress(buffer.getvalue()))


def latency(
    models: Mapping[str, nn.Module],
    batch_size: int = 256,
    runtime: str = "eager",
    *,
    device: torch.device | str | None = None,
    rounds: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """How long networks take for a batch of 32×32 images, measured turn and turn about.

    Parameters
    ----------
    models : by name; the first is the one that the others are compared with
    batch_size : images
    runtime : one of `runtimes.RUNTIMES`
    device : a GPU where there is one, if not given
    rounds : turns of each model
    progress : whether to show a bar

    Returns
    -------
    DataFrame with a row per model: milliseconds for the batch, the median over the rounds, and the lowest and the highest; speedup, the
    median over the rounds of the first model's time divided by this one's in the same round, and the lowest and the highest

    Raises
    ------
    ValueError : no models, a batch size or a number of rounds below 1, an unknown runtime
    """
    if not models or batch_size < 1 or rounds < 1:
        raise ValueError(f"{len(models)} models, batch_size {batch_size} and rounds {rounds}, expected at least 1 of each")
    device = torch.device(device or default_device())
    inputs = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    runs = {name: prepared(model, inputs, runtime) for name, model in models.items()}
    times = in_turns(runs, rounds, progress) * 1000
    speedups = 1 / times.div(times.iloc[:, 0], axis=0)
    return pd.DataFrame(
        {
            "machine": machine(),
            "device": device.type,
            "runtime": runtime,
            "batch_size": batch_size,
            "model": list(models),
            "milliseconds": times.median().round(3).to_numpy(),
            "lowest": times.min().round(3).to_numpy(),
            "highest": times.max().round(3).to_numpy(),
            "speedup": speedups.median().round(3).to_numpy(),
            "lowest_speedup": speedups.min().round(3).to_numpy(),
            "highest_speedup": speedups.max().round(3).to_numpy(),
            "rounds": rounds,
        }
    )


def in_turns(runs: Mapping[str, Callable[[], None]], rounds: int, progress: bool = True, least: float = 0.05) -> pd.DataFrame:
    """Seconds that each function takes, a column each, in rounds in which they take turns: so a change of the machine's speed meets
    all alike. In a turn a function runs as often as fits into `least` seconds."""
    keep_freed_memory()
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):  # the first compiles, and all warm up
            start = time.perf_counter()
            run()
            repeats[name] = max(1, round(least / (time.perf_counter() - start)))
    rows = []
    for _ in tqdm(range(rounds), desc="rounds", disable=not progress):
        rows.append({})
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            rows[-1][name] = (time.perf_counter() - start) / repeats[name]
    return pd.DataFrame(rows)
