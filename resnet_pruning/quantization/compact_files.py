"""The container of the smallest files: a zip archive of a JSON text and of compressed bytes, with the usual checksum.

PyTorch's own container takes about 2 kB for the names and places of its parts, which is much beside a network in 16 kB.
"""

import io
import json
import lzma
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import Integer
from ..checkpoints import read_tensors
from ..files import sealed, unsealed, written_whole
from .files import STRATEGIES, deflated, filled, inflated

_NAMES = ["head.json", "data"]
_HEAD_LIMIT = 2**20  # bytes
RATIO = 1032  # the largest of deflation; taken for LZMA as well, so that a small file does not fill the memory


def write_compact(content: Mapping[str, Any], path: str | Path) -> None:
    """Write plain values, and bytes under ``data`` (n,), whole or not at all.

    Raises
    ------
    ValueError : values that JSON changes, such as tuples, or keys that are not texts
    """
    head = {key: value for key, value in content.items() if key != "data"}
    text = json.dumps(head, separators=(",", ":"))
    for key, value in json.loads(text).items():
        if value != head[key]:
            raise ValueError(f"{key} is {head[key]!r}, in JSON {value!r}: expected texts as keys, and lists instead of tuples")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as records:  # an explicit `ZipInfo` has no time in it: equal networks have equal files
        records.writestr(zipfile.ZipInfo(_NAMES[0]), text, zipfile.ZIP_DEFLATED, 9)
        records.writestr(zipfile.ZipInfo(_NAMES[1]), content["data"].numpy().tobytes())
    with written_whole(path) as partial:
        partial.write_bytes(sealed(buffer.getvalue()))


def read_either(path: str | Path) -> Any:
    """The content of a file of `write_compact`, or else of `checkpoints.write_tensors`. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged, or that neither of them wrote
    """
    archive, is_sealed = unsealed(path)
    if not (is_sealed and _names(archive) == _NAMES):
        return read_tensors(path)
    try:
        return _content(archive)
    except Exception as error:  # a file may hold anything
        raise ValueError(f"{path} is damaged: {error}") from error


def _names(archive: bytes) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            return records.namelist()
    except zipfile.BadZipFile:
        return []


def _content(archive: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        head, data = records.infolist()
        if head.file_size > _HEAD_LIMIT or data.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"expected a text of at most {_HEAD_LIMIT:,} bytes, and a stream that is not deflated")
        return json.loads(records.read(head)) | {"data": torch.frombuffer(bytearray(records.read(data)), dtype=torch.uint8)}


def compressed(data: Tensor, bits: Integer) -> Tensor:
    """Bytes, a uint8 tensor, as a stream: the shortest of several attempts.

    LZMA's arithmetic code follows how frequent symbols of `bits` bits are; deflation's Huffman code does better where that does not change.
    """
    raw = data.numpy().tobytes()
    streams = [lzma.compress(raw, lzma.FORMAT_RAW, filters=_filters(bits))]
    streams += [deflated(raw, strategy) for strategy in STRATEGIES]
    return torch.frombuffer(bytearray(min(streams, key=len)), dtype=torch.uint8)


def decompressed(stream: Tensor, bits: Integer, n_bytes: Integer) -> Tensor:
    """The `n_bytes` bytes of which `compressed` made a stream. Raises a ValueError for any other length, without decompressing the rest."""
    if stream[0] != 0:  # a deflated stream begins with its method, which is not 0, an LZMA stream with a byte that is
        return inflated(stream, n_bytes)
    data = b""
    if n_bytes <= RATIO * len(stream):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(bits))
        data = decoder.decompress(stream.numpy().tobytes(), n_bytes + 1)
    return filled(data, n_bytes)


def _filters(bits: Integer) -> list[dict[str, int]]:
    # Neighbours say little about an index, so that contexts only dilute statistics, except the place in a symbol of two bytes.
    return [{"id": lzma.FILTER_LZMA1, "dict_size": 2**16, "lc": 0, "lp": int(bits == 16), "pb": 0}]
