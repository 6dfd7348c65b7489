import os
from pathlib import Path

if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers, and the notebooks that they start, share the processor. Before torch is loaded, which reads this once.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(n_workers)))

import matplotlib
import pytest
import torch
from pretended import pretended

from resnet_pruning import data, files
from resnet_pruning.checkpoints import save_checkpoint
from resnet_pruning.files import ROOT
from resnet_pruning.model import ResNet
from resnet_pruning.training import Execution, Recipe, train

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


@pytest.fixture
def gpu():
    """CUDA's where there is one, or else one that is pretended."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with pretended() as device:
            yield device


@pytest.fixture(params=["cpu", "gpu"])
def device(request):
    """Each of the devices that a test is to run on."""
    return request.getfixturevalue("gpu") if request.param == "gpu" else torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained(digits):
    """A small network that knows the digits: 97 % of the test images and more, whatever the number of threads does to rounding."""
    torch.manual_seed(0)
    network = ResNet(8, (8, 16, 32))
    recipe = Recipe(epochs=12, batch_size=64, warmup_epochs=1, ema=0.9, small_share=0.0)
    train(network, digits[0], recipe, execution=Execution(amp=False, compile=False), progress=False)
    return network


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch):
    """The path of a small network with random weights; all results are written beside it, and not into the repository."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    path = tmp_path / "small.pt"
    save_checkpoint(path, ResNet(8, (4, 6, 8)), {})
    return str(path)
