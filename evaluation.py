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
from inference import Inference, check_canvases, explain, infer, log_weight, most_objects, traces
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
    temperature: float | None  # of `Inference.count_probs`, see `calibrate`; None if there was too little to learn from


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
    measure_search: bool = False,
    temperature: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    max_objects: T, the most objects that can be found, if not as many as in training.
    measure_search: whether `inference.explain` is measured as well, which looks for more objects if it can.
    temperature: of its probabilities, which are measured if it is given.
    With its own random numbers: whether and when it is called does not change a training run.

    The metrics are the part of a line of metrics.jsonl that is measured here, see docs/dashboard.md; baseline_r2 is of
    the first batch. What needs true counts, or the RNN baseline, is None if there are none.
    """
    max_objects = max_objects or air.max_objects
    batch_size = batch_size or default_batch_size(air, max_objects)
    with seeded_rng(air.z_where_loc.device, seed):
        batches, first = [], []
        for start in range(0, len(scenes.x), batch_size):
            x = scenes.x[start : start + batch_size]
            seen = infer(air, x, max_objects=max_objects)
            batches.append((seen.counts, seen.count_evidence.argmax(-1), seen.log_weight, seen.boxes))
            if start < KEPT_WHOLE:
                first.append([part[: KEPT_WHOLE - start].cpu().numpy() for part in seen])
        r2 = None if air.baseline is None else baseline_r2(air, check_canvases(air, scenes.x[:batch_size]))
    counts, modes, elbo, boxes = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    metrics = {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "count_accuracy": None,
        "count_accuracy_mode": None,
        "count_accuracy_search": None,
        "calibration_error": None,
        "sure_but_wrong": None,
        "confusion": None,
        "last_step_rate": float((counts == max_objects).mean()),
        "baseline_r2": r2,
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, max_objects + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        metrics["count_accuracy"] = float((counts == scenes.counts).mean())
        metrics["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        if measure_search:
            metrics |= search_metrics(
                search(air, scenes.x, max(max_objects, most_objects(air))), scenes.counts, temperature
            )
        metrics["confusion"] = confusion.tolist()
    return Evaluation(metrics, counts, boxes, Inference(*map(np.concatenate, zip(*first))))


def search(air: AIR, x: np.ndarray, max_objects: int | None = None) -> Inference:
    """`inference.explain` on canvases `x` `[n, h, h]`; of what it sees the first fields, which take little memory."""
    bar, parts = tqdm(total=len(x), desc="searching", unit="image", leave=False, delay=2), []
    for start in range(0, len(x), 160):
        parts.append(explain(air, x[start : start + 160], max_objects)[:5])
        bar.update(len(parts[-1][0]))
    bar.close()
    return Inference(*map(torch.cat, zip(*parts)), *[None] * (len(Inference._fields) - 5))


def search_metrics(seen: Inference, counts: np.ndarray, temperature: float | None) -> dict:
    """Accuracy of the best explanations, and, with a temperature, whether the probabilities of counts can be believed.

    calibration_error: the expected calibration error of the most probable count, in ten equal bins of its probability.
    sure_but_wrong: the share of all images whose count is wrong although its probability is above 0.99.
    """
    metrics = {"count_accuracy_search": float((seen.counts.cpu().numpy() == counts).mean())}
    if temperature is not None:
        probs, guess = (part.cpu().numpy() for part in seen.count_probs(temperature).max(-1))
        right, bins = guess == counts, np.minimum((probs * 10).astype(int), 9)
        gaps = [abs((right[bins == i] - probs[bins == i].astype(float)).sum()) for i in range(10)]
        metrics["calibration_error"] = float(sum(gaps) / len(counts))
        metrics["sure_but_wrong"] = float((~right & (probs > 0.99)).mean())
    return metrics


def calibrate(seen: Inference, counts: np.ndarray) -> float:
    """The temperature with which the probabilities of the true counts `[n]` have the largest likelihood.

    The evidence is too sure of itself: it takes pixels for independent, and they are wrong together.
    """
    temperatures, true = np.geomspace(0.5, 50, 100), torch.from_numpy(counts).to(seen.counts)
    # A count that no explanation had is as unlikely as it can be said.
    log_probs = [
        seen.count_probs(t).clamp(min=1e-4).log().take_along_dim(true[:, None], 1).mean() for t in temperatures
    ]
    return float(temperatures[torch.stack(log_probs).argmax().item()])


def recombine(x: np.ndarray, counts: np.ndarray, n: int = 600, most: int = 5, seed: int = 0) -> Scenes:
    """Scenes of known counts, 0 to `most`, equally often, without labels: sums of images in which one object was found.

    x: canvases, uint8 `[m, h, h]`; counts: what was found on them, `[m]`. As with MNIST's scenes, no pixel exceeds
    white. Raises ValueError if there are too few images to choose from, or they hardly ever fit.
    """
    singles, rng, scenes = x[counts == 1], np.random.default_rng(seed), []
    if len(singles) < 20:
        raise ValueError(f"one object was found in {len(singles)} of {len(x)} images, too few to recombine")
    true = np.arange(n) % (most + 1)
    for count in true:
        for _ in range(1000):
            scene = singles[rng.choice(len(singles), count, replace=False)].sum(0, dtype=int)
            if scene.max() <= 255:
                break
        else:
            raise ValueError(f"{count} objects do not fit on a canvas of {x.shape[1]} pixels without overlapping")
        scenes.append(scene.astype(np.uint8))
    return Scenes(np.stack(scenes), true)


def reference_stats(air: AIR, x: np.ndarray) -> ReferenceStats:
    """What is ordinary, measured on canvases `x` `[n, h, h]`, uint8, in the way in which predict.py looks at images."""
    seen = search(air, x)
    counts, log_weight, explained = (part.cpu().numpy() for part in (seen.counts, seen.log_weight, seen.explained))
    try:
        scenes = recombine(x, counts)
        temperature = calibrate(search(air, scenes.x), scenes.counts)
    except ValueError:
        temperature = None
    return ReferenceStats(*bounds(counts, log_weight, explained, largest_component_length(x)), temperature)


def bounds(
    counts: np.ndarray, log_weight: np.ndarray, explained: np.ndarray, largest_component: np.ndarray
) -> tuple[float, float, float, float]:
    """The bounds that all but a few scenes are within, given of each what `ReferenceStats` is about, `[n]` each."""
    shares = np.bincount(counts) / len(counts)
    # Scenes without any object do not tell what one costs, nor do a few with a count that they should not have.
    kinds = [n for n in np.flatnonzero(shares > 0.02) if n > 0]
    kinds = kinds if len(kinds) > 1 else [0, *kinds]
    middles = [np.median(log_weight[counts == n]) if n or shares[0] else log_weight.max() for n in kinds]
    slope = np.polyfit(kinds, middles, 1)[0] if len(kinds) > 1 else 0.0
    start = np.quantile((log_weight - slope * counts)[counts >= min(kinds)], RARE)
    share, length = np.quantile(explained, RARE), np.quantile(largest_component, 1 - RARE)
    return float(start), float(slope), float(share), float(length)


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
            log_weights = torch.stack([log_weight(*traces(air, x)) for _ in range(samples)])
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
