"""Quantization as points of a sweep (see `sweeps.run_sweep`): a committed network, bits and settings → accuracy and bytes."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .. import cost, evaluation, model, quantization
from ..arguments import Integer, Seed
from ..data import Images
from ..files import fingerprint
from ..quantization import pytorch, quantized_model
from ..quantization.bits import bit_errors, bits_by_sensitivity
from .pruning_runs import PruningRuns
from .sweeps import expanded

ALLOCATIONS = ("equal", "by sensitivity")
READY = ("float32", *pytorch.HALVES, "torchao int8", "torchao dynamic int8")


@dataclasses.dataclass(frozen=True)
class QuantizationPoint:
    """A network quantized to few bits.

    Attributes
    ----------
    base : the network's checkpoint, by `files.fingerprint`
    images : on which accuracy is measured, "test" or "training" (a tenth of the training images)
    network : a checkpoint's name, or "" for the network before pruning
    layer : the only layer with `weight_bits`, the others have 16 (or `end_bits`); "" for all
    allocation : "equal", or "by sensitivity": as many bytes, divided among layers by `quantization.bits_by_sensitivity`
    n_images : number of images to calibrate and learn on
    checkpoint : name under which the result is saved, or ""
    weight_bits, activation_bits, and the rest : of `quantization.quantize`; end_bits 0 for None
    """

    base: str
    images: str
    weight_bits: int
    activation_bits: int
    network: str = ""
    layer: str = ""
    allocation: str = "equal"
    end_bits: int = 8
    observer: str = "mse"
    weight_range: str = "mse"
    per_channel: bool = True
    levels: str = "uniform"
    bias_correction: bool = False
    rounding: str = "nearest"
    n_steps: int = 0
    n_images: int = 1024
    seed: int = 0
    checkpoint: str = ""


SETTINGS = ("observer", "weight_range", "per_channel", "levels", "bias_correction", "rounding", "n_steps", "seed")


@dataclasses.dataclass(frozen=True)
class ReadyPoint:
    """A network in one of PyTorch's own ways: `kind` is one of `READY`; the rest as in `QuantizationPoint`."""

    base: str
    images: str
    kind: str
    network: str = ""


@dataclasses.dataclass(frozen=True)
class QuantizationRuns(PruningRuns):
    """Quantize networks without labels and without training the whole network, and evaluate them."""

    def quantizing_points(
        self, bits: Sequence[tuple[Integer, Integer]], images: str = "test", network: Sequence[str] = ("",), **choices: Sequence
    ) -> list[QuantizationPoint]:
        """Points for `measure_quantized`: pairs of bits of weights and activations, such as (4, 8), with each combination of choices for
        fields of `QuantizationPoint`."""
        start = [
            QuantizationPoint(fingerprint(self.path(name)), images, weight_bits, activation_bits, name)
            for weight_bits, activation_bits in bits
            for name in network
        ]
        return [point for each in start for point in expanded(each, **choices)]

    def measure_quantized(self, point: QuantizationPoint) -> dict[str, Any]:
        """Accuracy in %, its change in pp from the network in floats and from the one before pruning, bits by layer, bytes, seconds."""
        if point.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation is {point.allocation!r}, expected one of {', '.join(ALLOCATIONS)}")
        start = time.perf_counter()
        whole, bits, end_bits = self.network(point.network), point.weight_bits, point.end_bits or None
        if point.layer:
            bits = dict.fromkeys([*model.convolutions(whole), "fc"], 16) | {point.layer: point.weight_bits}
        elif point.allocation == "by sensitivity":
            bits = bits_by_sensitivity(_bit_errors(self, fingerprint(self.path(point.network)), point.network), point.weight_bits, end_bits)
        calibration = self.images_to_calibrate(point.n_images, point.seed)
        settings = {name: getattr(point, name) for name in SETTINGS}
        small = quantization.quantize(whole, calibration, bits, point.activation_bits, end_bits=end_bits, **settings, progress=False)
        seconds = time.perf_counter() - start
        row = self._judged(small, point.network, point.images)
        facts = dataclasses.asdict(point) | {"dataset": self.dataset}
        facts |= {"test_accuracy" if point.images == "test" else "held_out_accuracy": row["accuracy"]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.pt"
            if point.checkpoint:
                path = self.path(point.checkpoint)
            quantization.save_quantized(path, small, facts)
            file_bytes = path.stat().st_size
        row["layer_bits"] = " ".join(map(str, small.bits["weights"].values()))
        return {**row, "bytes": cost.size_in_bytes(small), "file_bytes": file_bytes, "seconds": round(seconds, 1)}

    def ready_points(self, kinds: Sequence[str] = READY, images: str = "test", networks: Sequence[str] = ("",)) -> list[ReadyPoint]:
        """Points for `measure_ready`: floats of 32 and 16 bits, and torchao's 8-bit integers, static and dynamic."""
        return [ReadyPoint(fingerprint(self.path(network)), images, kind, network) for network in networks for kind in kinds]

    def measure_ready(self, point: ReadyPoint) -> dict[str, Any]:
        """As `measure_quantized`, for PyTorch's own ways. Bytes are those of the tensors; for torchao, a byte per weight that it covers."""
        if point.kind not in READY:
            raise ValueError(f"kind is {point.kind!r}, expected one of {', '.join(READY)}")
        whole = self.network(point.network)
        start = time.perf_counter()
        if point.kind == "torchao int8":
            small: nn.Module = pytorch.to_int8(whole, self.images_to_calibrate(1024 if self.profile == "full" else 64, 0))
            n_bytes = cost.size_in_bytes(whole) - 3 * sum(layer.weight.numel() for layer in model.convolutions(whole).values())
        elif point.kind == "torchao dynamic int8":
            small, n_bytes = pytorch.to_dynamic_int8(whole), cost.size_in_bytes(whole) - 3 * whole.fc.weight.numel()
        elif point.kind == "float32":
            small, n_bytes = whole, cost.size_in_bytes(whole)
        else:
            small = pytorch.HalfPrecision(whole, point.kind)
            n_bytes = cost.size_in_bytes(small)
        seconds = time.perf_counter() - start
        return {**self._judged(small, point.network, point.images), "bytes": n_bytes, "seconds": round(seconds, 1)}

    def images_to_calibrate(self, n_images: Integer, seed: Seed) -> Images:
        """Random training images, different ones for each seed, none of them held out."""
        training = self.material.trained_on("training")
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(int(seed)))
        return training[order[:n_images]]

    def _judged(self, small: nn.Module, network: str, images: str) -> dict[str, float]:
        accuracy = evaluation.accuracy(small, self.material.images(images))
        whole, base = (_accuracy(self, fingerprint(self.path(name)), name, images) for name in (network, ""))
        return {"accuracy": round(accuracy, 2), "change": round(accuracy - whole, 2), "change_from_base": round(accuracy - base, 2)}


@torch.no_grad()
def ranges_in_bits(
    network: quantization.QuantizedResNet, inputs: Tensor, weights: Sequence[str], outputs: Sequence[str]
) -> dict[str, tuple[Tensor, tuple[float, float]]]:
    """The real numbers of some weights and activations, and the range of their integers; for weights, by the median scale of the filters.

    Parameters
    ----------
    network : from `quantization.quantize`
    inputs : float32 (N, 3, 32, 32), on the network's device
    weights : names of layers, see `quantized_model.layers`
    outputs : names of activations, see `quantized_model.activations`

    Raises
    ------
    ValueError : an unknown name
    """
    layers, quantizers, seen = quantized_model.layers(network), quantized_model.activations(network), {}
    for kind, names, known in (("weights", weights, layers), ("outputs", outputs, quantizers)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{kind} has {unknown[0]!r}, expected some of the network's: {', '.join(known)}")
    for name in outputs:
        quantizers[name].see = functools.partial(seen.setdefault, name)
    network(inputs)
    ranges = {}
    for name in weights:
        low, high = sorted(float(layers[name].scale.median()) * end for end in layers[name].ends)
        ranges[f"weights of {name}"] = layers[name].float_weight, (low, high)
    for name in outputs:
        quantizer = quantizers[name]
        quantizer.see = None
        ranges[f"activations {name}"] = (
            seen[name],
            tuple(float((end - quantizer.offset) * quantizer.scale) for end in (0, quantizer.highest)),
        )
    return ranges


@functools.cache
def _accuracy(runs: QuantizationRuns, base: str, network: str, images: str) -> float:
    return evaluation.accuracy(runs.network(network), runs.material.images(images))


@functools.cache
def _bit_errors(runs: QuantizationRuns, base: str, network: str) -> pd.DataFrame:
    n_images = 512 if runs.profile == "full" else 16
    return bit_errors(runs.network(network), runs.images_to_calibrate(n_images, 0))
