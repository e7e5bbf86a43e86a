"""What only a GPU shows; without one these tests are skipped."""

import copy

import pytest
import torch

from air import AIR
from inference import explain
from training.checkpoint import load_air, read_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("guide", ["residual", "rnn"])
def test_a_gpu_sees_what_the_cpu_sees(guide, scenes):
    on_cpu = AIR(guide=guide)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    expected, seen = (explain(air, scenes.x, moves=4) for air in (on_cpu, on_gpu))
    assert torch.equal(expected.counts, seen.counts.cpu())
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(seen, name).cpu(), value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("estimator", ["tracegraph", "traceenum"])
def test_a_run_on_a_gpu_can_be_interrupted_and_goes_on_on_the_cpu(estimator, run_main, tmp_path):
    flags = ("--cuda", "-b", 8, "--eval-every", 4, "--viz-every", 4, "--visdom", "off", "--estimator", estimator)
    run = run_main("-n", 8, *flags, "--out", tmp_path / "run")
    assert run.returncode == 0 and "count accuracy" in run.stdout, run.stderr
    longer = run_main("--load", tmp_path / "run", "-n", 12)
    assert longer.returncode == 0, longer.stderr
    checkpoint = read_checkpoint(tmp_path / "run")[0]
    assert checkpoint["step"] == 12 and len(checkpoint["cuda_rng"].flatten()) > 0
    assert {value.device.type for value in load_air(tmp_path / "run").state_dict().values()} == {"cpu"}
    on_cpu = run_main("--load", tmp_path / "run", "-n", 16, "--no-cuda")
    assert on_cpu.returncode == 0, on_cpu.stderr
    assert read_checkpoint(tmp_path / "run")[0]["cuda_rng"] is None
