"""Which pictures a run has, and where they are shown: as PNG files in its folder and on a visdom server."""

import sys
from pathlib import Path

import numpy as np
import torch
from pyro import poutine
from tqdm import tqdm

from air import AIR
from evaluation import Evaluation, evaluate, seeded_rng
from multi_mnist import Scenes
from training.checkpoint import write_file
from training.run import RunError, read_metrics

TITLES = {
    "attention": "{split} scenes: where the guide looked, step by step, and how many objects it counted",
    "reconstruction": "{split} scenes, and what the model makes of them",
    "steps": "{split} scenes, step by step: what was seen (crop), what was painted (object), the canvas after it",
    "mistakes": "{split} scenes (of {images:,}) counted wrong: true count → inferred count",
    "prior": "Scenes sampled from the model (without the noise of pixels): before it learned anything, and now",
    "curves": "Validation scenes, as it learns",
    "confusion": "{split} scenes: counts",
}
CURVES = {
    "ELBO, nats per image": "elbo",
    "count accuracy": "count_accuracy",
    "steps per second, on average so far": "steps_per_s",
    "variance of the cost of a choice\nthat the baseline explains": "baseline_r2",
}


class Pictures:
    """Shows a run's pictures. Raises RunError if visdom is asked for, and does not answer or refuses.

    visdom: "off", "auto" (a server on this machine, if there is one) or a server's URL.
    """

    def __init__(self, folder: Path, visdom: str, env: str, seed: int):
        self.folder, self.seed, self.lost = folder, seed, False
        self.dashboard = None if visdom == "off" else connect(visdom, env, folder)

    def show(self, air: AIR, split: str, scenes: Scenes, evaluation: Evaluation | None = None) -> None:
        """Draw the pictures of a run as it stands, and show them in place of earlier ones.

        evaluation: of `scenes`, if it is there; otherwise the first 1,000 of them are evaluated.
        All pictures are sent each time, so that a server that was started again has all of them.
        """
        import viz  # only when it is used: matplotlib takes a second to import

        if evaluation is None:
            scenes = Scenes(*(None if part is None else part[:1000] for part in scenes))
            evaluation = evaluate(air, scenes)
        pictures = draw(air, split, scenes, evaluation, read_metrics(self.folder), self.seed)
        for name, (_, picture) in pictures.items():
            write_file(self.folder / f"{name}.png", viz.png(picture))
        if self.dashboard is None:
            return
        try:
            if self.lost:
                self.dashboard.connect()  # A server that was started again may want a new login.
            for name, (title, picture) in pictures.items():
                self.dashboard.show(name, title, picture)
            self.lost = False
        except ConnectionError as error:
            if not self.lost:
                still = f"pictures still go to {self.folder}, and to visdom again when it is back"
                tqdm.write(f"{error}; {still}", sys.stderr)
            self.lost = True


def connect(visdom: str, env: str, folder: Path):
    """The dashboard, or None if there is none and none was asked for by its URL. Raises RunError as above."""
    import viz

    url = "http://localhost:8097" if visdom == "auto" else visdom
    try:
        return viz.Dashboard(url, env)
    except ConnectionError as error:
        if visdom != "auto":
            raise RunError(f"--visdom: {error}") from None
        print(f"{error}; pictures go to {folder} only", file=sys.stderr)
        return None


def draw(air: AIR, split: str, scenes: Scenes, evaluation: Evaluation, lines: list[dict], seed: int) -> dict:
    """A run's pictures as it stands, by name, each with its title.

    evaluation: of `scenes`. lines: of metrics.jsonl so far. seed: the run's, for what it was before training.
    """
    import viz

    first, counts = evaluation.first, evaluation.counts
    x = scenes.x[: len(first.counts)]
    boxes = [box[:count] for box, count in zip(evaluation.boxes, counts)]
    titles = {name: title.format(split=split.capitalize(), images=len(counts)) for name, title in TITLES.items()}

    columns = min(10, len(x))
    n = len(x) // columns * columns
    rows = [slice(start, start + columns) for start in range(0, n, columns)]
    both = [pair for row in rows for side in (x, first.reconstruction) for pair in zip(side[row], boxes[row])]
    few = np.argsort(first.counts == 0, kind="stable")[:6]  # if possible, such with something in them
    steps = (part[few] for part in (first.boxes, first.counts, first.x_att, first.y_att, first.canvases))
    pictures = {
        "attention": viz.draw_scenes(x[:n], boxes[:n], counts[:n], columns, titles["attention"]),
        "reconstruction": viz.draw_scenes(
            *zip(*both), None, columns, titles["reconstruction"], labels=["scene", "model"] * len(rows)
        ),
        "steps": viz.draw_steps(x[few], *steps, first.q_count[few], title=titles["steps"]),
        "prior": viz.draw_scenes(prior_samples(air, seed), None, None, 10, titles["prior"], labels=["before", "now"]),
    }
    if scenes.counts is not None:
        wrong = np.flatnonzero(scenes.counts != counts)[:30]
        captions = [f"{scenes.counts[i]} → {counts[i]}" for i in wrong]
        some = [boxes[i] for i in wrong]
        pictures["mistakes"] = viz.draw_scenes(scenes.x[wrong], some, captions, columns, titles["mistakes"])
    validated = [line for line in lines if line["split"] == "validation"]
    if validated:
        steps, seconds, *curves = (
            [line.get(name) for line in validated] for name in ("step", "seconds", *CURVES.values())
        )
        known = {title: (steps, seconds, curve) for title, curve in zip(CURVES, curves) if curve[-1] is not None}
        pictures["curves"] = viz.draw_curves(known, titles["curves"])
        confusion = [line["confusion"] for line in lines if line["split"] == split][-1:]
        if confusion and confusion[0]:
            pictures["confusion"] = viz.draw_confusion(confusion[0], titles["confusion"])
    return {name: (titles[name], picture) for name, picture in pictures.items()}


@torch.no_grad()
def prior_samples(air: AIR, seed: int) -> np.ndarray:
    """Twenty scenes `[20, h, h]` of the model, run forward: ten as they were painted before training, ten as now.

    With given numbers of objects, and as the mean of what "x" is sampled from.
    """
    with seeded_rng(air.z_where_loc.device, seed):
        untrained = AIR(**air.config).to(air.z_where_loc.device)
    counts = torch.arange(1, 11, device=air.z_where_loc.device) % (air.max_objects + 1)
    given = {f"z_pres_{t}": (counts > t).to(air.z_where_loc) for t in range(air.max_objects)}
    samples = []
    for painter in (untrained, air):
        with seeded_rng(air.z_where_loc.device):
            trace = poutine.trace(poutine.condition(painter.model, given)).get_trace(num_scenes=len(counts))
        samples.append(trace.nodes["x"]["fn"].mean.clamp(0, 1).cpu().numpy())
    return np.concatenate(samples)
