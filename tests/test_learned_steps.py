import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, replaced

from resnet_pruning import compaction, evaluation, model, plans, quantization
from resnet_pruning.quantization import learned_steps as learned
from resnet_pruning.quantization.quantized_model import ActivationQuantizer, activations, layers
from resnet_pruning.training import Recipe, train

COMPACT = compaction.compact(replaced(plans.uniform(NETWORK, 4), distance="correlation", mergeable=True))


@given(st.integers(2, 8), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_weights_lie_on_the_grid_and_are_the_nearest_of_it(bits, seed):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    steps = learned.LearnedSteps(weight, bits)
    codes, step = steps.codes(weight), steps.steps.view(-1, 1, 1, 1)
    torch.testing.assert_close(steps(weight), codes * step)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    inside = (weight / step > steps.lowest) & (weight / step < steps.highest)
    assert ((codes * step - weight).abs()[inside] <= step.expand_as(weight)[inside] / 2 * (1 + 1e-5)).all()


def test_gradients_are_those_of_the_paper():
    """Esser et al., equation 3: round(w/s) - w/s between the ends, and the ends themselves outside; and equation 5 for the weight.

    Weights that are rounded to an end are inside. `torch.clamp` has no gradient there in torch 2.14.
    """
    weight = torch.tensor([[0.3, -0.9, 2.8, -3.6, 5.0, -7.0]], requires_grad=True)
    steps = learned.LearnedSteps(weight, 3)  # -4 to 3
    steps.start.fill_(1.0)
    steps(weight).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 1, 0, 0]]
    expected = (0 - 0.3) + (-1 + 0.9) + (3 - 2.8) + (-4 + 3.6) + 3 - 4
    assert steps.ratio.grad.item() == pytest.approx(expected / (6 * 3) ** 0.5, rel=1e-5)


def test_activations_that_are_rounded_to_an_end_have_a_gradient():
    for quantizer in (learned.LearnedActivations(2), ActivationQuantizer(2)):  # 0 to 3
        x = torch.tensor([-0.9, 0.3, 1.2, 2.8, 4.0], requires_grad=True)
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.set_grid(1.0, 0)
        found = quantizer(x)
        found.sum().backward()
        assert found.tolist() == [0, 0, 1, 3, 3] and x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("start", [0.1, 1.0, 4.0])
def test_sgd_moves_steps_as_if_they_were_trained_themselves(start):
    """The ratio's update times the start is the step's own update, whatever the start is."""
    weight = torch.tensor([[0.3, -0.9, 5.0, -7.0]]) * start
    steps = learned.LearnedSteps(weight, 3)
    steps.start.fill_(start)
    steps(weight).sum().backward()
    own_gradient = ((0 - 0.3) + (-1 + 0.9) + 3 - 4) / (4 * 3) ** 0.5
    assert start * steps.ratio.grad.item() == pytest.approx(own_gradient, rel=1e-4)


@pytest.mark.parametrize("factor", [0.5, 1e3, 1e14])
def test_a_factor_changes_the_gradient_and_no_bit_of_the_value(factor):
    value = torch.tensor([1.0, 0.3, -2.7], requires_grad=True)
    found = learned._slowed(value, factor)
    found.sum().backward()
    assert torch.equal(found, value) and torch.equal(value.grad, torch.full((3,), factor))


def test_filters_of_zeros_stay_what_they_are():
    """Their steps start tiny, with gradients that are divided by the square of that."""
    weight = torch.randn(3, 2, 3, 3)
    weight[1] = 0
    assert learned.LearnedSteps(weight, 4)(weight).isfinite().all() and not learned.LearnedSteps(weight, 4)(weight)[1].any()
    network = copy.deepcopy(NETWORK)
    torch.nn.init.zeros_(network.layer2[0].conv1.weight)
    assert evaluation.predict(quantization.aware(network, IMAGES[:32], 4, 4), IMAGES[:20]).isfinite().all()


@pytest.mark.parametrize("network", [NETWORK, COMPACT], ids=["whole", "compact"])
@pytest.mark.parametrize(("weight_bits", "activation_bits", "stream_bits"), [(8, 8, None), (4, 4, 6), (2, 2, None), (2, 2, 8)])
def test_integers_predict_what_was_trained(network, weight_bits, activation_bits, stream_bits, tmp_path):
    aware = quantization.aware(network, IMAGES[:64], weight_bits, activation_bits, stream_bits=stream_bits)
    before = copy.deepcopy(aware.state_dict())
    train(aware, IMAGES[:96], Recipe(epochs=2, batch_size=32, learning_rate=0.01, warmup_epochs=0, ema=0, small_share=0), progress=False)
    changed = [name for name, tensor in aware.state_dict().items() if not torch.equal(tensor, before[name])]
    assert (
        any("weight.0.ratio" in name for name in changed)
        and any(name.endswith("act1.ratio") for name in changed)
        and any(name.endswith("act0.ratio") for name in changed) == (stream_bits is not None)
        and "model.bn1.running_mean" in changed
    )
    small = quantization.integers(aware)
    expected = evaluation.predict(aware, IMAGES)
    # Where a sum falls on the border between two integers, rounding decides; few do.
    assert ((evaluation.predict(small, IMAGES) - expected).abs().amax(1) < 1e-3 * expected.abs().max()).double().mean() > 0.9
    quantization.save_quantized(tmp_path / "small.pt", small, {})
    again, _ = quantization.load_quantized(tmp_path / "small.pt")
    torch.testing.assert_close(evaluation.predict(again, IMAGES), evaluation.predict(small, IMAGES))
    inputs = IMAGES.normalised(IMAGES[:40].pixels)
    close = (small.integer_logits(inputs) - small(inputs)).abs().amax(1) < 1e-3 * expected.abs().max()
    assert close.double().mean() > 0.9


@pytest.mark.parametrize("stream_bits", [None, 8])
def test_activations_start_where_quantization_after_training_ends(stream_bits):
    start = learned.aware(NETWORK, IMAGES, 4, 4, stream_bits=stream_bits)
    ready = quantization.quantize(NETWORK, IMAGES, 4, 4, end_bits=8, stream_bits=stream_bits)
    scales = {name: quantizer.scale.item() for name, quantizer in activations(ready).items() if name != "input"}
    assert {name: layer.step.item() for name, layer in learned._learned(start).items()} == pytest.approx(scales)


def test_many_bits_change_little():
    """Steps start where few bits need them; with many, some hundred of them span the weights."""
    expected = evaluation.predict(NETWORK, IMAGES)
    found = evaluation.predict(quantization.aware(NETWORK, IMAGES[:64], 16, 16, end_bits=16), IMAGES)
    assert (found - expected).norm() < 0.2 * (expected - expected.mean(0)).norm()


def test_each_layer_has_its_bits():
    small = quantization.integers(quantization.aware(NETWORK, IMAGES[:64], 3, 4, end_bits=6))
    bits = {name: layer.bits for name, layer in layers(small).items()}
    assert bits["conv1"] == bits["fc"] == 6 and set(bits.values()) == {3, 6} and small.blocks["layer1_0"].act1.bits == 4
    assert small.input.bits == small.pooled.bits == 6
    wider = quantization.integers(quantization.aware(NETWORK, IMAGES[:64], 3, 4, stream_bits=7))
    block = wider.blocks["layer1_0"]
    assert wider.act1.bits == block.act2.bits == 7 and block.act0.bits == block.act1.bits == 4


def test_only_the_stream_is_as_fine_as_it_may_be():
    """With more bits for the stream, nothing else is finer: the inputs of both convolutions of a block keep their few levels."""
    small = quantization.quantize(NETWORK, IMAGES[:64], 8, 2, end_bits=8, stream_bits=8, progress=False)
    seen = {}
    for name in ("conv1", "conv2"):
        layer = getattr(small.blocks["layer2_0"], name)
        layer.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0].unique()}))
    small.blocks["layer2_0"].register_forward_pre_hook(lambda module, inputs: seen.update(stream=inputs[0].unique()))
    evaluation.predict(small, IMAGES)
    assert len(seen["conv1"]) <= 4 and len(seen["conv2"]) <= 4 < len(seen["stream"]) <= 256


def test_dropped_blocks_are_known():
    network = model.ResNet(8, (4, 6, 8), {"layer2.0.conv1": 0}).eval()
    aware = quantization.aware(network, IMAGES[:32], 4, 4)
    torch.testing.assert_close(
        evaluation.predict(quantization.integers(aware), IMAGES[:20]), evaluation.predict(aware, IMAGES[:20]), rtol=1e-2, atol=1e-2
    )


def test_bad_bits_and_other_networks_are_refused():
    with pytest.raises(ValueError, match="weight_bits is 1, expected an integer from 2 to 16"):
        quantization.aware(NETWORK, IMAGES[:10], 1, 4)
    with pytest.raises(ValueError, match="activation_bits is 17, expected an integer from 2 to 16"):
        quantization.aware(NETWORK, IMAGES[:10], 4, 17)
    with pytest.raises(ValueError, match="stream_bits is 1, expected an integer from 2 to 16"):
        quantization.aware(NETWORK, IMAGES[:10], 4, 4, stream_bits=1)
    with pytest.raises(ValueError, match="stream_bits is 0, expected an integer from 2 to 16"):
        quantization.quantize(NETWORK, IMAGES[:10], 4, 4, stream_bits=0)
    with pytest.raises((ValueError, TypeError), match="ResNet"):
        quantization.integers(NETWORK)
