import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK

from resnet_pruning import calibration, model, quantization
from resnet_pruning.quantization import codebooks
from resnet_pruning.training import Recipe, train

LENGTHS = {"kernel": 9, "row": 3, "weight": 1}
STATISTICS = calibration.layer_statistics(NETWORK, IMAGES[:60])


def inner(network):
    return {name: conv for name, conv in model.convolutions(network).items() if name != "conv1"}


@given(st.sampled_from(codebooks.PIECES), st.sampled_from(codebooks.SCOPES), st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=20)
def test_each_piece_is_a_representative_times_its_filters_scale(pieces, scope, n, weighted):
    coded = quantization.coded(NETWORK, n, pieces=pieces, scope=scope, statistics=STATISTICS if weighted else None)
    books = {}
    for name, conv in inner(coded).items():
        length = LENGTHS.get(pieces, conv.weight[0].numel())
        code = conv.parametrizations.weight[0]
        units = (conv.weight / code.scale.view(-1, 1, 1, 1)).reshape(-1, length)
        torch.testing.assert_close(units, code.codebook.representatives[code.labels])
        books.setdefault(({"layer": name, "stage": name[:6], "network": ""}[scope], length), set()).add(id(code.codebook))
    assert all(len(ids) == 1 for ids in books.values())
    originals = {name: conv.parametrizations.weight.original.requires_grad for name, conv in model.convolutions(coded).items()}
    assert [name for name, is_trained in originals.items() if is_trained] == ["conv1"]


def test_as_many_representatives_as_pieces_change_nothing():
    expected = inner(NETWORK)["layer1.0.conv1"].weight
    coded = quantization.coded(NETWORK, len(expected), pieces="filter", scope="layer")
    torch.testing.assert_close(inner(coded)["layer1.0.conv1"].weight, expected)


def test_representatives_get_the_sum_of_their_members_gradients():
    """Against autograd on the weights that they make."""
    coded = quantization.coded(NETWORK, 5, pieces="kernel", scope="stage").eval()
    inputs = IMAGES.normalised(IMAGES[:8].pixels)
    coded(inputs).square().sum().backward()
    plain = copy.deepcopy(NETWORK).eval()
    with torch.no_grad():
        for name, layer in {**model.convolutions(plain), "fc": plain.fc}.items():
            layer.weight.copy_(coded.get_submodule(name).weight)
    plain(inputs).square().sum().backward()
    expected = {}
    for name, conv in inner(coded).items():
        code = conv.parametrizations.weight[0]
        gradient = (model.convolutions(plain)[name].weight.grad * code.scale.detach().view(-1, 1, 1, 1)).reshape(-1, 9)
        total = torch.zeros_like(code.codebook.representatives).index_add(0, code.labels, gradient)
        expected[id(code.codebook)] = (code.codebook, expected.get(id(code.codebook), (None, 0))[1] + total)
    assert len(expected) == 3
    for codebook, total in expected.values():
        torch.testing.assert_close(codebook.representatives.grad, total, rtol=1e-3, atol=1e-5)


def test_training_moves_representatives_and_keeps_labels(digits):
    coded = quantization.coded(NETWORK, 8)
    code = coded.layer1[0].conv1.parametrizations.weight[0]
    labels, before = code.labels.clone(), code.codebook.representatives.detach().clone()
    train(coded, digits[0][:96], Recipe(epochs=1, batch_size=32, warmup_epochs=0, ema=0, small_share=0, learning_rate=0.01), progress=False)
    assert torch.equal(code.labels, labels) and not torch.equal(code.codebook.representatives, before)
    assert coded.layer2[0].conv1.parametrizations.weight[0].codebook is code.codebook


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="pieces is 'pair', expected one of filter, kernel, row, weight"):
        quantization.coded(NETWORK, 4, pieces="pair")
    with pytest.raises(ValueError, match="scope is 'block', expected one of layer, stage, network"):
        quantization.coded(NETWORK, 4, scope="block")
    with pytest.raises(ValueError, match="n_representatives is 99999, expected at most the number of pieces, "):
        quantization.coded(NETWORK, 99999)
