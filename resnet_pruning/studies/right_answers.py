"""The images that the networks of a sweep get right, as one text for each network, for tests of pairs."""

import base64
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm, t
from torch import Tensor

from ..arguments import Count
from ..data import Images
from ..evaluation import predict
from ..model import AnyNetwork


def right(network: AnyNetwork, images: Images) -> Tensor:
    """Whether a network classifies each image correctly: a bool tensor (N,) on the CPU."""
    return predict(network, images).argmax(1) == images.labels.cpu()


def packed(right: Tensor) -> str:
    """A bool tensor (N,) as text."""
    return base64.b64encode(np.packbits(right.numpy())).decode()


def unpacked(text: str, n_images: Count) -> Tensor:
    """The tensor from a text of `packed`. Raises a ValueError for a text of another length."""
    data = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if len(data) != -(-n_images // 8):
        raise ValueError(f"the text holds {8 * len(data)} images, expected {n_images}")
    return torch.from_numpy(np.unpackbits(data, count=n_images).astype(bool))


def of_seeds(answers: Iterable[str], n_images: Count) -> Tensor:
    """The answers of a method with several seeds: bool (n_seeds, N), from a text of `packed` for each seed."""
    return torch.stack([unpacked(text, n_images) for text in answers])


def compared(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare the accuracy of two networks, or of two methods with several seeds, image by image.

    Parameters
    ----------
    first, second : whether each image is classified correctly: bool (N,) for a network, (n_seeds, N) for a method

    Returns
    -------
    The difference (second minus first) and the ends of its 95 % interval, in pp, and a p-value. Of two networks, the p-value is that of
    McNemar's exact test, and the interval says how far the difference depends on the images. With a method, see `worth`.
    """
    if first.ndim > 1 or second.ndim > 1:
        return worth([(first, second)])
    gains = second.double() - first.double()
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return _in_points(gains.mean().item(), 1.96 * gains.std(correction=0).item() / len(gains) ** 0.5, p_value)


def worth(changes: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What a change is worth, on average over the methods that it is made to: as `compared`, for other images and other seeds.

    Images and seeds are both samples, as cases and their readers are in medicine (Obuchowski and Rockette, Communications in Statistics,
    Simulation and Computation 24, 1995). Variances of the difference over the images and over the seeds are added, without what both
    contain: that a seed changes single images. Degrees of freedom of Student's t are Satterthwaite's.

    Parameters
    ----------
    changes : the answers of a method without and with the change, as in `compared`. Each method stands in one pair. With one seed, how far
        its accuracy depends on the seed is not known, and left out.
    """
    methods = [
        (torch.atleast_2d(answers).double(), sign / len(changes)) for pair in changes for answers, sign in zip(pair, (-1, 1), strict=True)
    ]
    gains = sum(weight * answers.mean(0) for answers, weight in methods)
    difference, variance, uncertain = gains.mean().item(), gains.var().item() / len(gains), 0.0
    for answers, weight in methods:
        n_seeds, n_images = answers.shape
        if n_seeds > 1:
            accuracies = answers.mean(1, keepdim=True)
            singly = (answers - accuracies - answers.mean(0) + answers.mean()).square().sum() / ((n_seeds - 1) * (n_images - 1))
            over_seeds = weight**2 * accuracies.var().item() / n_seeds
            variance += max(0.0, over_seeds - weight**2 * singly.item() / (n_seeds * n_images))
            uncertain += over_seeds**2 / (n_seeds - 1)
    if not variance:
        return _in_points(difference, 0.0, float(not difference))
    distribution = t(variance**2 / uncertain) if uncertain else norm
    error = variance**0.5
    return _in_points(difference, distribution.ppf(0.975) * error, 2 * distribution.sf(abs(difference) / error))


def _in_points(difference: float, half: float, p_value: float) -> dict[str, float]:
    ends = {"lowest": 100 * float(difference - half), "highest": 100 * float(difference + half)}
    return {"difference": 100 * difference, **ends, "p_value": float(p_value)}


def pairs(answers: Mapping[str, Tensor], chosen: Sequence[tuple[str, str]] | None = None) -> pd.DataFrame:
    """`compared` for pairs of networks or methods, by default all pairs.

    Returns
    -------
    DataFrame with the columns first, second, difference (second minus first, pp), lowest, highest, p_value; and tie: whether p_value is
    above 0.05
    """
    rows = [
        {"first": first, "second": second, **compared(answers[first], answers[second])}
        for first, second in chosen or itertools.combinations(answers, 2)
    ]
    table = pd.DataFrame(rows)
    return table.assign(tie=table.p_value > 0.05)
