"""How good is an AIR: the numbers that main.py and the benchmarks quote; and what is ordinary to it."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from air import AIR
from images import largest_component_length
from inference import LOOKS, Inference, check_canvases, explain, infer, log_importance_weight, traces
from multi_mnist import Scenes

# Of the canvases of a batch, 500 of multi-MNIST's scenes with T = 3: all that is painted then takes about 200 MB.
BATCH_PIXELS = 500 * 4 * 50**2
KEPT_WHOLE = 30  # images of which an evaluation keeps everything
RARE = 0.003  # the share of ordinary scenes that each of three bounds leaves out


class ReferenceStats(NamedTuple):
    """What ordinary scenes look like to an AIR: all but a share `RARE` of them are within each of three bounds."""

    log_weight: float  # nats; that of an image with n objects is at least `log_weight + n * per_object`
    per_object: float
    explained: float  # the least share of ink explained, see `Inference`
    largest_component: float  # pixels, see `images.largest_component_length`


class Evaluation(NamedTuple):
    """Of one sample of the guide for each of `n` images: what was measured, and what it saw."""

    metrics: dict  # see `evaluate`
    counts: np.ndarray  # int64 [n], the number of objects
    boxes: np.ndarray  # [n, T, 4], the windows as (x, y, w, h) in pixels; a step t was used where t < counts
    first: Inference  # all about the first images, as arrays


def evaluate(
    air: AIR,
    scenes: Scenes,
    max_objects: int | None = None,
    several_looks: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    max_objects: T, the most objects that can be found, if not as many as in training.
    several_looks: whether to measure the accuracy of the best of several looks as well, see `inference.infer`; not
        done for the RNN guide, for which they are all the same.
    With its own random numbers: whether and when it is called does not change a training run.

    The metrics are the part of a line of metrics.jsonl that is measured here, see docs/dashboard.md; baseline_r2 is of
    the first batch. What needs true counts, or the RNN baseline, is None if there are none.
    """
    max_objects = max_objects or air.max_objects
    batch_size = batch_size or default_batch_size(air, max_objects)
    with seeded_rng(air.z_where_loc.device, seed):
        batches, best, first = [], [], []
        for start in range(0, len(scenes.x), batch_size):
            x = scenes.x[start : start + batch_size]
            seen = infer(air, x, max_objects=max_objects)
            batches.append((seen.counts, seen.q_count.argmax(-1), seen.log_weight, seen.boxes))
            if start < KEPT_WHOLE:
                first.append([part[: KEPT_WHOLE - start].cpu().numpy() for part in seen])
            if several_looks and air.sees_residual:
                best.append(infer(air, x, False, max_objects, LOOKS).counts)
        r2 = None if air.baseline is None else baseline_r2(air, check_canvases(air, scenes.x[:batch_size]))
    counts, modes, elbo, boxes = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    metrics = {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "count_accuracy": None,
        "count_accuracy_mode": None,
        "count_accuracy_looks": None,
        "confusion": None,
        "last_step_rate": float((counts == max_objects).mean()),
        "baseline_r2": r2,
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, max_objects + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        metrics["count_accuracy"] = float((counts == scenes.counts).mean())
        metrics["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        if best:
            metrics["count_accuracy_looks"] = float((torch.cat(best).cpu().numpy() == scenes.counts).mean())
        metrics["confusion"] = confusion.tolist()
    return Evaluation(metrics, counts, boxes, Inference(*map(np.concatenate, zip(*first))))


def reference_stats(air: AIR, x: np.ndarray) -> ReferenceStats:
    """What is ordinary, measured on canvases `x` `[n, h, h]`, uint8, in the way in which predict.py looks at images."""
    batches = [explain(air, x[start : start + 100]) for start in range(0, len(x), 100)]
    parts = [(seen.counts, seen.log_weight, seen.explained) for seen in batches]
    counts, log_weight, explained = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    return bounds(counts, log_weight, explained, largest_component_length(x))


def bounds(
    counts: np.ndarray, log_weight: np.ndarray, explained: np.ndarray, largest_component: np.ndarray
) -> ReferenceStats:
    """The bounds that all but a few scenes are within, given of each what `ReferenceStats` is about, `[n]` each."""
    shares = np.bincount(counts) / len(counts)
    # Scenes without any object do not tell what one costs, nor do a few with a count that they should not have.
    kinds = [n for n in np.flatnonzero(shares > 0.02) if n > 0]
    kinds = kinds if len(kinds) > 1 else [0, *kinds]
    middles = [np.median(log_weight[counts == n]) if n or shares[0] else log_weight.max() for n in kinds]
    slope = np.polyfit(kinds, middles, 1)[0] if len(kinds) > 1 else 0.0
    start = np.quantile((log_weight - slope * counts)[counts >= min(kinds)], RARE)
    share, length = np.quantile(explained, RARE), np.quantile(largest_component, 1 - RARE)
    return ReferenceStats(float(start), float(slope), float(share), float(length))


def out_of_distribution(
    reference: ReferenceStats, count: int, log_weight: float, explained: float, largest_component: float
) -> list[str]:
    """What is unlike the scenes that an AIR was trained on, in words; nothing if it is like them."""
    least = reference.log_weight + count * reference.per_object
    signs = []
    if explained < reference.explained:
        signs.append(f"{explained:.0%} of its ink is explained, usually at least {reference.explained:.0%}")
    if log_weight < least:
        signs.append(f"its log-weight is {log_weight:.0f} nats, with {count} objects usually at least {least:.0f}")
    if largest_component > reference.largest_component:
        usual = f"usually at most {reference.largest_component:.0f}"
        signs.append(f"a connected piece of it is {largest_component:.0f} pixels long, {usual}")
    return signs


def default_batch_size(air: AIR, max_objects: int) -> int:
    """Images that are looked at together: fewer of large ones, so that memory does not grow with the canvas."""
    return max(1, BATCH_PIXELS // ((max_objects + 1) * air.image_size**2))


def importance_bound(air: AIR, scenes: Scenes, samples: int = 100, seed: int = 0) -> np.ndarray:
    """For each scene a lower bound on `log p(x)` in nats `[n]`: the log of the mean of `samples` importance weights.

    The weights are `p(x, z) / q(z | x)` at samples of the guide; with one of them it is the ELBO (Burda et
    al., ICLR 2016, arXiv:1509.00519).
    """
    batch_size, bounds = default_batch_size(air, air.max_objects), []
    with seeded_rng(air.z_where_loc.device, seed):
        for start in tqdm(
            range(0, len(scenes.x), batch_size), "importance weights", unit_scale=batch_size, leave=False
        ):
            x = check_canvases(air, scenes.x[start : start + batch_size])
            log_weights = torch.stack([log_importance_weight(air, x)[1] for _ in range(samples)])
            bounds.append(log_weights.logsumexp(0).cpu() - math.log(samples))
    return torch.cat(bounds).numpy()


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval (Wilson's) of a probability of which a `share` of `n` trials was seen."""
    low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(low), float(high)


def baseline_r2(air: AIR, x: torch.Tensor) -> float | None:
    """The explained variance of the RNN baseline: how much of the variance of what follows a choice it predicts.

    What follows is the part of the ELBO that TraceGraph_ELBO credits the choice of `z_pres` with: all terms of
    its own step and of later ones. At most 1; None if it does not vary.
    """
    guide, model = traces(air, x)
    gain, pairs = torch.zeros_like(x[:, 0, 0]), []
    for t in reversed(range(air.max_objects)):
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
