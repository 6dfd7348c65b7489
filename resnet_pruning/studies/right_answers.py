"""The images that the networks of a sweep get right, as one text for each network, for tests of pairs."""

import base64
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
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


def compared(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare the accuracy of two networks, from bool (N,) for each: the images that it gets right.

    Returns the difference (second minus first) and the ends of its 95 % interval, in pp, and the p-value of McNemar's exact test.
    All are computed from the images that only one of the two gets right.
    """
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    difference = (won - lost) / len(first)
    half = 1.96 * (((won + lost) / len(first) - difference**2) / len(first)) ** 0.5
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {"difference": 100 * difference, "lowest": 100 * (difference - half), "highest": 100 * (difference + half), "p_value": p_value}


def pairs(answers: Mapping[str, Tensor], chosen: Sequence[tuple[str, str]] | None = None) -> pd.DataFrame:
    """`compared` for pairs of networks, by default all pairs.

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
