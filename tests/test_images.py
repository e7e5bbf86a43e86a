import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from scipy import ndimage
from skimage.data import coins

import images
from images import BOTH, LOW, SPECKLED, UNEVEN, has_unexplained_ink, load_images, read_file, to_canvas
from multi_mnist import DataError
from training.data import load_own_scenes

DOWN, ACROSS = np.mgrid[0:1:50j, 0:1:50j]


class Seen:
    """Images of one size as canvases."""

    def __init__(self, x, invert=None):
        self.canvases = [to_canvas(image, invert) for image in x]
        self.x = np.stack([canvas.x for canvas in self.canvases])
        self.doubts = [canvas.doubt for canvas in self.canvases]
        self.remarks = images.remarks_on(self.canvases)


def test_a_users_own_arrays(tmp_path):
    path, x = tmp_path / "own.npz", np.random.default_rng(0).random((4, 50, 50))
    shapes = x[0], x[:0], x[:, :0, :0], x[..., :3], x[..., :4], x[..., None]
    values = *(np.where(x > 0.99, value, x) for value in (-0.5, 70_000, np.inf, np.nan)), x.astype(complex)
    counts = [1, 2], [0.5, 1, 2, 0], [0, 1, -1, 2], [0, 1, 2, 10**12], np.array([0, 1, 2, 2**63 + 5], np.uint64)
    wrong = [("x is not a file", {"y": x}), *(("expected greys [n, h, w]", {"x": part}) for part in shapes)]
    wrong += [("0 to 65,535", {"x": part}) for part in values]
    wrong += [("4 whole numbers", {"x": x, "counts": part}) for part in counts]
    for text, arrays in wrong:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=f"^.*own.npz cannot be read: .*{re.escape(text)}.*$"):
            load_images(path)
    np.savez(path, x=x, counts=np.array([0, 1, 2, 5]))
    assert load_images(path)[1].tolist() == [0, 1, 2, 5]


# Ways to store the same images.
WAYS = {
    "as they are": lambda x: x,
    "dark on light": lambda x: 255 - x,
    "mask": lambda x: x > 128,
    "mask of 0 and 1": lambda x: (x > 128).astype(np.uint8),
    "12 bits, dark on light": lambda x: 4095 - x.astype(np.int32) * 16,
    "16 bits": lambda x: x.astype(np.uint16) * 257,
    "16 bits, few of them used": lambda x: 100 + x.astype(np.uint16) // 2,
    "floats to 1": lambda x: x / 255,
    "floats beyond 1": lambda x: (x / 250).astype(np.float32),
    "dim": lambda x: (x * 0.2).astype(np.uint8),
    "on light grey, dark": lambda x: 200 - x * (180 / 255),
    "a page with a shadow": lambda x: (255 - x) * (0.6 + 0.4 * DOWN),
    "uneven light": lambda x: 0.6 * x + 90 * DOWN * ACROSS,
    "noisy": lambda x: 60 + 0.6 * x + np.random.default_rng(0).normal(0, 6, x.shape),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_images_are_stored_the_model_sees_the_same(way, scenes):
    x = scenes.x[:60]
    ink = (x > 0).any((1, 2))
    seen = Seen(WAYS[way](x))
    off = np.abs(seen.x.astype(float) - x) / 255
    assert seen.x.dtype == np.uint8 and not [seen.doubts[i] for i in np.flatnonzero(ink) if seen.doubts[i]]
    assert off[ink].mean() < {"noisy": 0.04, "mask": 0.04, "mask of 0 and 1": 0.04}.get(way, 0.015)
    assert (seen.x.max((1, 2)) == np.where(ink, 255, 0)).all()
    assert ("inverted" in str(seen.remarks)) == ("dark" in way or "page" in way)
    assert ("smooth surface" in str(seen.remarks)) == (way in ("a page with a shadow", "uneven light"))


def test_an_image_becomes_the_same_in_any_company_and_however_it_is_stored(scenes, tmp_path):
    """To the last bit, with its doubt and floor."""
    rng, x = np.random.default_rng(0), scenes.x
    kinds = [way(image[None])[0].clip(0, 255) for way, image in zip(WAYS.values(), x)]
    hot, salt = x[0] * 0.4, np.where(rng.random((50, 50)) < 0.02, 255, x[1])
    hot[20, 30] = 255
    others = hot, salt, 0 * hot, 0 * hot + 77, rng.integers(0, 256, (50, 50)), np.where(ACROSS < 0.5, x[2], 255 - x[2])
    stack = np.stack([*kinds, *others]).astype(np.uint8)
    np.savez(tmp_path / "all.npz", x=np.concatenate([stack, 65535 + 0 * stack[:1].astype(np.uint16)]))
    for invert in (None, True, False):
        for image, whole in zip(stack, load_images(tmp_path / "all.npz", invert)[0]):
            Image.fromarray(image).save(tmp_path / "one.png")
            ways = image, image / 255, (image / 255).astype(np.float32), read_file(tmp_path / "one.png")[0][0]
            for canvas in (to_canvas(way, invert) for way in ways):
                assert (canvas.x == whole.x).all() and canvas[1:] == whole[1:]


def test_one_pixel_does_not_decide(scenes):
    rng, x = np.random.default_rng(0), (scenes.x[scenes.counts > 0][:60] * 0.4).astype(np.uint8)
    clean, hot = Seen(x), x.copy()
    hot[np.arange(60), *rng.integers(0, 50, (2, 60))] = 255
    for stored in (hot, 65535 - 257 * hot.astype(np.uint16)):
        seen = Seen(stored)
        assert ((np.abs(seen.x.astype(int) - clean.x) > 1).sum((1, 2)) <= 1).all()
        assert seen.remarks[0] == "60 of 60 images: specks of one or two pixels were removed"
    lights = np.zeros((3, 50, 50), np.uint8)  # an image's only ones
    lights[0, 20, 20], lights[1, 20, 20], lights[2, 20, 20:22] = 1, 20, 255
    for seen in Seen(lights), Seen(255 - lights):
        assert not seen.x.any() and seen.doubts == [None] * 3
    line = np.eye(50, dtype=np.uint8)[None] * (np.arange(50) < 20)
    assert (Seen(line).x == 255 * line).all()  # of an object nothing is lost, not even its ends
    assert Seen(np.where(rng.random(x.shape) < 0.02, 255, x)).doubts == [SPECKLED] * 60


def test_what_is_empty_and_what_is_doubted(scenes):
    rng, x, left = np.random.default_rng(0), scenes.x[scenes.counts > 0][:20], ACROSS < 0.5
    plain = Seen(np.full((1, 50, 50), 77, np.uint8))
    assert not plain.x.any() and plain.doubts == [None] and not plain.remarks
    for low in (rng.normal(128, 5, x.shape), rng.random(x.shape), 2 * (x > 127).astype(np.uint8), x / 255e3):
        seen = Seen(low)
        assert not seen.x.any() and seen.doubts == [LOW] * 20 and seen.remarks == [f"20 of 20 images: {LOW}"]
    assert Seen((255 - x) * np.where(left, 0.6, 1.0)).doubts.count(UNEVEN) > 15  # a shadow's sharp edge
    mixed = x[(x * left).any((1, 2)) & (x * ~left).any((1, 2))]
    assert {*Seen(128 + 0.45 * mixed * np.where(left, 1, -1)).doubts} == {BOTH}
    told = Seen(np.concatenate([x, 255 - x[:2]]), invert=False)
    assert told.doubts == [None] * 20 + [BOTH] * 2 and not told.x[20:].any()


def test_ink_outside_all_windows():
    x = np.zeros((1, 50, 50), np.uint8)
    x[0, 5:15, 5:15] = 255
    both = np.array([[3, 3, 14, 14], [28, 28, 14, 14]])
    for grey, is_seen in ((60, True), (13, True), (5, False)):  # down to 3% of the range
        x[0, 30:40, 30:40] = grey
        seen = to_canvas(x[0])
        some = [has_unexplained_ink(seen.x, boxes, seen.floor) for boxes in (both[:1], both[1:], both, both[:0])]
        assert some == [is_seen, True, False, True]


def test_ink_at_the_same_place_in_all_images(scenes, tmp_path, capsys):
    x = scenes.x[:20].copy()
    assert not any(map(images.has_fixed_ink, (x, np.repeat(x[:1], 5, 0), 0 * x, x[:0])))
    tracemalloc.start()
    assert not images.has_fixed_ink(np.full((1, 400, 400), 200, np.uint8))
    assert tracemalloc.get_traced_memory()[1] < 4e6  # not more for the number of its pixels
    tracemalloc.stop()
    x[:, 46:48, 2:12] = 255
    np.savez(tmp_path / "bar.npz", x=x)
    load_own_scenes(tmp_path / "bar.npz", None, None, 3, None, None)
    assert "scale bar" in capsys.readouterr().err


@pytest.mark.parametrize("height, width", [(90, 300), (300, 90), (25, 25), (50, 50), (10, 1000)])
def test_where_a_rectangle_comes_to_lie(height, width):
    """On a canvas, or made smaller or larger: taken back by its place, it is where it was."""
    image = np.zeros((height, width), np.float32)
    x, y, w, h = width // 4, height // 5, width // 3, height // 2
    image[y : y + h, x : x + w] = 1
    canvas = to_canvas(image)
    for made in (images.letterbox(canvas, 50), *(images.rescale(canvas, factor) for factor in (0.5, 0.77, 1, 1.9))):
        (rows, columns), (left, top, across, down) = np.nonzero(made.x > 127), made.place
        box = [columns.min() - left, rows.min() - top, np.ptp(columns) + 1, np.ptp(rows) + 1]
        off = np.abs(np.array(box) / [across, down, across, down] - [x, y, w, h])
        assert (off <= 1.01 * max(1, 1 / across, 1 / down)).all()


def test_every_page_and_frame(scenes, tmp_path):
    first, *others = (Image.fromarray(x) for x in scenes.x[:4])
    for name in ("pages.tif", "frames.gif", "frames.png"):
        first.save(tmp_path / name, save_all=True, append_images=others)
        assert np.abs(np.stack(read_file(tmp_path / name)[0]).astype(int) - scenes.x[:4]).max() <= 2, name
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=others[:1])
    assert len(read_file(tmp_path / "phone.jpg")[0]) == 1  # its second image is no other picture
    # Nor are pages that are marked as reduced copies or masks, unless there is nothing else.
    for kinds, n in (((0, 1, 1), 1), ((0, 4, 0), 2), ((1, 0), 1), ((1, 1), 2), ((2, 2), 2)):
        with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "pyramid.tif"), True) as file:
            for kind in kinds:
                first.save(file, "TIFF", tiffinfo={254: kind})
                file.newFrame()
        pages, _, remarks = read_file(tmp_path / "pyramid.tif")
        assert len(pages) == n and ["skipped" in remark for remark in remarks] == [True] * (n < len(kinds))


def test_colours_and_transparency(scenes, tmp_path):
    x = scenes.x[np.argmax(scenes.counts)]
    image, ink, red, green = Image.fromarray(x), (x > 127)[..., None], [255, 0, 0], [0, 130, 0]  # of the same luma
    mixed = np.where(ink, np.where((ACROSS < ACROSS[x > 127].mean())[..., None], red, 240), green)
    ways = {
        "palette.png": image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
        "cmyk.tif": image.convert("RGB").convert("CMYK"),
        "white_ink_on_glass.png": Image.fromarray(np.stack([0 * x + 255] * 3 + [x], -1), "RGBA"),
        "black_ink_on_glass.png": Image.fromarray(np.stack([0 * x] * 3 + [x], -1), "RGBA"),
        "16_bits.tif": Image.fromarray(x.astype(np.uint16) * 257),
        "red on green.png": Image.fromarray(np.where(ink, red, green).astype(np.uint8)),
        "red, grey on green.png": Image.fromarray(mixed.astype(np.uint8)),
    }
    for name, stored in ways.items():
        stored.save(tmp_path / name)
        stored, _, remarks = read_file(tmp_path / name)
        seen, right = Seen(stored), Seen((x > 127)[None] if " " in name else x[None])
        assert np.abs(seen.x.astype(int) - right.x).max() <= 16, name
        assert bool(seen.remarks) == (name == "black_ink_on_glass.png") and bool(remarks) == (" " in name), name


def test_a_folder_is_read_as_one(scenes, tmp_path):
    """Files of several kinds and sizes; what cannot be read is left out and named, and decides nothing."""
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden").touch()
    with pytest.raises(DataError, match="has no files"):
        images.files_in(tmp_path)
    Image.fromarray(255 - scenes.x[0]).save(tmp_path / "a.png")
    Image.fromarray(255 - scenes.x[1]).resize((100, 80)).save(tmp_path / "b.jpg")
    Image.new("L", (4000, 3000), 1).save(tmp_path / "c.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:200])  # a header with little after it
    np.savez(tmp_path / "d.npz", x=255 - scenes.x[:3], counts=scenes.counts[:3])
    loaded, counts, remarks = load_images(tmp_path)
    assert [canvas.x.shape for canvas in loaded] == [(50, 50), (80, 100)] + [(50, 50)] * 3 and counts is None
    assert [("c.png" in remark, "inverted" in remark) for remark in remarks] == [(True, False), (False, True)]
    assert (loaded[2].x == to_canvas(255 - scenes.x[0]).x).all()
    with pytest.raises(DataError, match="c.png cannot be read"):
        load_images(tmp_path / "c.png")


def test_a_photograph_in_uneven_light():
    """Scikit-image's coins: 24 of them, light on a ground that no quadratic surface fits; and dark on light."""
    photograph = coins()
    for image in (photograph, 255 - photograph):
        seen = to_canvas(image)
        labels, n = ndimage.label(ndimage.binary_closing(seen.x > 76, iterations=2))
        assert (np.bincount(labels.ravel())[1:] > 500).sum() == 24 and seen.doubt in (None, BOTH)


def test_how_long_objects_are():
    x = np.zeros((3, 40, 40), np.uint8)
    x[0, 3:10, 5:8] = x[0, 20:31, 9:12] = 200  # 7 and 11 pixels
    x[1, 1:6, 1:6] = x[1, 6:10, 6:10] = 255  # two that touch at a corner: 9
    x[1, 30:, 30] = x[1, 20, 20] = 255  # what is cut by the border and what may be noise does not count
    assert [sorted(images.piece_lengths(part)) for part in x] == [[7, 11], [9], []]
