"""The whole compression in one call: measure, allocate, compress, reconstruct."""

import torch

from .. import cost
from ..arguments import Count, Real, Seed
from ..calibration import layer_statistics
from ..data import Images
from ..evaluation import accuracy, predict
from ..model import OwnNetwork, ResNet
from .allocation import by_sensitivity, check_budget, layer_errors
from .by_plan import compress_by_plan
from .parts import N_STATISTICS, check_images
from .streams import STAGES
from .timings import part_timings

N_IMAGES = 2048
SHARES = tuple(k / 8 for k in range(1, 9))  # of filters; twice as many choices take twice as long, without a measurable gain
STREAM_SHARES = (0.5, 0.75)  # multiples of four channels, and few: every combination of the three streams is one more plan


def compress(
    model: OwnNetwork,
    images: Images,
    macs: Real | None = None,
    *,
    time: Real | None = None,
    runtime: str = "eager",
    precision: str = "float32",
    batch_size: Count = 256,
    sharing: bool = True,
    test_images: Images | None = None,
    n_steps: Count = 400,
    seed: Seed = 0,
    progress: bool = True,
) -> ResNet:
    """A compact network within a budget, without labels and without training the whole network; prints its size before and after.

    Measures the error of each layer with fewer filters, chooses the number of clusters of each layer, compresses, and reconstructs part by
    part. See `allocation.by_sensitivity` and `compression.compress_by_plan`, which can be called with other settings.

    Parameters
    ----------
    model : trained, of any width; it is not changed
    images : training images; labels are not used. Of more than 2,048, that many are drawn at random
    macs : the budget, as a share of the model's MACs; 0.5 if no budget is given
    time : or a budget of time, as a share of the model's time on this machine
    runtime, precision, batch_size : for which a plan under a budget of time is made, see `timings.part_timings`
    sharing : whether filters on the residual stream may be shared, which saves MACs but hardly any time
    test_images : images on which accuracies are measured, which are printed too
    n_steps : steps of each part's reconstruction
    seed : of all random choices
    progress : whether to show progress bars

    Raises
    ------
    ValueError : two budgets; a budget outside (0, 1] or below the cost of the smallest plan; fewer than 200 images; test images with other
        classes than the model
    """
    check_images(images, 200)
    macs = 0.5 if macs is None and time is None else macs
    check_budget(macs, time)
    if test_images is not None:
        predict(model, test_images[:1])  # refused before the work, not after it
    # In random order: each measurement takes the first images, which could all be of one class.
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(int(seed)))[:N_IMAGES].to(images.device)]
    statistics = layer_statistics(model, images[:N_STATISTICS], seed=seed)
    # Under a budget of MACs, sharing filters on a stream always costs less than narrowing the stream.
    narrower = STREAM_SHARES if time is not None or not sharing else ()
    choices = {"shares": SHARES, "drops": True, "stream_shares": narrower}
    errors = layer_errors(model, images, **choices, statistics=statistics, seed=seed, progress=progress)
    timings = None
    if time is not None:
        widths = {stage: rows.n_clusters.tolist() for stage, rows in errors.groupby("layer") if stage in STAGES}
        timings = part_timings(model, batch_size, runtime, precision, drops=True, stream_widths=widths, progress=progress)
    plan = by_sensitivity(model, macs=macs, time=time, sharing=sharing, errors=errors, timings=timings, progress=progress)
    small = compress_by_plan(model, plan, images, statistics=statistics, n_steps=n_steps, seed=seed, progress=progress)
    print(before_after(model, small, test_images))
    return small


def before_after(model: OwnNetwork, small: OwnNetwork, test_images: Images | None = None) -> str:
    """One line with the parameters, MACs and bytes of two networks, and with `test_images` their accuracies."""
    parts = []
    for unit, count in (("parameters", cost.parameters), ("MACs", cost.macs), ("bytes", cost.size_in_bytes)):
        before, after = count(model), count(small)
        parts.append(f"{before:,} → {after:,} {unit} ({after / before:.1%})")
    if test_images is not None:
        before, after = accuracy(model, test_images), accuracy(small, test_images)
        parts.append(f"accuracy {before:.2f} → {after:.2f} % ({after - before:+.2f} pp)")
    return ", ".join(parts)
