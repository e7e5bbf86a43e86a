"""What is on canvases: the guide proposes, and of several proposals the model decides which explains an image best."""

import warnings
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from air import AIR, MAX_OBJECTS, Slot
from modules import image_to_object, pose_to_box

LOOKS = 5  # at an image that pay; the RNN guide would see the same again
MOST_OBJECTS = 8  # that are looked for, if not more in training: the residual guide finds more than it was shown


class Inference(NamedTuple):
    """What AIR sees in `n` images. A step t was used where `t < counts`."""

    counts: Tensor  # int64 [n], the number of objects
    q_count: Tensor  # [n, T + 1], q(number of objects) given these poses and codes; no calibrated probability
    log_weight: Tensor  # [n], log p(x, z) - log q(z | x) in nats; of one sample each, its mean is the ELBO
    explained: Tensor  # [n], the share of the image's ink (its squared pixels) that the reconstruction accounts for
    z_where: Tensor  # [n, T, 3], poses [s, x, y]; see modules.py for their units
    z_what: Tensor  # [n, T, z_what_size], codes
    z_what_mean: Tensor  # [n, T, z_what_size], the means of q(z_what_t | x, z_where_t)
    boxes: Tensor  # [n, T, 4], the windows as (x, y, w, h) in pixels of the canvas
    x_att: Tensor  # [n, T, w, w], the windows' contents in the image
    y_att: Tensor  # [n, T, w, w], the objects as the decoder paints them
    canvases: Tensor  # [n, T + 1, h, h], the reconstruction with 0, 1, .. T objects
    reconstruction: Tensor  # [n, h, h], the one with `counts` objects


@torch.no_grad()
def infer(
    air: AIR, x: Tensor | np.ndarray, sample: bool = True, max_objects: int | None = None, looks: int = 1
) -> Inference:
    """What is on the canvases `x` `[n, h, h]`, floats in [0, 1] or uint8, light on black (`images.to_canvases`).

    sample: whether to sample the guide, as the literature does to report accuracy, or to take at each
        choice what it holds most probable (see `MostProbable`).
    max_objects: T, the most objects that can be found, if not as many as in training.
    looks: how many times to look at each image; what explains it best, with the largest `log_weight`, is kept.
        The residual guide looks at slightly other places each time, which mends many of its mistakes.

    Raises ValueError for what cannot be such canvases.
    """
    if max_objects is not None and not 1 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects must be from 1 to {MAX_OBJECTS}, not {max_objects}")
    if looks < 1:
        raise ValueError(f"looks must be at least 1, not {looks}")
    x = check_canvases(air, x)
    kept = None
    for look in range(looks):
        with nullcontext() if sample else MostProbable():
            slots, log_weight = log_importance_weight(air, x, max_objects, look)
        names = ("z_pres_prob", "z_pres", "z_where", "z_what", "z_what_mean", "canvas")
        seen = [log_weight, *(torch.stack([getattr(slot, name) for slot in slots], 1) for name in names)]
        kept = kept or seen
        better = log_weight > kept[0]
        kept = [torch.where(better.view(-1, *[1] * (part.dim() - 1)), new, part) for part, new in zip(kept, seen)]
    log_weight, z_pres_prob, z_pres, z_where, z_what, z_what_mean, canvases = kept
    canvases = torch.cat([torch.zeros_like(x)[:, None], canvases], 1)
    counts = z_pres.sum(1).long()
    reconstruction = canvases[torch.arange(len(x), device=x.device), counts]
    error, ink = ((part**2).sum((1, 2)) for part in (x - reconstruction, x))
    # q(n) = (more, n times) * (then no more); after T steps it is over for sure.
    ones = torch.ones_like(z_pres_prob[:, :1])
    return Inference(
        counts=counts,
        q_count=torch.cat([ones, z_pres_prob.cumprod(1)], 1) * torch.cat([1 - z_pres_prob, ones], 1),
        log_weight=log_weight,
        explained=1 - (error / ink.clamp(min=1e-6)).clamp(max=1),
        z_where=z_where,
        z_what=z_what,
        z_what_mean=z_what_mean,
        boxes=pose_to_box(z_where, air.image_size),
        x_att=torch.stack([image_to_object(pose, x[:, None], air.window_size)[:, 0] for pose in z_where.unbind(1)], 1),
        y_att=torch.stack([air.decode(code) for code in z_what.unbind(1)], 1),
        canvases=canvases,
        reconstruction=reconstruction,
    )


def explain(air: AIR, x: Tensor | np.ndarray, max_objects: int | None = None) -> Inference:
    """The best explanation that is known of the canvases `x`, without chance: what predict.py reports.

    By several looks, and allowing more objects than in training, where the guide can do so.
    """
    if not air.sees_residual:
        return infer(air, x, sample=False, max_objects=max_objects)
    most = max(MOST_OBJECTS, air.max_objects) if max_objects is None else max_objects
    return infer(air, x, False, most, LOOKS)


def check_canvases(air: AIR, x: Tensor | np.ndarray) -> Tensor:
    """The canvases as floats in [0, 1], where the model is. Raises ValueError for what cannot be such."""
    if isinstance(x, np.ndarray):  # PyTorch takes no other byte order and no negative strides.
        x = np.array(x, x.dtype.newbyteorder("="))
    x = torch.as_tensor(x, device=air.z_where_loc.device)
    x = (x / 255 if x.dtype == torch.uint8 else x).to(air.z_where_loc)
    if x.shape[1:] != (air.image_size, air.image_size) or not x.numel():
        raise ValueError(f"canvases have shape {list(x.shape)}, expected [n, {air.image_size}, {air.image_size}]")
    if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
        raise ValueError("canvases have values outside [0, 1], or NaN")
    light = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).median(1)[0] > 0.5
    if light.any():
        warnings.warn(f"{light.sum()} of {len(x)} canvases are not light on black: images.to_canvases makes them so")
    return x


@torch.no_grad()
def log_importance_weight(
    air: AIR, x: Tensor, max_objects: int | None = None, look: int = 0
) -> tuple[list[Slot], Tensor]:
    """One run of the guide for the canvases `x`, and its `log p(x, z) - log q(z | x)` `[n]`, in nats."""
    guide, model = traces(air, x, max_objects, look)
    log_p, log_q = (
        sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site) for trace in (model, guide)
    )
    return guide.nodes["_RETURN"]["value"], log_p - log_q


@torch.no_grad()
def traces(air: AIR, x: Tensor, max_objects: int | None = None, look: int = 0) -> tuple[poutine.Trace, poutine.Trace]:
    """A run of the guide, and the model replayed on it: their traces, with log-probabilities, as evaluated."""
    training = air.training
    air.eval()
    try:
        guide = poutine.trace(air.guide).get_trace(x, max_objects, look)
        model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(x, max_objects=max_objects)
    finally:
        air.train(training)
    guide.compute_log_prob()
    model.compute_log_prob()
    return guide, model


class MostProbable(Messenger):
    """Within it nothing depends on chance: a Bernoulli takes its likelier value, a pose its mean.

    A code takes one fixed draw of its noise: the decoder has learned to paint from noisy codes, not from their means.
    """

    def _pyro_sample(self, msg):
        fn = msg["fn"]
        if msg["value"] is not None or not isinstance(fn, torch.distributions.Distribution):
            return
        if isinstance(fn, dist.Bernoulli):
            msg["value"] = (fn.mean > 0.5).to(fn.mean)
        elif msg["name"].startswith("z_what"):
            noise = torch.randn(fn.event_shape, generator=torch.Generator().manual_seed(0))
            msg["value"] = fn.mean + fn.stddev * noise.to(fn.mean)
        else:
            msg["value"] = fn.mean
