"""Indices of representatives in an arithmetic code whose frequencies follow the pieces around: none of them are stored.

Deflation and LZMA see bytes. Here it is known which filter, input channel and kernel a piece belongs to, and these tell much about it: most
pieces have the most frequent representative, near zero in general, and those that have another one come together. As in DeepCABAC
(Wiedemann et al. 2020), a piece first has the most frequent representative or not, and then a certain other one. Frequencies are counts of
the pieces before, added up with fixed weights. The range coder is that of constriction (Bamler 2022).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from constriction import stream as coding
from torch import Tensor

from ..arguments import Count

Shape = tuple[int, int, int]  # of a layer's pieces: filters, channels that they read, pieces of a kernel
Book = tuple[Count, Sequence[Shape]]  # number of representatives, and the layers that share them
Code = Callable[[float, Callable[[], np.ndarray]], int]
# How many pieces of the layer a piece before counts as that is in the same kernel, or in the same channel of another filter, and how many
# the layer's share counts as. Below, for others than the most frequent one: how many pieces of the layer one counts as that came after the
# same one in its kernel, and how many the codebook's frequencies count as. Found with one trained network of rows of kernels.
KERNEL, CHANNEL, SHARE = 4, 2, 20
AFTER, CODEBOOK = 2, 150


def context_coded(indices: Tensor, books: Sequence[Book]) -> Tensor:
    """Indices (n,) of the pieces of all layers, codebook by codebook, as bytes (m,) uint8. 0 is the most frequent one of each codebook."""
    symbols, encoder = iter(indices.tolist()), coding.queue.RangeEncoder()

    def encode(rest: float, others: Callable[[], np.ndarray]) -> int:
        symbol = next(symbols)
        if rest:
            encoder.encode(int(symbol > 0), coding.model.Bernoulli(rest, perfect=False))
        if symbol and len(frequencies := others()) > 1:
            encoder.encode(symbol - 1, coding.model.Categorical(frequencies, lazy=True, perfect=False))
        return symbol

    _followed(books, encode)
    return torch.from_numpy(encoder.get_compressed().astype("<u4").view(np.uint8))


def context_decoded(stream: Tensor, books: Sequence[Book]) -> Tensor:
    """The indices (n,) int32 of which `context_coded` made bytes.

    Raises
    ------
    ValueError : bytes that it does not make
    """
    words, odd = divmod(len(stream), 4)
    decoder = coding.queue.RangeDecoder(stream[: 4 * words].numpy().view("<u4").astype(np.uint32))

    def decode(rest: float, others: Callable[[], np.ndarray]) -> int:
        if not (rest and decoder.decode(coding.model.Bernoulli(rest, perfect=False))):
            return 0
        if len(frequencies := others()) > 1:
            return 1 + decoder.decode(coding.model.Categorical(frequencies, lazy=True, perfect=False))
        return 1

    try:
        indices = torch.tensor(_followed(books, decode), dtype=torch.int32)
        if not odd and torch.equal(context_coded(indices, books), stream):  # nearly any words can be decoded to something
            return indices
    except AssertionError:  # of the decoder, which comes to words that no index gives
        pass
    n_pieces = sum(math.prod(shape) for _, shapes in books for shape in shapes)
    raise ValueError(f"its {len(stream)} bytes of indices are not those of {n_pieces:,} pieces")


class _Frequencies:
    """How often a codebook's representatives have occurred: `n` in all, `rest` others than the most frequent one; `others` (k - 1,) each of
    these, and `after` each index, in a kernel."""

    def __init__(self, size: Count):
        self.n, self.rest, self.others = 0, 0, np.zeros(size - 1)
        self.after: dict[int | None, np.ndarray] = defaultdict(lambda: np.zeros(size - 1))


def _followed(books: Sequence[Book], code: Code) -> list[int]:
    """The indices of all pieces, in order, as `code` encodes or decodes each of them, given the probability that it is not 0, and a
    function that gives the frequencies (k - 1,) of the others. Both come from sums and quotients of counts: they are the same on all
    machines."""
    indices = []
    for size, shapes in books:
        found = _Frequencies(size)
        for shape in shapes:
            indices += _layer(shape, found, code)
    return indices


def _layer(shape: Shape, found: _Frequencies, code: Code) -> list[int]:
    """The indices of a layer; they are added to what was `found`."""
    n_filters, n_channels, n_places = shape
    indices: list[int] = []
    share_before = (found.rest + 0.5) / (found.n + 1)
    rest, others, in_channels = 0, np.zeros_like(found.others), [0] * n_channels
    for kernel in range(n_filters * n_channels):
        filter_number, channel = divmod(kernel, n_channels)
        in_kernel, previous = 0, None
        for place in range(n_places):
            counted = KERNEL * in_kernel + CHANNEL * in_channels[channel] + SHARE * (rest + 2 * share_before) / (len(indices) + 2)
            of = KERNEL * place + CHANNEL * (filter_number * n_places + place) + SHARE
            index = code(counted / of if len(others) else 0.0, partial(_others, others, found, previous))  # 0: an only representative
            if index:
                rest, in_kernel = rest + 1, in_kernel + 1
                in_channels[channel] += 1
                found.rest += 1
                others[index - 1] += 1
                found.others[index - 1] += 1
                if previous is not None:
                    found.after[previous][index - 1] += 1
            indices.append(index)
            previous = index
    found.n += len(indices)
    return indices


def _others(in_layer: np.ndarray, found: _Frequencies, previous: int | None) -> np.ndarray:
    """The frequencies of the indices that are not 0, in a layer, after the one before in the kernel."""
    share = (found.others + 0.5) / (found.rest + 0.5 * len(found.others))
    return in_layer + AFTER * found.after[previous] + CODEBOOK * share
