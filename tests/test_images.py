import numpy as np
import pytest

from images import letterbox, load_arrays, load_canvases
from multi_mnist import DataError


def test_a_users_own_arrays(tmp_path):
    path = tmp_path / "own.npz"
    x = np.random.default_rng(0).random((4, 50, 50))

    def error(**arrays):
        np.savez(path, **arrays)
        with pytest.raises(DataError) as caught:
            load_canvases(path)
        assert "\n" not in str(caught.value) and "own.npz" in str(caught.value)
        return str(caught.value)

    assert "no array 'x'" in error(y=x)
    assert "shape [4, 50]" in error(x=x[0, :4])
    assert "shape [0, 50, 50]" in error(x=x[:0])
    assert "shape [4, 0, 0]" in error(x=x[:, :0, :0])
    assert "int64" in error(x=(255 * x).astype(int))
    assert "outside [0, 1]" in error(x=255 * x)
    assert "NaN" in error(x=np.where(x > 0.99, np.nan, x))
    assert "plain arrays" in error(x=np.array([{}, {}]))
    assert "whole numbers" in error(x=x, counts=np.arange(3))
    assert "whole numbers" in error(x=x, counts=np.array([0.5, 1, 2, 0]))
    assert "whole numbers" in error(x=x, counts=np.array([0, 1, 2, 2**63 + 5], np.uint64))
    assert "whole numbers" in error(x=x, counts=np.array([0, 1, 2, 10**12]))
    path.write_text("hello")
    with pytest.raises(DataError, match="not a readable"):
        load_arrays(path)
    with pytest.raises(DataError, match="no such file"):
        load_arrays(tmp_path / "none.npz")
    np.savez(path, x=(255 * x).astype(np.uint8), counts=np.array([0, 1, 2, 5]))
    assert load_canvases(path).x.dtype == np.uint8 and load_arrays(path).counts.tolist() == [0, 1, 2, 5]
    np.savez(path, x=x)
    assert load_canvases(path).x.dtype == np.float32 and load_arrays(path).counts is None
    # Not squares: black above and below.
    np.savez(path, x=x[:, :37])
    scenes = load_canvases(path)
    assert np.array_equal(scenes.x[:, 6:43], load_arrays(path).x) and scenes.x.shape == (4, 50, 50)
    assert not scenes.x[:, :6].any() and not scenes.x[:, 43:].any()
    np.savez(path, x=np.zeros((1, 10**6, 1), np.uint8))
    with pytest.raises(DataError, match="too many to make square"):
        load_canvases(path)


@pytest.mark.parametrize("height, width", [(90, 300), (300, 90), (25, 25), (50, 50), (10, 1000)])
def test_where_a_rectangle_comes_to_lie(height, width):
    """What is white on the canvas, taken back, is what was white in the image, to a pixel of the coarser one."""
    image = np.zeros((height, width), np.float32)
    y, x, h, w = height // 5, width // 4, height // 2, width // 3
    image[y : y + h, x : x + w] = 1
    canvas, (left, top, across, down) = letterbox(image, 50)
    assert canvas.shape == (50, 50) and canvas.dtype == np.float32 and 0 <= canvas.min() and canvas.max() <= 1
    rows, columns = np.nonzero(canvas > 0.5)
    box = [columns.min() - left, rows.min() - top, np.ptp(columns) + 1, np.ptp(rows) + 1]
    off = np.abs(np.array(box) / [across, down, across, down] - [x, y, w, h])
    assert (off <= 1.01 * max(1, 1 / across, 1 / down)).all()
