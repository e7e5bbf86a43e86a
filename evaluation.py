"""How good is an AIR: the numbers that main.py, the notebook and the benchmarks quote."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from air import AIR, Inference, to_images
from images import largest_objects
from multi_mnist import Scenes

# Of the canvases of a batch, 500 of multi-MNIST's scenes with T = 3: all that is painted then takes about 200 MB.
BATCH_PIXELS = 500 * 4 * 50**2
KEPT_WHOLE = 30  # images of which an evaluation keeps everything
UNUSUAL = 0.003  # the share of ordinary scenes that each of three signs takes for unusual


class Usual(NamedTuple):
    """What ordinary scenes look like to an AIR: all but a share `UNUSUAL` of them are within each of three bounds."""

    elbo: float  # nats; the ELBO of an image with n objects is at least `elbo + n * elbo_per_object`
    elbo_per_object: float
    explained: float  # the least share of ink explained, see `Inference`
    largest_object: float  # pixels, see `images.largest_objects`


class Evaluation(NamedTuple):
    """Of one sample of the guide for each of `n` images: what was measured, and what it saw."""

    metrics: dict  # see `evaluate`
    usual: Usual
    counts: np.ndarray  # int64 [n], the number of objects
    boxes: np.ndarray  # [n, T, 4], the windows as (x, y, w, h) in pixels; a step t was used where t < counts
    first: Inference  # all about the first images, as arrays


def evaluate(
    air: AIR,
    scenes: Scenes,
    num_steps: int | None = None,
    looks: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    num_steps: T, the most objects that can be found, if not as many as in training.
    looks: if more than 1, the accuracy of so many looks is measured as well, see `AIR.explain`.
    With its own random numbers: whether and when it is called does not change a training run.

    The metrics are plain numbers, the part of a line of metrics.jsonl that is measured here: images; elbo (nats per
    image); count_accuracy (of the sampled count); count_accuracy_mode (of the most probable count);
    count_accuracy_looks (without sampling, of the best of several looks); confusion (true count 0.. by sampled count
    0..T); last_step_rate (share of images that used step T); baseline_r2 (see that function; of the first batch). What
    needs true counts, or the RNN baseline, is None if there are none.
    """
    device = next(air.parameters()).device
    num_steps = num_steps or air.num_steps
    batch_size = batch_size or default_batch_size(air, num_steps)
    with seeded_rng(device, seed):
        batches, best, first = [], [], []
        for start in range(0, len(scenes.x), batch_size):
            x = to_images(scenes.x[start : start + batch_size])
            seen = air.explain(x, num_steps=num_steps)
            batches.append((seen.counts, seen.count_probs.argmax(-1), seen.elbo, seen.explained, seen.boxes))
            if start < KEPT_WHOLE:
                first.append([part[: KEPT_WHOLE - start].cpu().numpy() for part in seen])
            if looks > 1:
                seen = air.explain(x, False, num_steps, looks)
                best.append((seen.counts, seen.elbo, seen.explained))
        r2 = None if air.baseline is None else baseline_r2(air, to_images(scenes.x[:batch_size], device))
    counts, modes, elbo, explained, boxes = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    # By several looks if there are some: so it is done in the end, and the bounds are closer.
    best = [torch.cat(parts).cpu().numpy() for parts in zip(*best)] if best else [counts, elbo, explained]
    metrics = {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "count_accuracy": None,
        "count_accuracy_mode": None,
        "count_accuracy_looks": None,
        "confusion": None,
        "last_step_rate": float((counts == num_steps).mean()),
        "baseline_r2": r2,
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, num_steps + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        metrics["count_accuracy"] = float((counts == scenes.counts).mean())
        metrics["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        if looks > 1:
            metrics["count_accuracy_looks"] = float((best[0] == scenes.counts).mean())
        metrics["confusion"] = confusion.tolist()
    return Evaluation(
        metrics, usual(*best, largest_objects(scenes.x)), counts, boxes, Inference(*map(np.concatenate, zip(*first)))
    )


def usual(counts: np.ndarray, elbo: np.ndarray, explained: np.ndarray, largest: np.ndarray) -> Usual:
    """What is usual, given of each scene `[n]` its count, its ELBO, the share of ink explained, its largest object."""
    shares = np.bincount(counts) / len(counts)
    # What an object costs is not said by scenes without any, nor by a few with a count that they should not have.
    kinds = [n for n in np.flatnonzero(shares > 0.02) if n > 0]
    kinds = kinds if len(kinds) > 1 else [0, *kinds]
    middles = [np.median(elbo[counts == n]) if n or shares[0] else elbo.max() for n in kinds]
    slope = np.polyfit(kinds, middles, 1)[0] if len(kinds) > 1 else 0.0
    start = np.quantile((elbo - slope * counts)[counts >= min(kinds)], UNUSUAL)
    share, size = np.quantile(explained, UNUSUAL), np.quantile(largest, 1 - UNUSUAL)
    return Usual(float(start), float(slope), float(share), float(size))


def unusual(usual: Usual, count: int, elbo: float, explained: float, largest: float) -> list[str]:
    """What is unlike the scenes that an AIR was trained on, in words; nothing if it is like them."""
    least = usual.elbo + count * usual.elbo_per_object
    signs = []
    if explained < usual.explained:
        signs.append(f"{explained:.0%} of its ink is explained, usually at least {usual.explained:.0%}")
    if elbo < least:
        signs.append(f"its ELBO is {elbo:.0f} nats, with {count} objects usually at least {least:.0f}")
    if largest > usual.largest_object:
        signs.append(f"a piece of it is {largest:.0f} pixels long, usually at most {usual.largest_object:.0f}")
    return signs


def default_batch_size(air: AIR, num_steps: int) -> int:
    """Images that are looked at together: fewer of large ones, so that memory does not grow with the canvas."""
    return max(1, BATCH_PIXELS // ((num_steps + 1) * air.image_size**2))


def importance_bound(air: AIR, scenes: Scenes, samples: int = 100, seed: int = 0) -> np.ndarray:
    """For each scene a lower bound on `log p(x)` in nats `[n]`: the log of the mean of `samples` importance weights.

    The weights are `p(x, z) / q(z | x)` at samples of the guide; with one of them it is the ELBO (Burda et
    al., ICLR 2016, arXiv:1509.00519).
    """
    device, batch_size = next(air.parameters()).device, default_batch_size(air, air.num_steps)
    bounds = []
    with seeded_rng(device, seed):
        for start in tqdm(
            range(0, len(scenes.x), batch_size), "importance weights", unit_scale=batch_size, leave=False
        ):
            x = to_images(scenes.x[start : start + batch_size], device)
            log_weights = torch.stack([air.log_importance_weight(x)[1] for _ in range(samples)])
            bounds.append(log_weights.logsumexp(0).cpu() - math.log(samples))
    return torch.cat(bounds).numpy()


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval (Wilson's) of a probability of which a `share` of `n` trials was seen."""
    low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(low), float(high)


def baseline_r2(air: AIR, x: torch.Tensor) -> float | None:
    """How much of the variance of what follows a choice of `z_pres` the RNN baseline predicts: at most 1.

    What follows is the part of the ELBO that TraceGraph_ELBO credits the choice with: all terms of
    its own step and of later ones. None if it does not vary.
    """
    guide, model = air.traces(x)
    gain, pairs = torch.zeros_like(x[:, 0, 0]), []
    for t in reversed(range(air.num_steps)):
        gain = gain + model.nodes[f"gain_{t}"]["log_prob"]
        for name in (f"z_pres_{t}", f"z_where_{t}", f"z_what_{t}"):
            gain = gain + model.nodes[name]["log_prob"] - guide.nodes[name]["log_prob"]
        predicted = guide.nodes[f"z_pres_{t}"]["infer"]["baseline"]["baseline_value"].reshape(len(x))
        # Only where there is a choice.
        open_ = guide.nodes[f"z_pres_{t - 1}"]["value"] == 1 if t else torch.ones_like(gain, dtype=torch.bool)
        pairs.append(torch.stack([gain, predicted])[:, open_])
    gains, predictions = torch.cat(pairs, 1)
    variance = gains.var(correction=0)
    return float(1 - (gains - predictions).square().mean() / variance) if variance > 0 else None


@contextmanager
def seeded_rng(device: torch.device, seed: int = 0):
    """Within it, PyTorch's random numbers start from `seed`; outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
