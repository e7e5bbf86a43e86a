"""The flags of main.py: bad ones are told at once, and a resumed run keeps what it is."""

import os

import pytest
import torch
from conftest import ROOT, call, files

import main
from training.checkpoint import build_air, load_air, read_checkpoint, save_checkpoint
from training.options import make_parser, parse

GREATER = "greater than 0"
BAD = {
    "-n -5": "--num-steps: invalid int greater than 0 value: '-5'",
    "-b many": GREATER,
    "-lr nan": GREATER,
    "-blr 0": GREATER,
    "--estimator exact": "invalid choice: 'exact'",
    "--estimator traceenum --baseline rnn": "--baseline rnn cannot be combined with traceenum",
    "--baseline none -blr 0.1": "--baseline-learning-rate: there is no baseline",
    "--guide plain": "invalid choice: 'plain'",
    "-t 2.5": GREATER,
    "-t 51": "at most 50",
    "--seed -1": "invalid seed value: '-1'",
    "--seed 4294967296": "invalid seed value",
    "--cuda": "no CUDA device",
    "--eval-every 0": GREATER,
    "--viz-every -1": GREATER,
    "--visdom maybe": "expected auto, off or a URL",
    "--visdom http://127.0.0.1:9/base": "no visdom server answers at http://127.0.0.1:9/base",
    "--visdom http://127.0.0.1:65536": "--visdom: not the URL of a visdom server",
    "--visdom-env": "expected one argument",
    "--visdom-env a/b": "--visdom-env: expected a name without / \\ and +, not 'a/b'",
    "--invert": "--invert and --no-invert need --data",
    "--object-size 0": GREATER,
    f"--data-dir {ROOT}/README.md": "README.md is not a folder",
    f"--out {ROOT}/README.md/run": "README.md is not a folder",
    f"--out {ROOT}/tests": "not empty",
    "--out unwritable/run": "cannot be written to",
    "--load nowhere": "no such checkpoint: nowhere",
    f"--load {ROOT}/README.md": "not a checkpoint",
    "--eval-only": "needs --load",
    "--data x.npz": "no such file",
    "--num 5": "unrecognized arguments",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_told_at_once(flags, monkeypatch, tmp_path, data_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "access", lambda *_: "unwritable" not in flags)  # Nothing is read-only to root.
    refused = call(main.main, *flags.split(), *(("--data", data_file) if "http" in flags else ()))
    assert refused.returncode == 2 and not refused.stdout
    assert BAD[flags] in refused.stderr.splitlines()[-1] and len(refused.stderr.splitlines()) <= 2
    assert [path for path in tmp_path.rglob("*") if path.name != "runs"] == []  # nothing was begun


def test_every_flag_has_been_tried_with_something_bad():
    for action in make_parser()[0]._actions:
        assert action.dest == "help" or set(" ".join(BAD).split()) & set(action.option_strings), action.option_strings


def test_a_resumed_run_keeps_what_it_is(run, run_main, monkeypatch, tmp_path):
    folder, earlier = run[0], files(run[0])
    checkpoint, _ = read_checkpoint(folder)
    save_checkpoint(tmp_path / "only_parameters.pt", load_air(folder))
    checkpoint["flags"]["cuda"] = True
    others = {name: value for name, value in checkpoint.items() if name not in ("air", "parameters")}
    save_checkpoint(tmp_path / "cuda.pt", build_air(checkpoint), **others)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, error in {
        "-b 16": "--batch-size 16: the loaded run has 8",
        "--seed 1": "--seed 1: the loaded run has 0",
        "--estimator traceenum --baseline none": "--estimator traceenum: the loaded run has tracegraph",
        "-t 4": "--max-objects 4: the loaded run has 3",
        "--baseline none": "--baseline none: the loaded run has rnn",
        "--guide rnn": "--guide rnn: the loaded run has residual",
        "--object-size 20": "--object-size 20.0: the loaded run has None",
        "-n 5": "--num-steps 5: the run is already at step 6",
        "--eval-only --out x": "--out cannot be combined with --eval-only",
        "--eval-only -n 7": "--num-steps cannot be combined with --eval-only",
        f"--load {tmp_path}/only_parameters.pt": "not of a run of this script",
        f"--load {tmp_path}/cuda.pt": "no CUDA device was found; --no-cuda computes on the CPU",
    }.items():
        refused = run_main("--load", folder, *flags.split())
        assert refused.returncode == 2 and error in refused.stderr.splitlines()[-1], flags
    assert files(folder) == earlier
    args = parse(["--load", str(folder), "-n", "8"])
    assert str(args.data) == checkpoint["flags"]["data"] and args.cuda is False and args.eval_every == 2


def test_help_shows_every_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    flags = " ".join(call(main.main, "-h").stdout.split()).split(" -")
    for action in make_parser()[0]._actions:
        if action.default not in (None, "==SUPPRESS==") and not isinstance(action.default, bool):
            (shown,) = [text for text in flags if text.startswith(f"{action.option_strings[-1][1:]} ") and "(" in text]
            assert f"(default: {action.default})" in shown
