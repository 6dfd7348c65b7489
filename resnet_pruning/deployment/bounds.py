"""How fast a network could be at best: its multiply-accumulates at the machine's peak, its tensors at the memory's bandwidth."""

import math

import torch

from .. import cost
from ..arguments import Count
from ..hardware import has_fast_bfloat16
from ..model import AnyNetwork
from .timing import interleaved

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SIZE = 2048  # of square matrices: 2048³ MACs take long enough to reach the peak, and their operands fit the last cache


def peaks(device: torch.device | str = "cpu", rounds: Count = 10) -> dict[str, float]:
    """Multiply-accumulates per second of a large matrix product, by precision, the best of `rounds`: those of `BYTES` that the machine has
    instructions for."""
    device = torch.device(device)
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=random).to(device) for _ in range(2))
    products = {"float32": lambda: left @ right}
    if has_fast_bfloat16(device.type):
        low = left.bfloat16(), right.bfloat16()
        products["bfloat16"] = lambda: low[0] @ low[1]
    integers = tuple((16 * matrix).round().clamp(-127, 127).to(torch.int8) for matrix in (left, right))
    products["int8"] = lambda: torch._int_mm(*integers)  # what torchao multiplies with, too; there is no public one

    def finished(product):
        def run() -> None:
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = interleaved({name: finished(product) for name, product in products.items()}, rounds, progress=False, least=0.2)
    return (SIZE**3 / seconds.min()).to_dict()


def bandwidth(device: torch.device | str = "cpu", rounds: Count = 10) -> float:
    """Bytes per second that are read and written when a tensor of 256 MiB, larger than any cache, is copied: the best of `rounds`."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def run() -> None:
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()

    return 2 * source.numel() / interleaved({"copied": run}, rounds, progress=False).copied.min()


def traffic(model: AnyNetwork, batch_size: Count, precision: str = "float32", image_size: Count = 32) -> int:
    """Bytes that go to and from memory for a batch, if each convolution and the linear layer read their inputs and weights once and write
    their outputs once, and all else happens on the way.

    Raises
    ------
    ValueError : precision is none of `BYTES`
    """
    if precision not in BYTES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(BYTES)}")
    values = 0
    for name, count in cost.macs_by_layer(model, image_size).items():
        layer = model.get_submodule(name)
        places = count // layer.weight.numel()  # each weight is used once for each place
        inputs = layer.weight.shape[1] * places * math.prod(getattr(layer, "stride", (1,)))
        values += batch_size * (inputs + len(layer.weight) * places) + layer.weight.numel()
    return values * BYTES[precision]


def least_milliseconds(model: AnyNetwork, batch_size: Count, precision: str, peaks: dict[str, float], bandwidth: float) -> dict[str, float]:
    """What a batch takes at least, in ms: `compute`, the model's MACs at the peak of `peaks`; and `memory`, its `traffic` at `bandwidth`,
    which only caches can beat."""
    macs = batch_size * cost.macs(model)
    return {"compute": 1000 * macs / peaks[precision], "memory": 1000 * traffic(model, batch_size, precision) / bandwidth}
