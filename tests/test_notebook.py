"""The tutorial: a shortened copy runs from top to bottom, builds what is in air.py, and is committed as it was run."""

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

PATH = ROOT / "air.ipynb"
PARAMETERS = "RNN_STEPS, STEPS, SHORT_STEPS, EVERY, DRAWS = 4, 4, 2, 2, 2"
# Few scenes of drawn digits in place of MNIST.
SMALL_DATA = """
import multi_mnist
import numpy as np

with np.load({path!r}) as file:
    drawn = file["images"], file["classes"]
multi_mnist.load_digits = lambda train: drawn
multi_mnist.load_split = lambda split: multi_mnist.compose(*drawn, 600, np.random.default_rng(len(split)))
"""
# The same density, and the same samples for the same seed, with the weights of the one in the other.
CHECKS = """
from air import AIR

x = to_images(test.x[:8])
for kind, mine in (("rnn", RNNGuideWithBaseline()), ("residual", ResidualGuide())):
    air = AIR(guide=kind, count_ratio=0.3, baseline="rnn" if kind == "rnn" else "none")
    decode, ratio = Decoder(50, 400, 28), 0.3
    weights = air.state_dict()
    decode.load_state_dict({k.removeprefix("decode."): v for k, v in weights.items() if k.startswith("decode.")})
    rest = {k.removeprefix("attend."): v for k, v in weights.items() if not k.startswith("decode.")}
    names = {"baseline.rnn.": "baseline_rnn.", "baseline.linear.": "baseline."}
    for theirs, own in names.items():
        rest = {k.replace(theirs, own): v for k, v in rest.items()}
    mine.load_state_dict(rest)
    for training in (True, False):
        mine.train(training), air.train(training)
        samples = []
        for program in (mine, air.guide):
            pyro.set_rng_seed(3)
            trace = poutine.trace(program).get_trace(x)
            trace.compute_log_prob()
            samples.append({k: v["value"] for k, v in trace.nodes.items() if k.startswith("z_")})
            samples.append({k: v["log_prob"] for k, v in trace.nodes.items() if k.startswith("z_")})
        for first, second in (samples[::2], samples[1::2]):
            for name in first:
                torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-4)
        air.set_count_prior(0.3)
        ours, theirs = (log_prob(program, samples[0], x) for program in (model, air.model))
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
        torch.testing.assert_close(ours, log_prob(model_in_one_piece, samples[0], x), atol=0.05, rtol=0)
        for name, value in poutine.trace(mine).get_trace(x).nodes.items():
            assert kind == "residual" or not name.startswith("z_pres") or "baseline_value" in value["infer"]["baseline"]
poses, pictures = where_loc + where_scale * torch.randn(20, 3), torch.rand(20, 28, 28)
torch.testing.assert_close(paint(poses, pictures), object_to_image(poses, pictures, 50), atol=1e-4, rtol=0)
pictures = torch.rand(20, 50, 50)
torch.testing.assert_close(crop(poses, pictures), image_to_object(poses, pictures, 28), atol=1e-4, rtol=0)
print("all is the same")
"""


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PATH, as_version=4)


def outputs(notebook):
    """All outputs, each as its code cell's number and itself."""
    return [(i, output) for i, cell in enumerate(notebook.cells) for output in cell.get("outputs", ())]


def check_outputs(notebook):
    for i, output in outputs(notebook):
        assert output.output_type != "error", f"cell {i}: {output.get('evalue')}"
        assert output.get("name") != "stderr", f"cell {i} warns: {output.text}"


def test_it_runs_and_is_what_air_py_has(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    np.savez(tmp_path / "digits.npz", images=digits[0], classes=digits[1])
    notebook = nbformat.read(PATH, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = PARAMETERS
    notebook.cells.insert(0, new_code_cell(SMALL_DATA.format(path=str(tmp_path / "digits.npz"))))
    notebook.cells.append(new_code_cell(CHECKS))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    check_outputs(notebook)
    assert notebook.cells[-1].outputs[0].text == "all is the same\n"


def test_elsewhere_it_says_so(committed, tmp_path):
    first = next(cell for cell in committed.cells if cell.cell_type == "code")
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell(first.source)])
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}, allow_errors=True)
    client.execute()
    assert "Open this notebook in the folder of the repository" in notebook.cells[0].outputs[0].evalue


def test_it_is_committed_as_it_was_run(committed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_outputs(committed)
    text = PATH.read_text()
    assert "STEPS = 4" not in text, "the committed run was a shortened one"
    images = [output for _, output in outputs(committed) if "image/png" in output.get("data", {})]
    assert len(images) > 12 and all(output.metadata["image/png"]["alt"] for output in images)
    assert len(text) < 1_500_000
    for debris in ("/home/", "/root/", "/Users/", "/tmp/", "site-packages", "it/s]"):
        assert debris not in text, debris
    longest = max(code, key=lambda cell: len(cell.source.splitlines()))
    assert "class ResidualGuide" in longest.source and len(longest.source.splitlines()) <= 60
    assert sorted(len(cell.source.splitlines()) for cell in code)[-2] <= 21
