"""The tutorial: a shortened copy runs from top to bottom, builds what is in air.py, and is committed as it was run."""

import re

import nbformat
import numpy as np
import pytest
from conftest import LIMIT, ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

TEXT = (ROOT / "air.ipynb").read_text()
CELLS = nbformat.reads(TEXT, as_version=4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
PARAMETERS = "RNN_RUN, LONG_RUN, EVERY, SCENES = 2, 2, 2, 2"
# Few scenes of drawn digits in place of MNIST, and short searches.
SMALL_DATA = """
import inference
import multi_mnist
import numpy as np
import patches
inference.PATIENCE = inference.TOGETHER = patches.PATIENCE = 2
patches.SWEEPS, patches.find.__defaults__ = 1, (2, 0)
drawn = [*np.load({path!r}).values()]
multi_mnist.load_digits = lambda train: drawn
multi_mnist.load_split = lambda split: multi_mnist.compose(*drawn, 600, np.random.default_rng(len(split)))
"""
# With the same weights and the same seed: the same samples, densities, baselines and gradients.
CHECKS = """
def run(program, *args, **options):
    pyro.set_rng_seed(3)
    trace = poutine.trace(program).get_trace(*args, **options)
    trace.compute_log_prob()
    sites = {k: v for k, v in trace.nodes.items() if k[0] in "xz"}
    return {k: (v["value"], v["log_prob"], v["infer"].get("baseline", {})) for k, v in sites.items()}
def gradients(model, guide, *nets):
    pyro.set_rng_seed(3)
    [net.zero_grad() for net in nets]
    TraceGraph_ELBO().loss_and_grads(model, guide, x)
    return {renamed(k): p.grad.clone() for net in nets for k, p in net.named_parameters()}
def renamed(name):
    return name.replace("attend.", "")

x, close = floats(test.x[:8]), {"atol": 1e-3, "rtol": 1e-4}
for kind in ("rnn", "residual"):
    air = AIR(guide=kind, count_ratio=0.3, baseline="rnn" if kind == "rnn" else "none")
    ours, in_one_piece = Gains(ratio=0.3), InOnePiece(ratio=0.3)
    guide = RNNGuide(Baseline()) if kind == "rnn" else ResidualGuide(ours)
    state = {renamed(k): v for k, v in air.state_dict().items()}
    guide.load_state_dict({k: v for k, v in state.items() if not k.startswith(("decode.", "familiarity."))})
    [net.decode.load_state_dict(air.decode.state_dict()) for net in (ours, in_one_piece)]
    chosen, made = run(guide, x), run(ours, num_scenes=8)
    same(chosen, run(air.guide, x), **close)
    same(made, run(air.model, num_scenes=8), **close)
    for sampled, scenes in (chosen, x), (made, made["x"][0]):
        values = {k: v[0] for k, v in sampled.items() if k != "x"}
        density = log_prob(ours, values, scenes)
        for program in (in_one_piece, air.model):
            same(density, log_prob(program, values, scenes), atol=0.05, rtol=0)
    same(density, sum(v[1] for v in made.values()), atol=0.05, rtol=0)  # of the scenes that it made itself
    same(gradients(ours, guide, ours, guide), gradients(air.model, air.guide, air), **close)
"""


def test_it_runs_and_is_what_air_py_has(digits, tmp_path):
    np.savez(tmp_path / "digits.npz", images=digits[0], classes=digits[1])
    notebook = nbformat.reads(TEXT, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = PARAMETERS
    notebook.cells.insert(0, new_code_cell(SMALL_DATA.format(path=str(tmp_path / "digits.npz"))))
    notebook.cells.append(new_code_cell(CHECKS))
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=LIMIT, startup_timeout=LIMIT, resources=resources).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr", (cell.source, output)


def test_elsewhere_it_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="Open this notebook in the folder of the repository"):
        exec(CODE[0].source, {})


def test_it_is_committed_as_it_was_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    exec(CODE[1].source, parameters := {})
    assert f"update {parameters['LONG_RUN']:5}: " in TEXT, "the committed run was a shortened one"
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) > 12 and all(output.metadata["image/png"]["alt"] for output in images)
    for debris in ("/home/", "/root/", "/Users/", "/tmp/", "site-packages", "it/s]"):
        assert debris not in TEXT, debris
    *others, longest = sorted((len(cell.source.splitlines()), cell.source) for cell in CODE)
    assert len(TEXT) < 1_500_000 and longest[0] <= 60 and "class ResidualGuide" in longest[1]
    assert all(n <= 21 or "class PlainGuide" in source for n, source in others)
    pictures = re.findall(
        r"!\[(.*?)\]\((.*?)\)", "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
    )
    assert len(pictures) > 3 and all(alt and (ROOT / file).exists() for alt, file in pictures)
