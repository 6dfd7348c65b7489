import pytest
import torch
import torch.nn.functional as F

from resnet_pruning import optimizers
from resnet_pruning.model import ResNet
from resnet_pruning.training import Execution, Recipe, train

EAGER = {"execution": Execution(amp=False, compile=False), "progress": False}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_optimizer_makes_the_loss_smaller_and_decays_weights_only(small_images, name, memory_format):
    torch.manual_seed(0)
    model = ResNet(8, (4, 8, 8)).to(memory_format=memory_format)
    optimizer = optimizers.optimizer_for(model, name, 0.01, 0.1)
    decayed = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert min(decayed[0.1]) >= 2 and max(decayed[0.0]) == 1
    inputs, losses = small_images.normalised(small_images.pixels), []
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), small_images.labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_muons_update_is_that_of_torch_on_the_matrix_of_filters_in_either_memory_format(small_images):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = ResNet(8, (4, 8, 8)).to(memory_format=memory_format).double()
        weight = model.layer1[0].conv1.weight
        matrix = torch.nn.Parameter(weight.detach().flatten(1).clone())
        expected = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        optimizer = optimizers.optimizer_for(model, "Muon", 0.01, 0.1)
        F.cross_entropy(model(small_images.normalised(small_images.pixels).double()), small_images.labels).backward()
        matrix.grad = weight.grad.flatten(1).clone()
        optimizer.step()
        expected.step()
        torch.testing.assert_close(weight.flatten(1), matrix, rtol=0, atol=2e-4)  # torch orthogonalises in bfloat16
        results.append(weight.detach().contiguous())
    torch.testing.assert_close(*results, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in optimizers.OPTIMIZERS if name != "SGD"])
def test_an_interrupted_training_goes_on_with_the_optimizers_state(small_images, tmp_path, name):
    def trained(epochs_before_the_interruption):
        torch.manual_seed(0)
        model = ResNet(8, (4, 8, 8))
        folder = tmp_path / f"{epochs_before_the_interruption}"
        recipe = Recipe(epochs=3, batch_size=32, learning_rate=0.003, optimizer=name, schedule="constant", small_share=0.0, ema=0)
        if epochs_before_the_interruption:
            calls = []

            def watch(_):
                calls.append(1)
                if len(calls) > epochs_before_the_interruption:
                    raise KeyboardInterrupt
                return {}

            with pytest.raises(KeyboardInterrupt):
                train(model, small_images, recipe, folder=folder, watch=watch, **EAGER)
        train(model, small_images, recipe, folder=folder, **EAGER)
        return torch.cat([t.flatten().float() for t in model.state_dict().values()])

    assert torch.equal(trained(0), trained(2))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_what_is_frozen_or_unused_stays_as_it_is(small_images, name):
    network = ResNet(8, (4, 6, 8)).requires_grad_(False)
    network.fc.requires_grad_(True)
    network.unused = torch.nn.Conv2d(2, 2, 3)
    before = {key: value.clone() for key, value in network.named_parameters()}
    train(network, small_images, Recipe(epochs=1, batch_size=32, optimizer=name, ema=0.0), **EAGER)
    assert {key for key, value in network.named_parameters() if not torch.equal(value, before[key])} == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        optimizers.optimizer_for(network.requires_grad_(False), name, 0.1)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="name='SGDW'"):
        optimizers.optimizer_for(ResNet(8), "SGDW", 0.1)
    with pytest.raises(ValueError, match="optimizer is 'sgd', expected one of SGD, Adam"):
        Recipe(optimizer="sgd")
    with pytest.raises(ValueError, match="schedule is 'linear', expected cosine or constant"):
        Recipe(schedule="linear")


def test_a_constant_learning_rate_stays_after_warm_up():
    recipe = Recipe(epochs=10, learning_rate=0.01, warmup_epochs=2, schedule="constant")
    assert [recipe.learning_rate_at(epoch) for epoch in (1, 2, 5, 10)] == [0.005, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_state_continues_on_another_device(name):
    """What was saved on a GPU says that its steps can be recorded, which they cannot on a CPU."""
    torch.manual_seed(0)
    network, inputs = ResNet(8, (4, 4, 4)), torch.randn(8, 3, 32, 32)
    first, second = (optimizers.optimizer_for(network, name, 0.001) for _ in range(2))
    network(inputs).square().sum().backward()
    first.step()
    recorded = "'capturable': True"
    on_gpu = optimizers.continued(first.state_dict(), True)
    assert (recorded in str(on_gpu)) == (name != "SGD")
    second.load_state_dict(optimizers.continued(on_gpu, False))
    second.step()
    assert recorded not in str(second.state_dict())
