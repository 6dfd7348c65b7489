"""CIFAR-10 and scikit-learn's digits as tensors on a device, and augmented batches that are cut there."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .arguments import Count, Integer, Natural, Seed
from .files import DATASETS, ROOT


@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images of one split, on one device.

    Attributes
    ----------
    pixels : uint8 tensor of shape (N, 3, 32, 32)
    labels : int64 tensor of shape (N,)
    dataset : name of the data set, one of `files.DATASETS`
    classes : names of the classes, by label
    mean, std : per colour channel, of pixels scaled to [0, 1]; the network sees (pixel - mean) / std
    flips : whether a mirrored image still shows its class (digits do not)

    Raises
    ------
    ValueError : pixels or labels of the wrong type or shape, no images, labels without a class, or a `std` that is not positive
    """

    pixels: Tensor
    labels: Tensor
    dataset: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flips: bool

    def __post_init__(self):
        pixels, labels, shape = self.pixels, self.labels, tuple(self.pixels.shape)
        if pixels.dtype != torch.uint8 or shape[1:] != (3, 32, 32) or not len(pixels):
            raise ValueError(f"pixels are {pixels.dtype} of shape {shape}, expected torch.uint8 of shape (N, 3, 32, 32), N ≥ 1")
        if labels.dtype != torch.int64 or labels.shape != shape[:1] or labels.device != pixels.device:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)} on {labels.device}, expected torch.int64, one for each of the "
                f"{len(pixels)} images on {pixels.device}"
            )
        if not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(f"labels are from {labels.min()} to {labels.max()}, expected numbers of the {len(self.classes)} classes")
        if not all(deviation > 0 for deviation in self.std):
            raise ValueError(f"std is {self.std}, expected positive numbers")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Images":
        """The images at `index` (a slice, or an integer or boolean tensor), as `Images`."""
        return dataclasses.replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Images":
        return dataclasses.replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def beside(self, network: nn.Module) -> "Images":
        """The images on the device that holds the network's weights. Images are moved to the network, not the network to the images."""
        return self.to(next((t.device for t in (*network.parameters(), *network.buffers())), self.device))

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    @functools.cached_property
    def _mean_and_std(self) -> list[Tensor]:  # of pixels, on their device; cached, because each batch would copy them to a GPU again
        return [torch.tensor(c, device=self.device).view(1, 3, 1, 1) * 255 for c in (self.mean, self.std)]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Convert uint8 pixels (B, 3, H, W) to the network's input, a float32, channels-last batch."""
        mean, std = (c.to(pixels.device) for c in self._mean_and_std)
        return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(self, batch_size: Count | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, unaugmented: (inputs of shape (B, 3, 32, 32), labels of shape (B,)). On a CPU, small batches are faster."""
        size = int(batch_size or (100 if self.device.type == "cpu" else 500))
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield self.normalised(pixels), labels


def load_images(name: str, root: str | Path | None = None, device: torch.device | str = "cpu") -> tuple[Images, Images]:
    """The training and the test images of a data set.

    Parameters
    ----------
    name : "cifar10" (Krizhevsky 2009: 50,000 and 10,000 images; downloaded if absent) or "digits" (scikit-learn's
        1,797 handwritten digits, enlarged from 8×8 to 32×32×3: 1,437 and 360 images; nothing to download)
    root : folder that holds ``cifar-10-batches-py``; by default ``$CIFAR10_ROOT``, or else ``data/`` of the repository

    Raises
    ------
    ValueError : unknown `name`, or a file of the archive that is truncated or altered
    FileNotFoundError : CIFAR-10 is missing and cannot be downloaded
    """
    if name not in DATASETS:
        raise ValueError(f"data set is {name!r}, expected one of {', '.join(DATASETS)}")
    train, test = _cifar10(Path(root or os.environ.get("CIFAR10_ROOT") or ROOT / "data")) if name == "cifar10" else _digits()
    return train.to(device), test.to(device)


def _cifar10(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10  # imported here because it takes as long to import as torch, and digits do not need it
    from torchvision.datasets.utils import calculate_md5

    folder = root / CIFAR10.base_folder
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    # Checked before anything is read: the files are pickles, and only their MD5 makes them safe to open.
    for file, md5 in files:
        path = folder / file
        if path.exists() and (found := calculate_md5(path)) != md5:
            raise ValueError(
                f"{path} is truncated or altered: its MD5 is {found}, expected {md5}. "
                f"Delete it and run again to download CIFAR-10 afresh, or replace it with a good copy."
            )
    try:
        parts = [CIFAR10(root, train=train, download=not all((folder / f).exists() for f, _ in files)) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {folder} and could not be downloaded ({error}). Put the unpacked archive "
            f"(folder {CIFAR10.base_folder}) into {root}, or set the environment variable CIFAR10_ROOT to the folder that "
            f'holds it; or use the data set "digits", which needs no download.'
        ) from error
    known = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "flips": True}  # of the 50,000 training images
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return tuple(Images(*each, "cifar10", tuple(parts[0].classes), **known) for each in zip(pixels, labels, strict=True))


def _digits() -> tuple[Images, Images]:
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(grey, size=(32, 32), mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    indices = train_test_split(np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    names = tuple(str(n) for n in digits.target_names)
    everything = Images(pixels, labels, "digits", names, mean=(0.3054,) * 3, std=(0.3237,) * 3, flips=False)
    return tuple(everything[torch.from_numpy(np.sort(index))] for index in indices)


def hold_out(images: Images, n: Integer, seed: Seed = 0) -> tuple[Images, Images]:
    """Split training images into (the rest, `n` held-out ones), the same way for the same seed.

    Raises
    ------
    ValueError : `n` leaves one of the two parts empty
    """
    if not 0 < n < len(images):
        raise ValueError(f"{n} images to hold out, expected from 1 to {len(images) - 1}, of {len(images)} images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(int(seed))).to(images.device)
    return images[order[n:].sort().values], images[order[:n].sort().values]


class Batches:
    """Augmented training batches, cut on the device that holds the images.

    Images are cropped at random after zero padding, and flipped horizontally where the data set allows it. All random choices of an
    epoch are drawn at once, from `seed` and the epoch's number only. Any epoch can be replayed, on any device, without those before it.

    Parameters
    ----------
    images : images to draw from; each epoch visits every image once, except those of an incomplete last batch
    batch_size : images per batch
    padding : pixels by which an image may be shifted in each direction
    views : number of epochs after which crops and flips repeat, with the images in another order; 0 for new ones in each epoch
    alternating : mirror each image in every other epoch instead of at random (Jordan 2024, *94% on CIFAR-10 in 3.29 Seconds*)
    seed : of order and augmentation
    """

    def __init__(
        self, images: Images, batch_size: Count, *, padding: Natural = 4, views: Natural = 0, alternating: bool = False, seed: Seed = 0
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size is {batch_size}, expected from 1 to the number of images, {len(images)}")
        self.images, self.batch_size, self.padding, self.seed = images, int(batch_size), padding, seed
        self.views, self.alternating = views, alternating

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, number: Integer, size: Integer = 32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one epoch: inputs of shape (batch_size, 3, size, size), labels, and the indices of the images.

        A `size` below 32 makes an epoch cheaper. It crops more, from less padding, so that shifts keep their range.
        """
        order = torch.randperm(len(self.images), generator=self._generator(number)).to(self.images.device)
        return self._cut(order[: len(self) * self.batch_size], number % self.views if self.views else number, size)

    def view(self, number: Integer, size: Integer = 32) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches with the crops and flips of view `number`, in the order of the images, including an incomplete last batch."""
        return self._cut(torch.arange(len(self.images), device=self.images.device), number, size)

    def _generator(self, *numbers: Integer) -> torch.Generator:
        # Deliberately on the CPU: every device gets the same choices, moved there once per epoch.
        return torch.Generator().manual_seed(int(np.random.SeedSequence((self.seed, *numbers)).generate_state(1)[0]))

    def _cut(self, picked: Tensor, view: Integer, size: Integer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        images, n, device = self.images, len(self.images), self.images.device
        padding = max(0, self.padding - (32 - size) // 2)
        generator = self._generator(view)
        place = torch.randperm(n, generator=generator).argsort().to(device)  # choices are drawn in the order of the view's first epoch
        corners = torch.randint(32 + 2 * padding - size + 1, (2, n), generator=generator).to(device)[:, place]
        flips = (torch.rand(n, generator=generator) < 0.5).to(device)[place]
        if self.alternating:
            flips = (torch.rand(n, generator=self._generator(0, 1)) < 0.5).to(device) ^ bool(view % 2)
        for part in picked.split(self.batch_size):
            padded = F.pad(images.pixels[part], [padding] * 4)
            windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, shifts, shifts, size, size), a view
            pixels = windows[torch.arange(len(part), device=device), :, corners[0, part], corners[1, part]]
            pixels = torch.where((flips[part] & images.flips).view(-1, 1, 1, 1), pixels.flip(3), pixels)
            yield images.normalised(pixels), images.labels[part], part
