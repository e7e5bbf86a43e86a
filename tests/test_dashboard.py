"""Against a real visdom server: what main.py shows there, and what happens when it goes away."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from dashboard_page import complete_page, free_port, screenshot, server
from PIL import Image

import viz

NAMES = {"attention", "reconstruction", "steps", "mistakes", "prior", "curves", "confusion"}
SHORT = ["-b", "4", "--eval-every", "2", "--viz-every", "2"]


def windows(port: int) -> dict[str, np.ndarray]:
    """The pictures that the server has, by window id, asked over its own API."""
    asked = viz.Dashboard("http://127.0.0.1", port, "air").get_window_data(env="air")
    pictures = {}
    for name, window in json.loads(asked).items():
        assert window["type"] == "image" and window["title"]
        kind, data = window["content"]["src"].split(",")
        assert kind == "data:image/png;base64"
        pictures[name] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    return pictures


def test_a_run_fills_the_dashboard_and_updates_it_in_place(run_main, tmp_path):
    port = free_port()
    with server(tmp_path, port):
        # Without --visdom: a server that is there is used.
        where = ["--visdom-port", port]
        finished = run_main(*SHORT, "-n", 2, "--out", tmp_path / "run", *where)
        assert finished.returncode == 0, finished.stderr
        first = windows(port)
        finished = run_main("--load", tmp_path / "run", "-n", 4, "--viz-every", 2, *where)
        assert finished.returncode == 0, finished.stderr
        second = windows(port)
        assert set(first) == set(second) == NAMES
        for name, picture in second.items():
            file = np.asarray(Image.open(tmp_path / "run" / f"{name}.png"))
            assert np.array_equal(picture, file) and min(file.shape[:2]) > 200
        assert not np.array_equal(first["curves"], second["curves"])
        # And again, from the run's folder alone.
        for file in (tmp_path / "run").glob("*.png"):
            file.unlink()
        finished = run_main("--load", tmp_path / "run", "--redraw", "--visdom", "off")
        assert finished.returncode == 0, finished.stderr
        for name, picture in second.items():
            assert np.array_equal(picture, np.asarray(Image.open(tmp_path / "run" / f"{name}.png"))), name


def test_training_survives_its_dashboard(data_dir, tmp_path):
    port = free_port()
    flags = [*SHORT, "-n", "12", "--out", str(tmp_path / "run"), "--data-dir", str(data_dir)]
    command = [sys.executable, ROOT / "main.py", *flags, "--visdom", "on", "--visdom-port", str(port)]
    with server(tmp_path, port):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (tmp_path / "run" / "curves.png").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.02)
        assert run.poll() is None
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert errors.count("does not answer") == 1 and "Traceback" not in errors
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 12]


def test_a_dashboard_that_comes_back_has_all_pictures(tmp_path, capsys):
    port = free_port()
    pictures = {name: (f"Of {name}", np.full((40, 60, 3), 90, np.uint8)) for name in ("one", "two")}
    for folder in ("before", "after", "pictures"):
        (tmp_path / folder).mkdir()
    with server(tmp_path / "before", port):
        screen = viz.Screen(tmp_path / "pictures", viz.Dashboard("http://127.0.0.1", port, "air"))
        screen.show({"one": pictures["one"]})
        assert set(windows(port)) == {"one"}
    pictures["one"][1][:] = 200
    screen.show(pictures)
    screen.show(pictures)
    assert capsys.readouterr().err.count("does not answer") == 1
    assert np.asarray(Image.open(tmp_path / "pictures" / "one.png")).mean() == 200
    with server(tmp_path / "after", port):
        screen.show(pictures)
        shown = windows(port)
        assert set(shown) == {"one", "two"} and shown["one"].mean() == 200
    screen.show(pictures)
    assert capsys.readouterr().err.count("does not answer") == 1  # it had been back


def test_no_server(run_main, tmp_path):
    nowhere = ["--visdom-port", free_port()]
    finished = run_main(*SHORT, "-n", 2, "--out", tmp_path / "on", "--visdom", "on", *nowhere)
    assert finished.returncode == 2 and "no visdom server answers" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "on").exists()
    finished = run_main(*SHORT, "-n", 2, "--out", tmp_path / "auto", *nowhere)
    assert finished.returncode == 0 and finished.stderr.count("no visdom server answers") == 1
    assert {file.stem for file in (tmp_path / "auto").glob("*.png")} == NAMES


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is missing: it fetches the JavaScript of visdom's page")
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is missing")
def test_a_browser_shows_it(tmp_path):
    try:
        complete_page(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm could not fetch the files of visdom's page: {error.stderr.decode()[-200:]}")
    port = free_port()
    orange = np.zeros((200, 300, 3), np.uint8) + np.array([250, 130, 10], np.uint8)
    with server(tmp_path, port):
        viz.Dashboard("http://127.0.0.1", port, "air").show("orange", "Nothing but orange", orange)
        screenshot(f"http://127.0.0.1:{port}/env/air", tmp_path / "page.png", 800, 600)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (np.abs(page - orange[0, 0]).max(-1) < 3).sum() > 5000
