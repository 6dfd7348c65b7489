import copy
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning import IMAGES, NETWORK, replaced

from resnet_pruning import calibration, checkpoints, compaction, model, plans, quantization
from resnet_pruning.quantization import codebooks, coded_files, compact_files, context_codes
from resnet_pruning.training import Recipe, train

LENGTHS = {"pair of kernels": 18, "kernel": 9, "row": 3, "weight": 1}
EVEN = model.ResNet(8, (4, 8, 8))  # channels come in pairs
COMPACT = compaction.compact(replaced(plans.uniform(NETWORK, 4), distance="correlation", mergeable=True))


def inner(network):
    return {name: conv for name, conv in model.convolutions(network).items() if name != "conv1"}


@given(
    st.sampled_from(codebooks.PIECES), st.sampled_from(codebooks.SCOPES), st.integers(1, 6), st.sampled_from(codebooks.REPRESENTATIVES),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_each_piece_is_a_representative_times_its_filters_scale(pieces, scope, n, representatives):
    coded = quantization.coded(NETWORK, n, pieces=pieces, scope=scope, representatives=representatives)
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


def test_renewed_pieces_go_to_the_nearest_representative(digits):
    coded = quantization.coded(EVEN, 8, renew_every=2)
    recipe = Recipe(epochs=2, batch_size=32, warmup_epochs=0, ema=0, small_share=0, learning_rate=0.05)
    train(coded, digits[0][:96], recipe, progress=False)
    conv = coded.layer1[0].conv1
    code, original = conv.parametrizations.weight[0], conv.parametrizations.weight.original
    assert code.n_passes == 6
    with torch.no_grad():
        original.copy_(torch.randn(original.shape, generator=torch.Generator().manual_seed(0)))
    before = code.labels.clone()
    assert torch.equal(coded.eval().layer1[0].conv1.weight, conv.weight) and torch.equal(code.labels, before)
    weight = coded.train().layer1[0].conv1.weight  # the seventh forward pass, in which they are renewed
    points = (original / code.scale.view(-1, 1, 1, 1)).reshape(-1, 9)
    assert torch.equal(code.labels, torch.cdist(points, code.codebook.representatives).argmin(1)) and not torch.equal(code.labels, before)
    coded.zero_grad()
    weight.sum().backward()
    assert (original.grad == 1).all() and code.codebook.representatives.grad.abs().sum() > 0


def test_random_representatives_are_pieces_and_fit_worse():
    clustered, drawn = (quantization.coded(NETWORK, 6, representatives=kind) for kind in codebooks.REPRESENTATIVES)
    (representatives,) = {code.codebook.representatives for code in codes(drawn)}
    pieces = torch.cat([(conv.weight / conv.weight.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)).reshape(-1, 9)
                        for conv in inner(NETWORK).values()])  # fmt: skip
    assert torch.cdist(representatives, pieces).min(1).values.max() < 1e-3
    error = {
        kind: sum((inner(network)[name].weight - conv.weight).square().sum() for name, conv in inner(NETWORK).items())
        for kind, network in {"k-means": clustered, "random": drawn}.items()
    }
    assert error["k-means"] < error["random"]


@pytest.mark.parametrize("network", [NETWORK, COMPACT], ids=["whole", "compact"])
@pytest.mark.parametrize(("pieces", "length"), [("filter", 0), ("kernel", 9), ("weight", 1)])
def test_the_cost_of_an_error_is_the_squared_change_of_the_logits(network, pieces, length):
    """Against the definition, one weight at a time: its channels' importance times the mean square of what it is multiplied by."""
    statistics = calibration.layer_statistics(network, IMAGES[:20])
    for name, conv in inner(network).items():
        labels = getattr(conv, "labels", torch.arange(len(conv.weight)))
        factors = model.affine(model.batch_norms(network)[name])[0]
        cost = torch.zeros(conv.weight.flatten(1).shape, dtype=torch.double)
        for channel, (filter_, factor) in enumerate(zip(labels.tolist(), factors.tolist(), strict=True)):
            for position in range(cost.shape[1]):
                energy = statistics[name].second_moment[position, position]
                cost[filter_, position] += statistics[name].importance[channel] * factor**2 * energy
        expected = cost.reshape(-1, length or cost.shape[1]).mean(1)
        norm = model.batch_norms(network)[name]
        found = codebooks._cost_to_logits(conv, norm, statistics[name], length or cost.shape[1])
        torch.testing.assert_close(found, expected)


def test_weighting_brings_representatives_near_the_pieces_that_matter():
    """A channel that nothing depends on costs nothing: with as many representatives as other pieces, these are coded exactly."""
    network = copy.deepcopy(EVEN)
    with torch.no_grad():
        for block in (network.layer1[0], network.layer2[0], network.layer3[0]):
            block.bn1.weight[1:] = 0  # of the first convolution, only the first filter matters
    statistics = calibration.layer_statistics(network, IMAGES[:20])
    settings = {"pieces": "kernel", "scope": "layer"}
    weighted = quantization.coded(network, 4, **settings, statistics=statistics, weighting=1.0)
    plain = quantization.coded(network, 4, **settings)
    name = "layer1.0.conv1"
    kernels = inner(network)[name].weight[0]
    torch.testing.assert_close(inner(weighted)[name].weight[0], kernels)
    assert (inner(plain)[name].weight[0] - kernels).abs().max() > 0.01


def test_weighting_by_nothing_changes_nothing():
    statistics = calibration.layer_statistics(NETWORK, IMAGES[:20])
    without, nothing = quantization.coded(NETWORK, 6), quantization.coded(NETWORK, 6, statistics=statistics)
    for name, conv in inner(without).items():
        assert torch.equal(conv.weight, inner(nothing)[name].weight)


def cost(points, representatives, labels, weights, bit_cost):
    """The weighted squared errors, and the entropy of the labels."""
    shares = labels.bincount().double() / len(labels)
    error = (weights * (points - representatives[labels]).square().sum(1)).sum()
    return error + bit_cost * len(labels) * torch.special.entr(shares).sum() / math.log(2)


@given(st.integers(1, 8), st.sampled_from([1, 3]), st.floats(0.01, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_counting_bits_lowers_errors_and_bits_together(n, length, bit_cost, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(60, length, generator=generator, dtype=torch.double)
    weights = torch.rand(60, generator=generator, dtype=torch.double) + 0.01
    (labels, means), (plain, plain_means) = (codebooks._clustered(points, weights, n, price, seed) for price in (bit_cost, 0.0))
    assert cost(points, means, labels, weights, bit_cost) <= cost(points, plain_means, plain, weights, bit_cost) + 1e-9
    assert labels.unique().tolist() == [*range(len(means))] and len(means) <= n
    expected = torch.stack([(points * weights.unsqueeze(1))[labels == i].sum(0) / weights[labels == i].sum() for i in range(len(means))])
    torch.testing.assert_close(means, expected)


def test_two_groups_are_told_apart_only_if_their_bits_are_worth_it():
    """Three points at 0 and one at 1. Two groups take 4 · 0.811 bits, one group leaves an error of 0.75."""
    points, weights = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.double), torch.ones(4, dtype=torch.double)
    labels, means = codebooks._clustered(points, weights, 2, 0.2, 0)
    assert labels[3] != labels[0] and sorted(means.flatten().tolist()) == [0, 1]
    assert codebooks._bits(labels, 2)[labels].tolist() == pytest.approx([math.log2(4 / 3)] * 3 + [2])
    labels, means = codebooks._clustered(points, weights, 2, 2.0, 0)
    assert labels.tolist() == [0, 0, 0, 0] and means.flatten().tolist() == [0.25]


def test_dear_bits_make_smaller_files_of_larger_errors(tmp_path):
    errors, sizes = [], []
    for bit_cost in (0.0, 3.0):
        coded = quantization.coded(NETWORK, 16, bit_cost=bit_cost)
        errors.append(sum((inner(coded)[name].weight - conv.weight).square().sum().item() for name, conv in inner(NETWORK).items()))
        quantization.save_coded(tmp_path / "a.pt", coded, {})
        sizes.append(checkpoints.read_tensors(tmp_path / "a.pt")["n_bytes"])
    assert errors[0] < errors[1] and sizes[0] > sizes[1]


def test_renewed_pieces_go_where_error_and_bits_together_cost_least():
    coded = quantization.coded(EVEN, 8, bit_cost=0.3, renew_every=1).train()
    conv = coded.layer2[0].conv2
    code, original = conv.parametrizations.weight[0], conv.parametrizations.weight.original
    with torch.no_grad():
        original.add_(0.3 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0)) * original.std())
    conv.weight  # noqa: B018 - renews
    points = (original / code.scale.view(-1, 1, 1, 1)).reshape(-1, 9)
    squared = torch.cdist(points, code.codebook.representatives).square()
    assert torch.equal(code.labels, (squared + code.price.unsqueeze(1) * code.codebook.bits).argmin(1))
    assert not torch.equal(code.labels, squared.argmin(1))
    # A filter of twice the scale costs four times as much per error, so a bit costs a quarter of it.
    assert (code.price * code.scale.square().repeat_interleave(len(code.price) // len(code.scale))).std() < 1e-4 * code.price.mean()


def codes(network):
    return [conv.parametrizations.weight[0] for conv in inner(network).values()]


@pytest.mark.parametrize("network", [EVEN, COMPACT], ids=["whole", "compact"])
@pytest.mark.parametrize(
    ("pieces", "scope", "n"), [("kernel", "network", 5), ("row", "layer", 3), ("weight", "stage", 2), ("filter", "layer", 4)]
)
def test_files_give_back_the_network(network, pieces, scope, n, tmp_path):
    coded = quantization.coded(network, n, pieces=pieces, scope=scope).eval()
    quantization.save_coded(tmp_path / "a.pt", coded, {"seed": 1})
    read, facts = quantization.load_coded(tmp_path / "a.pt")
    inputs = IMAGES.normalised(IMAGES[:8].pixels)
    expected = coded(inputs)
    assert facts == {"seed": 1} and (read(inputs) - expected).abs().max() < 5e-3 * expected.abs().max()
    assert sorted(read.state_dict()) == sorted(network.state_dict())
    if pieces == "weight":
        assert len(read.layer3[0].conv2.weight.unique()) <= n


@pytest.mark.parametrize("network", [EVEN, COMPACT], ids=["whole", "compact"])
def test_compact_files_are_smaller_and_give_back_nearly_the_network(network, tmp_path):
    coded = quantization.coded(network, 5).eval()
    for code in codes(coded):
        code.labels[code.labels == 2] = 4  # a representative that no piece has is not in the file
    config, inputs = copy.deepcopy(coded.config), IMAGES.normalised(IMAGES[:8].pixels)
    expected = coded(inputs)
    sizes = {}
    for compact in (False, True):
        quantization.save_coded(tmp_path / "a.pt", coded, {"seed": 1, "rates": [0.1]}, compact=compact)
        sizes[compact] = (tmp_path / "a.pt").stat().st_size
    content = compact_files.read_either(tmp_path / "a.pt")
    read, facts = quantization.load_coded(tmp_path / "a.pt")
    assert content["sizes"] == [4] and len(content["data"]) + 200 < sizes[True] < sizes[False] - 1500
    assert facts == {"seed": 1, "rates": [0.1]} and read.config == coded.config == config
    assert (read(inputs) - expected).abs().max() < 0.1 * expected.abs().max()
    first = (tmp_path / "a.pt").read_bytes()
    quantization.save_coded(tmp_path / "a.pt", coded, facts, compact=True)
    assert (tmp_path / "a.pt").read_bytes() == first


@given(st.booleans(), st.floats(-6, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_representatives_come_back_within_half_a_step(own_steps, exponent, seed):
    coded = quantization.coded(EVEN, 5, pieces="row", scope="layer")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for code in codes(coded):
            values = torch.randn(code.codebook.representatives.shape, generator=generator).sinh()  # some are much larger than most
            code.codebook.representatives.copy_(10**exponent * values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        quantization.save_coded(path, coded, {}, compact=True, own_steps=own_steps)
        read = inner(quantization.load_coded(path)[0])
    for code, name in zip(codes(coded), inner(coded), strict=True):
        expected = code.codebook.representatives.detach()[code.labels]
        largest = expected.abs().amax(1, keepdim=True) if own_steps else expected.abs().max()
        step = largest * (2 if own_steps else 1) / 127  # by a power of two too large
        assert ((read[name].weight.view(expected.shape) - expected).abs() <= 0.501 * step).all()


def test_steps_of_their_own_keep_a_network_most_of_whose_pieces_share_a_small_representative(tmp_path):
    coded = quantization.coded(model.ResNet(8, (4, 8, 8)), 8, pieces="row").eval()
    book = codes(coded)[0].codebook
    with torch.no_grad():
        common = torch.cat([code.labels for code in codes(coded)]).mode().values
        for code in codes(coded):
            code.labels[torch.rand(code.labels.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = common
        book.representatives[common] = book.representatives.abs().max() / 127 * torch.tensor([0.49, -0.49, 0.49])
    inputs = IMAGES.normalised(IMAGES[:8].pixels)
    expected, errors, kept = coded(inputs), {}, {}
    for own_steps in (False, True):
        quantization.save_coded(tmp_path / "a.pt", coded, {}, compact=True, own_steps=own_steps)
        read = quantization.load_coded(tmp_path / "a.pt")[0]
        errors[own_steps] = (read(inputs) - expected).abs().mean().item()
        kept[own_steps] = inner(read)["layer2.0.conv2"].weight.view(-1, 3)[codes(coded)[3].labels == common]
    assert (kept[False] == 0).all() and ((kept[True] / book.representatives[common] - 1).abs() < 0.01).all()
    assert errors[True] < errors[False] / 2


def test_representatives_of_zeros_and_of_extreme_sizes_come_back(tmp_path):
    coded = quantization.coded(EVEN, 4, pieces="row")
    book = codes(coded)[0].codebook
    with torch.no_grad():
        book.representatives.copy_(torch.tensor([[0.0, 0, 0], [1e-12, 0, 0], [1, -1, 0.5], [1e-3, 0, 1e-3]]))
    quantization.save_coded(tmp_path / "a.pt", coded, {}, compact=True)
    weight = inner(quantization.load_coded(tmp_path / "a.pt")[0])["layer2.0.conv2"].weight.view(-1, 3)
    expected = book.representatives.detach()[inner(coded)["layer2.0.conv2"].parametrizations.weight[0].labels]
    torch.testing.assert_close(weight, expected, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(("facts", "message"), [({"shape": (3, 3)}, "lists instead of tuples"), ({"of": {1: 2}}, "texts as keys")])
def test_facts_that_a_compact_file_would_change_are_refused(facts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantization.save_coded(tmp_path / "a.pt", quantization.coded(EVEN, 4), facts, compact=True)
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("network", [EVEN, COMPACT], ids=["whole", "compact"])
@pytest.mark.parametrize(
    ("pieces", "scope", "n"),
    [("kernel", "network", 5), ("row", "stage", 3), ("weight", "network", 2), ("weight", "network", 1), ("filter", "layer", 4)],
)
def test_a_code_in_contexts_changes_nothing_but_bytes(network, pieces, scope, n, tmp_path):
    coded = quantization.coded(network, n, pieces=pieces, scope=scope).eval()
    read = {}
    for contexts in (False, True):
        quantization.save_coded(tmp_path / "a.pt", coded, {}, compact=True, contexts=contexts)
        read[contexts] = quantization.load_coded(tmp_path / "a.pt")[0].state_dict()
    assert list(read[True]) == list(read[False])
    assert all(torch.equal(read[True][name], tensor) for name, tensor in read[False].items())
    with pytest.raises(ValueError, match="contexts is True, which requires compact=True"):
        quantization.save_coded(tmp_path / "a.pt", coded, {}, contexts=True)


@given(st.data(), st.integers(0, 5), st.floats(0.5, 8))
@settings(deadline=None, max_examples=50)
def test_codes_in_contexts_give_back_the_indices(data, seed, power):
    shapes = st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3)
    books = data.draw(st.lists(st.tuples(st.integers(1, 9), shapes), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    numbers = [(size, sum(math.prod(shape) for shape in own)) for size, own in books]
    indices = torch.cat([(size * torch.rand(n, generator=generator) ** power).int() for size, n in numbers])
    stream = context_codes.context_coded(indices, books)
    assert torch.equal(context_codes.context_decoded(stream, books), indices)
    longer = torch.cat([stream, torch.zeros(4, dtype=torch.uint8)])
    for other in (stream[:-1], longer) if len(stream) else (longer,):  # an only representative takes no bytes
        with pytest.raises(ValueError, match=f"its {len(other)} bytes of indices are not those of {len(indices)} pieces"):
            context_codes.context_decoded(other, books)


def test_bytes_that_no_indices_give_are_refused():
    """The decoder itself stops at some of these, with an error of its own."""
    books = [(7, [(2, 4, 2), (1, 2, 4)])]
    indices = (7 * torch.rand(24, generator=torch.Generator().manual_seed(4)) ** 8).int()
    stream = context_codes.context_coded(indices, books)
    for n_bytes in range(len(stream)):
        with pytest.raises(ValueError, match=f"its {n_bytes} bytes of indices are not those of 24 pieces"):
            context_codes.context_decoded(stream[:n_bytes], books)


def test_codes_in_contexts_take_the_entropy_given_layer_and_channel():
    """Channels that have other pieces than the most frequent one, and layers with frequencies of their own, need not be told."""
    generator = torch.Generator().manual_seed(0)
    shape, layers, entropy = (64, 32, 3), [], 0.0
    for _ in range(4):
        shares = torch.rand(1, 32, 1, generator=generator).round() * 0.9 + 0.05  # of pieces with another one, by channel
        others = torch.rand(7, generator=generator) ** 4
        others /= others.sum()
        has_other = torch.rand(shape, generator=generator) < shares
        drawn = torch.multinomial(others, has_other.numel(), replacement=True, generator=generator).view(shape)
        layers.append(torch.where(has_other, 1 + drawn, 0).flatten())
        of_others = -(others * others.log2()).sum()
        entropy += 64 * 3 * (-shares * shares.log2() - (1 - shares) * (1 - shares).log2() + shares * of_others).sum().item() / 8
    indices = torch.cat(layers)
    n_bytes = len(context_codes.context_coded(indices, [(8, [shape] * 4)]))
    without = len(coded_files._compressed(indices, torch.zeros(0, dtype=torch.uint8), 8)["data"])
    assert 0.97 * entropy < n_bytes < 1.2 * entropy and n_bytes < 0.7 * without


@pytest.mark.parametrize("compact", [False, True])
def test_networks_whose_values_fit_come_back_exactly(compact, tmp_path):
    """Rounding is all that a file changes: a network that needs none is the same."""
    coded = quantization.coded(EVEN, 4, pieces="kernel").eval()
    with torch.no_grad():
        for code in {code.codebook: code for code in codes(coded)}.values():
            code.codebook.representatives.copy_(code.codebook.representatives.half())
            if compact:
                step = code.codebook.representatives.abs().max() / 127
                code.codebook.representatives.copy_((code.codebook.representatives / step).round() * step)
        for name, norm in model.batch_norms(coded).items():
            norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
            code = coded.get_submodule(name).parametrizations.weight[0]
            (code.scale if name != "conv1" else code.start).fill_(0.25)
        coded.fc.parametrizations.weight[0].start.fill_(0.5)
        coded.fc.bias.zero_()
    quantization.save_coded(tmp_path / "a.pt", coded, {}, compact=compact)
    inputs = IMAGES.normalised(IMAGES[:8].pixels)
    torch.testing.assert_close(quantization.load_coded(tmp_path / "a.pt")[0](inputs), coded(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coded", [coded_files._deflated, coded_files._compressed])
def test_indices_take_about_their_entropy(coded):
    generator = torch.Generator().manual_seed(0)
    for shares in (torch.ones(64), torch.rand(100, generator=generator) ** 3, torch.tensor([0.7, 0.1, 0.1, 0.1])):
        shares = shares / shares.sum()
        indices = torch.multinomial(shares, 30_000, replacement=True, generator=generator)
        data = coded(indices, torch.zeros(0, dtype=torch.uint8), len(shares))["data"]
        entropy = -(shares * shares.log2()).sum().item() * len(indices) / 8
        assert entropy < len(data) < 1.06 * entropy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": lambda data: data[:-1]}, "bytes of tensors, expected"),
        ({"sizes": lambda sizes: [3]}, "bytes of tensors, expected|has the index"),
        ({"n_bytes": lambda n: n - 9}, "do not fill"),
        ({"coding": lambda coding: {"pieces": "filters", "scope": "network"}}, "KeyError"),
        ({"bits": lambda bits: 1}, "do not fill"),
        ({"config": lambda config: config | {"depth": 14}}, "do not fill"),
        ({"n_bytes": None}, "do not fill|LZMAError"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    quantization.save_coded(tmp_path / "a.pt", quantization.coded(EVEN, 4), {})
    content = checkpoints.read_tensors(tmp_path / "a.pt")
    checkpoints.write_tensors(altered(content, change), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"is damaged: .*({message})"):
        quantization.load_coded(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": lambda data: data[:-40]}, "bytes of indices are not those of"),
        ({"data": lambda data: data[:-1]}, "bytes of indices are not those of"),
        ({"n_bytes": lambda n: n - 4}, "bytes of indices are not those of"),
        ({"n_bytes": lambda n: n - 40}, "do not fill"),
        ({"n_bytes": None}, "KeyError"),
        ({"sizes": lambda sizes: [5]}, "do not fill"),
        ({"config": lambda config: config | {"stage_widths": [4096] * 3}}, "bytes for 100,663,296 pieces"),  # takes no time
    ],
)
def test_damaged_files_with_contexts_are_refused(change, message, tmp_path):
    quantization.save_coded(tmp_path / "a.pt", quantization.coded(EVEN, 4), {}, compact=True, contexts=True)
    compact_files.write_compact(altered(compact_files.read_either(tmp_path / "a.pt"), change), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        quantization.load_coded(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": lambda data: data[:-40]}, "do not fill"),
        ({"data": lambda data: data[:0]}, "is damaged"),
        ({"sizes": lambda sizes: [3]}, "do not fill"),
        ({"sizes": None}, "holds no network of codebooks"),
        ({"own_steps": lambda own: False}, "do not fill"),
        ({"own_steps": None}, "do not fill"),
        ({"config": lambda config: config | {"stage_widths": [4096] * 3}}, "do not fill"),  # claims much, and takes no memory
        ({"facts": lambda facts: {"text": "0" * 2**21}}, "expected a text of at most 1,048,576 bytes"),
    ],
)
def test_damaged_compact_files_are_refused(change, message, tmp_path):
    quantization.save_coded(tmp_path / "a.pt", quantization.coded(EVEN, 4), {}, compact=True)
    compact_files.write_compact(altered(compact_files.read_either(tmp_path / "a.pt"), change), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        quantization.load_coded(tmp_path / "a.pt")


def altered(content, change):
    """The content with some of its values changed, or left out."""
    left = {name: value for name, value in content.items() if change.get(name, True) is not None}
    return left | {name: function(content[name]) for name, function in change.items() if function}


def test_a_flipped_bit_in_a_compact_file_is_found(tmp_path):
    path = tmp_path / "a.pt"
    quantization.save_coded(path, quantization.coded(EVEN, 4), {}, compact=True)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|was refused"):
            quantization.load_coded(path)


def test_an_index_beyond_its_codebook_is_refused(tmp_path):
    coded = quantization.coded(EVEN, 4)
    codes(coded)[0].labels[0] = 4
    with pytest.raises(ValueError, match=r"layer1.0.conv1 has the index 4, expected at most 3"):
        quantization.save_coded(tmp_path / "a.pt", coded, {})
    assert not (tmp_path / "a.pt").exists()
    quantization.save_coded(tmp_path / "a.pt", quantization.coded(EVEN, 5), {})
    content = checkpoints.read_tensors(tmp_path / "a.pt")
    n, data = content["n_bytes"], content["data"]
    checkpoints.write_tensors(content | {"sizes": [4], "data": torch.cat([data[:n], data[n + 18 :]])}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"is damaged: .* has the index 4, expected at most 3"):
        quantization.load_coded(tmp_path / "a.pt")


def test_what_does_not_fit_into_the_file_is_refused(tmp_path):
    coded = quantization.coded(EVEN, 4)
    with torch.no_grad():
        coded.layer1[0].bn1.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"layer1.0.conv1.shift have values beyond 65,504"):
        quantization.save_coded(tmp_path / "a.pt", coded, {})
    assert not (tmp_path / "a.pt").exists()


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ResNet has no codebooks, expected a network from quantization.coded"):
        quantization.save_coded(tmp_path / "a.pt", EVEN, {})
    checkpoints.save_checkpoint(tmp_path / "b.pt", EVEN, {})
    with pytest.raises(ValueError, match="holds no network of codebooks"):
        quantization.load_coded(tmp_path / "b.pt")


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="pieces is 'pair', expected one of filter, pair of kernels, kernel, row, weight"):
        quantization.coded(NETWORK, 4, pieces="pair")
    with pytest.raises(ValueError, match="scope is 'block', expected one of layer, stage, network"):
        quantization.coded(NETWORK, 4, scope="block")
    with pytest.raises(ValueError, match="n_representatives is 99999, expected at most the number of pieces, "):
        quantization.coded(NETWORK, 99999)
    with pytest.raises(ValueError, match="representatives is 'best', expected one of k-means, random"):
        quantization.coded(NETWORK, 4, representatives="best")
    with pytest.raises(
        ValueError, match="pieces is 'pair of kernels', of 18 weights, expected a divisor of the 45 of a filter of layer1.0.conv1"
    ):
        quantization.coded(model.ResNet(8, (5, 8, 8)), 4, pieces="pair of kernels")
    statistics = calibration.layer_statistics(NETWORK, IMAGES[:20])
    with pytest.raises(ValueError, match="weighting is 1.5, expected a number from 0 to 1"):
        quantization.coded(NETWORK, 4, statistics=statistics, weighting=1.5)
    with pytest.raises(ValueError, match="weighting is 0.5, which requires statistics: see calibration.layer_statistics"):
        quantization.coded(NETWORK, 4, weighting=0.5)
    with pytest.raises(ValueError, match="weighting is 0.5, expected 0 for representatives that are drawn at random"):
        quantization.coded(NETWORK, 4, statistics=statistics, weighting=0.5, representatives="random")
    with pytest.raises(ValueError, match="statistics are of another model: for conv1, the filters and the values of each are"):
        quantization.coded(EVEN, 4, statistics=statistics, weighting=0.5)
    with pytest.raises(ValueError, match="bit_cost is -0.1, expected a finite number of at least 0"):
        quantization.coded(NETWORK, 4, bit_cost=-0.1)
    with pytest.raises(ValueError, match="bit_cost is inf, expected a finite number of at least 0"):
        quantization.coded(NETWORK, 4, bit_cost=float("inf"))
    with pytest.raises(ValueError, match="bit_cost is 0.5, expected 0 for representatives that are drawn at random"):
        quantization.coded(NETWORK, 4, bit_cost=0.5, representatives="random")


@given(st.integers(0, 5), st.integers(1, 300), st.sampled_from([1, 2, 7, 8, 16]), st.floats(0.2, 8))
@settings(deadline=None, max_examples=30)
def test_streams_give_back_what_they_were_made_of(seed, n, bits, power):
    """Whatever the bytes: few symbols that are frequent (`power`), or all alike."""
    data = (256 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** power).to(torch.uint8)
    stream = compact_files.compressed(data, bits)
    assert torch.equal(compact_files.decompressed(stream, bits, n), data) and len(stream) < n + 25
    with pytest.raises(ValueError, match=f"its weights do not fill {n + 1} bytes"):
        compact_files.decompressed(stream, bits, n + 1)


def test_the_shorter_of_two_codes_is_taken():
    """Frequencies that change from half to half suit the adaptive code, those that stay the other."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randint(0, 16, (5000,), generator=generator, dtype=torch.uint8) + start for start in (0, 16)]
    mixed = torch.cat(halves)[torch.randperm(10_000, generator=generator)]
    changing, staying = (compact_files.compressed(data, 8) for data in (torch.cat(halves), mixed))
    assert changing[0] == 0 and staying[0] != 0
