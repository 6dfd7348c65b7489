import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK

from resnet_pruning import cost
from resnet_pruning.quantization import quantize
from resnet_pruning.quantization.bits import bit_errors, bits_by_sensitivity
from resnet_pruning.quantization.quantized_model import activations, layers

ERRORS = bit_errors(NETWORK, IMAGES, (2, 3, 4, 8, 16))


def total(bits, column):
    table = ERRORS.set_index(["layer", "bits"])[column]
    return sum(table[item] for item in bits.items())


def test_errors_are_those_of_one_layer_alone():
    assert set(ERRORS.layer) == set(layers(quantize(NETWORK, IMAGES)))
    assert (ERRORS[ERRORS.bits == 16].error < 1e-5).all() and ERRORS.groupby("bits").error.sum().is_monotonic_decreasing
    inputs = IMAGES.normalised(IMAGES.pixels)
    with torch.no_grad():
        exact = NETWORK(inputs)
        alone = quantize(NETWORK, IMAGES, dict.fromkeys(ERRORS.layer.unique(), 16) | {"layer2.0.conv1": 2}, 16)
        for quantizer in activations(alone).values():
            quantizer.enabled = False
        changed = alone(inputs)
    expected = (changed - exact).square().sum(1).mean() / exact.var(0).sum()
    row = ERRORS[(ERRORS.layer == "layer2.0.conv1") & (ERRORS.bits == 2)].iloc[0]
    assert row.error == pytest.approx(float(expected), rel=0.01) and row.bytes == math.ceil(row.n_weights / 4)


@given(st.floats(2, 16), st.sampled_from([None, 8]))
@settings(deadline=None, max_examples=50)
def test_no_more_bytes_are_spent_than_the_same_bits_everywhere_would_take(budget, end_bits):
    bits = bits_by_sensitivity(ERRORS, budget, end_bits)
    assert list(bits) == list(ERRORS.layer.unique())
    sizes = ERRORS.drop_duplicates("layer").set_index("layer").n_weights
    free = [layer for layer in bits if end_bits is None or layer not in ("conv1", "fc")]
    assert sum(math.ceil(sizes[layer] * bits[layer] / 8) for layer in free) <= sum(math.ceil(sizes[layer] * budget / 8) for layer in free)
    assert all(bits[layer] == end_bits for layer in bits if layer not in free)


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_errors_sum_to_no_more_than_those_of_equal_bits(budget):
    bits = bits_by_sensitivity(ERRORS, budget)
    assert total(bits, "error") <= total(dict.fromkeys(bits, budget), "error") + 1e-12
    mixed, equal = (cost.size_in_bytes(quantize(NETWORK, IMAGES, chosen)) for chosen in (bits, budget))
    assert mixed <= equal


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="weight_bits is 1.9, expected at least 2"):
        bits_by_sensitivity(ERRORS, 1.9)
    with pytest.raises(ValueError, match="end_bits is 1, expected an integer from 2 to 16"):
        bits_by_sensitivity(ERRORS, 3, 1)
    with pytest.raises(ValueError, match="^bits is 1, expected an integer from 2 to 16"):
        bit_errors(NETWORK, IMAGES, (1, 2))
    with pytest.raises(ValueError, match=r"of shape \(0, 3, 32, 32\), expected"):
        bit_errors(NETWORK, IMAGES[:0])
    with pytest.raises(ValueError, match="images has 1 image, expected at least 2"):
        bit_errors(NETWORK, IMAGES[:1])
