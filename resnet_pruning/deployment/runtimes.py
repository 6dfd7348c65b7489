"""Ways to run a network: eagerly, compiled, in onnxruntime, in OpenVINO; and export to ONNX, which the last two require."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..arguments import Count
from ..data import Images
from ..files import required, written_whole
from ..hardware import full_float32
from ..model import AnyNetwork

# The precisions that each runtime supports.
PRECISIONS = {
    "eager": ("float32", "bfloat16"),
    "compiled": ("float32", "bfloat16"),
    "onnxruntime": ("float32",),
    "openvino": ("float32", "bfloat16", "int8"),
}
RUNTIMES = tuple(PRECISIONS)
N_CALIBRATION = 300


def to_onnx(model: AnyNetwork, path: str | Path, example: Tensor | None = None) -> None:
    """Write a model as ONNX, whole or not at all, for any number of images.

    The input, "images", is float32 (batch, 3, 32, 32), as `data.Images.normalised` makes them; the output is "logits" (batch, n_classes).

    Parameters
    ----------
    model : is exported in evaluation mode
    path : conventionally NAME.onnx; one file, weights included
    example : inputs of another shape, for parts of a network; their number stays variable
    """
    required("onnxscript", "export")
    example = torch.zeros(2, 3, 32, 32) if example is None else example[:2].cpu().contiguous()
    with written_whole(path) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its internals
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
    """An onnxruntime session with as many threads as PyTorch uses, on a GPU if requested and supported by the installed onnxruntime.

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
    onnx = onnx_session(path, images.device)
    batches = [inputs.cpu().contiguous().numpy() for inputs, _ in images.batches()]
    return torch.cat([torch.from_numpy(onnx.run(["logits"], {"images": batch})[0]) for batch in batches])


def session(
    model: AnyNetwork, example: Tensor, runtime: str = "eager", precision: str = "float32", calibration: Images | Tensor | None = None
) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    """A function from inputs like `example`, with as many images, to outputs; and the device that it computes on: that of `example`, or the
    CPU for OpenVINO, and for onnxruntime if the installed one cannot use a GPU.

    Parameters
    ----------
    model : is copied
    example : inputs with the number of images and the shape that will be used
    runtime, precision : from `PRECISIONS`
    calibration : training images, or inputs like `example`, to measure the ranges of int8 on; the first 300 are used

    Raises
    ------
    ValueError : a runtime or a precision that is not in `PRECISIONS`; int8 without images
    ImportError : a runtime that is not installed; the message names the extra that installs it
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if precision not in PRECISIONS[runtime]:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS[runtime])} for {runtime}")
    model = copy.deepcopy(model).to(example.device, memory_format=torch.channels_last).eval()
    if runtime == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(model, Path(folder) / "model.onnx", example)
            onnx = onnx_session(Path(folder) / "model.onnx", example.device)
        used = example.device if "CUDAExecutionProvider" in onnx.get_providers() else torch.device("cpu")
        return lambda inputs: torch.from_numpy(onnx.run(["logits"], {"images": inputs.cpu().contiguous().numpy()})[0]), used
    if runtime == "openvino":
        return _openvino(model, example, precision, calibration), torch.device("cpu")
    if runtime == "compiled":
        # On a GPU, kernel launches limit a small network. CUDA graphs combine them.
        # Exported first, so that each network has its own code: otherwise, the ninth of a class counts as one recompilation too many.
        exported = torch.export.export(model, (example,)).module()
        model = torch.compile(exported, mode="reduce-overhead" if example.is_cuda else "default", dynamic=False)

    def run(inputs: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(example.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(inputs.contiguous(memory_format=torch.channels_last))

    return run, example.device


def prepared(
    model: AnyNetwork, inputs: Tensor, runtime: str, precision: str = "float32", calibration: Images | Tensor | None = None
) -> tuple[Callable[[], None], torch.device]:
    """A function that runs `model` on `inputs` once and returns when it is done, and the device that it computes on: see `session`.

    The inputs are moved to that device beforehand, so that a timing of the function does not include it.
    """
    run, used = session(model, inputs, runtime, precision, calibration)
    memory_format = torch.channels_last if runtime in ("eager", "compiled") else torch.contiguous_format
    inputs = inputs.to(used).contiguous(memory_format=memory_format)

    def run_once() -> None:
        run(inputs)
        if used.type == "cuda":
            torch.cuda.synchronize(used)

    return run_once, used


@full_float32()
def predict(
    model: AnyNetwork,
    images: Images,
    runtime: str,
    precision: str = "float32",
    calibration: Images | Tensor | None = None,
    batch_size: Count = 500,
) -> Tensor:
    """Logits (N, n_classes), float32 on the CPU, computed by a runtime: the counterpart of `evaluation.predict`."""
    batches = [inputs for inputs, _ in images.batches(batch_size)]
    runs: dict[int, Callable[[Tensor], Tensor]] = {}
    for inputs in batches:
        if len(inputs) not in runs:  # the last batch may be smaller
            runs[len(inputs)], _ = session(model, inputs, runtime, precision, calibration)
    return torch.cat([runs[len(inputs)](inputs).float().cpu() for inputs in batches])


def _openvino(model: nn.Module, example: Tensor, precision: str, calibration: Images | Tensor | None) -> Callable[[Tensor], Tensor]:
    openvino = required("openvino", "openvino")
    core = openvino.Core()
    if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("precision is 'bfloat16', expected float32 or int8: this processor has no instructions for it")
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, Path(folder) / "model.onnx", example)
        network = core.read_model(Path(folder) / "model.onnx")
    if precision == "int8":
        nncf = required("nncf", "openvino")
        if calibration is None:
            raise ValueError("calibration is None, expected training images, on which the ranges of int8 are measured")
        nncf.set_log_level(logging.ERROR)
        seen = calibration[:N_CALIBRATION]
        seen = seen.normalised(seen.pixels) if isinstance(seen, Images) else seen
        inputs = [batch.cpu().contiguous().numpy() for batch in seen.split(1)]
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            network = nncf.quantize(network, nncf.Dataset(inputs), subset_size=len(inputs))
    network.reshape({0: list(example.shape)})
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()

    def run(inputs: Tensor) -> Tensor:
        outputs = request.infer({0: inputs.cpu().contiguous().numpy()}, share_inputs=True)
        return torch.from_numpy(outputs[0].copy())

    return run
