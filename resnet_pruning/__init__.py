"""Cluster the filters of a trained ResNet by k-means, then prune, compress or quantize it; the names that a notebook needs first."""

import importlib

from beartype import BeartypeConf
from beartype.claw import beartype_this_package

from .arguments import ArgumentError

# Must come before the import of any module: from here on, annotations are checked at every call.
beartype_this_package(conf=BeartypeConf(violation_type=ArgumentError, is_pep484_tower=True, is_color=False, claw_is_pep526=False))

__version__ = "0.2.0"

# The module of each name. Names are imported on first use, so that `report`, which draws and writes, does not need torch.
_HOME = {
    "data": ["load_images", "hold_out"],
    "model": ["ResNet"],
    "checkpoints": ["load_checkpoint", "save_checkpoint"],
    "training": ["Recipe", "train"],
    "evaluation": ["accuracy"],
    "plans": ["uniform", "uniform_fraction", "first_last_heavy"],
    "clustering": ["cluster_layers"],
    "pruning": ["replace_filters"],
    "compaction": ["compact"],
    "compression": ["compress"],
    "quantization": ["quantize"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
