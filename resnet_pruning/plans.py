"""Plans: how many clusters each convolution's filters get. A plan is a plain dict, ``{"conv1": 8, "layer1.0.conv1": 8}``.

The functions here build the usual plans; one written by hand works as well. Layers that a plan does not name are not changed.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral

from torch import nn

from .arguments import Integer, Natural, Real
from .model import convolutions

Plan = Mapping[str, Integer]


def select(model: nn.Module, layers: str | Sequence[str] = "*", without: str | Sequence[str] = ()) -> list[str]:
    """The names of convolutions, front to back, that match `layers` but not `without`.

    Both are names or shell patterns: ``"*.conv1"`` for the first convolutions of the blocks, ``"layer3.*"`` for stage 3,
    ``without="conv1"`` for all but the stem.

    Raises
    ------
    ValueError : a model without convolutions; a name or pattern that fits none; an empty selection
    """
    names = list(convolutions(model))
    if not names:
        raise ValueError(f"{type(model).__name__} has no convolutions, expected at least one")
    chosen = {}
    for argument, patterns in (("layers", layers), ("without", without)):
        chosen[argument] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = {name for name in names if fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(f"{argument} has {pattern!r}, which fits no convolution: {', '.join(names)}")
            chosen[argument] |= found
    selected = [name for name in names if name in chosen["layers"] - chosen["without"]]
    if not selected:
        raise ValueError(f"no convolution is left of layers={layers!r} without={without!r}")
    return selected


def uniform(model: nn.Module, n_clusters: Integer, layers: str | Sequence[str] = "*", without: str | Sequence[str] = ()) -> dict[str, int]:
    """The same number of clusters in each of the layers (see `select`), capped at the layer's number of filters.

    Raises
    ------
    ValueError : `n_clusters` is not an integer or is below 1; layers that do not exist
    """
    check_n_clusters(n_clusters)
    return {name: _amount(model, name, n_clusters) for name in select(model, layers, without)}


def uniform_fraction(
    model: nn.Module, fraction: Real, layers: str | Sequence[str] = "*", without: str | Sequence[str] = ()
) -> dict[str, int]:
    """The same share of each layer's filters, rounded to whole clusters, at least one.

    Raises
    ------
    ValueError : `fraction` is not in (0, 1]; layers that do not exist
    """
    fraction = check_share(fraction)
    return {name: _amount(model, name, fraction) for name in select(model, layers, without)}


def first_last_heavy(
    model: nn.Module,
    inner: Integer | Real,
    ends: Integer | Real,
    n_first: Natural = 1,
    n_last: Natural = 1,
    layers: str | Sequence[str] = "*",
    without: str | Sequence[str] = (),
) -> dict[str, int]:
    """`ends` for the first `n_first` and the last `n_last` layers, `inner` for those in between.

    An integer amount is a number of clusters, capped at the layer's number of filters. A float is a share of the layer's
    filters: ``1`` is one cluster, ``1.0`` is all filters. ``n_last=0`` is heavy at the front only.

    Raises
    ------
    ValueError : an amount that is neither; `n_first + n_last` above the number of layers
    """
    names = select(model, layers, without)
    if n_first + n_last > len(names):
        raise ValueError(f"n_first + n_last is {n_first} + {n_last}, expected at most the number of layers, {len(names)}")
    for amount in (inner, ends):
        check_n_clusters(amount) if isinstance(amount, Integral) else check_share(amount)
    last = len(names) - n_last
    return {name: _amount(model, name, inner if n_first <= i < last else ends) for i, name in enumerate(names)}


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise a ValueError that names the problem: a layer that does not exist, or an invalid number of clusters."""
    names = select(model)
    for name, n_clusters in plan.items():
        if name not in names:
            raise ValueError(f"the plan names {name!r}, expected convolutions of the model: {', '.join(names)}")
        check_n_clusters(n_clusters, name)


def check_n_clusters(n_clusters: object, layer: str = "") -> None:
    """Raise a ValueError unless `n_clusters` is an integer of at least 1. The message names the `layer`, if given."""
    if not isinstance(n_clusters, Integral) or isinstance(n_clusters, bool) or n_clusters < 1:
        raise ValueError(f"n_clusters is {n_clusters!r}{f' for {layer}' if layer else ''}, expected an integer from 1")


def check_share(share: Real, name: str = "fraction") -> float:
    """Return a share as a float. Raise a ValueError that names it unless it is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise ValueError(f"{name} is {share!r}, expected a number above 0 and at most 1")
    return float(share)


def _amount(model: nn.Module, name: str, amount: Integer | Real) -> int:
    n_filters = convolutions(model)[name].out_channels
    return min(int(amount), n_filters) if isinstance(amount, Integral) else max(1, round(amount * n_filters))
