import copy
import dataclasses

import pytest
import torch

from resnet_pruning import checkpoints, compression, cost, evaluation, files, plans
from resnet_pruning.model import ResNet
from resnet_pruning.studies import finetuning_runs, sweeps
from resnet_pruning.studies.finetuning_runs import FineTuningRuns
from resnet_pruning.training import train

PLANS = {("mine", "filters", 0.5): {"conv1": 2, "layer1.0.conv1": 2, "layer2.0.conv2": 4, "layer3.0.conv1": 3}}


@pytest.fixture
def runs(small_checkpoint):
    return FineTuningRuns(small_checkpoint, "digits", "quick")


def points_of(runs, **choices):
    return runs.fine_tuning_points(PLANS, **{"epochs": [2], "n_images": [192], "learning_rate": [0.02]} | choices)


def test_merged_networks_are_trained(runs, tmp_path):
    points = points_of(runs, learning_rate=[0.02, 0.01])
    table = sweeps.run_sweep(runs.measure_fine_tuned, points, tmp_path / "runs.csv", progress=False)
    network, (plan,) = runs.material.network, PLANS.values()
    for row in table.itertuples():
        assert (row.parameters, row.macs) == compression.cost_of_plan(network, plan, merged=True) and row.seconds > 0


def test_nothing_of_an_old_network_is_kept_for_the_one_that_replaces_it(runs):
    (plan,) = PLANS.values()
    before = runs.compressed(plan)
    assert runs.compressed(plan) is before
    torch.manual_seed(7)
    checkpoints.save_checkpoint(runs.path(""), ResNet(8, (4, 8, 8)), {"dataset": "digits"})
    assert not torch.equal(runs.compressed(plan).fc.weight, before.fc.weight)


def test_a_choice_is_judged_on_images_that_were_not_trained_on(runs):
    material = runs.material
    trained, judged = material.trained_on("training"), material.images("training")
    whole = {image.numpy().tobytes() for image in trained.pixels.cpu()}
    seen = sum(image.numpy().tobytes() in whole for image in judged.pixels.cpu())
    duplicates = len(trained) - len(whole)
    assert len(trained) + len(judged) == len(material.trained_on("test")) and seen <= duplicates
    assert len(judged) == len(trained) // 9, "a tenth"


def test_a_kept_result_is_the_network_that_the_row_describes(runs):
    (point,) = points_of(runs, checkpoint=["mine"])
    row = runs.measure_fine_tuned(point)
    network, facts = checkpoints.load_checkpoint(files.results_folder("digits", "quick") / "checkpoints" / "mine.pt")
    assert facts["test_accuracy"] == row["accuracy"] == round(evaluation.accuracy(network, runs.material.images("test")), 2)
    assert facts["plan"]["conv1"] == 2 and cost.macs(network) == facts["macs"] == row["macs"]


def test_an_interrupted_run_goes_on(runs, monkeypatch):
    point, same = points_of(runs, checkpoint=["", "again"])  # saved under another name, it is another run of the same training

    def interrupted(*arguments, **settings):
        def watch(averaged):
            calls.append(averaged)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return {}

        calls = []
        return train(*arguments, **settings, watch=watch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning_runs, "train", interrupted)
        runs.measure_fine_tuned(point)
    resumed, whole = map(runs.measure_fine_tuned, (point, same))
    del resumed["seconds"], whole["seconds"]
    assert resumed == whole


def test_another_recipe_or_teacher_begins_anew(runs, monkeypatch):
    """The states of earlier trainings stay in the folder, and would be refused."""
    (point,), images = points_of(runs), runs.material.trained_on("test")[:128]
    plan, recipe = runs.plan(point), runs.recipe(1, 0.02)

    def trained(recipe):
        network = copy.deepcopy(runs.compressed(plan))
        return runs.fine_tune(network, images, recipe, point).loss.tolist()

    first, again, other = trained(recipe), trained(recipe), trained(dataclasses.replace(recipe, weight_decay=0.0, epochs=2))
    assert first == again and len(other) == 2
    torch.manual_seed(1)
    teacher = ResNet(8, (4, 6, 8))
    monkeypatch.setattr(FineTuningRuns, "network", lambda self, name: teacher)
    assert trained(recipe) != first


def test_plans_of_other_networks_are_refused(runs):
    with pytest.raises(ValueError, match="the plan names 'fc'"):
        runs.fine_tuning_points({("mine", "", 1): {"fc": 1}})
    whole = plans.uniform(runs.material.network, 64)
    assert runs.fine_tuning_points({("whole", "", 1): whole})[0].clusters == (4, 4, 4, 6, 6, 8, 8)
