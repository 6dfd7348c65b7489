import shutil
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
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


def test_digits_are_trained_once_and_again_on_request(folder, digits):
    path = base.checkpoint("resnet20", "digits", "quick")
    network, facts = checkpoints.load_checkpoint(path)
    history = base.histories("digits", "quick")
    assert path == folder / "checkpoints" / "resnet20.pt" and history.epoch.tolist() == [1, 2]
    assert facts["test_accuracy"] == round(evaluation.accuracy(network, digits[1][:96]), 2) and facts["n_train_images"] == 96
    assert base.recipe_of(facts) == SHORT and not (folder / "build" / "training" / "resnet20").exists()
    before = path.stat().st_mtime_ns
    assert base.base_checkpoint("digits", "quick") == path and path.stat().st_mtime_ns == before
    base.checkpoint("resnet20", "digits", "quick", anew=True)
    assert path.stat().st_mtime_ns > before and len(base.histories("digits", "quick")) == 2
    again, _ = checkpoints.load_checkpoint(path)
    torch.testing.assert_close(again.state_dict(), network.state_dict())


def test_the_choosing_checkpoint_has_not_seen_a_tenth(folder, digits):
    path = base.choosing_checkpoint("digits", "quick")
    network, facts = checkpoints.load_checkpoint(path)
    _, held_out = data.hold_out(digits[0][:96], 9)
    assert facts["n_train_images"] == 87 and facts["held_out_accuracy"] == round(evaluation.accuracy(network, held_out), 2)
    assert base.histories("digits", "quick").held_out_accuracy.iloc[-1] == pytest.approx(facts["held_out_accuracy"], abs=0.01)


def test_each_seed_has_its_row(folder):
    for seed in (1, 0, 1):  # a row that is replaced keeps its place, and the first is always seed 0
        assert base.train_network("resnet20", "digits", folder, seed).stem == f"resnet20{'_seed1' if seed else ''}"
    seeds = pd.read_csv(folder / "figures" / "base_seeds.csv")
    assert seeds.network.tolist() == ["resnet20", "resnet20_seed1"] and seeds.seed.tolist() == [0, 1]
    for row in seeds.itertuples():
        _, facts = checkpoints.load_checkpoint(folder / "checkpoints" / f"{row.network}.pt")
        assert row.accuracy == facts["test_accuracy"] and facts["seed"] == row.seed
    history = base.histories("digits", "quick")
    assert history.network.tolist() == ["resnet20_seed1"] * 2 + ["resnet20"] * 2 and history.epoch.tolist() == [1, 2, 1, 2]


def test_trainings_that_end_at_once_all_have_their_rows(folder):
    path = base.train_network("resnet20", "digits", folder)
    history = base.histories("digits", "quick").drop(columns="network")
    names = [f"resnet20_{letter}" for letter in "abcdef"]
    for name in names:
        shutil.copy(path, path.with_name(f"{name}.pt"))
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: base.record(path.with_name(f"{name}.pt"), history, folder / "figures"), names))
    assert sorted(pd.read_csv(folder / "figures" / "other_networks.csv").network) == names
    assert len(base.histories("digits", "quick")) == 2 * (1 + len(names))


def test_a_checkpoint_without_rows_is_recorded_when_it_is_asked_for(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(base, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            base.checkpoint("resnet20", "digits", "quick")
    assert (folder / "checkpoints" / "resnet20.pt").exists()
    base.checkpoint("resnet20", "digits", "quick")
    assert base.histories("digits", "quick").epoch.tolist() == [1, 2]


def test_a_training_that_cannot_be_recorded_is_not_lost(folder):
    (folder / "figures").mkdir()
    (folder / "figures" / "trainings.csv").write_text("epoch\n1\n")
    with pytest.raises(AttributeError, match="network"):
        base.train_network("resnet20", "digits", folder)
    assert (folder / "build" / "training" / "resnet20" / "state.pt").exists()
    (folder / "figures" / "trainings.csv").unlink()
    base.train_network("resnet20", "digits", folder)
    assert base.histories("digits", "quick").epoch.tolist() == [1, 2]


def test_a_teacher_is_trained_first_where_it_is_missing(folder, monkeypatch):
    teacher = base.Training(SHORT, stage_widths=(4, 8, 8), dtype=torch.float16, holds_out=True)
    student = base.Training(SHORT, stage_widths=(4, 8, 8), teacher="wide")
    monkeypatch.setattr(base, "training_of", lambda name, dataset: {"wide": teacher, "taught": student}[name])
    taught = base.train_network("taught", "digits", folder)
    network, facts = checkpoints.load_checkpoint(folder / "checkpoints" / "wide.pt")
    weights = network.conv1.weight
    assert weights.dtype == torch.float32 and torch.equal(weights, weights.half().float()) and facts["n_train_images"] == 87
    assert checkpoints.load_checkpoint(taught)[1]["teacher"] == "wide"
    rows = pd.read_csv(folder / "figures" / "other_networks.csv")
    assert rows.network.tolist() == ["wide", "taught"] and rows.accuracy[0] == facts["test_accuracy"]
    assert base.histories("digits", "quick").network.tolist() == ["wide"] * 2 + ["taught"] * 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match="network is 'resnet50', expected one of resnet20_wide, resnet20, resnet20_choosing"):
        base.training_of("resnet50", "cifar10")


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_the_rows_of_a_network_are_where_its_checkpoint_is(profile):
    assert base.base_checkpoint("cifar10", profile).parent.parent / "figures" == base.figures_of_networks("cifar10", profile)
    assert "resnet20" in set(pd.read_csv(base.figures_of_networks("cifar10", profile) / "base_seeds.csv").network)


def test_the_committed_training_is_read(monkeypatch):
    monkeypatch.setattr(base, "train", None)
    path, histories = base.checkpoint("resnet20", "cifar10", "full"), base.histories("cifar10", "full")
    history = histories[histories.network == "resnet20"]
    _, facts = checkpoints.load_checkpoint(path)
    recipe = base.recipe_of(facts)
    assert path == ROOT / "checkpoints" / "resnet20.pt" and recipe == base.TRAININGS["resnet20"].recipe and len(history) == recipe.epochs
