"""Statistics of a network's layers on unlabelled training images: of inputs and outputs, including those of batch norm."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import Count, Seed
from .data import Batches, Images
from .hardware import full_float32
from .model import FiniteTensor, TrainableNetwork, batch_norms, convolutions


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Input statistics of one convolution and the importance of its output channels. D = C_in·k_h·k_w is the size of a filter.

    Attributes
    ----------
    mean : (D,) mean input patch, over images and positions
    second_moment : (D, D) mean M of the products of two values of a patch; a filter w of D values has the mean squared output wᵀ M w
    importance : (N,) for each output channel, after its batch norm: the squared gradients of the logits, summed over logits and
        positions, averaged over images. It is the squared change of the logits per unit variance of small noise.
    """

    mean: FiniteTensor
    second_moment: FiniteTensor
    importance: FiniteTensor

    @property
    def covariance(self) -> Tensor:
        """(D, D) covariance C of a patch's values. wᵀ C w is the variance of the output of filter w, which batch norm normalises."""
        return self.second_moment - torch.outer(self.mean, self.mean)


@full_float32()
@torch.enable_grad()
def layer_statistics(model: TrainableNetwork, images: Images, *, seed: Seed = 0, batch_size: Count = 100) -> dict[str, LayerStatistics]:
    """Statistics of each convolution that has a batch norm, by name, in evaluation mode; float64 on the CPU.

    Labels are not used. Gradients are taken of random mixtures of the logits (normal, from `seed`): their mean square is the
    sum over the logits. A few hundred images suffice.

    Raises
    ------
    ValueError : no convolution with a batch norm; a convolution with groups, or padded otherwise than by a number of zeros
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    norms, convs = batch_norms(model), convolutions(model)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no convolution with a batch norm (conv1 and bn1, conv2 and bn2, …)")
    for module in model.modules():
        if getattr(module, "inplace", False):  # a ReLU that would overwrite the outputs that gradients are taken of
            module.inplace = False
    for name, conv in convs.items():
        if name in norms and (conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            raise ValueError(f"{name} is {conv}, expected one group, and padding by a number of zeros")
    totals: dict[str, list] = {name: [0, 0, 0] for name in norms}  # the number of patches, their sum and that of their products

    def see(name: str, conv: nn.Conv2d, inputs: Tensor) -> None:
        seen = patches(conv, inputs.detach())
        parts = [seen.shape[1], seen.sum(1).double().cpu(), (seen @ seen.T).double().cpu()]
        totals[name] = [total + part for total, part in zip(totals[name], parts, strict=True)]

    outputs: dict[str, Tensor] = {}
    for name, norm in norms.items():
        convs[name].register_forward_hook(lambda conv, inputs, output, name=name: see(name, conv, inputs[0]))
        norm.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
    generator = torch.Generator().manual_seed(int(seed))
    importance = {name: torch.zeros(norm.num_features, dtype=torch.double) for name, norm in norms.items()}
    for inputs, _ in images.beside(model).batches(batch_size):
        logits = model(inputs.requires_grad_())
        mixture = torch.randn(logits.shape, generator=generator).to(logits)
        gradients = torch.autograd.grad((logits * mixture).sum(), list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            importance[name] += gradient.double().square().sum((0, 2, 3)).cpu() / len(images)
    return {name: LayerStatistics(total / n, products / n, importance[name]) for name, (n, total, products) in totals.items()}


def patches(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Input patches of a convolution, zero-padded at the borders: inputs (B, C_in, H, W) to patches (C_in·k_h·k_w, B · positions)."""
    return F.unfold(inputs, conv.kernel_size, conv.dilation, conv.padding, conv.stride).transpose(0, 1).flatten(1)


@full_float32()
def reestimate_batch_norm(
    model: TrainableNetwork, images: Images, *, batch_size: Count = 500, augmented: bool = True, seed: Seed = 0
) -> nn.Module:
    """A copy of `model` whose batch-norm statistics are means over batches of `images`. Labels are not used.

    Replacing filters changes the mean and the variance of every later layer's input. The stored statistics do not reflect this.

    Parameters
    ----------
    images : training images; a thousand are enough
    batch_size : images per batch, or all of them if there are fewer; an incomplete last batch is left out
    augmented : shift and mirror each image once, as in training. The network was trained on the black borders of shifted
        images: without them, ResNet-20 loses 1 pp before any filter is replaced
    seed : of the augmentation

    Raises
    ------
    ValueError : fewer than two images
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images, expected at least 2, preferably a thousand")
    model, measured = copy.deepcopy(model), copy.deepcopy(model).eval()
    for norm in (module for module in measured.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    if not augmented:
        images = dataclasses.replace(images, flips=False)
    batches = Batches(images.beside(model), min(batch_size, len(images)), padding=4 if augmented else 0, seed=seed)
    with torch.inference_mode():
        for inputs, *_ in batches.epoch(0):
            measured(inputs)
    model.load_state_dict(measured.state_dict())
    return model
