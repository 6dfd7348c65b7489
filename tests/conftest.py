import os
from pathlib import Path

if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers, and the notebooks that they start, share the processor. Before torch is loaded, which reads this once.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(n_workers)))

import matplotlib
import pytest
import torch

from resnet_pruning import data
from resnet_pruning.files import ROOT

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def digits():
    return data.load_images("digits")


@pytest.fixture(scope="session")
def cifar10():
    root = Path(os.environ.get("CIFAR10_ROOT") or ROOT / "data")
    if not (root / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip(f"CIFAR-10 is not in {root}: `make run DATASET=cifar10` downloads it")
    return data.load_images("cifar10")


@pytest.fixture
def small_images(digits):
    """96 digits: enough for a few steps of training."""
    return digits[0][:96]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
