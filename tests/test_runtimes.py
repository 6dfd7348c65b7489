import sys

import pytest
import torch
from test_pruning import IMAGES, NETWORK, replaced

from resnet_pruning import checkpoints, compaction, evaluation, plans
from resnet_pruning.deployment import runtimes, timing
from resnet_pruning.files import ROOT
from resnet_pruning.hardware import can_compile, has_fast_bfloat16

COMPACT = compaction.compact(replaced(plans.uniform(NETWORK, 4), distance="correlation", mergeable=True))


@pytest.mark.parametrize("network", [NETWORK, COMPACT], ids=["whole", "compact"])
def test_onnxruntime_predicts_the_same_for_any_number_of_images(network, tmp_path):
    runtimes.to_onnx(network, tmp_path / "network.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    for n in (1, 7, 64):
        expected = evaluation.predict(network, IMAGES[:n])
        torch.testing.assert_close(runtimes.predict_onnx(tmp_path / "network.onnx", IMAGES[:n]), expected, rtol=1e-4, atol=1e-4)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match="channels"):
        runtimes.to_onnx(NETWORK, path, torch.zeros(2, 5, 32, 32))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_missing_file_and_an_unknown_runtime(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.onnx does not exist"):
        runtimes.onnx_session(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="runtime is 'fast', expected one of eager, compiled, onnxruntime, openvino"):
        runtimes.prepared(NETWORK, torch.zeros(2, 3, 32, 32), "fast")
    with pytest.raises(ValueError, match="precision is 'int8', expected one of float32, bfloat16 for eager"):
        runtimes.prepared(NETWORK, torch.zeros(2, 3, 32, 32), "eager", "int8")
    with pytest.raises(ValueError, match="calibration is None, expected training images"):
        runtimes.prepared(NETWORK, torch.zeros(2, 3, 32, 32), "openvino", "int8")


@pytest.mark.parametrize("network", [NETWORK, COMPACT], ids=["whole", "compact"])
@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_each_runtime_predicts_the_same(network, runtime):
    if runtime == "compiled" and not can_compile("cpu"):
        pytest.skip("torch.compile does not work here")
    expected = evaluation.predict(network, IMAGES[:10])
    torch.testing.assert_close(runtimes.predict(network, IMAGES[:10], runtime, batch_size=6), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("runtime", "precision"), [("eager", "bfloat16"), ("openvino", "bfloat16"), ("openvino", "int8")])
def test_fewer_bits_predict_nearly_the_same(runtime, precision):
    if precision == "bfloat16" and not has_fast_bfloat16("cpu"):
        pytest.skip("this processor has no instructions for bfloat16")
    network, _ = checkpoints.load_checkpoint(ROOT / "checkpoints" / "resnet20.pt")
    expected = evaluation.predict(network, IMAGES)
    found = runtimes.predict(network, IMAGES, runtime, precision, calibration=IMAGES)
    error = (found - expected).norm() / (expected - expected.mean(0)).norm()
    assert 0 < error < (0.3 if precision == "int8" else 0.1)  # of digits, which it was not trained on


def test_a_runtime_that_is_not_installed_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"openvino is not installed, expected it here: pip install -e '.\[openvino\]'"):
        runtimes.predict(NETWORK, IMAGES, "openvino")


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_each_runtime_is_timed(runtime):
    if runtime == "compiled" and not can_compile("cpu"):
        pytest.skip("torch.compile does not work here")
    models = {"whole": torch.nn.Conv2d(3, 8, 3), "small": torch.nn.Conv2d(3, 4, 3)}
    settings = [(runtime, precision) for precision in runtimes.PRECISIONS[runtime] if precision != "bfloat16" or has_fast_bfloat16("cpu")]
    table = timing.latency(models, 4, settings, device="cpu", rounds=3, progress=False)
    assert list(table.network) == ["whole", "small"] * len(settings) and set(table.precision) == {precision for _, precision in settings}
    assert table.speedup[0] == 1 and (table.own_speedup[table.network == "whole"] == 1).all()
    alone = table[table.precision == "float32"]
    assert (
        alone.speedup.tolist() == alone.own_speedup.tolist()
        and (table.lowest <= table.milliseconds).all()
        and (table.milliseconds <= table.highest).all()
    )


def test_no_copy_between_devices_is_timed(gpu, monkeypatch):
    """OpenVINO computes on the CPU; inputs on a GPU are moved before the first run."""
    seen = []
    monkeypatch.setattr(runtimes, "session", lambda model, inputs, *settings: (seen.append, torch.device("cpu")))
    run, used = runtimes.prepared(NETWORK, torch.zeros(2, 3, 32, 32).to(gpu), "openvino")
    run()
    assert used.type == seen[0].device.type == "cpu"


def test_a_timing_on_the_cpu_of_a_machine_with_a_gpu_names_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    row = timing.latency({"a": torch.nn.Conv2d(3, 4, 3)}, 1, device="cpu", rounds=1, progress=False).iloc[0]
    assert row.device == "cpu" and "threads" in row.machine


def test_timing_needs_something_to_time():
    with pytest.raises(ValueError, match="0 networks, 1 settings, batch_size 256 and rounds 10, expected at least 1 of each"):
        timing.latency({})
