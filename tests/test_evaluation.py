import pytest
import torch
from torch import nn

from resnet_pruning import evaluation
from resnet_pruning.model import ResNet

LOGITS = torch.eye(3)[[0, 0, 1, 2, 2, 1]]
LABELS = torch.tensor([0, 0, 1, 2, 1, 0])


def test_known_answers():
    assert evaluation.accuracy_of(LOGITS, LABELS) == pytest.approx(100 * 4 / 6)
    torch.testing.assert_close(evaluation.per_class_accuracy(LOGITS, LABELS), torch.tensor([200 / 3, 50, 100]))


def test_each_module_keeps_its_mode(small_images):
    network = ResNet(8, (2, 2, 2)).train()
    network.bn1.eval()
    evaluation.predict(network, small_images[:4])
    assert not network.bn1.training and network.training and network.layer1.training


def test_a_model_that_reads_the_label_off_the_image_is_always_right(small_images, device):
    images = small_images[torch.arange(50)].to(device)
    images.pixels.copy_(images.labels.view(-1, 1, 1, 1).expand_as(images.pixels) * 20)
    levels = images.normalised(torch.arange(10, dtype=torch.uint8, device=device).view(10, 1, 1, 1).expand(10, 3, 1, 1) * 20)[:, 0, 0, 0]

    class Reader(nn.Module):
        def forward(self, x):
            return -(x[:, 0, 0, 0, None] - levels).abs()

    reader = Reader()
    assert reader.training and evaluation.accuracy(reader, images) == 100 and reader.training


def test_a_model_that_fails_keeps_its_mode(small_images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(7, 10))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluation.predict(network, small_images)
    assert network.training
