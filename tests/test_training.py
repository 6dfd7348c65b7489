import copy
import dataclasses
import itertools
import math
import multiprocessing
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from resnet_pruning import data, evaluation, training
from resnet_pruning.checkpoints import read_tensors
from resnet_pruning.model import ResNet
from resnet_pruning.optimizers import OPTIMIZERS
from resnet_pruning.training import Execution, Recipe, train

QUICK = Recipe(epochs=3, batch_size=32, warmup_epochs=1, ema=0.9, small_share=0.4)
EAGER = {"execution": Execution(amp=False, compile=False), "progress": False}


def weights(model):
    return torch.cat([t.flatten().float() for t in model.state_dict().values()])


def trained(images, recipe=QUICK, **settings):
    torch.manual_seed(0)
    model = ResNet(8, (4, 8, 8))
    history = train(model, images, recipe, **EAGER | settings)
    return model, history


def test_digits_are_learnt(digits):
    torch.manual_seed(0)
    model = ResNet(8, (8, 16, 16))
    recipe = Recipe(epochs=6, batch_size=64, warmup_epochs=1, ema=0.9, small_share=0.0)
    history = train(model, digits[0], recipe, held_out=digits[1], **EAGER)
    assert not model.training
    assert evaluation.accuracy(model, digits[1]) > 90
    assert history.held_out_accuracy.iloc[-1] == pytest.approx(evaluation.accuracy(model, digits[1]))
    assert history.loss.iloc[-1] < history.loss.iloc[0] / 2
    assert history.epoch.tolist() == [1, 2, 3, 4, 5, 6] and (history.images_per_second > 0).all()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small_images):
    a, b, c = (trained(small_images, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


@pytest.mark.parametrize("setting", [{"channels_last": False}, {"compile": True}, {"reuse_memory": False}])
def test_what_makes_it_faster_changes_rounding_only(small_images, setting):
    recipe = Recipe(epochs=1, batch_size=32, learning_rate=0.01, ema=0, small_share=0.0, warmup_epochs=0)
    plain, fast = (
        trained(small_images, recipe)[0],
        trained(small_images, recipe, execution=dataclasses.replace(EAGER["execution"], **setting))[0],
    )
    torch.testing.assert_close(weights(fast), weights(plain), atol=1e-4, rtol=1e-4)


def test_bfloat16_autocast_trains_about_as_well(digits):
    recipe = Recipe(epochs=3, batch_size=64, warmup_epochs=1, ema=0.9, small_share=0.0)
    losses = [trained(digits[0], recipe, execution=Execution(amp=amp, compile=False))[1].loss.iloc[-1] for amp in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_the_callers_autocast_does_not_keep_old_weights(small_images):
    execution = Execution(amp=True, compile=False)
    alone = trained(small_images, execution=execution)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = trained(small_images, execution=execution)[0]
    assert torch.equal(weights(inside), weights(alone))


def train_in_folder(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = ResNet(8, (8, 16, 16))
    recipe = Recipe(epochs=7, batch_size=32, warmup_epochs=1, ema=0.9, small_share=0.45)
    train(network, data.load_images("digits")[0][:320], recipe, folder=folder, **EAGER)
    torch.save(network.state_dict(), folder / "end.pt")


def start(folder):
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resnet_pruning.training", "resnet_pruning.data"])  # imported once for all of these processes
    process = context.Process(target=train_in_folder, args=(folder,))
    process.start()
    return process


def epochs_done(folder):
    return len(read_tensors(folder / "state.pt")["history"]) if (folder / "state.pt").exists() else 0


def test_a_killed_training_resumes_and_ends_with_the_same_weights(tmp_path):
    for kill, further_epochs in enumerate([1, 2, 1]):
        process, before = start(tmp_path / "killed"), epochs_done(tmp_path / "killed")
        while epochs_done(tmp_path / "killed") < before + further_epochs:
            assert process.is_alive(), "it ended before it was killed"
            time.sleep(0.003)
        time.sleep(0.01 * kill)  # in another place of the epoch each time
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert before < epochs_done(tmp_path / "killed") < 7
    for run in ("killed", "uninterrupted"):
        process = start(tmp_path / run)
        process.join()
        assert process.exitcode == 0
    a, b = (torch.load(tmp_path / run / "end.pt") for run in ("killed", "uninterrupted"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    histories = [pd.DataFrame(read_tensors(tmp_path / run / "state.pt")["history"]) for run in ("killed", "uninterrupted")]
    timing = ["seconds", "images_per_second"]
    pd.testing.assert_frame_equal(*(history.drop(columns=timing) for history in histories))


@pytest.mark.parametrize("anew", [False, True])
def test_ctrl_c_between_the_file_and_the_model_loses_nothing(small_images, tmp_path, monkeypatch, anew):
    """The file has an epoch more than the model, which is set back."""
    write = training.write_tensors

    def interrupted(content, path):
        write(content, path)
        if len(content["history"]) == 2:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = ResNet(8, (4, 8, 8))
    fresh = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, small_images, QUICK, folder=tmp_path, **EAGER)
    assert epochs_done(tmp_path) == 2
    goes_on = fresh if anew else model
    assert len(train(goes_on, small_images, QUICK, folder=tmp_path, **EAGER)) == 3
    assert torch.equal(weights(goes_on), weights(trained(small_images)[0]))


def test_ctrl_c_keeps_the_last_complete_epoch(small_images, tmp_path, monkeypatch):
    epoch = data.Batches.epoch

    def interrupted(self, number, size=32):
        for i, batch in enumerate(epoch(self, number, size)):
            if number == 2 and i == 1:
                raise KeyboardInterrupt
            yield batch

    expected = {}
    complete = training._Run.complete_epoch

    def remembering(run, row, path, identity):
        complete(run, row, path, identity)
        expected[row["epoch"]] = weights(run.model).clone()

    monkeypatch.setattr(training._Run, "complete_epoch", remembering)
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "epoch", interrupted)
        torch.manual_seed(0)
        model = ResNet(8, (4, 8, 8))
        with pytest.raises(KeyboardInterrupt):
            train(model, small_images, QUICK, folder=tmp_path, **EAGER)
    assert torch.equal(weights(model), expected[2])
    assert epochs_done(tmp_path) == 2
    history = train(model, small_images, QUICK, folder=tmp_path, **EAGER)
    assert len(history) == 3
    assert torch.equal(weights(model), weights(trained(small_images)[0]))


def test_a_complete_training_is_returned_without_another_step(small_images, tmp_path, monkeypatch):
    model, history = trained(small_images, folder=tmp_path)
    monkeypatch.setattr(data.Batches, "epoch", None)
    torch.manual_seed(0)
    again = ResNet(8, (4, 8, 8))
    pd.testing.assert_frame_equal(train(again, small_images, QUICK, folder=tmp_path, **EAGER), history)
    assert torch.equal(weights(again), weights(model)) and not again.training


def test_a_folder_of_another_training_is_refused_and_kept(small_images, tmp_path):
    trained(small_images, folder=tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="state.pt holds another training: recipe, seed differ"):
        trained(small_images, Recipe(epochs=2, batch_size=32, small_share=0.0), seed=4, folder=tmp_path)
    with pytest.raises(ValueError, match="images differ"):
        trained(small_images[:64], folder=tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_damaged_state_is_refused_by_name(small_images, tmp_path):
    trained(small_images, folder=tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="state.pt is truncated"):
        trained(small_images, folder=tmp_path)


def test_one_step_is_that_of_sgd_without_decay_on_batch_norm_and_biases(small_images):
    recipe = Recipe(
        epochs=1,
        batch_size=96,
        learning_rate=0.1,
        weight_decay=0.1,
        ema=0,
        small_share=0.0,
        warmup_epochs=1,
        padding=0,
        label_smoothing=0.1,
    )
    torch.manual_seed(0)
    model = ResNet(8, (4, 8, 8))
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(
        [
            {"params": [p], "weight_decay": 0.1 if name.endswith("weight") and "bn" not in name else 0.0}
            for name, p in expected.named_parameters()
        ],
        lr=recipe.learning_rate_at(1),
        momentum=0.9,
        nesterov=True,
    )
    inputs, labels, _ = next(data.Batches(small_images, 96, padding=0).epoch(0))
    F.cross_entropy(expected(inputs), labels, label_smoothing=0.1).backward()
    optimizer.step()
    train(model, small_images, recipe, **EAGER)
    torch.testing.assert_close(weights(model), weights(expected), atol=1e-5, rtol=1e-5)


def test_the_result_is_the_moving_average_of_the_steps(small_images, device, monkeypatch):
    steps = []
    step = training._Run.step

    def remembering(run, *arguments):
        steps.extend([] if steps else [run.model.fc.weight.detach().clone()])
        result = step(run, *arguments)
        steps.append(run.model.fc.weight.detach().clone())
        return result

    monkeypatch.setattr(training._Run, "step", remembering)
    model, _ = trained(small_images.to(device), Recipe(epochs=2, batch_size=32, ema=0.7, small_share=0.0))
    average = steps[0]
    for weight in steps[1:]:
        average = 0.7 * average + 0.3 * weight
    torch.testing.assert_close(model.fc.weight, average)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("views", [0, 2])
def test_recorded_steps_are_the_same(small_images, optimizer, views):
    """Also with sizes, mixtures and rates that change, and with a teacher whose memory is used by others meanwhile."""
    settings = {"learning_rate": 0.01, "small_share": 0.5, "mixup": 0.2, "mixed_share": 0.5, "optimizer": optimizer, "views": views}
    images, recipe = small_images.to("cuda"), dataclasses.replace(QUICK, epochs=4, batch_size=32, **settings)
    torch.manual_seed(0)
    start, teacher, losses = ResNet(8, (4, 8, 8)), ResNet(8, (8, 8, 8)), {}

    def use_memory(network):
        torch.full((2**24,), torch.nan, device="cuda")
        return {}

    for graphs in (False, True):
        network, settings = copy.deepcopy(start), {"execution": Execution(amp=True, compile=False, cuda_graphs=graphs)}
        losses[graphs] = train(network, images, recipe, teacher=teacher, watch=use_memory, progress=False, **settings).loss.tolist()
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


def test_frozen_parameters_stay(small_images):
    torch.manual_seed(0)
    model = ResNet(8, (4, 8, 8))
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone(), model.fc.weight.clone()
    train(model, small_images, QUICK, **EAGER)
    assert torch.equal(model.conv1.weight, before[0]) and not torch.equal(model.fc.weight, before[1])


def test_a_parametrization_is_trained_through(small_images, device):
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return torch.cat([weight, weight])

    model = ResNet(8, (4, 8, 8))
    half = torch.nn.Parameter(model.conv1.weight[:2].detach().clone())
    model.conv1.weight = half
    torch.nn.utils.parametrize.register_parametrization(model.conv1, "weight", Doubled(), unsafe=True)
    train(model, small_images.to(device), QUICK, **EAGER)
    assert torch.equal(model.conv1.weight[:2], model.conv1.weight[2:])


def test_distillation_is_hintons_loss():
    logits, targets, labels = torch.randn(5, 10), torch.randn(5, 10), torch.arange(5)
    recipe = Recipe(distillation=0.75, temperature=2.0)
    p, q = F.softmax(targets / 2, 1), F.softmax(logits / 2, 1)
    divergence = 4 * (p * (p / q).log()).sum(1).mean()
    expected = 0.25 * F.cross_entropy(logits, labels) + 0.75 * divergence
    torch.testing.assert_close(training._loss(logits, labels, targets, recipe), expected)
    assert training._loss(targets, labels, targets, Recipe(distillation=1.0)).abs() < 1e-6
    torch.testing.assert_close(training._loss(logits, labels, None, recipe), F.cross_entropy(logits, labels))


def test_a_teacher_is_asked_once_about_each_view_and_says_the_same(small_images, monkeypatch):
    recipe = dataclasses.replace(QUICK, epochs=5, views=2)
    teacher = ResNet(8, (4, 8, 8))
    asked = []
    teacher.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape))
    kept, _ = trained(small_images, recipe, teacher=teacher)
    n_views = 4  # two of small crops, two of whole images
    assert sum(shape[0] for shape in asked) == 1 + n_views * 96  # one image to see that its classes fit
    asked.clear()
    again, _ = trained(small_images, recipe, teacher=teacher)  # the next student of a sweep
    assert sum(shape[0] for shape in asked) == 1 and torch.equal(weights(again), weights(kept))
    trained(small_images, recipe, teacher=teacher, seed=1)  # who sees other views
    assert sum(shape[0] for shape in asked) == 2 + n_views * 96
    monkeypatch.setattr(training._Teacher, "outputs", lambda self, epoch, size, inputs, picked: self.network(inputs).detach())
    asked.clear()
    anew, _ = trained(small_images, recipe, teacher=teacher)
    assert sum(shape[0] for shape in asked) == 1 + 5 * 96
    torch.testing.assert_close(weights(kept), weights(anew), atol=1e-5, rtol=1e-5)


def test_teachers_that_differ_in_no_tensor_are_told_apart(small_images):
    class Scaled(torch.nn.Module):
        def __init__(self, network, factor):
            super().__init__()
            self.network, self.factor = network, factor

        def forward(self, x):
            return self.factor * self.network(x)

    recipe, network = dataclasses.replace(QUICK, views=2), ResNet(8, (4, 8, 8))
    mild, sharp = (trained(small_images, recipe, teacher=Scaled(network, factor))[1].loss for factor in (1.0, 50.0))
    assert sharp.iloc[0] > 2 * mild.iloc[0]


def test_two_trainings_at_once_have_their_own_teachers(small_images):
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.full((len(x), 10), self.value)

    batches = data.Batches(small_images, 32, views=2)
    teachers = {value: training._Teacher(Constant(value), batches, (value,)) for value in (1.0, 2.0)}
    for value, epoch in itertools.product([1.0, 2.0, 1.0], [0, 1]):
        assert (teachers[value].outputs(epoch, 32, small_images.normalised(small_images.pixels[:4]), torch.arange(4)) == value).all()


def test_a_student_comes_nearer_to_its_teacher(small_images):
    teacher, _ = trained(small_images)
    torch.manual_seed(7)
    student = ResNet(8, (4, 8, 8))
    before = F.mse_loss(evaluation.predict(student, small_images), evaluation.predict(teacher, small_images))
    recipe = Recipe(epochs=10, batch_size=32, distillation=1.0, learning_rate=0.05, ema=0, small_share=0.0)
    state = weights(teacher).clone()
    train(student, small_images, recipe, teacher=teacher, **EAGER)
    assert F.mse_loss(evaluation.predict(student, small_images), evaluation.predict(teacher, small_images)) < before
    assert torch.equal(weights(teacher), state)


@pytest.mark.parametrize("taught", [False, True])
def test_mixtures_that_are_all_of_one_image_train_as_if_there_were_none(small_images, monkeypatch, taught):
    """A share of 0 leaves the partner and what it is worth: the same batch in another order."""
    recipe = Recipe(epochs=2, batch_size=32, learning_rate=0.01, ema=0, small_share=0.0, warmup_epochs=0, mixup=1.0)
    teacher = trained(small_images)[0] if taught else None
    networks = []
    for share in (1.0, 0.0, 0.5):
        monkeypatch.setattr(Recipe, "shares", lambda self, epoch, n_steps, seed, share=share: [share] * n_steps)
        networks.append(weights(trained(small_images, recipe, teacher=teacher)[0]))
    torch.testing.assert_close(networks[1], networks[0], atol=1e-4, rtol=1e-4)
    assert (networks[2] - networks[0]).abs().max() > 0.01


def test_images_are_mixed_in_the_first_epochs_alike_after_an_interruption(small_images, tmp_path):
    recipe = dataclasses.replace(QUICK, epochs=5, mixup=0.4)
    shares = [recipe.shares(epoch, 1000, 0) for epoch in range(5)]
    assert all(((mixed > 0) & (mixed < 1)).all() and abs(mixed.mean() - 0.5) < 0.05 for mixed in shares[:4]) and (shares[4] == 1).all()
    assert not np.array_equal(shares[0], shares[1]) and not np.array_equal(shares[0], recipe.shares(0, 1000, 1))
    assert (dataclasses.replace(recipe, mixup=0.0).shares(0, 3, 0) == 1).all()

    def interrupt(averaged):
        calls.append(averaged)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}

    calls = []
    with pytest.raises(KeyboardInterrupt):
        trained(small_images, recipe, folder=tmp_path, watch=interrupt)
    assert torch.equal(weights(trained(small_images, recipe, folder=tmp_path)[0]), weights(trained(small_images, recipe)[0]))


def test_graphs_without_a_gpu_are_refused(small_images):
    with pytest.raises(ValueError, match="cuda_graphs is True for images on cpu, expected images on a CUDA GPU"):
        train(ResNet(8, (4, 4, 4)), small_images, QUICK, execution=Execution(cuda_graphs=True), progress=False)


def test_models_of_other_classes_are_refused(small_images):
    with pytest.raises(ValueError, match="the teacher has 7 outputs, expected one for each of the 10 classes of digits"):
        train(ResNet(8), small_images, QUICK, teacher=ResNet(8, n_classes=7), **EAGER)
    network = ResNet(8)
    with pytest.raises(ValueError, match="the teacher is the model itself, expected another network, or a copy"):
        train(network, small_images, QUICK, teacher=network, **EAGER)
    with pytest.raises(ValueError, match="the model has 12 outputs"):
        train(ResNet(8, n_classes=12), small_images, QUICK, **EAGER)


def test_a_diverging_training_stops_with_a_sentence_and_keeps_what_was_complete(small_images):
    model = ResNet(8, (4, 8, 8))
    before = weights(model).clone()
    recipe = Recipe(epochs=5, batch_size=32, learning_rate=1e20, ema=0, warmup_epochs=0, small_share=0.0)
    with pytest.raises(ValueError, match="the loss is nan in epoch 1; a learning rate below 1e[+]20 may help"):
        train(model, small_images, recipe, **EAGER)
    assert torch.equal(weights(model), before)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(epochs=10, learning_rate=0.4, warmup_epochs=2, small_share=0.0)
    assert [recipe.learning_rate_at(e) for e in (0, 1, 2, 6)] == pytest.approx([0, 0.2, 0.4, 0.2])
    assert recipe.learning_rate_at(10) == pytest.approx(0) and recipe.learning_rate_at(10.5) == pytest.approx(0)
    assert math.isfinite(Recipe(epochs=1, warmup_epochs=1, small_share=0.0).learning_rate_at(1))


def test_small_crops_take_two_thirds_of_the_epochs_unless_said_otherwise():
    assert [Recipe(epochs=n).small_epochs for n in (1, 2, 100)] == [0, 1, 66]
    assert dataclasses.replace(Recipe(), epochs=200).small_epochs == 132, "nothing is kept that was computed for 100 epochs"
    recipe = Recipe(epochs=3, small_share=2 / 3)
    assert [recipe.size(epoch) for epoch in range(3)] == [24, 24, 32]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", -3), ("batch_size", 0), ("learning_rate", 0), ("learning_rate", math.nan),
        ("momentum", 1.0), ("weight_decay", -1e-4), ("label_smoothing", 1.0), ("ema", 1.5), ("views", -1), ("distillation", 1.1),
        ("temperature", 0), ("small_share", 1.01), ("small_size", 40),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_are_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        Recipe(**{name: value})


def test_of_an_odd_number_of_views_two_in_a_row_would_be_mirrored_alike():
    with pytest.raises(ValueError, match="views is 3, expected an even number, because every other view is mirrored"):
        Recipe(views=3, alternating=True)
    assert Recipe(views=3).views == 3 and [Recipe(views=n, alternating=True).views for n in (0, 4)] == [0, 4]


def test_what_is_watched_becomes_columns_that_a_resumed_training_still_has(small_images, tmp_path):
    def watch(averaged):
        assert not averaged.training
        watched.append(averaged)
        listed = [averaged.fc.bias.detach().numpy()[0], np.float64(len(watched)), "text"]
        return {"norm": averaged.fc.weight.detach().norm().numpy(), "note": f"call {len(watched)}", "listed": listed}

    watched = []
    recipe = dataclasses.replace(QUICK, learning_rate=np.float64(0.1), epochs=np.int64(3))  # as they come out of tables
    model, history = trained(small_images, recipe, folder=tmp_path, watch=watch)
    assert history.note.tolist() == ["call 1", "call 2", "call 3"]
    assert history.norm.iloc[-1] == pytest.approx(float(model.fc.weight.detach().norm()))
    _, again = trained(small_images, recipe, folder=tmp_path, watch=watch)
    pd.testing.assert_frame_equal(again, history)
    assert len(watched) == 3  # nothing was trained, so nothing watched
    assert history.listed.tolist() == [[pytest.approx(listed[0]), n, "text"] for n, listed in enumerate(history.listed, start=1)]


def test_model_and_folder_agree_if_a_state_cannot_be_written(small_images, tmp_path, monkeypatch):
    write, n_written = training.write_tensors, itertools.count()

    def fail_later(content, path):
        if next(n_written):
            raise OSError("the disk is full")
        write(content, path)

    monkeypatch.setattr(training, "write_tensors", fail_later)
    torch.manual_seed(0)
    network = ResNet(8)
    with torch.no_grad(), pytest.raises(OSError, match="the disk is full"):  # it trains whatever the caller's gradient mode is
        train(network, small_images, dataclasses.replace(QUICK, epochs=3), folder=tmp_path, progress=False)
    state = read_tensors(tmp_path / "state.pt")
    assert len(state["history"]) == 1
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in network.state_dict().items())


def test_integers_are_not_averaged(small_images, device):
    """An average of labels would be another label."""

    class Counting(ResNet):
        def forward(self, x):
            self.label = 7 * (self.bn1.num_batches_tracked // 2)
            return super().forward(x)

    torch.manual_seed(0)
    model = Counting(8, (4, 8, 8))
    model.register_buffer("label", torch.tensor(0))
    train(model, small_images.to(device), Recipe(epochs=2, batch_size=32, ema=0.9, small_share=0.0), **EAGER)
    assert model.bn1.num_batches_tracked == 6 and model.label == 14
