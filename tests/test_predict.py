import json

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from air import AIR, to_images
from evaluation import Usual
from images import files_in, largest_objects, to_canvases
from predict import main, predict
from training.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def air():
    """Not trained, but it takes steps, and where depends on what it sees."""
    torch.manual_seed(0)
    air = AIR()
    with torch.no_grad():
        air.attend.present[-1].bias[0] = 1.0
    return air


@pytest.fixture
def one_look(air, monkeypatch):
    """Which of several looks is best is a close call before training."""
    monkeypatch.setattr(type(air.attend), "looks", 1)


@pytest.fixture
def expected(air, scenes):
    seen = air.infer(to_images(scenes.x[:3]), sample=False, looks=air.attend.looks)
    counts = seen.count_probs.argmax(-1).tolist()
    assert sum(counts) > 2, "otherwise there is hardly a box to compare"
    assert np.ptp(seen.boxes[:, 0].numpy(), axis=0).max() > 3, "otherwise it does not matter what it looks at"
    return [
        {"count": n, "count_probability": probs[n], "boxes": boxes[:n]}
        for n, probs, boxes in zip(counts, seen.count_probs.tolist(), seen.boxes.tolist())
    ]


def check(results, expected, scale=1.0, atol=0.05):
    assert [result["count"] for result in results] == [other["count"] for other in expected]
    for result, other in zip(results, expected):
        assert result["count_probability"] == pytest.approx(other["count_probability"], abs=atol)
        boxes = scale * np.array(other["boxes"]).reshape(-1, 4)
        np.testing.assert_allclose(np.array(result["boxes"]).reshape(-1, 4), boxes, atol=atol * scale)


def grey(x):
    return Image.fromarray(x)


def on_grey(x):
    """The ground 55, white still white."""
    return Image.fromarray((55 + x * (200 / 255)).round().astype(np.uint8))


def dark_on_light(x):
    return Image.fromarray(255 - x)


def sixteen_bits(x):
    return Image.fromarray(x.astype(np.uint16) * 257)


def coloured(x):
    return Image.fromarray(np.stack([x] * 3, -1))


def transparent(x):
    return Image.fromarray(np.stack([np.full_like(x, 255)] * 3 + [x], -1), "RGBA")


def drawn_on_glass(x):
    """Black where there is ink, and nothing else."""
    return Image.fromarray(np.stack([np.zeros_like(x)] * 3 + [x], -1), "RGBA")


def indexed(x):
    return coloured(x).convert("P", palette=Image.Palette.ADAPTIVE)


def lying_on_its_side(x):
    image = Image.fromarray(np.rot90(x).copy())
    exif = image.getexif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    image.info["exif"] = exif.tobytes()
    return image


WAYS = [grey, on_grey, dark_on_light, sixteen_bits, coloured, transparent, drawn_on_glass, indexed, lying_on_its_side]


@pytest.mark.parametrize("way", WAYS)
def test_however_an_image_is_stored(way, air, scenes, expected, tmp_path):
    for i, x in enumerate(scenes.x[:3]):
        image = way(x)
        options = {"exif": image.info["exif"]} if "exif" in image.info else {}
        image.save(tmp_path / f"{i}.png", **options)
    results = list(predict(air, files_in(tmp_path)))
    assert [result["file"] for result in results] == ["0.png", "1.png", "2.png"]
    check(results, expected)


def test_boxes_are_in_the_images_own_pixels(air, scenes, one_look, expected, tmp_path):
    """Scenes enlarged four times (and made smaller again a little less sharp: the guide may choose a pixel beside)."""
    large = scenes.x[:3].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / "large.npz", x=large)
    check(list(predict(air, [tmp_path / "large.npz"])), expected, scale=4, atol=1.5)


def test_an_archive_of_images_that_are_no_squares(air, scenes, tmp_path):
    x = scenes.x[0, 5:45]
    np.savez(tmp_path / "a.npz", x=x[None])
    Image.fromarray(x).save(tmp_path / "b.png")
    (archived,), (alone,) = (predict(air, [tmp_path / name]) for name in ("a.npz", "b.png"))
    assert archived["count"] == alone["count"] and np.allclose(archived["boxes"], alone["boxes"])
    # The same scene in the middle of the model's canvas, its boxes moved up by the 5 rows that are added above.
    square = np.zeros_like(scenes.x[0])
    square[5:45] = x
    seen = air.infer(to_images(square[None]), sample=False, looks=5)
    assert alone["count"] == seen.count_probs[0].argmax() > 0
    assert np.allclose(alone["boxes"], seen.boxes[0, : alone["count"]].numpy() - [0, 5, 0, 0], atol=0.05)


def test_more_images_than_are_looked_at_at_once(air, scenes, tmp_path):
    """Whatever else there is, and in the archive's order; also of dark on light."""
    for name, x in (("a.npz", scenes.x[:40]), ("b.npz", 1 - scenes.x[:40] / 255)):
        np.savez(tmp_path / name, x=x)
        results = list(predict(air, [tmp_path / name]))
        assert [result["index"] for result in results] == list(range(40))
        for i in range(0, 40, 3):
            seen = air.infer(to_images(scenes.x[i : i + 1]), sample=False, looks=5)
            count = results[i]["count"]
            assert count == seen.count_probs[0].argmax()
            boxes = np.array(results[i]["boxes"]).reshape(-1, 4)
            assert np.allclose(boxes, seen.boxes[0, :count].numpy(), atol=0.1)


def test_what_is_unlike_its_training_is_said(air, scenes, tmp_path):
    """By each of the three signs; and a contrast that is too low gives no count."""
    Image.fromarray(scenes.x[0]).save(tmp_path / "a.png")
    (plain,) = predict(air, [tmp_path / "a.png"])
    assert plain.pop("warning") == "all 3 steps were used, there may be more objects (-t)"
    canvas = to_canvases([scenes.x[:1]], 50).x
    seen = air.infer(to_images(canvas), sample=False, looks=5)
    assert plain["explained"] == pytest.approx(float(seen.explained)) and plain["elbo"] == pytest.approx(
        float(seen.elbo)
    )
    n, largest = plain["count"], float(largest_objects(canvas)[0])
    fits = Usual(plain["elbo"] - n * -5.0 - 0.1, -5.0, plain["explained"], largest)
    for usual, words in (
        (fits, "all 3 steps"),
        (fits._replace(elbo=fits.elbo + 0.2), "its ELBO is"),
        (fits._replace(elbo_per_object=-4.9), "its ELBO is"),
        (fits._replace(explained=plain["explained"] + 0.01), "of its ink is explained"),
        (fits._replace(largest_object=largest - 1), f"a piece of it is {largest:.0f} pixels long"),
    ):
        (result,) = predict(air, [tmp_path / "a.png"], usual)
        assert words in result.pop("warning") and result == plain
    Image.fromarray(np.random.default_rng(0).normal(128, 2, (50, 50)).astype(np.uint8)).save(tmp_path / "faint.png")
    (faint,) = predict(air, [tmp_path / "faint.png"], fits)
    assert faint["count"] is None and faint["boxes"] == [] and "told from noise" in faint["warning"]


def test_a_picture_that_cannot_be_written_ends_nothing(air, scenes, tmp_path):
    long = f"{'a' * 248}.png"  # With ".png" added, more than a file system takes.
    for name in (long, "b.png"):
        Image.fromarray(scenes.x[0]).save(tmp_path / name)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "c.png.png").write_text("another's")
    Image.fromarray(scenes.x[0]).save(tmp_path / "c.png")
    (third,) = predict(air, [tmp_path / "c.png"], folder=folder)
    assert "its picture cannot be written: File exists" in third["error"]
    first, second = predict(air, [tmp_path / long, tmp_path / "b.png"], folder=folder)
    assert "its picture cannot be written" in first["error"] and first["count"] == second["count"]
    assert sorted(file.name for file in folder.iterdir()) == ["b.png.png", "c.png.png"]


def test_pages_have_numbers(air, scenes, tmp_path):
    pages = [Image.fromarray(x) for x in scenes.x[:3]]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    folder = tmp_path / "pictures"
    folder.mkdir()
    results = list(predict(air, [tmp_path / "pages.tif"], folder=folder))
    seen = air.infer(to_images(scenes.x[:3]), sample=False, looks=5)
    assert [(result["index"], result["count"]) for result in results] == list(enumerate(seen.counts.tolist()))
    assert sorted(file.name for file in folder.iterdir()) == [f"pages.tif-{i}.png" for i in range(3)]


def test_more_objects_than_in_training_are_looked_for(air, scenes, tmp_path):
    """Up to eight without being told; as many as asked for; and a run's own number if that is larger."""
    with torch.no_grad():
        air.attend.present[-1].bias[0] += 1000
    try:
        Image.fromarray(scenes.x[0]).save(tmp_path / "a.png")
        for config, flags, count in (({}, (), 8), ({}, ("-t", 5), 5), ({"num_steps": 12}, (), 12)):
            other = AIR(**config)
            other.load_state_dict(air.state_dict())
            save_checkpoint(tmp_path / "air.pt", other)
            (result,) = json.loads(call(main, tmp_path / "air.pt", tmp_path / "a.png", *flags).stdout)
            assert result["count"] == count and f"all {count} steps were used" in result["warning"]
    finally:
        with torch.no_grad():
            air.attend.present[-1].bias[0] -= 1000


def test_the_command(run_main, scenes, tmp_path):
    folder, images = tmp_path / "run", tmp_path / "images"
    assert run_main("-n", 2, "-b", 8, "--out", folder).returncode == 0
    images.mkdir()
    (images / "folder").mkdir()
    (images / ".hidden").write_text("is not looked at")
    Image.fromarray(scenes.x[0]).save(images / "a.png")
    Image.fromarray(scenes.x[1]).resize((200, 120)).save(images / "a.jpg")
    np.savez(images / "b.npz", x=scenes.x[:2])
    good = call(main, folder, images)
    assert good.returncode == 0, good.stderr
    results = json.loads(good.stdout)
    assert [(result["file"], result.get("index")) for result in results] == [
        ("a.jpg", None),
        ("a.png", None),
        ("b.npz", 0),
        ("b.npz", 1),
    ]
    for result in results:
        assert len(result["boxes"]) == result["count"] and 0 <= result["count_probability"] <= 1

    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.jpg").write_text("no picture")
    np.savez(images / "wrong.npz", y=scenes.x[:2])
    finished = call(main, folder, images, "--out", tmp_path / "pictures")
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if "cannot be read" in line or "no array" in line]
    assert [line.split(":")[0] for line in errors] == ["cut.png", "text.jpg", "wrong.npz"]
    found = json.loads(finished.stdout)
    assert [result for result in found if "error" not in result] == results
    assert [set(result) for result in found if "error" in result] == [{"file", "error"}] * 3
    pictures = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert pictures == ["a.jpg.png", "a.png.png", "b.npz-0.png", "b.npz-1.png"]
    assert Image.open(tmp_path / "pictures" / "a.jpg.png").width > 480

    for refused, error in (
        (call(main, folder, images, "--out", tmp_path / "pictures"), "not empty"),
        (call(main, folder, images, "--out", folder), "not empty"),
        (call(main, folder, tmp_path / "none.png"), "no such file or folder"),
        (call(main, tmp_path / "nowhere", images), "no such checkpoint"),
    ):
        assert refused.returncode == 2 and error in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == pictures


def test_what_was_found_before_an_interruption_is_kept(air, scenes, tmp_path, monkeypatch):
    def interrupted(*_):
        yield {"file": "a.png", "count": 2}
        raise KeyboardInterrupt

    save_checkpoint(tmp_path / "checkpoint.pt", air)
    np.savez(tmp_path / "a.npz", x=scenes.x[:1])
    monkeypatch.setattr("predict.predict", interrupted)
    finished = call(main, tmp_path / "checkpoint.pt", tmp_path / "a.npz")
    assert finished.returncode == 130 and json.loads(finished.stdout) == [{"file": "a.png", "count": 2}]


def test_a_thin_white_frame_ends_nothing(air, tmp_path):
    """The rule's border is wider than the frame, which so is no background: in doubt, but counted."""
    framed = np.full((1, 50, 50), 255, np.uint8)
    framed[:, 1:-1, 1:-1] = 0
    framed[:, 20:30, 20:25] = 200
    np.savez(tmp_path / "framed.npz", x=framed)
    (result,) = predict(air, [tmp_path / "framed.npz"])
    assert result["count"] is not None
    large = np.kron(framed, np.ones((1, 2, 2), np.uint8))[:, 1:-1, 1:-1]
    np.savez(tmp_path / "framed.npz", x=large)
    (result,) = predict(AIR(image_size=98), [tmp_path / "framed.npz"])
    assert "uneven" in result["warning"]
