"""A second device for machines that have none: tensors that say they are elsewhere, and are refused beside others as CUDA refuses them.

PyTorch's fake tensors do that too, but have no values and no gradients. These compute, on the CPU behind the scenes: so whole paths can be
run on them, training, calibration, compression, quantization.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# The one name that PyTorch knows everywhere without a library for it. Gradients pass through tensors that wrap others under it.
DEVICE = torch.device("meta")
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
# Their indices may be on the CPU; the tensors, and what is put into them, not.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# CUDA has none of integers.
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.addmm.default, aten.baddbmm.default}


class Elsewhere(Tensor):
    """A tensor on `DEVICE` whose values are in `hidden`, on the CPU."""

    @staticmethod
    def __new__(cls, hidden: Tensor) -> "Elsewhere":
        place = {"strides": hidden.stride(), "storage_offset": hidden.storage_offset(), "dtype": hidden.dtype, "device": DEVICE}
        return Tensor._make_wrapper_subclass(cls, hidden.shape, **place)

    def __init__(self, hidden: Tensor):
        self.hidden = hidden

    def __reduce_ex__(self, protocol):  # files hold values
        return self.cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class _Function(TorchFunctionMode):
    """What PyTorch does before it comes to an operator, and does in another way on the device whose name is borrowed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:  # its values would be dropped
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__):  # as would be those of lists among indices
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        if function in (Tensor.tolist, Tensor.__format__) and isinstance(args[0], Elsewhere):
            args = (args[0].cpu(), *args[1:])
        return function(*args, **kwargs)


def computed(function, args: tuple, kwargs: dict):
    """What an operator gives, on the device where its arguments are, or on that which it is asked for."""
    given, here = {}, []  # tensors that are elsewhere, by what they hide, and those of the CPU that must not be beside them

    def revealed(value):
        if isinstance(value, Elsewhere):
            given[id(value.hidden)] = value
            return value.hidden
        if value.ndim:  # CUDA takes single values from the CPU, nothing else
            here.append(value)
        return value

    real = [_mapped(revealed, value) for value in args]
    named = {name: _mapped(revealed, value) for name, value in kwargs.items()}
    if function in INDEXED and isinstance(args[0], Elsewhere):
        here = [value for value in here if not any(value is index for index in args[1])]
    if given and here and function not in ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function} got some on the CPU")
    if given and function in PRODUCTS and not args[0].is_floating_point():
        raise RuntimeError(f"{function} is not there for integers on the device")
    target = kwargs.get("device")
    target = (DEVICE if given else torch.device("cpu")) if target is None else torch.device(target)
    if torch.Tag.nondeterministic_seeded in function.tags and target == DEVICE:
        raise RuntimeError(f"{function} draws on the device, expected chance from the CPU, where a seed gives the same everywhere")
    result = function(*real, **named | ({"device": "cpu"} if "device" in kwargs else {}))
    if target != DEVICE:
        return result
    # What an operator writes to, it also returns.
    return _mapped(lambda value: given[id(value)] if id(value) in given else Elsewhere(value), result)


def _mapped(change: Callable[[Tensor], Tensor], value):
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, part) for part in value) if type(value) in (tuple, list) else value


def _only_here(initialize: Callable) -> Callable:
    """A function that gives a tensor, or a layer's weight, its first values, unless it is on the device."""
    return lambda target, *args, **kwargs: (
        target if getattr(target, "weight", target).device == DEVICE else initialize(target, *args, **kwargs)
    )


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, while it can be used."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        # What PyTorch does not know of such tensors: `Module.to` would give one the shape of another but not its values, views cannot be
        # taken in inference mode, and there is no autocast.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        stack.enter_context(mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad()))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()))
        # `model.with_tensors` makes modules on the device whose name is borrowed, where they take no memory, and need no first values.
        stack.enter_context(mock.patch.object(torch.nn.init, "kaiming_normal_", _only_here(torch.nn.init.kaiming_normal_)))
        for layer in (torch.nn.Linear, torch.nn.Conv2d):
            stack.enter_context(mock.patch.object(layer, "reset_parameters", _only_here(layer.reset_parameters)))
        stack.enter_context(_Mode())
        stack.enter_context(_Function())
        yield DEVICE
