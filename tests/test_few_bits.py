import pandas as pd
import pytest

from resnet_pruning.report import few_bits


@pytest.fixture
def own():
    return pd.DataFrame(
        {
            "weight_bits": [16, 8, 4, 4, 4],
            "activation_bits": [16, 8, 8, 8, 8],
            "rounding": ["nearest", "nearest", "nearest", "nearest", "block"],
            "bias_correction": [False, False, False, True, False],
            "change": [0.0, -0.1, -2.0, -1.0, -0.5],
            "bytes": [1000, 500, 250, 250, 250],
            "file_bytes": [900, 450, 200, 200, 200],
        }
    )


@pytest.fixture
def ready():
    kinds = ["float32", "float16", "bfloat16", "torchao int8"]
    return pd.DataFrame({"kind": kinds, "change": [0.0, 0.01, 0.02, 0.03], "bytes": [2000, 1000, 1000, 500]})


def test_bits_and_ways_are_named(own):
    assert few_bits.bits(own).tolist() == ["W16A16", "W8A8", "W4A8", "W4A8", "W4A8"]
    assert few_bits.ways(own).tolist() == ["own, nearest"] * 3 + ["own, nearest, biases", "own, blocks"]


def test_own_and_ready_ways_stand_side_by_side(own, ready):
    table = few_bits.side_by_side(own, ready)
    assert list(table) == ["W16A16", "W8A8", "W4A8"]
    assert table.loc["own, nearest"].tolist() == [0.0, -0.1, -2.0] and table.loc["own, blocks", "W4A8"] == -0.5
    assert table.loc["ready, bfloat16", "W16A16"] == 0.02 and table.loc["ready, torchao int8", "W8A8"] == 0.03
    assert table.loc["ready, float16"].count() == 1


def test_side_by_side_needs_no_16_bits_of_its_own(own, ready):
    assert list(few_bits.side_by_side(own[own.weight_bits < 16], ready)) == ["W8A8", "W4A8", "W16A16"]


def test_pruned_and_quantized_networks_are_named_and_have_one_allocation_each():
    quantized = pd.DataFrame(
        {
            "network": ["", "resnet20_macs50", "resnet20_macs50", "resnet20_macs50"],
            "weight_bits": [4, 4, 4, 3],
            "activation_bits": 8,
            "allocation": ["equal", "by sensitivity", "equal", "equal"],
            "accuracy": [91.0, 90.0, 90.5, 89.0],
        }
    )
    floats = pd.DataFrame({"network": ["", "resnet20_macs70"], "kind": ["float32", "bfloat16"], "accuracy": [92.0, 91.9]})
    everything = few_bits.pruned_and_quantized(quantized, floats)
    assert everything.what.tolist() == ["W4A8", "W4A8, by layer", "W4A8", "W3A8", "float32", "bfloat16"]
    assert everything.pruned.tolist() == ["not pruned", *["MACs: 50 %"] * 3, "not pruned", "MACs: 70 %"]
    kept = few_bits.one_allocation(everything)
    assert kept.index.tolist() == [0, 1, 3, 4, 5], "by sensitivity where it was measured, although equal bits are more accurate"


def test_the_front_has_no_row_that_another_beats():
    table = pd.DataFrame({"kB": [30, 10, 20, 20, 40, 50], "accuracy": [85.0, 80.0, 90.0, 91.0, 91.0, 92.0]})
    assert few_bits.front(table, "kB", "accuracy").index.tolist() == [1, 3, 5]
    assert few_bits.front(table, "kB", "accuracy", margin=1.0).index.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("own, nearest, biases", "custom, nearest, biases"),
        ("ready, torchao int8", "PyTorch, torchao int8"),
        ("W4A8, by layer", "W4A8, by sensitivity"),
        ("min-max", "min-max"),
    ],
)
def test_names_in_csvs_are_shown_in_readers_words(text, shown):
    assert few_bits.shown(text) == shown


def test_sizes_are_listed_by_numbers(own, ready):
    table = few_bits.sizes(own, ready)
    assert table.index.tolist() == [*ready.kind, "W16A16", "W8A8", "W4A8"]
    assert table.loc["W8A8"].tolist() == [500, 450] and table.loc["float32"].isna().tolist() == [False, True]


def test_shortfall_is_between_the_fewest_and_the_most_images_that_all_have():
    table = pd.DataFrame(
        {"n_images": [4, 16, 64, 16, 64], "rounding": ["nearest"] * 3 + ["block"] * 2, "accuracy": [50.0, 80.0, 90.0, 85.0, 91.0]}
    )
    assert few_bits.shortfall(table, "rounding") == {"nearest": 10.0, "block": 6.0}


def test_networks_in_few_bytes_are_named():
    table = pd.DataFrame(
        {
            "method": ["learned steps", "rounded to nearest", "codebook"],
            "weight_bits": [4, 2, 0],
            "activation_bits": [4, 8, 0],
            "granularity": ["weight", "weight", "kernel"],
            "n_representatives": [0, 0, 96],
            "renewals": [0, 0, 50],
            "stream_bits": [8, 0, 0],
            "weighting": [0.0, 0.0, 1.0],
            "bit_cost": [0.0, 0.0, 0.1],
            "contexts": [False, False, True],
            "own_steps": [False, False, True],
            "scope": ["network", "network", "layer"],
            "pruned": ["", float("nan"), "resnet20_macs50"],
        }
    )
    assert few_bits.kinds(table).tolist() == [
        "integers, trained",
        "integers, rounded",
        "codebook of kernels, one per layer, weighted, entropy-constrained, renewed, coded in contexts, "
        "representatives with steps of their own",
    ]
    assert ", weighted to the power of 0.5, entropy" in few_bits.kinds(table.assign(weighting=0.5)).iloc[2]
    assert few_bits.numbers_of(table).tolist() == ["W4A4, 8-bit stream", "W2A8", "96, macs50"]
    assert few_bits.numbers_of(table, pieces=True).tolist() == ["W4A4, 8-bit stream", "W2A8", "96 kernels, macs50"]


def test_weighted_codebooks_are_beside_those_that_are_not():
    rows = {"method": "codebook", "epochs": 0, "scope": "network", "granularity": "row", "n_representatives": 16}
    table = pd.DataFrame([rows | {"weighting": 0.0}, rows | {"weighting": 1.0}, rows | {"epochs": 5}, rows | {"scope": "layer"}])
    table = table.fillna({"weighting": 1.0}).assign(accuracy=[77.0, 83.0, 90.0, 85.0], bytes_on_disk=[50, 47, 47, 52])
    weighed = few_bits.weighed(table)
    assert weighed.accuracy.loc["row", 16].to_dict() == {0.0: 77.0, 1.0: 83.0}
    assert weighed.bytes_on_disk.loc["row", 16].to_dict() == {0.0: 50, 1.0: 47}


def test_gains_are_at_equal_size():
    table = pd.DataFrame(
        {
            "granularity": ["kernel", "kernel", "row", "kernel", "kernel", "kernel", "row"],
            "n_representatives": [8, 4, 4, 8, 8, 8, 4],
            "bit_cost": [0.0, 0.0, 0.0, 0.1, 0.05, 0.01, 0.1],
            "bytes_on_disk": [20, 10, 15, 14, 20, 21, 15],
            "bits_per_weight": 1.0,
            "accuracy": [80.0, 70.0, 60.0, 76.0, 80.5, 99.0, 59.0],
        }
    )
    table = pd.concat([table, table.loc[[3]].assign(bytes_on_disk=16, accuracy=78.0)])  # another seed
    gains = few_bits.gains_at_equal_size(table)
    assert gains.to_dict() == {("kernel", 15): 2.0, ("kernel", 20): 0.5, ("row", 15): -1.0}, "none for 21, larger than all others"


def test_errors_are_compared_at_equal_bits():
    table = pd.DataFrame(
        {
            "granularity": ["kernel", "kernel", "weight", "weight"],
            "bits_per_weight": [0.5, 1.5, 1.2, 2.0],
            "error": [40.0, 20.0, 30.0, 10.0],
        }
    )
    error = few_bits.error_at(table, 1.0)
    assert error["kernel"] == pytest.approx(30) and pd.isna(error["weight"])
