"""What is on canvases: the guide proposes, the model decides.

One run of the guide (`infer`) is what training needs and what the literature reports. It gets one try: a window that it
lays across two objects stays there. The model can tell that this explains the image badly, so `search` asks it, again
and again: objects are taken off, the guide proposes others for what is then left, and what has more evidence is kept.
`patches.find` searches images of any size with it.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Normal

from air import AIR, Slot
from modules import Look, image_to_object, pixel_centres, pose_to_box, pose_to_place

MOVES = 100  # at most, for an image
PATIENCE = 8  # An image is done after this many moves without gain, for each of its objects.
PRICE, OVERLAP = 6.0, 8.0  # in nats: what an object costs, and what overlapping costs; see `search`
TAKEN_OFF = 0.4  # the chance that an object is taken off, in moves of the first kind
JITTER, SPLIT = 0.15, (0.3, 0.5)  # how far to look from a peak, and from the middle of a pair; in usual windows
OUTSIDE = 1e6  # nats that an object costs outside `View.within`
TOGETHER = 32  # Always so many images are computed at once: rounding depends on it.


class Inference(NamedTuple):
    """What one sample of the guide sees on `n` canvases. A step t was used where `t < counts`."""

    counts: Tensor  # int64 [n], the number of objects
    count_probs: Tensor  # [n, T + 1], q(count)
    log_weight: Tensor  # [n], log p(x, z) - log q(z | x) in nats; its mean is the ELBO
    z_where: Tensor  # [n, T, 3], poses [s, x, y]; see modules.py for their units
    z_what: Tensor  # [n, T, z_what_size], codes
    z_what_mean: Tensor  # [n, T, z_what_size], the means of q(z_what_t | x, z_where_t)
    boxes: Tensor  # [n, T, 4], the windows as (x, y, w, h) in pixels of the canvas
    x_att: Tensor  # [n, T, w, w], the windows' contents in the image
    y_att: Tensor  # [n, T, w, w], the objects as the decoder paints them
    canvases: Tensor  # [n, T + 1, h, h], the reconstruction with 0, 1, .. T objects
    reconstruction: Tensor  # [n, h, h], the one with `counts` objects


class Explanation(NamedTuple):
    """One set of objects for each of `n` images, the first `counts` of T; and what was learned on the way to it."""

    counts: Tensor  # int64 [n]
    z_where: Tensor  # [n, T, 3]
    z_what: Tensor  # [n, T, z_what_size]
    painted: Tensor  # [n, T, h, h]
    weight: Tensor  # [n, T], log p(z_where_t, z_what_t) - log q(z_where_t, z_what_t), plus familiarity, less PRICE
    evidence: Tensor  # [n], log p(x | z) and the sum of weights, less OVERLAP times the overlap
    count_evidence: Tensor  # [n, T + 1], the most evidence of all explanations with so many objects
    idle: Tensor  # int64 [n], moves since the evidence last grew by more than a nat


class View(NamedTuple):
    """Canvases `[n, h, h]`, alone or as parts of larger images, in which objects lie that are not to be changed."""

    x: Tensor  # [n, h, h]
    canvas: Tensor  # [n, h, h], what those objects paint
    within: Tensor  # [n, 4], the left, top, right and bottom edge of where other objects may have their centres


@torch.no_grad()
def infer(air: AIR, x: Tensor | np.ndarray, max_objects: int | None = None) -> Inference:
    """What one sample of the guide finds on the canvases `x` `[n, h, h]`, floats in [0, 1] or uint8, light on black
    (`images.to_canvas` makes them so).

    max_objects: T, the most objects that can be found, if not as many as in training. Raises ValueError for what cannot
    be canvases.
    """
    x = check_canvases(air, x)
    guide, model = traces(air, x, max_objects)
    p, z_pres, z_where, z_what, z_what_mean, canvases = by_step(guide.nodes["_RETURN"]["value"])
    ones, counts = torch.ones_like(p[:, :1]), z_pres.sum(1).long()
    canvases = torch.cat([torch.zeros_like(x)[:, None], canvases], 1)
    return Inference(
        counts=counts,
        # q(n) = (more, n times) * (then no more); after T steps it is over for sure.
        count_probs=torch.cat([ones, p.cumprod(1)], 1) * torch.cat([1 - p, ones], 1),
        log_weight=log_weight(guide, model),
        z_where=z_where,
        z_what=z_what,
        z_what_mean=z_what_mean,
        boxes=pose_to_box(z_where, air.image_size),
        x_att=torch.stack([image_to_object(pose, x[:, None], air.window_size)[:, 0] for pose in z_where.unbind(1)], 1),
        y_att=torch.stack([air.decode(code) for code in z_what.unbind(1)], 1),
        canvases=canvases,
        reconstruction=canvases[torch.arange(len(x), device=x.device), counts],
    )


@torch.no_grad()
def search(
    air: AIR, view: View, most: int, moves: int, seed: int, found: Explanation | None = None, patience: int = 0
) -> Explanation:
    """The best explanations of `view` with at most `most` objects that were found.

    An explanation is a set of objects z; its evidence is
    `log p(x | z) + sum_t (log p(z_t) - log q(z_t) + f(z_t) - PRICE) - OVERLAP * overlap`: an importance weight, which
    compares explanations with different numbers of objects. With f, `air.Familiarity`, the prior on an object is what
    objects turned out to be: a piece of one is unlike them, and so are two painted as one. Overlap is the product of
    what two objects paint on a pixel, summed over pixels and pairs: where one object is explained by two, its pieces
    overlap; two objects overlap less, even where they are close. A search goes through explanations, from `found` on,
    or from that of the greedy guide (`moves=0`). A move takes some objects off, lets the guide propose two for the
    canvas that remains, then each of the two again, now that the other is known. Of what this gives, and what there
    was, it keeps what has the most evidence.

    What is taken off, and where the guide then looks, is one of four, in turn:

    1. each object with a chance of TAKEN_OFF; at the peaks of the residual, with a small random shift, as in 2 and 3;
    2. an object and its nearest neighbour; at the peaks;
    3. the same; at their own places;
    4. one object; at one side of a random line through its place, then at the other, and each time the guide sees that
       side alone. This finds two objects that lie under one window.

    moves: how many at most; an image is done earlier, once `patience` (0: PATIENCE) moves for each of its objects have
        gained less than a nat.
    seed: of the chances above, which are the same for all images: what is found in one does not depend on others.

    It is a search, not a sampler: `q(z_t)` is the density with which an object was proposed, on the canvas of that
    time; moves that lose evidence are never made; and one draw of the codes' noise stands for all. The idea of
    inferring a few objects again, given the others, is that of amortized population Gibbs (Wu et al., ICML 2020).
    The RNN guide has a memory, and cannot begin from any canvas: a move is one more sample of all objects.
    """
    n, rng = len(view.x), torch.Generator().manual_seed(seed)
    code_noise = torch.randn(air.z_what_size, generator=rng).to(view.x)
    if found is None:
        parts = [whole(air, some(view, group), most, Given(code_noise)) for group in padded(torch.arange(n))]
        found = Explanation(*(torch.cat(part)[:n] for part in zip(*parts)))
    for move in range(moves):
        todo = (found.idle < (patience or PATIENCE) * found.counts.clamp(min=1)).nonzero()[:, 0]
        if not len(todo):
            break
        # Drawn for all images, whatever becomes of each.
        uniform = torch.rand(most + 3, generator=rng).to(view.x)
        noise = torch.randn(most + 1, 3, generator=rng).to(view.x)
        for group in padded(todo):
            before, part_of_view = some(found, group), some(view, group)
            if air.sees_residual:
                kept, looks = take_off(before, move, uniform, noise, 2 / air.z_where_loc[0], part_of_view.within)
                after = propose_again(air, part_of_view, before, kept, looks, Given(code_noise, threshold=0.0))
            else:
                after = whole(air, part_of_view, most, Given(code_noise, noise, 1 - uniform))
            for part, new in zip(found, keep_better(before, after)):
                part[group] = new
    return found


def some(parts: NamedTuple, index: Tensor) -> NamedTuple:
    """All parts at some indices."""
    return type(parts)(*(part[index] for part in parts))


def padded(index: Tensor) -> list[Tensor]:
    """Groups of TOGETHER; the last is filled up with its own first ones."""
    return [group[torch.arange(TOGETHER, device=index.device) % len(group)] for group in index.split(TOGETHER)]


def whole(air: AIR, view: View, most: int, given: Messenger) -> Explanation:
    """One run of the guide."""
    looks = [Look(within=view.within)] * most
    z_pres, *objects = propose(air, view, view.canvas, looks, given)
    return best_of(air, view, objects, (z_pres.bool() & is_within(view, objects[0]))[:, None], most)


def best_of(air: AIR, view: View, objects: Sequence[Tensor], used: Tensor, most: int) -> Explanation:
    """For each image that of several sets of objects which has the most evidence, see `search`.

    objects: the fields z_where to weight of k objects; used: which are in each set, bool `[n, sets, k]`.
    """
    each, painted = used.to(view.x), objects[2].flatten(2)
    x, painted_before = view.x.flatten(1)[:, None], view.canvas.flatten(1)[:, None]
    canvas = painted_before + each @ painted
    # The square of a sum, less the squares of its terms, is twice the product of each two.
    squares = painted_before.square().sum(-1) + torch.einsum("nsk, nkp -> ns", each, painted.square())
    overlap = (canvas.square().sum(-1) - squares) / 2
    log_likelihood = Normal(canvas, air.likelihood_sd).log_prob(x).sum(-1)
    evidence = log_likelihood + torch.einsum("nsk, nk -> ns", each, objects[-1]) - OVERLAP * overlap
    counts = used.sum(-1)
    evidence = evidence.masked_fill(counts > most, -math.inf)
    seen = evidence.new_full((len(evidence), most + 1), -math.inf)
    seen = seen.scatter_reduce(1, counts.clamp(max=most), evidence, "amax")
    rows, best = torch.arange(len(used), device=used.device), evidence.argmax(1)
    used_first = (~used[rows, best]).long().argsort(dim=1, stable=True)[:, :most]
    objects = [part[rows[:, None], used_first] for part in objects]
    return Explanation(counts[rows, best], *objects, evidence[rows, best], seen, torch.zeros_like(best))


def take_off(
    found: Explanation, move: int, uniform: Tensor, noise: Tensor, window: float, within: Tensor
) -> tuple[Tensor, list[Look]]:
    """Which objects stay, bool `[n, T]`, and where to look for two others: one of the four kinds of `search`."""
    n, most = found.weight.shape
    slots, images = torch.arange(most, device=uniform.device), torch.arange(n, device=uniform.device)
    used = slots < found.counts[:, None]
    places = pose_to_place(found.z_where).masked_fill(~used[..., None], 0.0)
    one = (uniform[0] * found.counts).long()
    place = places[images, one]
    apart = (places - place[:, None]).norm(dim=-1).masked_fill(~used | (slots == one[:, None]), math.inf)
    nearest = torch.where(found.counts > 1, apart.argmin(1), one)
    jitter, turn = JITTER * window * noise[:2, :2], 2 * math.pi * uniform[1]
    aside = window * (SPLIT[0] + (SPLIT[1] - SPLIT[0]) * uniform[2]) * torch.stack([turn.cos(), turn.sin()])
    peaks, others = [Look(None, shift, within) for shift in jitter], used & (slots != one[:, None])
    pair = others & (slots != nearest[:, None])
    own = [Look(place, jitter[0]), Look(places[images, nearest], jitter[0])]
    at = pixel_centres(found.painted.shape[-1], place)
    across, down = aside[0] * (at - place[:, :1]), aside[1] * (at - place[:, 1:])
    side = across[:, None] + down[..., None] > 0
    sides = [Look(place, aside, side=side), Look(place, -aside, side=~side)]
    kinds = (used & (uniform[3:] > TAKEN_OFF), peaks), (pair, peaks), (pair, own), (others, sides)
    return kinds[move % 4]


def propose_again(
    air: AIR, view: View, found: Explanation, kept: Tensor, looks: list[Look], given: Messenger
) -> Explanation:
    """The best of what can be made of the objects that are kept and two that the guide proposes, see `search`."""
    canvas = view.canvas + (found.painted * kept[..., None, None]).sum(1)
    _, *two = propose(air, view, canvas, looks, given)
    places, painted = pose_to_place(two[0]), two[2]
    _, *first = propose(air, view, canvas + painted[:, 1], [Look(places[:, 0])], given)
    _, *second = propose(air, view, canvas + first[2][:, 0], [Look(places[:, 1])], given)
    # Of the two, and the two again: none, the first, both, the first again and the second, both again.
    choices = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    choices = torch.tensor(choices, dtype=torch.bool, device=canvas.device).expand(len(canvas), -1, -1)
    used = torch.cat([kept[:, None].expand(-1, 5, -1), choices], -1)
    objects = [torch.cat(parts, 1) for parts in zip(found[1:5], two, first, second)]
    return best_of(air, view, objects, used, kept.shape[1])


def propose(air: AIR, view: View, canvas: Tensor, looks: list[Look], given: Messenger) -> tuple[Tensor, ...]:
    """What the guide finds in a view at each look, when `canvas` is painted already: z_pres, and the fields of
    `Explanation` from z_where to weight."""

    def log_prob(trace: poutine.Trace, name: str) -> Tensor:
        return torch.stack([trace.nodes[f"{name}_{t}"]["log_prob"] for t in range(len(looks))], 1)

    with given, pyro.validation_enabled(False):
        guide = poutine.trace(air.guide).get_trace(view.x, len(looks), canvas, looks)
        prior = poutine.trace(poutine.replay(air.prior, trace=guide)).get_trace(len(view.x), len(looks))
        guide.compute_log_prob()
        prior.compute_log_prob()
        _, z_pres, z_where, z_what, _, canvases = by_step(guide.nodes["_RETURN"]["value"])
        weight = sum(log_prob(prior, name) - log_prob(guide, name) for name in ("z_where", "z_what")) - PRICE
        weight = weight + air.familiarity(air.features(z_where, z_what))
    painted = canvases - torch.cat([canvas[:, None], canvases[:, :-1]], 1)
    # Wherever an object lies, it is as probable as in the middle.
    weight = weight + (z_where[..., 1:] / air.z_where_scale[1:]).square().sum(-1) / 2
    weight = weight - OUTSIDE * ~is_within(view, z_where)
    return z_pres, z_where, z_what, painted, weight


def is_within(view: View, z_where: Tensor) -> Tensor:
    """Whether objects with poses `[n, k, 3]` may be where they are, bool `[n, k]`."""
    places = pose_to_place(z_where)
    return ((places >= view.within[:, None, :2]) & (places <= view.within[:, None, 2:])).all(-1)


def by_step(slots: list[Slot]) -> list[Tensor]:
    """Some fields of the guide's steps, `[n, T, ..]` each."""
    names = ("z_pres_prob", "z_pres", "z_where", "z_what", "z_what_mean", "canvas")
    return [torch.stack([getattr(slot, name) for slot in slots], 1) for name in names]


def keep_better(before: Explanation, after: Explanation) -> Explanation:
    """For each image the explanation with more evidence, by a margin that rounding does not reach."""
    gain = after.evidence - before.evidence
    parts = [torch.where((gain > 1e-3).view(-1, *[1] * (new.dim() - 1)), new, old) for old, new in zip(before, after)]
    return Explanation(*parts)._replace(
        count_evidence=torch.maximum(before.count_evidence, after.count_evidence),
        idle=torch.where(gain > 1, 0, before.idle + 1),
    )


class Given(Messenger):
    """Inside, nothing is random: `z_pres` is 1 if its mean reaches a threshold; poses and codes are mean + sd * noise.

    The noise is the same for all images. Codes always have some: the decoder has learned to paint from noisy codes.
    """

    def __init__(self, code_noise: Tensor, pose_noise: Tensor | float = 0.0, threshold: Tensor | float = 0.5):
        super().__init__()
        self.given = {"z_pres": threshold, "z_where": pose_noise, "z_what": code_noise}

    def _pyro_sample(self, msg):
        kind, _, t = msg["name"].rpartition("_")
        if msg["value"] is None and kind in self.given:
            given, fn = self.given[kind], msg["fn"]
            given = given[int(t)] if torch.is_tensor(given) and kind != "z_what" else given
            msg["value"] = (fn.mean >= given).to(fn.mean) if kind == "z_pres" else fn.mean + fn.stddev * given


@torch.no_grad()
def traces(air: AIR, x: Tensor, max_objects: int | None = None) -> tuple[poutine.Trace, poutine.Trace]:
    """A run of the guide, and the model replayed on it: their traces, with log-probabilities."""
    guide = poutine.trace(air.guide).get_trace(x, max_objects)
    model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(x, 1, max_objects)
    guide.compute_log_prob()
    model.compute_log_prob()
    return guide, model


def log_weight(guide: poutine.Trace, model: poutine.Trace) -> Tensor:
    """`log p(x, z) - log q(z | x)` `[n]`, in nats, of `traces`."""
    log_p, log_q = (
        sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site) for trace in (model, guide)
    )
    return log_p - log_q


def check_canvases(air: AIR, x: Tensor | np.ndarray) -> Tensor:
    """The canvases as floats in [0, 1], where the model is. Raises ValueError for what cannot be such."""
    x = check_values(air, x)
    if x.shape[1:] != (air.image_size, air.image_size):
        raise ValueError(f"canvases have shape {list(x.shape)}, expected [n, {air.image_size}, {air.image_size}]")
    light = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).median(1)[0] > 0.5
    if light.any():
        warnings.warn(f"{light.sum()} of {len(x)} canvases are not light on black: images.to_canvas makes them so")
    return x


def check_values(air: AIR, x: Tensor | np.ndarray) -> Tensor:
    """Greys of any shape as floats in [0, 1], where the model is. Raises ValueError for what cannot be such."""
    if isinstance(x, np.ndarray):  # PyTorch takes no other byte order and no negative strides.
        x = np.array(x, x.dtype.newbyteorder("="))
    x = torch.as_tensor(x, device=air.z_where_loc.device)
    x = (x / 255 if x.dtype == torch.uint8 else x).to(air.z_where_loc)
    if not x.numel():
        raise ValueError(f"canvases have shape {list(x.shape)}")
    if not (x.min() >= 0 and x.max() <= 1):  # false for NaN as well
        raise ValueError("canvases have values outside [0, 1], or NaN")
    return x
