"""A run's pictures, against a real visdom server: what is shown there, and what happens when it goes away."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from dashboard_page import complete_page, free_port, screenshot, server
from PIL import Image

import evaluation
import training.pictures
import viz
from air import AIR
from training.pictures import Pictures
from training.run import RunError

NAMES = {"attention", "reconstruction", "steps", "mistakes", "prior", "curves", "confusion"}
SHORT = ["-b", "4", "--eval-every", "2", "--viz-every", "2"]


def windows(url: str) -> dict[str, np.ndarray]:
    """The pictures that the server has, by window id, asked over its own API."""
    asked = viz.Dashboard(url, "air").client.get_window_data(env="air")
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
        url = f"http://127.0.0.1:{port}"
        where = ["--visdom", url]
        finished = run_main(*SHORT, "-n", 2, "--out", tmp_path / "run", *where)
        assert finished.returncode == 0, finished.stderr
        first = windows(url)
        finished = run_main("--load", tmp_path / "run", "-n", 4, "--viz-every", 2, *where)
        assert finished.returncode == 0, finished.stderr
        second = windows(url)
    assert set(first) == set(second) == NAMES
    for name, picture in second.items():
        file = np.asarray(Image.open(tmp_path / "run" / f"{name}.png"))
        assert np.array_equal(picture, file) and min(file.shape[:2]) > 200
    assert not np.array_equal(first["curves"], second["curves"])


def test_a_server_on_this_machine_is_used_without_being_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(viz, "Dashboard", lambda url, env: asked.append((url, env)))
    Pictures(tmp_path, "auto", "air", 0)
    Pictures(tmp_path, "off", "air", 0)
    assert asked == [("http://localhost:8097", "air")]


def test_a_password_is_not_kept(run_main, monkeypatch, tmp_path):
    monkeypatch.setattr(viz, "Dashboard", lambda url, env: None)
    url = "http://me:se/cr@et@127.0.0.1:9"
    assert run_main(*SHORT, "-n", 1, "--visdom", url, "--out", tmp_path / "run").returncode == 0
    for name in ("config.json", "checkpoint.pt"):
        assert b"127.0.0.1:9" in (content := (tmp_path / "run" / name).read_bytes()) and b"cr@et" not in content


def test_drawing_leaves_a_gpus_random_numbers_alone(monkeypatch):
    """All that seeds the GPU is within a fork of its generator."""
    forked, device = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices) or contextlib.nullcontext())
    with evaluation.seeded_rng(device, 3):
        assert forked == [[device]]
    seeded = []
    monkeypatch.setattr(
        training.pictures, "seeded_rng", lambda device, seed=0: seeded.append(device) or contextlib.nullcontext()
    )
    air = AIR(look_size=8, hidden_size=8)
    training.pictures.prior_samples(air, 7)
    assert seeded == [next(air.parameters()).device] * 3


def test_mistakes_are_those_that_were_counted(run_main, monkeypatch, tmp_path):
    """The picture shows the very inference of which metrics.jsonl has the accuracy."""
    drawn = []
    draw = training.pictures.draw

    def watched(air, split, scenes, evaluation, lines, seed):
        drawn.append((lines[-1:], float(np.mean(evaluation.counts == scenes.counts)), len(evaluation.counts)))
        return draw(air, split, scenes, evaluation, lines, seed)

    monkeypatch.setattr(training.pictures, "draw", watched)
    assert run_main(*SHORT, "-n", 2, "--visdom", "off", "--out", tmp_path / "run").returncode == 0
    for lines, accuracy, n in drawn[1:]:
        assert lines[0]["count_accuracy"] == accuracy and lines[0]["images"] == n
    assert len(drawn) == 3


def test_training_survives_its_dashboard(data_dir, tmp_path):
    port = free_port()
    flags = [*SHORT, "-n", "8", "--out", str(tmp_path / "run"), "--data-dir", str(data_dir)]
    command = [sys.executable, ROOT / "main.py", *flags, "--visdom", f"http://127.0.0.1:{port}"]
    with server(tmp_path, port):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not (tmp_path / "run" / "curves.png").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.02)
        assert run.poll() is None
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert errors.count("no visdom server answers") == 1 and "Traceback" not in errors
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 8]


def test_a_dashboard_that_comes_back_has_all_pictures(monkeypatch, tmp_path, capsys):
    """Also if it has a base path, and a login that does not outlast it."""
    port, access = free_port(), {"base": "/base", "user": "me", "password": "se/cret"}
    url = f"http://me:se%2Fcret@127.0.0.1:{port}/base/"
    pictures = {name: (f"Of {name}", np.full((40, 60, 3), 90, np.uint8)) for name in ("one", "two")}
    shown = []
    monkeypatch.setattr(training.pictures, "draw", lambda *args: {name: pictures[name] for name in shown})
    for folder in ("before", "after", "pictures"):
        (tmp_path / folder).mkdir()

    def show(screen, *names):
        shown[:] = names
        screen.show(None, "test", None, None)

    with server(tmp_path / "before", port, **access):
        screen = Pictures(tmp_path / "pictures", url, "air", 0)
        show(screen, "one")
        assert set(windows(url)) == {"one"}
    pictures["one"][1][:] = 200
    show(screen, "one", "two")
    show(screen, "one", "two")
    assert capsys.readouterr().err.count("no visdom server answers") == 1
    assert np.asarray(Image.open(tmp_path / "pictures" / "one.png")).mean() == 200
    with server(tmp_path / "after", port, **access):
        show(screen, "one", "two")
        there = windows(url)
        assert set(there) == {"one", "two"} and there["one"].mean() == 200
    show(screen, "one", "two")
    assert capsys.readouterr().err.count("no visdom server answers") == 1  # it had been back


def test_a_url_with_everything_in_it(tmp_path):
    """User, password and base path reach the server, which lets in nobody else."""
    port, seen = free_port(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, json.loads(body) if self.path == "/base/" else None, self.headers.get("Cookie")))
            self.send_response(200)
            self.send_header("Set-Cookie", "user_password=let-in; path=/")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as visdom:
        threading.Thread(target=visdom.serve_forever, daemon=True).start()
        viz.Dashboard(f"http://me:se%2Fcret@127.0.0.1:{port}/base/", "mine").show(
            "a", "A", np.zeros((9, 9, 3), np.uint8)
        )
        visdom.shutdown()
    password = hashlib.sha256(b"se/cret").hexdigest()
    assert seen == [
        ("/base/", {"username": "me", "password": password}, None),
        ("/base/env/mine", None, "user_password=let-in"),
        ("/base/events", None, "user_password=let-in"),
    ]


def problem(url: str) -> str:
    """What the user is told of a server that cannot be used: one line, without the password."""
    with pytest.raises(RunError) as error:
        training.pictures.connect(url, "air", None)
    message = str(error.value)
    assert "cret" not in message and "\n" not in message
    return message


def test_a_server_with_a_login(tmp_path):
    port = free_port()
    here = f"127.0.0.1:{port}"
    with server(tmp_path, port, user="me", password="se/cret"):
        wanted = problem(f"http://{here}")
        assert wanted.startswith(f"--visdom: visdom at http://{here} (status 40")  # 400, or 401 from visdom 0.3.0
        assert wanted.endswith(f" wants a login, as in http://user:password@{here}")
        for login in ("me:cret", "you:se%2Fcret"):
            expected = f"--visdom: visdom at http://{here} (status 400) refuses the login: check user and password"
            assert problem(f"http://{login}@{here}") == expected
        elsewhere = problem(f"http://me:se%2Fcret@{here}/wrong")
        assert f"no visdom with a login at http://{here}/wrong (status 500): check host, port and path" in elsewhere
        viz.Dashboard(f"http://me:se%2Fcret@{here}", "air").show("one", "One", np.zeros((9, 9, 3), np.uint8))
        assert set(windows(f"http://me:se%2Fcret@{here}")) == {"one"}


def test_a_server_with_a_base_path(tmp_path):
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    with server(tmp_path, port, base="/base"):
        for path, status in (("", 404), ("/wrong", 404), ("/basement", 500)):
            expected = f"--visdom: no visdom at {here}{path} (status {status}): check host, port and path"
            assert problem(here + path) == expected
        assert "or leave out user and password" in problem(f"http://me:se%2Fcret@127.0.0.1:{port}/base")
        viz.Dashboard(f"{here}/base", "air").show("one", "One", np.zeros((9, 9, 3), np.uint8))
        assert set(windows(f"{here}/base")) == {"one"}


def test_other_refusals():
    """By what is not visdom, or a proxy before it. A redirected POST would be a GET, and lose the pictures."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Location", "/200")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{other.server_port}"
        for status in (401, 403):
            assert f"(status {status}) wants a login" in problem(f"http://{here}/{status}")
            assert f"(status {status}) refuses the login" in problem(f"http://me:secret@{here}/{status}")
        for status in (302, 404, 502):
            assert f"no visdom at http://{here}/{status} (status {status})" in problem(f"http://{here}/{status}")
        other.shutdown()


@pytest.mark.parametrize("password", ["cret/x", "12/cret", "cret?x", "1#cret", "[cret\n]", "secret"])
def test_a_password_is_not_shown(password, run_main, tmp_path):
    problem(f"http://me:{password}@127.0.0.1:{free_port()}")
    refused = run_main("--visdom", f"me:{password}@127.0.0.1", "--out", tmp_path / "run")
    assert refused.returncode == 2 and password not in refused.stderr


def test_a_server_that_was_not_asked_for_is_not_needed(monkeypatch, tmp_path, capsys):
    def refuse(url, env):
        raise ConnectionError("visdom wants a login")

    monkeypatch.setattr(viz, "Dashboard", refuse)
    assert Pictures(tmp_path, "auto", "air", 0).dashboard is None
    assert capsys.readouterr().err == f"visdom wants a login; pictures go to {tmp_path} only\n"


def test_no_server(run_main, tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    finished = run_main(*SHORT, "-n", 2, "--out", tmp_path / "asked", "--visdom", nowhere)
    assert finished.returncode == 2 and f"no visdom server answers at {nowhere}" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "asked").exists()


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
        viz.Dashboard(f"http://127.0.0.1:{port}", "air").show("orange", "Nothing but orange", orange)
        screenshot(f"http://127.0.0.1:{port}/env/air", tmp_path / "page.png", 800, 600)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert (np.abs(page - orange[0, 0]).max(-1) < 3).sum() > 5000
