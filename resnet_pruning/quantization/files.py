"""Quantized networks in files: weights packed at their bit width, then deflated."""

import math
import textwrap
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import Integer
from ..checkpoints import check_plain, read_tensors, write_tensors
from ..model import ResNet, convolutions
from .quantized_model import QuantizedResNet, activations, check_bits, layers

STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY)


def save_quantized(path: str | Path, network: QuantizedResNet, facts: Mapping[str, Any]) -> None:
    """Write a quantized network, whole or not at all: weights packed at their bit width, everything else as it is, then deflated.

    Integers of a bell-shaped distribution are not equally frequent, so that deflation reduces 4 bits to about 3.5 (the last step of Han et
    al., *Deep Compression*, 2016).

    Raises
    ------
    ValueError : facts that are not plain values; a network whose activations have no ranges, which `quantize` finds
    """
    if without := [name for name, activation in activations(network).items() if not activation.enabled]:
        raise ValueError(f"the activations of {without[0]} have no range, expected a network that was made by quantize")
    data = b"".join(tensor.numpy().tobytes() for tensor in _stored(network).values())
    content = {
        "config": network.config,
        "bits": network.bits,
        "layers_with_levels": [name for name, layer in layers(network).items() if layer.levels is not None],
        "data": torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8),
        "facts": dict(facts),
    }
    _rebuilt(content)  # raises an error, before writing, if this could not be read again
    write_tensors(content, path)


def load_quantized(path: str | Path) -> tuple[QuantizedResNet, dict[str, Any]]:
    """Read a quantized network, on the CPU, and its facts. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged, or holds no quantized network
    """
    return read_network(path, _rebuilt, {"config", "bits", "layers_with_levels", "data"}, "quantized network", "save_quantized")


def read_network(
    path: str | Path,
    rebuilt: Callable[[Mapping[str, Any]], ResNet | QuantizedResNet],
    keys: Collection[str],
    what: str,
    writer: str,
    read: Callable[[str | Path], Any] = read_tensors,
) -> tuple[ResNet | QuantizedResNet, dict[str, Any]]:
    """The network that `rebuilt` makes from the content, with these keys, of a file, and the file's facts. `read` gives the content; `what`
    and `writer` are for error messages.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that lacks a key, or of which no network can be made
    """
    content = read(path)
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{path} holds no {what}, expected one from quantization.{writer}")
    try:
        return rebuilt(content), content["facts"]
    except Exception as error:  # a file may hold anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
        raise ValueError(f"{path} is damaged: {reason}") from error


def _rebuilt(content: Mapping[str, Any]) -> QuantizedResNet:
    """The network that a file holds."""
    check_plain(content["facts"], "facts")
    bits, config = content["bits"], content["config"]
    for name, number in {**bits["weights"], **{name: number for name, number in bits.items() if name != "weights"}}.items():
        check_bits(number, f"bits of {name}")
    # Checked before memory is allocated: deflation packs at most 1,032 bytes of weights into one, and each layer needs its bits.
    n_layers = config["depth"] - 2 * list(config["inner_widths"].values()).count(0)
    if n_layers != len(bits["weights"]):
        raise ValueError(f"it has bits for {len(bits['weights'])} layers, expected {n_layers}")
    with torch.device("meta"):
        weights = [*convolutions(ResNet(**config)).values()]
    claimed, stored = sum(conv.weight.numel() for conv in weights) // 4, 1032 * content["data"].numel()
    if claimed > stored:
        raise ValueError(f"its weights would take {claimed:,} bytes at 2 bits each, expected at most {stored:,} bytes")
    with torch.random.fork_rng(devices=[]):
        network = QuantizedResNet(ResNet(**config).eval(), bits["weights"], bits["activations"], bits["ends"], bits.get("stream")).eval()
    for name in content["layers_with_levels"]:
        layer = layers(network)[name]
        layer.levels = torch.zeros(2**layer.bits, dtype=torch.int32)
    stored = _stored(network)
    tensors = split_bytes(inflated(content["data"], sum(tensor.nbytes for tensor in stored.values())), stored)
    for name, layer in layers(network).items():
        codes = unpack(tensors[f"{name}.codes"], layer.bits, layer.codes.shape) + layer.ends[0]
        levels = tensors.get(f"{name}.levels")
        layer.set_codes(codes, tensors[f"{name}.scale"], None if levels is None else levels.to(torch.int32))
        layer.bias, layer.factor = tensors[f"{name}.bias"], tensors.get(f"{name}.factor")
        layer.float_weight = layer.weight.clone()  # not in the file; until here, it is that of a network with random weights
    for name, quantizer in activations(network).items():
        quantizer.set_grid(float(tensors[f"{name}.scale"]), int(tensors[f"{name}.offset"]))
    return network


def _stored(network: QuantizedResNet) -> dict[str, Tensor]:
    """The tensors that a file holds of a network, in order, on the CPU."""
    tensors = {}
    for name, layer in layers(network).items():
        tensors[f"{name}.codes"] = pack(layer.codes - layer.ends[0], layer.bits)
        tensors |= {f"{name}.{key}": getattr(layer, key) for key in ("scale", "bias", "factor") if getattr(layer, key) is not None}
        if layer.levels is not None:
            tensors[f"{name}.levels"] = layer.levels.to(torch.int8)
    for name, quantizer in activations(network).items():
        tensors |= {f"{name}.scale": quantizer.scale, f"{name}.offset": quantizer.offset.to(torch.int32)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def deflated(data: bytes, strategy: Integer) -> bytes:
    """Bytes, deflated by one of `STRATEGIES`: Huffman coding needs at least one bit per symbol and does best with large alphabets."""
    deflate = zlib.compressobj(9, strategy=int(strategy))
    return deflate.compress(data) + deflate.flush()


def inflated(stream: Tensor, n_bytes: Integer) -> Tensor:
    """Inflate bytes to a uint8 tensor of length `n_bytes`. Raises a ValueError for any other length, without inflating the rest."""
    return filled(zlib.decompressobj().decompress(stream.numpy().tobytes(), n_bytes + 1), n_bytes)


def filled(data: bytes, n_bytes: Integer) -> Tensor:
    """Bytes as a uint8 tensor of length `n_bytes`. Raises a ValueError if they have another one."""
    if len(data) != n_bytes:
        raise ValueError(f"its weights do not fill {n_bytes} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def split_bytes(data: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split bytes, a uint8 tensor, into tensors with the types and shapes of `like`."""
    sizes = [tensor.nbytes for tensor in like.values()]
    if len(data) != sum(sizes):
        raise ValueError(f"it has {len(data)} bytes of tensors, expected {sum(sizes)}")
    return {
        name: part.clone().view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(like.items(), data.split(sizes), strict=True)
    }


def pack(codes: Tensor, bits: Integer) -> Tensor:
    """Integers from 0 to 2^bits - 1 as a uint8 tensor, `bits` bits each, the lowest first, without gaps."""
    values = codes.flatten().cpu().numpy().astype(np.uint16)
    return torch.from_numpy(np.packbits((values[:, None] >> np.arange(bits)) & 1 == 1, axis=None, bitorder="little"))


def unpack(packed: Tensor, bits: Integer, shape: torch.Size) -> Tensor:
    """The integers that `pack` packed, as int32."""
    values = np.unpackbits(packed.numpy(), count=bits * math.prod(shape), bitorder="little").reshape(-1, bits)
    return torch.from_numpy((values.astype(np.int32) << np.arange(bits)).sum(1).astype(np.int32)).view(shape)
