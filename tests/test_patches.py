"""What is found in images of any size."""

import itertools

import numpy as np
import pytest
import torch
from test_air import small_air

import multi_mnist
import patches
from inference import OVERLAP
from patches import Found, find, possible


@pytest.fixture
def air():
    return small_air(0.0).float()


@pytest.fixture
def large(digits):
    """Scenes of 110 x 90 pixels with six digits."""
    scenes = multi_mnist.compose(*digits, 4, np.random.default_rng(0), 110, 6, min_digits=6)
    return [x[:, 10:100] for x in scenes.x]


def test_an_answer_depends_on_the_image_alone(air, large, scenes):
    """Whatever the sizes of others are."""
    alone = [find(air, [x], moves=8)[0] for x in large[:2]]
    together = find(air, [scenes.x[1], large[1], scenes.x[2][:30], large[0], large[2].T], moves=8)
    for one, other in zip(alone, (together[3], together[1])):
        assert one.count == other.count > 2 and one.log_weight == pytest.approx(other.log_weight, abs=0.01)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=0.01)


@torch.no_grad()
def test_the_evidence_of_an_image(air, large, scenes):
    """Painted anew, object by object on the whole image: the evidence, and what would be lost without each."""
    images = [*large, *scenes.x[scenes.counts > 0][:3], np.zeros((50, 50), np.uint8)]
    for x, found in zip(images, find(air, images, moves=8)):
        s = found.objects.poses[:, 0]
        down, across = (torch.arange(n) + 0.5 for n in x.shape)
        painted = []
        for code, (left, top, w, h) in zip(found.objects.z_what, found.boxes):
            # Bilinear: where each pixel's centre lies among the centres of the object's.
            rows, columns = ((at - start) / size * 9 - 0.5 for at, start, size in ((down, top, h), (across, left, w)))
            weights = [(1 - (at[:, None] - torch.arange(9)).abs()).relu() for at in (rows, columns)]
            painted.append(weights[0] @ air.decode(code[None])[0] @ weights[1].T)

        def evidence(used):
            canvas = sum((painted[i] for i in used), torch.zeros(x.shape))
            error = (torch.from_numpy(x) / 255 - canvas).square().sum() / (2 * 0.3**2)
            overlap = sum((painted[a] * painted[b]).sum() for a, b in itertools.combinations(used, 2))
            return float(sum(found.objects.weight[i] for i in used) - error - OVERLAP * overlap)

        everything = list(range(found.count))
        assert found.log_weight == pytest.approx(evidence(everything), abs=0.05)
        for i in everything:
            others = [k for k in everything if k != i]
            assert float(found.losses[i]) == pytest.approx(found.log_weight - evidence(others), abs=0.05)
        canvas = sum(painted, torch.zeros(x.shape)).detach()
        torch.testing.assert_close(found.reconstruction, canvas, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes[:, 2], 50 / s.clamp(min=1))


def test_cells_cover_an_image_and_patches_do_not_overlap():
    for length, sweep in itertools.product((50, 51, 64, 90, 128, 700), range(3)):
        axis = patches.divide(length, sweep, 50, 50 / 3)
        for start, corner, end in zip(axis.edges, axis.corners, axis.edges[1:]):
            assert 0 <= corner <= length - 50 and end > start
            # With room for the windows around it, but for the image's own border.
            assert start <= 0 or start - corner >= 8
            assert end >= length or corner + 50 - end >= 8
        for a, b in itertools.combinations(range(len(axis.corners)), 2):
            assert axis.turns[a] != axis.turns[b] or abs(axis.corners[a] - axis.corners[b]) >= 50


def test_probabilities_of_several_cells():
    """The sum of independent counts; and an object is one with the probability that there are as many as it needs."""
    rows = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [1.0, 1e-3, 0.0]])
    cell, losses = torch.tensor([0, 0, 1]), torch.tensor([3.0, 9.0, 1.0])
    found = Found(None, None, losses, cell, possible(2.0 * rows.log()), 0.0, 1.0, None)
    # In the third, one more would cost 2 * 6.9 nats, more than its price.
    expected = [0.1 * 0.5, 0.2 * 0.5 + 0.1 * 0.5, 0.7 * 0.5 + 0.2 * 0.5, 0.7 * 0.5]
    np.testing.assert_allclose(found.count_probs(2.0), expected, atol=1e-6)
    np.testing.assert_allclose(found.object_probs(2.0), [0.7, 0.9, 0.5], atol=1e-6)


def test_what_cannot_be_images(air):
    for wrong in np.full((60, 60), 2.0), np.zeros((0, 60)), np.zeros((3, 60, 60)):
        with pytest.raises(ValueError, match="^canvases have (values|shape)|^an image has shape"):
            find(air, [wrong])
    with pytest.raises(ValueError, match="the RNN guide sees canvases of 50x50 pixels"):
        find(small_air(guide="rnn").float(), [np.zeros((60, 40), np.uint8)])
