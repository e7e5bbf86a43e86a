"""Which pictures a run has, and where they are shown: as PNG files in its folder and on a visdom server."""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import viz
from air import AIR
from evaluation import Evaluation, evaluate
from multi_mnist import Scenes
from training.checkpoint import write_file
from training.run import UsageError, read_metrics

CURVES = {
    "ELBO, nats per image": "elbo",
    "count accuracy": "count_accuracy",
    "steps per second, on average so far": "steps_per_s",
    "variance of the cost of a choice\nthat the baseline explains": "baseline_r2",
}


class Pictures:
    """Shows a run's pictures. Raises UsageError if visdom is asked for, and does not answer or refuses.

    visdom: "off", "auto" (a server on this machine, if there is one) or a server's URL.
    """

    def __init__(self, folder: Path, visdom: str, env: str):
        self.folder, self.dashboard = folder, None
        try:
            if visdom != "off":
                self.dashboard = viz.Dashboard("http://localhost:8097" if visdom == "auto" else visdom, env)
        except ConnectionError as error:
            if visdom != "auto":
                raise UsageError(f"--visdom: {error}") from None
            print(f"{error}; pictures go to {folder} only", file=sys.stderr)

    def show(self, air: AIR, split: str, scenes: Scenes, evaluation: Evaluation | None = None) -> None:
        """Draw the pictures of a run as it stands, and show them in place of earlier ones.

        evaluation: of `scenes`, if it is there; otherwise the first 1,000 of them are evaluated.
        All pictures are sent each time, so that a server that was started again has all of them.
        """
        if evaluation is None:
            scenes = Scenes(*(None if part is None else part[:1000] for part in scenes))
            evaluation = evaluate(air, scenes)
        pictures = draw(air, split, scenes, evaluation, read_metrics(self.folder))
        for name, picture in pictures.items():
            write_file(self.folder / f"{name}.png", viz.png(picture))
        if self.dashboard is not None:
            try:
                self.dashboard.show(pictures)
            except ConnectionError as error:
                still = f"pictures still go to {self.folder}, and to visdom again when it is back"
                tqdm.write(f"{error}; {still}", sys.stderr)


def draw(air: AIR, split: str, scenes: Scenes, evaluation: Evaluation, lines: list[dict]) -> dict[str, np.ndarray]:
    """A run's pictures as it stands, by name. evaluation: of `scenes`; lines: of metrics.jsonl so far."""
    first, counts, split_scenes, pictures = evaluation.first, evaluation.counts, f"{split.capitalize()} scenes", {}
    boxes = [box[:count] for box, count in zip(evaluation.boxes, counts)]
    x = scenes.x[: len(first.counts)]
    columns = min(10, len(x))

    title = f"{split_scenes}: where the guide looked, step by step, and how many objects it counted"
    pictures["attention"] = viz.draw_scenes(x, boxes, counts, columns, title)

    title = f"{split_scenes}, and what the model makes of them"
    both, labels = [*x[:columns], *first.reconstruction[:columns]], ["scene", "model"]
    pictures["reconstruction"] = viz.draw_scenes(both, 2 * boxes[:columns], None, columns, title, labels)

    title = f"{split_scenes}, step by step: what was seen (crop), what was painted (object), the canvas after it"
    few = np.argsort(first.counts == 0, kind="stable")[:6]  # if possible, such with something in them
    steps = first.boxes, first.counts, first.x_att, first.y_att, first.canvases, first.count_probs
    pictures["steps"] = viz.draw_steps(x[few], *(part[few] for part in steps), title=title)

    if scenes.counts is not None:
        title = f"{split_scenes} (of {len(counts):,}) counted wrong: true count → inferred count"
        wrong = np.flatnonzero(scenes.counts != counts)[:30]
        captions = [f"{scenes.counts[i]} → {counts[i]}" for i in wrong]
        pictures["mistakes"] = viz.draw_scenes(scenes.x[wrong], [boxes[i] for i in wrong], captions, title=title)

    if validated := [line for line in lines if line["split"] == "validation"]:
        steps, seconds = ([line[name] for line in validated] for name in ("step", "seconds"))
        curves = {what: (steps, seconds, [line.get(name) for line in validated]) for what, name in CURVES.items()}
        known = {what: curve for what, curve in curves.items() if curve[2][-1] is not None}
        pictures["curves"] = viz.draw_curves(known, "Validation scenes, as it learns")

    confusions = [line["confusion"] for line in lines if line["split"] == split and line["confusion"]]
    if confusions:
        pictures["confusion"] = viz.draw_confusion(confusions[-1], f"{split_scenes}: counts")
    return pictures
