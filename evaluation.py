"""How good is an AIR: the numbers that main.py, the notebook and the benchmarks quote."""

import math
from contextlib import contextmanager

import numpy as np
import torch
from pyro import poutine
from scipy.stats import binomtest
from tqdm import tqdm

from air import AIR, to_images
from multi_mnist import Scenes


def evaluate(air: AIR, scenes: Scenes, batch_size: int = 500, seed: int = 0) -> dict:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    With its own random numbers: whether and when it is called does not change a training run.

    Returns a dictionary of plain numbers, the part of a line of metrics.jsonl that is measured here:
    images; elbo (nats per image); count_accuracy (of the sampled count); count_accuracy_mode (of the
    most probable count); confusion (true count 0.. by sampled count 0..T); last_step_rate (share of
    images that used step T); baseline_explains (see that function; of the first batch). What needs
    true counts, or the RNN baseline, is None if there are none.
    """
    device = next(air.parameters()).device
    with own_random_numbers(device, seed):
        batches = []
        for start in range(0, len(scenes.x), batch_size):
            inference = air.infer(scenes.x[start : start + batch_size])
            batches.append((inference.counts, inference.count_probs.argmax(-1), inference.elbo))
        explained = None if air.baseline is None else baseline_explains(air, to_images(scenes.x[:batch_size], device))
    counts, modes, elbo = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    result = {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "count_accuracy": None,
        "count_accuracy_mode": None,
        "confusion": None,
        "last_step_rate": float((counts == air.num_steps).mean()),
        "baseline_explains": explained,
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, air.num_steps + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        result["count_accuracy"] = float((counts == scenes.counts).mean())
        result["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        result["confusion"] = confusion.tolist()
    return result


def importance_bound(air: AIR, scenes: Scenes, samples: int = 100, batch_size: int = 500, seed: int = 0) -> np.ndarray:
    """For each scene a lower bound on `log p(x)` in nats `[n]`: the log of the mean of `samples` importance weights.

    The weights are `p(x, z) / q(z | x)` at samples of the guide; with one of them it is the ELBO (Burda et
    al., ICLR 2016, arXiv:1509.00519).
    """
    device = next(air.parameters()).device
    bounds = []
    with own_random_numbers(device, seed):
        for start in tqdm(
            range(0, len(scenes.x), batch_size), "importance weights", unit_scale=batch_size, leave=False
        ):
            x = to_images(scenes.x[start : start + batch_size], device)
            log_weights = torch.stack([air.weigh(x)[1] for _ in range(samples)])
            bounds.append(log_weights.logsumexp(0).cpu() - math.log(samples))
    return torch.cat(bounds).numpy()


def interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval (Wilson's) of a probability of which a `share` of `n` trials was seen."""
    low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(low), float(high)


@torch.no_grad()
def baseline_explains(air: AIR, x: torch.Tensor) -> float | None:
    """How much of the variance of what follows a choice of `z_pres` the RNN baseline predicts: at most 1.

    What follows is the part of the ELBO that TraceGraph_ELBO credits the choice with: all terms of
    its own step and of later ones. None if it does not vary.
    """
    guide = poutine.trace(air.guide).get_trace(x)
    model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    model.compute_log_prob()
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
def own_random_numbers(device: torch.device, seed: int = 0):
    """Within it, PyTorch's random numbers start from `seed`; outside they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
