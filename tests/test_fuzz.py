"""Files that are broken, or made to do harm: main.py takes or refuses each in one line, and runs no code in it."""

import io
import os
import shutil
import zipfile
from functools import reduce
from operator import getitem

import numpy as np
import pytest
import torch
from conftest import call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import images
import main
from air import AIR
from evaluation import ReferenceStats
from training.options import FIXED, KEPT, make_parser
from training.svi import make_svi


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def a_checkpoint(*place, value=None) -> bytes:
    """That of a small run, with `value` in that place, or without what is there."""
    air = AIR(2, 12, 9, z_what_size=2, hidden_size=3, look_size=3, baseline_size=2)
    _, adam = make_svi(air, "tracegraph")
    for parameter in air.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    flags = {name: make_parser().get_default(name) for name in FIXED + KEPT} | {"data_dir": "data"}
    checkpoint = {"air": air.config, "parameters": air.state_dict(), "step": 3, "seconds": 1.5, "data_sha256": "0"}
    checkpoint |= {"flags": flags, "optimizer": adam.state_dict(), "rng": torch.get_rng_state()[None], "cuda_rng": None}
    if place:
        part = reduce(getitem, place[:-1], checkpoint)
        part.pop(place[-1]) if value is None else part.update({place[-1]: value})
    return written(lambda file: torch.save(checkpoint, file))


def written(write) -> bytes:
    write(file := io.BytesIO())
    return file.getvalue()


x, nan = np.pad(np.full((10, 5, 5), 200, np.uint8), ((0, 0), (3, 4), (3, 4))), torch.tensor(torch.nan)
INTACT = {"checkpoint.pt": a_checkpoint(), "images.npz": written(lambda file: np.savez(file, x=x))}
CHANGES = {
    **{(name,): (None, Payload()) for name in "air parameters step flags optimizer rng data_sha256".split()},
    ("air", "max_objects"): (0, 2.5, 10**9, "x", [2]),
    ("air", "hidden_size"): (5, 10**18, "x"),
    ("parameters", "decode.mlp.0.weight"): (None, 5, nan, nan.expand(3, 2), torch.ones(2, 3)),
    ("parameters", "familiarity.loc"): (None, nan.expand(30, 3)),
    ("optimizer", "state", 0): (5, *({name: nan} for name in ("step", "exp_avg", "exp_avg_sq"))),
    ("optimizer", "param_groups"): (5, [], [{}]),
    ("rng",): (5, torch.zeros(1, 3)),
    ("reference",): (5, "x", {}, {"log_weight": 3.0}, dict.fromkeys(ReferenceStats._fields, "high")),
}


@pytest.fixture
def is_taken(no_pictures, tmp_path, tmp_path_factory, monkeypatch):
    """Whether main.py takes a file of that name and content. Refused, it is named in one line, and nothing begins."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))

    def is_taken(name, content) -> bool:
        for each in INTACT:
            (tmp_path / each).write_bytes(content if each == name else INTACT[each])
        files = "--load", tmp_path / "checkpoint.pt", "--data", tmp_path / "images.npz", "--out", tmp_path / "run"
        tried = call(main.main, *files, "-n", 3, "--visdom", "off", status=(0, 2))
        assert os.listdir() == [], "code in the file was run, or the file wrote another"
        taken, lines = tried.returncode == 0, tried.stderr.splitlines()
        assert taken or f"/{name}" in lines[-1], tried.stderr
        assert (tmp_path / "run").exists() == taken
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return taken

    return is_taken


def test_what_is_forged_is_refused(is_taken, monkeypatch):
    assert is_taken("images.npz", INTACT["images.npz"])
    for place, values in CHANGES.items():
        for value in values:
            assert not is_taken("checkpoint.pt", a_checkpoint(*place, value=value)), (place, value)
    for arrays in {"x": np.array([Payload()])}, {"x": x, "counts": np.array([Payload()] * len(x))}:
        assert not is_taken("images.npz", written(lambda file: np.savez(file, **arrays))), arrays
    array = {"descr": "|u1", "fortran_order": False}
    for shape in (2**40,) * 3, (10, 12, 12), (2**33, 1, 1), (-1, 5, 5):  # of one that is not there
        header = written(lambda file: np.lib.format.write_array_header_1_0(file, array | {"shape": shape}))
        content = written(lambda file: zipfile.ZipFile(file, "w").writestr("x.npy", header))
        assert not is_taken("images.npz", content), shape
    monkeypatch.setattr(images, "LARGEST_FILE", len(INTACT["images.npz"]) // 2)
    assert not is_taken("images.npz", INTACT["images.npz"])


def damaged(content: bytes, kind: str, where: float, elsewhere: float, some: bytes) -> bytes:
    at, to = int(where * len(content)), int(elsewhere * len(content))
    flipped = bytes([byte ^ 1 << some[0] % 8 for byte in content[at : at + 1]]) + content[at + 1 :]
    rest = {"cut": b"", "flip": flipped, "put": some + content[at + len(some) :], "insert": some + content[at:]}
    return content[:at] + (rest | {"repeat": content[to:]})[kind]


kinds, place = st.sampled_from(["cut", "flip", "put", "insert", "repeat"]), st.floats(0, 1)
damages = st.lists(st.tuples(kinds, place, place, st.binary(min_size=1, max_size=20)), min_size=1, max_size=4)
QUIET = {"phases": [Phase.generate], "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damaged_file_does_harm(examples, is_taken):
    @settings(max_examples=examples, derandomize=examples < 1000, **QUIET)
    @given(st.sampled_from(sorted(INTACT)), damages)
    def try_one(name, damages):
        is_taken(name, reduce(lambda content, damage: damaged(content, *damage), damages, INTACT[name]))

    try_one()
