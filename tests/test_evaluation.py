import math

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


def test_two_networks_are_compared_image_by_image():
    """McNemar's own kind of table: 30 images only the second gets right, 10 only the first, of 200."""
    first, second = torch.ones(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)
    first[10:40], second[:10] = False, False
    found = evaluation.compared(first, second)
    exact = 2 * sum(math.comb(40, k) for k in range(11)) / 2**40
    assert found["difference"] == pytest.approx(10) and found["p_value"] == pytest.approx(exact)
    assert found["highest"] - 10 == pytest.approx(10 - found["lowest"]) and 3.9 < found["lowest"] < 4.1
    mirrored = evaluation.compared(second, first)
    assert mirrored["difference"] == -found["difference"] and mirrored["p_value"] == found["p_value"]
    same = evaluation.compared(first, first)
    assert same == {"difference": 0, "lowest": 0, "highest": 0, "p_value": 1}
