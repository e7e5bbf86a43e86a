"""How well does an AIR understand its scenes: writes report.json and some pictures into the folder of a run.

    python benchmarks/report.py runs/NAME

All of it is measured on multi-MNIST's test scenes, or on others made of the same test digits; an object's code is the
mean of `q(z_what_t | x, z_where_t)` at the sampled window. The docstrings say what the numbers are. unseen.png shows
scenes of none to five digits, true count → inferred; search.png, how explanations are mended, move by move;
reliability.png, how often counts of this or that probability are right.
"""

import argparse
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from air import AIR
from evaluation import default_batch_size, evaluate, interval, search_metrics, seeded_rng
from inference import Inference, check_canvases, infer, log_weight, traces
from multi_mnist import Scenes, compose, load_digits, load_split
from patches import find
from training.checkpoint import build_air, read_checkpoint, read_reference, write_file
from training.options import UsageError, one_line_errors

PAINTED = 0.2  # the least brightness of a painted pixel that counts as ink
PROBED = (5000, 2000)  # scenes that a probe is trained and tested on
MOVES_SHOWN = 40
UNLIKE = 1000  # scenes of each kind that it was not trained on


def counting(air: AIR, scenes: Scenes, temperature: float | None, max_objects: int | None = None) -> dict:
    """What a run's last evaluation measures, with 95% intervals of the accuracies."""
    measured = evaluate(air, scenes, max_objects, measure_search=True, temperature=temperature).metrics
    names = [name for name in measured if name.startswith("count_accuracy")]
    return measured | {f"{name}_interval": interval(measured[name], len(scenes.x)) for name in names}


def more_digits(air: AIR, digits: tuple, temperature: float | None = None) -> list[dict]:
    """How scenes of three, four and five digits each are counted. Those of three also with T as it was."""
    measured = []
    for n, most in ((3, air.max_objects), (3, 8), (4, 8), (5, 8)):
        scenes = compose(*digits, UNLIKE, np.random.default_rng(n), air.image_size, n, min_digits=n)
        measured.append({"digits": n, "max_objects": most} | counting(air, scenes, temperature, most))
    return measured


def infer_all(air: AIR, x: np.ndarray) -> Inference:
    """One sample of the guide for all images, as arrays."""
    batch_size, batches = default_batch_size(air, air.max_objects), []
    with seeded_rng(air.z_where_loc.device):
        for start in range(0, len(x), batch_size):
            seen = infer(air, x[start : start + batch_size])
            seen = seen._replace(canvases=seen.counts, reconstruction=seen.counts)  # not looked at, and large
            batches.append([part.cpu().numpy() for part in seen])
    return Inference(*map(np.concatenate, zip(*batches)))


def importance_bound(air: AIR, scenes: Scenes, samples: int = 100) -> np.ndarray:
    """For each scene a lower bound on `log p(x)` in nats `[n]`: the log of the mean of `samples` importance weights.

    The weights are `p(x, z) / q(z | x)` at samples of the guide; with one of them it is the ELBO (Burda et
    al., ICLR 2016, arXiv:1509.00519).
    """
    batch_size, bounds = default_batch_size(air, air.max_objects), []
    with seeded_rng(air.z_where_loc.device):
        for start in range(0, len(scenes.x), batch_size):
            x = check_canvases(air, scenes.x[start : start + batch_size])
            log_weights = torch.stack([log_weight(*traces(air, x)) for _ in range(samples)])
            bounds.append(log_weights.logsumexp(0).cpu() - math.log(samples))
    return torch.cat(bounds).numpy()


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `(x, y, w, h)`, `[.., 4]` each."""
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common)


def match(seen: Inference, scenes: Scenes) -> np.ndarray:
    """In each scene as many pairs of an inferred and a true box as can be, with the greatest sum of IoU: the numbers of
    the scene, of the guide's step and of the true digit in its scene, `[3, pairs]`."""
    rows = []
    for i, (inferred, true) in enumerate(zip(seen.counts, scenes.counts)):
        iou = overlap(seen.boxes[i, :inferred, None], scenes.boxes[i, None, :true].astype(float))
        rows += [(i, step, digit) for step, digit in zip(*linear_sum_assignment(iou, maximize=True))]
    return np.array(rows, int).reshape(-1, 3).T


def localisation(seen: Inference, scenes: Scenes) -> dict:
    """The tightest boxes around what is painted in the windows ("ink"), against those of the true ink.

    Means are over pairs, however far apart: digits without a partner, and objects without one, have no part in them.
    `pairs_of_iou_50` are those with an IoU of 0.5 or more.
    """
    scene, step, digit = match(seen, scenes)
    ink = painted_boxes(seen.y_att[scene, step], seen.boxes[scene, step])
    iou = overlap(ink, scenes.boxes[scene, digit].astype(float))
    measured = {"correctly_counted": seen.counts == scenes.counts, "all": seen.counts >= 0}
    for part, which in measured.items():
        numbers = {"true_objects": scenes.counts[which], "inferred_objects": seen.counts[which], "pairs": which[scene]}
        numbers["pairs_of_iou_50"] = iou[which[scene]] >= 0.5
        measured[part] = {name: int(number.sum()) for name, number in numbers.items()}
        measured[part]["mean_iou"] = iou[which[scene]].mean() if which[scene].any() else None
    return measured


def painted_boxes(y_att: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The boxes `[n, 4]` around the ink of painted objects `[n, w, w]`, given their windows; without ink the window."""
    boxes = windows.copy()
    for box, ink, (x, y, w, h) in zip(boxes, y_att > PAINTED, windows):
        left, top, right, bottom = np.divide(Image.fromarray(ink).getbbox() or (0, 0, *ink.shape), len(ink))
        box[:] = x + w * left, y + h * top, w * (right - left), h * (bottom - top)
    return boxes


def representation(air: AIR, digits: np.ndarray, classes: np.ndarray) -> dict:
    """Accuracy of probes, linear ones and MLPs, trained on scenes of two digits, tested on scenes of other digits.

    sum: of the two digits; ascending: whether the left one is the lesser; both from the codes and poses of all objects
    that the guide found, left to right, or from the scene's pixels. commonest_answer: always saying the commonest one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    (answers, inputs), (test_answers, test_inputs) = (
        probed(air, compose(digits[i::2], classes[i::2], n, np.random.default_rng(i), air.image_size, min_digits=2))
        for i, n in enumerate(PROBED)
    )
    linear, mlp = LogisticRegression(max_iter=100), MLPClassifier(256, alpha=0.1, max_iter=30, random_state=0)
    measured = {}
    for task, test in test_answers.items():
        measured[task] = {"commonest_answer": float((test == np.bincount(answers[task]).argmax()).mean())}
        for (kind, probe), name in itertools.product({"linear": linear, "mlp": mlp}.items(), inputs):
            with warnings.catch_warnings(action="ignore"):  # Not all converge in so many iterations.
                probe.fit(inputs[name], answers[task])
            measured[task][f"{kind}_probe_on_{name}"] = float(probe.score(test_inputs[name], test))
    return measured


def probed(air: AIR, scenes: Scenes) -> tuple[dict, dict]:
    """For each task the right answers, and what a probe is given, from scenes of two digits each."""
    seen, middle = infer_all(air, scenes.x), scenes.boxes[..., 0] + scenes.boxes[..., 2] / 2
    left, right = np.take_along_axis(scenes.labels, middle.argsort(1, kind="stable"), 1).T
    n, steps, _ = seen.z_what_mean.shape
    used = np.arange(steps) < seen.counts[:, None]
    middle = np.where(used, seen.boxes[..., 0] + seen.boxes[..., 2] / 2, np.inf)
    found = np.where(used[..., None], np.concatenate([seen.z_what_mean, seen.z_where], -1), 0)
    found = np.take_along_axis(found, middle.argsort(1)[..., None], 1)
    inputs = {"codes": found.reshape(n, -1), "pixels": scenes.x.reshape(n, -1) / 255}
    return {"sum": left + right, "ascending": left < right}, inputs


def repairs(air: AIR, scenes: Scenes) -> np.ndarray:
    """Three scenes that the greedy guide counts wrong and the search right: the moves that helped."""
    wrong = np.flatnonzero(np.array([found.count for found in find(air, scenes.x, 0)]) != scenes.counts)[:10]
    scenes = Scenes(scenes.x[wrong], scenes.counts[wrong])
    steps = [find(air, scenes.x, moves) for moves in range(MOVES_SHOWN + 1)]
    counts, evidence = (np.array([[getattr(f, name) for f in s] for s in steps]) for name in ("count", "log_weight"))
    mended = np.flatnonzero(counts[-1] == scenes.counts)[:3]
    pictures, boxes, captions = [], [], []
    for i in mended:
        better = [0, *(m for m in range(1, MOVES_SHOWN + 1) if evidence[m, i] > evidence[m - 1, i] + 1)]
        for m in [*better[:7], *[better[-1]] * 8][:8]:  # the last one fills the row
            pictures.append(scenes.x[i])
            boxes.append(steps[m][i].boxes.cpu().numpy())
            captions.append(f"move {m}: {counts[m, i]} ({evidence[m, i]:.0f})")
    return viz.draw_scenes(pictures, boxes, captions, 8, "After which move: how many objects (evidence, nats)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How well does an AIR understand its scenes.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    args = parser.parse_args(argv)
    with one_line_errors("report.py"):
        checkpoint, path = read_checkpoint(args.run)
        reference, data_dir = read_reference(checkpoint, path), checkpoint["flags"]["data_dir"]
        if checkpoint["flags"]["data"] or reference is None:
            raise UsageError(f"{args.run} is not a finished run on multi-MNIST")
        air, temperature = build_air(checkpoint, path), reference.temperature
        scenes, digits = load_split("test", data_dir), load_digits(False, data_dir)
        any_number = compose(*digits, UNLIKE, np.random.default_rng(0), air.image_size, 5)
        seen = find(air, any_number.x)
        measured = {
            "step": checkpoint["step"],
            "representation": representation(air, *digits),
            "counting": counting(air, scenes, temperature),
            "importance_bound_100": float(importance_bound(air, scenes).mean(dtype=float)),
            "localisation": localisation(infer_all(air, scenes.x), scenes),
            "more_digits": more_digits(air, digits, temperature),
            "none_to_five_digits": search_metrics(seen, any_number.counts, temperature),
        }
        write_file(path.parent / "report.json", f"{json.dumps(measured, indent=1)}\n".encode())
        captions = [f"{true} → {found.count}" for true, found in zip(any_number.counts, seen)]
        boxes = [found.boxes.cpu() for found in seen[:20]]
        write_file(path.parent / "unseen.png", viz.png(viz.draw_scenes(any_number.x[:20], boxes, captions)))
        bins = zip(*measured["none_to_five_digits"]["reliability"])
        write_file(
            path.parent / "reliability.png", viz.png(viz.draw_reliability(*bins, "Scenes of none to five digits"))
        )
        five = compose(*digits, 100, np.random.default_rng(5), air.image_size, 5, min_digits=5)
        write_file(path.parent / "search.png", viz.png(repairs(air, five)))
        print(f"report.json, unseen.png, search.png and reliability.png are in {path.parent}")


if __name__ == "__main__":
    main()
