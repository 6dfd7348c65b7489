import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, assert_same_function, train_an_epoch

from resnet_pruning import checkpoints, compaction, cost, data, evaluation, model, quantization
from resnet_pruning.compression import compress_by_plan, fold
from resnet_pruning.compression.streams import STAGES, bridge, narrow, read_by, sources_of, stage_of
from resnet_pruning.deployment import runtimes

QUICK = {"n_steps": 3, "progress": False}
MORE_IMAGES = data.load_images("digits")[0][:200]


def randomised(network):
    """The same network with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.batch_norms(network).values():
        for tensor in (norm.weight, norm.running_var):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        for tensor in (norm.bias, norm.running_mean):
            tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def duplicated(network, labels):
    """A network that computes the same with more channels in its streams: those of a cluster are equal everywhere."""
    state, shortcuts = dict(network.state_dict()), {}
    labels = {stage: torch.tensor(of_channels) for stage, of_channels in labels.items()}

    def split(weight, stage):
        counts = torch.bincount(labels[stage])[labels[stage]]
        return weight[:, labels[stage]] / counts.view(1, -1, *[1] * (weight.ndim - 2))

    for name in ("", *model.blocks(network)):
        writes, reads = STAGES[stage_of(name)], None if read_by(name) is None else STAGES[read_by(name)]
        prefix, last = (f"{name}.", "2") if name else ("", "1")
        for key in (f"conv{last}.weight", *(f"bn{last}.{key}" for key in ("weight", "bias", "running_mean", "running_var"))):
            state[prefix + key] = state[prefix + key][labels[writes]]
        if name:
            state[f"{name}.conv1.weight"] = split(state[f"{name}.conv1.weight"], reads)
        if name in ("layer2.0", "layer3.0"):
            sources = [sources_of(network.get_submodule(name))[label] for label in labels[writes].tolist()]
            shortcuts[name] = [-1 if s < 0 else int((labels[reads] == s).nonzero()[-1]) for s in sources]
    state["fc.weight"] = split(state["fc.weight"], "layer3")
    widths = tuple(len(labels[stage]) for stage in STAGES)
    inner = {f"{name}.conv1": block.conv1.out_channels for name, block in model.blocks(network).items()}
    return model.with_tensors(network.config | {"stage_widths": widths, "inner_widths": inner, "shortcuts": shortcuts}, state)


@st.composite
def clusters(draw, widths=(2, 3, 4)):
    """Labels for each stage, of as many channels as in the stage before or more."""
    found, least = {}, 0
    for stage, width in zip(STAGES, widths, strict=True):
        more = draw(st.lists(st.integers(0, width - 1), min_size=max(0, least - width), max_size=max(0, least - width) + 4))
        found[stage] = draw(st.permutations([*range(width), *more]))
        least = len(found[stage])
    return found


@given(clusters())
@settings(deadline=None, max_examples=40)
def test_channels_that_are_equal_on_the_whole_stream_fold_without_a_change(labels):
    small = randomised(model.ResNet(14, (2, 3, 4), n_classes=10))
    large = duplicated(small, labels)
    assert_same_function(large, small)
    folded = fold(large, labels)
    assert folded.config["stage_widths"] == (2, 3, 4) and cost.macs(folded) == cost.macs(small)
    assert_same_function(large, folded)
    assert_same_function(compaction.compact(folded), folded)


def test_without_labels_nothing_is_folded():
    folded = fold(NETWORK, {})
    assert folded.config == NETWORK.config
    assert_same_function(folded, NETWORK)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"layer4": [0]}, "names 'layer4', expected one of layer1, layer2, layer3"),
        ({"layer1": [0, 0]}, "expected the number of a cluster for each of 4 channels"),
        ({"layer1": [0, 0, 2, 2]}, "from 0 without a gap"),
        ({"layer2": [0, 0, 1, 1, 2, 2, 2, 2]}, "the streams would have 4, 3, 8 channels, expected none below the one before"),
    ],
)
def test_folds_that_cannot_be_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        fold(model.ResNet(8, (4, 8, 8)), labels)


@given(clusters(), st.sampled_from(["summed", "least squares", "reconstruction"]))
@settings(deadline=None, max_examples=8)
def test_a_plan_finds_channels_that_are_equal_on_the_whole_stream(labels, repair):
    small = randomised(model.ResNet(8, (2, 3, 4), n_classes=10))
    large = duplicated(small, labels)
    found = compress_by_plan(large, {"layer1": 2, "layer2": 3, "layer3": 4}, MORE_IMAGES, repair, **QUICK)
    assert found.config["stage_widths"] == (2, 3, 4) and cost.macs(found) <= cost.macs(small)
    exact, logits = (evaluation.predict(each, IMAGES) for each in (large, found))
    # Adam's first steps are as large as its learning rate, however little there is to repair.
    bound = {"summed": 1e-4, "least squares": 0.03, "reconstruction": 0.6}[repair]
    assert (logits - exact).norm() < bound * (exact - exact.mean(0)).norm()


@pytest.mark.parametrize("repair", ["none", "summed", "scaled", "least squares", "reconstruction"])
def test_a_block_that_does_nothing_is_dropped_for_nothing(repair):
    network = copy.deepcopy(NETWORK)
    for tensor in (network.layer2[0].bn2.weight, network.layer2[0].bn2.bias):
        torch.nn.init.zeros_(tensor)
    small = compress_by_plan(network, {"layer2.0.conv1": 0}, MORE_IMAGES, repair, **QUICK)
    assert small.layer2[0].dropped and not {"layer2.0.conv1", "layer2.0.conv2"} & {*model.convolutions(small)}
    exact, logits = (evaluation.predict(each, IMAGES) for each in (network, small))
    # Adam's first steps are as large as its learning rate, however little there is to repair.
    assert (logits - exact).norm() < (0.6 if repair == "reconstruction" else 0.03) * (exact - exact.mean(0)).norm()


def test_what_is_behind_makes_up_for_a_dropped_block_and_a_narrower_stream():
    plan = {"layer2.0.conv1": 0, "layer1": 5, "layer3": 9}
    exact = evaluation.predict(NETWORK, IMAGES)
    errors = {}
    for repair in ("none", "summed", "least squares", "reconstruction"):
        small = compress_by_plan(NETWORK, plan, MORE_IMAGES, repair, n_steps=100, progress=False)
        assert small.config["stage_widths"] == (5, 8, 9)
        errors[repair] = float((evaluation.predict(small, IMAGES) - exact).norm())
    assert errors["least squares"] < 0.7 * min(errors["none"], errors["summed"])
    assert errors["reconstruction"] < errors["least squares"]


def test_a_smaller_network_is_made_smaller_again():
    first = compress_by_plan(NETWORK, {"layer2.0.conv1": 0, "layer1": 4}, MORE_IMAGES, "least squares", **QUICK)
    second = compress_by_plan(first, {"layer1": 3, "layer1.0.conv1": 2}, MORE_IMAGES, "least squares", **QUICK)
    assert second.config["stage_widths"][0] == 3 and second.layer2[0].dropped and second.layer1[0].conv1.out_channels == 2
    again = compress_by_plan(first, {}, MORE_IMAGES, "least squares", **QUICK)
    assert again.config == first.config
    assert_same_function(again, first)


@pytest.mark.parametrize("repair", ["none", "least squares"])
def test_a_stage_without_blocks_is_narrowed(repair):
    network = randomised(model.ResNet(8, (4, 6, 8), {"layer2.0.conv1": 0, "layer3.0.conv1": 0}))
    small = compress_by_plan(network, {"layer2": 4, "layer3": 5}, MORE_IMAGES, repair, **QUICK)
    assert small.config["stage_widths"] == (4, 4, 5) and small.layer2[0].dropped and small.layer3[0].dropped
    # Of the channels of the two last stages, only four are not always zero: those that the shortcuts bring from the first.
    exact, logits = (evaluation.predict(each, IMAGES) for each in (network, small))
    assert (logits - exact).norm() < 0.03 * (exact - exact.mean(0)).norm()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layer1": 0}, "n_clusters is 0 for layer1, expected an integer from 1"),
        ({"layer4": 2}, "the plan names 'layer4'"),
        ({"layer1.0.conv2": 0}, "n_clusters is 0 for layer1.0.conv2"),
        ({"layer3": 2}, "the streams would have 6, 8, 2 channels, expected none below the one before"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        compress_by_plan(NETWORK, plan, MORE_IMAGES, **QUICK)


def test_a_narrow_network_is_trained_saved_quantized_and_exported(tmp_path):
    plan = {"layer2.0.conv1": 0, "layer1": 4, "layer3": 9, "layer3.0.conv1": 5}
    network = compress_by_plan(NETWORK, plan, MORE_IMAGES, "least squares", **QUICK)
    train_an_epoch(network)
    checkpoints.save_checkpoint(tmp_path / "a.pt", network, {})
    loaded, _ = checkpoints.load_checkpoint(tmp_path / "a.pt")
    assert loaded.config == network.config
    assert_same_function(loaded, network)
    inputs = IMAGES.normalised(IMAGES.pixels)
    small = quantization.quantize(network, IMAGES, 12, 12, rounding="block", n_steps=2, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(small.integer_logits(inputs), small(inputs), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(small(inputs), network(inputs), rtol=0.05, atol=0.05)
        quantization.save_quantized(tmp_path / "q.pt", small, {})
        torch.testing.assert_close(quantization.load_quantized(tmp_path / "q.pt")[0](inputs), small(inputs))
    runtimes.to_onnx(network, tmp_path / "a.onnx")
    torch.testing.assert_close(
        runtimes.predict_onnx(tmp_path / "a.onnx", IMAGES), evaluation.predict(network, IMAGES), rtol=1e-4, atol=1e-4
    )


def test_the_channels_that_stay_stand_for_those_that_they_go_with():
    base = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    noise = 0.01 * torch.randn(50, 7, 8, 8, generator=torch.Generator().manual_seed(1))
    found = narrow([base[:, labels] + noise], 3, torch.ones(7))
    assert sorted(labels[found.kept].tolist()) == [0, 1, 2]
    assert torch.equal(labels[found.kept[found.labels]], labels)


def test_a_stream_has_the_width_that_is_asked_for_even_if_channels_are_the_same():
    base = torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 0])
    found = narrow([base[:, labels]], 4, torch.ones(5))
    assert len(found.kept) == 4 == len(found.kept.unique()) and torch.equal(labels[found.kept[found.labels]], labels)
    assert torch.equal(found.labels[found.kept], torch.arange(4))


def test_a_bridge_brings_what_the_shortcut_brings():
    block = model.Block(4, 3, 8, stride=2).eval()
    kept = narrow([torch.randn(20, 8, 4, 4)], 5, torch.ones(8))
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(bridge(block, None, kept).shortcut(x), block.shortcut(x)[:, kept.kept])
