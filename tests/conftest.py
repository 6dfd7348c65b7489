import os
from pathlib import Path

import matplotlib
import pytest
import torch

from resnet_pruning import data
from resnet_pruning.files import ROOT

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def cifar10():
    root = Path(os.environ.get("CIFAR10_ROOT") or ROOT / "data")
    if not (root / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip(f"CIFAR-10 is not in {root}: `make run DATASET=cifar10` downloads it")
    return data.load("cifar10")


@pytest.fixture
def small_images(digits):
    """96 digits: enough for a few steps of training."""
    return digits[0][:96]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
