"""Pictures, and a run's against a real visdom server: what is shown there, and what happens when it goes away."""

import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
from unittest.mock import Mock
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import LIMIT, metrics, wait_for
from dashboard_page import complete_page, reserved_port, server
from PIL import Image

import viz
from evaluation import evaluate
from training import pictures
from training.checkpoint import load_air
from training.data import load_own_scenes

NAMES = {"attention", "reconstruction", "steps", "mistakes", "curves", "confusion"}
SHORT = ("-b", 4, "--eval-every", 2, "--viz-every", 2)


@pytest.fixture
def port(monkeypatch):
    """A port for a server that may take its time: on a slow machine it is not gone."""
    monkeypatch.setattr(viz, "TIMEOUT", (LIMIT, LIMIT))
    with reserved_port() as port:
        yield port


def windows(url: str) -> dict[str, np.ndarray]:
    """The pictures that the server has, by window id, asked over its own API."""
    asked = json.loads(viz.Dashboard(url, "air").client.get_window_data(env="air"))
    assert all(window["type"] == "image" and window["title"] == name for name, window in asked.items())
    return {name: np.asarray(Image.open(urlopen(window["content"]["src"]))) for name, window in asked.items()}


def test_a_run_fills_the_dashboard_and_updates_it_in_place(run_main, tmp_path, port):
    """At a base path, with a password that is kept nowhere."""
    run, url, seen = tmp_path / "run", f"http://me:se%2Fcr@et@127.0.0.1:{port}/base/", []
    with server(tmp_path, port, base="/base", user="me", password="se/cr@et"):
        for flags in ((*SHORT, "-n", 2, "--out", run), ("--load", run, "-n", 3)):
            finished = run_main(*flags, "--visdom", url)
            assert "cr@et" not in finished.stderr
            seen.append(windows(url))
    assert set(seen[0]) == set(seen[1]) == NAMES and not np.array_equal(seen[0]["curves"], seen[1]["curves"])
    for name, picture in seen[1].items():
        assert np.array_equal(picture, Image.open(run / f"{name}.png")) and min(picture.shape[:2]) > 200
    for name in ("config.json", "checkpoint.pt"):
        assert b"//127.0.0.1" in (content := (run / name).read_bytes()) and b"cr@et" not in content


def test_training_survives_its_dashboard(run_main, monkeypatch, tmp_path, port):
    """Which goes away after the first pictures, is back for the fourth, with other logins, and goes away again."""
    run, url, login = tmp_path / "run", f"http://me:secret@127.0.0.1:{port}", {"user": "me", "password": "secret"}
    show, drawn, seen, servers = pictures.Pictures.show, itertools.count(1), [], contextlib.ExitStack()

    def watched_show(*args, number=itertools.count(1)):
        if (i := next(number)) == 4:
            servers.enter_context(server(tmp_path / "again", port, **login))
        show(*args)
        if i in (1, 4):
            seen.append({name: picture.mean() for name, picture in windows(url).items()})
        servers.close()

    monkeypatch.setattr(pictures, "draw", lambda *_: {"drawn": np.full((40, 60, 3), next(drawn), np.uint8)})
    monkeypatch.setattr(pictures.Pictures, "show", watched_show)
    with servers:
        servers.enter_context(server(tmp_path / "at first", port, **login))
        finished = run_main(*SHORT, "-n", 6, "--out", run, "--visdom", url)
    assert "Traceback" not in finished.stderr
    assert finished.stderr.count("no visdom server answers") == 3  # for the second and third, and for the last
    assert seen == [{"drawn": 1}, {"drawn": 4}] and np.mean(Image.open(run / "drawn.png")) == 5
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 6]


def test_refusals(run_main, monkeypatch, tmp_path, port):
    """One line says what is wrong, without the password."""
    here = f"127.0.0.1:{port}"

    def problem(url: str) -> str:
        said = run_main("--visdom", url, "--out", tmp_path / "run", error="--visdom: ").stderr
        assert "cret" not in said and said.count("\n") == 1
        return said

    with server(tmp_path, port, base="/base", user="me", password="se/cret"):
        for login in ("", "me:cret@", "you:se%2Fcret@"):  # visdom 0.2.4 answers 400, 0.3.0 401
            assert re.search(f"{here}/base answers with status 40[01]: check", problem(f"http://{login}{here}/base"))
        for path in ("", "/wrong", "/basement"):
            assert f"{here}{path} answers with status" in problem(f"http://me:se%2Fcret@{here}{path}")
    with server(tmp_path, port):
        assert "answers with status" in problem(f"http://me:secret@{here}")
    for password in "cret/x", "12/cret", "cret?x", "1#cret", "[cret\n]", "secret":
        problem(f"http://me:{password}@{here}"), problem(f"me:{password}@{here}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(viz, "TIMEOUT", (LIMIT, 0.1))
        assert "no visdom server answers" in problem(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_server_that_was_not_asked_for_is_not_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(viz, "Dashboard", Mock(side_effect=ConnectionError("visdom wants a login")))
    assert [pictures.Pictures(tmp_path, visdom, "air").dashboard for visdom in ("off", "auto")] == [None, None]
    viz.Dashboard.assert_called_once_with("http://localhost:8097", "air")
    assert capsys.readouterr().err == f"visdom wants a login; pictures go to {tmp_path} only\n"


def test_mistakes_are_those_that_were_measured(run, data_file, monkeypatch):
    """A run's pictures show the very inference of which metrics.jsonl has the accuracy."""
    air, line, shown, draw_scenes = load_air(run[0]), metrics(run[0])[-1], [], viz.draw_scenes
    scenes = load_own_scenes(data_file, air.image_size, None, 3, None, None)[1]
    evaluation = evaluate(air, scenes, measure_search=True)
    monkeypatch.setattr(viz, "draw_scenes", lambda *a, **k: shown.append(a) or draw_scenes(*a, **k))
    drawn = pictures.draw(air, "test", scenes, evaluation, metrics(run[0]))
    assert all(np.array_equal(drawn[name], Image.open(run[0] / f"{name}.png")) for name in NAMES)
    wrong = np.flatnonzero(evaluation.counts != scenes.counts)
    assert line["split"] == "test" and line["count_accuracy"] == 1 - len(wrong) / line["images"]
    images, boxes, captions = shown[-1]
    assert np.array_equal(images, scenes.x[wrong[:30]]) and [*map(len, boxes)] == [*evaluation.counts[wrong[:30]]]
    assert captions == [f"{scenes.counts[i]} → {evaluation.counts[i]}" for i in wrong[:30]]


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


@pytest.mark.skipif(not (shutil.which("npm") and shutil.which("chromium")), reason="npm or Chromium is missing")
def test_a_browser_shows_it(tmp_path, port):
    try:
        complete_page(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm could not fetch the files of visdom's page: {error.stderr.decode()[-200:]}")
    url, orange = f"http://127.0.0.1:{port}", np.full((200, 300, 3), [250, 130, 10], np.uint8)

    def is_shown():
        flags = (
            "--headless --no-sandbox --disable-gpu --virtual-time-budget=30000 --run-all-compositor-stages-before-draw"
        )
        where = f"--screenshot={tmp_path}/page.png", "--window-size=800,600", f"--user-data-dir={tmp_path}/profile"
        subprocess.run(["chromium", *flags.split(), *where, f"{url}/env/air"], check=True, capture_output=True)
        page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"), int)
        return (np.abs(page - orange[0, 0]).max(-1) < 3).sum() > 5000

    with server(tmp_path, port):
        viz.Dashboard(url, "air").show({"orange": orange})
        wait_for(is_shown)
