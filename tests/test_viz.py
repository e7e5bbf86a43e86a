import numpy as np
import pytest

import viz


def test_boxes_are_drawn_where_they_are(scenes):
    """On a black image, only the box's outline is coloured: its extent is the box's."""
    black = np.zeros((1, 50, 50), np.uint8)
    plain = viz.draw_scenes(black, [[]], columns=1)
    boxed = viz.draw_scenes(black, [[(10, 20, 25, 5)]], columns=1)
    assert plain.dtype == np.uint8 and plain.shape == boxed.shape and plain.shape[2] == 3
    image_rows, image_columns = np.nonzero((plain == 0).all(2))
    left, top = image_columns.min(), image_rows.min()
    scale = (image_columns.max() + 1 - left) / 50
    below = image_rows.max()  # where the legend is
    rows, columns = np.nonzero((boxed[:below, :, 0] > 150) & (boxed[:below, :, 1] < 100))
    box = np.array([columns.min() - left, rows.min() - top, np.ptp(columns), np.ptp(rows)]) / scale
    np.testing.assert_allclose(box, [10, 20, 25, 5], atol=2)


@pytest.mark.parametrize("height, width", [(20, 40), (2500, 3500)])
def test_a_scene_of_any_size(height, width):
    """As above, whether it is drawn larger or smaller than it is."""
    black, box = np.zeros((height, width), np.uint8), np.array([0.1, 0.2, 0.5, 0.3])
    plain = viz.draw_scene(black, [], "0")
    boxed = viz.draw_scene(black, [box * width], "1")
    ink = (plain == 0).all(2)  # of the image, and of the text above it, which is small
    columns, rows = np.flatnonzero(ink.sum(0) > 50), np.flatnonzero(ink.sum(1) > 200)
    left, top, wide = columns[0], rows[0], len(columns)
    inside = boxed[: top + len(rows)]  # without the legend
    rows, columns = np.nonzero((inside[..., 0] > 150) & (inside[..., 1] < 100))
    drawn = np.array([columns.min() - left, rows.min() - top, np.ptp(columns), np.ptp(rows)]) / wide
    np.testing.assert_allclose(drawn, box, atol=0.02)
    assert 400 < boxed.shape[1] < 1300


def test_a_grid_of_any_number(scenes):
    boxes = [box[:count] for box, count in zip(scenes.boxes, scenes.counts)]
    seven = viz.draw_scenes(scenes.x[:7], boxes[:7], range(7), columns=5, title="seven")
    floats = viz.draw_scenes(scenes.x[:7] / 255, boxes[:7], range(7), columns=5, title="seven")
    assert seven.shape == floats.shape and np.abs(seven.astype(int) - floats).max() <= 2


def test_steps_show_what_was_used_only():
    rng = np.random.default_rng(0)
    whole, windows = rng.random((2, 50, 50)), rng.random((2, 3, 28, 28))
    canvases, probs = rng.random((2, 4, 50, 50)), np.array([[0, 1, 0, 0], [0, 0, 0, 1.0]])
    boxes = np.tile([5.0, 5, 20, 20], (2, 3, 1))

    def drawn(windows):
        return viz.draw_steps(whole, boxes, np.array([1, 3]), windows, windows, canvases, probs)

    changed = windows.copy()
    changed[0, 1:] = 0  # of steps that the first scene did not use
    assert np.array_equal(drawn(windows), drawn(changed))
    changed[1, 2] = 0
    assert not np.array_equal(drawn(windows), drawn(changed))


def test_curves_and_confusion():
    curves = {"ELBO": ([100, 200], [10.0, 20.0], [500.0, 600.0]), "unknown at first": ([100, 200], [1, 2], [None, 0.5])}
    picture = viz.draw_curves(curves, "as it learns")
    assert picture.dtype == np.uint8 and (picture != 255).any()
    right = viz.draw_confusion([[10, 0, 0], [0, 10, 0]])
    wrong = viz.draw_confusion([[0, 10, 0], [0, 10, 0]])
    assert right.shape == wrong.shape and not np.array_equal(right, wrong)
    viz.draw_confusion([[0, 0], [3, 4]])  # a count that no scene has
