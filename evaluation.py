"""How good is an AIR: the numbers that main.py, the notebook and the benchmarks quote."""

import numpy as np
import torch

from air import AIR
from multi_mnist import Scenes


def to_images(x: np.ndarray | torch.Tensor, device="cpu") -> torch.Tensor:
    """Images as AIR takes them: uint8 becomes floats in [0, 1]."""
    x = torch.as_tensor(x).to(device)
    return x.float() / 255 if x.dtype == torch.uint8 else x


def evaluate(air: AIR, scenes: Scenes, batch_size: int = 500, seed: int = 0) -> dict:
    """Count accuracy, ELBO and the like on `scenes`, one sample of the guide per image.

    With its own random numbers: whether and when it is called does not change a training run.

    Returns a dictionary of plain numbers, the part of a line of metrics.jsonl that is measured here:
    images; elbo (nats per image); count_accuracy (of the sampled count); count_accuracy_mode (of the
    most probable count); confusion (true count 0.. by sampled count 0..T); last_step_rate (share of
    images that used step T). What needs true counts is None if there are none.
    """
    device = next(air.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = []
        for start in range(0, len(scenes.x), batch_size):
            inference = air.infer(to_images(scenes.x[start : start + batch_size], device))
            batches.append((inference.counts, inference.count_probs.argmax(-1), inference.elbo))
    counts, modes, elbo = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    result = {
        "images": len(counts),
        "elbo": float(elbo.mean(dtype=np.float64)),
        "count_accuracy": None,
        "count_accuracy_mode": None,
        "confusion": None,
        "last_step_rate": float((counts == air.num_steps).mean()),
    }
    if scenes.counts is not None:
        confusion = np.zeros((scenes.counts.max() + 1, air.num_steps + 1), int)
        np.add.at(confusion, (scenes.counts, counts), 1)
        result["count_accuracy"] = float((counts == scenes.counts).mean())
        result["count_accuracy_mode"] = float((modes == scenes.counts).mean())
        result["confusion"] = confusion.tolist()
    return result
