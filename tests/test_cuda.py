"""What only a GPU shows; without one these tests are skipped."""

import copy

import pytest
import torch
from conftest import SHORT

from air import AIR
from patches import find
from training.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("guide", ["residual", "rnn"])
def test_a_gpu_sees_what_the_cpu_sees(guide, scenes):
    on_cpu = AIR(guide=guide)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for expected, seen in zip(*(find(air, scenes.x, moves=4) for air in (on_cpu, on_gpu))):
        assert expected.count == seen.count
        for name in ("boxes", "losses", "cell_evidence", "reconstruction"):
            ours, theirs = getattr(expected, name), getattr(seen, name).cpu()
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_a_run_on_a_gpu_goes_on_on_the_cpu(estimator, run_main, tmp_path):
    run_main(*SHORT, "--cuda", "--estimator", estimator, "--out", tmp_path / "run")
    assert len(read_checkpoint(tmp_path / "run")[0]["cuda_rng"].flatten()) > 0
    run_main("--load", tmp_path / "run", "-n", 9, "--no-cuda")
    assert read_checkpoint(tmp_path / "run")[0]["cuda_rng"] is None
