import pandas as pd
import pytest
import torch

from resnet_pruning import checkpoints, cost, evaluation, model, quantization
from resnet_pruning.studies import main_networks


@pytest.fixture
def folder(tmp_path, small_images):
    """A network, a smaller one, and that one quantized."""
    torch.manual_seed(0)
    for name, widths in {"whole": (4, 6, 8), "small": (2, 3, 4)}.items():
        checkpoints.save_checkpoint(tmp_path / f"{name}.pt", model.ResNet(8, widths), {})
    small, _ = checkpoints.load_checkpoint(tmp_path / "small.pt")
    quantized = quantization.quantize(small, small_images, 4, 8, progress=False)
    quantization.save_quantized(tmp_path / "tiny.pt", quantized, {"network": "small"})
    return tmp_path


def measured(folder, images, **settings):
    networks, made_of = main_networks.load_networks(folder, ["whole", "absent", "small", "tiny"], "cpu")
    settings = {"batch_size": 2, "settings": [("eager", "float32")], "rounds": 1} | settings
    return main_networks.measure_networks(networks, made_of, images, folder / "main.csv", **settings)


def test_networks_are_loaded_plain_or_quantized(folder):
    networks, made_of = main_networks.load_networks(folder, ["whole", "absent", "tiny"], "cpu")
    assert list(networks) == ["whole", "tiny"] and made_of == {"tiny": "small"}
    assert isinstance(networks["tiny"], quantization.QuantizedResNet)


def test_sizes_and_accuracies_are_shares_of_the_first(folder, small_images):
    table = measured(folder, small_images).set_index("network")
    whole, small, tiny = (table.loc[name] for name in ("whole", "small", "tiny"))
    network, _ = checkpoints.load_checkpoint(folder / "small.pt")
    assert (small.macs, small.parameters, small.bytes) == (cost.macs(network), cost.parameters(network), cost.size_in_bytes(network))
    assert small.macs_share == pytest.approx(small.macs / whole.macs, abs=1e-4) and whole.change == 0
    assert small.accuracy == pytest.approx(evaluation.accuracy(network, small_images), abs=1e-3)
    assert (tiny.macs, tiny.parameters) == (small.macs, small.parameters) and tiny.bytes < small.bytes
    assert whole.own_speedup == 1 and small.own_speedup > 0 and pd.isna(tiny.own_speedup) and table.machine.notna().all()
    assert list(pd.read_csv(folder / "main.csv")) == main_networks.COLUMNS


def test_times_are_read_where_they_were_measured(folder, small_images, monkeypatch):
    first = measured(folder, small_images)
    with monkeypatch.context() as patch:
        patch.setattr(main_networks, "benchmark_inference", None)
        pd.testing.assert_frame_equal(measured(folder, small_images), first)
        with pytest.raises(TypeError):
            measured(folder, small_images, measure_time=True)
        checkpoints.save_checkpoint(folder / "small.pt", model.ResNet(8, (3, 3, 4)), {})
        with pytest.raises(TypeError):
            measured(folder, small_images)
    again = measured(folder, small_images)
    assert again.macs[1] != first.macs[1] and again.own_speedup.notna().tolist() == [True, True, False]
