"""What is in images of any size: patch by patch, each as large as a canvas in training.

A large image is divided into cells. Around each lies a patch, a canvas to AIR: what has its centre in the cell is
inferred there by the search (see `inference.explain`), given what lies around; no window reaches beyond its patch.
Patches that do not overlap are searched together. Then the cells are laid in another way, and what was at the border
of two lies within one. Memory grows with the image and with the number of objects, not with their product.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

import inference
from air import AIR
from inference import MOVES, Explanation, View, check_values, evaluating, explanation, most_objects, search
from modules import pose_to_place

SWEEPS = 3  # over the patches of an image, each with other cells
ROOM = 1.2  # usual windows that a patch is larger than its cell
CELL = 2.2  # usual windows that a cell is at most long, or too many objects could lie in it
FAR = 1e3


class Found(NamedTuple):
    """What is in an image `[h, w]`: k objects."""

    poses: Tensor  # [k, 3]: s, as in `z_where`, and the window's centre (x, y) in pixels
    z_what: Tensor  # [k, z_what_size], codes
    z_what_mean: Tensor  # [k, z_what_size]
    weight: Tensor  # [k], see `inference.Explanation`
    cell: Tensor  # int64 [k], in which each lies
    cell_evidence: Tensor  # [cells, T + 1], nats: the most of all explanations with so many objects in that cell

    @property
    def count(self) -> int:
        return len(self.poses)


@torch.no_grad()
def find(air: AIR, images: Sequence[np.ndarray | Tensor], moves: int = MOVES, seed: int = 0) -> list[Found]:
    """The objects in images `[h, w]` of any sizes, as light on black as canvases; see `inference.explain`."""
    most, side = most_objects(air), air.image_size
    xs = [pad_to(check_values(air, image), side) for image in images]
    z = air.z_what_size
    found = [Found(*(x.new_zeros(0, k) for k in (3, z, z)), x.new_zeros(0), None, None) for x in xs]
    with evaluating(air):
        for sweep in range(1 + SWEEPS):
            cells = [cells_of(*x.shape, air, sweep) for x in xs]
            rows = [[None] * len(part) for part in cells]
            rounds = itertools.zip_longest(*(disjoint(part, side) for part in cells), fillvalue=())
            rounds = [[(i, c) for i, some in enumerate(part) for c in some] for part in rounds]
            for group in tqdm(rounds, f"sweep {sweep + 1}", leave=False, delay=3):
                if sweep > 1:
                    group = [(i, c) for i, c in group if len(cells[i]) > 1]
                if group:
                    search_patches(air, xs, found, cells, group, most, moves if sweep else 0, seed, rows)
    return found


def pad_to(x: Tensor, side: int) -> Tensor:
    """An image with black on the right and below, if it is smaller than a canvas."""
    return pad(x, (0, max(0, side - x.shape[1]), 0, max(0, side - x.shape[0])))


def cells_of(h: int, w: int, air: AIR, sweep: int) -> list[tuple[int, int, tuple]]:
    """The cells of an image: for each the corner (left, top) of its patch, and its edges (left, top, right, bottom)."""
    window, side = air.usual_window, air.image_size
    largest = max(min(side - ROOM * window, CELL * window), side / 8)
    spans = []
    for length in (w, h):
        n = int(np.ceil(length / largest)) + sweep % 2 if length > side else 1
        edges = np.linspace(0, length, n + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        corners = (middles - side / 2).round().clip(0, length - side).astype(int)
        edges[0], edges[-1] = -FAR * side, FAR * side
        spans.append(list(zip(corners, edges[:-1], edges[1:])))
    return [(left, top, (x0, y0, x1, y1)) for (top, y0, y1) in spans[1] for (left, x0, x1) in spans[0]]


def disjoint(cells: list, side: int) -> list[list[int]]:
    """The cells in groups, within which no patches overlap."""
    groups, taken = [], []
    for c, (left, top, _) in enumerate(cells):
        for group, corners in zip(groups, taken):
            if not any(abs(left - x) < side and abs(top - y) < side for x, y in corners):
                break
        else:
            group, corners = [], []
            groups.append(group)
            taken.append(corners)
        group.append(c)
        corners.append((left, top))
    return groups


def search_patches(air, xs, found, cells, group, most, moves, seed, rows):
    side = air.image_size
    laid = [lay_out(air, xs[i], found[i], *cells[i][c], most) for i, c in group]
    k = max(len(part[2]) for part in laid)
    x = torch.stack([part[0] for part in laid])
    fixed_where = torch.stack([pad(part[1][0], (0, 0, 0, k - len(part[2])), value=1.0) for part in laid])
    fixed_what = torch.stack([pad(part[1][1], (0, 0, 0, k - len(part[2]))) for part in laid])
    there = torch.stack([torch.arange(k) < len(part[2]) for part in laid]).to(x)
    canvas = torch.zeros_like(x)
    for t in range(k):
        canvas = canvas + air.paint(fixed_where[:, t], fixed_what[:, t]) * there[:, t, None, None]
    around = pose_to_place(fixed_where).where(there[..., None] > 0, FAR)
    within = x.new_tensor([part[4] for part in laid])
    view = View(x, canvas, around, within)
    z_where, z_what, z_what_mean, weight, used = (torch.stack([part[3][j] for part in laid]) for j in range(5))
    start = None
    if used.any():
        painted = torch.stack([air.paint(*step) for step in zip(z_where.unbind(1), z_what.unbind(1))], 1)
        start = explanation(air, view, [z_where, z_what, z_what_mean, painted, weight], used)
    # Nothing can be gained where nothing is left to explain.
    error = (x - canvas).square().sum((1, 2)) / (2 * air.likelihood_sd**2)
    todo = (used.any(1) | (error > inference.PRICE)).nonzero()[:, 0]
    seen = None
    if len(todo):
        seen = search(
            air,
            View(*(part[todo] for part in view)),
            most,
            moves,
            seed,
            start and Explanation(*(part[todo] for part in start)),
        )
    stay = {i: torch.ones(len(found[i].poses), dtype=torch.bool) for i, _ in group}
    new = {i: [] for i in stay}
    for row, j in enumerate(todo.tolist()):
        i, c = group[j]
        count = int(seen.counts[row])
        left, top, _ = cells[i][c]
        z = seen.z_where[row, :count]
        places = (pose_to_place(z) + 1) * side / 2 + x.new_tensor([left, top])
        new[i].append([torch.cat([z[:, :1], places], 1), seen.z_what[row, :count], seen.z_what_mean[row, :count], seen.weight[row, :count]])
        stay[i] &= laid[j][5]
        rows[i][c] = seen.count_evidence[row]
    for i in stay:
        parts = [[part[stay[i]] for part in found[i][:4]], *new[i]]
        found[i] = Found(*(torch.cat(part) for part in zip(*parts)), None, None)


def lay_out(air, x, found, left, top, edges, most):
    side = air.image_size
    patch = x[top : top + side, left : left + side]
    corner = x.new_tensor([left, top])
    places = 2 * (found.poses[:, 1:] - corner) / side - 1
    s = found.poses[:, :1]
    z_where = torch.cat([s, -s.clamp(min=1) * places], 1)
    x0, y0, x1, y1 = edges
    cx, cy = found.poses[:, 1], found.poses[:, 2]
    free = (cx >= x0) & (cx < x1) & (cy >= y0) & (cy < y1)
    free = free & (free.cumsum(0) <= most)
    near = (places.abs() < 1 + 2 * air.usual_window / side).all(1) & ~free
    fixed = [z_where[near], found.z_what[near]]
    n = int(free.sum())
    slots = [pad(part[free], (0, 0) * (part.dim() - 1) + (0, most - n), value=v) for part, v in ((z_where, 1.0), (found.z_what, 0.0), (found.z_what_mean, 0.0), (found.weight, 0.0))]
    slots.append(torch.arange(most) < n)
    within = [2 * (x0 - left) / side - 1, 2 * (y0 - top) / side - 1, 2 * (x1 - left) / side - 1, 2 * (y1 - top) / side - 1]
    return patch, fixed, fixed[0], slots, within, ~free
