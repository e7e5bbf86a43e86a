"""The spatial transformers against PyTorch's own, and the networks."""

import pytest
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, max_pool2d

from air import AIR
from modules import Decoder, ImageLSTM, Look, ResidualAttention, RNNAttention, Step, pose_to_place, to_channels
from modules import image_to_object as crop
from modules import object_to_image as paint

PRIOR = (3.0, 0.0, 0.0), (0.2, 1.0, 1.0)


def resample(images, factor, shift, size):
    """PyTorch's way: the place u of the result, from -1 to 1, takes the images' at `factor * u + shift`."""
    theta = torch.zeros(len(images), 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = theta[:, 1, 1] = factor
    theta[:, :, 2] = shift
    grid = affine_grid(theta, (len(images), images.shape[1], size, size), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def test_painting_and_cropping_are_what_grid_sample_does():
    """Place u of the canvas is s * u + (x, y) in the window; a crop is the inverse, perhaps wider, of all channels."""
    # In the middle, in corners, half outside, and two that would be larger than the canvas.
    poses = [[3, 0, 0], [2.2, 1, -0.5], [4, -2.5, 3.5], [1, 0, 0], [1.7, 1.6, -1.6], [0.5, 0.4, -0.3], [-3, 0, 1]]
    poses = torch.tensor(poses, dtype=torch.float64)
    s, xy = poses[:, 0].clamp(min=1), poses[:, 1:]
    objects, images = torch.rand(7, 28, 28).double(), torch.rand(2, 7, 50, 50).double()
    expected = resample(objects[:, None], s, xy, 50)[:, 0]
    torch.testing.assert_close(paint(poses, objects, 50), expected)
    for widen in (1.0, 1.5):
        expected = resample(images.transpose(0, 1), widen / s, -xy / s[:, None], 28)
        for channels in (to_channels(*images), images.transpose(0, 1).contiguous()):  # however they lie in memory
            torch.testing.assert_close(crop(poses, channels, 28, widen), expected)


def test_lstm_is_an_lstm_that_sees_the_image_at_every_step():
    lstm = ImageLSTM(image_size=10, input_size=4, state_size=6)
    reference = nn.LSTMCell(100 + 4, 6)
    with torch.no_grad():
        reference.weight_ih.copy_(torch.cat([lstm.image.weight, lstm.rest.weight[:, :4]], 1))
        reference.weight_hh.copy_(lstm.rest.weight[:, 4:])
        reference.bias_ih.copy_(lstm.image.bias)
        reference.bias_hh.zero_()
    images = torch.rand(3, 10, 10)
    projection, state, expected = lstm.project_image(images), lstm.init_state(3), lstm.init_state(3)
    for inputs in torch.randn(3, 3, 4):
        state = lstm(projection, inputs, state)
        expected = reference(torch.cat([images.flatten(1), inputs], 1), expected)
    torch.testing.assert_close(state, expected)


@pytest.fixture
def attention():
    return ResidualAttention(50, 28, 20, PRIOR)


def test_where_it_looks(attention):
    """At the peak, or at a given place, or so far beside it: a shifted image is seen as the image was."""
    x = torch.zeros(1, 50, 50)
    x[:, 18:30, 20:28] = 1.0
    at = attention.peak(attention.residual(x, 0 * x))
    shift = torch.tensor([2 / 25, -4 / 25])  # a pixel is 1 / 25

    def window(x, look):
        return attention(Step(x, 0 * x, None, None, (), look))[1]

    plain, moved = window(x, Look()), window(x.roll((-2, 1), (1, 2)), Look())
    assert torch.equal(window(x, Look(at)), plain) and not torch.equal(window(x, Look(at, shift)), plain)
    assert torch.equal(window(x, Look(None, shift)), window(x, Look(at + shift)))
    torch.testing.assert_close(
        pose_to_place(moved), pose_to_place(plain) + torch.tensor([1 / 25, -2 / 25]), atol=0.01, rtol=0
    )


def test_a_peak_is_the_highest_in_its_square(attention):
    score = torch.rand(3, 50, 50)
    highest = max_pool2d(score, attention.reach, 1, attention.reach // 2)
    assert torch.equal(attention.is_highest(score), score == highest)


def test_no_gradient_passes_through_the_canvas():
    """Neither to where the residual guide attends nor to what it encodes."""
    air, canvas, x = AIR(look_size=20), torch.rand(2, 50, 50, requires_grad=True), torch.rand(2, 50, 50)
    outputs = air.attend(Step(x, canvas, None, None, air.attend.init_state(x)))
    (air.crop(outputs[1], x, canvas).sum() + sum(output.sum() for output in outputs[:3])).backward()
    assert canvas.grad is None and air.attend.look[1].weight.grad.abs().max() > 0


def test_networks_start_where_they_should():
    """Objects are nearly empty, windows plausible, and nothing is decided."""
    objects, x = Decoder(50, 200, 28)(torch.randn(100, 50)), torch.rand(100, 50, 50)
    assert objects.min() > 0 and objects.mean() < 0.2
    for network in (RNNAttention(50, 50, 256, 200, PRIOR), ResidualAttention(50, 28, 200, PRIOR)):
        step = Step(x, 0 * x, torch.zeros(100, 3), torch.zeros(100, 50), network.init_state(x))
        z_pres, loc, *_ = network(step)
        assert z_pres.abs().max() < 1 and ((loc[:, 0] - 3) / 0.2).abs().max() < 1
