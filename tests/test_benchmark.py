import multiprocessing

import pandas as pd
import pytest
import torch

from resnet_pruning import checkpoints, evaluation, model
from resnet_pruning.deployment import bounds
from resnet_pruning.studies import benchmark
from resnet_pruning.training import Recipe


def test_the_straightforward_loop_sees_what_training_sees(small_images):
    """Same normalisation and same augmentation: only the way to get there differs."""
    x, label = benchmark.PILImages(small_images)[3]
    assert x.shape == (3, 32, 32) and label == small_images.labels[3]
    padded = torch.nn.functional.pad(small_images.pixels[3], [4] * 4)
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
    found = [torch.allclose(x, small_images.normalised(windows[None, :, dy, dx])[0], atol=1e-5) for dy in range(9) for dx in range(9)]
    assert any(found)


def test_the_loops_take_turns_and_are_compared_with_the_first(monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", {"data as one tensor on the device": benchmark.STEPS["data as one tensor on the device"]})
    table = benchmark.benchmark_training("digits", batch_size=8, n_steps=2, rounds=2)
    assert table.loop.tolist() == [benchmark.STRAIGHTFORWARD, "data as one tensor on the device"]
    assert (table.lowest <= table.images_per_second).all() and (table.images_per_second <= table.highest).all()
    assert table.ratio[0] == 1 and table.ratio[1] > 0


def test_loops_end_after_an_error():
    with pytest.raises(ZeroDivisionError), benchmark._loops(list(benchmark.STEPS)[:1], "digits", 8, 1, progress=False) as loops:
        assert all(loop() > 0 for loop in loops.values()) and len(multiprocessing.active_children()) == 1
        1 / 0  # noqa: B018
    assert not multiprocessing.active_children()


def test_a_training_step_is_the_sum_of_its_parts():
    table = benchmark.benchmark_step("digits", batch_size=64, n_steps=4, depth=8).set_index("part")
    whole = table.loc["the whole step"]
    assert table.milliseconds.drop("the whole step").sum() == pytest.approx(whole.milliseconds, abs=0.05) and whole.share == 100
    convolutions = table.loc[["convolutions, forward", "convolutions, backward"]]
    assert (convolutions.milliseconds > 0).all() and table.milliseconds["optimizer"] > 0
    assert ((convolutions.at_peak > 0) & (convolutions.at_peak < 150)).all() and table.at_peak.notna().sum() == 2
    assert table.milliseconds["batch norm, ReLU and additions, fused"] > 0


def test_the_time_to_the_published_accuracy_is_compared_with_the_straightforward_loops():
    recipe = Recipe(epochs=1, batch_size=256, small_share=1.0, small_size=8, warmup_epochs=0, ema=0)
    table = benchmark.benchmark_accuracy("digits", recipe, n_seeds=2, n_steps=2, progress=False)
    first, ours = table.iloc[0], table.iloc[1]
    assert first.accuracy == 91.25 and first.epochs == round(64_000 * 128 / 1437) and first.ratio == 1 and pd.isna(first.seeds)
    assert ours.seeds == 2 and ours.lowest <= ours.accuracy <= ours.highest and ours.epochs == 1
    assert ours.ratio > 10  # one epoch of small crops, to some thousands of whole images


def test_inference_is_timed_next_to_what_bounds_it(tmp_path, small_images):
    for name, width in [("resnet20", 64), ("resnet20_macs50", 32), ("resnet20_fast2_batch1", 48)]:
        checkpoints.save_checkpoint(tmp_path / f"{name}.pt", model.ResNet(8, (4, 8, 64), {"layer3.0.conv1": width}), {})
    models = benchmark.pruned_checkpoints(tmp_path / "resnet20.pt")
    assert list(models) == ["resnet20", "resnet20_fast2_batch1", "resnet20_macs50"]
    del models["resnet20_fast2_batch1"]
    settings = [("eager", "float32"), ("openvino", "int8")]
    table = benchmark.benchmark_inference(models, (1, 4), settings, rounds=1, progress=False)
    rows = [(batch, runtime, name) for batch in (1, 4) for runtime, _ in settings for name in models]
    assert list(zip(table.batch_size, table.runtime, table.network, strict=True)) == rows
    assert (table.macs_share.iloc[:2].diff().dropna() < 0).all() and table.macs_share[0] == 1
    first = table[table.network == "resnet20"]
    assert (first.own_speedup == 1).all() and (first.speedup[first.runtime == "eager"] == 1).all()
    costs = table.pivot_table(index="batch_size", columns=["runtime", "network"], values="compute_milliseconds")
    assert (costs.eager.resnet20 >= costs.eager.resnet20_macs50).all()  # of the same peak
    accuracies = benchmark.accuracy_by_runtime(models, small_images[:40], small_images[40:48], settings, progress=False)
    assert list(zip(accuracies.runtime, accuracies.network, strict=True)) == [row[1:] for row in rows[: len(rows) // 2]]
    exact = accuracies[accuracies.runtime == "eager"].accuracy.tolist()
    assert exact == [round(evaluation.accuracy(network, small_images[:40]), 2) for network in models.values()]


@pytest.mark.parametrize("device, csv", [("cpu", "benchmark_inference.csv"), ("cuda", "benchmark_inference_gpu.csv")])
def test_on_a_gpu_only_what_computes_there_is_timed_into_a_table_of_its_own(device, csv, tmp_path, digits, monkeypatch):
    used, measured = [], []

    def timed(networks, batch_sizes, settings, rounds):
        used.extend(runtime for runtime, _ in settings)
        return pd.DataFrame(
            {"machine": ["one"], "batch_size": 1, "runtime": "eager", "precision": "float32", "torch": "2", "rounds": rounds}
        )

    stubs = {
        "ROOT": tmp_path,
        "default_device": lambda: torch.device(device),
        "benchmark_inference": timed,
        "load_images": lambda _: digits,
    }
    stubs |= {"base_checkpoint": lambda *_: tmp_path / "base.pt", "pruned_checkpoints": lambda _: {}, "fingerprint": lambda _: "base"}
    for name, stub in stubs.items():
        monkeypatch.setattr(benchmark, name, stub)
    monkeypatch.setattr(benchmark, "read_or_measure", lambda path, *_, **__: measured.append(path.name))
    monkeypatch.setattr("sys.argv", ["benchmark", "inference", "--rounds", "3"])
    (tmp_path / "figures").mkdir()
    benchmark.main()
    assert pd.read_csv(tmp_path / "figures" / csv).rounds.tolist() == [3]
    assert set(used) == ({"eager", "compiled"} if device == "cuda" else {"eager", "compiled", "onnxruntime", "openvino"})
    assert measured == ([] if device == "cuda" else ["runtime_accuracy.csv"])


def test_a_machines_bounds_are_counted_by_layer():
    """One channel everywhere, behind three of 32×32 pixels: what each layer reads and writes, by its sides of 32, 16 and 8 pixels."""
    network = model.ResNet(8, (1, 1, 1))
    sides = [(32, 32), (32, 32), (32, 16), (16, 16), (16, 8), (8, 8)]  # of inputs and outputs behind the first convolution
    values = 3 * 32**2 + 32**2 + sum(before**2 + behind**2 for before, behind in sides) + 1 + 10
    weights = 3 * 9 + 6 * 9 + 10
    assert bounds.traffic(network, 1) == 4 * (values + weights)
    assert bounds.traffic(network, 5, "int8") == 5 * values + weights
    least = bounds.least_milliseconds(network, 2, "bfloat16", {"bfloat16": 1e6}, 1e6)
    macs = 9 * (3 * 32**2 + sum(behind**2 for _, behind in sides)) + 10
    assert least["compute"] == pytest.approx(2 * macs / 1e3) and least["memory"] == bounds.traffic(network, 2, "bfloat16") / 1e3
    with pytest.raises(ValueError, match="precision is 'int4', expected one of float32, bfloat16, int8"):
        bounds.traffic(network, 1, "int4")
    assert pd.isna(bounds.least_milliseconds(network, 2, "int8", {"float32": 1e6}, 1e6)["compute"])
    peaks = bounds.peaks(rounds=1)
    assert set(peaks) <= set(bounds.BYTES) and all(1e8 < peak < 1e16 for peak in peaks.values())
    assert 1e8 < bounds.bandwidth(rounds=1) < 1e14


def test_a_precision_without_instructions_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert set(bounds.peaks(rounds=1)) == {"float32"}


def test_a_new_timing_replaces_only_that_of_the_same_machine_and_batch_size(tmp_path):
    def table(machine, ratio, **columns):
        return pd.DataFrame({"machine": [machine], "batch_size": [128], "ratio": [ratio]} | columns)

    for machine, ratio in [("a", 1.0), ("b", 2.0), ("a", 3.0)]:
        benchmark.record(table(machine, ratio), tmp_path / "t.csv")
    assert pd.read_csv(tmp_path / "t.csv").set_index("machine").ratio.to_dict() == pytest.approx({"b": 2.0, "a": 3.0})
    # On a machine with a GPU one run times both: its runtime on the CPU leaves the CPU's others.
    for runtime, ratio in [("eager", 1.0), ("onnxruntime", 2.0), ("onnxruntime", 3.0)]:
        benchmark.record(table("a", ratio, runtime=runtime), tmp_path / "r.csv")
    assert pd.read_csv(tmp_path / "r.csv").set_index("runtime").ratio.to_dict() == {"eager": 1.0, "onnxruntime": 3.0}
