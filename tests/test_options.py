"""The flags of main.py: bad ones are told at once, a resumed run keeps what it is, and the docs know them."""

import re
import shutil

import pytest
import torch
from conftest import ROOT, call, files

import main
from training.checkpoint import build_air, load_air, read_checkpoint, save_checkpoint
from training.options import make_parser, parse

BAD = {
    "-n -5": "--num-steps: invalid int greater than 0 value: '-5'",
    "-lr nan": "invalid float greater than 0 value: 'nan'",
    "-t 51": "at most 50",
    "--estimator traceenum --baseline rnn": "--baseline rnn cannot be combined with traceenum",
    "--baseline none -blr 1": "--baseline-learning-rate: there is no baseline",
    "--invert": "--invert needs --data",
    "--crop 40": "--crop needs --data",
    "--seed -1": "--seed -1 is not between 0 and 4294967295",
    "--cuda": "no CUDA device",
    "--visdom maybe": "--visdom: not the URL of a visdom server",
    "--visdom http://127.0.0.1:9/base": "no visdom server answers at http://127.0.0.1:9/base",
    "--visdom http://127.0.0.1:65536": "--visdom: not the URL of a visdom server",
    f"--data-dir {ROOT}/README.md": "README.md cannot be written to",
    f"--out {ROOT}/README.md/run": "README.md/run cannot be written to",
    f"--out {ROOT}/README.md": "README.md cannot be written to",
    f"--out {ROOT}/tests": "not empty",
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
    data = ("--data", data_file) if "http" in flags else ()
    assert not call(main.main, *flags.split(), *data, error=BAD[flags]).stdout
    assert [path for path in tmp_path.rglob("*") if path.name != "runs"] == []  # nothing was begun


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
        "--estimator traceenum --baseline none": "--estimator traceenum: the loaded run has tracegraph",
        "-t 4": "--max-objects 4: the loaded run has 3",
        "--object-size 20": "--object-size 20.0: the loaded run has None",
        "-n 5": "--num-steps 5: the run is already at step 6",
        "--eval-only --out x": "--out cannot be combined with --eval-only",
        "--eval-only -n 7": "--num-steps cannot be combined with --eval-only",
        f"--load {tmp_path}/only_parameters.pt": "not of a run of this script",
        f"--load {tmp_path}/cuda.pt": "no CUDA device was found; --no-cuda computes on the CPU",
    }.items():
        run_main("--load", folder, *flags.split(), error=error)
    assert files(folder) == earlier
    args = parse(["--load", str(folder), "-n", "8"])
    assert str(args.data) == checkpoint["flags"]["data"] and args.cuda is False and args.eval_every == 2


def test_a_copy_does_not_write_where_it_lies(run, run_main, no_pictures, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    shutil.copy(run[0] / "checkpoint.pt", tmp_path)
    (tmp_path / "link.pt").symlink_to(run[0] / "checkpoint.pt")
    earlier = files(tmp_path)
    for name in ("checkpoint.pt", "link.pt"):
        run_main("--load", tmp_path / name, "-n", 8, error="not in the folder of a run")
    run_main("--load", tmp_path / "link.pt", "-n", 7, "--out", tmp_path.with_name("new"))
    assert files(tmp_path) == earlier


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_and_commands(page):
    """What README and docs link to, and the commands that they show, exist."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target
    for script, flags in re.findall(r"(?:python|torchrun[^\n]*?) ([\w/]+\.py)([^\n#`|>]*)", text):
        assert (ROOT / script).exists(), script
        if script == "main.py":
            known = {name for action in make_parser()._actions for name in action.option_strings}
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", flags)) <= known, flags
