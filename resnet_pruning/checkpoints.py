"""Networks and other tensors in files: written whole with a checksum, read without running code or trusting claimed sizes."""

import hashlib
import io
import pickle
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import sealed, unsealed, written_whole
from .model import OwnNetwork, ResNet, check_described, with_tensors


def save_checkpoint(path: str | Path, model: OwnNetwork, facts: Mapping[str, Any], *, dtype: torch.dtype = torch.float32) -> None:
    """Write a model and facts about it to `path`, whole or not at all. Weights are rounded to `dtype` if that is smaller than float32.

    Raises
    ------
    ValueError : a dtype other than float32, bfloat16 and float16; a model that no longer matches its class and configuration; or facts
        that are not plain values (str, int, float, bool, None; lists, tuples and dicts of them): `load_checkpoint` could not restore them
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    state = {name: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().contiguous() for name, t in model.state_dict().items()}
    content = {"config": model.config, "state_dict": state, "facts": dict(facts)}
    _rebuilt(content)  # raises an error, before writing, if this could not be read again
    check_described(model)
    write_tensors(content, path)


def load_checkpoint(path: str | Path) -> tuple[ResNet, dict[str, Any]]:
    """Read a model, in evaluation mode on the CPU, and its facts.

    Reads files of `save_checkpoint` and published checkpoints of the same network: a state dict, or a dict with one under
    ``state_dict``. Names may have the prefix ``module.``, and ``linear`` for ``fc``. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged, holds anything but tensors and plain values, or fits no `ResNet`
    """
    content = read_tensors(path)
    try:
        return _rebuilt(content)
    except Exception as error:  # a file may hold anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
        raise ValueError(f"{path} is no checkpoint of a ResNet of this package: {reason}") from error


def write_tensors(content: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors and plain values, nested in any way, whole or not at all, with a checksum of everything.

    Raises
    ------
    ValueError : other values, which `read_tensors` would refuse
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        _loaded(buffer.getvalue())
    except Exception as error:
        raise ValueError(f"{path} is not written, since it could not be read again: {_reason(error)}") from error
    with written_whole(path) as partial:
        partial.write_bytes(sealed(buffer.getvalue()))


def read_tensors(path: str | Path) -> Any:
    """Read what `write_tensors` or torch.save wrote, to the CPU. Nothing in the file is executed. A missing checksum gives a warning.

    Raises
    ------
    FileNotFoundError : no such file
    ValueError : a file that is damaged, claims to hold more than it does, or holds anything but tensors and plain values
    """
    archive, is_sealed = unsealed(path)
    try:
        content = _loaded(archive)
    except Exception as error:  # torch.load raises almost any error, depending on where a file is damaged
        raise ValueError(f"{path} was refused: {_reason(error)}") from error
    if not is_sealed:
        warnings.warn(f"{path} has no checksum, unlike files of this package: damage to its values would go unnoticed", stacklevel=2)
    return content


def from_state_dict(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> ResNet:
    """The `ResNet` with these weights, in evaluation mode. Without a configuration, depth and widths are inferred from the tensors.

    Raises
    ------
    ValueError : names or shapes that are not those of a `ResNet`; values that are float64, NaN or infinite
    """
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        renamed["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = tensor
        if tensor.dtype == torch.float64 or not tensor.isfinite().all():
            raise ValueError(
                f"{name} is {tensor.dtype}, finite: {bool(tensor.isfinite().all())}; expected finite values of at most 32 bits"
            )
    widths = {name.removesuffix(".weight"): len(t) for name, t in renamed.items() if "bn" in name and name.endswith(".weight")}
    # Checkpoints older than PyTorch 0.4.1 lack batch norm's counters, which evaluation does not need.
    renamed = {f"{name}.num_batches_tracked": torch.tensor(0) for name in widths} | renamed
    if config:
        if config.get("depth", 20) > 6 * len(renamed):  # more blocks than the tensors can fill
            raise ValueError(f"the depth is {config['depth']}, too large for {len(renamed)} tensors")
        return with_tensors(config, renamed)
    try:
        stages = tuple(widths[f"layer{stage}.0.bn2"] for stage in (1, 2, 3))
        inner = {name.replace("bn", "conv"): width for name, width in widths.items() if name.endswith(".bn1")}
        n_blocks = sum(name.startswith("layer1.") for name in inner)
        found = {"depth": 6 * n_blocks + 2, "stage_widths": stages, "inner_widths": inner, "n_classes": len(renamed["fc.weight"])}
    except KeyError as error:
        raise ValueError(f"no tensor {error} among {', '.join(map(str, list(renamed)[:5]))}, …") from error
    return with_tensors(found, renamed)


def check_plain(value: Any, key: str) -> None:
    """Raise a ValueError unless `value` is str, int, float, bool, None, or a list, tuple or dict of them."""
    if type(value) is dict:
        value = [*value.keys(), *value.values()]
    if type(value) in (list, tuple):
        for item in value:
            check_plain(item, key)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"facts[{key!r}] holds a {type(value).__module__}.{type(value).__name__}, expected plain values")


def digest(what: str, tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of a description and of tensors. Equal tensors have equal digests, on any device and in any memory format."""
    total = hashlib.sha256(what.encode())
    for tensor in tensors:
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _rebuilt(content: Any) -> tuple[ResNet, dict[str, Any]]:
    """The network and the facts that a file holds."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dict")
    facts = content.get("facts", {}) if "config" in content else {}
    for key, value in facts.items():
        check_plain(value, key)
    return from_state_dict(content.get("state_dict", content), content.get("config")), facts


def _loaded(archive: bytes) -> Any:
    """torch.load without running code. Claimed sizes are checked: those of records before loading, those of tensors before use."""
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            if any(record.compress_type for record in records.infolist()) or sum(r.file_size for r in records.infolist()) > len(archive):
                raise ValueError("its records claim to hold more bytes than the file")
    content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not stored value by value")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _tensors(item)


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds more than tensors and plain values (code, maybe)"
    return textwrap.shorten(f"it is truncated or no PyTorch file ({type(error).__name__}: {error})", 300, placeholder=" …")
