"""What is committed is the real thing, whole, and says of itself what is so."""

import subprocess

import nbformat
import pandas as pd
import pytest
import torch

from resnet_pruning import checkpoints, compression, cost, data, evaluation, plans, quantization
from resnet_pruning.deployment import runtimes
from resnet_pruning.files import ROOT, fingerprint, unsealed
from resnet_pruning.report import analysis, methods, tables
from resnet_pruning.report.notebooks import lasting
from resnet_pruning.studies import base, currencies, method_runs, protocol, quantization_runs, right_answers, size_runs, sweeps
from resnet_pruning.studies.pruning_runs import PruningRuns

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BASE = base.base_checkpoint("cifar10", "full")  # the network that the sweeps were made on
KEPT = [path.stem for pattern in ("macs", "fast") for path in sorted((ROOT / "checkpoints").glob(f"resnet20_{pattern}*.pt"))]
FIGURES = sorted((ROOT / "figures").glob("*.png"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_ran_in_order_without_errors_or_warnings(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook == lasting(notebook), "it holds times or paths of the machine that it ran on"
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values = {}
    exec(parameters.source, values)
    assert (values["dataset"], values["profile"]) == ("cifar10", "full")


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_each_figure_has_its_numbers(path):
    assert path.with_suffix(".csv").stat().st_size > 0


def test_the_checkpoint_has_the_accuracy_that_it_claims(cifar10):
    network, facts = checkpoints.load_checkpoint(ROOT / "checkpoints" / "resnet20.pt")
    assert cost.parameters(network) == 269_722
    accuracy = evaluation.accuracy(network, cifar10[1])
    assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.05)
    assert accuracy >= 93.2


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints").rglob("*.pt")), ids=lambda path: path.stem)
def test_each_network_is_sealed(path):
    assert unsealed(path)[1]


def test_rows_were_measured_on_networks_that_are_here():
    known = {fingerprint(path) for path in (ROOT / "checkpoints").glob("*.pt")}
    tables = [table for path in (ROOT / "figures").glob("*.csv") if "base" in (table := pd.read_csv(path))]
    assert len(tables) > 10 and set().union(*(table.base for table in tables)) <= known


@pytest.mark.parametrize("name", KEPT)
def test_pruned_checkpoints_have_the_size_and_the_accuracy_that_they_claim(cifar10, name):
    network, facts = checkpoints.load_checkpoint(ROOT / "checkpoints" / f"{name}.pt")
    whole, _ = checkpoints.load_checkpoint(BASE)
    assert facts["base"] == fingerprint(BASE)
    size = cost.parameters(network), cost.macs(network)
    assert size == (facts["parameters"], facts["macs"]) == compression.cost_of_plan(whole, facts["plan"], merged=True)
    if "macs" in name:
        budget = int(name.removeprefix("resnet20_macs"))
        assert budget - 1 < 100 * cost.macs(network) / cost.macs(whole) <= budget
    assert evaluation.accuracy(network, cifar10[1]) == pytest.approx(facts["test_accuracy"], abs=0.05)
    row = pd.read_csv(ROOT / "figures" / "kept_networks.csv").set_index("checkpoint").loc[name]
    assert (row.parameters, row.macs, row.accuracy) == (facts["parameters"], facts["macs"], facts["test_accuracy"])


def test_pruned_networks_that_are_compared_are_here_and_were_trained_alike():
    table = pd.read_csv(ROOT / "figures" / "kept_networks.csv")
    assert set(table.checkpoint.dropna()) == set(KEPT) and len(set(table.epochs)) == 1
    assert table.learning_rate.tolist() == [protocol.rate_of("by sensitivity", share) for share in table.macs_share]
    timed = pd.read_csv(ROOT / "figures" / "benchmark_inference.csv")
    assert set(timed.network) == {"resnet20", *KEPT}


def test_times_are_predicted_within_a_factor():
    table = pd.read_csv(ROOT / "figures" / "compact_predicted.csv")
    assert (table.own_speedup / table.predicted).between(0.6, 1.6).all() and set(table.batch_size) == {1, 256}


@pytest.mark.parametrize("name", ["resnet20_first_choosing", "resnet20_choosing"])
def test_the_checkpoint_for_choices_has_not_seen_the_images_that_it_is_judged_on(cifar10, name):
    """A network that had would know more than 95 % of them."""
    network, facts = checkpoints.load_checkpoint(ROOT / "checkpoints" / f"{name}.pt")
    _, held_out = data.hold_out(cifar10[0], 5000)
    assert facts["n_train_images"] == 45_000
    assert evaluation.accuracy(network, held_out) == pytest.approx(facts["held_out_accuracy"], abs=0.1) and facts["held_out_accuracy"] < 95


@pytest.mark.parametrize("name", ["resnet20", "resnet20_macs50", KEPT[-1]])
def test_onnxruntime_gives_the_same_predictions_on_test_images(cifar10, name, tmp_path):
    network, _ = checkpoints.load_checkpoint(ROOT / "checkpoints" / f"{name}.pt")
    runtimes.to_onnx(network, tmp_path / "network.onnx")
    ours, theirs = evaluation.predict(network, cifar10[1][:1000]), runtimes.predict_onnx(tmp_path / "network.onnx", cifar10[1][:1000])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * ours.abs().max().item())
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def measured(name, **settings):
    """The row of a committed sweep with these settings, on the network that it was last measured on."""
    table = pd.read_csv(ROOT / "figures" / f"{name}.csv", keep_default_na=False)
    table = table[table.base == table.base.iloc[-1]]
    for column, value in settings.items():
        table = table[table[column] == value]
    (row,) = table.itertuples()
    return row


def test_half_of_the_channels_inside_blocks_cost_what_is_recorded_with_least_squares(cifar10):
    row = measured("compact_repair", level=0.5, repair="least squares", selection="elimination", batch_norm="as it is", seed=0)
    runs = PruningRuns(str(BASE), "cifar10")
    plan = plans.uniform_fraction(runs.material.network, 0.5, "*.conv1")
    (point,) = runs.compression_points({(row.plan, row.measure, row.level): plan}, repair=["least squares"])
    assert runs.measure_compressed(point)["accuracy"] == pytest.approx(row.accuracy, abs=0.5)


@pytest.mark.parametrize(
    "name",
    [
        *("prune_uniform", "prune_sensitivity", "prune_ends", "prune_ends_fine_tuned", "compact_repair", "compact_allocation"),
        *("baselines_weights", "untrained", "currencies", "kept_networks", "quantize", "bytes", "entropy_constrained"),
    ],
)
def test_sweeps_were_made_from_the_committed_checkpoint(name):
    table = pd.read_csv(ROOT / "figures" / f"{name}.csv")
    made_from = table.get("pruned", pd.Series("", table.index)).fillna("")
    prints = {of: fingerprint(BASE.with_stem(of) if of else BASE) for of in made_from.unique()}
    assert (table.base == made_from.map(prints)).all()
    keys = list(table)[: list(table).index("accuracy")]
    assert not table.duplicated(keys).any()


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_sweeps_row_can_be_measured_again(cifar10, share):
    settings = {"distance": "correlation", "weighting": 0.5}
    row = measured("prune_uniform", plan="uniform fraction", level=share, images="test", seed=0, **settings)
    runs = PruningRuns(str(ROOT / "checkpoints" / f"{row.base.split()[0]}.pt"), "cifar10")
    plan = plans.uniform_fraction(runs.material.network, share)
    (point,) = runs.points({(row.plan, row.measure, row.level): plan}, distance=["correlation"], weighting=[0.5])
    assert runs.measure(point)["accuracy"] == pytest.approx(row.accuracy, abs=2)  # k-means may end in another optimum on another processor


@pytest.mark.parametrize("name, stage", [("untrained", "new batch-norm statistics"), ("currencies", "fine-tuned")])
def test_all_ways_to_prune_are_compared_at_the_same_macs(name, stage):
    table = pd.read_csv(ROOT / "figures" / f"{name}.csv")
    assert set(table.method) <= set(method_runs.METHODS) and set(table.stage) == {stage}
    # With the same share in every block there are few sizes, and between the two main levels the largest that fits is a little smaller.
    least = table.level.isin(currencies.BETWEEN).map({True: 0.98, False: 0.99})
    in_steps = table.method == currencies.ALONE[1]  # a block is a ninth of the network
    assert (table.macs_share / table.level).between(least.mask(in_steps, 0.8), 1).all()


@pytest.mark.parametrize("name", ["untrained", "currencies"])
def test_all_that_is_compared_has_three_seeds(name):
    table = pd.read_csv(ROOT / "figures" / f"{name}.csv")
    table = table[(table.epochs <= protocol.EPOCHS) & table.level.isin([*currencies.LEVELS, 1])]
    assert (table.groupby(["method", "level"]).seed.agg(set) == {0, 1, 2}).all()


def test_all_that_is_compared_was_trained_alike():
    table = pd.read_csv(ROOT / "figures" / "currencies.csv")
    assert set(table.epochs) <= {protocol.EPOCHS, currencies.LONGER, currencies.LONGEST} and set(table.teacher) == {"resnet20"}
    assert table.learning_rate.tolist() == [protocol.rate_of(row.method, row.level) for row in table.itertuples()]
    asked = currencies.all_points(method_runs.MethodRuns(str(ROOT / "checkpoints" / "resnet20.pt"), "cifar10"))
    assert len(sweeps.finished(asked, ROOT / "figures" / "currencies.csv")) == len(table)


def test_gpus_and_cpus_train_equally_well_as_the_method_page_says():
    table = pd.read_csv(ROOT / "figures" / "currencies.csv").query("epochs == @protocol.EPOCHS and level < 1")
    means = table.pivot_table(index=["level", "method"], columns="device", values="accuracy").dropna()
    gain = means.cuda - means.cpu
    error = gain.std() / len(gain) ** 0.5
    assert f"{gain.mean():.2f} points higher (mean over {len(gain)} methods and budgets, standard error {error:.2f})" in (
        ROOT / "docs" / "method.md"
    ).read_text(encoding="utf-8")
    assert abs(gain.mean()) < error


def test_the_best_method_of_others_ties_with_this_projects_as_the_findings_say():
    runs = method_runs.MethodRuns(str(ROOT / "checkpoints" / "resnet20.pt"), "cifar10")
    points = currencies.trained(runs, (currencies.CURVES[0], currencies.BEST_RIVAL), (0.5,), currencies.SEEDS, protocol.EPOCHS)
    answers = sweeps.read_details(ROOT / "figures" / "currencies.csv", "right", points).groupby("method").answers
    ours, theirs = (right_answers.of_seeds(seeds, 10_000) for _, seeds in answers)
    assert ours.shape == theirs.shape == (3, 10_000)
    assert right_answers.compared(ours, theirs)["p_value"] > 0.05


def test_at_equal_parameters_allocation_is_behind_as_the_findings_say():
    equal = tables.equally_tuned(ROOT / "figures")
    for share in (0.33, 0.4, 0.49, 0.6):
        parameters = methods.at_equal(equal[equal.method.isin(currencies.CURVES)], share).parameters
        assert parameters["by sensitivity, inside blocks"] < parameters["elimination, reconstruction"]


def test_a_method_has_one_size_at_each_budget():
    """But for clusters by correlation, of which there are as many as leave the budget."""
    for name in ("untrained", "currencies"):
        table = pd.read_csv(ROOT / "figures" / f"{name}.csv").query("method != @analysis.CORRELATED")
        sizes = table.groupby(["method", "level"]).parameters
        assert (sizes.min() == sizes.max()).all()


def test_the_wide_network_was_pruned_and_trained_like_the_others():
    wide = ROOT / "checkpoints" / "resnet20_wide.pt"
    table = pd.read_csv(ROOT / "figures" / "currencies_wide.csv")
    assert set(table.base) == {fingerprint(wide)} and set(table.teacher) == {"resnet20_wide"} and set(table.epochs) == {protocol.EPOCHS}
    assert table.learning_rate.tolist() == [protocol.rate_of(row.method, row.level) for row in table.itertuples()]
    controls = pd.read_csv(ROOT / "figures" / "controls_wide.csv").set_index("network")
    pruned = controls[controls.index.str.startswith("doubled widths")]
    as_long = controls.loc["resnet20_35epochs, from scratch"]
    assert set(pruned.epochs) == {as_long.epochs} and as_long.macs_share == 1
    is_half = pruned.index.str.endswith("half as many MACs")
    assert pruned.macs_share[~is_half].between(0.99, 1).all() and pruned.macs_share[is_half].between(0.49, 0.5).all() and is_half.sum() == 4
    _, facts = checkpoints.load_checkpoint(ROOT / "checkpoints" / "resnet20_35epochs.pt")
    assert facts["test_accuracy"] == as_long.accuracy and facts["teacher"] == "resnet20_wide" and facts["epochs"] == as_long.epochs


def test_the_main_figure_shows_the_newest_rows():
    drawn = pd.read_csv(ROOT / "figures" / "main_result.csv").set_index(["panel", "what", "stage"])["mean"]
    for panel, rows in analysis.main_result(analysis.compared_methods(ROOT / "figures")).items():
        for (what, stage), accuracy in rows.groupby(["what", "stage"]).accuracy.mean().items():
            assert drawn[panel, what, stage] == pytest.approx(accuracy, abs=0.006), "run notebook 05"


@pytest.mark.parametrize("method", ["geometric median", "Neuron Merging"])
def test_rows_of_other_ways_to_prune_can_be_measured_again(cifar10, method):
    row = measured("untrained", method=method, level=0.5, stage="new batch-norm statistics", seed=0)
    runs = method_runs.MethodRuns(str(ROOT / "checkpoints" / "resnet20.pt"), "cifar10")
    (point,) = runs.comparison_points([method], [0.5], stage=["new batch-norm statistics"])
    again = runs.measure_method(point)
    assert again["macs"] == row.macs and again["accuracy"] == pytest.approx(row.accuracy, abs=0.3)


@pytest.mark.parametrize("bits, tolerance", [(8, 0.1), (4, 0.3)])
def test_recorded_accuracies_of_quantized_networks_are_measured_again(cifar10, bits, tolerance):
    choices = {"end_bits": 8, "rounding": "nearest", "seed": 0, "bias_correction": False, "levels": "uniform"}
    row = measured("quantize", weight_bits=bits, activation_bits=bits, **choices)
    runs = quantization_runs.QuantizationRuns(str(BASE), "cifar10")
    (point,) = runs.quantizing_points([(bits, bits)], end_bits=[8])
    again = runs.measure_quantized(point)
    assert again["accuracy"] == pytest.approx(row.accuracy, abs=tolerance) and again["bytes"] == row.bytes
    if bits == 8:
        assert abs(again["change"]) <= 0.15


def test_with_16_bits_the_base_predicts_what_it_does_in_floats(cifar10):
    network, _ = checkpoints.load_checkpoint(BASE)
    small = quantization.quantize(network, cifar10[0][:500], 16, 16, end_bits=16, progress=False)
    ours, theirs = (evaluation.predict(each, cifar10[1][:1000]).argmax(1) for each in (small, network))
    assert (ours != theirs).sum() <= 1
    settings = {"end_bits": 16, "rounding": "nearest", "seed": 0, "bias_correction": False, "levels": "uniform"}
    assert abs(measured("quantize", weight_bits=16, activation_bits=16, **settings).change) <= 0.05


@pytest.mark.parametrize("name, limit", [("w4a4", 150_000), ("w2a2", 80_000), ("32kB", 2**15), ("16kB", 2**14)])
def test_networks_in_few_bytes_have_the_size_and_the_accuracy_that_they_claim(cifar10, name, limit):
    path = ROOT / "checkpoints" / f"resnet20_{name}.pt"
    network, facts = (quantization.load_coded if name.endswith("kB") else quantization.load_quantized)(path)
    row = pd.read_csv(ROOT / "figures" / "bytes.csv").set_index("checkpoint").loc[path.stem]
    assert path.stat().st_size == row.bytes_on_disk <= limit
    assert evaluation.accuracy(network, cifar10[1]) == pytest.approx(facts["test_accuracy"], abs=0.05)
    assert row.accuracy == facts["test_accuracy"]


def test_networks_in_few_bytes_were_trained_alike():
    table = pd.read_csv(ROOT / "figures" / "bytes.csv")
    trained = table[table.epochs > 0]
    assert set(trained.method) == {"learned steps", "codebook"}
    assert set(trained.epochs) == {*size_runs.ROW_RATES, size_runs.LONGEST}
    kept = trained[trained.checkpoint.notna()]
    by_method = {"learned steps": size_runs.LONGER, "codebook": size_runs.EPOCHS}
    assert len(kept) == 4 and (kept.epochs == kept.method.map(by_method)).all()
    chosen_by = trained.weight_bits.where(trained.method == "learned steps", trained.renewals)
    rates = [size_runs.RATES[method][key] for method, key in zip(trained.method, chosen_by, strict=True)]
    rates = pd.Series(rates, trained.index).mask((trained.bit_cost > 0) & (trained.epochs > size_runs.EPOCHS), size_runs.SMALLER_RATE)
    rows = (trained.bit_cost > 0) & (trained.granularity == "row")
    assert (trained.learning_rate == rates.mask(rows, trained.epochs.map(size_runs.ROW_RATES))).all()
    untrained = table[table.epochs == 0]
    assert (untrained.learning_rate == 0).all() and "learned steps" not in set(untrained.method)


def test_few_bytes_have_the_rows_that_are_asked_for_and_the_weighting_that_was_best():
    for name, checkpoint, points in (
        ("bytes", "resnet20", size_runs.all_points),
        ("entropy_constrained", "resnet20", size_runs.counted_points),
        ("bytes_trials", "resnet20_choosing", size_runs.trial_points),
    ):
        path = ROOT / "figures" / f"{name}.csv"
        asked = points(size_runs.SizeRuns(str(ROOT / "checkpoints" / f"{checkpoint}.pt"), "cifar10", taught_by=protocol.TEACHER))
        assert len(sweeps.finished(asked, path)) == len(asked) == len(pd.read_csv(path))
    trials = pd.read_csv(ROOT / "figures" / "bytes_trials.csv")
    free, counted = trials.query("epochs == 0 and bit_cost == 0"), trials.query("epochs == 0 and granularity == 'row' and bit_cost > 0")
    for rows, best in ((free, size_runs.WEIGHTING), (counted, size_runs.COUNTED_WEIGHTING)):
        assert rows.groupby("weighting").accuracy.mean().idxmax() == best and set(rows.images) == {"training"}
    assert counted.bytes_on_disk.between(28_500, 30_500).all(), "in files of about one size"


def test_no_data_set_is_committed():
    tracked = subprocess.run(["git", "ls-files", "data", "build"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert tracked.stdout.split() in ([], ["data/README.md"])
