"""Post-training quantization of a `ResNet`: weights and activations as integers of 2 to 16 bits, with a scale and an offset.

Weights are *symmetric*: no offset, and a scale for each filter or one for the layer. Activations are *affine*: one scale and offset for
each tensor, whose range is measured on some training images. Zero is represented exactly, so padding stays exact. Batch norm is folded into
the convolutions first. See `quantized_model` for what the result computes.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from ..arguments import Integer, Natural, Seed
from ..data import Images
from ..hardware import full_float32
from ..model import OwnNetwork, convolutions
from .observers import OBSERVERS, Observer
from .quantized_model import (
    ENDS,
    QuantizedLayer,
    QuantizedResNet,
    activations,
    check_bits,
    layers,
    normalised_batches,
    per_filter,
    quantized,
    unrounded,
)
from .rounding import ROUNDINGS, reconstruct


@full_float32()
def quantize(
    model: OwnNetwork,
    images: Images,
    weight_bits: Integer | Mapping[str, Integer] = 8,
    activation_bits: Integer = 8,
    *,
    end_bits: Integer | None = None,
    stream_bits: Integer | None = None,
    observer: str = "mse",
    weight_range: str = "mse",
    per_channel: bool = True,
    levels: str = "uniform",
    bias_correction: bool = False,
    rounding: str = "nearest",
    n_steps: Natural = 1000,
    seed: Seed = 0,
    progress: bool = True,
) -> QuantizedResNet:
    """A quantized network, without labels and without training the whole network.

    Parameters
    ----------
    model : trained; may be compact, with shared filters. It is not changed
    images : training images; labels are not used. The activations' ranges are measured on all of them
    weight_bits, activation_bits : 2 to 16; `weight_bits` also by layer, for every convolution and "fc"
    end_bits : of the first and the last layer's weights, of the network's input and of the last layer's input; as the others if None
    stream_bits : of the residual stream, as `activation_bits` if None. With more, it is rounded again for the first layer of each block
    observer : how the ranges of activations are chosen from statistics, one of `OBSERVERS`
    weight_range : "min-max", or "mse" for the scale with the smallest squared error
    per_channel : a scale for each filter, or one for the layer
    levels : "uniform", or "k-means": 2^weight_bits values, in steps, found by k-means of the weights of the layer
    bias_correction : shift each channel so that its mean on `images` is that of `model` (Nagel et al., *Data-Free Quantization*, ICCV 2019)
    rounding : "nearest", or learnt to preserve the outputs: "layer" by layer (Nagel et al., *AdaRound*, ICML 2020) or "block" by block,
        with the activations' scales (Li et al., *BRECQ*, ICLR 2021); see `rounding.reconstruct`
    n_steps : learning steps for each layer or block
    seed : of samples, k-means and batches
    progress : whether to show a progress bar while rounding is learnt

    Raises
    ------
    ValueError : bits that are not an integer from 2 to 16; an unknown choice; a model that is already quantized; activations that are not
        finite (the message names them); k-means levels with learnt rounding or over 8 bits
    """
    by_layer = isinstance(weight_bits, Mapping)
    checked = {f"weight_bits[{layer!r}]": bits for layer, bits in weight_bits.items()} if by_layer else {"weight_bits": weight_bits}
    checked |= {"activation_bits": activation_bits}
    checked |= {name: bits for name, bits in {"end_bits": end_bits, "stream_bits": stream_bits}.items() if bits is not None}
    for name, bits in checked.items():
        check_bits(bits, name)
    for name, value, known in (
        ("observer", observer, OBSERVERS),
        ("weight_range", weight_range, ("min-max", "mse")),
        ("levels", levels, ("uniform", "k-means")),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if rounding != "nearest" and n_steps < 1:
        raise ValueError(f"n_steps is {n_steps!r}, expected at least 1 if rounding is learnt")
    model, images = copy.deepcopy(model).eval(), images.beside(model)
    names = [*convolutions(model), "fc"]
    if by_layer and set(weight_bits) != set(names):
        raise ValueError(f"weight_bits names {', '.join(weight_bits)}, expected each of {', '.join(names)}")
    inner = dict(weight_bits) if by_layer else dict.fromkeys(names, weight_bits)
    bits = inner | ({} if end_bits is None else dict.fromkeys(ENDS, end_bits))
    if levels == "k-means" and (rounding != "nearest" or max(inner.values()) > 8):
        raise ValueError(f"levels by k-means with rounding {rounding!r} and {weight_bits} bits, expected 'nearest' and at most 8 bits")
    network = QuantizedResNet(model, bits, activation_bits, end_bits or activation_bits, stream_bits).to(images.device).eval()
    observe(network, images, observer, seed)
    for name, layer in layers(network).items():
        if levels == "k-means" and (end_bits is None or name not in ENDS):
            _cluster_weights(layer, seed)
        else:
            round_weights(layer, weight_range, per_channel)
    if rounding != "nearest":
        reconstruct(network, model, images, unit=rounding, n_steps=n_steps, seed=seed, progress=progress)
    if bias_correction:
        correct_biases(network, model, images)
    return network


@torch.no_grad()
def observe(network: QuantizedResNet, images: Images, observer: str = "mse", seed: Seed = 0) -> None:
    """Set the ranges of all activations from their values without quantization."""
    quantizers, observers = activations(network), {}
    for i, (name, quantizer) in enumerate(quantizers.items()):
        observers[name] = Observer(name, (seed + i) % 2**32)
        quantizer.enabled, quantizer.see = False, observers[name].see
    for inputs in normalised_batches(images):
        network(inputs)
    for name, quantizer in quantizers.items():
        quantizer.set_range(*observers[name].range(observer, quantizer.bits))
        quantizer.see = None


@torch.no_grad()
def correct_biases(network: QuantizedResNet, model: OwnNetwork, images: Images) -> None:
    """Shift each layer's channels, front to back, so that their means are those of the float `model`."""
    exact = unrounded(network, model).to(images.device)
    targets = _channel_means(exact, images, list(layers(exact)))
    for name, layer in layers(network).items():  # each gets the outputs of the corrected ones before it
        layer.bias += targets[name] - _channel_means(network, images, [name])[name]


def _channel_means(network: QuantizedResNet, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each channel of the outputs of some layers."""
    sums: dict[str, Tensor] = {}

    def add(name: str, output: Tensor) -> None:
        per_image = output.mean((2, 3)) if output.ndim == 4 else output
        sums[name] = sums.get(name, 0) + per_image.sum(0)

    hooks = [layers(network)[name].register_forward_hook(lambda module, arguments, output, name=name: add(name, output)) for name in names]
    for inputs in normalised_batches(images):
        network(inputs)
    for hook in hooks:
        hook.remove()
    return {name: total / len(images) for name, total in sums.items()}


def round_weights(layer: QuantizedLayer, weight_range: str, per_channel: bool) -> None:
    """Round weights to the nearest integers, with the scale that covers all weights, or the one with the smallest squared error.

    There is one more negative integer than positive ones: a negative scale gives it to the side that needs it.
    """
    weight = layer.float_weight.flatten(1).double()
    rows = weight if per_channel else weight.flatten().unsqueeze(0)
    lowest, highest = layer.ends
    scale = torch.maximum(rows.amax(1) / highest, rows.amin(1) / lowest)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    if weight_range == "mse":
        best = torch.full((len(rows),), torch.inf, dtype=torch.double, device=rows.device)
        bound = rows.abs().amax(1) / highest
        chosen = scale.clone()
        for share in torch.linspace(0.2, 1.0, 81).tolist():
            for sign in (1, -1):
                candidate = torch.where(bound > torch.finfo(torch.float32).tiny, sign * share * bound, 1.0)
                steps = candidate.unsqueeze(1)
                error = (quantized(rows, steps, 0, lowest, highest) * steps - rows).square().sum(1)
                chosen = torch.where(error < best, candidate, chosen)
                best = torch.minimum(error, best)
        scale = chosen
    scale = scale.expand(len(weight))
    steps = per_filter(scale, layer.weight)
    layer.set_codes(quantized(layer.float_weight.double(), steps, 0, lowest, highest), scale)


def _cluster_weights(layer: QuantizedLayer, seed: Seed) -> None:
    """Levels by k-means over all weights of the layer, each filter in units of its own size; the levels are stored in 8 bits."""
    weight = layer.float_weight.flatten(1).double().cpu()
    size = weight.square().mean(1).sqrt()
    size = torch.where(size > torch.finfo(torch.float32).tiny, size, 1.0)
    points = (weight / size.unsqueeze(1)).flatten().unsqueeze(1)
    n_levels = 2**layer.bits
    shares = (size.square().unsqueeze(1) / size.square().mean()).expand_as(weight).flatten()
    n_distinct = len(points.unique())
    centres = (
        KMeans(min(n_levels, n_distinct), n_init=3, random_state=seed).fit(points.numpy(), sample_weight=shares.numpy()).cluster_centers_
    )
    centres = torch.from_numpy(np.sort(np.resize(centres.ravel(), n_levels)))
    unit = centres.abs().max().clamp(min=1e-12) / 127
    levels = (centres / unit).round()
    codes = (weight.unsqueeze(2) / (size.view(-1, 1, 1) * unit) - levels).abs().argmin(2)
    represented = levels[codes]
    scale = (weight * represented).sum(1) / represented.square().sum(1).clamp(min=1e-12)  # of least squared error for these codes
    scale = torch.where(scale.abs() > torch.finfo(torch.float32).tiny, scale, 1.0)
    device = layer.weight.device
    layer.set_codes((codes + layer.ends[0]).view(layer.weight.shape).to(device), scale.to(device), levels.to(torch.int32).to(device))
