import numpy as np

import viz


def test_boxes_are_drawn_where_they_are():
    """On a black image only a box's outline is red."""
    black, box = np.zeros((50, 50), np.uint8), np.array([0.1, 0.2, 0.5, 0.3])
    plain, boxed = (viz.draw_scenes([black], [boxes], ["caption"], columns=1) for boxes in ([], [box * 50]))
    assert plain.dtype == np.uint8 and plain.shape == boxed.shape and plain.shape[2] == 3
    ink = (plain == 0).all(2)  # of the image, and of the text above it, which is small
    columns, rows = np.flatnonzero(ink.sum(0) > 50), np.flatnonzero(ink.sum(1) > 100)
    y, x = np.nonzero((boxed[..., 0] > 150) & (boxed[..., 1] < 100))
    drawn = np.array([x.min() - columns[0], y.min() - rows[0], np.ptp(x), np.ptp(y)]) / len(columns)
    np.testing.assert_allclose(drawn, box, atol=0.03)


def test_an_image_of_any_size_keeps_its_pixels():
    """Or is enlarged by a whole number; and a box is an outline where it should be."""
    for shape, pixel in (((20, 40), 12), ((700, 900), 1)):
        image = np.random.default_rng(0).random(shape)
        box = np.array([2, 4, 8, 5])
        picture = viz.draw_boxes(image, [box])
        assert picture.shape == (shape[0] * pixel, shape[1] * pixel, 3)
        changed = (picture != viz.draw_boxes(image, [])).any(2)
        rows, columns = np.nonzero(changed)
        ends = np.array([columns.min(), rows.min(), columns.max() - columns.min(), rows.max() - rows.min()])
        assert (ends == pixel * box).all() and not changed[pixel * 6, pixel * 5]
        np.testing.assert_allclose(viz.draw_boxes(image, [])[::pixel, ::pixel, 0] / 255, image, atol=1 / 255)


def test_a_grid_of_any_number(scenes):
    boxes = [box[:count] for box, count in zip(scenes.boxes, scenes.counts)]
    seven = viz.draw_scenes(scenes.x[:7], boxes[:7], range(7), columns=5, title="seven")
    floats = viz.draw_scenes(scenes.x[:7] / 255, boxes[:7], range(7), columns=5, title="seven")
    assert seven.shape == floats.shape and np.abs(seven.astype(int) - floats).max() <= 2
    assert viz.draw_scenes(scenes.x[:0], [], [], title="none").min() < 100  # only the title


def test_steps_show_what_was_used_only():
    rng = np.random.default_rng(0)
    images, windows, canvases = rng.random((2, 50, 50)), rng.random((2, 3, 28, 28)), rng.random((2, 4, 50, 50))
    boxes, q_count = np.tile([5.0, 5, 20, 20], (2, 3, 1)), np.array([[0, 1, 0, 0], [0, 0, 0, 1.0]])

    def drawn(windows):
        return viz.draw_steps(images, boxes, np.array([1, 3]), windows, windows, canvases, q_count)

    changed = windows.copy()
    changed[0, 1:] = 0  # of steps that the first scene did not use
    assert np.array_equal(drawn(windows), drawn(changed))
    changed[1, 2] = 0
    assert not np.array_equal(drawn(windows), drawn(changed))
