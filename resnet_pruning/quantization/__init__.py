"""Weights and activations in few bits: post-training, quantization-aware training and codebooks; files; and PyTorch's own."""

from .bits import bit_errors, bits_by_sensitivity
from .codebooks import coded
from .coded_files import load_coded, save_coded
from .files import load_quantized, save_quantized
from .learned_steps import AwareResNet, aware, integers
from .post_training import quantize
from .quantized_model import QuantizedResNet

__all__ = [
    "AwareResNet",
    "QuantizedResNet",
    "aware",
    "bit_errors",
    "bits_by_sensitivity",
    "coded",
    "integers",
    "load_coded",
    "load_quantized",
    "quantize",
    "save_coded",
    "save_quantized",
]
