import contextlib

import pandas as pd
import pytest
import torch

from resnet_pruning import model, quantization
from resnet_pruning.data import Images
from resnet_pruning.quantization.quantized_model import normalised_batches
from resnet_pruning.report import plots
from resnet_pruning.studies import benchmark, sweeps
from resnet_pruning.studies.quantization_runs import ranges_in_bits


def test_a_table_is_measured_where_there_is_none_or_anew(tmp_path):
    made = []

    def measure():
        made.append(len(made))
        return pd.DataFrame({"seconds": [float(len(made))]})

    tables = [sweeps.read_or_measure(tmp_path / "new" / "t.csv", measure, anew) for anew in (False, False, True, False)]
    assert [table.seconds[0] for table in tables] == [1, 1, 2, 2]


def test_a_table_of_another_network_is_measured_anew(tmp_path):
    csv = tmp_path / "t.csv"
    for n, (base, warning) in enumerate(
        [("", None), ("a 1", "an unknown network, expected a 1"), ("a 1", None), ("b 2", "on a 1, expected b 2")]
    ):
        expected = pytest.warns(UserWarning, match=warning) if warning else contextlib.nullcontext()
        with expected:
            table = sweeps.read_or_measure(csv, lambda n=n: pd.DataFrame({"n": [n]}), base=base)
        assert table.n[0] == [0, 1, 1, 3][n] and pd.read_csv(csv).equals(table)
        assert list(table) == (["base", "n"] if base else ["n"]) and set(table.get("base", [base])) == {base}


def test_the_newest_timings_of_all_networks_are_found(tmp_path):
    def table(machine, networks, speedup):
        setting = {"machine": machine, "runtime": "eager", "precision": "float32", "batch_size": 1}
        return pd.DataFrame(setting | {"network": networks, "speedup": speedup})

    csv = tmp_path / "t.csv"
    assert benchmark.recorded(csv, ["a"]).empty
    for machine, networks, speedup in [("one", ["a", "b"], 1.0), ("two", ["a", "b"], 2.0), ("three", ["a"], 3.0)]:
        benchmark.record(table(machine, networks, speedup), csv)
    assert benchmark.recorded(csv, ["a", "b"]).speedup.tolist() == [2, 2]
    assert benchmark.recorded(csv, ["a"]).speedup.tolist() == [3]
    assert benchmark.recorded(csv, ["a", "c"]).empty


def test_kinds_of_numbers_are_timed_next_to_the_first():
    networks = {"float32": model.ResNet(8, (4, 6, 8)).eval(), "again": model.ResNet(8, (4, 6, 8)).eval()}
    table = benchmark.benchmark_numbers(networks, [1, 2], rounds=2, compiles=False)
    assert table.network.tolist() == ["float32", "again"] * 2 and table.batch_size.tolist() == [1, 1, 2, 2]
    assert table.speedup[table.network == "float32"].eq(1).all() and table.runtime.eq("eager").all() and table.milliseconds.gt(0).all()


def test_ranges_are_those_of_the_integers(small_images: Images):
    small = quantization.quantize(model.ResNet(8, (4, 6, 8)), small_images, 4, 4, progress=False)
    inputs = next(normalised_batches(small_images))
    ranges = ranges_in_bits(small, inputs, ["conv1"], ["act1"])
    weights, (low, high) = ranges["weights of conv1"]
    assert weights.shape == (4, 3, 3, 3) and low < 0 < high
    outputs, (zero, highest) = ranges["activations act1"]
    assert zero == 0 and outputs.shape == (len(inputs), 4, 32, 32) and not outputs.requires_grad
    assert torch.isclose(small.act1(outputs).max(), torch.tensor(highest), rtol=1e-4) and small.act1.see is None
    with pytest.raises(ValueError, match="outputs has 'conv1', expected some of the network's: input, act1"):
        ranges_in_bits(small, inputs, ["conv1"], ["act1", "conv1"])
    assert small.act1.see is None


def test_ranges_and_timings_of_networks_on_a_gpu(small_images: Images, gpu):
    network, images = model.ResNet(8, (4, 6, 8)).to(gpu), small_images.to(gpu)
    small = quantization.quantize(network, images, 4, 4, observer="min-max", weight_range="min-max", progress=False)
    ranges = ranges_in_bits(small, next(normalised_batches(images)), ["conv1"], ["act1"])
    _, table = plots.histograms(ranges, "value", "Ranges")
    assert set(table.panel) == {"weights of conv1", "activations act1"} and table["count"].sum() > 0
    assert benchmark.benchmark_numbers({"float32": network}, [2], rounds=1, compiles=False).milliseconds.gt(0).all()
