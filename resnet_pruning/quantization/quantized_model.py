"""A `ResNet` of integers: scale · (integer - offset) represents a real number.

The network computes with real numbers that lie on the integers' grid. `QuantizedLayer.integers` and `QuantizedResNet.integer_logits` do the
same with integers. Products and sums are exact; with 8 bits, they fit into 32 bits. Only the rescaling of a sum, by a factor for each
channel, is not done in integers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Integer, Real
from ..data import Images
from ..model import Block, ResNet, SharedConv2d, affine, batch_norms, blocks

BATCH = 128  # images at a time if no gradient is needed
ENDS = ("conv1", "fc")  # the first and the last layer


def check_bits(bits: Integer, name: str) -> None:
    """Raise a ValueError unless `bits` is an integer from 2 to 16."""
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise ValueError(f"{name} is {bits!r}, expected an integer from 2 to 16")


def affine_grid(low: Real, high: Real, bits: Integer) -> tuple[float, int]:
    """Scale and offset with which the integers 0 … 2^bits - 1 span at least [low, high] and 0.

    Raises
    ------
    ValueError : ends that are not finite, or in the wrong order
    """
    check_bits(bits, "bits")
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"the range is {low} to {high}, expected two finite numbers in order")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    if scale < torch.finfo(torch.float32).tiny:  # a constant zero has no step of its own
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def quantized(x: Tensor, scale: Tensor | Real, offset: Tensor | Integer, lowest: Integer, highest: Integer) -> Tensor:
    """The integers nearest to `x` on a grid, as a tensor of the type of `x`; values outside the grid are clipped to its ends."""
    return (x / scale).round().add(offset).clamp(lowest, highest)


def per_filter(values: Tensor, weight: Tensor) -> Tensor:
    """A value for each filter (N,), in a shape that multiplies a weight (N, …)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def rounded(x: Tensor) -> Tensor:
    """`x` rounded, with the gradient of `x`."""
    if not x.requires_grad:
        return x.round()
    return x.round().detach() + (x - x.detach())  # the difference is exactly 0, so that the sum is exactly an integer


def clipped(x: Tensor, lowest: Integer, highest: Integer) -> Tensor:
    """`x` between two ends, with the gradient of `x` inside and at the ends, where many integers are.

    `torch.clamp` has it there up to torch 2.11, and none in 2.14. Without it, with few bits, much of the gradient is lost in each layer.
    """
    if not x.requires_grad:
        return x.clamp(lowest, highest)
    return torch.where((x >= lowest) & (x <= highest), x, x.detach().clamp(lowest, highest))


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to a grid of `bits`-bit integers. Until it has a range, it passes the tensor on unchanged.

    Rounding passes the gradient straight through, also to the scale while that is learnt.
    """

    def __init__(self, bits: Integer):
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.enabled = False
        self.see: Callable[[Tensor], None] | None = None  # an observer, while the range is measured
        self.learnt_scale: Tensor | None = None  # in place of the scale, while it is learnt

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    def set_range(self, low: Real, high: Real) -> None:
        self.set_grid(*affine_grid(low, high, self.bits))

    def set_grid(self, scale: Real, offset: Integer) -> None:
        self.scale.fill_(scale)
        self.offset.fill_(offset)
        self.enabled = True

    def integers(self, x: Tensor) -> Tensor:
        """int32 tensor of x's shape, from 0 to 2^bits - 1."""
        return quantized(x, self.scale, self.offset, 0, self.highest).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.see is not None:
            self.see(x)
        if not self.enabled:
            return x
        scale = self.scale if self.learnt_scale is None else self.learnt_scale
        # Values that are clipped have no gradient, but the scale has one of them (Esser et al., *Learned Step Size Quantization*, 2020).
        return (clipped(rounded(x / scale) + self.offset, 0, self.highest) - self.offset) * scale


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with batch norm folded in: factor · (W ∗ x)[labels] + bias, with integers and scales for W.

    Batch norm cannot be folded into shared filters. `factor` and `labels` then turn their outputs into channels.

    Parameters
    ----------
    layer : a convolution, or a linear layer
    norm : the batch norm after it, if there is one
    bits : of the weights
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None, bits: Integer):
        super().__init__()
        self.bits, self.is_convolution = bits, isinstance(layer, nn.Conv2d)
        self.stride = layer.stride[0] if self.is_convolution else 1
        weight = layer.weight.detach().double().cpu()
        bias = torch.zeros(len(weight), dtype=torch.double) if layer.bias is None else layer.bias.detach().double().cpu()
        factor = labels = None
        if norm is not None:
            slope, shift = affine(norm)
            if isinstance(layer, SharedConv2d):
                factor, labels, bias = slope, layer.labels.cpu(), shift
            else:
                weight, bias = weight * slope.view(-1, 1, 1, 1), slope * bias + shift
        self.register_buffer("weight", weight.float())  # what the integers stand for
        self.register_buffer("codes", torch.zeros(weight.shape, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(len(weight)))
        self.register_buffer("bias", bias.float())
        self.register_buffer("factor", None if factor is None else factor.float())
        self.register_buffer("labels", labels)
        self.register_buffer("levels", None)  # what codes stand for, in steps; None if for themselves
        self.register_buffer("float_weight", weight.float(), persistent=False)
        self.rounding: nn.Module | None = None  # while it is learnt: see `rounding`

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def set_codes(self, codes: Tensor, scale: Tensor, levels: Tensor | None = None) -> None:
        """Set the integers (shaped like the weight), a scale for each filter, and what the integers stand for, if not for themselves."""
        self.codes, self.scale, self.levels = codes.to(torch.int32), scale.float(), levels
        self.weight = self.steps().float() * per_filter(self.scale, self.weight)

    def steps(self) -> Tensor:
        """The weights in steps of their scale, int32."""
        if self.levels is None:
            return self.codes
        return self.levels[(self.codes - self.ends[0]).long()]

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """W ∗ x, without factor and bias."""
        if self.is_convolution:
            return F.conv2d(x, weight, stride=self.stride, padding=1)
        return F.linear(x, weight)

    def finish(self, sums: Tensor, scale: Tensor | None = None) -> Tensor:
        """The output of the layer from W ∗ x, which is in steps of `scale` (a number for each filter) if that is given."""
        shape = (1, -1, 1, 1) if self.is_convolution else (1, -1)
        if scale is not None:
            sums = sums * scale.view(shape)
        if self.labels is not None:
            sums = sums.index_select(1, self.labels) * self.factor.view(shape)
        return sums + self.bias.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.compute(x, self.weight if self.rounding is None else self.rounding()))

    def integers(self, x: Tensor, activation: ActivationQuantizer) -> Tensor:
        """The layer's output from the integers of its input, by exact integer products and sums: float32, still to be rounded.

        Parameters
        ----------
        x : int32 tensor, as returned by `activation.integers`
        """
        # CUDA has no matrix product of integers, but float64 is exact up to 2^53: with 16 bits, a product is below 2^31, and the sum of a
        # filter's 576 products below 2^41. Patches and a matrix product, because a convolution may use inexact algorithms.
        centred, weights = x.double() - activation.offset, self.steps().double()
        if self.is_convolution:
            height, width = ((side - 1) // self.stride + 1 for side in x.shape[2:])
            patches = F.unfold(centred, 3, padding=1, stride=self.stride)
            sums = (weights.flatten(1) @ patches).unflatten(2, (height, width))
        else:
            sums = centred @ weights.T
        return self.finish(sums.float(), self.scale * activation.scale)


class QuantizedBlock(nn.Module):
    """A residual block. The shortcut is added before rounding. A dropped block passes integers on.

    If the residual stream has other bits than the convolutions' inputs, `act0` rounds it for the first convolution.
    """

    def __init__(self, block: Block, weight_bits: Mapping[str, Integer], activation_bits: Integer, stream_bits: Integer):
        super().__init__()
        self.stride, self.missing_channels, self.dropped = block.stride, block.missing_channels, block.dropped
        self.register_buffer("sources", block.sources, persistent=False)
        self.act0: ActivationQuantizer | None = None
        if not self.dropped:
            if stream_bits != activation_bits:
                self.act0 = ActivationQuantizer(activation_bits)
            self.conv1 = QuantizedLayer(block.conv1, block.bn1, weight_bits["conv1"])
            self.act1 = ActivationQuantizer(activation_bits)
            self.conv2 = QuantizedLayer(block.conv2, block.bn2, weight_bits["conv2"])
            self.act2 = ActivationQuantizer(stream_bits)

    shortcut = Block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) if self.dropped else self.act2(self.before_rounding(x))

    def before_rounding(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv2(self.inner(x)))

    def inner(self, x: Tensor) -> Tensor:
        """The input of the second convolution."""
        return self.act1(F.relu(self.conv1(x if self.act0 is None else self.act0(x))))


class QuantizedResNet(nn.Module):
    """A `ResNet` with quantizers where activations are stored: the input, after each ReLU, and before the linear layer.

    Parameters
    ----------
    model : in evaluation mode; it is not changed
    weight_bits : by layer
    activation_bits : of all activations except the network's input and the input of the linear layer
    end_bits : of these two
    stream_bits : of the residual stream, if it has others than the convolutions' inputs
    """

    def __init__(
        self,
        model: ResNet,
        weight_bits: Mapping[str, Integer],
        activation_bits: Integer,
        end_bits: Integer,
        stream_bits: Integer | None = None,
    ):
        super().__init__()
        self.config = model.config
        activation_bits, end_bits, stream_bits = int(activation_bits), int(end_bits), int(stream_bits or activation_bits)
        weight_bits = {name: int(bits) for name, bits in weight_bits.items()}  # a file with NumPy's numbers would be refused on reading
        self.bits = {"weights": weight_bits, "activations": activation_bits, "ends": end_bits, "stream": stream_bits}
        norms = batch_norms(model)
        self.input = ActivationQuantizer(end_bits)
        self.conv1 = QuantizedLayer(model.conv1, norms["conv1"], weight_bits["conv1"])
        self.act1 = ActivationQuantizer(stream_bits)
        self.blocks = nn.ModuleDict()
        for name, block in blocks(model).items():
            bits = {part: weight_bits[f"{name}.{part}"] for part in ("conv1", "conv2") if not block.dropped}
            self.blocks[name.replace(".", "_")] = QuantizedBlock(block, bits, activation_bits, stream_bits)
        self.pooled = ActivationQuantizer(end_bits)
        self.fc = QuantizedLayer(model.fc, None, weight_bits["fc"])

    def stored_bytes(self) -> int:
        """Bytes of packed weights, scales, offsets, biases, factors and levels, not deflated, without the file's own structure."""
        total = 8 * len(activations(self))  # a scale and an offset each
        for layer in layers(self).values():
            total += math.ceil(layer.codes.numel() * layer.bits / 8)
            total += sum(tensor.nbytes for tensor in (layer.scale, layer.bias, layer.factor) if tensor is not None)
            total += 0 if layer.levels is None else layer.levels.numel()
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, 3, 32, 32) to logits (B, n_classes)."""
        x = self.act1(F.relu(self.conv1(self.input(x))))
        for block in self.blocks.values():
            x = block(x)
        return self.fc(self.pooled(x.mean((2, 3))))

    @torch.no_grad()
    def integer_logits(self, x: Tensor) -> Tensor:
        """The logits, with each layer's products and sums in integers."""
        codes = self.input.integers(x)
        codes, quantizer = self.act1.integers(F.relu(self.conv1.integers(codes, self.input))), self.act1
        for block in self.blocks.values():
            if block.dropped:
                codes = block.shortcut(codes - quantizer.offset) + quantizer.offset
                continue
            stream = (codes - quantizer.offset) * quantizer.scale
            if block.act0 is not None:
                codes, quantizer = block.act0.integers(stream), block.act0
            inner = block.act1.integers(F.relu(block.conv1.integers(codes, quantizer)))
            total = F.relu(block.shortcut(stream) + block.conv2.integers(inner, block.act1))
            codes, quantizer = block.act2.integers(total), block.act2
        stream = (codes - quantizer.offset) * quantizer.scale
        return self.fc.integers(self.pooled.integers(stream.mean((2, 3))), self.pooled)


def unrounded(network: QuantizedResNet, model: ResNet) -> QuantizedResNet:
    """The same network, made of `model`, before anything is rounded."""
    bits = network.bits
    return QuantizedResNet(model, bits["weights"], bits["activations"], bits["ends"], bits["stream"]).eval()


def layers(model: QuantizedResNet) -> dict[str, QuantizedLayer]:
    """The layers with weights by their name in a `ResNet`, front to back."""
    return {_name(name): module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def activations(model: QuantizedResNet) -> dict[str, ActivationQuantizer]:
    """The activation quantizers by name, front to back."""
    return {_name(name): module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


def normalised_batches(images: Images) -> Iterator[Tensor]:
    """The images as they are, without augmentation: float32 tensors (B, 3, 32, 32)."""
    return (inputs for inputs, _ in images.batches(BATCH))


def _name(name: str) -> str:
    return name.removeprefix("blocks.").replace("_", ".", 1) if name.startswith("blocks.") else name
