"""Networks of codebooks in files: for each piece the number of its representative, entropy-coded, and little else.

Batch norm is folded into a factor and a shift for each channel; the factors absorb the scales of the filters. Representatives, factors and
shifts have 16 or 8 bits, the first and the last layer 8. Reading gives an ordinary `ResNet`, composed from all of these.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Integer
from ..checkpoints import check_plain, write_tensors
from ..model import ResNet, SharedConv2d, affine, batch_norms, convolutions, with_tensors
from .codebooks import Coded, groups
from .files import inflated, pack, read_network, split_bytes, unpack
from .learned_steps import LearnedSteps
from .quantized_model import ENDS, quantized


def save_coded(path: str | Path, network: nn.Module, facts: Mapping[str, Any], value_bits: Integer = 16) -> None:
    """Write a network of `quantization.coded`, trained or not, whole or not at all.

    `load_coded` gives this network with its representatives, scales and batch norm rounded.

    Parameters
    ----------
    value_bits : to which they are rounded: 16, floats, or 8, integers times a step for each tensor

    Raises
    ------
    ValueError : a network without codebooks; values beyond those that 16 bits can represent; facts that are not plain values; other bits
    """
    if value_bits not in (8, 16):
        raise ValueError(f"value_bits is {value_bits!r}, expected 8 or 16")
    codes = {name: _code(network, name) for name in convolutions(network)}
    if not any(isinstance(code, Coded) for code in codes.values()):
        raise ValueError(f"{type(network).__name__} has no codebooks, expected a network from quantization.coded")
    names = groups(network, **network.coding).values()
    sizes = [len(codes[group[0]].codebook.representatives) for group in names]
    for size, group in zip(sizes, names, strict=True):
        for name in group:
            _check_indices(name, codes[name].labels, size)
    bits, indices = _entropy_coded(torch.cat([codes[name].labels for group in names for name in group]).cpu(), max(sizes))
    content = {
        "config": network.config,
        "coding": network.coding,
        "sizes": sizes,
        "bits": bits,
        "value_bits": int(value_bits),
        "n_bytes": len(indices),
        "data": torch.cat([indices, *(tensor.flatten().view(torch.uint8) for tensor in _stored(network, codes, value_bits).values())]),
        "facts": dict(facts),
    }
    _rebuilt(content)  # raises an error, before writing, if this could not be read again
    write_tensors(content, path)


def load_coded(path: str | Path) -> tuple[ResNet, dict[str, Any]]:
    """Read a network of codebooks as an ordinary one, in evaluation mode on the CPU, and its facts. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged or of another length; an index beyond its codebook; no network of codebooks
    """
    keys = {"config", "coding", "sizes", "bits", "n_bytes", "data", "facts"}
    return read_network(path, _rebuilt, keys, "network of codebooks", "save_coded")


def _code(network: nn.Module, layer: str) -> Coded | LearnedSteps | None:
    module = network.get_submodule(layer)
    return module.parametrizations.weight[0] if hasattr(module, "parametrizations") else None


def _entropy_coded(indices: Tensor, n_representatives: Integer) -> tuple[int, Tensor]:
    """The bits of an index before deflation, and the deflated indices as bytes: the shortest of several attempts.

    Huffman coding needs at least one bit per symbol and does best with large alphabets, so several small indices form one symbol.
    """
    needed = max(1, (n_representatives - 1).bit_length())
    candidates = []
    for bits in {needed, 8 if needed <= 8 else 16}:
        for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
            deflate = zlib.compressobj(9, strategy=strategy)
            candidates.append((bits, deflate.compress(pack(indices, bits).numpy().tobytes()) + deflate.flush()))
    bits, shortest = min(candidates, key=lambda candidate: len(candidate[1]))
    return bits, torch.frombuffer(bytearray(shortest), dtype=torch.uint8)


@torch.no_grad()
def _stored(network: nn.Module, codes: Mapping[str, Coded | LearnedSteps], value_bits: Integer) -> dict[str, Tensor]:
    """The tensors that a file holds besides indices, in order, on the CPU."""
    values = {str(i): codes[group[0]].codebook.representatives for i, group in enumerate(groups(network, **network.coding).values())}
    for name, norm in batch_norms(network).items():
        (factor, shift), code, conv = affine(norm), codes[name], network.get_submodule(name)
        scale = (code.scale if isinstance(code, Coded) else code.steps).double().cpu()
        values[f"{name}.factor"] = factor * (scale[conv.labels.cpu()] if isinstance(conv, SharedConv2d) else scale)
        values[f"{name}.shift"] = shift
    last = _code(network, "fc")
    ends = {"fc.steps": last.steps, "fc.bias": network.fc.bias}
    if broken := [name for name, tensor in {**values, **ends}.items() if not tensor.half().isfinite().all()]:
        raise ValueError(f"{', '.join(broken[:3])} have values beyond 65,504, the largest of 16 bits")
    tensors = {}
    for name, tensor in values.items():
        if value_bits == 16:
            tensors[name] = tensor.half()
        else:
            step = (tensor.abs().max().float() / 127).clamp(min=1e-30)
            tensors |= {name: quantized(tensor, step, 0, -127, 127).to(torch.int8), f"{name}.step": step}
    tensors |= {name: tensor.half() for name, tensor in ends.items()}
    for name in ENDS:
        layer = network.get_submodule(name)
        tensors[f"{name}.codes"] = _code(network, name).codes(layer.parametrizations.weight.original).to(torch.int8)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _rebuilt(content: Mapping[str, Any]) -> ResNet:
    """The network that a file holds."""
    check_plain(content["facts"], "facts")
    with torch.device("meta"):  # no memory before the size check: an index takes a bit or more, deflation packs up to 1,032 bytes into one
        network = ResNet(**content["config"])
    layout, sizes, bits, data = groups(network, **content["coding"]), content["sizes"], content["bits"], content["data"]
    if len(sizes) != len(layout) or not all(1 <= size <= 2**16 for size in sizes):
        raise ValueError(f"it has codebooks of {sizes} representatives, expected {len(layout)} of 1 to 65,536")
    convs, norms = convolutions(network), batch_norms(network)
    pieces = {name: convs[name].weight.numel() // length for (_, length), names in layout.items() for name in names}
    n_pieces = sum(pieces.values())
    packed = inflated(data[: content["n_bytes"]], -(-bits * n_pieces // 8))
    indices = unpack(packed, bits, torch.Size([n_pieces])).split(list(pieces.values()))
    value_bits = content.get("value_bits", 16)  # the first files do not say it
    if value_bits not in (8, 16):
        raise ValueError(f"it has values of {value_bits!r} bits, expected 8 or 16")
    with torch.device("meta"):
        values = {str(i): torch.empty(size, length) for i, (size, (_, length)) in enumerate(zip(sizes, layout, strict=True))}
        for name, norm in norms.items():
            values |= {f"{name}.{part}": torch.empty(norm.num_features) for part in ("factor", "shift")}
        like = {}
        for name, tensor in values.items():
            like |= {name: tensor.half()} if value_bits == 16 else {name: tensor.char(), f"{name}.step": torch.empty(())}
        like |= {f"fc.{part}": torch.empty(network.fc.out_features).half() for part in ("steps", "bias")}
        like |= {f"{name}.codes": network.get_submodule(name).weight.char() for name in ENDS}
    tensors = split_bytes(data[content["n_bytes"] :], like)
    if value_bits == 8:
        tensors |= {name: tensors[name].float() * tensors[f"{name}.step"] for name in values}
    state = {"fc.weight": tensors["fc.codes"].float() * tensors["fc.steps"].float().unsqueeze(1), "fc.bias": tensors["fc.bias"]}
    state["conv1.weight"] = tensors["conv1.codes"].float()
    books = {name: tensors[str(i)].float() for i, names in enumerate(layout.values()) for name in names}
    for name, own in zip(pieces, indices, strict=True):
        _check_indices(name, own, len(books[name]))
        state[f"{name}.weight"] = books[name][own.long()].view(convs[name].weight.shape)
    for name, norm in norms.items():
        prefix = f"{name.replace('conv', 'bn')}."
        state |= {f"{prefix}weight": tensors[f"{name}.factor"], f"{prefix}bias": tensors[f"{name}.shift"]}
        state |= {f"{prefix}running_mean": torch.zeros(norm.num_features), f"{prefix}num_batches_tracked": torch.tensor(0)}
        state[f"{prefix}running_var"] = torch.full((norm.num_features,), 1 - norm.eps)
    return with_tensors(content["config"], state)


def _check_indices(layer: str, indices: Tensor, n_representatives: Integer) -> None:
    if int(indices.max()) >= n_representatives:
        raise ValueError(f"{layer} has the index {int(indices.max())}, expected at most {n_representatives - 1}")
