"""Compare the networks in a folder of checkpoints: size, accuracy and time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from .. import cost, evaluation, quantization
from ..arguments import Count, Integer
from ..checkpoints import load_checkpoint, read_tensors
from ..data import Images
from ..files import write_table
from .benchmark import benchmark_inference

TIMES = ["own_speedup", "lowest_own_speedup", "highest_own_speedup", "runtime", "precision", "machine"]
COLUMNS = [
    *("network", "macs", "parameters", "bytes", "accuracy", "change", "own_speedup", "lowest_own_speedup", "highest_own_speedup"),
    *("runtime", "precision", "macs_share", "parameters_share", "bytes_share", "machine"),
]


def load_networks(folder: Path, names: Sequence[str], device: torch.device | str) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks of these names that exist in a folder, on a device; and for each quantized one, the name of its original."""
    networks, made_of = {}, {}
    for name in names:
        path = folder / f"{name}.pt"
        if path.exists() and "bits" in read_tensors(path):
            network, facts = quantization.load_quantized(path)
            networks[name], made_of[name] = network.to(device), facts["network"]
        elif path.exists():
            networks[name] = load_checkpoint(path)[0].to(device, memory_format=torch.channels_last)
    return networks, made_of


def measure_networks(
    networks: Mapping[str, nn.Module],
    made_of: Mapping[str, str],
    images: Images,
    csv: Path,
    *,
    measure_time: bool = False,
    batch_size: Count = 256,
    settings: Sequence[tuple[str, str]] = (("eager", "float32"), ("compiled", "float32")),
    rounds: Integer = 15,
) -> pd.DataFrame:
    """Size and accuracy of networks, and their speed-up over the first. The table is written to `csv`.

    Parameters
    ----------
    networks : by name
    made_of : for each quantized network, the name of its original, whose MACs and parameters are reported. Quantized networks are not
        timed: their arithmetic is simulated in floats
    images : images to measure accuracy on
    csv : times are taken from here if it has them for these networks
    measure_time : whether to measure times even then, which requires an idle machine
    batch_size, settings, rounds : see `deployment.timing.latency`; for each network, the setting with its largest speed-up is reported

    Returns
    -------
    DataFrame with the columns `COLUMNS`; machine is what the times were measured on
    """
    table = _sizes_and_accuracies(networks, made_of, images)
    timed = [name for name in networks if name not in made_of]
    times = None if measure_time else _recorded_times(csv, table.set_index("network").macs[timed])
    if times is None:
        times = _measured_times({name: networks[name] for name in timed}, batch_size, settings, rounds)
    table = table.join(times, on="network")
    table = table.assign(machine=times.machine.iloc[0])[COLUMNS].round(4)
    write_table(table, csv)
    return table


def _sizes_and_accuracies(networks: Mapping[str, nn.Module], made_of: Mapping[str, str], images: Images) -> pd.DataFrame:
    rows = []
    for name, network in networks.items():
        counted = networks.get(made_of.get(name, name), network)
        size = {"macs": cost.macs(counted), "parameters": cost.parameters(counted), "bytes": cost.size_in_bytes(network)}
        rows.append({"network": name, **size, "accuracy": evaluation.accuracy(network, images)})
    table = pd.DataFrame(rows)
    table["change"] = table.accuracy - table.accuracy[0]
    for size in ("macs", "parameters", "bytes"):
        table[f"{size}_share"] = table[size] / table[size][0]
    return table


def _recorded_times(csv: Path, macs: pd.Series) -> pd.DataFrame | None:
    """The times in a CSV, by network; None if one of the networks has no times there, or had other MACs."""
    if not csv.exists():
        return None
    rows = pd.read_csv(csv).dropna(subset="own_speedup").set_index("network")
    return rows.loc[macs.index, TIMES] if rows.macs.reindex(macs.index).eq(macs).all() else None


def _measured_times(
    networks: Mapping[str, nn.Module], batch_size: Count, settings: Sequence[tuple[str, str]], rounds: Integer
) -> pd.DataFrame:
    """The times of each network in the setting with its largest speed-up, by network."""
    table = benchmark_inference(networks, [batch_size], settings, bounded=False, rounds=rounds, progress=False)
    best = table.sort_values("own_speedup", kind="stable").groupby("network").tail(1)
    return best.set_index("network")[TIMES].loc[list(networks)]
