import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_pruning import checkpoints, cost, model


def test_resnet20_has_the_published_size():
    network = model.ResNet()
    assert cost.parameters(network) == 269_722
    assert cost.macs(network) == 40_551_040
    assert len(model.convolutions(network)) == 19
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_deeper_networks_have_the_published_sizes():
    # He et al. 2015, table 6: 0.46, 0.66, 0.85 million parameters
    assert [cost.parameters(model.ResNet(depth)) for depth in (32, 44, 56)] == [464_154, 658_586, 853_018]


@pytest.mark.parametrize("depth", [0, 2, -4, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, expected 6n \\+ 2"):
        model.ResNet(depth)


@pytest.mark.parametrize("widths", [(16, 32), (0, 1, 2), (32, 16, 64)])
def test_impossible_stage_widths_are_refused(widths):
    with pytest.raises(ValueError, match="stage_widths is"):
        model.ResNet(8, widths)


def test_inner_widths_must_name_first_convolutions():
    with pytest.raises(ValueError, match=r"'layer1.0.conv2', expected one of layer1.0.conv1, layer2.0.conv1, layer3.0.conv1"):
        model.ResNet(8, inner_widths={"layer1.0.conv2": 3})
    with pytest.raises(ValueError, match="is -1, expected at least 1, or 0 to drop the block"):
        model.ResNet(8, inner_widths={"layer1.0.conv1": -1})


@pytest.mark.parametrize(
    ("shortcuts", "message"),
    [
        ({"layer1.0": [0] * 16}, "names 'layer1.0', expected one of layer2.0, layer3.0"),
        ({"layer2.0": [0] * 16}, "expected for each of the 32 channels one of the 16 before it, or -1"),
        ({"layer2.0": [16] * 32}, "expected for each of the 32 channels one of the 16 before it, or -1"),
        ({"layer3.0": [-2] * 64}, "expected for each of the 64 channels one of the 32 before it, or -1"),
    ],
)
def test_shortcuts_must_lead_from_channels_to_channels(shortcuts, message):
    with pytest.raises(ValueError, match=message):
        model.ResNet(8, shortcuts=shortcuts)


@st.composite
def networks(draw):
    stages = tuple(sorted(draw(st.lists(st.integers(1, 12), min_size=3, max_size=3))))
    depth = draw(st.sampled_from([8, 14]))
    names = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range((depth - 2) // 6)]
    inner = draw(st.dictionaries(st.sampled_from(names), st.integers(1, 12)))
    return model.ResNet(depth, stages, inner, draw(st.integers(2, 12))).eval()


@given(network=networks())
@settings(max_examples=25, deadline=None)
def test_any_widths_run_and_are_recognised_from_their_tensors(network):
    inputs = torch.randn(2, 3, 32, 32)
    again = checkpoints.from_state_dict(network.state_dict()).eval()
    inner = {n: w for n, w in network.config["inner_widths"].items() if w != network.config["stage_widths"][int(n[5]) - 1]}
    assert again.config == network.config | {"inner_widths": inner}
    assert torch.equal(again(inputs), network(inputs))
    assert network(inputs).shape == (2, network.config["n_classes"])
    assert cost.size_in_bytes(network) == sum(t.numel() * t.element_size() for t in network.state_dict().values())


@given(network=networks(), chance=st.data())
@settings(max_examples=25, deadline=None)
def test_dropped_blocks_and_other_shortcuts_come_back_from_a_checkpoint(network, chance, tmp_path_factory):
    first, second, _ = network.config["stage_widths"]
    names = [name + ".conv1" for name in model.blocks(network)]
    dropped = chance.draw(st.sets(st.sampled_from(names)))
    sources = st.one_of(st.none(), st.lists(st.integers(-1, first - 1), min_size=second, max_size=second))
    shortcuts = {} if (drawn := chance.draw(sources)) is None else {"layer2.0": drawn}
    changed = network.config | {"inner_widths": network.config["inner_widths"] | dict.fromkeys(dropped, 0), "shortcuts": shortcuts}
    network = model.ResNet(**changed).eval()
    path = tmp_path_factory.mktemp("networks") / "a.pt"
    checkpoints.save_checkpoint(path, network, {})
    again, _ = checkpoints.load_checkpoint(path)
    inputs = torch.randn(2, 3, 32, 32)
    assert again.config == network.config and torch.equal(again(inputs), network(inputs))
    assert not dropped & {*model.convolutions(again)} and cost.macs(again) == sum(cost.macs_by_layer(network).values())


@pytest.mark.parametrize("name", ["layer1.1", "layer2.0", "layer3.0", "layer3.2"])
def test_a_dropped_block_is_one_whose_last_batch_norm_is_zero(name):
    network = model.ResNet(20, (4, 6, 8)).eval()
    norm = model.blocks(network)[name].bn2
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith(f"{name}.")}
    dropped = model.with_tensors(network.config | {"inner_widths": {f"{name}.conv1": 0}}, state)
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(dropped(inputs), network(inputs))


def test_shortcuts_bring_the_named_channels():
    inner = {f"layer{stage}.{block}.conv1": 0 for stage in (1, 2, 3) for block in (0,)}
    network = model.ResNet(8, (2, 3, 5), inner, shortcuts={"layer2.0": [1, -1, 0]}).eval()
    x = torch.rand(1, 2, 8, 8)
    y = network.layer2(x)
    assert torch.equal(y, torch.stack([x[:, 1], torch.zeros(1, 8, 8), x[:, 0]], 1)[:, :, ::2, ::2])
    assert torch.equal(network.layer3(y)[:, 1:4], y[:, :, ::2, ::2])  # as usual where none are named


def test_shortcuts_take_every_other_pixel_and_pad_channels_with_zeros():
    block = model.Block(2, 3, 6, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 4:].any()


def test_checkpoints_come_back_as_they_were(tmp_path):
    network = model.ResNet(8, (4, 8, 8), {"layer2.0.conv1": 3}).eval()
    facts = {"test_accuracy": 91.5, "seed": 0, "recipe": {"epochs": 3}}
    checkpoints.save_checkpoint(tmp_path / "a.pt", network, facts)
    loaded, loaded_facts = checkpoints.load_checkpoint(tmp_path / "a.pt")
    inputs = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(inputs), network(inputs))
    assert loaded_facts == facts and loaded.config == network.config and not loaded.training


def test_published_checkpoints_load_by_name_mapping(tmp_path):
    """As in akamaster/pytorch_resnet_cifar10: trained under DataParallel, the last layer called linear, no counters."""
    network = model.ResNet(20).eval()
    published = {
        "module." + name.replace("fc.", "linear."): tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": published, "best_prec1": 91.73}, tmp_path / "resnet20.th")
    loaded, facts = checkpoints.load_checkpoint(tmp_path / "resnet20.th")
    inputs = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(inputs), network(inputs)) and facts == {}


def test_networks_with_convolutions_in_the_shortcuts_are_refused(tmp_path):
    state = model.ResNet(8).state_dict() | {"layer2.0.downsample.0.weight": torch.zeros(32, 16, 1, 1)}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is no checkpoint.*downsample"):
        checkpoints.load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_checkpoints_are_refused(tmp_path, keep):
    path = tmp_path / "a.pt"
    checkpoints.save_checkpoint(path, model.ResNet(8), {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a.pt"):
        checkpoints.load_checkpoint(path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    network = model.ResNet(8)
    content = {"config": network.config | {"depth": 14}, "state_dict": network.state_dict(), "facts": {}}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"a.pt is no checkpoint.*tensors layer1.1.conv1.weight.* in one of the network and the state dict only"
    ):
        checkpoints.load_checkpoint(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt is no checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "list.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))], ids=["zip", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, save):
    save({"state_dict": Bomb(str(tmp_path / "executed"))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt was refused.*code"):
        checkpoints.load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


def test_a_missing_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoints.load_checkpoint(tmp_path / "none.pt")


def test_facts_that_could_not_be_loaded_are_not_written(tmp_path):
    for value in (torch.__version__, {"plan": [1, torch.tensor(2)]}):  # the version is a str, but not only
        with pytest.raises(ValueError, match=r"facts\['what'\] holds a torch.*, expected plain values"):
            checkpoints.save_checkpoint(tmp_path / "a.pt", model.ResNet(8), {"what": value})
    assert not list(tmp_path.iterdir())
    checkpoints.save_checkpoint(tmp_path / "a.pt", model.ResNet(8), {"what": {"plan": {"conv1": 2}, "none": None, "both": (1, 2.0)}})
    assert checkpoints.load_checkpoint(tmp_path / "a.pt")[1]["what"]["plan"] == {"conv1": 2}


def test_shared_filters_give_the_same_outputs_and_gradients_in_both_modes():
    conv = model.SharedConv2d(3, [0, 1, 0, 2, 1], stride=2).double()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    results = []
    for training in (True, False):
        outputs = conv.train(training)(inputs)
        results.append((outputs, *torch.autograd.grad((outputs * outputs.detach().cos()).sum(), conv.weight)))
    assert results[0][0].shape == (2, 5, 4, 4) and results[0][1].shape == (3, 3, 3, 3)
    torch.testing.assert_close(results[0], results[1])
