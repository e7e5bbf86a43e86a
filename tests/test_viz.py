import numpy as np

import viz


def test_boxes_are_drawn_where_they_are(scenes):
    """On a black image, only the box's outline is coloured: its extent is the box's."""
    black = np.zeros((1, 50, 50), np.uint8)
    plain = viz.draw_scenes(black, [[]], columns=1)
    boxed = viz.draw_scenes(black, [[(10, 20, 25, 5)]], columns=1, steps=False)
    assert plain.dtype == np.uint8 and plain.shape == boxed.shape and plain.shape[2] == 3
    image_rows, image_columns = np.nonzero((plain == 0).all(2))
    left, top = image_columns.min(), image_rows.min()
    scale = (image_columns.max() + 1 - left) / 50
    rows, columns = np.nonzero((boxed[..., 0] > 150) & (boxed[..., 1] < 100))
    box = np.array([columns.min() - left, rows.min() - top, np.ptp(columns), np.ptp(rows)]) / scale
    np.testing.assert_allclose(box, [10, 20, 25, 5], atol=2)


def test_a_grid_of_any_number(scenes):
    boxes = [box[:count] for box, count in zip(scenes.boxes, scenes.counts)]
    seven = viz.draw_scenes(scenes.x[:7], boxes[:7], range(7), columns=5, title="seven")
    floats = viz.draw_scenes(scenes.x[:7] / 255, boxes[:7], range(7), columns=5, title="seven")
    assert seven.shape == floats.shape and np.abs(seven.astype(int) - floats).max() <= 2
