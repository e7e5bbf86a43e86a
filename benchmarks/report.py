"""How well does an AIR understand its scenes: writes report.json and some pictures into the folder of a run.

    pip install scikit-learn                 # for the probes; nothing else needs it
    python benchmarks/report.py runs/NAME

All of it is measured on multi-MNIST's test scenes, or on others made of the same test digits. What is called an
object's code here is the mean of `q(z_what_t | x, z_where_t)` at the sampled window. The docstrings of the functions
that measure say what the numbers are. report.png shows scenes of more digits than in training, true count → inferred;
unseen.png, scenes of none to five digits; search.png, how explanations are mended, move by move; reliability.png, how
often counts are right that have this or that probability. (many.py is about digits of other sizes.)
"""

import argparse
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from air import AIR, MAX_OBJECTS
from evaluation import default_batch_size, evaluate, importance_bound, interval, search_metrics, seeded_rng
from inference import Inference, explain, infer
from multi_mnist import Scenes, compose, load_digits, load_split
from patches import Found, find
from training.checkpoint import build_air, read_checkpoint, read_reference, write_file
from training.options import UsageError, one_line_errors, positive
from training.run import is_run_folder

PAINTED = 0.2  # the least brightness of a painted pixel that counts as ink
PROBED = (5000, 2000)  # scenes that a probe is trained and tested on
MOVES_SHOWN = 40
UNLIKE = 1000  # scenes of each kind that it was not trained on


def report(
    air: AIR, scenes: Scenes, digits: np.ndarray, classes: np.ndarray, max_objects: int = 8, temperature: float = 1.0
) -> tuple[dict, dict]:
    """What goes into report.json, and the pictures by name.

    scenes: with labels and boxes. digits, classes: what to compose further scenes of, see `compose`.
    max_objects: T, where there are more digits than in training. temperature: of the probabilities of counts.
    """
    measured = {"counting": counting(air, scenes, temperature)}
    measured["localisation"] = localisation(infer_all(air, scenes.x), scenes)
    measured["representation"] = representation(air, digits, classes)
    more = [*more_digits(air, digits, classes, max_objects, temperature)]
    measured["more_digits"] = [counted for _, counted, _ in more]
    any_number = compose(digits, classes, UNLIKE, np.random.default_rng(0), air.image_size, 5)
    seen = find(air, any_number.x)
    measured["reliability"] = reliability(seen, any_number.counts, temperature)
    sheets = [drawn(x, best, "{digits} digits, T = {max_objects}".format(**counted)) for x, counted, best in more]
    pictures = {"report": np.concatenate(sheets), "unseen": drawn(any_number, seen)}
    five = compose(digits, classes, 20, np.random.default_rng(5), air.image_size, 5, min_digits=5)
    pictures["search"] = repairs(air, five)
    pictures["reliability"] = viz.draw_reliability(*zip(*measured["reliability"]), "Scenes of 0 to 5 digits")
    return measured, pictures


def infer_all(air: AIR, x: np.ndarray, max_objects: int | None = None) -> Inference:
    """One sample of the guide for all images, as arrays."""
    max_objects, batches = max_objects or air.max_objects, []
    batch_size = default_batch_size(air, max_objects)
    with seeded_rng(air.z_where_loc.device):
        for some in (x[start : start + batch_size] for start in range(0, len(x), batch_size)):
            seen = infer(air, some, max_objects)
            seen = seen._replace(canvases=seen.counts, reconstruction=seen.counts)  # not looked at, and large
            batches.append([part.cpu().numpy() for part in seen])
    return Inference(*map(np.concatenate, zip(*batches)))


def counting(air: AIR, scenes: Scenes, temperature: float) -> dict:
    """What a run's last evaluation measures, with 95% intervals; and the importance-weighted bound of 100 samples."""
    measured = evaluate(air, scenes, measure_search=True, temperature=temperature).metrics
    names = [name for name in measured if name.startswith("count_accuracy") and measured[name] is not None]
    intervals = {f"{name}_interval": interval(measured[name], len(scenes.x)) for name in names}
    return measured | intervals | {"importance_bound_100": mean(importance_bound(air, scenes))}


def reliability(seen: list[Found], counts: np.ndarray, temperature: float) -> list[tuple[float, float, int]]:
    """Of the images whose count has a probability in each tenth: its mean, the share that is right, and how many."""
    of_counts = [found.count_probs(temperature) for found in seen]
    probs, guess = (np.array([f(row) for row in of_counts]) for f in (np.max, np.argmax))
    bins = np.minimum((probs * 10).astype(int), 9)
    parts = [bins == i for i in range(10) if (bins == i).any()]
    return [(float(probs[part].mean()), mean((guess == counts)[part]), int(part.sum())) for part in parts]


def repairs(air: AIR, scenes: Scenes) -> np.ndarray:
    """Three scenes that the greedy guide counts wrong and the search right: the moves that helped."""
    steps = [explain(air, scenes.x, moves=moves) for moves in range(MOVES_SHOWN + 1)]
    counts, evidence = (
        np.stack([getattr(step, name).cpu().numpy() for step in steps]) for name in ("counts", "log_weight")
    )
    mended = np.flatnonzero((counts[0] != scenes.counts) & (counts[-1] == scenes.counts))[:3]
    pictures, boxes, captions = [], [], []
    for i in mended:
        better = [0, *(m for m in range(1, MOVES_SHOWN + 1) if evidence[m, i] > evidence[m - 1, i] + 1)]
        for m in [*better[:7], *[better[-1]] * 8][:8]:  # the last one fills the row
            pictures.append(scenes.x[i])
            boxes.append(steps[m].boxes[i, : counts[m, i]].cpu().numpy())
            captions.append(f"move {m}: {counts[m, i]} ({evidence[m, i]:.0f})")
    return viz.draw_scenes(pictures, boxes, captions, 8, "After which move: how many objects (evidence, nats)")


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `(x, y, w, h)`, `[.., 4]` each."""
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far the centres of such boxes are apart."""
    return np.linalg.norm((a - b)[..., :2] + (a - b)[..., 2:] / 2, axis=-1)


def match(boxes: np.ndarray, counts: np.ndarray, true_boxes: np.ndarray, true_counts: np.ndarray) -> np.ndarray:
    """In each scene the one-to-one assignment of inferred to true boxes with the greatest sum of IoU.

    As many pairs as the smaller of the two numbers; boxes that do not meet are told apart by distance. Returns, for
    each pair, the numbers of the scene, of the guide's step and of the true digit in its scene, `[3, pairs]`.
    """
    rows = []
    for i, (inferred, true) in enumerate(zip(counts, true_counts)):
        a, b = boxes[i, :inferred, None], true_boxes[i, None, :true].astype(float)
        assigned = linear_sum_assignment(overlap(a, b) - 1e-6 * distance(a, b), maximize=True)
        rows += [(i, step, digit) for step, digit in zip(*assigned)]
    return np.array(rows, int).reshape(-1, 3).T


def localisation(seen: Inference, scenes: Scenes) -> dict:
    """Windows, and the tightest boxes around what is painted in them ("ink"), against the true ink's boxes.

    Means are over pairs, of which there are as many as can be, however far apart: digits without a
    partner, and objects without one, have no part in them. `pairs_of_iou_50` are those with an IoU of 0.5 or more.
    """
    scene, step, digit = match(seen.boxes, seen.counts, scenes.boxes, scenes.counts)
    windows, true = seen.boxes[scene, step], scenes.boxes[scene, digit].astype(float)
    painted = painted_boxes(seen.y_att[scene, step], windows)
    measured = {"correctly_counted": seen.counts == scenes.counts, "all": np.ones(len(scenes.x), bool)}
    for part, which in measured.items():
        of = which[scene]
        sums = {"scenes": which, "true_objects": scenes.counts[which], "inferred_objects": seen.counts[which]}
        measured[part] = {name: int(numbers.sum()) for name, numbers in (sums | {"pairs": of}).items()}
        for name, boxes in (("window", windows[of]), ("ink", painted[of])):
            iou = overlap(boxes, true[of])
            measured[part][f"{name}_mean_iou"] = mean(iou)
            measured[part][f"{name}_mean_centre_distance_px"] = mean(distance(boxes, true[of]))
            measured[part][f"{name}_pairs_of_iou_50"] = int((iou >= 0.5).sum())
    return measured


def painted_boxes(y_att: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The boxes `[n, 4]` around the ink of painted objects `[n, w, w]`, given their windows; without ink the window."""
    boxes, size = windows.copy(), y_att.shape[-1]
    for axis, ink in ((0, (y_att > PAINTED).any(1)), (1, (y_att > PAINTED).any(2))):
        first, last = ink.argmax(1), size - ink[:, ::-1].argmax(1)
        some = ink.any(1)
        boxes[some, axis] += (windows[:, 2 + axis] * first / size)[some]
        boxes[some, 2 + axis] = (windows[:, 2 + axis] * (last - first) / size)[some]
    return boxes


def representation(air: AIR, digits: np.ndarray, classes: np.ndarray) -> dict:
    """Accuracy of probes, linear ones and MLPs, trained on scenes of two digits, tested on scenes of other digits.

    digit_class: of a matched object, from its code or from the pixels in its window. sum: of the two digits;
    ascending: whether the left one is the lesser; both from the codes and poses of all objects that the guide found,
    left to right, or from the whole scene's pixels. commonest_answer: the accuracy of always saying the commonest one.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    train, test = (
        features(air, compose(digits[i::2], classes[i::2], n, np.random.default_rng(i), air.image_size, min_digits=2))
        for i, n in enumerate(PROBED)
    )
    linear = LogisticRegression(max_iter=100)  # not always enough to converge; nor are the MLP's
    mlp = MLPClassifier(256, alpha=0.1, max_iter=30, random_state=0)
    measured = dict.fromkeys(test)
    for task, (labels, inputs) in test.items():
        train_labels, train_inputs = train[task]
        if len(np.unique(train_labels)) < 2 or not len(labels):  # an AIR that finds nothing
            continue
        commonest = mean(labels == np.bincount(train_labels).argmax())
        scores = {"trained_on": len(train_labels), "tested_on": len(labels), "commonest_answer": commonest}
        for name, (kind, probe) in ((name, kind) for name in inputs for kind in (("linear", linear), ("mlp", mlp))):
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                probe.fit(train_inputs[name], train_labels)
            scores[f"{kind}_probe_on_{name}"] = float(probe.score(inputs[name], labels))
        measured[task] = scores
    return measured


def features(air: AIR, scenes: Scenes) -> dict:
    """For each task the right answers and what a probe is given, from scenes of two digits each."""
    seen = infer_all(air, scenes.x)
    scene, step, digit = match(seen.boxes, seen.counts, scenes.boxes, scenes.counts)
    windows = seen.x_att[scene, step].reshape(len(scene), air.window_size**2)
    objects = {"codes": seen.z_what_mean[scene, step], "pixels": windows}

    n, steps, _ = seen.z_what_mean.shape
    used = np.arange(steps) < seen.counts[:, None]
    middle = np.where(used, seen.boxes[..., 0] + seen.boxes[..., 2] / 2, np.inf)
    found = np.where(used[..., None], np.concatenate([seen.z_what_mean, seen.z_where], -1), 0)
    found = np.take_along_axis(found, middle.argsort(1)[..., None], 1)
    whole = {"codes": found.reshape(n, -1), "pixels": scenes.x.reshape(n, -1) / 255}

    middle = scenes.boxes[..., 0] + scenes.boxes[..., 2] / 2
    left, right = np.take_along_axis(scenes.labels, middle.argsort(1, kind="stable"), 1).T
    classes = scenes.labels[scene, digit]
    return {"digit_class": (classes, objects), "sum": (left + right, whole), "ascending": (left < right, whole)}


def more_digits(
    air: AIR, digits: np.ndarray, classes: np.ndarray, max_objects: int, temperature: float | None
) -> Iterator[tuple]:
    """Scenes of three, four and five digits each, how they are counted, and what the search saw.

    Those of three are also counted with T as in training.
    """
    for n, most in ((3, air.max_objects), (3, max_objects), (4, max_objects), (5, max_objects)):
        scenes = compose(digits, classes, UNLIKE, np.random.default_rng(n), air.image_size, n, min_digits=n)
        counted, best = count(air, scenes, most, temperature)
        yield scenes, {"digits": n, "max_objects": most} | counted, best


def count(air: AIR, scenes: Scenes, max_objects: int, temperature: float | None) -> tuple[dict, list[Found]]:
    """How often the count is right, in one sample and by the search; and what the search saw."""
    seen, best = infer_all(air, scenes.x, max_objects), find(air, scenes.x)
    measured = {"images": len(scenes.x), "count_accuracy": mean(seen.counts == scenes.counts)}
    measured |= search_metrics(best, scenes.counts, temperature)
    for name in ("count_accuracy", "count_accuracy_search"):
        measured[f"{name}_interval"] = interval(measured[name], len(scenes.x))
    inferred = np.bincount(seen.counts, minlength=max_objects + 1)
    return measured | {"inferred_counts": inferred.tolist()}, best


def mean(numbers: np.ndarray) -> float | None:
    return float(np.mean(numbers, dtype=np.float64)) if len(numbers) else None


def drawn(scenes: Scenes, seen: list[Found], title: str | None = None) -> np.ndarray:
    some = range(min(20, len(scenes.x)))
    captions = [f"{scenes.counts[i]} → {seen[i].count}" for i in some]
    return viz.draw_scenes(scenes.x[some], [seen[i].boxes.cpu() for i in some], captions, title=title)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How well does an AIR understand its scenes.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    most, text = positive(int, MAX_OBJECTS), "T, for unseen numbers of digits (default: 8)"
    parser.add_argument("-t", "--max-objects", type=most, default=8, metavar="T", help=text)
    parser.add_argument("--data-dir", type=Path, help="where MNIST is kept (default: the run's)")
    args = parser.parse_args(argv)
    with one_line_errors("report.py"):
        if importlib.util.find_spec("sklearn") is None:
            raise UsageError("the probes need scikit-learn: pip install scikit-learn")
        if not is_run_folder(args.run) or not os.access(args.run, os.W_OK):
            raise UsageError(f"{args.run} is not the folder of a run, or cannot be written to")
        checkpoint, path = read_checkpoint(args.run)
        if checkpoint["flags"]["data"]:
            raise UsageError(f"{args.run} was not trained on multi-MNIST, of which it is known what is where")
        data_dir = args.data_dir or checkpoint["flags"]["data_dir"]
        data = load_split("test", data_dir), *load_digits(False, data_dir)
        reference = read_reference(checkpoint, path)
        if reference is None or reference.temperature is None:
            raise UsageError(f"{args.run} is not finished, or its probabilities are not calibrated")
        measured, pictures = report(build_air(checkpoint, path), *data, args.max_objects, reference.temperature)
        measured = json.dumps({"step": checkpoint["step"]} | measured, indent=1)
        write_file(args.run / "report.json", f"{measured}\n".encode())
        for name, picture in pictures.items():
            write_file(args.run / f"{name}.png", viz.png(picture))
        print(f"report.json and {', '.join(pictures)}.png are in {args.run}")


if __name__ == "__main__":
    main()
