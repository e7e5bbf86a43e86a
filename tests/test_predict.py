"""predict.py: what it prints of images, and that an image's result is the same whatever is beside it."""

import csv
import json
import os
import shutil
import signal
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import LIMIT, SHORT, before_steps, call, files, metrics
from PIL import Image
from test_air import small_air

import evaluation
import predict
from evaluation import ReferenceStats, bounds, find_at_scale, reference_stats
from images import files_in, piece_lengths, rescale, to_canvas
from patches import find
from training.checkpoint import load_air, read_checkpoint, save_checkpoint
from training.data import load_own_scenes


@pytest.fixture
def air():
    """Not trained, but some of what it paints explains what is there."""
    return small_air(0.0).float()


@pytest.fixture
def busy(monkeypatch):
    """Every further object pays: as many are found as may be."""
    monkeypatch.setattr("inference.PRICE", -1e4)
    monkeypatch.setattr("patches.PRICE", -1e4)


def check(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert result["count"] == other["count"]
        assert result["log_weight"] == pytest.approx(other["log_weight"], rel=1e-3)
        assert result["explained"] == pytest.approx(other["explained"], abs=0.02)
        np.testing.assert_allclose(np.reshape(result["boxes"], (-1, 4)), np.reshape(other["boxes"], (-1, 4)), atol=0.05)


def by_name(results) -> dict:
    return {(result["file"], result.get("index")): result for result in results}


def test_an_image_in_any_company(air, scenes, tmp_path, monkeypatch):
    """The same result alone, in a folder, an archive or a stack, in another order: light, dark, faint or empty."""
    monkeypatch.setattr(predict, "TOGETHER", (5, 1e9))
    x = scenes.x[:8].copy()
    x[1::4] = 255 - x[1::4]
    x[2::4] = 40 + x[2::4] // 3
    x[7] = 0
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    folder = by_name(predict.predict(air, files_in(tmp_path)))
    expected = [folder[f"{i:02}.png", None] for i in range(8)]
    assert len({result["count"] for result in expected}) > 2
    for i in (0, 1, 7):
        check(predict.predict(air, [tmp_path / f"{i:02}.png"]), [expected[i]])
    np.savez(tmp_path / "reversed.npz", x=x[::-1])
    first, *others = (Image.fromarray(image) for image in x)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    for name, step in (("reversed.npz", -1), ("pages.tif", 1)):
        together = by_name(predict.predict(air, [tmp_path / name]))
        check([together[name, i] for i in range(8)], expected[::step])


@pytest.mark.usefixtures("busy")
def test_boxes_are_in_the_images_own_pixels(air, scenes, tmp_path):
    """Of an image of 200 x 160 pixels, whose objects are said to be four times as long as they are looked for."""
    x = scenes.x[0, 5:45].repeat(4, 0).repeat(4, 1)
    Image.fromarray(x).save(tmp_path / "a.png")
    (seen,) = find(air, [rescale(to_canvas(x), 0.25).x])
    expected = {"count": 8, "log_weight": seen.log_weight, "explained": seen.explained, "boxes": 4 * seen.boxes.numpy()}
    assert np.ptp(expected["boxes"], axis=0)[:2].min() > 10
    (result,) = predict.predict(air, [tmp_path / "a.png"], object_size=4 * 0.8 * air.usual_window)
    check([result], [expected])
    assert result["scale"] == 0.25


def test_the_scale_that_images_are_looked_at(air, scenes, tmp_path, monkeypatch):
    """Each its own, so that its objects are as long as in training, or the same for all of a file."""
    monkeypatch.setattr(evaluation, "find", partial(find, moves=0))
    x = scenes.x[scenes.counts == 1][:4]
    for factor in (0.5, 1, 2.5):
        canvases = [to_canvas(rescale(to_canvas(image), factor).x) for image in x]
        lengths = np.array([np.median(piece_lengths(canvas.x)) for canvas in canvases])
        np.savez(tmp_path / "a.npz", x=np.stack([canvas.x for canvas in canvases]))
        for size, ratios in (
            (None, 0.8 * air.usual_window / lengths),
            ("file", [0.8 * air.usual_window / np.median(lengths)] * 4),
        ):
            seen = [result["scale"] for result in predict.predict(air, [tmp_path / "a.npz"], object_size=size)]
            expected = [1.0 if 0.75 < ratio < 1.07 else ratio for ratio in ratios]
            # Pieces that are longer than usual may be several objects that touch, and the image may stay as it is.
            for scale, ratio in zip(seen, expected):
                assert scale == pytest.approx(ratio, rel=0.03) or (size is None and ratio < 1 and scale == 1)
    for result in predict.predict(air, [tmp_path / "a.npz"], object_size=1e-300):  # so small that memory would not do
        assert result["scale"] == 5 and "how large its objects are is in doubt" in result["warning"]


@pytest.mark.usefixtures("busy")
def test_what_is_unlike_its_training_is_reported(air, scenes, tmp_path):
    """By each of the signs; and a contrast that is too low gives no count."""
    image = tmp_path / "a.png"
    Image.fromarray(scenes.x[0]).save(image)
    (plain,) = predict.predict(air, [image], object_size=13.0)
    assert plain.pop("warning") == "there may be more objects, too close to one another"
    fits = ReferenceStats(plain["log_weight"] + 8 * 5.0 - 0.1, -5.0, plain["explained"] - 0.01, None)
    for change, words in (
        ({}, "there may be more"),
        ({"log_weight": fits.log_weight + 0.2}, "its log-weight is"),
        ({"per_object": -4.9}, "its log-weight is"),
        ({"explained": plain["explained"] + 0.02}, "of its ink is explained"),
    ):
        (result,) = predict.predict(air, [image], fits._replace(**change), object_size=13.0)
        assert words in (warning := result.pop("warning")) and (warning.count(";") == bool(change)) and result == plain
    Image.fromarray(np.random.default_rng(0).normal(128, 2, (50, 50)).astype(np.uint8)).save(image)
    (faint,) = predict.predict(air, [image], fits)
    assert faint["count"] is None and faint["boxes"] == [] and "told from noise" in faint["warning"]


def test_a_count_in_doubt_is_reported(air, scenes, tmp_path):
    """With its probability, and those of the others, at the run's temperature."""
    Image.fromarray(scenes.x[1]).save(tmp_path / "a.png")
    for temperature in (0.1, 20.0, 500.0):
        fits = ReferenceStats(-1e9, 0.0, -1.0, temperature)
        (result,) = predict.predict(air, [tmp_path / "a.png"], fits)
        ((seen, *_),) = find_at_scale(air, [to_canvas(scenes.x[1])], [None])
        probs = seen.count_probs(temperature)
        assert result["probability"] == pytest.approx(probs[result["count"]], abs=1e-3)
        doubt = f"objects: {probs.max():.0%}, {np.sort(probs)[-2]:.0%}"
        assert (doubt in result.get("warning", "")) == (probs.max() < 0.9)
    assert probs.max() < 0.9


def test_the_reference_is_measured_in_the_same_way(run, run_main, data_file, no_pictures, monkeypatch, tmp_path):
    """By the same search; and a run that is not finished has none."""
    folder, (train, held_out, *_) = (
        shutil.copytree(run[0], tmp_path / "run"),
        load_own_scenes(data_file, None, None, 3, None, None),
    )
    saved = ReferenceStats(**read_checkpoint(folder)[0]["reference"])
    assert saved == reference_stats(load_air(folder), train.x, held_out.x)
    np.savez(tmp_path / "held_out.npz", x=np.load(data_file)["x"][-16:])
    found = call(predict.main, folder, tmp_path / "held_out.npz", "--object-size", 13)
    seen = zip(*((each["count"], each["log_weight"], each["explained"]) for each in json.loads(found.stdout)))
    np.testing.assert_allclose(bounds(*map(np.array, seen)), saved[:3], 1e-3, 0.02)
    assert "not finished" not in found.stderr

    before_steps(monkeypatch, lambda i, x: os.kill(os.getpid(), signal.SIGTERM))
    run_main("--load", folder, "-n", 9, "--visdom", "off", status=[143])
    assert read_checkpoint(folder)[0]["reference"] is None
    found = call(predict.main, folder, tmp_path / "held_out.npz")
    assert f"{folder / 'checkpoint.pt'} is of a run that is not finished" in found.stderr.splitlines()[0]
    assert "usually" not in found.stdout


def test_the_command(run, scenes, tmp_path):
    images, pictures = tmp_path / "images", tmp_path / "pictures"
    images.mkdir()
    Image.fromarray(scenes.x[0]).save(images / "a.png")
    np.savez(images / "b.npz", x=scenes.x[:2])
    good = call(predict.main, run[0], images)
    results = json.loads(good.stdout)
    assert [*by_name(results)] == [("a.png", None), ("b.npz", 0), ("b.npz", 1)]
    keys = {"file", "count", "probability", "explained", "log_weight", "scale", "boxes", "probabilities"}
    for result in results:
        assert result.keys() - {"index", "warning"} == keys
        assert len(result["boxes"]) == len(result["probabilities"]) == result["count"]
        assert all(len(box) == 4 for box in result["boxes"])

    shutil.copy(images / "a.png", images / f"{'a' * 248}.png")  # the name of its picture would be too long
    shutil.copy(images / "a.png", images / "\udcff.png")  # no UTF-8
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:200])
    np.savez(images / "wrong.npz", y=scenes.x[:2])
    finished = call(predict.main, run[0], images, "--out", pictures, "--csv", tmp_path / "objects.csv", status=[1])
    found = json.loads(finished.stdout)
    assert found[-1]["file"] == "\udcff.png"
    assert [result for result in found[:-1] if "error" not in result] == results
    wrong = [line.split(": ")[0] for line in finished.stderr.splitlines() if ": error: " in line]
    assert [each["file"] for each in found if "error" in each] == wrong == [f"{'a' * 248}.png", "cut.png", "wrong.npz"]
    assert [each["count"] for each in found if "picture" in each.get("error", "")] == [results[0]["count"]]
    rows = [*csv.reader((tmp_path / "objects.csv").read_text(errors="surrogateescape").splitlines())]
    boxes = [
        [each["file"], str(each.get("index", "")), *map(str, box)] for each in found for box in each.get("boxes", ())
    ]
    assert rows[0] == predict.COLUMNS and [row[:-1] for row in rows[1:]] == boxes
    earlier = files(pictures)
    assert earlier.keys() == {"a.png.png", "b.npz-0.png", "b.npz-1.png", "\udcff.png.png"}
    for flags, error in (
        ((run[0], images, "--out", pictures), "not empty"),
        ((run[0], images, "--csv", tmp_path / "objects.csv"), "already exists"),
        ((run[0], tmp_path / "none.png"), "no such file or folder"),
        ((tmp_path / "nowhere", images), "no such checkpoint"),
    ):
        assert call(predict.main, *flags, error=error).stderr.count("\n") == 1
    assert files(pictures) == earlier


def test_what_was_found_before_an_interruption_is_kept(air, scenes, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "checkpoint.pt", air)
    np.savez(tmp_path / "a.npz", x=scenes.x[:5])
    seen = find_at_scale(air, [to_canvas(image) for image in scenes.x[:2]], [None] * 2)
    monkeypatch.setattr(predict, "find_at_scale", Mock(side_effect=[seen, KeyboardInterrupt]))
    monkeypatch.setattr(predict, "TOGETHER", (2, 1e9))
    finished = call(predict.main, tmp_path / "checkpoint.pt", tmp_path / "a.npz", status=[130])
    assert [result["index"] for result in json.loads(finished.stdout)] == [0, 1]


def test_with_stderr_closed(start, tmp_path):
    """Nothing of what would go there gets into what is on stdout, and training goes on to the end."""
    training = start(
        *SHORT, "-n", 2, "--out", tmp_path / "run", code="conftest.hold(0)", stderr=None, preexec_fn=lambda: os.close(2)
    )
    out = training.communicate(timeout=LIMIT)[0]
    assert training.returncode == 0 and out.startswith("16 held-out scenes, 2 steps")
    assert [line["split"] for line in metrics(tmp_path / "run")] == ["validation", "test"]
