"""The CIFAR ResNet of He et al. 2015, section 4.2, at any depth and width, and the checks of networks given as arguments."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from beartype.vale import Is
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .arguments import ArgumentError, Integer


class SharedConv2d(nn.Conv2d):
    """A 3×3 convolution that computes each distinct filter once: output channel i is a copy of the output of filter ``labels[i]``.

    The weight has the shape (distinct filters, C_in, 3, 3); the next layer sees ``len(labels)`` channels. In training mode, filters are
    copied instead of outputs: backpropagation through copied outputs costs more than the saved multiplications.
    """

    def __init__(self, in_channels: Integer, labels: Sequence[Integer], stride: Integer = 1):
        super().__init__(in_channels, max(labels) + 1, 3, stride, padding=1, bias=False)
        self.register_buffer("labels", torch.tensor(labels, device="cpu"), persistent=False)  # checkpoints keep them with the widths

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self._conv_forward(x, self.weight[self.labels], self.bias)
        return super().forward(x).index_select(1, self.labels)


def _convolution(in_channels: Integer, out_channels: Integer, stride: Integer, labels: Sequence[Integer] | None) -> nn.Conv2d:
    if labels is None:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return SharedConv2d(in_channels, labels, stride)


class Block(nn.Module):
    """Two 3×3 convolutions and an identity shortcut without parameters. With stride 2, the shortcut takes every other
    pixel and pads channels with zeros (He et al.'s option A).

    Parameters
    ----------
    inner_channels : channels between the convolutions; 0 drops the block: its residual branch is removed, the shortcut stays
    labels : those of `SharedConv2d`, for each convolution
    sources : for each output channel, the input channel that the shortcut copies there, or -1 for zeros; by default, the middle output
        channels get the input channels in order
    """

    def __init__(
        self, in_channels: Integer, inner_channels: Integer, out_channels: Integer, stride: Integer, labels: tuple = (None, None),
        sources: Sequence[Integer] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.stride, self.in_channels, self.missing_channels = stride, in_channels, out_channels - in_channels
        self.dropped = inner_channels == 0
        if not self.dropped:
            self.conv1 = _convolution(in_channels, inner_channels, stride, labels[0])
            self.bn1 = nn.BatchNorm2d(inner_channels)
            self.conv2 = _convolution(inner_channels, out_channels, 1, labels[1])
            self.bn2 = nn.BatchNorm2d(out_channels)
        rows = None if sources is None else torch.tensor([in_channels if s < 0 else s for s in sources], device="cpu")
        self.register_buffer("sources", rows, persistent=False)

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.sources is not None:
            return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.sources)
        if self.missing_channels:
            before = self.missing_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.missing_channels - before))
        return x

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) if self.dropped else self.shortcut(x) + self.residual(x))


class ResNet(nn.Module):
    """Residual network for 32×32 images: 3×3 stem, three stages of n blocks, global average pooling, one linear layer.

    Depth 20 at the standard widths has 269,722 parameters and 40,551,040 MACs.

    Parameters
    ----------
    depth : 6n + 2 for n = 1, 2, …: 8, 14, 20, …, 56, 110
    stage_widths : channels of the residual stream in the three stages, non-decreasing; the stem has the first
    inner_widths : number of filters of a block's first convolution, by that convolution's name, such as
        ``{"layer1.0.conv1": 9}``, or 0 to drop the block; others have their stage's width. Pruned networks are of this class.
    sharing : for convolutions that compute fewer distinct filters than they have output channels, by name: the filter number
        of each output channel, counted from 0; see `SharedConv2d`
    shortcuts : `Block.sources` of ``layer2.0`` and ``layer3.0``, where the stream widens, by name
    n_classes : outputs of the linear layer

    Raises
    ------
    ValueError : a depth that is not 6n + 2; stage widths that decrease; no class; an inner width below 0; names of layers that do
        not exist; `sharing` or `shortcuts` that do not fit the widths
    """

    def __init__(
        self,
        depth: Integer = 20,
        stage_widths: Sequence[Integer] = (16, 32, 64),
        inner_widths: Mapping[str, Integer] | None = None,
        n_classes: Integer = 10,
        sharing: Mapping[str, Sequence[Integer]] | None = None,
        shortcuts: Mapping[str, Sequence[Integer]] | None = None,
    ):
        super().__init__()
        n_blocks, remainder = divmod(depth - 2, 6)
        if n_blocks < 1 or remainder:
            raise ValueError(f"depth is {depth}, expected 6n + 2 for n ≥ 1: 8, 14, 20, 26, …")
        if len(stage_widths) != 3 or not 1 <= stage_widths[0] <= stage_widths[1] <= stage_widths[2]:
            raise ValueError(f"stage_widths is {tuple(stage_widths)}, expected three channel counts, none below the one before")
        if n_classes < 1:
            raise ValueError(f"n_classes is {n_classes}, expected at least 1")
        usual = {f"layer{stage}.{block}.conv1": stage_widths[stage - 1] for stage in (1, 2, 3) for block in range(n_blocks)}
        inner_widths = dict(inner_widths or {})
        for name, width in inner_widths.items():
            if name not in usual:
                raise ValueError(f"inner_widths names {name!r}, expected one of {', '.join(usual)}")
            if width < 0:
                raise ValueError(f"inner_widths[{name!r}] is {width}, expected at least 1, or 0 to drop the block")
        self.config = {  # Python's numbers: checkpoints do not store NumPy's
            "depth": operator.index(depth),
            "stage_widths": tuple(map(operator.index, stage_widths)),
            "inner_widths": {name: operator.index(width) for name, width in inner_widths.items() if width != usual[name]},
            "n_classes": operator.index(n_classes),
            "sharing": {name: list(map(operator.index, labels)) for name, labels in (sharing or {}).items()},
            "shortcuts": {name: list(map(operator.index, sources)) for name, sources in (shortcuts or {}).items()},
        }
        self._check_channels(usual | inner_widths)
        sharing, shortcuts = self.config["sharing"], self.config["shortcuts"]

        channels = stage_widths[0]
        self.conv1 = _convolution(3, channels, 1, sharing.get("conv1"))
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, width in enumerate(stage_widths, start=1):
            blocks = []
            for block in range(n_blocks):
                name = f"layer{stage}.{block}"
                inner = inner_widths.get(f"{name}.conv1", width)
                labels = sharing.get(f"{name}.conv1"), sharing.get(f"{name}.conv2")
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(Block(channels, inner, width, stride, labels, shortcuts.get(name)))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015b

    def _check_channels(self, inner_widths: Mapping[str, Integer]) -> None:
        """Raise a ValueError for `sharing` or `shortcuts` that do not fit the widths."""
        first, second, third = self.config["stage_widths"]
        widths = {"conv1": first}
        for name, inner in inner_widths.items():
            if inner:
                widths |= {name: inner, name.replace("conv1", "conv2"): (first, second, third)[int(name[5]) - 1]}
        for name, labels in self.config["sharing"].items():
            if name not in widths:
                raise ValueError(f"sharing names {name!r}, expected one of {', '.join(widths)}")
            if len(labels) != widths[name] or sorted(set(labels)) != list(range(max(labels) + 1)):
                expected = f"the number of a filter for each of the {widths[name]} channels, counted from 0 without a gap"
                raise ValueError(f"sharing[{name!r}] is {labels}, expected {expected}")
        ends = {"layer2.0": (first, second), "layer3.0": (second, third)}
        for name, sources in self.config["shortcuts"].items():
            if name not in ends:
                raise ValueError(f"shortcuts names {name!r}, expected one of {', '.join(ends)}")
            if len(sources) != ends[name][1] or not all(-1 <= source < ends[name][0] for source in sources):
                expected = f"for each of the {ends[name][1]} channels one of the {ends[name][0]} before it, or -1"
                raise ValueError(f"shortcuts[{name!r}] is {sources}, expected {expected}")

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, 3, 32, 32) to logits (B, n_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a model by name, front to back."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def blocks(model: nn.Module) -> dict[str, Block]:
    """The residual blocks of a model by name, front to back."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Block)}


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norm that follows a convolution, by the convolution's name: ``bn1`` after ``conv1``, as in torchvision's ResNets.

    Convolutions without one are left out.
    """
    modules = dict(model.named_modules())
    pairs = {name: modules.get(re.sub(r"conv([^.]*)$", r"bn\1", name)) for name in convolutions(model)}
    return {name: norm for name, norm in pairs.items() if isinstance(norm, nn.BatchNorm2d)}


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor γ/σ and shift of each channel of a batch norm in evaluation mode, each (N,), float64 on the CPU."""
    mean, variance, weight, bias = (t.detach().double().cpu() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    factor = weight * (variance + norm.eps).rsqrt()
    return factor, bias - factor * mean


def with_tensors(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> ResNet:
    """The `ResNet` of a configuration with copies of these tensors, in evaluation mode. No random numbers are drawn.

    Raises
    ------
    ValueError : names or shapes that are not those of this network, detected before memory is allocated for it
    """
    with torch.device("meta"):
        model = ResNet(**config)
    expected = model.state_dict()
    if missing := [name for name in (*expected, *state) if (name in expected) != (name in state)]:
        raise ValueError(f"tensors {', '.join(missing[:3])}, … are in one of the network and the state dict only, expected them in both")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    model.load_state_dict({name: state[name].detach().to(tensor.dtype, copy=True) for name, tensor in expected.items()}, assign=True)
    return model.eval()


def check_described(model: ResNet) -> None:
    """Raise a ValueError for a network that was changed, so that its configuration no longer describes it."""
    with torch.device("meta"):
        expected = repr(ResNet(**model.config)).splitlines()
    if odd := [line.strip() for line in repr(model).splitlines() if line not in expected]:
        raise ValueError(f"the network has {odd[0]}, expected what a ResNet of its configuration has, {model.config}")


def _is_sound(model: nn.Module) -> bool:
    """Raise a ValueError for a network with values that are not finite, or on more than one device."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if type(tensor) is Tensor}  # torchao's integers are others
    if broken := [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ValueError(f"{', '.join(broken[:3])} of the network hold values that are NaN or infinite, expected finite ones")
    if len(devices := {str(tensor.device) for tensor in tensors.values()}) > 1:
        raise ValueError(f"the network is on {', '.join(sorted(devices))}, expected one device")
    return True


def _is_float32(model: nn.Module) -> bool:
    """Also raise a ValueError for a network that is not float32."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name} of the network is {tensor.dtype}, expected torch.float32: see torch.nn.Module.float")
    return _is_sound(model)


def _is_unconstrained(model: nn.Module) -> bool:
    """Also raise a ValueError for weights that are computed from others."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name} of the network is constrained, expected an ordinary network: see finetuning.released")
    return _is_float32(model)


def _is_own(model: nn.Module) -> bool:
    """Also raise an ArgumentError for a network of another class."""
    if not isinstance(model, ResNet):
        raise ArgumentError(
            f"the network is a {type(model).__name__}, expected a resnet_pruning.ResNet; other networks with convolutions can be "
            f"clustered and have their filters replaced: clustering.cluster_layers and pruning.replace_filters, distance 'raw'"
        )
    return _is_unconstrained(model)


# Networks in annotations: those that can be evaluated, that can be trained, that have no constraints, that are of this package.
AnyNetwork = Annotated[nn.Module, Is[_is_sound]]
TrainableNetwork = Annotated[nn.Module, Is[_is_float32]]
Network = Annotated[nn.Module, Is[_is_unconstrained]]
OwnNetwork = Annotated[nn.Module, Is[_is_own]]
FiniteTensor = Annotated[Tensor, Is[lambda tensor: bool(tensor.isfinite().all())]]
