import copy
import dataclasses
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK

from resnet_pruning import checkpoints, compaction, cost, data, evaluation, model, plans, pruning, quantization
from resnet_pruning.quantization import files, observers, post_training, quantized_model
from resnet_pruning.quantization.bits import bit_errors
from resnet_pruning.quantization.post_training import quantize
from resnet_pruning.quantization.quantized_model import affine_grid, layers, quantized
from resnet_pruning.training import Execution, Recipe, train

QUIET = {"progress": False, "n_steps": 20}
finite = st.floats(-1e4, 1e4, allow_nan=False)
all_bits = st.integers(2, 16)


def logits(network, images=IMAGES):
    return evaluation.predict(network, images)


def error(network, other):
    expected = logits(other)
    return float((logits(network) - expected).norm() / (expected - expected.mean(0)).norm())


@given(st.tuples(finite, finite).map(sorted), all_bits, st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_an_affine_grid_rounds_by_at_most_half_a_step_and_has_zero(ends, bits, seed):
    low, high = ends
    scale, offset = affine_grid(low, high, bits)
    assert math.isfinite(scale) and scale > 0 and 0 <= offset < 2**bits
    x = torch.empty(200, dtype=torch.double).uniform_(min(low, 0), max(high, 0), generator=torch.Generator().manual_seed(seed))
    codes = quantized(x, scale, offset, 0, 2**bits - 1)
    inside = (codes > 0) & (codes < 2**bits - 1)  # the offset is rounded, which may cut off half a step at one end
    assert (((codes - offset) * scale - x)[inside].abs() <= 0.5001 * scale).all()
    assert ((codes - offset) * scale - x).abs().max() <= 1.0001 * scale
    assert (quantized(torch.zeros(1), scale, offset, 0, 2**bits - 1) - offset) * scale == 0
    beyond = torch.tensor([2 * low - 10 * scale - 1, 2 * high + 10 * scale + 1]).clamp(-1e9, 1e9)
    if low < 0 < high and high - low > 1e-30:
        assert quantized(beyond, scale, offset, 0, 2**bits - 1).tolist() == [0, 2**bits - 1]


@given(all_bits, st.integers(0, 100), st.booleans(), st.sampled_from(["min-max", "mse"]))
@settings(deadline=None, max_examples=60)
def test_weights_are_rounded_by_at_most_half_a_step(bits, seed, per_channel, weight_range):
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(3, 5, 3, bias=False)
    conv.weight.data *= torch.tensor([1.0, 30.0, 1e-3, 0.0, 1.0]).view(-1, 1, 1, 1)
    conv.weight.data[4] = 0.25  # a constant channel
    layer = quantized_model.QuantizedLayer(conv, None, bits)
    post_training.round_weights(layer, weight_range, per_channel)
    assert layer.scale.isfinite().all() and (layer.scale != 0).all() and layer.weight.isfinite().all()
    assert layer.codes.min() >= layer.ends[0] and layer.codes.max() <= layer.ends[1] and (per_channel or layer.scale.unique().numel() == 1)
    scale = quantized_model.per_filter(layer.scale, layer.weight)
    half = 0.5 + 2 ** (bits - 24)  # the scale and its products are rounded to 24 bits, which is few more than the largest codes have
    assert ((layer.float_weight / scale).clamp(*layer.ends) - layer.codes).abs().max() <= half
    if weight_range == "min-max":
        assert ((layer.weight - layer.float_weight).abs() <= half * scale.abs() + 1e-12).all()
    assert not layer.weight[3].any()


def test_the_smallest_squared_error_is_no_larger_than_that_of_the_whole_range():
    errors = {}
    for weight_range in ("min-max", "mse"):
        torch.manual_seed(0)
        layer = quantized_model.QuantizedLayer(torch.nn.Conv2d(16, 32, 3, bias=False), None, 3)
        layer.float_weight.pow_(3)  # long tails
        post_training.round_weights(layer, weight_range, True)
        errors[weight_range] = (layer.weight - layer.float_weight).square().sum((1, 2, 3))
    assert (errors["mse"] <= errors["min-max"] + 1e-12).all() and errors["mse"].sum() < 0.8 * errors["min-max"].sum()


def test_without_rounding_the_network_is_the_original_with_batch_norm_folded_in():
    bits = dict.fromkeys([*model.convolutions(NETWORK), "fc"], 8)
    torch.testing.assert_close(logits(quantized_model.QuantizedResNet(NETWORK, bits, 8, 8)), logits(NETWORK), rtol=1e-4, atol=1e-4)
    assert list(layers(quantized_model.QuantizedResNet(NETWORK, bits, 8, 8))) == list(bits)


def test_sixteen_bits_are_as_good_as_floats_and_fewer_are_worse_in_order():
    before = {name: tensor.clone() for name, tensor in NETWORK.state_dict().items()}
    errors = [error(quantize(NETWORK, IMAGES, bits, bits, observer="min-max"), NETWORK) for bits in (16, 8, 6, 4, 2)]
    assert errors[0] < 3e-3 and errors == sorted(errors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in NETWORK.state_dict().items())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [(8, 8, None), (4, 6, 8), (2, 2, None), (16, 8, None)])
def test_integer_arithmetic_gives_what_the_simulation_gives(bits, shared):
    network = NETWORK
    if shared:
        network = compaction.compact(pruning.replace_filters(NETWORK, plans.uniform_fraction(NETWORK, 0.5)))
        assert network.config["sharing"]
    weight_bits, activation_bits, end_bits = bits
    small = quantize(network, IMAGES, weight_bits, activation_bits, end_bits=end_bits)
    inputs = IMAGES.normalised(IMAGES.pixels)
    with torch.no_grad():
        simulated = small(inputs)
    exact = small.integer_logits(inputs)
    # a sum that lies between two integers may be rounded either way by the last bit of a float
    assert ((exact - simulated).abs() < 1e-3 * simulated.abs().max()).float().mean() > 0.95
    assert (exact.argmax(1) == simulated.argmax(1)).float().mean() > 0.95


def test_sums_are_the_same_integers_bit_for_bit():
    small = quantize(NETWORK, IMAGES, 4, 4)
    inputs = IMAGES.normalised(IMAGES.pixels)
    codes = small.input.integers(inputs)
    layer = layers(small)["conv1"]
    centred = (codes - small.input.offset).double()
    sums = torch.nn.functional.conv2d(centred, layer.codes.double(), padding=1)
    expected = sums.float() * (layer.scale * small.input.scale).view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer.integers(codes, small.input), expected, rtol=0, atol=0)


def test_sums_of_integers_of_16_bits_are_exact():
    """They do not fit into 32 bits."""
    conv = torch.nn.Conv2d(64, 2, 3, bias=False)
    layer = quantized_model.QuantizedLayer(conv, None, 16)
    layer.set_codes(torch.stack([torch.full((64, 3, 3), 32767), torch.full((64, 3, 3), -32768)]), torch.ones(2))
    activation = quantized_model.ActivationQuantizer(16)
    activation.set_grid(1.0, 3)
    sums = layer.integers(torch.full((1, 64, 3, 3), 65535, dtype=torch.int32), activation)[0, :, 1, 1]
    assert sums.tolist() == [float(torch.tensor(576 * 65532 * weight).float()) for weight in (32767, -32768)]


@pytest.mark.parametrize("observer", observers.OBSERVERS)
def test_observers_find_ranges_within_what_was_seen_that_ignore_outliers_where_they_should(observer):
    seen = observers.Observer("relu")
    torch.manual_seed(0)
    for i in range(6):
        values = torch.randn(5000).relu()
        values[0] = 50.0 if i == 5 else 4.0
        seen.see(values)
    low, high = seen.range(observer, 4)
    assert low == 0 and 0.4 < high <= 50
    if observer == "min-max":
        assert high == 50
    else:
        assert high < 45
    _, of_eight_bits = seen.range("mse", 8)
    assert of_eight_bits >= seen.range("mse", 3)[1]  # finer steps can cover more


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    network = model.ResNet(8, (8, 8, 16))
    recipe = Recipe(epochs=3, batch_size=64, warmup_epochs=0, ema=0, small_share=0.0)
    train(network, data.load_images("digits")[0], recipe, execution=Execution(amp=False, compile=False), progress=False)
    return network


@pytest.mark.parametrize("rounding", ["layer", "block"])
def test_learnt_rounding_comes_nearer_to_the_original(rounding, trained):
    training, held_out = data.load_images("digits")
    nearest = quantize(trained, training[:256], 3, 8, progress=False)
    learnt = quantize(trained, training[:256], 3, 8, rounding=rounding, progress=False, n_steps=100)
    errors = [float((logits(network, held_out) - logits(trained, held_out)).square().mean()) for network in (nearest, learnt)]
    assert errors[1] < 0.8 * errors[0]
    for name, layer in layers(learnt).items():  # up or down, nothing else
        steps = (layer.float_weight / quantized_model.per_filter(layer.scale, layer.weight)).clamp(*layer.ends)
        assert (steps - layer.codes).abs().max() <= 1.0001, name
        assert layer.rounding is None and not layer.bias.requires_grad


def test_bias_correction_keeps_the_means_of_channels():
    plain, corrected = (quantize(NETWORK, IMAGES, 2, 8, bias_correction=correction) for correction in (False, True))
    shift = [(logits(network).mean(0) - logits(NETWORK).mean(0)).abs().max() for network in (plain, corrected)]
    assert shift[1] < 0.01 * shift[0] + 1e-4


def test_levels_by_k_means_are_integers_too_and_fit_better():
    uniform, clustered = (quantize(NETWORK, IMAGES, 2, 16, levels=levels) for levels in ("uniform", "k-means"))
    assert error(clustered, NETWORK) < error(uniform, NETWORK)
    for layer in layers(clustered).values():
        assert layer.levels.abs().max() == 127 and len(layer.levels) == 4 and len(layer.codes.unique()) <= 4


@given(all_bits, st.integers(1, 50), st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_packing_and_unpacking_give_the_same_integers_in_as_few_bytes_as_possible(bits, n, seed):
    codes = torch.randint(2**bits, (n, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = files.pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(codes.numel() * bits / 8)
    assert torch.equal(files.unpack(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("settings", [{}, {"levels": "k-means"}, {"rounding": "block"}, {"end_bits": 8, "bias_correction": True}])
def test_what_is_saved_is_small_and_comes_back(settings, tmp_path):
    network = compaction.compact(pruning.replace_filters(NETWORK, plans.uniform_fraction(NETWORK, 0.5)))
    small = quantize(network, IMAGES, 3, 5, **QUIET | settings)
    quantization.save_quantized(tmp_path / "small.pt", small, {"note": "mine"})
    again, facts = quantization.load_quantized(tmp_path / "small.pt")
    assert facts == {"note": "mine"} and torch.equal(logits(again), logits(small))
    assert all(torch.equal(layer.float_weight, layers(small)[name].weight) for name, layer in layers(again).items())
    n_weights = sum(layer.codes.numel() for layer in layers(small).values())
    assert cost.size_in_bytes(small) >= n_weights * 3 / 8
    assert cost.size_in_bytes(small) == sum(tensor.nbytes for tensor in files._stored(small).values())
    assert (tmp_path / "small.pt").stat().st_size < 0.95 * cost.size_in_bytes(small) + 5000  # names and sizes of everything


def test_numbers_of_bits_may_be_numpys(tmp_path):
    """As they come out of tables."""
    two, four, eight = map(np.int64, (2, 4, 8))
    errors = bit_errors(NETWORK, IMAGES, [two, four])
    by_layer = dict.fromkeys(layers(quantize(NETWORK, IMAGES, 8, 8, **QUIET)), four)
    assert {type(n) for n in quantization.bits_by_sensitivity(errors, 3, eight).values()} == {int}
    for weight_bits in (four, by_layer):
        network = quantize(NETWORK, IMAGES, weight_bits, eight, end_bits=eight, stream_bits=eight, **QUIET)
        quantization.save_quantized(tmp_path / "a.pt", network, {})
        assert torch.equal(logits(quantization.load_quantized(tmp_path / "a.pt")[0]), logits(network))
    aware = quantization.aware(NETWORK, IMAGES, four, eight, end_bits=eight, stream_bits=eight)
    quantization.save_quantized(tmp_path / "b.pt", quantization.integers(aware), {})
    coded = quantization.coded(NETWORK, 4, renew_every=two)
    assert all(p.requires_grad for p in coded.parameters())


def test_a_network_without_ranges_is_not_saved(tmp_path):
    bare = quantized_model.QuantizedResNet(NETWORK, dict.fromkeys(layers(quantize(NETWORK, IMAGES, 8, 8, **QUIET)), 8), 8, 8)
    with pytest.raises(ValueError, match="the activations of .* have no range, expected a network that was made by quantize"):
        quantization.save_quantized(tmp_path / "bare.pt", bare, {})
    assert not (tmp_path / "bare.pt").exists()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "small.pt"
    quantization.save_quantized(path, quantize(NETWORK, IMAGES, 4, 4), {})
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"small\.pt"):
        quantization.load_quantized(path)
    path.write_bytes(whole)
    content = torch.load(path, weights_only=True)
    for deflated in (content["data"][:-100], torch.frombuffer(bytearray(zlib.compress(bytes(10**7))), dtype=torch.uint8)):
        torch.save(content | {"data": deflated}, path)
        with pytest.raises(ValueError, match=r"small\.pt is damaged: ValueError: its weights do not fill \d+ bytes"):
            quantization.load_quantized(path)
    torch.save(content | {"data": content["data"].flip(0)}, path)
    with pytest.raises(ValueError, match=r"small\.pt is damaged"):
        quantization.load_quantized(path)


def test_a_float_checkpoint_is_no_quantized_one(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "float.pt", NETWORK, {})
    with pytest.raises(ValueError, match="holds no quantized network"):
        quantization.load_quantized(tmp_path / "float.pt")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight_bits": 1}, "weight_bits is 1, expected an integer from 2 to 16"),
        ({"activation_bits": 17}, "activation_bits is 17"),
        ({"weight_bits": 4.0}, "weight_bits=4.0"),
        ({"end_bits": True}, "end_bits=True"),
        ({"observer": "guess"}, "observer is 'guess', expected one of min-max"),
        ({"weight_range": "all"}, "weight_range is 'all'"),
        ({"rounding": "up"}, "rounding is 'up', expected one of nearest, layer, block"),
        ({"rounding": "block", "n_steps": 0}, "n_steps is 0, expected at least 1"),
        ({"levels": "k-means", "rounding": "block"}, "levels by k-means with rounding 'block'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(NETWORK, IMAGES, **settings)


def test_images_and_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"of shape \(0, 3, 32, 32\), expected"):
        quantize(NETWORK, IMAGES[:0])
    with pytest.raises(ValueError, match=r"shape \(64, 1, 32, 32\), expected torch.uint8 of shape \(N, 3, 32, 32\)"):
        quantize(NETWORK, dataclasses.replace(IMAGES, pixels=IMAGES.pixels[:, :1]))
    with pytest.raises(ValueError, match="the network is a QuantizedResNet, expected a resnet_pruning.ResNet"):
        quantize(quantize(NETWORK, IMAGES), IMAGES)
    broken = copy.deepcopy(NETWORK)
    broken.layer2[0].bn1.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"layer2.0.bn1.weight of the network hold values that are NaN or infinite"):
        quantize(broken, IMAGES)
    broken.layer2[0].bn1.weight.data[:] = 3e38  # finite, but not what it makes of its inputs
    with pytest.raises(ValueError, match="the activations layer2.0.act1 are not finite"):
        quantize(broken, IMAGES)


def test_a_network_of_zeros_has_finite_scales():
    network = model.ResNet(8).eval()
    for parameter in network.parameters():
        parameter.data.zero_()
    small = quantize(network, data.load_images("digits")[0][:8], 4, 4)
    assert not logits(small, IMAGES).any()
