import pytest
import torch

from resnet_pruning import checkpoints, data, evaluation
from resnet_pruning.files import ROOT
from resnet_pruning.studies import base
from resnet_pruning.training import Recipe

SHORT = Recipe(epochs=2, batch_size=32, warmup_epochs=1, small_share=0.5, ema=0.5)


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    """Where a short training on a few digits writes."""
    monkeypatch.setattr(base, "results_folder", lambda dataset, profile: tmp_path)
    monkeypatch.setattr(base, "load_images", lambda dataset, device: tuple(images[:96].to(device) for images in digits))
    monkeypatch.setattr(base, "QUICK", SHORT)
    return tmp_path


def test_digits_are_trained_once_and_again_on_request(folder, digits, monkeypatch):
    path, history = base.base_training("digits", "quick")
    network, facts = checkpoints.load_checkpoint(path)
    assert path == folder / "checkpoints" / "resnet20.pt" and history.epoch.tolist() == [1, 2]
    assert facts["test_accuracy"] == round(evaluation.accuracy(network, digits[1][:96]), 2) and facts["n_train_images"] == 96
    assert base.recipe_of(facts) == SHORT
    assert (folder / "figures" / "resnet20.csv").exists() and not (folder / "build" / "training" / "resnet20").exists()
    before = path.stat().st_mtime_ns
    assert base.base_checkpoint("digits", "quick") == path and path.stat().st_mtime_ns == before
    base.base_training("digits", "quick", retrain=True)
    assert path.stat().st_mtime_ns > before
    again, _ = checkpoints.load_checkpoint(path)
    torch.testing.assert_close(again.state_dict(), network.state_dict())


def test_the_choosing_checkpoint_has_not_seen_a_tenth(folder, digits):
    path = base.choosing_checkpoint("digits", "quick")
    network, facts = checkpoints.load_checkpoint(path)
    _, held_out = data.hold_out(digits[0][:96], 9)
    assert facts["n_train_images"] == 87 and facts["held_out_accuracy"] == round(evaluation.accuracy(network, held_out), 2)


def test_the_committed_training_is_read(monkeypatch):
    monkeypatch.setattr(base, "train", None)
    path, history = base.base_training("cifar10", "full")
    _, facts = checkpoints.load_checkpoint(path)
    recipe = base.recipe_of(facts)
    assert path == ROOT / "checkpoints" / "resnet20.pt" and recipe == Recipe() and len(history) == recipe.epochs
    assert history.test_accuracy.iloc[-1] == facts["test_accuracy"]
