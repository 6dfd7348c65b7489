"""Choose the number of bits for the weights of each layer under a budget of bytes for all of them.

The error of a layer with few bits is measured for that layer alone: the mean squared change of the logits, with all else in floats. If
these errors are independent, they add. The best bits for any budget are then found like the best plans: see `knapsack.cheapest`.
"""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from ..arguments import Integer, Real
from ..compression.allocation import change_of_logits
from ..compression.knapsack import cheapest
from ..data import Images
from ..hardware import full_float32
from ..model import OwnNetwork, convolutions
from .post_training import round_weights
from .quantized_model import ENDS, QuantizedResNet, check_bits, layers, normalised_batches

BITS = (2, 3, 4, 5, 6, 8)


@full_float32()
@torch.no_grad()
def bit_errors(model: OwnNetwork, images: Images, bits: Sequence[Integer] = BITS) -> pd.DataFrame:
    """The change of the logits when the weights of one layer at a time are rounded to nearest in few bits. Labels are not used.

    Parameters
    ----------
    model : is not changed
    images : training images to measure on; a few hundred are enough
    bits : numbers of bits to measure

    Returns
    -------
    DataFrame with the columns layer, bits, bytes (of the layer's packed weights), n_weights and error: the mean squared change of the
    logits as a share of their variance

    Raises
    ------
    ValueError : bits that are not an integer from 2 to 16; a single image, whose logits have no variance
    """
    images = images.beside(model)
    if len(images) < 2:
        raise ValueError(f"images has {len(images)} image, expected at least 2")
    for n_bits in bits:
        check_bits(n_bits, "bits")
    network = QuantizedResNet(model, dict.fromkeys([*convolutions(model), "fc"], 16), 16, 16).to(images.device).eval()
    exact = _logits(network, images)  # its activations have no ranges, so they stay floats
    rows = []
    for name, layer in layers(network).items():
        n_weights = layer.weight.numel()
        for n_bits in map(int, bits):
            layer.bits = n_bits
            round_weights(layer, "mse", per_channel=True)
            error = change_of_logits(_logits(network, images), exact)
            rows.append({"layer": name, "bits": n_bits, "bytes": _packed(n_weights, n_bits), "n_weights": n_weights, "error": error})
        layer.weight = layer.float_weight
    return pd.DataFrame(rows)


def bits_by_sensitivity(errors: pd.DataFrame, weight_bits: Real, end_bits: Integer | None = None) -> dict[str, int]:
    """The bits of each layer with the smallest sum of errors, in at most the bytes that `weight_bits` in every layer would take.

    Parameters
    ----------
    errors : from `bit_errors`
    weight_bits : the budget; need not be an integer
    end_bits : of the first and the last layer, which then do not count towards the budget; None treats them like the others

    Returns
    -------
    dict from layer to bits, front to back, as `quantization.quantize` takes it

    Raises
    ------
    ValueError : a budget below the fewest measured bits, or `end_bits` that are not an integer from 2 to 16
    """
    if end_bits is not None:
        check_bits(end_bits, "end_bits")
    if not weight_bits >= errors.bits.min():
        raise ValueError(f"weight_bits is {weight_bits!r}, expected at least {errors.bits.min()}, the fewest in errors")
    fixed = {} if end_bits is None else dict.fromkeys(ENDS, int(end_bits))
    parts = {layer: rows for layer, rows in errors.groupby("layer", sort=False) if layer not in fixed}
    budget = sum(_packed(rows.n_weights.iloc[0], weight_bits) for rows in parts.values())
    chosen = cheapest([rows[["bytes", "error"]].to_numpy(float) for rows in parts.values()], budget)
    bits = fixed | {layer: int(rows.bits.iloc[i]) for (layer, rows), i in zip(parts.items(), chosen, strict=True)}
    return {layer: bits[layer] for layer in errors.layer.unique()}


def _packed(n_weights: Integer, bits: Real) -> int:
    return math.ceil(n_weights * bits / 8)


def _logits(network: QuantizedResNet, images: Images) -> Tensor:
    return torch.cat([network(inputs) for inputs in normalised_batches(images)])
