"""What disks, other processes and other people's files do: nothing is lost, and nothing is silently something else."""

import copy
import dataclasses
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from resnet_pruning import calibration, checkpoints, clustering, compaction, files, finetuning, peers, plans, pruning, quantization
from resnet_pruning.checkpoints import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from resnet_pruning.model import ResNet
from resnet_pruning.quantization import load_quantized, save_quantized
from resnet_pruning.training import Execution, Recipe, train

SMALL = (4, 6, 8)
QUICK = Recipe(epochs=2, batch_size=32, warmup_epochs=1, ema=0.9, small_share=0.0)
EAGER = {"execution": Execution(amp=False, compile=False), "progress": False}


def small_network(seed=0, widths=SMALL):
    torch.manual_seed(seed)
    return ResNet(8, widths).eval()


@pytest.fixture(params=["checkpoint", "training", "quantized"])
def written(request, tmp_path, digits):
    """A file of each kind, its loader, and what tells whether a content is the right one."""
    path, network = tmp_path / f"{request.param}.pt", small_network(widths=(1, 1, 2))
    if request.param == "checkpoint":
        save_checkpoint(path, network, {"test_accuracy": 92.03})
        return path, load_checkpoint
    if request.param == "quantized":
        save_quantized(path, quantization.quantize(network, digits[0][:16], 4, 8), {"test_accuracy": 92.03})
        return path, load_quantized
    train(network, digits[0][:64], dataclasses.replace(QUICK, epochs=1), folder=tmp_path, **EAGER)
    return (tmp_path / "state.pt").rename(path), read_tensors


def places(whole):
    """About 1,400 places in a file: all of both ends, where its parts are listed and sealed, and an odd number of bytes apart between."""
    return [*range(200), *range(200, len(whole) - 200, len(whole) // 1000 | 1), *range(len(whole) - 200, len(whole))]


def test_a_flipped_bit_anywhere_is_found(written):
    path, load = written
    whole = path.read_bytes()
    load(path)
    for i in places(whole):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=path.name):
            load(path)


def test_a_file_that_is_cut_off_anywhere_is_refused(written):
    path, load = written
    whole = path.read_bytes()
    for length in places(whole):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load(path)


def test_a_file_without_a_checksum_is_read_with_a_warning(tmp_path):
    content = {"config": small_network().config, "state_dict": small_network().state_dict(), "facts": {"seed": 1}}
    torch.save(content, tmp_path / "plain.pt")
    with pytest.warns(UserWarning, match=r"plain\.pt has no checksum"):
        assert load_checkpoint(tmp_path / "plain.pt")[1] == {"seed": 1}
    write_tensors(content, tmp_path / "sealed.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path / "sealed.pt")
    # Others read it, too, and results go on knowing it by the same name.
    assert torch.load(tmp_path / "sealed.pt", weights_only=True)["facts"] == {"seed": 1}
    plain = io.BytesIO()
    torch.save(content, plain)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sealed.pt").write_bytes(plain.getvalue())
    assert files.fingerprint(tmp_path / "sealed.pt") == files.fingerprint(tmp_path / "other" / "sealed.pt")


HOSTILE = {
    "a configuration of other tensors": {"config": {"depth": 20, "stage_widths": (9000, 9000, 9000)}, "state_dict": {}, "facts": {}},
    "one value that is said to be many": {"state_dict": {"fc.weight": torch.zeros(1).expand(10, 150_000_000)}},
    "wide batch norms": {
        "state_dict": {f"layer{s}.0.bn{n}.weight": torch.zeros(20_000) for s in (1, 2, 3) for n in (1, 2)} | {"fc.weight": torch.zeros(1)}
    },
    "a deep network": {"config": {"depth": 6 * 10**7 + 2}, "state_dict": small_network().state_dict(), "facts": {}},
    "quantized, of many bits": {
        "config": {"depth": 8, "stage_widths": (1, 1, 1), "inner_widths": {}},
        "bits": {"weights": dict.fromkeys([*map(str, range(8))], 40), "activations": 8, "ends": 8},
        "layers_with_levels": ["0"], "data": torch.zeros(10, dtype=torch.uint8), "facts": {},
    },
    "quantized, wide": {
        "config": {"depth": 8, "stage_widths": (9000, 9000, 9000)},
        "bits": {"weights": dict.fromkeys([*map(str, range(8))], 8), "activations": 8, "ends": 8},
        "layers_with_levels": [], "data": torch.zeros(10, dtype=torch.uint8), "facts": {},
    },
    "quantized, deep": {
        "config": {"depth": 6 * 10**7 + 2}, "bits": {"weights": {}, "activations": 8, "ends": 8},
        "layers_with_levels": [], "data": torch.zeros(10, dtype=torch.uint8), "facts": {},
    },
}  # fmt: skip
WITHIN_A_LIMIT = """
import resource, sys, warnings
from resnet_pruning.checkpoints import load_checkpoint
from resnet_pruning.quantization import load_quantized
warnings.simplefilter("ignore")
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        (load_quantized if "quantized" in path else load_checkpoint)(path)
    except ValueError as error:
        assert path in str(error) and "alloc" not in str(error) and "MemoryError" not in str(error), error
    else:
        raise AssertionError(path)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to know how much memory is in use")
def test_what_a_file_claims_takes_no_memory(tmp_path):
    paths = []
    for name, content in HOSTILE.items():
        torch.save(content, tmp_path / f"{name}.pt")
        paths.append(tmp_path / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**30))
    assert (tmp_path / "deflated.pt").stat().st_size < 2**21
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_A_LIMIT, *paths, tmp_path / "deflated.pt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


WRITER = """
import sys, torch
from resnet_pruning.model import ResNet
from resnet_pruning.checkpoints import save_checkpoint
torch.manual_seed(int(sys.argv[2]))
network = ResNet(8, (4, 6, 8))
print("ready", flush=True)
for _ in range(15):
    save_checkpoint(sys.argv[1], network, {"writer": int(sys.argv[2])})
"""


def test_of_two_writers_of_one_file_one_is_left_and_readers_see_whole_ones(tmp_path):
    path = tmp_path / "network.pt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)], stdout=subprocess.PIPE, text=True) for n in (0, 1)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    expected = [small_network(n).conv1.weight for n in (0, 1)]
    n_read = 0
    while any(writer.poll() is None for writer in writers) or n_read < 2:
        if path.exists():
            network, facts = load_checkpoint(path)
            assert torch.equal(network.conv1.weight, expected[facts["writer"]])
            n_read += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["network.pt"]


def test_a_file_stays_a_link_and_keeps_its_mode(tmp_path):
    target, link = tmp_path / "target.pt", tmp_path / "link.pt"
    save_checkpoint(target, small_network(), {"n": 1})
    target.chmod(0o640)
    link.symlink_to(target.name)
    save_checkpoint(link, small_network(), {"n": 2})
    assert link.is_symlink() and load_checkpoint(target)[1] == {"n": 2} and target.stat().st_mode & 0o777 == 0o640


def changed(change):
    network = small_network()
    change(network)
    return network


@pytest.mark.parametrize(("network", "message"), [
    (changed(lambda net: net.conv1.weight.data.fill_(float("nan"))), "conv1.weight of the network hold values that are NaN"),
    (changed(lambda net: net.bn1.running_var.fill_(float("inf"))), "bn1.running_var of the network hold values"),
    (small_network().half(), r"conv1.weight of the network is torch.float16, expected torch.float32"),
    (small_network().double(), r"is torch.float64, expected torch.float32"),
    (peers.masked(small_network()), "conv1 of the network is constrained, expected an ordinary network: see finetuning.released"),
    (changed(lambda net: setattr(net.layer1[0].conv1, "stride", (2, 2))), r"stride=\(2, 2\).*, expected what a ResNet of its"),
    (changed(lambda net: setattr(net.bn1, "eps", 0.1)), r"eps=0.1.*, expected what a ResNet"),
    (changed(lambda net: setattr(net, "fc", nn.Sequential(net.fc))), "tensors fc.weight, fc.bias, .* in one of"),
    (changed(lambda net: setattr(net, "extra", nn.Linear(2, 2))), "tensors extra.weight, extra.bias"),
    (nn.Conv2d(3, 4, 3), r"is a Conv2d, expected a resnet_pruning.ResNet; other networks with .*replace_filters, distance 'raw'"),
])  # fmt: skip
def test_what_could_not_be_read_again_is_not_written(tmp_path, network, message):
    with pytest.raises((ValueError, TypeError), match=message):
        save_checkpoint(tmp_path / "a.pt", network, {})
    assert not list(tmp_path.iterdir())


def test_a_type_that_cannot_hold_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype is torch.int32, expected torch.float32, torch.bfloat16 or torch.float16"):
        save_checkpoint(tmp_path / "a.pt", small_network(), {}, dtype=torch.int32)


def test_numbers_of_numpy_do_not_stop_a_network_from_being_read_again(tmp_path):
    network = ResNet(np.int64(8), np.array(SMALL).tolist(), {"layer1.0.conv1": np.int64(3)}, np.int32(7))
    save_checkpoint(tmp_path / "a.pt", network, {})
    assert load_checkpoint(tmp_path / "a.pt")[0].config == network.config
    with pytest.raises(ValueError, match=r"facts\['accuracy'\] holds a numpy.float64"):
        save_checkpoint(tmp_path / "b.pt", network, {"accuracy": np.float64(91.0)})
    with pytest.raises(ValueError, match=r"b\.pt is not written, since it could not be read again: .*code, maybe"):
        write_tensors({"seed": np.int64(3)}, tmp_path / "b.pt")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_training_goes_on_only_where_all_that_decides_it_is_the_same(tmp_path, digits):
    images, other_images = digits[0][:64], digits[0][64:128]
    clusters = clustering.cluster_layers(small_network(), plans.uniform_fraction(small_network(), 0.5))

    def run(folder, start=small_network, images=images, **settings):
        network = start()
        return network, train(network, images, QUICK, folder=tmp_path / folder, **EAGER | settings)

    run("plain", held_out=other_images)
    run("taught", teacher=small_network(1))
    run("projected", lambda: finetuning.projected(small_network(), clusters, 1))
    relabelled = dataclasses.replace(images, labels=images.labels.flip(0))
    for folder, what, changes in [
        ("plain", "network", {"start": lambda: small_network(5)}),
        ("plain", "network", {"start": lambda: finetuning.tied(small_network(), clusters)}),
        ("plain", "network", {"start": lambda: changed(lambda net: net.conv1.weight.requires_grad_(False))}),
        ("plain", "images", {"images": other_images}),
        ("plain", "images", {"images": relabelled}),
        ("plain", "held-out images", {"held_out": images}),
        ("plain", "seed", {"seed": 1}),
        ("plain", "teacher", {"teacher": small_network(1)}),
        ("taught", "held-out images", {"teacher": small_network(1)}),
        ("taught", "teacher", {"teacher": small_network(2)}),
        ("projected", "network", {"start": lambda: finetuning.projected(small_network(), clusters, 2)}),
    ]:
        before = (tmp_path / folder / "state.pt").read_bytes()
        settings = {"held_out": other_images} | changes
        with pytest.raises(ValueError, match=f"holds another training: .*{what}.* differ"):
            run(folder, **settings)
        assert (tmp_path / folder / "state.pt").read_bytes() == before


def test_a_training_goes_on_with_the_network_that_it_left(tmp_path, digits, monkeypatch):
    """A cell of a notebook is run again: the network is no longer the one that the training began with."""
    network = small_network()
    first = train(network, digits[0][:64], QUICK, folder=tmp_path, seed=np.int64(3), **EAGER)
    weights = network.conv1.weight.clone()
    monkeypatch.setattr("resnet_pruning.training._epoch", None)
    again = train(network, digits[0][:64], QUICK, folder=tmp_path, seed=3, **EAGER)
    assert again.equals(first) and torch.equal(network.conv1.weight, weights)


def test_a_history_longer_than_the_recipe_is_refused(tmp_path, digits):
    train(small_network(), digits[0][:64], QUICK, folder=tmp_path, **EAGER)
    state = read_tensors(tmp_path / "state.pt")
    for history in (state["history"] + [state["history"][-1] | {"epoch": 3}], state["history"][1:]):
        write_tensors(state | {"history": history}, tmp_path / "state.pt")
        with pytest.raises(ValueError, match=f"has a history of {len(history)} epochs, expected 1 to 2, in order"):
            train(small_network(), digits[0][:64], QUICK, folder=tmp_path, **EAGER)
    write_tensors({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is not the state of a training"):
        train(small_network(), digits[0][:64], QUICK, folder=tmp_path, **EAGER)


HOLDING = """
import sys, time
from resnet_pruning.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["training", "sweep"])
def test_a_second_writer_is_refused_until_the_first_ends_or_is_killed(tmp_path, digits, monkeypatch, kind):
    from test_sweeps import Number, sweeps

    def write():
        if kind == "training":
            return train(small_network(), digits[0][:64], QUICK, folder=tmp_path / "there", **EAGER)
        return sweeps.run_sweep(lambda point: {"square": point.x**2}, [Number(2)], tmp_path / "there", progress=False)

    monkeypatch.setattr(files, "PATIENCE", 0.1)
    first = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "there")], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=r"another process is writing to .*there, expected one at a time"):
        write()
    first.send_signal(signal.SIGKILL)
    first.wait()
    write()


def test_writing_is_interrupted_at_any_moment_without_a_loss(tmp_path):
    """A process that saves without end is killed again and again: what is there is always whole."""
    code = textwrap.dedent(WRITER).replace("range(15)", "range(10**6)")
    for n in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "network.pt"), str(n)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.02 * (n + 1))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if (tmp_path / "network.pt").exists():
            assert load_checkpoint(tmp_path / "network.pt")[1]["writer"] <= n


@pytest.mark.parametrize(
    "name",
    [
        "compact",
        "expanded",
        "replace_filters",
        "load",
        "quantized",
        "quantize",
        "train",
        "plans",
        "released",
        "part_timings",
        "compress_by_plan",
        "layer_errors",
    ],
)
def test_global_random_numbers_are_left_alone(tmp_path, digits, name):
    network, images = small_network(), digits[0][:200]
    replaced = pruning.replace_filters(network, plans.uniform(network, 2))
    save_checkpoint(tmp_path / "a.pt", network, {})
    save_quantized(tmp_path / "q.pt", quantization.quantize(network, images[:16]), {})
    calls = {
        "compact": lambda: compaction.compact(replaced),
        "expanded": lambda: compaction.expanded(compaction.compact(replaced)),
        "replace_filters": lambda: pruning.replace_filters(network, plans.uniform(network, 2), batch_norm_images=images),
        "load": lambda: load_checkpoint(tmp_path / "a.pt"),
        "quantized": lambda: load_quantized(tmp_path / "q.pt"),
        "quantize": lambda: quantization.quantize(network, images, 4, rounding="block", n_steps=2, progress=False),
        "train": lambda: train(copy.deepcopy(network), images, QUICK, teacher=network, **EAGER),
        "plans": lambda: peers.prune_weights(network, 0.5, "random"),
        "released": lambda: finetuning.released(finetuning.tied(network, clustering.cluster_layers(network, plans.uniform(network, 2)))),
        "part_timings": lambda: part_timings(network, rounds=1, progress=False),
        "compress_by_plan": lambda: compress_by_plan(network, plans.uniform(network, 3), images, n_steps=2, progress=False),
        "layer_errors": lambda: layer_errors(network, images, shares=[0.5], drops=True, progress=False),
    }
    from resnet_pruning.compression import compress_by_plan, layer_errors, part_timings

    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    calls[name]()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))  # noqa: NPY002


@pytest.mark.parametrize("constrain", ["tied", "masked"])
def test_what_works_on_weights_refuses_those_that_are_computed(constrain, digits):
    from resnet_pruning.compression import compress, compress_by_plan, rescale_like

    network = small_network()
    plan = plans.uniform(network, 2)
    constrained = finetuning.tied(network, clustering.cluster_layers(network, plan)) if constrain == "tied" else peers.masked(network)
    for work in [
        lambda: pruning.replace_filters(constrained, plan),
        lambda: rescale_like(constrained, network),
        lambda: compaction.compact(constrained),
        lambda: compress(constrained, digits[0]),
        lambda: compress_by_plan(constrained, plan, digits[0]),
        lambda: quantization.quantize(constrained, digits[0]),
        lambda: peers.prune_units(constrained, plan),
    ]:
        with pytest.raises(ValueError, match="of the network is constrained, expected an ordinary network: see finetuning.released"):
            work()


def test_digests_see_every_value_and_not_where_it_lies():
    weight = torch.randn(4, 3, 3, 3)
    digest = checkpoints.digest("a", [weight])
    assert digest == checkpoints.digest("a", [weight.contiguous(memory_format=torch.channels_last)])
    weight[3, 2, 1, 0] += 1e-6
    assert digest != checkpoints.digest("a", [weight]) and checkpoints.digest("b", [weight]) != checkpoints.digest("a", [weight])


def test_statistics_and_clusters_that_are_not_finite_are_refused():
    moments = torch.ones(27), torch.eye(27), torch.ones(4)
    for i in range(3):
        broken = [moment.clone() for moment in moments]
        broken[i].flatten()[0] = float("nan")
        with pytest.raises(ValueError, match=r"(?s)LayerStatistics.__init__\(\) parameter .*violates.*isfinite"):
            calibration.LayerStatistics(*broken)
    clusters = clustering.cluster_filters(small_network().conv1, 2)
    with pytest.raises(ValueError, match=r"(?s)Clusters.__init__\(\) parameter gains=.*isfinite"):
        dataclasses.replace(clusters, gains=clusters.gains * float("inf"))
