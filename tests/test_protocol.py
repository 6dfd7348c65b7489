import dataclasses

import pandas as pd
import pytest
import torch

from resnet_pruning import checkpoints, evaluation, model
from resnet_pruning.studies import method_runs, protocol
from resnet_pruning.studies.method_runs import MethodRuns

HISTORY = pd.DataFrame({"train_accuracy": [50.0], "seconds": [1.0]})


@pytest.fixture
def runs(small_checkpoint):
    torch.manual_seed(0)
    checkpoints.save_checkpoint(small_checkpoint, model.ResNet(8, (8, 12, 16)), {})
    return MethodRuns(small_checkpoint, "digits", "quick")


def test_trials_are_judged_on_images_that_they_were_not_trained_on(runs, tmp_path, monkeypatch):
    seen = []
    fine_tune = MethodRuns.fine_tune
    monkeypatch.setattr(
        MethodRuns, "fine_tune", lambda self, network, images, *rest: seen.append(images) or fine_tune(self, network, images, *rest)
    )
    short = dataclasses.replace(protocol.SGD, epochs=1, batch_size=64, ema=0.5)
    points = [
        protocol.ProtocolPoint(runs.base, trial, "smallest L2 norm", recipe=dataclasses.replace(short, learning_rate=rate))
        for trial, rate in (("slow", 1e-4), ("fast", 0.1))
    ]
    table = protocol.run_trials(runs, points, tmp_path / "trials.csv", progress=False)
    assert table.held_out_accuracy.is_monotonic_decreasing and set(table.trial) == {"slow", "fast"}
    whole = evaluation.accuracy(runs.material.network, runs.material.images("training"))
    assert (table.held_out_accuracy - table.change).tolist() == pytest.approx([whole, whole], abs=0.02)
    assert all(len(images) == len(runs.material.trained_on("training")) for images in seen) and len(seen) == 2
    assert protocol.run_trials(runs, points, tmp_path / "trials.csv", progress=False).equals(table) and len(seen) == 2


@pytest.mark.parametrize("name", ["", "other"])
def test_a_teacher_is_named_and_the_base_teaches_where_none_is(runs, name, tmp_path, monkeypatch):
    other, teachers = model.ResNet(8, (4, 8, 12)), []
    runs.path("other").parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(runs.path("other"), other, {})
    monkeypatch.setattr("resnet_pruning.studies.finetuning_runs.train", lambda *_, teacher, **__: teachers.append(teacher) or HISTORY)
    points = [protocol.ProtocolPoint(runs.base, "a", "smallest L2 norm", taught_by=name)]
    protocol.run_trials(runs, points, tmp_path / "trials.csv", progress=False)
    (teacher,) = teachers
    assert torch.equal(teacher.fc.weight.cpu(), (other if name else runs.material.network).fc.weight.cpu())


def test_each_trial_names_what_it_changes():
    for name, (recipe, teacher) in protocol.TRIALS.items():
        assert recipe.epochs == protocol.EPOCHS and name.startswith(recipe.optimizer)
        assert ("taught" in name) == bool(teacher)


def test_each_family_has_three_tries_or_more(runs):
    points = protocol.all_points(runs)
    tuned = {(method, 1.0 if method == "not pruned" else 0.5): rates for method, rates in protocol.TUNED.items()}
    for (method, level), rates in (tuned | {(method, 0.25): rates for method, rates in protocol.TUNED_AT_A_QUARTER.items()}).items():
        tried = {point.recipe.learning_rate for point in points if (point.method, point.level) == (method, level)}
        assert tried == set(rates) and len(tried) >= 3
    assert list(protocol.RATES) == list(method_runs.FAMILIES)
    longest = [point for point in points if point.recipe.epochs == protocol.LONGEST]
    assert {point.recipe.learning_rate for point in longest} == set(protocol.TUNED_FOR_LONGER) and len(longest) >= 3
    others = {point.trial for point in points if point.method == protocol.FIRST} - {point.trial for point in longest}
    assert others == set(protocol.TRIALS) and all(point.recipe.views == 10 for point in longest)
