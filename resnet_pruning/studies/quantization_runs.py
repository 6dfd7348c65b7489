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
from torch import nn

from .. import cost, evaluation, model, quantization
from ..data import Images
from ..files import fingerprint, results_folder
from ..quantization import pytorch
from ..quantization.bits import bit_errors, bits_by_sensitivity
from .pruning_runs import PruningRuns, combined

ALLOCATIONS = ("equal", "by sensitivity")
READY = ("float32", *pytorch.HALVES, "torchao int8")


@dataclasses.dataclass(frozen=True)
class QuantizationRuns(PruningRuns):
    """Networks, quantized without labels and without training of the whole, and judged."""

    def quantizing_points(self, bits: Sequence[tuple[int, int]], images: str = "test", **choices: Sequence) -> list[dict[str, Any]]:
        """Points for `measure_quantized`: bits of weights and activations, with each combination of choices.

        Parameters
        ----------
        bits : pairs such as (4, 8)
        images : what accuracy is measured on, "test" or "training" (a tenth of the training images)
        choices : lists for network (a checkpoint's name, or "" for the experiment's own), layer (the only one with so few bits, the
            others have 16; "" for all), allocation ("equal", or "by sensitivity": as many bytes, divided among layers by
            `bit_allocation.bits_by_sensitivity`), n_images (to calibrate and learn on), checkpoint (a name under which the result is
            kept, or ""), and of `quantization.quantize` end_bits (0 for none), observer, weight_range, per_channel, levels,
            bias_correction, rounding, n_steps and seed
        """
        defaults = {
            "network": [""],
            "layer": [""],
            "allocation": ["equal"],
            "end_bits": [8],
            "observer": ["mse"],
            "weight_range": ["mse"],
            "per_channel": [True],
            "levels": ["uniform"],
            "bias_correction": [False],
            "rounding": ["nearest"],
            "n_steps": [0],
            "n_images": [1024],
            "seed": [0],
            "checkpoint": [""],
        }
        combinations = combined(defaults, choices)
        points = []
        for weight_bits, activation_bits in bits:
            for choice in combinations:
                point = {"base": fingerprint(self.path(choice["network"])), "images": images}
                points.append(point | {"weight_bits": weight_bits, "activation_bits": activation_bits} | choice)
        return points

    def measure_quantized(
        self,
        *,
        base: str,
        images: str,
        weight_bits: int,
        activation_bits: int,
        network: str,
        layer: str,
        allocation: str,
        checkpoint: str,
        n_images: int,
        **settings,
    ) -> dict[str, Any]:
        """Accuracy in %, its change from the network in floats and from the experiment's own in pp, bits by layer, bytes, seconds."""
        if allocation not in ALLOCATIONS:
            raise ValueError(f"allocation is {allocation!r}, expected one of {', '.join(ALLOCATIONS)}")
        start = time.perf_counter()
        whole = self.network(network)
        bits = weight_bits
        if layer:
            bits = dict.fromkeys([*model.convolutions(whole), "fc"], 16) | {layer: weight_bits}
        elif allocation == "by sensitivity":
            bits = bits_by_sensitivity(_bit_errors(self, network), weight_bits, settings["end_bits"] or None)
        small = quantization.quantize(
            whole,
            self.images_to_calibrate(n_images, settings["seed"]),
            bits,
            activation_bits,
            **settings | {"end_bits": settings["end_bits"] or None},
            progress=False,
        )
        seconds = time.perf_counter() - start
        row = self._judged(small, network, images)
        facts = {"base": base, "test_accuracy" if images == "test" else "held_out_accuracy": row["accuracy"], "dataset": self.dataset}
        facts |= {"network": network, "weight_bits": weight_bits, "activation_bits": activation_bits, "allocation": allocation}
        facts |= {"n_images": n_images, **settings}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.pt"
            if checkpoint:
                path = results_folder(self.dataset, self.profile) / "checkpoints" / f"{checkpoint}.pt"
            quantization.save_quantized(path, small, facts)
            file_bytes = path.stat().st_size
        row["layer_bits"] = " ".join(map(str, small.bits["weights"].values()))
        return {**row, "bytes": quantization.stored_bytes(small), "file_bytes": file_bytes, "seconds": round(seconds, 1)}

    def ready_points(self, kinds: Sequence[str] = READY, images: str = "test", networks: Sequence[str] = ("",)) -> list[dict[str, Any]]:
        """Points for `measure_ready`: floats of 32 and 16 bits, and torchao's 8-bit integers."""
        return [
            {"base": fingerprint(self.path(network)), "images": images, "kind": kind, "network": network}
            for network in networks
            for kind in kinds
        ]

    def measure_ready(self, *, base: str, images: str, kind: str, network: str) -> dict[str, Any]:
        """As `measure_quantized`, for PyTorch's own ways; bytes are those of the tensors, computed for 8 bits as for one's own."""
        if kind not in READY:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(READY)}")
        whole = self.network(network)
        start = time.perf_counter()
        if kind == "torchao int8":
            small: nn.Module = pytorch.to_int8(whole, self.images_to_calibrate(1024, 0))
            n_bytes = cost.size_in_bytes(whole) - 3 * sum(layer.weight.numel() for layer in model.convolutions(whole).values())
        elif kind == "float32":
            small, n_bytes = whole, cost.size_in_bytes(whole)
        else:
            small = pytorch.HalfPrecision(whole, kind)
            n_bytes = cost.size_in_bytes(small)
        seconds = time.perf_counter() - start
        return {**self._judged(small, network, images), "bytes": n_bytes, "seconds": round(seconds, 1)}

    def path(self, name: str) -> Path:
        """Of a checkpoint by name, or of the experiment's own where the name is empty."""
        return results_folder(self.dataset, self.profile) / "checkpoints" / f"{name}.pt" if name else Path(self.checkpoint)

    def network(self, name: str) -> model.ResNet:
        """The network of a checkpoint by name, or the experiment's own where the name is empty."""
        if not name:
            return self.material.network
        network, _ = model.load_checkpoint(self.path(name))
        return network.to(self.material.calibration.device, memory_format=torch.channels_last)

    def images_to_calibrate(self, n_images: int, seed: int) -> Images:
        """Other training images for other seeds, none of them held out."""
        training = self.material.trained_on("training")
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        return training[order[:n_images]]

    def _judged(self, small: nn.Module, network: str, images: str) -> dict[str, float]:
        accuracy = evaluation.accuracy(small, self.material.images(images))
        whole, base = (_accuracy(self, name, images) for name in (network, ""))
        return {"accuracy": round(accuracy, 2), "change": round(accuracy - whole, 2), "change_from_base": round(accuracy - base, 2)}


@functools.cache
def _accuracy(experiment: QuantizationRuns, network: str, images: str) -> float:
    return evaluation.accuracy(experiment.network(network), experiment.material.images(images))


@functools.cache
def _bit_errors(experiment: QuantizationRuns, network: str) -> pd.DataFrame:
    return bit_errors(experiment.network(network), experiment.images_to_calibrate(512, 0))
