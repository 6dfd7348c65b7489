"""The optimizers that `training.train` knows, by name."""

import warnings
from typing import Annotated, Any

import torch
from beartype.vale import Is
from torch import Tensor, nn

from .arguments import Real

# The steps before the recording of a CUDA graph are not part of it; torch suspects that this is a mistake.
warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
OPTIMIZERS = ("SGD", "Adam", "Adamax", "AdamW", "Muon")
OptimizerName = Annotated[str, Is[lambda name: name in OPTIMIZERS]]


def optimizer_for(
    model: nn.Module, name: OptimizerName, learning_rate: Real, weight_decay: Real = 0.0, *, momentum: Real = 0.9, nesterov: bool = True
) -> "torch.optim.Optimizer | Muon":
    """An optimizer for all parameters of `model` that require a gradient. On a GPU, its steps can be recorded, see `hardware.Recorded`.

    Parameters
    ----------
    name : one of `OPTIMIZERS`
    weight_decay : of weights; batch norm and biases have none
    momentum, nesterov : of SGD and Muon; the others have torch's defaults

    Raises
    ------
    ValueError : a model without a parameter that requires a gradient
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient, expected some to train")
    if name == "Muon":
        return Muon(trained, learning_rate, weight_decay, momentum=momentum, nesterov=nesterov)
    settings = {"momentum": momentum, "nesterov": nesterov and momentum > 0} if name == "SGD" else {"capturable": on_gpu(trained)}
    return getattr(torch.optim, name)(_groups(trained, weight_decay), lr=learning_rate, foreach=True, **settings)


def on_gpu(parameters: list[Tensor]) -> bool:
    return any(p.is_cuda for p in parameters)


def continued(state: dict[str, Any], capturable: bool) -> dict[str, Any]:
    """The state of an optimizer for one that continues with steps that are `capturable`, or not: where it was saved may differ in that."""
    if "param_groups" not in state:
        return {name: continued(part, capturable) for name, part in state.items()}
    groups = [group | ({"capturable": capturable} if "capturable" in group else {}) for group in state["param_groups"]]
    return {**state, "param_groups": groups}


class Muon:
    """Momentum with orthogonalised updates of each layer's filters (Jordan et al. 2024, *Muon*), and AdamW for all else.

    `torch.optim.Muon` takes matrices only, so it gets views of the convolutions' weights in which a row is a filter. Its steps are scaled
    to the size of AdamW's (Liu et al. 2025, *Muon is Scalable for LLM Training*), so that one learning rate suits both.
    """

    def __init__(self, parameters: list[Tensor], lr: Real, weight_decay: Real, momentum: Real = 0.95, nesterov: bool = True):
        self.filters = [p for p in parameters if p.ndim == 4]
        self.matrices = [nn.Parameter(_rows(p.detach(), p)) for p in self.filters]
        for p, matrix in zip(self.filters, self.matrices, strict=True):
            if matrix.data_ptr() != p.data_ptr():
                raise ValueError(
                    f"a weight of shape {tuple(p.shape)} is stored with the strides {p.stride()}, expected one of torch's memory formats"
                )
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if self.matrices:
            settings = {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
            self.parts["muon"] = torch.optim.Muon(self.matrices, lr=lr, weight_decay=weight_decay, **settings)
        others = _groups([p for p in parameters if p.ndim != 4], weight_decay)
        self.parts["adamw"] = torch.optim.AdamW(others, lr=lr, foreach=True, capturable=on_gpu(parameters))

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self) -> None:
        self.parts["adamw"].zero_grad()
        for p in self.filters:
            p.grad = None

    def step(self) -> None:
        for p, matrix in zip(self.filters, self.matrices, strict=True):
            matrix.grad = None if p.grad is None else _rows(p.grad, p)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, dict]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _groups(parameters: list[Tensor], weight_decay: Real) -> list[dict]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rows(filters: Tensor, like: Tensor) -> Tensor:
    """(N, C, k_h, k_w) as (N, C·k_h·k_w), with columns in the memory order of `like`. The order itself does not matter."""
    return (filters if like.is_contiguous() else filters.permute(0, 2, 3, 1)).flatten(1)
