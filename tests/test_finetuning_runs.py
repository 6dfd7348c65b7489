import dataclasses

import pandas as pd
import pytest

from resnet_pruning import checkpoints, compression, cost, data, evaluation, files, plans
from resnet_pruning.studies import sweeps
from resnet_pruning.studies.finetuning_runs import WAYS, FineTuningRuns

PLANS = {("mine", "filters", 0.5): {"conv1": 2, "layer1.0.conv1": 2, "layer2.0.conv2": 4, "layer3.0.conv1": 3}}


@pytest.fixture
def runs(small_checkpoint):
    return FineTuningRuns(small_checkpoint, "digits", "quick")


def points_of(runs, **choices):
    return runs.fine_tuning_points(PLANS, **{"epochs": [2], "n_images": [192], "learning_rate": [0.02]} | choices)


def test_every_way_gives_a_network_of_the_planned_size(runs, tmp_path):
    points = points_of(runs, way=WAYS)
    table = sweeps.run_sweep(runs.measure_fine_tuned, points, tmp_path / "runs.csv", progress=False)
    assert set(table.way) == set(WAYS)
    network, (plan,) = runs.material.network, PLANS.values()
    for way, row in table.set_index("way").iterrows():
        merged = way in ("compact", "from scratch")
        assert (row.parameters, row.macs) == compression.cost_of_plan(network, plan, merged=merged), way
        assert row.seconds > 0
    by_epoch = sweeps.read_details(tmp_path / "runs.csv", "epochs", points)
    assert by_epoch[by_epoch.epoch > 0].groupby("way").moved.count().eq(2).sum() == len(WAYS) - 2, "two ways have no clusters"
    assert by_epoch.groupby("way").epoch.apply(list).map(lambda epochs: epochs == [0, 1, 2]).all()
    assert (by_epoch[by_epoch.epoch == 0].set_index("way").accuracy == table.set_index("way").accuracy_before).all()
    moved = by_epoch.dropna(subset="moved").groupby("way").moved.sum()
    assert moved[["tied", "centripetal", "projected, clusters fixed"]].eq(0).all() and moved["projected, new clusters each step"] > 0
    distances = by_epoch.dropna(subset="apart").groupby("way").apart.max()
    assert distances["centripetal"] > 0 and distances[["tied", "projected, new clusters each epoch"]].eq(0).all()


def test_a_choice_is_judged_on_images_that_were_not_trained_on(runs):
    material = runs.material
    trained, judged = material.trained_on("training"), material.images("training")
    whole = {image.numpy().tobytes() for image in trained.pixels.cpu()}
    seen = sum(image.numpy().tobytes() in whole for image in judged.pixels.cpu())
    duplicates = len(trained) - len(whole)
    assert len(trained) + len(judged) == len(material.trained_on("test")) == len(data.load_images("digits")[0]) and seen <= duplicates


def test_a_kept_result_is_the_network_that_the_row_describes(runs):
    (point,) = points_of(runs, way=["tied"], checkpoint=["mine"])
    row = runs.measure_fine_tuned(point)
    network, facts = checkpoints.load_checkpoint(files.results_folder("digits", "quick") / "checkpoints" / "mine.pt")
    assert facts["test_accuracy"] == row["accuracy"] == round(evaluation.accuracy(network, runs.material.images("test")), 2)
    assert facts["plan"]["conv1"] == 2 and facts["way"] == "tied" and cost.macs(network) == facts["macs"] == row["macs"]


def test_an_interrupted_run_goes_on(runs, monkeypatch):
    (point,) = points_of(runs, way=["projected, new clusters each step"])
    expected = runs.measure_fine_tuned(point)
    accuracy, calls = evaluation.accuracy, []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*arguments, **settings)

    (other,) = points_of(runs, way=["projected, new clusters each step"], seed=[1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "accuracy", interrupted)
        runs.measure_fine_tuned(other)
    resumed = runs.measure_fine_tuned(other)
    pd.testing.assert_frame_equal(runs.measure_fine_tuned(point)["epochs"], expected["epochs"])
    assert resumed["epochs"].epoch.tolist() == [0, 1, 2]


def test_unknown_settings_are_refused(runs):
    (point,) = points_of(runs)
    with pytest.raises(ValueError, match="way is 'frozen', expected one of tied, projected, clusters fixed"):
        runs.measure_fine_tuned(dataclasses.replace(point, way="frozen"))
    with pytest.raises(ValueError, match="the plan names 'fc'"):
        runs.fine_tuning_points({("mine", "", 1): {"fc": 1}})
    whole = plans.uniform(runs.material.network, 64)
    assert runs.fine_tuning_points({("whole", "", 1): whole})[0].clusters == (4, 4, 4, 6, 6, 8, 8)
