"""The images that the networks of a sweep get right, as one text for each network, for tests of pairs."""

import base64
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm
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


def share_right(answers: Iterable[Tensor]) -> Tensor:
    """For each image, the share of networks that get it right: float64 (N,), from bool (N,) for each, such as one network for each seed."""
    return torch.stack(list(answers)).double().mean(0)


def compared(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compare the accuracy of two networks, or of two methods with several seeds, image by image.

    Parameters
    ----------
    first, second : whether each image is classified correctly, bool (N,), or for methods the share of seeds, from `share_right`

    Returns
    -------
    The difference (second minus first) and the ends of its 95 % interval, in pp, and a p-value: for two networks that of McNemar's exact
    test, else that of the mean difference, which is normally distributed over many images. Interval and p-value say how far the result
    depends on the images, not how far on the seeds.
    """
    gains = second.double() - first.double()
    difference, error = gains.mean().item(), gains.std(correction=0).item() / len(gains) ** 0.5
    if first.dtype == second.dtype == torch.bool:
        won, lost = int((gains > 0).sum()), int((gains < 0).sum())
        p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    else:
        p_value = float(2 * norm.sf(abs(difference) / error)) if error else float(difference == 0)
    half = 1.96 * error
    return {"difference": 100 * difference, "lowest": 100 * (difference - half), "highest": 100 * (difference + half), "p_value": p_value}


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
