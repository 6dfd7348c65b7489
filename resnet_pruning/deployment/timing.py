"""Interleaved timing of networks: each runs in every round, so that a change of the machine's speed affects all of them alike."""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ..arguments import Count, Integer, Real
from ..hardware import default_device, full_float32, keep_freed_memory, machine
from .runtimes import prepared


def latency(
    networks: Mapping[str, nn.Module],
    batch_size: Count = 256,
    settings: Sequence[tuple[str, str]] = (("eager", "float32"),),
    *,
    device: torch.device | str | None = None,
    rounds: Integer = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """The time of networks for a batch of 32×32 images, in one or several runtimes, measured interleaved.

    Parameters
    ----------
    networks : by name; the others are compared with the first
    batch_size : images per batch
    settings : runtimes and precisions, from `runtimes.PRECISIONS`. The ranges of int8, which do not affect the time, are those of random
        inputs
    device : by default, a GPU if there is one. The table names the device that computed: see `runtimes.prepared`
    rounds : turns of each network in each setting
    progress : whether to show a bar

    Returns
    -------
    DataFrame with a row per setting and network: milliseconds for the batch, the median over the rounds, and the lowest and the highest;
    speedup, the median over the rounds of the first network's time in the first setting divided by this one's in the same round, and the
    lowest and the highest; own_speedup, likewise, relative to the first network in the row's own setting

    Raises
    ------
    ValueError : no networks or settings; a batch size or a number of rounds below 1; an unknown runtime or precision
    """
    if not networks or not settings or batch_size < 1 or rounds < 1:
        counts = f"{len(networks)} networks, {len(settings)} settings, batch_size {batch_size} and rounds {rounds}"
        raise ValueError(f"{counts}, expected at least 1 of each")
    inputs = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device or default_device())
    runs, rows = {}, []
    for (runtime, precision), (name, network) in itertools.product(settings, networks.items()):
        runs[len(rows)], used = prepared(network, inputs, runtime, precision, inputs)
        setting = {"machine": machine(used), "device": used.type, "runtime": runtime, "precision": precision}
        rows.append(setting | {"batch_size": batch_size, "network": name})
    times = interleaved(runs, rounds, progress) * 1000
    own = times[[number - number % len(networks) for number in times]].set_axis(times.columns, axis=1)
    columns = _with_ranges(times, {"speedup": 1 / times.div(times[0], axis=0), "own_speedup": own / times})
    return pd.DataFrame(rows).join(columns).assign(rounds=rounds)


def compared(runs: Mapping[Hashable, Callable[[], None]], rounds: Integer, progress: bool = True) -> pd.DataFrame:
    """The time of functions compared with that of the first, `interleaved`.

    Returns
    -------
    DataFrame with a row per function, its name as model: milliseconds, the median over the rounds, with the lowest and the highest;
    speedup, the median over the rounds of the first one's time divided by this one's, with the lowest and the highest; rounds
    """
    times = interleaved(runs, rounds, progress) * 1000
    columns = _with_ranges(times, {"speedup": 1 / times.div(times.iloc[:, 0], axis=0)})
    return columns.rename_axis("model").reset_index().assign(rounds=rounds)


def _with_ranges(times: pd.DataFrame, ratios: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Median, lowest and highest over the rounds: of times in milliseconds, and of named ratios of them."""
    columns = {"milliseconds": times.median(), "lowest": times.min(), "highest": times.max()}
    for name, ratio in ratios.items():
        columns |= {name: ratio.median(), f"lowest_{name}": ratio.min(), f"highest_{name}": ratio.max()}
    return pd.DataFrame(columns).round(3)


@full_float32()
def interleaved(runs: Mapping[Hashable, Callable[[], None]], rounds: Integer, progress: bool = True, least: Real = 0.05) -> pd.DataFrame:
    """Seconds per call of each function, a column each, in rounds in which they take turns: a change of the machine's speed affects all
    alike. In a turn, a function runs as often as fits into `least` seconds. Float32 is computed in full, see `hardware.full_float32`."""
    keep_freed_memory()
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):  # the first run compiles, and all warm up
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
