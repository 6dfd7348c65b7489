from dataclasses import replace

import pandas as pd

from resnet_pruning import data
from resnet_pruning.studies import sweeps, trials
from resnet_pruning.studies.trials import TrialPoint
from resnet_pruning.training import Recipe

RECIPE = Recipe(epochs=1, batch_size=32, small_share=0.0, warmup_epochs=0, ema=0)


def test_trials_add_a_row_each_and_are_run_once(small_images, tmp_path, monkeypatch):
    one = [TrialPoint("base", recipe=RECIPE)]
    two = [*one, TrialPoint("slower", recipe=replace(RECIPE, learning_rate=0.01))]
    csv = tmp_path / "trials.csv"
    first = trials.run_trials(small_images, csv, tmp_path / "states", one)
    assert first.trial.tolist() == ["base"]
    both = trials.run_trials(small_images, csv, tmp_path / "states", two)
    assert sorted(both.trial) == ["base", "slower"] and both.held_out_accuracy.is_monotonic_decreasing
    assert set(both.learning_rate) == {0.2, 0.01}
    few = [replace(point, n_images=64) for point in two]
    final = trials.run_trials(small_images, tmp_path / "final.csv", tmp_path / "final", few, test_images=small_images[:50])
    epochs = sweeps.read_details(tmp_path / "final.csv", "epochs", few).set_index("trial")
    assert epochs.held_out_accuracy.to_dict() == final.set_index("trial").held_out_accuracy.to_dict()  # of one epoch
    assert final.test_accuracy.between(0, 100).all() and set(final.n_images) == {64}
    monkeypatch.setattr(data.Batches, "epoch", None)
    pd.testing.assert_frame_equal(trials.run_trials(small_images, csv, tmp_path / "states", two), both)
