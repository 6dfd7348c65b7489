"""Lower bounds on the time of a network: its multiply-accumulates at the machine's peak, its tensors at the memory's bandwidth."""

import functools
import math

import torch
import torch.nn.functional as F

from .. import cost
from ..arguments import Count
from ..hardware import has_fast_bfloat16
from ..model import ResNet
from .timing import interleaved

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CONVOLUTION = (8, 256, 16, 16), (256, 256, 3, 3)  # images and weight; few enough to stay in the cache
SIZE = 2048  # of square matrices of integers


def peaks(rounds: Count = 10) -> dict[str, float]:
    """Multiply-accumulates per second on the CPU, the best of `rounds`, for each precision of `BYTES` that the CPU has instructions for.

    Floats are those of a 3×3 convolution with many channels: matrix products reach only half of it on some processors.
    """
    random = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(*shape, generator=random).to(memory_format=torch.channels_last) for shape in CONVOLUTION)
    operands = {"float32": (images, weight)}
    if has_fast_bfloat16("cpu"):
        operands["bfloat16"] = images.bfloat16(), weight.bfloat16()
    runs = {name: functools.partial(F.conv2d, *pair, padding=1) for name, pair in operands.items()}
    if _has_integer_products():
        integers = torch.randint(-127, 128, (2, SIZE, SIZE), generator=random, dtype=torch.int8)
        runs["int8"] = functools.partial(torch._int_mm, *integers)  # as torchao does; there is no public function
    with torch.inference_mode():
        seconds = interleaved(runs, rounds, progress=False, least=0.2).min()
    macs = images.numel() * weight.numel() // weight.shape[1]
    return {name: (SIZE**3 if name == "int8" else macs) / value for name, value in seconds.items()}


def _has_integer_products() -> bool:
    """Whether the CPU multiplies and adds bytes in one instruction. Without it, torch does so one by one, more slowly than floats."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def bandwidth(rounds: Count = 10) -> float:
    """Bytes per second that the CPU reads and writes when it copies a tensor of 256 MiB, larger than any cache: the best of `rounds`."""
    source = torch.zeros(2**28, dtype=torch.uint8)
    target = torch.ones_like(source)
    seconds = interleaved({"copied": lambda: target.copy_(source)}, rounds, progress=False)
    return 2 * source.numel() / seconds.copied.min()


def traffic(model: ResNet, batch_size: Count, precision: str = "float32") -> int:
    """Bytes transferred to and from memory for a batch, if each convolution and the linear layer read their inputs and weights once and
    write their outputs once, and all else adds no traffic.

    Raises
    ------
    ValueError : a precision that is not in `BYTES`
    """
    if precision not in BYTES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(BYTES)}")
    values = 0
    for name, count in cost.macs_by_layer(model).items():
        layer = model.get_submodule(name)
        places = count // layer.weight.numel()  # each weight is used once per position
        inputs = layer.weight.shape[1] * places * math.prod(getattr(layer, "stride", (1,)))
        values += batch_size * (inputs + len(layer.weight) * places) + layer.weight.numel()
    return values * BYTES[precision]


def least_milliseconds(model: ResNet, batch_size: Count, precision: str, peaks: dict[str, float], bandwidth: float) -> dict[str, float]:
    """Lower bounds on the time of a batch, in ms: `compute`, the model's MACs at the peak rate in `peaks`, NaN for a precision that is not
    there; and `memory`, its `traffic` at `bandwidth`, which only caches can beat."""
    macs = batch_size * cost.macs(model)
    return {"compute": 1000 * macs / peaks.get(precision, math.nan), "memory": 1000 * traffic(model, batch_size, precision) / bandwidth}
