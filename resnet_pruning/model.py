"""The CIFAR ResNet of He et al. 2015, section 4.2, at any depth and width; saving and loading it."""

import itertools
import pickle
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import written_whole


class SharedConv2d(nn.Conv2d):
    """A 3×3 convolution that computes each distinct filter once: output channel i is a copy of that of filter ``labels[i]``.

    The weight has the shape (distinct filters, C_in, 3, 3); what follows sees ``len(labels)`` channels. In training mode filters are copied
    instead of outputs: gradients that flow back through copied outputs cost more than the multiplications that are saved.
    """

    def __init__(self, in_channels: int, labels: Sequence[int], stride: int = 1):
        super().__init__(in_channels, max(labels) + 1, 3, stride, padding=1, bias=False)
        self.register_buffer("labels", torch.tensor(labels), persistent=False)  # checkpoints keep them with the widths

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self._conv_forward(x, self.weight[self.labels], self.bias)
        return super().forward(x).index_select(1, self.labels)


def _convolution(in_channels: int, out_channels: int, stride: int, labels: Sequence[int] | None) -> nn.Conv2d:
    if labels is None:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return SharedConv2d(in_channels, labels, stride)


class Block(nn.Module):
    """Two 3×3 convolutions and an identity shortcut: with stride 2 it takes every other pixel and pads channels with
    zeros, He et al.'s option A, so that it has no parameters. `labels` are those of `SharedConv2d`, for each convolution."""

    def __init__(self, in_channels: int, inner_channels: int, out_channels: int, stride: int, labels: tuple = (None, None)):
        super().__init__()
        self.conv1 = _convolution(in_channels, inner_channels, stride, labels[0])
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = _convolution(inner_channels, out_channels, 1, labels[1])
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.missing_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing_channels:
            before = self.missing_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.missing_channels - before))
        return x

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class ResNet(nn.Module):
    """Residual network for 32×32 images: 3×3 stem, three stages of n blocks, global average pooling, one linear layer.

    Depth 20 at the standard widths has 269,722 parameters and 40,551,040 MACs.

    Parameters
    ----------
    depth : 6n + 2 for n = 1, 2, …: 8, 14, 20, …, 56, 110
    stage_widths : channels of the residual stream in the three stages, none smaller than the one before;
        the stem has the first
    inner_widths : number of filters of a block's first convolution, by that convolution's name, such as
        ``{"layer1.0.conv1": 9}``; those not named have their stage's width. Pruned networks are of this class.
    sharing : for convolutions that compute fewer distinct filters than they have output channels, by name: for each output
        channel the number of its filter, counted from 0; see `SharedConv2d`
    n_classes : outputs of the linear layer

    Raises
    ------
    ValueError : a depth that is not 6n + 2, a width below 1 or of a layer that does not exist
    """

    def __init__(
        self,
        depth: int = 20,
        stage_widths: tuple[int, int, int] = (16, 32, 64),
        inner_widths: Mapping[str, int] | None = None,
        n_classes: int = 10,
        sharing: Mapping[str, Sequence[int]] | None = None,
    ):
        super().__init__()
        n_blocks, remainder = divmod(depth - 2, 6)
        if n_blocks < 1 or remainder:
            raise ValueError(f"depth is {depth}, expected 6n + 2 for n ≥ 1: 8, 14, 20, 26, …")
        if len(stage_widths) != 3 or not 1 <= stage_widths[0] <= stage_widths[1] <= stage_widths[2]:
            raise ValueError(f"stage_widths is {tuple(stage_widths)}, expected three channel counts, none below the one before")
        names = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(n_blocks)]
        inner_widths = dict(inner_widths or {})
        for name, width in inner_widths.items():
            if name not in names:
                raise ValueError(f"inner_widths names {name!r}, expected one of {', '.join(names)}")
            if width < 1:
                raise ValueError(f"inner_widths[{name!r}] is {width}, expected at least 1")
        self.config = {
            "depth": depth,
            "stage_widths": tuple(stage_widths),
            "inner_widths": inner_widths,
            "n_classes": n_classes,
            "sharing": {name: list(labels) for name, labels in (sharing or {}).items()},
        }
        sharing = self._checked_sharing(n_blocks)

        channels = stage_widths[0]
        self.conv1 = _convolution(3, channels, 1, sharing.get("conv1"))
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, width in enumerate(stage_widths, start=1):
            blocks = []
            for block in range(n_blocks):
                name = f"layer{stage}.{block}"
                inner = inner_widths.get(f"{name}.conv1", width)
                labels = sharing.get(f"{name}.conv1"), sharing.get(f"{name}.conv2")
                blocks.append(Block(channels, inner, width, 2 if stage > 1 and block == 0 else 1, labels))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015b

    def _checked_sharing(self, n_blocks: int) -> dict[str, list[int]]:
        stages = self.config["stage_widths"]
        widths = {"conv1": stages[0]}
        for stage, block in itertools.product((1, 2, 3), range(n_blocks)):
            name = f"layer{stage}.{block}"
            widths |= {
                f"{name}.conv1": self.config["inner_widths"].get(f"{name}.conv1", stages[stage - 1]),
                f"{name}.conv2": stages[stage - 1],
            }
        for name, labels in self.config["sharing"].items():
            if name not in widths:
                raise ValueError(f"sharing names {name!r}, expected one of {', '.join(widths)}")
            if len(labels) != widths[name] or sorted(set(labels)) != list(range(max(labels) + 1)):
                raise ValueError(
                    f"sharing[{name!r}] is {labels}, expected the number of a filter for each of the {widths[name]} channels, "
                    f"counted from 0 without a gap"
                )
        return self.config["sharing"]

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
    pairs = {name: modules.get(_batch_norm_name(name)) for name in convolutions(model)}
    return {name: norm for name, norm in pairs.items() if isinstance(norm, nn.BatchNorm2d)}


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by in evaluation, γ/σ, and what it adds, each (N,), float64 on the CPU."""
    mean, variance, weight, bias = (t.detach().double().cpu() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    factor = weight * (variance + norm.eps).rsqrt()
    return factor, bias - factor * mean


def _batch_norm_name(convolution: str) -> str:
    parent, _, name = convolution.rpartition(".")
    return f"{parent}.{name.replace('conv', 'bn')}".removeprefix(".")


def save_checkpoint(path: str | Path, model: ResNet, facts: Mapping[str, Any]) -> None:
    """Write a model and what is known about it to `path`, whole or not at all.

    Raises
    ------
    ValueError : facts with other than plain values (str, int, float, bool, None; lists, tuples and dicts of them), which
        `load_checkpoint` would refuse
    """
    for key, value in facts.items():
        check_plain(value, key)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with written_whole(path) as partial:
        torch.save({"config": model.config, "state_dict": state, "facts": dict(facts)}, partial)


def check_plain(value: Any, key: str) -> None:
    """Raise a ValueError unless `value` is str, int, float, bool, None, or a list, tuple or dict of them."""
    if type(value) is dict:
        value = [*value.keys(), *value.values()]
    if type(value) in (list, tuple):
        for item in value:
            check_plain(item, key)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"facts[{key!r}] holds a {type(value).__module__}.{type(value).__name__}, expected plain values")


def load_checkpoint(path: str | Path) -> tuple[ResNet, dict[str, Any]]:
    """Read a model, in evaluation mode on the CPU, and its facts.

    Reads what `save_checkpoint` wrote, and published checkpoints of the same network: a state dict, or a dict with one
    under ``state_dict``, with ``module.`` prefixes or with ``linear`` for ``fc``. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is truncated, holds anything but tensors and plain values, or fits no `ResNet`
    """
    path = Path(path)
    content = read_tensors(path)
    try:
        if "config" in content:
            model = ResNet(**content["config"])
            model.load_state_dict(content["state_dict"])
            facts = content["facts"]
        else:
            model = from_state_dict(content.get("state_dict", content))
            facts = {}
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")  # PyTorch lists every tensor, a line each
        raise ValueError(f"{path} is no checkpoint of a ResNet of this package: {reason}") from error
    return model.eval(), facts


def read_tensors(path: str | Path) -> Any:
    """``torch.load`` that never runs code, with a sentence instead of a stack of causes.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is truncated, or that holds anything but tensors and plain values
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} was refused: it is damaged, or holds more than tensors and plain values (code, maybe)") from error
    except (EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is truncated or no PyTorch file") from error


def from_state_dict(state: Mapping[str, Tensor]) -> ResNet:
    """The `ResNet` with these weights; depth and widths are read off the tensors.

    Raises
    ------
    ValueError : names or shapes that are not those of a `ResNet`
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        renamed["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = tensor
    try:
        widths = {name.removesuffix(".weight"): len(t) for name, t in renamed.items() if "conv" in name}
        stages = tuple(widths[f"layer{stage}.0.conv2"] for stage in (1, 2, 3))
        inner = {name: width for name, width in widths.items() if name.endswith(".conv1") and width != stages[int(name[5]) - 1]}
        n_blocks = sum(name.startswith("layer1.") and name.endswith(".conv1") for name in widths)
        model = ResNet(6 * n_blocks + 2, stages, inner, len(renamed["fc.weight"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no tensor {error} among {', '.join(map(str, list(renamed)[:5]))}, …") from error
    # Checkpoints older than PyTorch 0.4.1 lack batch norm's counters, which evaluation does not need.
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | renamed)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model
