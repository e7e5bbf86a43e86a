import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from air import AIR
from evaluation import Usual
from training.checkpoint import CheckpointError, load_air, read_usual, save_checkpoint

SMALL = {"image_size": 50, "window_size": 9, "z_what_size": 4, "rnn_size": 16, "hidden_size": 12, "baseline_size": 8}
SMALL |= {"look_size": 10}


def test_checkpoint_round_trip(tmp_path):
    air = AIR(**SMALL, count_ratio=0.1)
    save_checkpoint(tmp_path / "air.pt", air, step=7)
    again = load_air(tmp_path / "air.pt")
    assert again.config == air.config
    assert all(torch.equal(a, b) for a, b in zip(air.parameters(), again.parameters()))
    assert [file.name for file in tmp_path.iterdir()] == ["air.pt"]


def test_bad_checkpoints_are_told_apart(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no such"):
        load_air(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_air(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="no 'air' and 'parameters'"):
        load_air(path)
    torch.save({"air": {**SMALL, "hidden_size": 32}, "parameters": AIR(**SMALL).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], expected \[") as error:
        load_air(path)
    assert "\n" not in str(error.value)
    save_checkpoint(path, AIR(**SMALL))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged|not a checkpoint"):
        load_air(path)
    for options in ({"likelihood_sd": 0.0}, {"likelihood_sd": "x"}, {"z_where_scale": (0.2, 0.0, 1.0)}):
        torch.save({"air": SMALL | options, "parameters": AIR(**SMALL).state_dict()}, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this AIR"):
            load_air(path)


WRITER = """
import sys
sys.path.insert(0, {root!r})
from training.checkpoint import write_file
for _ in range(500):
    write_file({path!r}, {letter!r} * 50_000)
"""


def test_two_writers_of_one_file(tmp_path):
    """Neither ends the other, and what is there is always one's or the other's."""
    path = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER.format(root=str(ROOT), path=str(path), letter=letter)])
        for letter in (b"a", b"b")
    ]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert path.read_bytes() in (b"a" * 50_000, b"b" * 50_000)
    assert [writer.returncode for writer in writers] == [0, 0] and list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    code += "from training.run import read_metrics, write_text\n"
    code += """write_text(Path("metrics.jsonl"), '{"split": "1 \\u2192 2", "step": 1}\\n')\n"""
    code += """assert read_metrics(Path("."))[0]["split"] == "1 \\u2192 2" """
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | environment)
    assert "→".encode() in (tmp_path / "metrics.jsonl").read_bytes()


def test_what_is_usual_is_not_taken_on_trust():
    saved = dict(zip(Usual._fields, (700, -50.5, 0.7, 27)))
    assert read_usual({"usual": saved}) == Usual(700.0, -50.5, 0.7, 27.0) and read_usual({}) is None
    for wrong in ({}, {"elbo": 3.0}, "text", 5, saved | {"elbo": "high"}, saved | {"explained": [1, 2]}):
        with pytest.raises(CheckpointError, match="does not say what is usual"):
            read_usual({"usual": wrong})
