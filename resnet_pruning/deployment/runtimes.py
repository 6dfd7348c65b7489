"""Ways to run a network: eagerly, compiled, in onnxruntime; and its export to ONNX, which the last one takes."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Images
from ..files import required, written_whole
from ..model import AnyNetwork

RUNTIMES = ("eager", "compiled", "onnxruntime")


def to_onnx(model: AnyNetwork, path: str | Path, example: Tensor | None = None) -> None:
    """Write a model as ONNX, whole or not at all, for any number of images.

    The input, "images", is float32 (batch, 3, 32, 32), as `data.Images.normalised` makes them; the output is "logits" (batch, n_classes).

    Parameters
    ----------
    model : is exported in evaluation mode
    path : conventionally NAME.onnx; one file, weights included
    example : inputs of another shape, for parts of a network; how many there are stays free
    """
    required("onnxscript", "export")
    example = torch.zeros(2, 3, 32, 32) if example is None else example[:2].cpu().contiguous()
    with written_whole(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own innards
        program = torch.onnx.export(
            copy.deepcopy(model).cpu().eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        program.save(partial, external_data=False)


def onnx_session(path: str | Path, device: torch.device | str = "cpu"):
    """An onnxruntime session on as many threads as PyTorch uses; on a GPU if that is asked for and the installed onnxruntime can use it.

    Raises
    ------
    FileNotFoundError : no such file
    """
    onnxruntime = required("onnxruntime", "export")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist, expected a file from to_onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: list = ["CPUExecutionProvider"]
    if torch.device(device).type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # see hardware.full_float32
    return onnxruntime.InferenceSession(path, options, providers=providers)


def predict_onnx(path: str | Path, images: Images) -> Tensor:
    """Logits (N, n_classes) of an exported network: `evaluation.predict` in onnxruntime."""
    session = onnx_session(path, images.device)
    batches = [inputs.cpu().contiguous().numpy() for inputs, _ in images.batches()]
    return torch.from_numpy(np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches]))


def prepared(model: AnyNetwork, inputs: Tensor, runtime: str) -> tuple[Callable[[], None], torch.device]:
    """A function that runs `model` on `inputs` once and returns when it is done, and the device that it computes on: that of the inputs, or
    the CPU where the installed onnxruntime cannot use a GPU.

    Raises
    ------
    ValueError : a runtime that is not in `RUNTIMES`
    """
    model = copy.deepcopy(model).to(inputs.device, memory_format=torch.channels_last).eval()
    if runtime == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(model, Path(folder) / "model.onnx", inputs)
            session = onnx_session(Path(folder) / "model.onnx", inputs.device)
        feed = {"images": inputs.cpu().contiguous().numpy()}
        used = inputs.device if "CUDAExecutionProvider" in session.get_providers() else torch.device("cpu")
        return lambda: session.run(["logits"], feed), used
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if runtime == "compiled":
        # On a GPU a small network is bound by the launches of its kernels, which CUDA graphs take together.
        # Traced first, so that each network has code of its own: else the ninth of one class counts as one recompilation too many.
        traced = torch.fx.symbolic_trace(model)
        model = torch.compile(traced, mode="reduce-overhead" if inputs.is_cuda else "default", dynamic=False)
    inputs = inputs.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            model(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run, inputs.device
