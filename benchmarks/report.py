"""How well does an AIR understand its scenes: writes report.html and report.json into the folder of a run.

    python benchmarks/report.py runs/NAME

All of it is measured on multi-MNIST's test scenes, or on others made of the same test digits. What
is called an object's code here is the mean of `q(z_what_t | x, z_where_t)` at the sampled window.
"""

import argparse
import base64
import html
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).parent.parent))

import viz
from air import AIR, MAX_STEPS, Inference, to_images
from evaluation import default_batch_size, evaluate, importance_bound, interval, seeded_rng
from modules import pose_to_box
from multi_mnist import DIGIT_SIZE, Scenes, compose, load_digits, load_split
from training.checkpoint import build_air, read_checkpoint, write_file
from training.options import UsageError, one_line_errors, positive
from training.run import is_run_folder, write_text

PAINTED = 0.2  # the least brightness of a painted pixel that counts as ink
SIZES = (12, 16, 19, 21, 24, 28, 32)  # pixels; an ordinary digit is drawn 18 to 26 pixels wide
PROBED = (5000, 2000)  # scenes that a probe is trained and tested on
ITERATIONS = {"linear": 100, "mlp": 30}  # that a probe is given
UNLIKE = 1000  # scenes of each kind that it was not trained on
UNSEEN = "0 to 5 digits: true count → inferred"
PEERS = {"elbo": 627.4, "bound": 636.8}  # of addtt/attend-infer-repeat-pytorch, by its README


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How well does an AIR understand its scenes.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run on multi-MNIST")
    parser.add_argument(
        "-t",
        "--model-steps",
        type=positive(int, MAX_STEPS),
        default=8,
        help="T, for unseen numbers of digits (default: 8)",
    )
    parser.add_argument("--data-dir", type=Path, help="where MNIST and the scenes are kept (default: the run's)")
    args = parser.parse_args(argv)
    with one_line_errors("report.py"):
        if not is_run_folder(args.run):
            raise UsageError(f"{args.run} is not the folder of a run")
        if not os.access(args.run, os.W_OK):
            raise UsageError(f"{args.run} cannot be written to")
        checkpoint, path = read_checkpoint(args.run)
        air = build_air(checkpoint, path)
        flags = checkpoint["flags"]
        if flags["data"]:
            raise UsageError(f"{args.run} was not trained on multi-MNIST, of which it is known what is where")
        data_dir = args.data_dir or flags["data_dir"]
        measured, pictures = report(air, load_split("test", data_dir), *load_digits(False, data_dir), args.model_steps)
        title = f"An AIR after {checkpoint['step']:,} steps (seed {flags['seed']}, {flags['estimator']})"
        write_text(args.run / "report.json", json.dumps({"step": checkpoint["step"]} | measured, indent=1) + "\n")
        write_text(args.run / "report.html", page(title, measured, pictures))
        write_file(args.run / "unseen.png", viz.png(pictures[UNSEEN]))
        print(f"{args.run / 'report.html'}, {args.run / 'report.json'} and {args.run / 'unseen.png'}")


class Pairs(NamedTuple):
    """Inferred objects and the true ones that they are matched with, one pair a row."""

    scene: np.ndarray  # number of the scene
    step: np.ndarray  # of the guide
    digit: np.ndarray  # number of the true digit in its scene


def report(air: AIR, scenes: Scenes, digits: np.ndarray, classes: np.ndarray, num_steps: int = 8) -> tuple[dict, dict]:
    """What goes into report.json, and pictures by name.

    scenes: with labels and boxes. digits, classes: what to compose further scenes of, see `compose`.
    num_steps: T, where there are more digits than in training.
    """
    seen = infer_all(air, scenes.x)
    pairs = match(seen.boxes, seen.counts, scenes.boxes, scenes.counts)
    measured = {"counting": counting(air, scenes), "localisation": localisation(seen, pairs, scenes)}
    measured["representation"] = representation(air, digits, classes)
    measured["generalisation"], pictures = generalisation(air, digits, classes, num_steps)
    return measured, pictures | disentangling(air, seen, pairs, scenes)


def infer_all(air: AIR, x: np.ndarray, num_steps: int | None = None, looks: int | None = None) -> Inference:
    """One sample of the guide for all images, as arrays; or the best of so many looks, without sampling."""
    device, batch_size = next(air.parameters()).device, default_batch_size(air, num_steps or air.num_steps)
    batches = []
    with seeded_rng(device), torch.no_grad():
        for start in range(0, len(x), batch_size):
            seen = air.explain(to_images(x[start : start + batch_size]), looks is None, num_steps, looks or 1)
            seen = seen._replace(canvases=seen.counts, reconstruction=seen.counts)  # not looked at, and large
            batches.append([part.cpu().numpy() for part in seen])
    return Inference(*map(np.concatenate, zip(*batches)))


# ----------------------------------------------------------------------------------- what is measured


def counting(air: AIR, scenes: Scenes) -> dict:
    measured = evaluate(air, scenes, looks=air.attend.looks).metrics
    bound = importance_bound(air, scenes)
    names = [name for name in measured if name.startswith("count_accuracy") and measured[name] is not None]
    return measured | {
        **{f"{name}_interval": interval(measured[name], len(scenes.x)) for name in names},
        "importance_bound_100": float(bound.mean(dtype=np.float64)),
    }


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes `(x, y, w, h)`, `[.., 4]` each."""
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(0).prod(-1)
    return common / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common)


def match(boxes: np.ndarray, counts: np.ndarray, true_boxes: np.ndarray, true_counts: np.ndarray) -> Pairs:
    """In each scene the one-to-one assignment of inferred to true boxes with the greatest sum of IoU.

    As many pairs as the smaller of the two numbers; boxes that do not meet are told apart by distance.
    """
    rows = []
    for i, (inferred, true) in enumerate(zip(counts, true_counts)):
        a, b = boxes[i, :inferred, None], true_boxes[i, None, :true].astype(float)
        iou = overlap(a, b)
        distance = np.linalg.norm(a[..., :2] + a[..., 2:] / 2 - b[..., :2] - b[..., 2:] / 2, axis=-1)
        for step, digit in zip(*linear_sum_assignment(iou - 1e-6 * distance, maximize=True)):
            rows.append((i, step, digit))
    return Pairs(*np.array(rows, int).reshape(-1, 3).T)


def localisation(seen: Inference, pairs: Pairs, scenes: Scenes) -> dict:
    """Windows, and the tightest boxes around what is painted in them, against the true ink's boxes.

    Means are over pairs, of which there are as many as can be, however far apart: digits without a
    partner, and objects without one, have no part in them. `pairs_of_iou_50` are those with an IoU of 0.5 or more.
    """
    windows = seen.boxes[pairs.scene, pairs.step]
    true = scenes.boxes[pairs.scene, pairs.digit].astype(float)
    painted = painted_boxes(seen.y_att[pairs.scene, pairs.step], windows)
    correct = (seen.counts == scenes.counts)[pairs.scene]

    def of(which: np.ndarray, some_scenes: np.ndarray) -> dict:
        result = {
            "scenes": int(some_scenes.sum()),
            "true_objects": int(scenes.counts[some_scenes].sum()),
            "inferred_objects": int(seen.counts[some_scenes].sum()),
            "pairs": int(which.sum()),
        }
        for name, boxes in (("window", windows[which]), ("ink", painted[which])):
            distance = np.linalg.norm((boxes - true[which])[:, :2] + (boxes - true[which])[:, 2:] / 2, axis=-1)
            result[f"{name}_mean_iou"] = mean(overlap(boxes, true[which]))
            result[f"{name}_mean_centre_distance_px"] = mean(distance)
            result[f"{name}_pairs_of_iou_50"] = int((overlap(boxes, true[which]) >= 0.5).sum())
        return result

    return {
        "correctly_counted": of(correct, seen.counts == scenes.counts),
        "all": of(np.ones_like(correct), np.ones_like(seen.counts, bool)),
    }


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
    """Accuracy of probes, trained on scenes of two digits, tested on scenes of other digits.

    digit_class: of a matched object. sum: of the two digits; ascending: whether the left one is the lesser,
    both from the codes and poses of all objects that the guide found, left to right.
    """
    train, test = (
        features(air, compose(digits[i::2], classes[i::2], n, np.random.default_rng(i), air.image_size, min_digits=2))
        for i, n in enumerate(PROBED)
    )
    result = {}
    for task, (labels, inputs) in test.items():
        train_labels, train_inputs = train[task]
        if len(np.unique(train_labels)) < 2 or not len(labels):  # an AIR that finds nothing
            result[task] = None
            continue
        result[task] = {
            "trained_on": len(train_labels),
            "tested_on": len(labels),
            "commonest_answer": mean(labels == np.bincount(train_labels).argmax()),
        }
        for name in inputs:
            for kind, probe in probes().items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # They are given so many iterations, no more.
                    probe.fit(train_inputs[name], train_labels)
                result[task][f"{kind}_probe_on_{name}"] = float(probe.score(inputs[name], labels))
    return result


def features(air: AIR, scenes: Scenes) -> dict:
    """For each task the right answers and what a probe is given, from scenes of two digits each."""
    seen = infer_all(air, scenes.x)
    pairs = match(seen.boxes, seen.counts, scenes.boxes, scenes.counts)
    at = pairs.scene, pairs.step
    objects = {"codes": seen.z_what_mean[at], "pixels": seen.x_att[at].reshape(len(pairs.scene), air.window_size**2)}

    n, steps, _ = seen.z_what_mean.shape
    used = np.arange(steps) < seen.counts[:, None]
    middle = np.where(used, seen.boxes[..., 0] + seen.boxes[..., 2] / 2, np.inf)
    found = np.where(used[..., None], np.concatenate([seen.z_what_mean, seen.z_where], -1), 0)
    found = np.take_along_axis(found, middle.argsort(1)[..., None], 1)
    whole = {"codes": found.reshape(n, -1), "pixels": scenes.x.reshape(n, -1) / 255}

    middle = scenes.boxes[..., 0] + scenes.boxes[..., 2] / 2
    left, right = np.take_along_axis(scenes.labels, middle.argsort(1, kind="stable"), 1).T
    return {
        "digit_class": (scenes.labels[pairs.scene, pairs.digit], objects),
        "sum": (left + right, whole),
        "ascending": (left < right, whole),
    }


def probes() -> dict:
    return {
        "linear": LogisticRegression(max_iter=ITERATIONS["linear"]),
        "mlp": MLPClassifier(256, alpha=0.1, max_iter=ITERATIONS["mlp"], random_state=0),
    }


def generalisation(air: AIR, digits: np.ndarray, classes: np.ndarray, num_steps: int) -> tuple[dict, dict]:
    """Scenes such as it was not trained on: three to five digits, and none to two of another size.

    The pictures show the best of several looks.
    """
    n, columns, measured, pictures, looks = UNLIKE, 10, {"more_digits": []}, {}, air.attend.looks
    any_number = compose(digits, classes, 2 * columns, np.random.default_rng(0), air.image_size, 5)
    pictures[UNSEEN] = drawn(any_number, infer_all(air, any_number.x, num_steps, looks), 2 * columns)
    for scenes, counted, best in more_digits(air, digits, classes, num_steps):
        measured["more_digits"].append(counted)
        pictures[f"{counted['digits']} digits: true count → inferred"] = drawn(scenes, best, columns)
    measured["sizes"] = []
    for size in SIZES:
        shrink = (DIGIT_SIZE / (size + 0.5), 0.0)  # `compose` rounds down
        scenes = compose(digits, classes, n, np.random.default_rng(size), air.image_size, shrink=shrink)
        counted, best = count(air, scenes)
        measured["sizes"].append({"size_px": size} | counted)
        if size in (SIZES[0], SIZES[-1]):
            pictures[f"digits of {size} pixels: true count → inferred"] = drawn(scenes, best, columns)
    return measured, pictures


def more_digits(air: AIR, digits: np.ndarray, classes: np.ndarray, num_steps: int) -> Iterator[tuple]:
    """Scenes of three, four and five digits each, how they are counted, and what the best of several looks saw.

    Those of three are also counted with T as in training.
    """
    for n, steps in ((3, air.num_steps), (3, num_steps), (4, num_steps), (5, num_steps)):
        scenes = compose(digits, classes, UNLIKE, np.random.default_rng(n), air.image_size, n, min_digits=n)
        counted, best = count(air, scenes, steps)
        yield scenes, {"digits": n, "steps": steps} | counted, best


def count(air: AIR, scenes: Scenes, num_steps: int | None = None) -> tuple[dict, Inference]:
    """How often the count is right, in one sample and in the best of several looks; and what these saw."""
    seen, best = infer_all(air, scenes.x, num_steps), infer_all(air, scenes.x, num_steps, air.attend.looks)
    accuracy, of_looks = (mean(counts == scenes.counts) for counts in (seen.counts, best.counts))
    measured = {
        "images": len(scenes.x),
        "count_accuracy": accuracy,
        "count_accuracy_interval": interval(accuracy, len(scenes.x)),
        "count_accuracy_looks": of_looks,
        "count_accuracy_looks_interval": interval(of_looks, len(scenes.x)),
        "inferred_counts": np.bincount(seen.counts, minlength=seen.count_probs.shape[1]).tolist(),
    }
    return measured, best


def drawn(scenes: Scenes, seen: Inference, n: int) -> np.ndarray:
    some = range(min(n, len(scenes.x)))
    boxes = [seen.boxes[i, : seen.counts[i]] for i in some]
    captions = [f"{scenes.counts[i]} → {seen.counts[i]}" for i in some]
    return viz.draw_scenes(scenes.x[some], boxes, captions)


@torch.no_grad()
def disentangling(air: AIR, seen: Inference, pairs: Pairs, scenes: Scenes) -> dict:
    """Pictures: codes on the way from one digit to another, painted; one object of a scene moved and made larger."""
    device, columns, pictures = next(air.parameters()).device, 10, {}
    at = np.linspace(0, 1, columns)
    found = scenes.labels[pairs.scene, pairs.digit]
    firsts = [np.flatnonzero(found == digit)[:1] for digit in range(10)]
    couples = [(i[0], j[0]) for i, j in zip(firsts, firsts[1:]) if len(i) and len(j)][::2]
    if couples:
        codes = seen.z_what_mean[pairs.scene, pairs.step]
        start, end = (codes[list(ends)] for ends in zip(*couples))
        between = start[:, None] + at[:, None] * (end - start)[:, None]
        objects = air.decode(torch.tensor(between, dtype=torch.float32, device=device).flatten(0, 1)).cpu().numpy()
        labels = [f"{found[i]} to {found[j]}" for i, j in couples]
        name = "interpolated z_what: codes between those of two digits, painted"
        pictures[name] = viz.draw_scenes(objects, columns=columns, labels=labels)
    right = np.flatnonzero((seen.counts == 2) & (scenes.counts == 2))
    if len(right):
        # The first object's [s, x, y] on three paths; 1/s is its size, -x/s and -y/s its place.
        s, x, y = seen.z_where[right[0], 0]
        move, larger = -s * (1.2 * at - 0.6), 5 - 3 * at
        to_the_right, down = [s + 0 * at, move, y + 0 * at], [s + 0 * at, x + 0 * at, move]
        paths = np.concatenate([to_the_right, down, [larger, x / s * larger, y / s * larger]], 1).T
        z_where, z_what = (np.tile(part[right[0], :, None], (1, len(paths), 1)) for part in (seen.z_where, seen.z_what))
        z_where[0] = paths
        z_where, z_what = (torch.tensor(part, dtype=torch.float32, device=device) for part in (z_where, z_what))
        canvases = air.canvases(tuple(z_where), tuple(z_what))[2].cpu().numpy().clip(0, 1)
        boxes = pose_to_box(z_where[0], air.image_size)[:, None].cpu().numpy()
        name = "moved z_where: one digit of a scene in other places and sizes, its code kept"
        pictures[name] = viz.draw_scenes(canvases, boxes, columns=columns, labels=["to the right", "down", "larger"])
    return pictures


def mean(numbers: np.ndarray) -> float | None:
    return float(np.mean(numbers)) if len(numbers) else None


# ------------------------------------------------------------------------------------------ the page

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
  body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
  table {{ border-collapse: collapse; margin: 1em 0 }} td, th {{ padding: .2em .8em; text-align: right }}
  th {{ border-bottom: 1px solid }} td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(title: str, measured: dict, pictures: dict) -> str:
    """The report as one HTML file, pictures included."""
    counts, where, probes, other = (
        measured[name] for name in ("counting", "localisation", "representation", "generalisation")
    )
    name, looked = "count_accuracy_looks", []
    if counts[name] is not None:  # The RNN guide looks once.
        looked = [["right count, best of several looks", share(counts, name), span(counts, name)]]
    steps, most = len(counts["confusion"][0]), max(part["steps"] for part in other["more_digits"])
    body = [
        "<h2>Counting</h2>",
        f"<p>{counts['images']:,} test scenes, made of digits that it has not seen in training.</p>",
        table(
            ["", "", "95% interval"],
            ["right count, one sample of the guide", share(counts, "count_accuracy"), span(counts, "count_accuracy")],
            [
                "right count, most probable one",
                share(counts, "count_accuracy_mode"),
                span(counts, "count_accuracy_mode"),
            ],
            *looked,
            ["ELBO, nats per image", f"{counts['elbo']:.1f}", ""],
            ["importance-weighted bound, 100 samples", f"{counts['importance_bound_100']:.1f}", ""],
            ["images that used the last step", share(counts, "last_step_rate"), ""],
        ),
        "<p>A plain PyTorch AIR, addtt/attend-infer-repeat-pytorch, reports an ELBO of {elbo} and a bound of {bound} "
        "nats (with another prior on the number of objects).</p>".format(**PEERS),
        table(
            ["true count", *(f"inferred {n}" for n in range(steps))],
            *([true, *(f"{n:,}" for n in row)] for true, row in enumerate(counts["confusion"])),
        ),
        "<h2>Where</h2><p>The inferred objects of a scene are matched with its true ones, as many as can be, those "
        "that overlap most (IoU: the boxes' intersection over their union); the means are over these pairs, and leave "
        "out missed digits and surplus objects. The true box is the tightest one around a digit's ink. A window is a "
        f"square around it; the box called ink is the tightest one around the pixels brighter than {PAINTED} of what "
        "is painted in the window (if there are none, the window).</p>",
        table(
            [
                "",
                "scenes",
                "digits",
                "found",
                "pairs",
                "pairs with ink's IoU at least 0.5",
                "IoU, window",
                "IoU, ink",
                "centres apart, window",
                "centres apart, ink",
            ],
            *(
                [
                    name.replace("_", " "),
                    *(f"{part[key]:,}" for key in keys),
                    *(number(part[f"{kind}_mean_iou"]) for kind in ("window", "ink")),
                    *(number(part[f"{kind}_mean_centre_distance_px"], " px") for kind in ("window", "ink")),
                ]
                for keys in [("scenes", "true_objects", "inferred_objects", "pairs", "ink_pairs_of_iou_50")]
                for name, part in where.items()
            ),
        ),
        f"<h2>What the codes know</h2><p>Right answers of probes trained on {PROBED[0]:,} scenes with two digits each, "
        f"and tested on {PROBED[1]:,} of other digits: the class of an object from its code, or from the pixels in its "
        "window (of digits that were found only); the sum of the two, and whether the left one is the lesser "
        "(ascending), from all codes and poses found, or from the whole scene's pixels. Linear probes are given "
        f"{ITERATIONS['linear']} iterations, those with a hidden layer (MLP) {ITERATIONS['mlp']}, not always enough to "
        "converge.</p>",
        table(
            [
                "",
                "trained on",
                "tested on",
                "commonest answer",
                *(f"{k}, {on}" for on in ("codes", "pixels") for k in ("linear", "MLP")),
            ],
            *(
                [
                    task.replace("_", " "),
                    f"{probe['trained_on']:,}",
                    f"{probe['tested_on']:,}",
                    share(probe, "commonest_answer"),
                    *(share(probe, f"{k}_probe_on_{on}") for on in ("codes", "pixels") for k in ("linear", "mlp")),
                ]
                for task, probe in probes.items()
                if probe
            ),
        ),
        "<h2>Scenes of another kind</h2><p>In training, there are none to two digits, 21 pixels wide in the mean.</p>",
        table(
            [
                "",
                "scenes",
                "right count",
                "95% interval",
                "best of several looks",
                "95% interval",
                *(f"inferred {n}" for n in range(most + 1)),
            ],
            *(
                [
                    name,
                    f"{part['images']:,}",
                    share(part, "count_accuracy"),
                    span(part, "count_accuracy"),
                    share(part, "count_accuracy_looks"),
                    span(part, "count_accuracy_looks"),
                    *(f"{n:,}" for n in part["inferred_counts"]),
                ]
                for name, part in [
                    (f"{part['digits']} digits, T = {part['steps']}", part) for part in other["more_digits"]
                ]
                + [(f"none to two digits, {part['size_px']} px wide", part) for part in other["sizes"]]
            ),
        ),
    ]
    for name, picture in pictures.items():
        source = base64.b64encode(viz.png(picture)).decode()
        name = html.escape(name[0].upper() + name[1:])
        body.append(f'<h3>{name}</h3>\n<img src="data:image/png;base64,{source}" alt="{name}">')
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def table(header: list, *rows: list) -> str:
    cells = [
        [f"<{tag}>{cell}</{tag}>" for cell in row] for tag, row in [("th", header), *(("td", row) for row in rows)]
    ]
    return "<table>" + "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>"


def share(part: dict, name: str) -> str:
    return f"{part[name]:.2%}"


def span(part: dict, name: str) -> str:
    low, high = part[f"{name}_interval"]
    return f"{low:.2%} to {high:.2%}"


def number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


if __name__ == "__main__":
    main()
