"""What this machine can do, checked and reported once."""

import ctypes
import functools
import logging
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_changing, _before = threading.Lock(), []  # of the settings that `full_float32` changes


def default_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device | str | None = None) -> str:
    """The name of a device's processor or GPU, by default of `default_device`, to state in tables what computed their numbers."""
    if torch.device(device or default_device()).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster than float32 on a device. CPUs without bfloat16 instructions only emulate it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full float32, without the caller's autocast. By default, cuDNN rounds operands of convolutions to the 10 bits of TF32.

    A setting of the process, until the last thread leaves such a block. Autocasts in it keep no copies of the weights, which may change.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    with _changing:
        _before.append((cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, products.fp32_precision))
        cudnn.allow_tf32 = False  # the older setting: torch.compile and torch.export read it, and fail where it contradicts the newer ones
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = products.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False, cache_enabled=False), torch.autocast("cuda", enabled=False, cache_enabled=False):
            yield
    finally:
        with _changing:
            before = _before.pop()  # of all blocks that one is in, only the first found the settings as they were
            cudnn.allow_tf32 = before[0] == "tf32"
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, products.fp32_precision = before


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works, checked once; warns if not. A CPU needs a C++ compiler and Python's headers, CUDA needs Triton."""
    # On a machine with the CUDA toolkit but no GPU, torch would warn needlessly that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        warnings.warn(f"torch.compile does not work here, training runs uncompiled ({reason})", stacklevel=2)
        return False
    return True


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc reuse freed buffers instead of returning them to the operating system after each operation.

    Activations are a few megabytes each, above glibc's threshold for mmap. By default, each of them is mapped, page-faulted in and unmapped
    again (cost: ``figures/benchmark_training.csv``). Does nothing without glibc. (man 3 mallopt: M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)
        mallopt(-1, 1 << 30)


class Recorded:
    """A function of tensors on a GPU whose kernels are recorded as a CUDA graph after a few calls, and then launched all at once.

    A small network's kernels take less time than Python takes to launch them: with batches of 128 on an H200, this made `training.train`
    about six times as fast, in one run. The function may change tensors in place, but must neither read their values in Python nor replace
    them. There is a graph for each combination of the arguments' shapes.
    """

    recording = threading.Lock()  # of one graph at a time
    n_first = 3  # calls before the recording, in which libraries choose their kernels and optimizers make their state

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.stream = function, torch.cuda.Stream()
        self.n_calls: dict[tuple, int] = {}
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        kind = tuple(None if a is None else (a.shape, a.stride(), a.dtype) for a in arguments)
        self.n_calls[kind] = self.n_calls.get(kind, 0) + 1
        if self.n_calls[kind] <= self.n_first:
            # On the stream of the recording, because gradients are accumulated on the stream of their first use.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*arguments)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if kind not in self.graphs:
            graph, places = torch.cuda.CUDAGraph(), [None if a is None else a.clone() for a in arguments]
            with self.recording, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = self.function(*places)
            self.graphs[kind] = graph, places, result
        graph, places, result = self.graphs[kind]
        for place, argument in zip(places, arguments, strict=True):
            if place is not None:
                place.copy_(argument)
        graph.replay()
        return result.clone()  # the next replay overwrites it
