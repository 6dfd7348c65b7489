"""Quantization-aware training: rounding is part of the forward pass, and step sizes are trained with the weights.

*Learned step size quantization* (Esser et al., ICLR 2020): a weight w becomes round(w / s), clipped to the range of the integers, times s.
Gradients pass through the rounding as if it were not there, to w and to s. Batch norm stays during training. It is then folded into the
scales of the integers, which changes nothing: the factor and the step of a filter become one number::

    aware = quantization.aware(network, images, weight_bits=2, activation_bits=2)
    train(aware, images, recipe, teacher=network)
    small = quantization.integers(aware)  # a QuantizedResNet, for save_quantized
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..arguments import Integer
from ..data import Images
from ..hardware import full_float32
from ..model import OwnNetwork, ResNet, blocks, convolutions, with_tensors
from .post_training import observe
from .quantized_model import (
    ENDS,
    ActivationQuantizer,
    QuantizedResNet,
    activations,
    check_bits,
    clipped,
    layers,
    normalised_batches,
    per_filter,
    rounded,
)


class LearnedSteps(nn.Module):
    """A weight (N, …) on a grid of signed integers, with a trained step for each filter.

    Steps start at twice the mean magnitude over √(highest integer). Their gradients are divided by √(weights of a filter · highest
    integer). Both are as in the paper. The trained parameter is a step's ratio to its start, near 1. This also suits optimizers that move
    all parameters alike (Adam, and Muon's part for vectors); for SGD, it makes no difference.
    """

    def __init__(self, weight: Tensor, bits: Integer):
        super().__init__()
        self.lowest, self.highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.gradient_scale = 1 / math.sqrt(weight[0].numel() * self.highest)
        magnitude = weight.detach().flatten(1).abs().mean(1)
        self.register_buffer("start", (2 * magnitude / math.sqrt(self.highest)).clamp(min=1e-8))
        self.ratio = nn.Parameter(torch.ones_like(self.start))

    def extra_repr(self) -> str:  # part of the network's repr, by which `training.train` recognises a training
        return f"{self.lowest} to {self.highest}"

    def codes(self, weight: Tensor) -> Tensor:
        """The integers (N, …) of a weight, in the type of the weight."""
        return (weight / per_filter(self.steps, weight)).round().clamp(self.lowest, self.highest)

    @property
    def steps(self) -> Tensor:
        """The step of each filter, (N,)."""
        return self.start * self.ratio

    def forward(self, weight: Tensor) -> Tensor:
        # Divided by the square of the start: the gradient of the ratio contains the start, and a step is the start times the ratio.
        steps = self.start * _slowed(self.ratio, self.gradient_scale / self.start.square())
        return _on_grid(weight, per_filter(steps, weight), self.lowest, self.highest)


class LearnedActivations(nn.Module):
    """Non-negative activations on a grid of `bits`-bit integers with a trained step."""

    def __init__(self, bits: Integer):
        super().__init__()
        self.bits, self.highest = bits, 2**bits - 1
        self.register_buffer("start", torch.ones(()))
        self.ratio = nn.Parameter(torch.ones(()))  # see `LearnedSteps`

    def extra_repr(self) -> str:
        return f"{self.bits} bits"

    @property
    def step(self) -> Tensor:
        return self.start * self.ratio

    def forward(self, x: Tensor) -> Tensor:
        gradient_scale = 1 / math.sqrt(x[0].numel() * self.highest)
        step = self.start * _slowed(self.ratio, gradient_scale / self.start.square())
        return _on_grid(x, step, 0, self.highest)


class AwareResNet(nn.Module):
    """A `ResNet` that is trained with rounded weights and activations; made by `aware`."""

    def __init__(self, model: ResNet, weight_bits: Integer, activation_bits: Integer, end_bits: Integer, stream_bits: Integer):
        super().__init__()
        self.model = copy.deepcopy(model)
        weight_bits, activation_bits, end_bits, stream_bits = map(int, (weight_bits, activation_bits, end_bits, stream_bits))
        self.bits = {"weights": weight_bits, "activations": activation_bits, "ends": end_bits, "stream": stream_bits}
        for name, layer in {**convolutions(self.model), "fc": self.model.fc}.items():
            steps = LearnedSteps(layer.weight, end_bits if name in ENDS else weight_bits)
            parametrize.register_parametrization(layer, "weight", steps, unsafe=True)
        self.input = ActivationQuantizer(end_bits)
        self.act1 = LearnedActivations(stream_bits)
        self.acts = nn.ModuleDict()
        for name, block in blocks(self.model).items():
            if not block.dropped:
                acts = {"act1": LearnedActivations(activation_bits), "act2": LearnedActivations(stream_bits)}
                if stream_bits != activation_bits:
                    acts["act0"] = LearnedActivations(activation_bits)
                self.acts[name.replace(".", "_")] = nn.ModuleDict(acts)
        self.pooled = LearnedActivations(end_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, 3, 32, 32) to logits (B, n_classes)."""
        model = self.model
        x = self.act1(F.relu(model.bn1(model.conv1(self.input(x)))))
        for name, block in blocks(model).items():
            shortcut = block.shortcut(x)
            if block.dropped:
                x = shortcut
                continue
            acts = self.acts[name.replace(".", "_")]
            first = acts["act0"](x) if "act0" in acts else x
            inner = acts["act1"](F.relu(block.bn1(block.conv1(first))))
            x = acts["act2"](F.relu(shortcut + block.bn2(block.conv2(inner))))
        return model.fc(self.pooled(x.mean((2, 3))))


@full_float32()
@torch.no_grad()
def aware(
    model: OwnNetwork,
    images: Images,
    weight_bits: Integer,
    activation_bits: Integer,
    *,
    end_bits: Integer = 8,
    stream_bits: Integer | None = None,
) -> AwareResNet:
    """A copy of `model` that rounds its weights and activations, ready to be trained by `training.train`.

    Parameters
    ----------
    model : trained; may be compact, with shared filters
    images : a few hundred training images, on which the activations' steps start with the smallest squared error. The paper's start, twice
        their mean over √(highest integer), is much worse: after new batch-norm statistics, 85 instead of 92 % at 4 bits
    weight_bits, activation_bits : 2 to 16
    end_bits : of the first and the last layer's weights, of the input, whose range is that of `images`, and of the last layer's input
    stream_bits : of the residual stream, as `activation_bits` if None. With more, it is rounded again for the first convolution of each
        block, as by those who leave the stream in floats and round the inputs of convolutions

    Raises
    ------
    ValueError : bits that are not an integer from 2 to 16
    """
    stream_bits = activation_bits if stream_bits is None else stream_bits
    checked = {"weight_bits": weight_bits, "activation_bits": activation_bits, "end_bits": end_bits, "stream_bits": stream_bits}
    for name, bits in checked.items():
        check_bits(bits, name)
    images = images.beside(model)
    network = AwareResNet(model, weight_bits, activation_bits, end_bits, stream_bits).to(images.device).eval()
    inputs = torch.cat(list(normalised_batches(images)))
    network.input.set_range(float(inputs.min()), float(inputs.max()))
    names = [*convolutions(model), "fc"]
    exact = QuantizedResNet(model, dict.fromkeys(names, 16), activation_bits, end_bits, stream_bits).to(images.device).eval()
    observe(exact, images)
    for name, layer in _learned(network).items():
        layer.start.copy_(activations(exact)[name].scale)
    return network


@torch.no_grad()
def integers(network: AwareResNet) -> QuantizedResNet:
    """The quantized network that computes the same as a trained one in evaluation mode, with batch norm folded into its scales."""
    bits = network.bits
    names = [*convolutions(network.model), "fc"]
    by_layer = {name: bits["ends"] if name in ENDS else bits["weights"] for name in names}
    # With the names of an ordinary network's tensors, and the weights on the grid.
    state = {name: tensor for name, tensor in network.model.state_dict().items() if ".parametrizations." not in name}
    state |= {f"{name}.weight": network.model.get_submodule(name).weight for name in names}
    plain = with_tensors(network.model.config, {name: tensor.cpu() for name, tensor in state.items()})
    small = QuantizedResNet(plain, by_layer, bits["activations"], bits["ends"], bits["stream"]).to(network.act1.start.device).eval()
    for name, layer in layers(small).items():
        trained = network.model.get_submodule(name)
        weight, steps = trained.parametrizations.weight.original, trained.parametrizations.weight[0]
        codes = steps.codes(weight)
        # Batch norm's factor of a filter becomes part of its scale; where filters are shared, the layer keeps the factors.
        products = (layer.float_weight.double() * codes).flatten(1).sum(1)
        scale = products / codes.double().square().flatten(1).sum(1).clamp(min=1)
        layer.set_codes(codes, torch.where(scale == 0, 1.0, scale))
    small.input.set_grid(float(network.input.scale), int(network.input.offset))
    for name, layer in _learned(network).items():
        activations(small)[name].set_grid(float(layer.step), 0)
    return small


def _learned(network: AwareResNet) -> dict[str, LearnedActivations]:
    """The trained activations by their names in a `QuantizedResNet`."""
    found = {"act1": network.act1, "pooled": network.pooled}
    for block, acts in network.acts.items():
        found |= {f"{block.replace('_', '.')}.{name}": layer for name, layer in acts.items()}
    return found


def _on_grid(x: Tensor, step: Tensor, lowest: Integer, highest: Integer) -> Tensor:
    return clipped(rounded(x / step), lowest, highest) * step


def _slowed(value: Tensor, factor: Tensor | float) -> Tensor:
    """The value, with a gradient that is `factor` times its own."""
    return value.detach() + (value - value.detach()) * factor  # the difference is exactly 0, so that no factor is too large
