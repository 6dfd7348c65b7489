"""Networks of codebooks in files: for each piece the number of its representative, entropy-coded, and little else.

Batch norm is folded into a factor and a shift for each channel; the factors absorb the scales of the filters. Representatives, factors and
shifts have 16 bits, or 8 in compact files, the first and the last layer 8. Reading gives an ordinary `ResNet`, composed from all of these.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Integer
from ..checkpoints import check_plain, write_tensors
from ..model import ResNet, SharedConv2d, affine, batch_norms, convolutions, with_tensors
from .codebooks import Coded, groups
from .compact_files import RATIO, compressed, decompressed, read_either, write_compact
from .context_codes import Book, context_coded, context_decoded
from .files import STRATEGIES, deflated, inflated, pack, read_network, split_bytes, unpack
from .learned_steps import LearnedSteps
from .quantized_model import ENDS, quantized

HALVINGS_BITS = 4  # of how often the step of a representative is halved


def save_coded(
    path: str | Path,
    network: nn.Module,
    facts: Mapping[str, Any],
    *,
    compact: bool = False,
    contexts: bool = False,
    own_steps: bool = True,
) -> None:
    """Write a network of `quantization.coded`, trained or not, whole or not at all.

    `load_coded` gives this network with its representatives, scales and batch norm rounded.

    Parameters
    ----------
    compact : whether these are integers of 8 bits times a step for each tensor, instead of floats of 16, and everything is compressed
    contexts : whether, in a compact file, indices have a code of their own, whose frequencies follow the pieces around, instead of one for
        all bytes. It is smaller by some percent, and takes some seconds if there are many pieces
    own_steps : whether, in a compact file, each representative has a step of its own, smaller than that of the largest one by a power of
        two. Most pieces may share a representative near 0, and with one step for all it is rounded so coarsely that predictions change

    Raises
    ------
    ValueError : contexts in a file that is not compact; a network without codebooks; values beyond those that 16 bits can represent;
        facts that are not plain values, or, in a compact file, that JSON changes
    """
    if contexts and not compact:
        raise ValueError("contexts is True, which requires compact=True")
    codes = {name: _code(network, name) for name in convolutions(network)}
    if not any(isinstance(code, Coded) for code in codes.values()):
        raise ValueError(f"{type(network).__name__} has no codebooks, expected a network from quantization.coded")
    books, labels, layout = [], [], groups(network, **network.coding)
    for names in layout.values():
        book, own = codes[names[0]].codebook.representatives, torch.cat([codes[name].labels for name in names])
        for name in names:
            _check_indices(name, codes[name].labels, len(book))
        if compact:  # the order of representatives is free; sorted like this, their bits are easier to predict
            counts = own.bincount(minlength=len(book))
            order = counts.argsort(descending=True, stable=True)
            book, own = book[order][: int((counts > 0).sum())], order.argsort()[own]
        books.append(book)
        labels.append(own)
    stored = _stored(network, codes, books, own_steps if compact else None)
    values = [tensor.flatten().view(torch.uint8) for tensor in stored.values()]
    content = {"config": network.config, "coding": network.coding, "sizes": [len(book) for book in books], "facts": dict(facts)}
    if compact:
        content["config"] = network.config | {"stage_widths": [*network.config["stage_widths"]]}  # for JSON
        content["own_steps"] = own_steps
    indices, values = torch.cat(labels).cpu(), torch.cat(values)
    if contexts:
        content |= _in_contexts(indices, values, _books(network, layout, content["sizes"]))
    else:
        content |= (_compressed if compact else _deflated)(indices, values, max(content["sizes"]))
    _rebuilt(content)  # raises an error, before writing, if this could not be read again
    (write_compact if compact else write_tensors)(content, path)


def load_coded(path: str | Path) -> tuple[ResNet, dict[str, Any]]:
    """Read a network of codebooks as an ordinary one, in evaluation mode on the CPU, and its facts. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged or of another length; an index beyond its codebook; no network of codebooks
    """
    keys = {"config", "coding", "sizes", "data", "facts"}
    return read_network(path, _rebuilt, keys, "network of codebooks", "save_coded", read_either)


def _code(network: nn.Module, layer: str) -> Coded | LearnedSteps | None:
    module = network.get_submodule(layer)
    return module.parametrizations.weight[0] if hasattr(module, "parametrizations") else None


def _deflated(indices: Tensor, values: Tensor, n_representatives: Integer) -> dict[str, Any]:
    """Indices, entropy-coded, and bytes, as they are: the shortest of several attempts.

    Large alphabets are coded best, so several small indices form one symbol.
    """
    candidates = []
    for bits in _symbols(n_representatives):
        packed = pack(indices, bits).numpy().tobytes()
        candidates += [(bits, deflated(packed, strategy)) for strategy in STRATEGIES]
    bits, shortest = min(candidates, key=lambda candidate: len(candidate[1]))
    return {"bits": bits, "n_bytes": len(shortest), "data": torch.cat([torch.frombuffer(bytearray(shortest), dtype=torch.uint8), values])}


def _compressed(indices: Tensor, values: Tensor, n_representatives: Integer) -> dict[str, Any]:
    """Indices and bytes in one stream: the shorter of two attempts."""
    streams = {bits: compressed(torch.cat([pack(indices, bits), values]), bits) for bits in _symbols(n_representatives)}
    bits = min(streams, key=lambda bits: len(streams[bits]))
    return {"bits": bits, "data": streams[bits]}


def _in_contexts(indices: Tensor, values: Tensor, books: Sequence[Book]) -> dict[str, Any]:
    """Bytes in one stream, and indices in another, in a code of their own."""
    stream = compressed(values, 8)
    return {"n_bytes": len(stream), "data": torch.cat([stream, context_coded(indices, books)])}


def _books(network: nn.Module, layout: Mapping[tuple[str, int], Sequence[str]], sizes: Sequence[Integer]) -> list[Book]:
    """The sizes of the codebooks, and how the pieces that have their representatives lie in their layers."""
    convs, books = convolutions(network), []
    for size, ((_, length), names) in zip(sizes, layout.items(), strict=True):
        n_places = max(1, 9 // length)  # in a kernel
        shapes = [(len(convs[name].weight), convs[name].in_channels * 9 // (length * n_places), n_places) for name in names]
        books.append((size, shapes))
    return books


def _symbols(n_representatives: Integer) -> set[int]:
    """How many bits an index may have before it is entropy-coded."""
    needed = max(1, (n_representatives - 1).bit_length())
    return {needed, 8 if needed <= 8 else 16}


@torch.no_grad()
def _stored(
    network: nn.Module, codes: Mapping[str, Coded | LearnedSteps], books: Sequence[Tensor], own_steps: bool | None
) -> dict[str, Tensor]:
    """The tensors that a file holds besides indices, in order, on the CPU. `own_steps` is None if it is not compact."""
    values = {str(i): book for i, book in enumerate(books)}
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
        if own_steps is None:
            tensors[name] = tensor.half()
            continue
        step = own_step = (tensor.abs().max().float() / 127).clamp(min=1e-30)
        if own_steps and name.isdigit():
            halvings = (127 * step / tensor.abs().amax(1)).log2().floor().clamp(0, 2**HALVINGS_BITS - 1)
            own_step = step * 2 ** -halvings.unsqueeze(1)
            tensors[f"{name}.halvings"] = pack(halvings, HALVINGS_BITS)
        tensors |= {name: quantized(tensor, own_step, 0, -127, 127).to(torch.int8), f"{name}.step": step}
    tensors |= {name: tensor.half() for name, tensor in ends.items()}
    for name in ENDS:
        layer = network.get_submodule(name)
        tensors[f"{name}.codes"] = _code(network, name).codes(layer.parametrizations.weight.original).to(torch.int8)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _rebuilt(content: Mapping[str, Any]) -> ResNet:
    """The network that a file holds."""
    check_plain(content["facts"], "facts")
    with torch.device("meta"):  # no memory before the size check: an index takes a bit or more, at most 1,032 bytes are packed into one
        network = ResNet(**content["config"])
    layout, sizes = groups(network, **content["coding"]), content["sizes"]
    compact = "own_steps" in content
    if len(sizes) != len(layout) or not all(1 <= size <= 2**16 for size in sizes):
        raise ValueError(f"it has codebooks of {sizes} representatives, expected {len(layout)} of 1 to 65,536")
    convs, norms = convolutions(network), batch_norms(network)
    pieces = {name: convs[name].weight.numel() // length for (_, length), names in layout.items() for name in names}
    n_pieces = sum(pieces.values())
    with torch.device("meta"):
        values = {str(i): torch.empty(size, length) for i, (size, (_, length)) in enumerate(zip(sizes, layout, strict=True))}
        for name, norm in norms.items():
            values |= {f"{name}.{part}": torch.empty(norm.num_features) for part in ("factor", "shift")}
        like = {}
        for name, tensor in values.items():
            if compact and content["own_steps"] and name.isdigit():
                like[f"{name}.halvings"] = torch.empty(-(-HALVINGS_BITS * len(tensor) // 8), dtype=torch.uint8)
            like |= {name: tensor.char(), f"{name}.step": torch.empty(())} if compact else {name: tensor.half()}
        like |= {f"fc.{part}": torch.empty(network.fc.out_features).half() for part in ("steps", "bias")}
        like |= {f"{name}.codes": network.get_submodule(name).weight.char() for name in ENDS}
    indices, rest = _separated(content, n_pieces, sum(tensor.nbytes for tensor in like.values()), _books(network, layout, sizes))
    indices = indices.split(list(pieces.values()))
    tensors = split_bytes(rest, like)
    if compact:
        for name, tensor in values.items():
            step = tensors[f"{name}.step"]
            if f"{name}.halvings" in tensors:
                step = step * 2.0 ** -unpack(tensors[f"{name}.halvings"], HALVINGS_BITS, tensor[:, :1].shape)
            tensors[name] = tensors[name].float() * step
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


def _separated(content: Mapping[str, Any], n_pieces: Integer, n_values: Integer, books: Sequence[Book]) -> tuple[Tensor, Tensor]:
    """The indices (n_pieces,) in a file, and the bytes (n_values,) of everything else."""
    data = content["data"]
    if "bits" not in content:  # indices have a code of their own
        stream, coded = data[: content["n_bytes"]], data[content["n_bytes"] :]
        if n_pieces > 8 * RATIO * len(data):
            raise ValueError(f"it has {len(data):,} bytes for {n_pieces:,} pieces, expected at least one for {8 * RATIO:,}")
        values = decompressed(stream, 8, n_values)
        return context_decoded(coded, books), values
    bits = content["bits"]
    n_packed = -(-bits * n_pieces // 8)
    if "n_bytes" in content:  # indices are deflated alone
        packed, values = inflated(data[: content["n_bytes"]], n_packed), data[content["n_bytes"] :]
    else:
        packed, values = decompressed(data, bits, n_packed + n_values).split([n_packed, n_values])
    return unpack(packed, bits, torch.Size([n_pieces])), values


def _check_indices(layer: str, indices: Tensor, n_representatives: Integer) -> None:
    if int(indices.max()) >= n_representatives:
        raise ValueError(f"{layer} has the index {int(indices.max())}, expected at most {n_representatives - 1}")
