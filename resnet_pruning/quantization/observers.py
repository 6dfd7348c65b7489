"""Choose the range of an activation that its integers span: statistics of several batches, and methods to choose from them."""

import math

import numpy as np
import torch
from torch import Tensor

from ..arguments import Integer, Real, Seed
from .quantized_model import affine_grid, quantized

OBSERVERS = ("min-max", "moving average", "percentile", "mse", "entropy")
N_SAMPLED = 20_000  # values kept from each batch


class Observer:
    """Statistics of one activation over several batches: each batch's lowest and highest value, and a sample of all values."""

    def __init__(self, name: str, seed: Seed = 0):
        self.name = name
        self.ends: list[tuple[float, float]] = []
        self.samples: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(int(seed))

    def see(self, x: Tensor) -> None:
        values = x.detach().flatten()
        if not values.isfinite().all():
            raise ValueError(
                f"the activations {self.name} are not finite, expected finite ones: the model or the images have NaN or infinity"
            )
        self.ends.append((float(values.min()), float(values.max())))
        chosen = torch.randint(len(values), (min(N_SAMPLED, len(values)),), generator=self.generator)
        self.samples.append(values[chosen.to(values.device)].float().cpu())

    def range(self, method: str, bits: Integer) -> tuple[float, float]:
        """The ends of the range to be represented.

        Parameters
        ----------
        method : "min-max"; "moving average", of the batches' ends with decay 0.9; "percentile", between the 0.01th and the 99.99th;
            "mse", the share of the whole range with the smallest squared error of `bits`-bit integers; "entropy", the share with the
            smallest divergence of the integers' distribution (Migacz, *8-bit Inference with TensorRT*, 2017)
        """
        low, high = min(low for low, _ in self.ends), max(high for _, high in self.ends)
        if method == "min-max":
            return low, high
        if method == "moving average":
            low, high = self.ends[0]
            for batch_low, batch_high in self.ends[1:]:
                low, high = 0.9 * low + 0.1 * batch_low, 0.9 * high + 0.1 * batch_high
            return low, high
        values = torch.cat(self.samples)
        if method == "entropy":
            values = values[values != 0]  # zero is represented exactly, whatever the range
            if not len(values):
                return low, high
        if method == "percentile":
            ends = np.percentile(values.numpy(), [0.01, 99.99])
            return float(ends[0]), float(ends[1])
        loss = _squared_error if method == "mse" else _divergence
        shares = torch.linspace(0.1, 1.0, 91).tolist()
        best = min(reversed(shares), key=lambda share: loss(values, share * low, share * high, bits))
        return best * low, best * high


def _squared_error(values: Tensor, low: Real, high: Real, bits: Integer) -> float:
    scale, offset = affine_grid(low, high, bits)
    represented = (quantized(values, scale, offset, 0, 2**bits - 1) - offset) * scale
    return float((represented - values).square().mean())


def _divergence(values: Tensor, low: Real, high: Real, bits: Integer, n_bins: Integer = 2048) -> float:
    """Kullback–Leibler divergence of values clipped to a range from the same values after quantization, as histograms.

    Within a step of the grid, quantization keeps the number of values but not their positions: the number is spread over non-empty bins.
    """
    if high <= low:
        return math.inf
    histogram = torch.histc(values.clamp(low, high), n_bins, low, high).double()
    inside = torch.histc(values[(values >= low) & (values <= high)], n_bins, low, high).double()
    scale, offset = affine_grid(low, high, bits)
    centres = low + (torch.arange(n_bins, dtype=torch.double) + 0.5) * (high - low) / n_bins
    steps = quantized(centres, scale, offset, 0, 2**bits - 1).long()
    occupied = (inside > 0).double()
    totals = torch.zeros(2**bits, dtype=torch.double)
    mass, places = totals.index_add(0, steps, inside), totals.index_add(0, steps, occupied)
    spread = occupied * (mass / places.clamp(min=1))[steps]
    p, q = histogram / histogram.sum(), spread / spread.sum().clamp(min=1e-12)
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp(min=1e-9)).log()).sum())
