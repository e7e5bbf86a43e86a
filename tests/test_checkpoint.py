"""A checkpoint is what was saved, and is where it was; what is damaged is in test_fuzz.py."""

import shutil

import torch
from conftest import files

from air import AIR
from training.checkpoint import load_air, save_checkpoint


def test_round_trip(tmp_path):
    air = AIR(window_size=9, z_what_size=4, hidden_size=12, look_size=10, baseline_size=8, count_ratio=0.1)
    save_checkpoint(tmp_path / "air.pt", air, step=7)
    again = load_air(tmp_path / "air.pt")
    assert again.config == air.config and all(map(torch.equal, air.parameters(), again.parameters()))


def test_a_copy_does_not_write_where_it_lies(run, run_main, no_pictures, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    shutil.copy(run[0] / "checkpoint.pt", tmp_path)
    (tmp_path / "link.pt").symlink_to(run[0] / "checkpoint.pt")
    earlier = files(tmp_path)
    for name in ("checkpoint.pt", "link.pt"):
        refused = run_main("--load", tmp_path / name, "-n", 8)
        assert refused.returncode == 2 and "not in the folder of a run" in refused.stderr.splitlines()[-1]
    assert run_main("--load", tmp_path / "link.pt", "-n", 7, "--out", tmp_path.with_name("new")).returncode == 0
    assert files(tmp_path) == earlier
