"""Wrong arguments, of every public function that there is: they are found by looking, so that a new one is covered on its first day."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbformat import v4
from torch import nn

import resnet_pruning
from resnet_pruning import clustering, data, plans
from resnet_pruning.arguments import ArgumentError
from resnet_pruning.compression import least_squares
from resnet_pruning.data import Batches, Images
from resnet_pruning.model import ResNet
from resnet_pruning.quantization import codebooks, learned_steps, observers, quantized_model
from resnet_pruning.studies import finetuning_runs, method_runs, pruning_runs, quantization_runs, size_runs, trials
from resnet_pruning.training import Execution, Recipe

TOWER = BeartypeConf(is_pep484_tower=True)
NETWORK = ResNet(8, (4, 6, 8)).eval()
IMAGES = Images(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8), "digits", tuple("0123456789"), (0.5,) * 3, (0.2,) * 3, False)
QUANTIZED = quantized_model.QuantizedResNet(NETWORK, dict.fromkeys([*plans.uniform(NETWORK, 1), "fc"], 8), 8, 8)
RUNS = {"checkpoint": "none.pt", "dataset": "digits"}
# One value of each kind that an annotation names; a kind that is missing fails the test of the function that needs it.
GOOD = [
    None, 1, 2, 0.5, True, "digits", "SGD", Path("no/such/place"), (), [], {}, (1,), [1], ("a",), ["a"], {"a": 1}, {"a": "b"}, b"",
    (0.5, 0.5), (0.5, 0.5, 0.5),
    (1, 2, 3), ("a", "b", 0.5), NETWORK, IMAGES, Recipe(), Execution(), NETWORK.conv1, NETWORK.bn1, NETWORK.layer1[0], QUANTIZED,
    QUANTIZED.conv1, QUANTIZED.input, torch.zeros(2), torch.device("cpu"), torch.float16, torch.Size((2,)), pd.DataFrame(),
    pd.Series(dtype=float), np.zeros(2), Figure(), Figure().subplots(),
    least_squares.Moments.of(NETWORK.conv1, torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8)),
    Batches(IMAGES, 2), clustering.cluster_filters(NETWORK.conv1, 2), len, int, nn.Module, observers.Observer("a", 0),
    pruning_runs.PruningRuns(**RUNS), finetuning_runs.FineTuningRuns(**RUNS), method_runs.MethodRuns(**RUNS),
    quantization_runs.QuantizationRuns(**RUNS), size_runs.SizeRuns(**RUNS), trials.TrialPoint("a"),
    codebooks.Codebook(torch.zeros(2, 9), torch.zeros(2)), learned_steps.AwareResNet(NETWORK, 4, 4, 8, 4), v4.new_notebook(),
    pruning_runs.PlanPoint("a", "test", "p", "m", 1.0, (1,)), pruning_runs.ReplacementPoint("a", "test", "p", "m", 1.0, (1,)),
    pruning_runs.CompressionPoint("a", "test", "p", "m", 1.0, (1,)), finetuning_runs.FineTuningPoint("a", "test", "p", "m", 1.0, (1,)),
]  # fmt: skip
WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.binary(max_size=3), st.builds(object),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.integers(), st.integers(), max_size=2), st.sampled_from(GOOD),
)  # fmt: skip


def public_functions():
    for module in pkgutil.walk_packages(resnet_pruning.__path__, "resnet_pruning."):
        for name, thing in vars(importlib.import_module(module.name)).items():
            here = getattr(thing, "__module__", "") == module.name and not name.startswith("_")
            if here and inspect.isfunction(thing):
                yield f"{module.name.removeprefix('resnet_pruning.')}.{name}", thing
            elif here and inspect.isclass(thing) and "__init__" in vars(thing) and inspect.isfunction(thing.__init__):
                yield f"{module.name.removeprefix('resnet_pruning.')}.{name}", thing.__init__


FUNCTIONS = dict(public_functions())


def example(hint):
    return next((value for value in GOOD if is_bearable_here(value, hint)), Ellipsis)


def is_bearable_here(value, hint):
    try:
        return is_bearable(value, hint, conf=TOWER)
    except (TypeError, ValueError):  # a network that is none of ours
        return False


def test_every_public_name_was_found():
    some = {"training.train", "model.ResNet", "compression.compress.compress", "report.plots.curves", "studies.sweeps.run_sweep"}
    assert len(FUNCTIONS) > 150 and some <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(chance=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_argument_of_another_kind_is_refused_by_name(name, chance):
    function = FUNCTIONS[name]
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    assert not (bare := [p.name for p in parameters if p.name not in hints]), f"{bare} of {name} have no annotation"
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    examples = {p.name: example(hints[p.name]) for p in plain}
    assert not (unknown := [n for n, value in examples.items() if value is ...]), f"add examples for {unknown} of {name} to GOOD"
    open_to_any = [p.name for p in plain if is_bearable_here(object(), hints[p.name])]
    if not (checked := [p.name for p in plain if p.name not in open_to_any]):
        return
    wrong = chance.draw(st.sampled_from(checked))
    value = chance.draw(WRONG.filter(lambda value: not is_bearable_here(value, hints[wrong])))
    arguments = examples | {wrong: value}
    place = [arguments[p.name] for p in plain if p.kind is p.POSITIONAL_ONLY]
    named = {p.name: arguments[p.name] for p in plain if p.kind is not p.POSITIONAL_ONLY}
    if "self" in inspect.signature(function).parameters:
        named["self"] = object.__new__(resolve(name))
    with pytest.raises((TypeError, ValueError)) as error:
        result = function(*place, **named)
        next(result) if inspect.isgenerator(result) else result.__enter__()  # those check when they begin
    assert wrong in str(error.value) or "network" in str(error.value)


def resolve(name):
    module, _, thing = name.rpartition(".")
    return getattr(importlib.import_module(f"resnet_pruning.{module}"), thing)


def test_a_wrong_argument_is_an_error_of_type_and_of_value():
    for kind in (TypeError, ValueError, ArgumentError):
        with pytest.raises(kind, match=r"plans.uniform\(\) parameter n_clusters='3' violates .*not .*int"):
            plans.uniform(NETWORK, "3")


NUMBERS = st.one_of(st.integers(-3, 70), st.floats(), st.sampled_from([np.int64(3), np.float32(0.5), np.float64("nan"), True, 2**40]))
MAKES = {
    "uniform": (lambda n: plans.uniform(NETWORK, n), lambda n: n >= 1 and n == int(n)),
    "uniform_fraction": (lambda n: plans.uniform_fraction(NETWORK, n), lambda n: 0 < n <= 1),
    "first_last_heavy": (lambda n: plans.first_last_heavy(NETWORK, 2, 3, n), lambda n: 0 <= n <= 6 and n == int(n)),
    "hold_out": (lambda n: data.hold_out(IMAGES, n), lambda n: 1 <= n <= 7 and n == int(n)),
    "Batches": (lambda n: Batches(IMAGES, n), lambda n: 1 <= n <= 8 and n == int(n)),
    "padding": (lambda n: Batches(IMAGES, 2, padding=n), lambda n: n >= 0 and n == int(n)),
    "depth": (lambda n: ResNet(n, (1, 1, 1)), lambda n: n >= 8 and n % 6 == 2),
    "n_classes": (lambda n: ResNet(8, (1, 1, 1), n_classes=n), lambda n: n >= 1 and n == int(n)),
    "learning_rate": (lambda n: Recipe(learning_rate=n), lambda n: 0 < n < math.inf),
    "ema": (lambda n: Recipe(ema=n), lambda n: 0 <= n < 1),
    "epochs": (lambda n: Recipe(epochs=n), lambda n: n >= 1 and n == int(n)),
    "weight_decay": (lambda n: Recipe(weight_decay=n), lambda n: 0 <= n < math.inf),
    "cluster_filters": (lambda n: clustering.cluster_filters(NETWORK.conv1, n), lambda n: n >= 1 and n == int(n)),
    "seed": (lambda n: clustering.cluster_filters(NETWORK.conv1, 2, seed=n, n_init=1), lambda n: 0 <= n < 2**32 and n == int(n)),
}


@pytest.mark.parametrize("name", MAKES)
@given(number=NUMBERS)
@settings(max_examples=40, deadline=None)
def test_a_number_is_taken_as_what_it_is_or_refused_with_its_value(name, number):
    if name in ("n_classes", "depth") and number == 2**40:
        return  # would be right, and large
    make, fits = MAKES[name]
    try:
        make(number)
    except ValueError as error:
        assert str(number) in str(error) or repr(number) in str(error), error
    else:
        assert not isinstance(number, bool) and fits(number)


@pytest.mark.parametrize(("change", "message"), [
    ({"pixels": IMAGES.pixels.float()}, r"pixels are torch.float32 of shape \(8, 3, 32, 32\), expected torch.uint8 of shape \(N"),
    ({"pixels": IMAGES.pixels[:, :1]}, r"of shape \(8, 1, 32, 32\), expected"),
    ({"pixels": IMAGES.pixels[:0], "labels": IMAGES.labels[:0]}, r"of shape \(0, 3, 32, 32\), expected"),
    ({"labels": IMAGES.labels[:5]}, r"labels are torch.int64 of shape \(5,\) on cpu, expected torch.int64, one for each of the 8 images"),
    ({"labels": IMAGES.labels.float()}, "labels are torch.float32"),
    ({"labels": IMAGES.labels + 3}, "labels are from 3 to 10, expected numbers of the 10 classes"),
    ({"labels": IMAGES.labels - 1}, "labels are from -1 to 6"),
    ({"std": (0.2, 0.0, 0.2)}, r"std is \(0.2, 0.0, 0.2\), expected positive numbers"),
])  # fmt: skip
def test_images_are_checked_once_where_they_are_made(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(IMAGES, **change)


def test_a_network_with_other_classes_is_not_judged():
    with pytest.raises(ValueError, match="the model has 7 outputs, expected one for each of the 10 classes of digits"):
        resnet_pruning.accuracy(ResNet(8, (1, 1, 1), n_classes=7), IMAGES)
