from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from resnet_pruning import data


def test_digits_are_images_of_cifars_shape_in_a_fixed_split(digits):
    train, test = digits
    assert train.pixels.shape == (1437, 3, 32, 32) and test.pixels.shape == (360, 3, 32, 32)
    assert train.pixels.dtype == torch.uint8 and train.pixels.max() == 255
    assert test.labels.bincount().tolist() == data.load_images("digits")[1].labels.bincount().tolist()
    assert test.labels.bincount().min() >= 35 and test.labels.bincount().max() <= 37
    inputs = torch.cat([inputs for inputs, _ in train.batches()])
    assert inputs.mean().abs() < 1e-3 and (inputs.std() - 1).abs() < 1e-3


def test_cifar10_has_the_published_split_and_normalisation(cifar10):
    train, test = cifar10
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert train.classes[3] == "cat"
    pixels = train.pixels.double().div(255)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(train.mean).double(), atol=5e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(train.std).double(), atol=1e-4, rtol=0)


@given(n=st.integers(1, 1436), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_holding_out_splits_without_loss_or_overlap(digits, n, seed):
    numbered = data.dataclasses.replace(digits[0], labels=torch.arange(1437), classes=tuple(map(str, range(1437))))
    rest, held_out = data.hold_out(numbered, n, seed)
    assert len(held_out) == n
    assert torch.equal(torch.cat([rest.labels, held_out.labels]).sort().values, numbered.labels)
    assert torch.equal(held_out.labels, data.hold_out(numbered, n, seed)[1].labels)


def test_batches_repeat_for_a_seed_and_epoch_and_differ_otherwise(small_images):
    def first(seed, epoch):
        return next(data.Batches(small_images, 32, seed=seed).epoch(epoch))[0]

    assert torch.equal(first(0, 3), first(0, 3))
    assert not torch.equal(first(0, 3), first(0, 4))
    assert not torch.equal(first(0, 3), first(1, 3))


@pytest.mark.parametrize("batch_size", [1, 32, 40, 96])
def test_an_epoch_visits_each_image_at_most_once(small_images, batch_size, device):
    numbered = data.dataclasses.replace(small_images, labels=torch.arange(96), classes=tuple(map(str, range(96)))).to(device)
    batches = data.Batches(numbered, batch_size)
    seen = torch.cat([labels for _, labels, _ in batches.epoch(0)])
    assert len(seen) == len(seen.unique()) == batch_size * len(batches) == 96 // batch_size * batch_size


def test_without_augmentation_batches_are_the_images(small_images, device):
    small_images = small_images.to(device)
    inputs, labels, _ = next(data.Batches(small_images, 96, padding=0).epoch(0))
    plain = torch.cat([x for x, _ in small_images.batches()])
    for x, label in zip(inputs, labels, strict=True):
        same = (plain == x).flatten(1).all(1)
        assert label in small_images.labels[same]


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (24, 0), (28, 2)])
def test_each_augmented_image_is_a_shifted_crop_flipped_or_not(small_images, size, padding, device):
    images = data.dataclasses.replace(small_images[torch.arange(8)], flips=True, mean=(0.0,) * 3, std=(1.0,) * 3, labels=torch.arange(8))
    # Blank borders would hide shifts, so the pixels are noise.
    images.pixels.copy_(torch.randint(0, 256, images.pixels.shape, dtype=torch.uint8))
    padded = pad(images.pixels, [padding] * 4)
    seen_flips, seen_shifts = set(), set()
    for epoch in range(10):
        for inputs, labels, _ in data.Batches(images.to(device), 4).epoch(epoch, size):
            for x, label in zip((inputs * 255).round().to(torch.uint8).cpu(), labels.cpu(), strict=True):
                windows = padded[label].unfold(1, size, 1).unfold(2, size, 1)
                found = [
                    (dy, dx, flip)
                    for dy in range(windows.shape[1])
                    for dx in range(windows.shape[2])
                    for flip in (False, True)
                    if torch.equal(x.flip(2) if flip else x, windows[:, dy, dx])
                ]
                assert len(found) == 1
                seen_shifts.add(found[0][:2])
                seen_flips.add(found[0][2])
    assert seen_flips == {False, True} and len(seen_shifts) > 30
    assert {dy for dy, _ in seen_shifts} == set(range(9))


@pytest.mark.parametrize("size", [24, 32])
def test_views_come_again_in_another_order(small_images, size, device):
    numbered = data.dataclasses.replace(small_images, labels=torch.arange(96), classes=tuple(map(str, range(96))), flips=True).to(device)
    batches = data.Batches(numbered, 40, views=3, seed=5)

    def seen(batches):
        inputs, labels, picked = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels, picked)
        return picked, inputs

    whole = {view: seen(batches.view(view, size)) for view in range(3)}
    before = None
    for epoch in range(7):
        picked, inputs = seen(batches.epoch(epoch, size))
        assert torch.equal(inputs, whole[epoch % 3][1][picked])
        assert before is None or not torch.equal(picked, before)
        before = picked
    assert all(torch.equal(picked, torch.arange(96, device=picked.device)) for picked, _ in whole.values())
    assert not torch.equal(whole[0][1], whole[1][1])
    first, always_new = (seen(data.Batches(numbered, 40, views=views, seed=5).epoch(0, size)) for views in (3, 0))
    assert torch.equal(first[1], always_new[1])


def test_alternating_mirrors_an_image_in_every_other_epoch(small_images, device):
    images = data.dataclasses.replace(small_images, flips=True).to(device)
    batches = data.Batches(images, 96, padding=0, alternating=True)
    mirrored = []
    for epoch in range(4):
        ((inputs, _, picked),) = batches.epoch(epoch)
        plain = images.normalised(images.pixels[picked])
        is_mirrored = torch.zeros(96, dtype=torch.bool)
        is_mirrored[picked.cpu()] = (inputs == plain.flip(3)).flatten(1).all(1).cpu()
        assert ((inputs == plain).flatten(1).all(1).cpu() != is_mirrored[picked.cpu()]).all()
        mirrored.append(is_mirrored)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2]) and torch.equal(mirrored[1], mirrored[3])
    assert 0.3 < mirrored[0].float().mean() < 0.7


def test_digits_are_never_mirrored(small_images):
    batches = data.Batches(small_images, 96, padding=0)
    plain = {x.numpy().tobytes() for x, _ in zip(small_images.normalised(small_images.pixels), range(96), strict=True)}
    assert all(x.numpy().tobytes() in plain for x in next(batches.epoch(0))[0])


@pytest.mark.parametrize("batch_size", [0, -1, 97])
def test_batch_sizes_that_cannot_be_are_refused(small_images, batch_size):
    with pytest.raises(ValueError, match=f"batch_size(=| is ){batch_size}"):
        data.Batches(small_images, batch_size)


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="'mnist', expected one of cifar10, digits"):
        data.load_images("mnist")


@pytest.mark.parametrize("n", [0, 96, -3])
def test_holding_out_nothing_or_everything_is_refused(small_images, n):
    with pytest.raises(ValueError, match=f"{n} images to hold out, expected from 1 to 95"):
        data.hold_out(small_images, n)


def test_no_data_and_no_network_says_where_and_what_else(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.load_images("cifar10")
    for needed in (str(tmp_path), "CIFAR10_ROOT", "digits", "no route to host"):
        assert needed in str(caught.value)


def test_a_truncated_archive_file_is_named_and_not_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"\x80\x02}q\x01(")
    with pytest.raises(ValueError, match=r"data_batch_3 is truncated or altered.*Delete it"):
        data.load_images("cifar10", root=tmp_path)


def test_images_select_and_move_together(small_images, device):
    picked = small_images[torch.tensor([5, 3])]
    assert torch.equal(picked.pixels, small_images.pixels[[5, 3]]) and torch.equal(picked.labels, small_images.labels[[5, 3]])
    assert picked.to(device).device.type == picked.to(device).labels.device.type == device.type
    assert torch.equal(small_images.to(device)[torch.tensor([5, 3])].pixels.cpu(), picked.pixels)
    np.testing.assert_equal(len(picked), 2)
