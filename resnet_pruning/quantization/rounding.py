"""Learn whether each weight is rounded up or down, so as to preserve the outputs of each part of the network."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import Natural, Real, Seed
from ..compression.parts import apply
from ..data import Images
from ..model import OwnNetwork
from .quantized_model import ActivationQuantizer, QuantizedLayer, QuantizedResNet, normalised_batches, per_filter, unrounded

ROUNDINGS = ("nearest", "layer", "block")
BATCH_SIZE, LEARNING_RATE, STRENGTH = 64, 1e-2, 0.01  # STRENGTH: of the pull towards a decision
WARMUP = 0.2  # share of the steps before weights are pulled towards a decision


class SoftRounding(nn.Module):
    """A layer's weight between rounded down and rounded up (Nagel et al., *AdaRound*, equations 21 to 24).

    The sigmoid is stretched to [-0.1, 1.1], so that it reaches 0 and 1.
    """

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is not a submodule of this module, which is one of the layer
        self.scale = per_filter(layer.scale, layer.weight)
        steps = layer.float_weight.to(layer.scale.device) / self.scale
        self.below = steps.floor()
        share = ((steps - self.below).clamp(0.01, 0.99) + 0.1) / 1.2
        self.decision = nn.Parameter((share / (1 - share)).log())

    def up(self) -> Tensor:
        """Between 0 (down) and 1 (up)."""
        return (self.decision.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def forward(self) -> Tensor:
        return (self.below + self.up()).clamp(*self.layer[0].ends) * self.scale

    def undecided(self, power: Real) -> Tensor:
        """How undecided the weights are, summed: 0 for a weight that is rounded, up to 1 in between."""
        return (1 - (2 * self.up() - 1).abs().pow(power)).sum()

    def codes(self) -> Tensor:
        return (self.below + (self.up() >= 0.5)).clamp(*self.layer[0].ends)


@torch.enable_grad()
def reconstruct(
    network: QuantizedResNet,
    model: OwnNetwork,
    images: Images,
    *,
    unit: str = "block",
    n_steps: Natural = 1000,
    seed: Seed = 0,
    progress: bool = True,
) -> None:
    """Learn the rounding of all weights of `network` in place, unit by unit, front to back, with biases and the scales of activations.

    A unit gets the outputs of the quantized network before it, with half of the values, at random, replaced by those without quantization
    (Wei et al., *QDrop*, ICLR 2022). It is trained to match the outputs of the original unit.

    Parameters
    ----------
    network : from `quantization.quantize`, with ranges and rounded weights
    model : the original network
    images : training images; labels are not used
    unit : "layer", each layer with the rounding after it; or "block"
    n_steps : of Adam, with a cosine schedule to 0; the activations' scales have a twentieth of the rate, relative to their size. The pull
        towards a decision has a power that falls from 20 to 2
    """
    exact = unrounded(network, model).to(images.device)
    original = inputs = torch.cat(list(normalised_batches(images)))
    with torch.no_grad():
        inputs = network.input(inputs)
    generator = torch.Generator().manual_seed(int(seed))
    for part in tqdm(list(_parts(network, exact, unit)), desc="rounding", unit=unit, disable=not progress):
        targets = apply(part.exact, original)
        if part.layers:
            _learn(part, inputs, original, targets, n_steps, generator)
        if part.is_stream:
            original, inputs = targets, apply(part.quantized, inputs)


class Part(NamedTuple):
    """The layers and quantizers that are learnt together."""

    quantized: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    layers: list[QuantizedLayer]
    quantizers: list[ActivationQuantizer]
    is_stream: bool  # whether its output is the next part's input


def _parts(network: QuantizedResNet, exact: QuantizedResNet, unit: str) -> Iterator[Part]:
    def stem(net: QuantizedResNet) -> Callable[[Tensor], Tensor]:
        return lambda x: net.act1(F.relu(net.conv1(x)))

    def head(net: QuantizedResNet) -> Callable[[Tensor], Tensor]:
        return lambda x: net.fc(net.pooled(x.mean((2, 3))))

    yield Part(stem(network), stem(exact), [network.conv1], [network.act1], True)
    for name, block in network.blocks.items():
        original, first = exact.blocks[name], [] if block.act0 is None else [block.act0]
        if block.dropped:
            yield Part(block, original, [], [], True)
        elif unit == "layer":
            yield Part(block.inner, original.inner, [block.conv1], [*first, block.act1], False)
            yield Part(block, original, [block.conv2], [block.act2], True)
        else:
            yield Part(block, original, [block.conv1, block.conv2], [*first, block.act1, block.act2], True)
    yield Part(head(network), head(exact), [network.fc], [network.pooled], False)


def _learn(
    part: Part,
    inputs: Tensor,
    original: Tensor,
    targets: Tensor,
    n_steps: Natural,
    generator: torch.Generator,
) -> None:
    roundings = [SoftRounding(layer) for layer in part.layers]
    for layer, rounding in zip(part.layers, roundings, strict=True):
        layer.rounding = rounding
        layer.bias = layer.bias.detach().clone().requires_grad_()
    starts = [quantizer.scale.detach().clone() for quantizer in part.quantizers]
    logarithms = [torch.zeros((), device=inputs.device, requires_grad=True) for _ in starts]
    decisions = [rounding.decision for rounding in roundings]
    optimizer = torch.optim.Adam(
        [
            {"params": decisions, "lr": LEARNING_RATE},
            {"params": [layer.bias for layer in part.layers], "lr": LEARNING_RATE / 10},
            {"params": logarithms, "lr": LEARNING_RATE / 20},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    size, n_weights = targets.square().mean().clamp(min=1e-12), sum(decision.numel() for decision in decisions)
    for step in range(n_steps):
        for quantizer, start, logarithm in zip(part.quantizers, starts, logarithms, strict=True):
            quantizer.learnt_scale = start * logarithm.exp()
        batch = torch.randint(len(inputs), (BATCH_SIZE,), generator=generator).to(inputs.device)
        exact = torch.rand(inputs[batch].shape, generator=generator).to(inputs.device) < 0.5
        seen = torch.where(exact, original[batch], inputs[batch])
        loss = (part.quantized(seen) - targets[batch]).square().mean() / size
        progress = (step / n_steps - WARMUP) / (1 - WARMUP)
        if progress > 0:
            power = 2 + 18 * (1 - progress)
            loss = loss + STRENGTH * sum(rounding.undecided(power) for rounding in roundings) / n_weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for quantizer, start, logarithm in zip(part.quantizers, starts, logarithms, strict=True):
        quantizer.learnt_scale = None
        quantizer.scale.copy_(start * logarithm.detach().exp())
    for layer, rounding in zip(part.layers, roundings, strict=True):
        layer.rounding = None
        layer.bias = layer.bias.detach()
        layer.set_codes(rounding.codes().detach(), layer.scale)
