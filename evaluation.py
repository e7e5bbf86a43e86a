"""How good is an AIR: the numbers that main.py and the benchmarks quote; and what is ordinary to it."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from air import AIR
from images import Canvas, letterbox, piece_lengths, rescale
from inference import Inference, check_canvases, infer, traces
from multi_mnist import Scenes
from patches import Found, find

# Of the canvases of a batch, 500 of multi-MNIST's scenes with T = 3: all that is painted then takes about 200 MB.
BATCH_PIXELS = 500 * 4 * 50**2
# An image is scaled until its objects are so long, in usual windows, unless it would hardly change.
OBJECT, USUAL = 0.8, (0.75, 1.07)
LARGER = 5  # An image is not made larger than by this.
SHRINKS = 0.12  # how much less of its ink is explained if it is made smaller, but for its objects
KEPT_WHOLE = 30  # images of which an evaluation keeps everything
USED = 0.1  # the least variance of the means of a code's dimension that is used
MEMBERS = 100  # objects for each Gaussian of the mixture that is fitted to them
RARE = 0.003  # the share of ordinary scenes that each of two bounds leaves out
# What is measured, see docs/dashboard.md.
METRICS = """
    images elbo count_accuracy count_accuracy_mode count_accuracy_search count_error_search calibration_error
    sure_but_wrong reliability confusion last_step_rate baseline_r2
""".split()


class ReferenceStats(NamedTuple):
    """What ordinary scenes look like to an AIR: all but a share `RARE` of them are within each of two bounds."""

    log_weight: float  # nats; that of an image with n objects is at least `log_weight + n * per_object`
    per_object: float
    explained: float  # the least share of ink explained, see `Found`
    temperature: float | None  # of `Found.count_probs`, see `calibrate`; None if there was too little to learn from


class Evaluation(NamedTuple):
    """Of one sample of the guide for each of `n` images: what was measured, and what it saw."""

    metrics: dict  # see `evaluate`
    counts: np.ndarray  # int64 [n], the number of objects
    boxes: np.ndarray  # [n, T, 4], the windows as (x, y, w, h) in pixels; a step t was used where t < counts
    first: Inference  # all about the first images, as arrays


def evaluate(
    air: AIR, scenes: Scenes, max_objects: int | None = None, measure_search=False, temperature: float | None = None
) -> Evaluation:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    max_objects: T, the most objects that can be found, if not as many as in training.
    measure_search: whether `patches.find` is measured as well, which looks for more objects if it can.
    temperature: of its probabilities, which are measured if it is given.
    With its own random numbers: whether and when it is called does not change a training run.

    The metrics are the part of a line of metrics.jsonl that is measured here, see docs/dashboard.md; baseline_r2 is of
    the first batch. What needs true counts, or the RNN baseline, is None if there are none.
    """
    max_objects = max_objects or air.max_objects
    batch_size = default_batch_size(air, max_objects)
    with seeded_rng(air.z_where_loc.device):
        batches, first = [], []
        for start in range(0, len(scenes.x), batch_size):
            x = scenes.x[start : start + batch_size]
            seen = infer(air, x, max_objects=max_objects)
            batches.append((seen.counts, seen.count_probs.argmax(-1), seen.log_weight, seen.boxes))
            if start < KEPT_WHOLE:
                first.append([part[: KEPT_WHOLE - start].cpu().numpy() for part in seen])
        r2 = None if air.baseline is None else baseline_r2(air, check_canvases(air, scenes.x[:batch_size]))
    counts, modes, elbo, boxes = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    metrics = dict.fromkeys(METRICS) | {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "last_step_rate": float((counts == max_objects).mean()),
        "baseline_r2": r2,
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, max_objects + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        metrics["count_accuracy"] = float((counts == scenes.counts).mean())
        metrics["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        if measure_search:
            metrics |= search_metrics(find(air, scenes.x), scenes.counts, temperature)
        metrics["confusion"] = confusion.tolist()
    return Evaluation(metrics, counts, boxes, Inference(*map(np.concatenate, zip(*first))))


def search_metrics(seen: list[Found], counts: np.ndarray, temperature: float | None) -> dict:
    """Accuracy and mean error of what the search finds, and, with a temperature, whether its probabilities can be
    believed.

    reliability: of the images whose most probable count has a probability in each tenth, if there are any: its mean,
        the share that is right, and how many they are. calibration_error: the expected calibration error from it.
    sure_but_wrong: the share of all images whose count is wrong although its probability is above 0.99.
    """
    found = np.array([found.count for found in seen])
    metrics = {
        "count_accuracy_search": float((found == counts).mean()),
        "count_error_search": float(np.abs(found - counts).mean()),
    }
    if temperature is not None:
        of_counts = [found.count_probs(temperature) for found in seen]
        probs, guess = (np.array([f(row) for row in of_counts]) for f in (np.max, np.argmax))
        right, tenths = guess == counts, np.minimum((probs * 10).astype(int), 9)
        parts = [tenths == i for i in np.unique(tenths)]
        bins = [[float(probs[part].mean()), float(right[part].mean()), int(part.sum())] for part in parts]
        metrics["reliability"] = bins
        metrics["calibration_error"] = sum(n * abs(share - prob) for prob, share, n in bins) / len(counts)
        metrics["sure_but_wrong"] = float((~right & (probs > 0.99)).mean())
    return metrics


def find_at_scale(air: AIR, canvases: list[Canvas], lengths: list[float | None]) -> list[tuple[Found, Canvas, bool]]:
    """What is in images of any sizes, scaled so that their objects are about as long as in training.

    lengths: how long the objects of each are, in pixels; None: it is estimated, from the lengths of connected pieces.
    Returns what was found, the canvas as it was looked at, and whether its scale is in doubt. Pieces that are longer
    than usual may be large objects or several that touch. Then the image is looked at as it is as well; if it is
    explained better by SHRINKS or more, it stays as it is.
    """
    looked_at, again, in_doubt = [], [], []
    for canvas, length in zip(canvases, lengths, strict=True):
        in_doubt.append(False)
        if not air.sees_residual:
            looked_at.append(letterbox(canvas, air.image_size))
            continue
        pieces = [length] if length else piece_lengths(canvas.x)
        ratio = OBJECT * air.usual_window / np.median(pieces) if len(pieces) else 1.0
        in_doubt[-1], ratio = ratio > LARGER, min(ratio, LARGER)
        looked_at.append(rescale(canvas, 1.0 if USUAL[0] < ratio < USUAL[1] else ratio))
        if ratio <= USUAL[0] and not length:
            again.append(len(looked_at) - 1)
    found = find(air, [canvas.x for canvas in looked_at])
    for i, as_it_is in zip(again, find(air, [canvases[i].x for i in again])):
        in_doubt[i] = as_it_is.explained > found[i].explained + SHRINKS / 3
        if as_it_is.explained > found[i].explained + SHRINKS:
            looked_at[i], found[i] = canvases[i], as_it_is
    return list(zip(found, looked_at, in_doubt))


def evaluate_images(
    air: AIR, canvases: list[Canvas], counts: np.ndarray | None, reference: ReferenceStats | None, length: float | None
) -> dict:
    """The metrics that can be had of images of any sizes, looked at as predict.py does: those of the search."""
    metrics = dict.fromkeys(METRICS) | {"images": len(canvases)}
    if counts is not None:
        seen = [found for found, *_ in find_at_scale(air, canvases, [length] * len(canvases))]
        metrics |= search_metrics(seen, counts, reference and reference.temperature)
    return metrics


def calibrate(seen: list[Found], counts: np.ndarray) -> float:
    """The temperature with which the probabilities of the true counts `[n]` have the largest likelihood.

    The evidence is too sure of itself: it takes pixels for independent, and they are wrong together.
    """

    def log_likelihood(temperature: float) -> float:
        # A count that no explanation had is as unlikely as it can be said.
        probs = [dict(enumerate(found.count_probs(temperature))).get(true, 0.0) for found, true in zip(seen, counts)]
        return np.log(np.maximum(probs, 1e-4)).mean()

    return float(max(np.geomspace(0.5, 50, 50), key=log_likelihood))


def recombine(x: np.ndarray, counts: np.ndarray, n: int = 600, most: int = 5) -> Scenes:
    """Scenes of known counts, 0 to `most`, equally often, without labels: sums of images in which one object was found.

    x: canvases, uint8 `[m, h, h]`; counts: what was found on them, `[m]`. As with MNIST's scenes, no pixel exceeds
    white. Raises ValueError if there are too few images to choose from, or they hardly ever fit.
    """
    singles, rng, scenes = x[counts == 1], np.random.default_rng(0), []
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


def learn_objects(air: AIR, x: np.ndarray) -> None:
    """Fit `air.familiarity` to the objects that one sample of the guide finds on canvases `x`, uint8 `[n, h, h]`.

    Dimensions of the code that the guide does not use, whose means hardly vary, keep the prior; so does everything
    where hardly any objects are found.
    """
    from sklearn.mixture import GaussianMixture  # only here: it takes a second to import

    batch_size, size, parts = default_batch_size(air, air.max_objects), 1 + air.z_what_size, []
    with seeded_rng(air.z_where_loc.device):
        for start in range(0, len(x), batch_size):
            seen = infer(air, x[start : start + batch_size])
            used = torch.arange(air.max_objects, device=seen.counts.device) < seen.counts[:, None]
            parts.append([air.features(seen.z_where, seen.z_what)[used], seen.z_what_mean[used]])
    features, means = (torch.cat(part).cpu().numpy() for part in zip(*parts))
    components = min(len(air.familiarity.logits), len(features) // MEMBERS)
    if components == 0:
        return
    used = np.flatnonzero(np.append(True, means.var(0) > USED))  # The size always is.
    # (By default it begins with k-means, whose sums depend on how threads run.)
    fitted = GaussianMixture(components, reg_covar=0.01, random_state=0, init_params="k-means++")
    fitted.fit(features[:, used].astype(float))
    loc, covariance = np.zeros((components, size)), np.tile(np.eye(size), (components, 1, 1))
    loc[:, used], covariance[:, used[:, None], used] = fitted.means_, fitted.covariances_
    air.familiarity.logits.fill_(-1e4)  # those that are left over
    values = np.log(fitted.weights_), loc, np.linalg.cholesky(covariance)
    for buffer, value in zip(air.familiarity.buffers(), values):
        buffer[:components] = torch.from_numpy(value)


def reference_stats(air: AIR, train_x: np.ndarray, x: np.ndarray) -> ReferenceStats:
    """What is ordinary, measured on canvases `x` `[n, h, h]`, uint8, in the way in which predict.py looks at images,
    once it is known from others, `train_x`, what objects look like."""
    learn_objects(air, train_x)
    seen = find(air, x)
    counts, log_weight, explained = (
        np.array([getattr(found, name) for found in seen]) for name in ("count", "log_weight", "explained")
    )
    try:
        scenes = recombine(x, counts)
        temperature = calibrate(find(air, scenes.x), scenes.counts)
    except ValueError:
        temperature = None
    return ReferenceStats(*bounds(counts, log_weight, explained), temperature)


def bounds(counts: np.ndarray, log_weight: np.ndarray, explained: np.ndarray) -> tuple[float, float, float]:
    """The bounds that all but a few scenes are within, given of each what `ReferenceStats` is about, `[n]` each."""
    shares = np.bincount(counts) / len(counts)
    # Scenes without any object do not tell what one costs, nor do a few with a count that they should not have.
    kinds = [n for n in np.flatnonzero(shares > 0.02) if n > 0]
    kinds = kinds if len(kinds) > 1 else [0, *kinds]
    middles = [np.median(log_weight[counts == n]) if n or shares[0] else log_weight.max() for n in kinds]
    slope = np.polyfit(kinds, middles, 1)[0] if len(kinds) > 1 else 0.0
    start = np.quantile((log_weight - slope * counts)[counts >= min(kinds)], RARE)
    return float(start), float(slope), float(np.quantile(explained, RARE))


def out_of_distribution(reference: ReferenceStats, count: int, log_weight: float, explained: float) -> list[str]:
    """What is unlike the scenes that an AIR was trained on, in words; nothing if it is like them."""
    least = reference.log_weight + count * reference.per_object
    signs = []
    if explained < reference.explained:
        signs.append(f"{explained:.0%} of its ink is explained, usually at least {reference.explained:.0%}")
    if log_weight < least:
        signs.append(f"its log-weight is {log_weight:.0f} nats, with {count} objects usually at least {least:.0f}")
    return signs


def default_batch_size(air: AIR, max_objects: int) -> int:
    """Images that are looked at together: fewer of large ones, so that memory does not grow with the canvas."""
    return max(1, BATCH_PIXELS // ((max_objects + 1) * air.image_size**2))


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval (Wilson's) of a probability of which a `share` of `n` trials was seen."""
    from scipy.stats import binomtest  # only here: it takes a second to import

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
def seeded_rng(device: torch.device):
    """Within it, PyTorch's random numbers start from a seed; outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
