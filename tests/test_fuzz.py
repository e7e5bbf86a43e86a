"""Files that are broken, or made to do harm: each is loaded rightly or refused in one line."""

import io
import os
import pickle
import resource
import time
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from air import AIR
from evaluation import Usual
from images import load_canvases
from multi_mnist import DataError
from training.checkpoint import CheckpointError, build_air, read_checkpoint
from training.options import UsageError, inherit, make_parser
from training.parallel import Processes
from training.run import Run
from training.svi import make_svi

SIZES = {
    "num_steps": 2,
    "image_size": 12,
    "window_size": 9,
    "z_what_size": 2,
    "rnn_size": 3,
    "hidden_size": 3,
    "look_size": 3,
}
FLAGS = dict.fromkeys(("batch_size", "num_steps"), 4) | {
    **{"learning_rate": 1e-3, "baseline_learning_rate": 1e-3, "seed": 0, "model_steps": 2},
    **{"estimator": "tracegraph", "baseline": "rnn", "guide": "residual", "cuda": False},
    **{"eval_every": 2, "viz_every": 2, "data": None, "data_dir": "data", "invert": None, "object_size": 12.5},
}


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harm",)


def a_checkpoint(**changes) -> dict:
    torch.manual_seed(0)
    air = AIR(**SIZES, baseline_size=2)
    _, adam = make_svi(air, "tracegraph")
    for parameter in air.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    progress = {"step": 3, "seconds": 1.5, "flags": FLAGS, "optimizer": adam.state_dict(), "data_sha256": "0"}
    progress |= {"usual": dict.fromkeys(Usual._fields, 1.0)}
    progress |= {"rng": torch.get_rng_state(), "cuda_rng": None}
    return {"air": air.config, "parameters": air.state_dict(), **progress} | changes


def saved(checkpoint) -> bytes:
    content = io.BytesIO()
    torch.save(checkpoint, content)
    return content.getvalue()


def an_npz(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def load_checkpoint(path):
    """All that main.py reads of a checkpoint."""
    checkpoint, path = read_checkpoint(path)
    air = build_air(checkpoint, path)
    inherit(make_parser(), ["--load", str(path)], checkpoint, path)
    _, adam = make_svi(air, "tracegraph")
    args = SimpleNamespace(cuda=False, load=path, out=path.parent / "new", seed=0)
    with torch.random.fork_rng():
        Run(args, air, adam, Processes(), "0", checkpoint)


LOADERS = {"checkpoint": load_checkpoint, "npz": load_canvases}
INTACT = {
    "checkpoint": saved(a_checkpoint()),
    "npz": an_npz(x=np.zeros((5, 12, 12), np.uint8), counts=np.arange(5)),
}

# ------------------------------------------------------------------- damage to the bytes of a file

place = st.floats(0, 1, exclude_max=True)
damage = st.one_of(
    st.tuples(st.just("cut"), place, st.just(0)),
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("put"), place, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("repeat"), place, place),
)


def damaged(intact: str, damages) -> bytes:
    content = INTACT[intact]
    for kind, where, what in damages:
        at = int(where * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << what)]) + content[at + 1 :]
        elif kind == "put":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[int(what * len(content)) :]
    return content


# ------------------------------------------------------------------- archives that lie about themselves

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.just([1, 2]),
    st.just({"a": 1}),
    st.builds(lambda n: torch.zeros(n), st.integers(0, 5)),
)
huge = st.integers(0, 2**40)


@st.composite
def false_checkpoints(draw) -> bytes:
    """Intact archives with something in them that does not belong there."""
    checkpoint = a_checkpoint()
    where = draw(st.sampled_from(["top", "air", "flags", "parameters", "optimizer", "claim", "code"]))
    if where == "top":
        checkpoint[draw(st.sampled_from(sorted(checkpoint)))] = draw(odd)
    elif where in ("air", "flags"):
        part = dict(checkpoint[where])
        part[draw(st.sampled_from(sorted(part)))] = draw(odd | huge)
        checkpoint[where] = part
    elif where == "parameters":
        name = draw(st.sampled_from(sorted(checkpoint["parameters"])))
        value = checkpoint["parameters"][name]
        change = draw(st.sampled_from(["half", "nan", "flat", "gone", "odd", "complex"]))
        changed = {"half": value.half(), "nan": value * torch.nan, "flat": value.flatten(), "complex": value + 0j}
        checkpoint["parameters"][name] = changed.get(change, draw(odd))
        if change == "gone":
            del checkpoint["parameters"][name]
    elif where == "optimizer":
        state = checkpoint["optimizer"]["state"]
        moment = draw(st.sampled_from(["exp_avg", "exp_avg_sq", "step"]))
        state[draw(st.sampled_from(sorted(state)))] = draw(odd) if draw(st.booleans()) else {moment: draw(odd)}
    elif where == "claim":
        # A large network whose numbers are all the same few.
        size = draw(st.integers(1, 10_000))
        with torch.device("meta"):
            air = AIR(**SIZES | {"hidden_size": size, "rnn_size": size}, baseline_size=2)
        checkpoint["air"] = air.config
        checkpoint["parameters"] = {name: torch.zeros(1).expand(p.shape) for name, p in air.state_dict().items()}
    else:
        checkpoint[draw(st.sampled_from(sorted(checkpoint)))] = Payload()
    return saved(checkpoint)


@st.composite
def false_arrays(draw) -> bytes:
    """`.npz` files whose members have headers, names and types of all kinds."""
    content = io.BytesIO()
    packing = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(content, "w", packing) as archive:
        for name in draw(
            st.lists(st.sampled_from(["x", "counts", "../x", "/tmp/x", "x\n", "y"]), max_size=4, unique=True)
        ):
            kind = draw(st.sampled_from(["array", "header", "bomb", "code", "bytes"]))
            if kind == "array":
                shape = draw(st.lists(st.integers(0, 12), max_size=4))
                dtype = draw(st.sampled_from(["u1", "f2", "f8", "i8", "?", "c16", "U3", "S2", "M8[s]", "V4", "f4,i2"]))
                buffer = io.BytesIO()
                np.save(buffer, np.zeros(shape, dtype))
                member = buffer.getvalue()
            elif kind == "header":
                shape = tuple(draw(st.lists(huge, max_size=3)))
                descr = draw(st.sampled_from(["|u1", "<f8", "O", "nonsense", "|V99999999", [("a", "<f4")], 3]))
                header = repr({"descr": descr, "fortran_order": draw(st.booleans()), "shape": shape}).encode()
                member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + draw(st.binary(max_size=9))
            elif kind == "bomb":
                member = bytes(draw(st.sampled_from([10, 2**20])))
            elif kind == "code":
                buffer = io.BytesIO()
                np.save(buffer, np.array([Payload()]), allow_pickle=True)
                member = buffer.getvalue()
            else:
                member = draw(st.one_of(st.binary(max_size=50), st.just(pickle.dumps(Payload()))))
            archive.writestr(f"{name}.npy" if draw(st.booleans()) else name, member)
    return content.getvalue()


files = st.one_of(
    *(
        st.tuples(st.just(kind), st.lists(damage, min_size=1, max_size=4).map(partial(damaged, kind)))
        for kind in INTACT
    ),
    st.tuples(st.just("checkpoint"), false_checkpoints()),
    st.tuples(st.just("npz"), false_arrays()),
    st.tuples(st.sampled_from(sorted(INTACT)), st.binary(max_size=300)),
)


def check(path, kind, content):
    """Loaded, or refused in one line; returns whether it was loaded."""
    path.write_bytes(content)
    began = time.monotonic()
    try:
        LOADERS[kind](path)
        loaded = True
    except (CheckpointError, DataError, UsageError) as error:
        loaded = False
        assert len(str(error).splitlines()) == 1, str(error)
    assert time.monotonic() - began < 20
    assert os.listdir() == [], "code in the file was run, or the file wrote another"
    return loaded


@pytest.mark.parametrize("kind", INTACT)
def test_the_intact_files_are_loaded(kind, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert check(tmp_path / f"file.{kind}", kind, INTACT[kind])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # what a tensor says to being indexed by a name
@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_file_does_harm(examples, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,  # A failure would print the whole file.
        phases=[Phase.generate],  # Shrinking a failure takes long and says little.
    )
    @given(files)
    def try_one(file):
        kind, content = file
        check(tmp_path / f"file.{kind}", kind, content)

    try_one()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB: 1 GiB
