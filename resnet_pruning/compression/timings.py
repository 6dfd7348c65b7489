"""The time that the parts of a network take, for plans under a budget of time."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from ..arguments import Count, Integer, Real
from ..deployment.runtimes import prepared
from ..deployment.timing import interleaved
from ..hardware import default_device
from ..model import Block, OwnNetwork
from .parts import parts_of
from .streams import STAGES, read_by, stage_of

SHARES = tuple(k / 16 for k in range(1, 17))
N_CALIBRATION = 8  # for the ranges of int8, which do not affect the time


@torch.random.fork_rng(devices=[])
def part_timings(
    model: OwnNetwork,
    batch_size: Count = 256,
    runtime: str = "eager",
    precision: str = "float32",
    *,
    shares: Sequence[Real] = SHARES[1::2],
    drops: bool = False,
    stream_widths: Mapping[str, Sequence[Integer]] | None = None,
    rounds: Integer = 10,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Time the stem, and each block with fewer channels inside or around it, on this machine. Blocks of the same shape are timed once.

    A block alone would take longer than inside a network, where its inputs and outputs stay in the runtime's own layout and precision. It
    is timed behind a stem that makes its inputs from images, and the time of that stem is subtracted, round by round.

    Parameters
    ----------
    model : gives the shapes
    batch_size, runtime, precision, rounds, device, progress : see `deployment.timing.latency`
    shares : shares of the channels inside a block to time
    drops : whether to time dropped blocks too, as blocks of 0 channels
    stream_widths : for ``layer1``, ``layer2``, ``layer3``, the widths of the stage's stream to time; by default its full width

    Returns
    -------
    DataFrame with the columns layer (the stem's, or a block's first convolution), reads and writes (channels of the streams before and
    after it), n_clusters (inside) and seconds, the median of all rounds, at least 0, with the lowest and the highest. The stem's time
    includes what the runtime takes for a call

    Raises
    ------
    ValueError : shares outside (0, 1]
    """
    check_shares(shares)
    device = torch.device(device or default_device())
    widths = [list((stream_widths or {}).get(stage, [width])) for stage, width in zip(STAGES, model.config["stage_widths"], strict=True)]
    inputs = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    runs: dict[str, Callable[[], None]] = {}
    of_layer, size = {}, 32
    for name, part in parts_of(model).items():
        layer, written = f"{name}.conv1".removeprefix("."), widths[stage_of(name)]
        read = widths[read_by(name)] if name else [3]
        sizes = [0] if not name or part.dropped else [*([0] if drops else []), *numbers(part.bn1.num_features, shares)]
        stride = part.stride if name else 1
        inside = name.split(".")[-1] != "0"  # reads and writes the same stream
        for r, n, w in itertools.product(read, sizes, written):
            if name and (r > w or (r != w and (inside or name == "layer1.0"))):
                continue
            head = f"{r if name else w} channels of {size} pixels"
            shape = f"{head}, {n} inside, {w} after stride {stride}" if name else head
            of_layer[layer, r, n if name else w, w] = head, shape
            for key, blocks in {head: [], shape: [Block(r, n, w, stride)] if name else []}.items():
                if key not in runs:
                    network = _pooled(r if name else w, size, *blocks).to(device).eval()
                    runs[key], _ = prepared(network, inputs, runtime, precision, inputs[:N_CALIBRATION])
        size //= stride
    times, rows = interleaved(runs, rounds, progress), []
    for (layer, r, n, w), (head, shape) in of_layer.items():
        seconds = (times[shape] if shape == head else times[shape] - times[head]).clip(lower=0)
        row = {"layer": layer, "reads": r, "n_clusters": n, "writes": w, "seconds": seconds.median()}
        rows.append(row | {"lowest": seconds.min(), "highest": seconds.max()})
    return pd.DataFrame(rows)


def predicted_seconds(model: OwnNetwork, timings: pd.DataFrame) -> float:
    """The time of a network, from the times of its parts: their sum. What is between and behind them is not included.

    Parameters
    ----------
    model : made by a plan with sizes that were timed
    timings : from `part_timings`, for one batch size

    Raises
    ------
    ValueError : a part has a size that was not timed
    """
    known = timings.set_index(["layer", "reads", "n_clusters", "writes"]).seconds.to_dict()
    widths, total = model.config["stage_widths"], 0.0
    for name, part in parts_of(model).items():
        written = widths[stage_of(name)]
        inside = 0 if name and part.dropped else part.bn1.num_features
        size = f"{name}.conv1".removeprefix("."), widths[read_by(name)] if name else 3, inside, written
        if size not in known:
            raise ValueError(f"timings lacks {size}, expected a row for this layer, reads, n_clusters and writes")
        total += known[size]
    return total


def _pooled(width: Integer, size: Integer, *blocks: nn.Module) -> nn.Module:
    """A network from images to the means of its channels: a stem that gives `width` channels of `size` pixels, and blocks."""
    stem = nn.Conv2d(3, width, 3, stride=32 // size, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1))


def check_shares(shares: Sequence[Real]) -> None:
    """Raise a ValueError for a share outside (0, 1]."""
    if bad := [share for share in shares if not 0 < share <= 1]:
        raise ValueError(f"shares has {bad[0]!r}, expected numbers above 0 and at most 1")


def numbers(whole: Integer, shares: Sequence[Real]) -> list[int]:
    """The numbers of filters for these shares of a layer, each at least 1, and for the whole layer."""
    return sorted({max(1, round(share * whole)) for share in shares} | {whole})
