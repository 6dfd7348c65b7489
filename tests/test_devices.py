"""What is computed on a GPU: the same as on the CPU, and nowhere tensors of both in one operation."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from pretended import Elsewhere, pretended
from test_pruning import NETWORK
from torch import nn
from torch._subclasses import FakeTensorMode

from resnet_pruning import calibration, clustering, compaction, compression, data, evaluation, files, peers, plans, pruning
from resnet_pruning.checkpoints import load_checkpoint, save_checkpoint
from resnet_pruning.compression import allocation
from resnet_pruning.deployment import timing
from resnet_pruning.finetuning import projected, released, tied
from resnet_pruning.model import ResNet
from resnet_pruning.optimizers import OPTIMIZERS
from resnet_pruning.peers import masked
from resnet_pruning.quantization import bits, load_quantized, pytorch, quantize, save_quantized
from resnet_pruning.studies import pruning_runs
from resnet_pruning.studies.finetuning_runs import FineTuningRuns
from resnet_pruning.studies.quantization_runs import QuantizationRuns
from resnet_pruning.training import Execution, Recipe, train

IMAGES = data.load_images("digits")[0][:256]
FEW = IMAGES[:64]
PLAN = plans.uniform_fraction(NETWORK, 0.5)
STATISTICS = calibration.layer_statistics(NETWORK, FEW)
CLUSTERS = clustering.cluster_layers(NETWORK, PLAN, "correlation", statistics=STATISTICS, weighting=0.5)
RECIPE = Recipe(epochs=1, batch_size=32, learning_rate=0.01, warmup_epochs=0, small_share=0.0)
QUIET = {"progress": False, "n_steps": 3}


def trained(network, images, **settings):
    student = copy.deepcopy(network)
    train(student, images[:64], dataclasses.replace(RECIPE, **settings), teacher=network, held_out=FEW, **EAGER)
    return student


def quantized(network, images, *bits, **settings):
    return quantize(network, images[:64], *bits, **{"observer": "min-max", "weight_range": "min-max"} | QUIET | settings)


def fine_tuned(constrained, images):
    return compaction.compact(released(trained(constrained, images)))


EAGER = {"execution": Execution(amp=False, compile=False), "progress": False}
CONSTRAINTS = {
    "tied": lambda network: tied(network, CLUSTERS),
    "projected": lambda network: projected(network, CLUSTERS, 2),  # renewed before the first step, when weights are still the same
    "masked": lambda network: masked(peers.prune_weights(network, 0.5)),
}
# From a network and images to another network.
NETWORKS = {
    "new batch-norm statistics": lambda net, images: calibration.reestimate_batch_norm(net, images),
    "trained": trained,
    **{f"trained by {name}": lambda net, images, name=name: trained(net, images, optimizer=name) for name in OPTIMIZERS},
    **{
        f"fine-tuned, {way}": lambda net, images, start=start: fine_tuned(start(net), images)
        for way, start in list(CONSTRAINTS.items())[:3]
    },
    "fine-tuned, masked": lambda net, images: released(trained(CONSTRAINTS["masked"](net), images)),
    **{
        f"replaced by {representative}s": lambda net, images, representative=representative: pruning.replace_filters(
            net,
            PLAN,
            representative,
            distance="correlation",
            mergeable=True,
            statistics=calibration.layer_statistics(net, images),
            batch_norm_images=images,
        )
        for representative in clustering.REPRESENTATIVES
    },
    "compact": lambda net, images: compaction.compact(pruning.replace_filters(net, PLAN, mergeable=True)),
    "like another": lambda net, images: compression.rescale_like(net, ResNet(8, (6, 8, 10)).to(images.device)),
    **{
        f"compressed, {repair}": lambda net, images, repair=repair: compression.compress_by_plan(net, PLAN, images[:128], repair, **QUIET)
        for repair in ("scaled", "reconstruction")
    },
    "compressed, k-means": lambda net, images: compression.compress_by_plan(
        net, PLAN, images[:128], "none", selection="k-means", progress=False
    ),
    "compressed": lambda net, images: compression.compress(net, images[:200], 0.6, test_images=FEW, **QUIET),
    **{
        f"weights, {criterion}": lambda net, images, criterion=criterion: peers.prune_weights(net, 0.5, criterion)
        for criterion in ("per layer", "global", "random")
    },
    **{
        f"units, {criterion}": lambda net, images, criterion=criterion: peers.prune_units(net, {"layer1.0.conv1": 3}, criterion)
        for criterion in ("L1 norm", "geometric median", "random")
    },
    "neurons": lambda net, images: peers.merge_neurons(net, {"layer1.0.conv1": 3}),
    "quantized": lambda net, images: quantized(net, images, 4, 4, end_bits=8),
    "quantized, shared filters": lambda net, images: quantized(compaction.compact(pruning.replace_filters(net, PLAN)), images),
    "quantized, biases": lambda net, images: quantized(net, images, 4, 8, bias_correction=True, observer="percentile"),
    "quantized, levels": lambda net, images: quantized(net, images, 3, 8, levels="k-means", weight_range="mse"),
    "quantized, layers": lambda net, images: quantized(net, images, 4, 4, rounding="layer"),
    "quantized, blocks": lambda net, images: quantized(net, images, 4, 4, rounding="block"),
    "float16": lambda net, images: pytorch.HalfPrecision(net, "float16"),
}
# From a network and images to numbers.
NUMBERS = {
    "batches": lambda net, images: next(data.Batches(images, 64, seed=3).epoch(2, 24))[0],
    "held out": lambda net, images: torch.cat([part.labels for part in data.hold_out(images, 20)]),
    "moments": lambda net, images: torch.cat(
        [layer.second_moment.flatten() for layer in calibration.layer_statistics(net, images).values()]
    ),
    "importance": lambda net, images: torch.cat([layer.importance for layer in calibration.layer_statistics(net, images).values()]),
    "clusters": lambda net, images: clustering.cluster_layers(net, PLAN, "unit")["layer3.0.conv1"].centroids,
    "errors of bits": lambda net, images: torch.tensor(bits.bit_errors(net, images[:64], (4,)).error),
    "integers": lambda net, images: quantized(net, images, 4, 4).integer_logits(images.normalised(images.pixels[:64])),
}


def on_device(path, device):
    return path(copy.deepcopy(NETWORK).to(device), IMAGES.to(device))


def assert_same(found, expected, device):
    """A pretended device computes as the CPU does; a real one in another order, after which a choice may be another, too."""
    found, expected = found.cpu().double(), expected.double()
    assert found.shape == expected.shape
    if device.type == "cuda":
        assert (found - expected).norm() <= 0.05 * expected.norm()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("path", NETWORKS)
def test_networks_made_on_a_gpu_stay_there_and_are_those_made_on_the_cpu(path, gpu):
    torch.manual_seed(0)
    expected = evaluation.predict(on_device(NETWORKS[path], "cpu"), FEW)
    torch.manual_seed(0)
    network = on_device(NETWORKS[path], gpu)
    assert {tensor.device.type for tensor in network.state_dict().values()} == {gpu.type}
    assert_same(evaluation.predict(network, FEW), expected, gpu)


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_that_come_from_a_gpu_are_those_of_the_cpu(path, gpu):
    assert_same(on_device(NUMBERS[path], gpu), on_device(NUMBERS[path], "cpu"), gpu)


@pytest.mark.parametrize("way", CONSTRAINTS)
def test_constraints_are_where_their_network_is(way, gpu):
    network = CONSTRAINTS[way](copy.deepcopy(NETWORK).to(gpu))
    assert {tensor.device.type for tensor in network.state_dict().values()} == {gpu.type}


def test_a_network_computes_where_it_is_wherever_the_images_are(gpu, tmp_path):
    """What is loaded from a file, or quantized for x86 processors, is on the CPU; the images may be on a GPU."""
    images = IMAGES.to(gpu)
    for path in ("compressed, scaled", "quantized", "new batch-norm statistics"):
        network = NETWORKS[path](NETWORK, images)
        assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}
        assert evaluation.accuracy(network, images) == evaluation.accuracy(network, IMAGES)
    statistics = calibration.layer_statistics(NETWORK, images[:64])
    assert all(torch.equal(statistics[name].importance, layer.importance) for name, layer in STATISTICS.items())
    save_checkpoint(tmp_path / "whole.pt", copy.deepcopy(NETWORK).to(gpu), {})
    save_quantized(tmp_path / "small.pt", quantize(copy.deepcopy(NETWORK).to(gpu), images[:64]), {})
    for load, name in ((load_checkpoint, "whole.pt"), (load_quantized, "small.pt")):
        loaded, _ = load(tmp_path / name)
        assert evaluation.accuracy(loaded, images) == evaluation.accuracy(loaded.to(gpu), IMAGES)


def test_integers_of_8_bits_for_the_cpu_are_made_of_a_network_and_judged_on_images_on_a_gpu(gpu):
    pytest.importorskip("torchao")
    small = pytorch.to_int8(copy.deepcopy(NETWORK).to(gpu), FEW.to(gpu))
    assert evaluation.accuracy(small, FEW.to(gpu)) == evaluation.accuracy(small, FEW)


def test_runs_take_place_on_the_default_device(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_runs, "default_device", lambda: gpu)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    save_checkpoint(tmp_path / "network.pt", NETWORK, {})
    runs, quantizing = (kind(str(tmp_path / "network.pt"), "digits", "quick") for kind in (FineTuningRuns, QuantizationRuns))
    assert runs.material.network.fc.weight.device.type == gpu.type
    for point in runs.points({("uniform", "", 4): plans.uniform(NETWORK, 4)}, images="training", distance=["raw", "correlation"]):
        assert 0 <= runs.measure(point)["accuracy"] <= 100
    half, settings = {("half", "", 0.5): PLAN}, {"n_images": [128], "epochs": [1]}
    for point in runs.fine_tuning_points(half, "training", **settings):
        assert 0 <= runs.measure_fine_tuned(point)["accuracy"] <= 100
    (point,) = quantizing.quantizing_points([(4, 4)], "training", n_images=[32], weight_range=["min-max"])
    assert quantizing.measure_quantized(point)["bytes"] > 0
    (point,) = quantizing.ready_points(["bfloat16"], "training")
    assert abs(quantizing.measure_ready(point)["change"]) < 5


def test_a_row_of_timings_names_what_computed(gpu, monkeypatch):
    """An onnxruntime without CUDA computes on the CPU, whatever it is asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    for runtime in ("eager", "onnxruntime"):
        row = timing.latency({"a": NETWORK}, 2, [(runtime, "float32")], device=gpu, rounds=1, progress=False).iloc[0]
        assert row.device == (gpu.type if runtime == "eager" else "cpu") and (row.machine == "some GPU") == (row.device == "cuda")
    for name, seconds in allocation.part_timings(NETWORK, 2, shares=(0.5,), rounds=1, device=gpu, progress=False).groupby("layer").seconds:
        assert (seconds >= 0).all(), name


# What PyTorch itself says of CUDA without a GPU: fake tensors have a device and a shape, but no values and no gradients. So nothing runs on
# them that reads a value: not training, and not new batch-norm statistics either, of which each forward pass reads how many there were.
FORWARD = {
    "whole": NETWORK,
    "shared filters": compaction.compact(pruning.replace_filters(NETWORK, PLAN)),
    "merged": compression.compress_by_plan(NETWORK, PLAN, IMAGES, "none", progress=False),
    **{way: start(NETWORK) for way, start in CONSTRAINTS.items()},
    "float16": pytorch.HalfPrecision(NETWORK, "float16"),
    "quantized": quantized(NETWORK, FEW, 4, 4),
    "quantized, shared filters": quantized(compaction.compact(pruning.replace_filters(NETWORK, PLAN)), FEW, levels="k-means"),
}


def on_fake_gpu(network, mode):
    """A copy with fake tensors for parameters and buffers."""
    network = copy.deepcopy(network).requires_grad_(False)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with mode:
                        fake = mode.from_tensor(tensor).to("cuda")
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return network


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("training", [False, True])
def test_forward_passes_have_no_tensor_on_another_device(name, training):
    mode = FakeTensorMode()
    network = on_fake_gpu(FORWARD[name], mode).train(training)
    with (
        mode,
        torch.no_grad(),
        mock.patch.object(torch.Tensor, "isfinite", lambda tensor: mock.Mock(all=lambda: True)),
        mock.patch.object(data.Images, "__post_init__"),
    ):
        images = dataclasses.replace(FEW, pixels=mode.from_tensor(FEW.pixels).to("cuda"), labels=mode.from_tensor(FEW.labels).to("cuda"))
        for x in (images.normalised(images.pixels), next(data.Batches(images, 8).epoch(0, 24))[0]):
            assert network(x).device.type == "cuda"
            if "quantized" in name:
                assert network.integer_logits(x).device.type == "cuda"
            with pytest.raises(RuntimeError, match="device"):
                network(torch.zeros(x.shape))
        assert evaluation.predict(network, images).device.type == "cpu"


def test_the_pretended_device_refuses_what_cuda_refuses():
    with pretended() as device:
        here, there = torch.arange(6.0), torch.arange(6.0).to(device)
        assert isinstance(there, Elsewhere) and there.device == device and there.tolist() == here.tolist() and float(there[2]) == 2
        assert (there * torch.tensor(2.0)).sum().item() == 30 and there[torch.tensor([1, 2])].device == device
        weight = there.clone().requires_grad_()
        (weight**2).sum().backward()
        assert weight.grad.device == device and torch.equal(weight.grad.cpu(), 2 * here)
        for mixed in (
            lambda: here + there,
            lambda: here[there.long()],
            lambda: torch.stack([here, there]),
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: there.numpy(),
            lambda: torch.rand(3, device=device),
            lambda: torch.rand_like(there),
        ):
            with pytest.raises(RuntimeError, match="same device|draws on the device|numpy"):
                mixed()


def test_mean_and_deviation_are_made_once_and_give_the_same_bits(device):
    images = dataclasses.replace(FEW, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).to(device)
    expected = (FEW.pixels - torch.tensor(images.mean).view(1, 3, 1, 1) * 255) / (torch.tensor(images.std).view(1, 3, 1, 1) * 255)
    first = images.normalised(images.pixels)
    with mock.patch.object(torch, "tensor", side_effect=AssertionError("made again")):
        inputs = images.normalised(images.pixels)
    assert torch.equal(inputs.cpu(), expected) and torch.equal(first.cpu(), expected)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
