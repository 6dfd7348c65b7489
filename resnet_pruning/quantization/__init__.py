"""Weights and activations in few bits: post-training quantization, its files, and PyTorch's own."""

from .bits import bit_errors, bits_by_sensitivity
from .files import load_quantized, save_quantized
from .post_training import quantize
from .quantized_model import QuantizedResNet

__all__ = ["QuantizedResNet", "bit_errors", "bits_by_sensitivity", "load_quantized", "quantize", "save_quantized"]
