"""PyTorch's own post-training quantization, for comparison: float16, bfloat16, and torchao's 8 bits, static and dynamic."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..data import Images
from ..files import required
from ..model import Network
from .quantized_model import normalised_batches

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class HalfPrecision(nn.Module):
    """A network whose weights and activations have 16 bits; logits are float32.

    Raises
    ------
    ValueError : a type that is not in `HALVES`
    """

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        if kind not in HALVES:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(HALVES)}")
        self.kind = HALVES[kind]
        self.network = copy.deepcopy(model).to(self.kind).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(self.kind)).float()


def to_int8(model: Network, images: Images) -> nn.Module:
    """Static 8-bit quantization of weights, by channel, and activations, by torchao's defaults for x86: a network on the CPU.

    The result computes with real numbers on the integers' grid, for any number of images; `compiled` turns it into integer kernels.

    Parameters
    ----------
    model : trained; it is not changed
    images : training images; labels are not used. The activations' ranges are measured on all of them
    """
    with _quiet():
        required("torchao", "peers")
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    example = torch.zeros(2, 3, 32, 32)
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad():
        exported = torch.export.export(copy.deepcopy(model).cpu().eval(), (example,), dynamic_shapes=({0: batch},)).module()
        quantizer = x86_inductor_quantizer.X86InductorQuantizer()
        quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for inputs in normalised_batches(images):
            prepared(inputs.cpu())
        return allow_exported_model_train_eval(convert_pt2e(prepared))


def to_dynamic_int8(model: Network) -> nn.Module:
    """Dynamic 8-bit quantization by torchao, which covers linear layers: weights by channel, and ranges of activations found anew for each
    input. Of this network that is the last layer; convolutions stay as they are.

    Parameters
    ----------
    model : trained; it is not changed
    """
    with _quiet():
        required("torchao", "peers")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        small = copy.deepcopy(model).eval()
        quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return small


def compiled(network: nn.Module, inputs: Tensor) -> Callable[[], None]:
    """A function that runs a copy of a network on `inputs`, on their device, compiled with its weights as constants. A network from
    `to_int8` runs in integer kernels if the processor has them."""
    network = copy.deepcopy(network).to(inputs.device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch._inductor.config.patch(freezing=True), torch.no_grad(), _quiet():
        network = torch.compile(network, dynamic=False)
        network(inputs)

    def run() -> None:
        with torch.no_grad():
            network(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of torchao and the compiler about their internals."""
    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torch.utils.cpp_extension", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
