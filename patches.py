"""What is in images of any size: patch by patch, each as large as a canvas in training.

A large image is divided into cells, and around each lies a patch, which is a canvas to AIR. The objects whose centres
are in the cell are inferred there by `inference.search`, given what lies around. First the guide goes
once through all cells, then the search, several times, with the cells laid in another way each time: what was at the
border between two cells then lies within one. Patches that do not overlap are searched together. Memory grows with
the image and with the number of objects, not with their product; time grows with the number of objects.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from air import AIR
from inference import MOVES, OVERLAP, PRICE, View, best_of, check_values, search, some
from modules import MIN_SCALE, pose_to_place

SWEEPS = 2  # of the search
MOST_OBJECTS = 8  # that are looked for in a cell, if not more in training
ROOM = 1.0  # usual windows that a patch is larger than its cell, for the windows of objects at the cell's border
CELL = 2.2  # usual windows that a cell may be long: few objects lie in it
PATIENCE = 5  # See inference.py; for the images that have several cells.
MOST_PATCHES = 1024  # at once, for the memory's sake


class Objects(NamedTuple):
    """Objects in an image, k of them."""

    poses: Tensor  # [k, 3]: s, as in `z_where`, and the window's centre (x, y) in pixels
    z_what: Tensor  # [k, z_what_size], codes
    weight: Tensor  # [k], see `inference.Explanation`


class Found(NamedTuple):
    """What is in an image `[h, w]`."""

    objects: Objects  # k of them
    boxes: Tensor  # [k, 4], the windows as (x, y, w, h) in pixels
    losses: Tensor  # [k], nats of evidence that would be lost without each
    cell: Tensor  # int64 [k], the cell that each lies in
    cell_evidence: Tensor  # [cells, T + 1], nats: for each cell the most evidence seen for each count of objects in it
    log_weight: float  # the evidence in nats, see `inference.search`; that of black pixels, known to be so, is 0
    explained: float  # the share of the image's ink (its squared pixels) that the reconstruction accounts for
    reconstruction: Tensor  # [h, w]

    @property
    def count(self) -> int:
        return len(self.losses)

    @property
    def is_full(self) -> bool:
        """Whether somewhere as many objects were found as are looked for."""
        return bool((self.cell.bincount() >= self.cell_evidence.shape[1] - 1).any())

    def cell_probs(self, temperature: float) -> Tensor:
        """The probability of each count in each cell, `[cells, T + 1]`."""
        return torch.softmax(self.cell_evidence.double() / temperature, -1)

    def count_probs(self, temperature: float = 1.0) -> np.ndarray:
        """The probability of 0, 1, .. objects. What is in a cell is taken to be independent of what is in others."""
        probs = np.ones(1)
        for row in self.cell_probs(temperature).cpu().numpy():
            probs = np.convolve(probs, np.trim_zeros(row, "b"))
        # What a search could not take off, as there was too much in a cell, is not in the evidence.
        return np.pad(probs, (0, max(0, self.count + 1 - len(probs))))

    def object_probs(self, temperature: float = 1.0) -> np.ndarray:
        """The probability of each object that it is one, `[k]`: of as many in its cell as there are no weaker ones."""
        at_least = self.cell_probs(temperature).flip(1).cumsum(1).flip(1)
        stronger = (self.cell[:, None] == self.cell) & (self.losses[:, None] <= self.losses)
        return at_least[self.cell, stronger.sum(1).clamp(max=at_least.shape[1] - 1)].clamp(max=1).cpu().numpy()


class Axis(NamedTuple):
    """How one side of an image is divided into n cells."""

    edges: Tensor  # [n + 1], of the cells, in pixels
    corners: list[int]  # [n], where their patches begin
    turns: list[int]  # [n]; patches with the same do not overlap


@dataclass(eq=False)
class Searched:
    """An image while it is searched."""

    x: Tensor  # [h, w], at least as large as a canvas
    objects: Objects  # what was found so far
    edges: tuple[Tensor, Tensor] = ()  # of the rows and the columns of its cells, in pixels
    evidence: Tensor | None = None  # [rows, columns, T + 1], see `Found.cell_evidence`


class Patch(NamedTuple):
    """A canvas cut out of an image, around one of its cells."""

    image: Searched
    cell: tuple[int, int]  # row and column
    edges: list[Tensor]  # of the cell: left, top, right and bottom, in pixels
    corner: list[int]  # (x, y), the left upper one, in pixels
    turn: tuple  # whether there are several cells; those with the same turn are searched together


@torch.no_grad()
def find(air: AIR, images: Sequence[np.ndarray | Tensor], moves: int = MOVES, seed: int = 0) -> list[Found]:
    """What is in images `[h, w]` of any sizes, floats in [0, 1] or uint8, light on black (`images.to_canvas` makes them
    so): the best explanations that were found.

    moves: of the search in a cell, how many at most, see `inference.search`; with 0 it is what the greedy guide finds.
    seed: of its random numbers, which are the same for all images: what is found in one does not depend on others.
    With the residual guide a cell can have up to MOST_OBJECTS objects, or as many as in training if that is more.
    Raises ValueError for what cannot be such images; the RNN guide takes none that are larger than a canvas.
    """
    side, most = air.image_size, max(MOST_OBJECTS, air.max_objects) if air.sees_residual else air.max_objects
    xs = [check_values(air, image) for image in images]
    if wrong := [list(x.shape) for x in xs if x.dim() != 2]:
        raise ValueError(f"an image has shape {wrong[0]}, expected [h, w]")
    if not air.sees_residual and (larger := [x for x in xs if max(x.shape) > side]):
        raise ValueError(f"the RNN guide sees canvases of {side}x{side} pixels, not {list(larger[0].shape)}")
    # Black on the right and below, if it is smaller than a canvas.
    xs = [pad(x, (0, max(0, side - x.shape[1]), 0, max(0, side - x.shape[0]))) for x in xs]
    searched = [Searched(x, Objects(x.new_zeros(0, 3), x.new_zeros(0, air.z_what_size), x.new_zeros(0))) for x in xs]
    with tqdm(unit="patch", leave=False, delay=3, disable=None) as bar:
        for sweep in range(1 + SWEEPS):
            # One search is enough for a single cell.
            todo = [image for image in searched if sweep < 2 or max(image.x.shape) > side]
            patches = [patch for image in todo for patch in lay_patches(air, image, sweep, most)]
            bar.total = bar.n + (SWEEPS + 1 - sweep) * len(patches)
            for turn in sorted({patch.turn for patch in patches}):
                patience = PATIENCE if turn[0] else 0
                look = partial(search, air, most=most, moves=moves if sweep else 0, seed=seed, patience=patience)
                some_patches = [patch for patch in patches if patch.turn == turn]
                for start in range(0, len(some_patches), MOST_PATCHES):
                    chunk = some_patches[start : start + MOST_PATCHES]
                    search_patches(air, chunk, look, most, afresh=sweep == 0)
                    bar.update(len(chunk))
        return [assemble(air, *parts) for parts in zip(searched, images)]


def lay_patches(air: AIR, image: Searched, sweep: int, most: int) -> list[Patch]:
    """Divide an image into cells, anew in each sweep: their patches. Notes the cells in `image`."""
    rows, columns = (divide(length, sweep, air.image_size, air.usual_window) for length in image.x.shape)
    image.edges = rows.edges, columns.edges
    image.evidence = image.x.new_full((len(rows.corners), len(columns.corners), most + 1), -math.inf)
    image.evidence[..., 0], patches = 0, []
    for i, j in np.ndindex(image.evidence.shape[:2]):
        edges = [columns.edges[j], rows.edges[i], columns.edges[j + 1], rows.edges[i + 1]]
        turn = image.evidence[..., 0].numel() > 1, rows.turns[i], columns.turns[j]
        patches.append(Patch(image, (i, j), edges, [columns.corners[j], rows.corners[i]], turn))
    return patches


def divide(length: int, sweep: int, side: int, window: float) -> Axis:
    """Cells along one side of an image, `length` pixels long; shifted by half a cell in every other sweep."""
    longest = max(min(side - ROOM * window, CELL * window), side / 8)
    n = 1 if length <= side else math.ceil(length / longest)
    edges, turns, ends = torch.linspace(0, length, n + 1), [], []
    if n > 1 and sweep % 2:
        edges = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
    corners = ((edges[1:] + edges[:-1] - side) / 2).round().clamp(0, length - side).int().tolist()
    for corner in corners:
        turns.append(next((turn for turn, end in enumerate(ends) if end <= corner), len(ends)))
        ends[turns[-1] : turns[-1] + 1] = [corner + side]
    edges[0], edges[-1] = -side / 2, length + side / 2  # The centre of what is cut by the border may lie beyond it.
    return Axis(edges, corners, turns)


def search_patches(air: AIR, patches: list[Patch], look: Callable, most: int, afresh: bool) -> None:
    """Search some patches that do not overlap, by `look`, and replace what was found in their cells."""
    side, device = air.image_size, patches[0].image.x.device
    corners = torch.tensor([patch.corner for patch in patches], device=device)
    within = 2 * (torch.tensor([patch.edges for patch in patches], device=device) - corners.repeat(1, 2)) / side - 1
    x = torch.stack([patch.image.x[patch.corner[1] :, patch.corner[0] :][:side, :side] for patch in patches])

    free, fixed = [], []
    stay = {patch.image: torch.ones_like(patch.image.objects.weight, dtype=torch.bool) for patch in patches}
    for patch, corner, inside in zip(patches, corners, within):
        objects = patch.image.objects
        z_where = to_canvas(objects.poses, corner, side)
        place = pose_to_place(z_where)
        is_free = (place >= inside[:2]).all(1) & (place < inside[2:]).all(1)
        is_free &= is_free.cumsum(0) <= most
        is_near = (place.abs() < 1 + 2 * air.usual_window / side).all(1) & ~is_free
        free.append(some(Objects(z_where, *objects[1:]), is_free))
        fixed.append(some(Objects(z_where, *objects[1:]), is_near))
        stay[patch.image] &= ~is_free

    objects, there = stacked(fixed, max(len(part.poses) for part in fixed))
    canvas = (paint(air, objects) * there[..., None, None]).sum(1)
    view = View(x, canvas, within)
    objects, used = stacked(free, most)
    start = best_of(air, view, [*objects[:2], paint(air, objects), objects.weight], used[:, None], most)
    # Where nothing is left to explain, nothing can be gained.
    left = (x - canvas).square().sum((1, 2)) / (2 * air.likelihood_sd**2)
    todo = (used.any(1) | (left > PRICE)).nonzero()[:, 0]
    if len(todo):
        seen = look(some(view, todo), found=None if afresh else some(start, todo))
        for image, mask in stay.items():
            image.objects = some(image.objects, mask)
        for row, (patch, corner) in enumerate((patches[k], corners[k]) for k in todo.tolist()):
            z_where, z_what, _, weight = (part[row, : seen.counts[row]] for part in seen[1:5])
            places = (pose_to_place(z_where) + 1) * side / 2 + corner
            new = Objects(torch.cat([z_where[:, :1], places], 1), z_what, weight)
            patch.image.objects = Objects(*map(torch.cat, zip(patch.image.objects, new)))
            patch.image.evidence[patch.cell] = seen.count_evidence[row]


def to_canvas(poses: Tensor, corner: Tensor, side: int) -> Tensor:
    """Poses `[k, 3]` of `Objects` as `z_where` on a canvas whose left upper corner is `[.., 2]`, in pixels."""
    s = poses[:, :1]
    return torch.cat([s, -s.clamp(min=MIN_SCALE) * (2 * (poses[:, 1:] - corner) / side - 1)], 1)


def stacked(parts: list[Objects], k: int) -> tuple[Objects, Tensor]:
    """Objects of n patches as tensors `[n, k, ..]`, and which of them there are, bool `[n, k]`."""
    counts = torch.tensor([len(part.poses) for part in parts], device=parts[0].poses.device)
    filled = [[pad(part, (0, 0) * (part.dim() - 1) + (0, k - len(part))) for part in field] for field in zip(*parts)]
    return Objects(*map(torch.stack, filled)), torch.arange(k, device=counts.device) < counts[:, None]


def paint(air: AIR, objects: Objects) -> Tensor:
    """Each of the objects `[n, k]` on a canvas, `[n, k, side, side]`."""
    n, k = objects.weight.shape
    return air.paint(objects.poses.flatten(0, 1), objects.z_what.flatten(0, 1)).unflatten(0, (n, k))


def possible(evidence: Tensor) -> Tensor:
    """The evidence of each count in each of several cells, `[cells, T + 1]`, without more objects than were found where
    they would not pay even without their price: the many places where there is nothing would add up."""
    most, best = evidence.max(1, keepdim=True)
    more = torch.arange(evidence.shape[1], device=evidence.device) - best
    return evidence.masked_fill((len(evidence) > 1) & (more > 0) & (evidence + PRICE * more < most), -math.inf)


def assemble(air: AIR, searched: Searched, image: np.ndarray | Tensor) -> Found:
    """What was found in an image, and what follows from it."""
    x, objects, side = searched.x, searched.objects, air.image_size
    s, places = objects.poses.split([1, 2], 1)
    corners = (places - side / 2).round()
    painted = air.paint(to_canvas(objects.poses, corners, side), objects.z_what)
    # With room for what reaches beyond the image, which is left out.
    canvas, inside = pad(torch.zeros_like(x), (side,) * 4), pad(torch.ones_like(x), (side,) * 4)
    frames = [tuple(slice(at + side, at + 2 * side) for at in corner) for corner in corners.flip(1).int().tolist()]
    painted = [part * inside[frame] for part, frame in zip(painted, frames)]
    for frame, part in zip(frames, painted):
        canvas[frame] += part
    error = pad(x, (side,) * 4) - canvas
    scale = 2 * air.likelihood_sd**2
    overlaps = [(part * (canvas[frame] - part)).sum() for frame, part in zip(frames, painted)]
    without = [((error[frame] + part).square() - error[frame].square()).sum() for frame, part in zip(frames, painted)]
    overlaps, without = (torch.stack(part) if part else x.new_zeros(0) for part in (overlaps, without))
    log_weight = objects.weight.sum() - error.square().sum() / scale - OVERLAP * overlaps.sum() / 2
    losses = without / scale + objects.weight - OVERLAP * overlaps
    h, w = image.shape
    width = air.image_size / s.clamp(min=MIN_SCALE)
    row, column = (
        torch.bucketize(places[:, 1 - axis].contiguous(), edges[1:-1].to(places), right=True)
        for axis, edges in enumerate(searched.edges)
    )
    return Found(
        objects=objects,
        boxes=torch.cat([places - width / 2, width, width], 1),
        losses=losses,
        cell=row * searched.evidence.shape[1] + column,
        cell_evidence=possible(searched.evidence.flatten(0, 1)),
        log_weight=float(log_weight),
        explained=float(1 - (error.square().sum() / x.square().sum().clamp(min=1e-6)).clamp(max=1)),
        reconstruction=canvas[side : side + h, side : side + w],
    )
