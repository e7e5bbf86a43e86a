import json
import os
import subprocess
import sys

from conftest import ROOT


def test_speed_prints_its_json_line():
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr
    line = json.loads(finished.stdout.splitlines()[-1])
    assert set(line) == {"naive_steps_per_s", "steps_per_s", "ratio"}
    assert all(value > 0 for value in line.values())
