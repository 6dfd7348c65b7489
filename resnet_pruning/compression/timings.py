"""The time that the parts of a network take, for plans under a budget of time."""

import copy
import itertools
from collections.abc import Mapping, Sequence

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
    after it), n_clusters (inside) and seconds, the median of all rounds, with the lowest and the highest
    """
    device = torch.device(device or default_device())
    widths = [list((stream_widths or {}).get(stage, [width])) for stage, width in zip(STAGES, model.config["stage_widths"], strict=True)]
    runs, of_layer, size = {}, {}, 32
    for name, part in parts_of(copy.deepcopy(model).eval()).items():
        layer, written = f"{name}.conv1".removeprefix("."), widths[stage_of(name)]
        read = widths[read_by(name)] if name else [3]
        sizes = [0] if not name or part.dropped else [*([0] if drops else []), *numbers(part.conv1.out_channels, shares)]
        stride = part.stride if name else 1
        inside = name.split(".")[-1] != "0"  # reads and writes the same stream
        for r, n, w in itertools.product(read, sizes, written):
            if r > w or (inside and name and r != w) or (name == "layer1.0" and r != w):
                continue
            shape = (size, stride, r, n, w) if name else ("stem", w)
            of_layer[layer, r, n if name else w, w] = shape
            if shape not in runs:
                smaller = Block(r, n, w, stride) if name else _stem(w)
                inputs = torch.randn(batch_size, r, size, size, generator=torch.Generator().manual_seed(0)).to(device)
                runs[shape], _ = prepared(smaller.to(device).eval(), inputs, runtime, precision, inputs)
        size //= stride
    seconds = interleaved(runs, rounds, progress)
    columns = {"seconds": seconds.median(), "lowest": seconds.min(), "highest": seconds.max()}
    return pd.DataFrame(
        [
            {"layer": layer, "reads": r, "n_clusters": n, "writes": w} | {key: float(value[shape]) for key, value in columns.items()}
            for (layer, r, n, w), shape in of_layer.items()
        ]
    )


def _stem(width: Integer) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def numbers(whole: Integer, shares: Sequence[Real]) -> list[int]:
    """The numbers of filters for these shares of a layer, each at least 1, and for the whole layer."""
    return sorted({max(1, round(share * whole)) for share in shares} | {whole})
