"""Methods of other authors, for comparison."""

from .folding import compensate_units, fold_units
from .neuron_merging import merge_neurons
from .torch_pruning import HAS_TORCH_PRUNING, IMPORTANCES, prune_by_torch_pruning
from .units import UNIT_CRITERIA, kept_units, mask_units, prune_units
from .weights import WEIGHT_CRITERIA, gzip_bytes, masked, prune_weights, sparsity_of

__all__ = [
    "HAS_TORCH_PRUNING",
    "IMPORTANCES",
    "UNIT_CRITERIA",
    "WEIGHT_CRITERIA",
    "compensate_units",
    "fold_units",
    "gzip_bytes",
    "kept_units",
    "mask_units",
    "masked",
    "merge_neurons",
    "prune_by_torch_pruning",
    "prune_units",
    "prune_weights",
    "sparsity_of",
]
