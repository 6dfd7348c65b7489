import dataclasses
import re
import sys

import pandas as pd
import pytest
import torch
from test_allocation import MANY
from test_pruning import NETWORK

from resnet_pruning import calibration, compression, cost, evaluation
from resnet_pruning.compression import timings

compress = sys.modules["resnet_pruning.compression.compress"]  # the module; the function has its name
SETTINGS = {"n_steps": 2, "progress": False}
STATISTICS = calibration.layer_statistics(NETWORK, MANY[:50])


def test_one_call_gives_a_network_within_the_budget_and_a_line(capsys):
    small = compression.compress(NETWORK, MANY, macs=0.6, test_images=MANY[:50], **SETTINGS)
    assert 0.4 * cost.macs(NETWORK) < cost.macs(small) <= 0.6 * cost.macs(NETWORK)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    before, after = evaluation.accuracy(NETWORK, MANY[:50]), evaluation.accuracy(small, MANY[:50])
    assert line == (
        f"{cost.parameters(NETWORK):,} → {cost.parameters(small):,} parameters ({cost.parameters(small) / cost.parameters(NETWORK):.1%}), "
        f"{cost.macs(NETWORK):,} → {cost.macs(small):,} MACs ({cost.macs(small) / cost.macs(NETWORK):.1%}), "
        f"{cost.size_in_bytes(NETWORK):,} → {cost.size_in_bytes(small):,} bytes "
        f"({cost.size_in_bytes(small) / cost.size_in_bytes(NETWORK):.1%}), "
        f"accuracy {before:.2f} → {after:.2f} % ({after - before:+.2f} pp)"
    )
    again = compression.compress(small, MANY, macs=0.7, **SETTINGS)
    assert cost.macs(again) <= 0.7 * cost.macs(small)


def test_half_the_macs_is_the_default_and_equal_seeds_give_equal_networks():
    first, second = (compression.compress(NETWORK, MANY, seed=1, **SETTINGS) for _ in range(2))
    assert 0.35 * cost.macs(NETWORK) < cost.macs(first) <= 0.5 * cost.macs(NETWORK)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def by_width(runs):
    """Times that do not depend on the machine: a stem takes as long as it has channels, a block as long as it writes channels."""
    numbers = {name: [float(number) for number in re.findall(r"\d+", name)] for name in runs}
    return pd.DataFrame([{name: found[0] + sum(found[3:4]) for name, found in numbers.items()}])


@pytest.mark.parametrize("budget", [{"macs": 0.6}, {"time": 0.8, "batch_size": 2}])
def test_no_bar_is_shown_where_none_is_wanted(capsys, budget, monkeypatch):
    interleaved = timings.interleaved
    monkeypatch.setattr(timings, "interleaved", lambda runs, rounds, progress: interleaved(runs, 1, progress) * 0 + by_width(runs))
    compression.compress(NETWORK, MANY, **budget, **SETTINGS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_plan_is_made_for_the_runtime_that_is_named(precision, monkeypatch):
    used = []
    monkeypatch.setattr(timings, "prepared", lambda part, inputs, *names: used.append((len(inputs), *names[:2])) or (lambda: None, None))
    monkeypatch.setattr(timings, "interleaved", lambda runs, *_: by_width(runs))
    small = compression.compress(NETWORK, MANY, time=0.8, runtime="openvino", precision=precision, batch_size=2, **SETTINGS)
    assert set(used) == {(2, "openvino", precision)} and small.config["stage_widths"] < NETWORK.config["stage_widths"]


def test_sorted_images_are_taken_from_all_classes(monkeypatch):
    """Each measurement takes the first of the images that it is given."""
    ordered, seen = MANY[MANY.labels.argsort(stable=True)], []
    monkeypatch.setattr(compress, "layer_statistics", lambda model, images, seed: seen.append(images.labels) or STATISTICS)
    monkeypatch.setattr(compress, "N_IMAGES", 220)
    with torch.no_grad():  # nothing here depends on the caller's gradient mode
        compress.compress(NETWORK, ordered, macs=0.6, **SETTINGS)
    (labels,) = seen
    assert len(labels) == 220 and labels[:100].bincount(minlength=10).min() > 0


def test_test_images_are_checked_before_the_work(monkeypatch):
    monkeypatch.setattr(compress, "layer_statistics", None)
    others = dataclasses.replace(MANY, classes=(*MANY.classes, "another"))
    with pytest.raises(ValueError, match="the model has 10 outputs, expected one for each of the 11 classes"):
        compress.compress(NETWORK, MANY, test_images=others, **SETTINGS)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"macs": 2.0}, "macs is 2.0, expected a number above 0 and at most 1"),
    ({"macs": 0.5, "time": 0.5}, "expected one of them"),
    ({"macs": 0.001}, "macs is 0.001, expected at least"),
    ({"images": MANY[:150]}, "150 images, expected at least 200"),
])  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        compression.compress(NETWORK, **{"images": MANY} | arguments, **SETTINGS)
