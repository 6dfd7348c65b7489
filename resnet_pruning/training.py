"""One training function, for training and fine-tuning alike: fast on CPU and GPU, interruptible, resumable."""

import contextlib
import copy
import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .arguments import Integer, Real, Seed
from .checkpoints import digest, read_tensors, write_tensors
from .data import Batches, Images
from .evaluation import accuracy, predict
from .files import locked
from .hardware import Recorded, can_compile, has_fast_bfloat16, keep_freed_memory
from .model import TrainableNetwork
from .optimizers import OPTIMIZERS, continued, on_gpu, optimizer_for


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a training. The defaults suit SGD; those of the committed networks are in `studies.base.TRAININGS`.

    Attributes
    ----------
    epochs : passes over the training images
    batch_size : images per step
    learning_rate : its peak, reached linearly after `warmup_epochs`, followed by `schedule`
    momentum, nesterov : momentum of SGD and Muon, and whether it is Nesterov's
    weight_decay : of weights; batch norm and biases have none
    label_smoothing : share of the target that is spread evenly over the classes
    ema : decay per step of the exponential moving average of weights and batch-norm statistics that training ends with; 0 for none
    padding, views, alternating : augmentation, see `data.Batches`. If `views` repeat, the teacher's outputs for them are computed
        only once, which makes the teacher almost free.
    small_share, small_size : the first `small_share` of the epochs use crops of `small_size` pixels, which cost fewer MACs
    mixup, mixed_share : in the first `mixed_share` of the epochs, images are mixed in pairs (Zhang et al. 2018, *mixup*), in shares
        from Beta(`mixup`, `mixup`); 0 for none
    distillation : weight of the teacher's term in the loss, if there is a teacher; the labels get the rest
    temperature : divisor of both logits in the teacher's term (Hinton et al. 2015)
    optimizer : one of `optimizers.OPTIMIZERS`
    schedule : of the learning rate after warm-up, "cosine" (to zero) or "constant"
    """

    epochs: Integer = 100
    batch_size: Integer = 128
    learning_rate: Real = 0.2
    momentum: Real = 0.9
    weight_decay: Real = 5e-4
    warmup_epochs: Real = 3
    label_smoothing: Real = 0.0
    ema: Real = 0.999
    padding: Integer = 4
    views: Integer = 0
    alternating: bool = False
    small_share: Real = 0.66
    small_size: Integer = 24
    mixup: Real = 0.0
    mixed_share: Real = 0.8
    distillation: Real = 0.9
    temperature: Real = 4.0
    optimizer: str = "SGD"
    nesterov: bool = True
    schedule: str = "cosine"

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, np.generic):  # from a table; a file with NumPy's numbers is refused on reading
                object.__setattr__(self, name, value.item())  # the dataclass is frozen

        def check(name: str, fits: bool, expected: str):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        for name in ("epochs", "batch_size"):
            check(name, getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("learning_rate", "temperature"):
            check(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("weight_decay", "warmup_epochs", "padding", "views", "mixup"):
            check(name, 0 <= getattr(self, name) < math.inf, "zero or a positive number")
        for name in ("momentum", "label_smoothing", "ema"):
            check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        for name in ("distillation", "small_share", "mixed_share"):
            check(name, 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        check("views", not (self.alternating and self.views % 2), "an even number, because every other view is mirrored")
        check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        check("schedule", self.schedule in ("cosine", "constant"), "cosine or constant")
        check("small_size", 8 <= self.small_size <= 32, "8 to 32 pixels")

    @property
    def small_epochs(self) -> int:
        """Number of epochs with small crops."""
        return int(self.epochs * self.small_share + 1e-9)

    def size(self, epoch: Integer) -> int:
        """Side in pixels of the images of an epoch, counted from 0."""
        return self.small_size if epoch < self.small_epochs else 32

    def shares(self, epoch: Integer, n_steps: Integer, seed: Integer) -> np.ndarray:
        """For each step, the share of an image in its mixture with another, or 1 if images are not mixed."""
        mixed = self.mixup and epoch < int(self.epochs * self.mixed_share + 1e-9)
        return np.random.default_rng((seed, epoch)).beta(self.mixup, self.mixup, n_steps) if mixed else np.ones(n_steps)

    def learning_rate_at(self, epoch: Real) -> float:
        """Linear from 0 to the peak during warm-up, then a half cosine to 0 at the end, or constant."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        if self.schedule == "constant":
            return self.learning_rate
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.learning_rate * (1 + math.cos(math.pi * min(progress, 1))) / 2


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a training is computed. This changes its time, and its result by rounding only.

    Attributes
    ----------
    amp : bfloat16 autocast; None uses it where the hardware supports it
    channels_last : memory format of the weights and activations
    compile : torch.compile; None uses it on a CPU, where it works and the training is long enough to recoup the compilation time
    cuda_graphs : record a step as a CUDA graph and replay it, because a GPU is faster at these small kernels than Python at launching
        them; None uses it on a GPU, without `compile`. What `model` does in Python alone, such as counting its passes, is done only once.
    reuse_memory : on a CPU, keep freed buffers in the process, see `hardware.keep_freed_memory`
    """

    amp: bool | None = None
    channels_last: bool = True
    compile: bool | None = None
    cuda_graphs: bool | None = None
    reuse_memory: bool = True


@torch.enable_grad()
def train(
    model: TrainableNetwork,
    images: Images,
    recipe: Recipe = Recipe(),
    *,
    seed: Seed = 0,
    held_out: Images | None = None,
    teacher: TrainableNetwork | None = None,
    folder: str | Path | None = None,
    watch: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    execution: Execution = Execution(),
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place, on the device that holds `images`, and return the history.

    The caller's parametrizations and frozen parameters are respected: parameters without ``requires_grad`` are not updated,
    and the forward pass is the model's own. Fine-tuning under a constraint is a training like any other.

    Parameters
    ----------
    model : maps (B, 3, 32, 32) to logits (B, n_classes); ends up with the averaged weights, in evaluation mode
    images : training images
    recipe : hyper-parameters
    seed : of the batches' order and augmentation (the caller initialises the model)
    held_out : images whose accuracy is recorded after each epoch; never trained on
    teacher : a model with the same classes whose outputs are imitated; it is moved to the images' device and put into evaluation mode
    folder : where the state is saved after each epoch. A call with the same arguments (networks and images by content) resumes from
        there, and returns at once if the training is complete. On the same CPU and thread count, the result is the same, bit for bit.
    watch : called after each epoch with the averaged model, in evaluation mode; the numbers, text or lists of them that it
        returns become columns of the history
    execution : how the training is computed
    progress : show a progress bar

    Returns
    -------
    DataFrame with a row per epoch: epoch, learning_rate, loss, train_accuracy (%, augmented images, before averaging; of mixed images,
    the first label counts), held_out_accuracy (%, averaged weights; NaN without `held_out`), seconds, images_per_second

    Raises
    ------
    ValueError : `folder` holds another training or a damaged one; a model or teacher without the images' classes; fewer images than
        `batch_size`; a loss that is not finite; CUDA graphs without a GPU; `watch` returns what the history has already
    RuntimeError : another process trains in `folder`
    KeyboardInterrupt, or any error in a step : after resetting `model` to the last complete epoch, which `folder` also keeps
    """
    device = images.device
    recorded = execution.cuda_graphs if execution.cuda_graphs is not None else device.type == "cuda" and not execution.compile
    if recorded and device.type != "cuda":
        raise ValueError(f"cuda_graphs is True for images on {device}, expected images on a CUDA GPU")
    amp = has_fast_bfloat16(device) if execution.amp is None else execution.amp
    if device.type == "cpu" and execution.reuse_memory:
        keep_freed_memory()
    model.to(device)
    if execution.channels_last:
        model.to(memory_format=torch.channels_last)
    predict(model, images[:1])  # refuses a model without the images' classes
    if teacher is not None:
        if teacher is model:
            raise ValueError("the teacher is the model itself, expected another network, or a copy: copy.deepcopy(model)")
        teacher = teacher.to(device).eval()
        answer = predict(teacher, images[:1], role="teacher").numpy().tobytes()

    run, path = _Run(model, recipe), None if folder is None else Path(folder) / "state.pt"
    identity = {"recipe": dataclasses.asdict(recipe), "seed": operator.index(seed)}
    if path is not None or (teacher is not None and recipe.views):
        identity |= {"images": _digest_of(images), "teacher": _digest_of(teacher)}
        identity |= {"held-out images": _digest_of(held_out), "network": _digest_of(model)}
    with contextlib.nullcontext() if folder is None else locked(folder):
        if path is not None and path.exists():
            run.load(_state_of(path, identity))
        batches = Batches(images, recipe.batch_size, padding=recipe.padding, views=recipe.views, alternating=recipe.alternating, seed=seed)
        n_steps, n_done = len(batches) * recipe.epochs, len(batches) * len(run.history)
        compiled = execution.compile
        if compiled is None:  # saves a tenth or more of each step on a CPU; on a GPU, graphs save much more
            compiled = device.type == "cpu" and n_steps >= 2_000 and can_compile("cpu")
        forward, imitate = (torch.compile(net, dynamic=False) if compiled and net is not None else net for net in (model, teacher))
        step, imitate = functools.partial(run.step, forward, amp), functools.partial(_logits, imitate, amp)
        if recorded:
            step, imitate = Recorded(step), Recorded(imitate)
        taught = identity.get("teacher"), identity.get("images"), identity["seed"], recipe.padding, recipe.alternating, amp, device
        teaching = None if teacher is None else _Teacher(imitate, batches, (*taught, answer))  # `answer` tells apart what tensors do not
        with tqdm(total=n_steps, initial=n_done, unit="step", disable=not progress, mininterval=1) as bar:
            try:
                for epoch in range(len(run.history), recipe.epochs):
                    row = _epoch(run, batches, epoch, step, teaching, bar)
                    row["held_out_accuracy"] = math.nan if held_out is None else accuracy(run.averaged, held_out, amp=amp)
                    seen = {} if watch is None else watch(run.averaged.eval())
                    if taken := [name for name in seen if name in row]:
                        raise ValueError(f"watch returned {taken[0]!r}, expected other names than the history's own columns")
                    row |= {name: _plain(value) for name, value in seen.items()}
                    run.complete_epoch(row, path, identity)
            except (Exception, KeyboardInterrupt):
                run.load(run.last_complete)
                raise
    model.eval().load_state_dict(run.averaged.state_dict())
    return pd.DataFrame(run.history)


def _epoch(
    run: "_Run", batches: Batches, epoch: Integer, take_step: Callable[..., Tensor], teacher: "_Teacher | None", bar: tqdm
) -> dict[str, float]:
    """Run the steps of one epoch and return its row of the history."""
    recipe, device = run.recipe, batches.images.device
    start = time.perf_counter()
    run.model.train()
    totals = torch.zeros(2, device=device)  # loss, right answers
    keep_up = max(1, (20_000 if device.type == "cuda" else 2_000) // recipe.batch_size)  # reading a loss waits for the GPU
    shares = recipe.shares(epoch, len(batches), batches.seed)
    for step, (inputs, labels, picked) in enumerate(batches.epoch(epoch, recipe.size(epoch)), start=1):
        share = None if shares[step - 1] == 1 else torch.full((), float(shares[step - 1]), device=device)
        rate = recipe.learning_rate_at(epoch + step / len(batches))
        targets = teacher.outputs(epoch, recipe.size(epoch), inputs, picked) if teacher is not None else None
        totals += take_step(inputs, labels, targets, share, torch.full((), rate / recipe.learning_rate, device=device))
        if step % keep_up == 0 or step == len(batches):
            mean_loss, mean_right = (totals / step).tolist()
            if not math.isfinite(mean_loss):
                raise ValueError(f"the loss is {mean_loss} in epoch {epoch + 1}; a learning rate below {recipe.learning_rate} may help")
            speed = step * recipe.batch_size / (time.perf_counter() - start)
            bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}", refresh=False)
            bar.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {100 * mean_right:.1f} %, {speed:.0f} images/s", refresh=False)
            bar.update(step - (bar.n - epoch * len(batches)))
    return {
        "epoch": epoch + 1,
        "learning_rate": rate,
        "loss": mean_loss,
        "train_accuracy": 100 * mean_right,
        "held_out_accuracy": math.nan,
        "seconds": time.perf_counter() - start,
        "images_per_second": speed,
    }


def _plain(value: Any) -> Any:
    """What `watch` returned, as a state may hold it: text, a float, or a list of them. NumPy's numbers could not be read again."""
    return value if isinstance(value, str) else [*map(_plain, value)] if isinstance(value, list) else float(value)


def _digest_of(what: nn.Module | Images | None) -> str:
    """Digest of images, or of what a network computes and which tensors are trained. Constraints are modules, with their settings."""
    if what is None:
        return ""
    if isinstance(what, Images):
        return digest(f"{what.dataset} {what.mean} {what.std} {what.flips}", (what.pixels, what.labels))
    tensors = {**dict(what.named_parameters()), **dict(what.named_buffers())}
    return digest(f"{what} {[(name, tensor.requires_grad) for name, tensor in tensors.items()]}", tensors.values())


def _state_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a training left in a file. Raises a ValueError if that is not the state of this training."""
    state = read_tensors(path)
    if not isinstance(state, dict) or not {"model", "optimizer", "ema", "history", "identity", "networks"} <= set(state):
        raise ValueError(f"{path} is not the state of a training, expected one written by training.train")
    # A network may have the weights that the training began with, or those that it last saved.
    same = {"network": state["identity"]["network"]} if identity["network"] in state["networks"] else {}
    if differing := [key for key, value in (identity | same).items() if state["identity"].get(key) != value]:
        raise ValueError(f"{path} holds another training: {', '.join(differing)} differ. Choose another folder, or delete it.")
    if [row["epoch"] for row in state["history"]] != list(range(1, len(state["history"]) + 1))[: identity["recipe"]["epochs"]]:
        raise ValueError(f"{path} has a history of {len(state['history'])} epochs, expected 1 to {identity['recipe']['epochs']}, in order")
    return state


class _Teacher:
    """A network's outputs for augmented images, computed once for views that repeat, also in the next training of a sweep."""

    last: tuple[Any, dict[tuple[int, int], Tensor]] = (None, {})  # what the last outputs depend on; these outputs, by view and size

    def __init__(self, network: Callable[[Tensor], Tensor], batches: Batches, identity: tuple):
        last = _Teacher.last
        if last[0] != identity:
            _Teacher.last = last = identity, {}
        self.network, self.batches, self.known = network, batches, last[1]  # its own: another thread may replace the last ones

    @torch.no_grad()
    def outputs(self, epoch: Integer, size: Integer, inputs: Tensor, picked: Tensor) -> Tensor:
        """Logits (B, n_classes) of a batch that `Batches.epoch` yielded."""
        if not self.batches.views:
            return self.network(inputs)
        view = epoch % self.batches.views, size
        if view not in self.known:
            self.known[view] = torch.cat([self.network(inputs) for inputs, *_ in self.batches.view(*view)])
        return self.known[view][picked]


class _Run:
    """Everything that changes during a training, to save, restore and average it in one place."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.model, self.recipe = model, recipe
        settings = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        self.optimizer = optimizer_for(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, **settings)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.before = [p.detach().clone() for p in self.trained]
        self.averaged = copy.deepcopy(model)  # equal to the model if `recipe.ema` is 0
        self.history: list[dict[str, float]] = []
        self.last_complete = self._state()

    def step(
        self, forward: nn.Module, amp: bool, inputs: Tensor, labels: Tensor, targets: Tensor | None, share: Tensor | None, ratio: Tensor
    ) -> Tensor:
        """Train on one batch, and return its loss and its share of right answers.

        `targets` are the teacher's logits, `share` is that of each image in its mixture with another, if there is a teacher and a mixture;
        `ratio` is that of the learning rate to its peak.
        """
        # Batches are in random order, so the same batch backwards is a random partner for each image.
        logits = _logits(forward, amp, inputs if share is None else torch.lerp(inputs.flip(0), inputs, share))
        loss = _loss(logits, labels, targets, self.recipe)
        if share is not None:
            other = _loss(logits, labels.flip(0), None if targets is None else targets.flip(0), self.recipe)
            loss = torch.lerp(other, loss, share)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            # All `OPTIMIZERS` step in proportion to the learning rate. A recorded step repeats its numbers, but a tensor can scale it.
            torch._foreach_copy_(self.before, self.trained)
            self.optimizer.step()
            torch._foreach_sub_(self.trained, self.before)
            torch._foreach_mul_(self.trained, ratio)
            torch._foreach_add_(self.trained, self.before)
            _average(self.averaged, self.model, self.recipe.ema)
            return torch.stack([loss, (logits.argmax(1) == labels).float().mean()])

    def complete_epoch(self, row: dict[str, Real], path: Path | None, identity: dict) -> None:
        self.history.append(row)
        state = self._state()
        if path is not None:
            # Those of the epoch before, too: an interrupt between here and the last line sets the model back to it.
            state["networks"] = [*self.last_complete.get("networks", [])[-2:], _digest_of(self.model), _digest_of(self.averaged)]
            write_tensors(state | {"identity": identity}, path)
        self.last_complete = state  # now that the folder has it

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(continued(state["optimizer"], on_gpu(self.trained)))
        self.averaged.load_state_dict(state["ema"])
        self.history = list(state["history"])
        self.last_complete = self._state() | {"networks": state.get("networks", [])}

    def _state(self) -> dict:
        networks = {"model": dict(self.model.state_dict()), "ema": dict(self.averaged.state_dict())}
        return copy.deepcopy(networks | {"optimizer": self.optimizer.state_dict(), "history": self.history})


def _logits(network: nn.Module, amp: bool, inputs: Tensor) -> Tensor:
    # Copies of the weights would be kept until the caller's autocast ends, and a recording would not make them again.
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
        return network(inputs).float()


def _average(averaged: nn.Module, model: nn.Module, decay: Real) -> None:
    """One step of an exponential moving average. Integers, such as the clusters of filters, have no average and are copied."""
    pairs = [*zip(averaged.parameters(), model.parameters(), strict=True), *zip(averaged.buffers(), model.buffers(), strict=True)]
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)
    torch._foreach_lerp_(*zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True), 1 - decay)


def _loss(logits: Tensor, labels: Tensor, targets: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross-entropy with the labels; with a teacher's logits, mixed with the divergence from them (Hinton et al. 2015)."""
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    if targets is None:
        return loss
    t = recipe.temperature
    # t² keeps the gradient's size independent of the temperature.
    divergence = t * t * F.kl_div(F.log_softmax(logits / t, 1), F.log_softmax(targets / t, 1), reduction="batchmean", log_target=True)
    return (1 - recipe.distillation) * loss + recipe.distillation * divergence
