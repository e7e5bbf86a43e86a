from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images import (
    BOTH,
    CONTRARY,
    LOW,
    UNEVEN,
    files_in,
    largest_objects,
    left_out,
    load_canvases,
    object_size,
    read_file,
    to_canvases,
)
from multi_mnist import DataError

BACKGROUNDS = np.mgrid[0:1:50j, 0:1:50j]


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
    assert "expected numbers" in error(x=x.astype(complex))
    assert "below 0 or above 65,535" in error(x=x - 0.5)
    assert "below 0 or above 65,535" in error(x=70_000 * x)
    assert "NaN" in error(x=np.where(x > 0.99, np.nan, x))
    assert "plain arrays" in error(x=np.array([{}, {}]))
    assert "whole numbers" in error(x=x, counts=np.arange(3))
    assert "whole numbers" in error(x=x, counts=np.array([0.5, 1, 2, 0]))
    assert "whole numbers" in error(x=x, counts=np.array([0, 1, 2, 2**63 + 5], np.uint64))
    assert "whole numbers" in error(x=x, counts=np.array([0, 1, 2, 10**12]))
    path.write_text("hello")
    with pytest.raises(DataError, match="not a readable"):
        load_canvases(path)
    with pytest.raises(DataError, match="no such file"):
        load_canvases(tmp_path / "none.npz")
    np.savez(path, x=x, counts=np.array([0, 1, 2, 5]))
    assert load_canvases(path)[0].counts.tolist() == [0, 1, 2, 5]


def alike(a, b):
    """To two greys of 255: on the way, greys are kept as floats of 16 bits."""
    return np.abs(a.astype(int) - b).max() <= 2


# Ways to store the same images.
WAYS = {
    "as they are": lambda x: x,
    "dark on light": lambda x: 255 - x,
    "mask": lambda x: x > 128,
    "mask of 0 and 1": lambda x: (x > 128).astype(np.uint8),
    "10 bits": lambda x: x.astype(np.uint16) * 4,
    "12 bits, dark on light": lambda x: 4095 - x.astype(np.int32) * 16,
    "16 bits": lambda x: x.astype(np.uint16) * 257,
    "floats to 1": lambda x: x / 255,
    "floats to 255": lambda x: x.astype(np.float32),
    "dim": lambda x: (x * 0.2).astype(np.uint8),
    "on dark grey": lambda x: 20 + x * (235 / 255),
    "on light grey, dark": lambda x: 200 - x * (180 / 255),
    "a page with a shadow": lambda x: (255 - x) * (0.6 + 0.4 * BACKGROUNDS[0]),
    "uneven light": lambda x: 0.6 * x + 90 * BACKGROUNDS[0] * BACKGROUNDS[1],
    "noisy": lambda x: 60 + 0.6 * x + np.random.default_rng(0).normal(0, 6, x.shape),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_images_are_stored_the_model_sees_the_same(way, scenes):
    x = scenes.x[:60]
    ink = (x > 0).any((1, 2))
    seen = to_canvases([WAYS[way](x)], 50)
    off = np.abs(seen.x.astype(float) - x) / 255
    assert seen.x.dtype == np.uint8 and not [seen.doubts[i] for i in np.flatnonzero(ink) if seen.doubts[i]]
    assert off[ink].mean() < {"noisy": 0.04, "mask": 0.04, "mask of 0 and 1": 0.04}.get(way, 0.015)
    assert (seen.x.max((1, 2)) == np.where(ink, 255, 0)).all()
    remarks = " ".join(seen.remarks)
    assert ("inverted" in remarks) == ("dark" in way and "on dark" not in way or "page" in way)
    assert ("smooth surface" in remarks) == (way in ("a page with a shadow", "uneven light"))
    assert ("low contrast" in remarks) == (way == "dim")
    # And each image alone.
    for i in np.flatnonzero(ink)[:5]:
        alone = to_canvases([WAYS[way](x)[i : i + 1]], 50)
        assert alike(alone.x[0], seen.x[i])


def test_what_is_empty_and_what_is_too_faint():
    rng = np.random.default_rng(0)
    uniform = np.full((3, 50, 50), [[[0]], [[77]], [[255]]], np.uint8)
    seen = to_canvases([uniform], 50)
    assert not seen.x.any() and seen.doubts == [None] * 3 and not seen.remarks
    noise = rng.normal(128, [[[1.0]], [[3]], [[20]]], (3, 50, 50)).clip(0, 255).astype(np.uint8)
    seen = to_canvases([noise], 50)
    assert not seen.x.any() and seen.doubts == [LOW] * 3 and seen.remarks == [f"3 of 3 images: {LOW}: taken for empty"]
    assert to_canvases([rng.random((2, 50, 50))], 50).doubts == [LOW] * 2


def test_values_just_outside_a_range(scenes, tmp_path):
    """Floats that went beyond 1 by interpolation; and what may be a mask of 0 and 2 is not called empty."""
    x = scenes.x[scenes.counts > 0][:5]
    assert alike(to_canvases([(x / 250).astype(np.float32)], 50).x, to_canvases([x], 50).x)
    for stored in (2 * (x > 127).astype(np.uint8), x / 255e3):
        assert to_canvases([stored], 50).doubts == [LOW] * 5
    pages = to_canvases([x[:1], x[1:2].astype(np.uint16) * 257, x[2:3] / 255], 50)  # each has its own range
    assert alike(pages.x, to_canvases([x[:3]], 50).x)
    page = np.full((1, 3000, 3000), 255, np.uint8)
    page[:, 100:110, 100:110] = 0
    assert to_canvases([page], 50).doubts == [LOW]
    stored = x.astype(np.float16)
    stored[0, 0, 0] = np.inf
    np.savez(tmp_path / "inf.npz", x=stored)
    with pytest.raises(DataError, match="above 65,535"):
        read_file(tmp_path / "inf.npz")


def test_what_is_not_made_even_is_doubted(scenes):
    x = scenes.x[scenes.counts > 0][:20]
    shadow = np.where(np.arange(50) < 25, 0.6, 1.0)  # with a sharp edge
    assert to_canvases([(255 - x) * shadow], 50).doubts.count(UNEVEN) > 15
    left = np.arange(50) < 25
    both = to_canvases([np.where(left, 128 + 0.45 * x, 128 - 0.45 * x)], 50)
    mixed = (x[:, :, :25].max((1, 2)) > 0) & (x[:, :, 25:].max((1, 2)) > 0)
    assert mixed.sum() > 3 and all(doubt in (BOTH, CONTRARY) for doubt in np.array(both.doubts)[mixed])
    few_dark = np.concatenate([x, 255 - x[:2]])
    seen = to_canvases([few_dark], 50)
    assert seen.doubts[:20] == [None] * 20 and seen.doubts[20:] == [CONTRARY] * 2 and not seen.x[20:].any()
    assert seen.remarks == [f"2 of 22 images: {CONTRARY}: taken for empty"]


def test_ink_outside_all_windows():
    x = np.zeros((50, 50), np.uint8)
    x[5:15, 5:15], x[30:40, 30:40] = 255, 60
    both = np.array([[3, 3, 14, 14], [28, 28, 14, 14]])
    assert not left_out(x, both) and left_out(x, both[:1]) and left_out(x, both[1:]) and left_out(x, both[:0])
    assert not left_out(0 * x, both[:0])
    x[30:40, 30:40] = 20  # less than a tenth of white
    assert not left_out(x, both[:1])


def test_polarity_is_one_decision_and_can_be_told(scenes):
    x = scenes.x[scenes.counts > 0][:9].copy()
    x[:3] = 255 - x[:3]
    mixed = to_canvases([x], 50)
    assert alike(mixed.x[3:], to_canvases([x[3:]], 50).x)  # the many decide
    told, light = to_canvases([x], 50, invert=True), to_canvases([255 - x[:3]], 50)
    assert light.x.any() and alike(told.x[:3], light.x)
    assert not told.remarks or "inverted" not in told.remarks[0]


@pytest.mark.parametrize("height, width", [(90, 300), (300, 90), (25, 25), (50, 50), (10, 1000)])
def test_where_a_rectangle_comes_to_lie(height, width):
    """What is white on the canvas, taken back, is what was white in the image, to a pixel of the coarser one."""
    image = np.zeros((1, height, width), np.float32)
    y, x, h, w = height // 5, width // 4, height // 2, width // 3
    image[:, y : y + h, x : x + w] = 1
    seen = to_canvases([image], 50)
    left, top, across, down = seen.places[0]
    assert seen.x.shape == (1, 50, 50)
    rows, columns = np.nonzero(seen.x[0] > 127)
    box = [columns.min() - left, rows.min() - top, np.ptp(columns) + 1, np.ptp(rows) + 1]
    off = np.abs(np.array(box) / [across, down, across, down] - [x, y, w, h])
    assert (off <= 1.01 * max(1, 1 / across, 1 / down)).all()


def images_of(path):
    return np.concatenate([np.asarray(block, float) for block in read_file(path)[0]])


def test_every_page_and_frame(scenes, tmp_path):
    first, *others = (Image.fromarray(x) for x in scenes.x[:4])
    for name in ("pages.tif", "frames.gif", "frames.png"):
        first.save(tmp_path / name, save_all=True, append_images=others)
        assert np.abs(images_of(tmp_path / name) - scenes.x[:4]).max() <= 2, name
    # A phone's JPEG holds a second image, which is no other picture.
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=others[:1])
    assert len(images_of(tmp_path / "phone.jpg")) == 1
    assert load_canvases(tmp_path / "pages.tif")[0].x.shape == (4, 50, 50)


def test_colours_and_transparency(scenes, tmp_path):
    x = scenes.x[np.argmax(scenes.counts)]
    image, full = Image.fromarray(x), np.full_like(x, 255)
    ways = {
        "rgb.png": image.convert("RGB"),
        "palette.png": image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
        "cmyk.tif": image.convert("RGB").convert("CMYK"),
        "white_ink_on_glass.png": Image.fromarray(np.stack([full, full, full, x], -1), "RGBA"),
        "black_ink_on_glass.png": Image.fromarray(np.stack([0 * x, 0 * x, 0 * x, x], -1), "RGBA"),
        "floats.tif": Image.fromarray(x / np.float32(255)),
        "16_bits.png": Image.fromarray(x.astype(np.uint16) * 257),
    }
    for name, stored in ways.items():
        stored.save(tmp_path / name)
        blocks, _ = read_file(tmp_path / name)
        seen = to_canvases(blocks, 50)
        assert np.abs(seen.x[0].astype(int) - x).max() <= 12, name
        assert bool(seen.remarks) == (name == "black_ink_on_glass.png")


def test_a_folder_is_read_as_one(scenes, tmp_path):
    """Files of several kinds and sizes; what cannot be read is left out and named."""
    with pytest.raises(DataError, match="no such file or folder"):
        files_in(tmp_path / "none")
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").write_text("is not looked at")
    with pytest.raises(DataError, match="has no files"):
        files_in(tmp_path)
    Image.fromarray(255 - scenes.x[0]).save(tmp_path / "a.png")
    Image.fromarray(255 - scenes.x[1]).resize((100, 80)).save(tmp_path / "b.jpg")
    (tmp_path / "c.txt").write_text("no image")
    np.savez(tmp_path / "d.npz", x=255 - scenes.x[:3], counts=scenes.counts[:3])
    loaded, remarks = load_canvases(tmp_path)
    assert loaded.x.shape == (5, 100, 100) and loaded.counts is None
    assert [("c.txt" in remark, "inverted" in remark) for remark in remarks] == [(True, False), (False, True)]
    smaller, _ = load_canvases(tmp_path, 50)
    assert alike(smaller.x[2:], to_canvases([scenes.x[:3]], 50).x)
    for name in ("a.png", "b.jpg", "d.npz"):
        Path(tmp_path / name).unlink()
    with pytest.raises(DataError, match="c.txt cannot be read"):
        load_canvases(tmp_path)


def test_large_images_are_made_smaller_to_train_on(tmp_path):
    Image.new("L", (700, 300)).save(tmp_path / "a.png")
    assert load_canvases(tmp_path / "a.png")[0].x.shape == (1, 128, 128)
    np.savez(tmp_path / "long.npz", x=np.zeros((2, 10**5, 1), np.uint8))
    assert load_canvases(tmp_path / "long.npz")[0].x.shape == (2, 128, 128)


def test_how_long_objects_are():
    x = np.zeros((4, 40, 40), np.uint8)
    x[0, 3:10, 5:8] = 200  # 7 pixels
    x[1, 3:10, 5:8] = x[1, 20:23, 9:20] = 255  # and 11
    x[2, 0:5, 0:5] = x[2, 5:9, 5:9] = 255  # two that touch at a corner: 9
    assert largest_objects(x).tolist() == largest_objects(x / 255).tolist() == [7, 11, 9, 0]
    assert object_size(x) == 9 and object_size(x[3:]) is None
