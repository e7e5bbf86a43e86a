import math

import pytest
import torch
from torch import nn

from modules import (
    MLP,
    Decoder,
    Encoder,
    ImageLSTM,
    ResidualAttention,
    RNNAttention,
    image_to_object,
    object_to_image,
    pose_to_box,
)


@pytest.fixture
def poses():
    """Windows of several sizes: in the middle, in corners, and half outside."""
    return torch.tensor(
        [[3.0, 0, 0], [2.2, 1.0, -0.5], [4.0, -2.5, 3.5], [1.0, 0, 0], [1.7, 1.6, -1.6]], dtype=torch.float64
    )


def interpolate(image, x, y):
    """Bilinear interpolation at pixel coordinates (centres on whole numbers), 0 outside: slow and obvious."""
    value, (height, width) = 0.0, image.shape
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(x - column)) * (1 - abs(y - row)) * float(image[row, column])
    return value


def centre(i, size):
    return (2 * i + 1) / size - 1


def pixel(u, size):
    return ((u + 1) * size - 1) / 2


def test_painting_and_cropping_match_a_loop_over_pixels(poses):
    objects, images = torch.rand(5, 7, 7).double(), torch.rand(5, 11, 11).double()
    painted, cropped = object_to_image(poses, objects, 11), image_to_object(poses, images, 7)
    for n, (s, x, y) in enumerate(poses.tolist()):
        for i in range(11):
            for j in range(11):  # A canvas point X lies at s * X + x in the window.
                u, v = s * centre(j, 11) + x, s * centre(i, 11) + y
                assert float(painted[n, i, j]) == pytest.approx(interpolate(objects[n], pixel(u, 7), pixel(v, 7)))
        for i in range(7):
            for j in range(7):
                u, v = (centre(j, 7) - x) / s, (centre(i, 7) - y) / s
                assert float(cropped[n, i, j]) == pytest.approx(interpolate(images[n], pixel(u, 11), pixel(v, 11)))


def test_painting_matches_grid_sample(poses):
    objects = torch.rand(5, 28, 28).double()
    theta = torch.zeros(5, 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = theta[:, 1, 1] = poses[:, 0]
    theta[:, :, 2] = poses[:, 1:]
    grid = nn.functional.affine_grid(theta, (5, 1, 50, 50), align_corners=False)
    expected = nn.functional.grid_sample(objects[:, None], grid, align_corners=False)[:, 0]
    torch.testing.assert_close(object_to_image(poses, objects, 50), expected)


def test_an_object_lands_where_its_pose_says():
    pose = torch.tensor([[2.5, 1.0, -0.5]])
    image = object_to_image(pose, torch.ones(1, 28, 28), 50)[0]
    x, y, w, h = pose_to_box(pose, 50)[0].tolist()
    assert w == h == pytest.approx(20)
    # Centre at (-x/s, -y/s) = (-0.4, 0.2) of the canvas's [-1, 1]: pixels 15 and 30 of 50.
    assert (x + w / 2, y + h / 2) == (pytest.approx(15), pytest.approx(30))
    columns, rows = image.sum(0), image.sum(1)
    at = torch.arange(50) + 0.5
    assert float(columns @ at / columns.sum()) == pytest.approx(15, abs=0.01)
    assert float(rows @ at / rows.sum()) == pytest.approx(30, abs=0.01)
    inside = torch.zeros(50, 50, dtype=bool)
    inside[math.floor(y) : math.ceil(y + h), math.floor(x) : math.ceil(x + w)] = True
    assert image[~inside].max() == 0
    assert image[inside].mean() > 0.9


def test_identity_and_round_trip():
    images = torch.rand(3, 28, 28)
    whole = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)
    torch.testing.assert_close(image_to_object(whole, images, 28), images)
    torch.testing.assert_close(object_to_image(whole, images, 28), images)
    # A smooth object, painted and cropped at the same place, comes back.
    across = torch.linspace(-1, 1, 28)
    blob = torch.exp(-4 * (across[:, None] ** 2 + across**2))[None]
    pose = torch.tensor([[1.5, 0.3, -0.2]])
    torch.testing.assert_close(image_to_object(pose, object_to_image(pose, blob, 50), 28), blob, atol=0.02, rtol=0)


@pytest.mark.parametrize("s", [0.5, 1.0, 1.1, 1.5, 3.0])
def test_a_wider_crop_keeps_the_centre(s):
    """Also of a window that is nearly, or more than, as large as the canvas."""
    pose = torch.tensor([[s, 0.4, -0.3]], dtype=torch.float64)
    x, y, w, h = pose_to_box(pose, 50)[0].tolist()
    at = torch.arange(50) + 0.5
    image = torch.exp(-((at[:, None] - y - h / 2) ** 2 + (at - x - w / 2) ** 2) / 8)[
        None
    ].double()  # a dot in its middle
    crop = image_to_object(pose, image, 27, widen=1.5)[0]
    assert crop.argmax() == 13 * 27 + 13
    if s >= 1.5:
        torch.testing.assert_close(crop, image_to_object(pose / 1.5, image, 27)[0])


def test_gradients_by_finite_differences():
    pose = torch.tensor([[2.3, 0.41, -0.27], [1.4, -0.33, 0.62]], dtype=torch.float64, requires_grad=True)
    objects = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    images = torch.rand(2, 9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, o: object_to_image(z, o, 9), (pose, objects))
    assert torch.autograd.gradcheck(lambda z, i: image_to_object(z, i, 5), (pose, images))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e-30])
def test_a_window_is_never_larger_than_the_canvas(scale):
    pose = torch.tensor([[scale, 0.2, 0.1]], requires_grad=True)
    image = torch.rand(1, 50, 50)
    crop = image_to_object(pose, image, 28)
    torch.testing.assert_close(crop, image_to_object(torch.tensor([[1.0, 0.2, 0.1]]), image, 28))
    (crop.sum() + object_to_image(pose, crop.detach(), 50).sum() + pose_to_box(pose, 50).sum()).backward()
    assert pose.grad.isfinite().all()


def test_lstm_is_an_lstm_that_sees_the_image_at_every_step():
    lstm = ImageLSTM(image_size=10, input_size=4, state_size=6)
    reference = nn.LSTMCell(100 + 4, 6)
    with torch.no_grad():
        reference.weight_ih.copy_(torch.cat([lstm.image.weight, lstm.rest.weight[:, :4]], 1))
        reference.weight_hh.copy_(lstm.rest.weight[:, 4:])
        reference.bias_ih.copy_(lstm.image.bias)
        reference.bias_hh.zero_()
    images = torch.rand(3, 10, 10)
    look, state, expected = lstm.project_image(images), lstm.start(3), lstm.start(3)
    for _ in range(3):
        inputs = torch.randn(3, 4)
        state = lstm(look, inputs, state)
        expected = reference(torch.cat([images.flatten(1), inputs], 1), expected)
    torch.testing.assert_close(state, expected)


def test_pictures_side_by_side_are_cropped_alike(poses):
    a, b = torch.rand(2, 5, 11, 11).double()
    crops = image_to_object(poses, torch.cat([a, b], -1), 7, 1.3)
    torch.testing.assert_close(crops, torch.cat([image_to_object(poses, picture, 7, 1.3) for picture in (a, b)], -1))


@pytest.fixture
def attention():
    return ResidualAttention(50, 28, 20, ((3.0, 0.0, 0.0), (0.2, 1.0, 1.0)))


def test_the_place_is_where_most_is_left(attention):
    """In the middle of an object that nothing is painted of yet, and not between two."""
    x = torch.zeros(3, 50, 50)
    x[:, 5:17, 8:20] = 0.9
    x[1:, 30:42, 8:20] = 1.0
    canvas = torch.zeros(3, 50, 50)
    canvas[2, 30:42, 8:20] = 1.0
    place = attention.place(attention.residual(x, canvas))
    pixels = ((place + 1) * 50 - 1) / 2
    expected = torch.tensor([[13.5, 10.5], [13.5, 35.5], [13.5, 10.5]])
    assert (pixels - expected).abs().max() <= 1


def test_what_is_painted_is_thickened(attention):
    """An object painted a pixel beside its place leaves nothing."""
    x = torch.zeros(1, 50, 50)
    x[:, 20:32, 20:32] = 1.0
    for shift in (0, 1):
        assert attention.residual(x, x.roll((shift, -shift), (1, 2))).max() == 0
    assert attention.residual(x, x.roll(2, 1)).max() == 1
    assert attention.residual(x, 1.5 * x).min() == 0


def test_no_gradient_passes_through_the_canvas(attention):
    canvas = torch.rand(2, 50, 50, requires_grad=True)
    x = torch.rand(2, 50, 50)
    outputs = attention(x, canvas, None, None, attention.start(x))
    crop = attention.crop(outputs[1], x, canvas, 28)
    sum(output.sum() for output in (*outputs[:3], crop)).backward()
    assert canvas.grad is None and attention.look[1].weight.grad.abs().max() > 0


def test_networks_start_where_they_should():
    objects = Decoder(50, 200, 28)(torch.randn(100, 50))
    assert objects.shape == (100, 28, 28)
    assert 0 < objects.min() and objects.mean() < 0.2  # nearly empty
    loc, scale = Encoder(28 * 28, 200, 50)(torch.rand(100, 28, 28))
    assert loc.shape == scale.shape == (100, 50) and scale.min() > 0
    prior = (3.0, 0.0, 0.0), (0.2, 1.0, 1.0)
    x, z_where, z_what = torch.rand(100, 50, 50), torch.zeros(100, 3), torch.zeros(100, 50)
    for network in (RNNAttention(50, 50, 256, 200, prior), ResidualAttention(50, 28, 200, prior)):
        z_pres, loc, scale, _ = network(x, 0 * x, z_where, z_what, network.start(x))
        assert z_pres.shape == (100,) and loc.shape == scale.shape == (100, 3) and scale.min() > 0
        assert z_pres.abs().max() < 1
        assert ((loc[:, 0] - 3) / 0.2).abs().max() < 1  # a plausible window
    assert [layer.out_features for layer in MLP(3, 5, 7) if isinstance(layer, nn.Linear)] == [5, 7]
