"""The flags of main.py: bad ones are told at once, and a resumed run keeps what it is."""

import pytest
import torch
from conftest import ROOT, metrics

import main
from air import AIR
from training.checkpoint import build_air, read_checkpoint, save_checkpoint
from training.options import make_parser, parse

GREATER = "greater than 0"
BAD = [
    ("-n -5", "--num-steps: invalid int greater than 0, at most 1,000,000,000 value: '-5'"),
    ("-n 0", GREATER),
    ("-n 1e3", GREATER),
    ("-n 10000000000", "at most 1,000,000,000"),
    ("-b many", GREATER),
    ("-b 1000000", "at most 100,000"),
    ("-lr nan", GREATER),
    ("-lr inf", GREATER),
    ("-lr 1e7", "at most 1,000,000"),
    ("-blr 0", GREATER),
    ("--estimator exact", "invalid choice: 'exact'"),
    ("--estimator traceenum --baseline rnn", "--baseline rnn cannot be combined with traceenum"),
    ("--baseline none -blr 0.1", "--baseline-learning-rate: there is no baseline"),
    ("--baseline mean", "invalid choice: 'mean'"),
    ("--guide plain", "invalid choice: 'plain'"),
    ("-t 0", GREATER),
    ("-t 2.5", GREATER),
    ("-t 51", "at most 50"),
    ("--seed -1", "invalid seed value: '-1'"),
    ("--seed 4294967296", "invalid seed value"),
    ("--seed one", "invalid seed value"),
    ("--cuda", "no CUDA device"),
    ("--eval-every 0", GREATER),
    ("--viz-every -1", GREATER),
    ("--visdom maybe", "expected auto, off or a URL"),
    ("--visdom http://127.0.0.1:9/base", "no visdom server answers at http://127.0.0.1:9/base"),
    ("--visdom http://[::1", "http://[::1 is not the URL of a visdom server"),
    ("--visdom http://127.0.0.1:65536", "is not the URL of a visdom server: Port out of range"),
    ("--visdom http://user@127.0.0.1:9", "is not the URL of a visdom server: no password given"),
    ("--visdom-env", "expected one argument"),
    ("--visdom-env a/b", "--visdom-env: expected a name without / \\ and +, not 'a/b'"),
    ("--visdom-env a+b", "not 'a+b'"),
    ("--visdom-env ..", "not '..'"),
    ("--invert", "--invert and --no-invert need --data"),
    ("--object-size 0", "invalid object_size value: '0'"),
    (f"--data-dir {ROOT}/README.md", "README.md is not a folder"),
    (f"--out {ROOT}/README.md", "README.md is not a folder"),
    (f"--out {ROOT}/README.md/run", "README.md is not a folder"),
    (f"--out {ROOT}/tests", "not empty"),
    ("--load nowhere", "no such checkpoint: nowhere"),
    (f"--load {ROOT}/README.md", "not a checkpoint"),
    ("--eval-only", "needs --load"),
    ("--data x.npz", "no such file"),
    ("--steps 5", "unrecognized arguments"),
    ("--num 5", "unrecognized arguments"),
]


@pytest.mark.parametrize("flags, error", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flags_are_told_at_once(flags, error, monkeypatch, capsys, tmp_path, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py", "--data-dir", str(data_dir), *flags.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert len(err.splitlines()) <= 2 and error in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_every_flag_has_been_tried_with_something_bad():
    tried = {word for flags, _ in BAD for word in flags.split()}
    for action in make_parser()._actions:
        assert action.dest == "help" or tried & set(action.option_strings), action.option_strings


def test_a_resumed_run_keeps_what_it_is(run, monkeypatch, capsys, data_dir, scenes, tmp_path):
    folder, _ = run

    def error(*flags):
        monkeypatch.setattr(
            "sys.argv", ["main.py", "--data-dir", str(data_dir), "--load", str(folder), *map(str, flags)]
        )
        with pytest.raises(SystemExit) as exit:
            main.main()
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "--batch-size 16: the loaded run has 8" in error("-b", 16)
    assert "--seed 1: the loaded run has 0" in error("--seed", 1)
    assert "--estimator traceenum: the loaded run has" in error("--estimator", "traceenum", "--baseline", "none")
    assert "--model-steps 4: the loaded run has 3" in error("-t", 4)
    assert "--baseline none: the loaded run has rnn" in error("--baseline", "none")
    assert "already at step 6" in error("-n", 5)
    for useless in (("--out", tmp_path / "out"), ("-n", 7), ("--visdom", "off"), ("--viz-every", 3)):
        assert "cannot be combined with --eval-only" in error("--eval-only", *useless)
    save_checkpoint(tmp_path / "only_parameters.pt", AIR())
    assert "not of a run of this script" in error("--load", tmp_path / "only_parameters.pt")
    # A run on a GPU does not silently go on without one.
    checkpoint, _ = read_checkpoint(folder)
    air = build_air(checkpoint)
    others = {name: value for name, value in checkpoint.items() if name not in ("air", "parameters", "flags")}
    save_checkpoint(tmp_path / "cuda.pt", air, **others, flags=checkpoint["flags"] | {"cuda": True})
    for name, value in (("viz_every", False), ("seed", "x"), ("guide", "other"), ("cuda", 5)):
        save_checkpoint(tmp_path / "forged.pt", air, **others, flags=checkpoint["flags"] | {name: value})
        assert "forged.pt has flags that are not of this script" in error("--load", tmp_path / "forged.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device was found; --no-cuda computes on the CPU" in error("--load", tmp_path / "cuda.pt")
    assert [line["step"] for line in metrics(folder)] == [2, 4, 6, 6]


def test_a_resumed_run_knows_where_its_data_are(run, data_dir):
    args, _ = parse(["--load", str(run[0]), "-n", "8"])
    assert args.data_dir == data_dir and args.cuda is False and args.eval_every == 2


def test_help_shows_every_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse(["-h"])
    flags = " ".join(capsys.readouterr().out.split()).split(" -")
    for action in make_parser()._actions:
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            (shown,) = [text for text in flags if text.startswith(f"{action.option_strings[-1][1:]} ") and "(" in text]
            assert f"(default: {action.default})" in shown
