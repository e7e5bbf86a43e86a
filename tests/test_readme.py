"""What README and docs link to, and the commands that they show, exist."""

import re

import pytest
from conftest import ROOT

from training.options import make_parser


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_and_commands(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target
    for script, flags in re.findall(r"(?:python|torchrun[^\n]*?) ([\w/]+\.py)([^\n#`|>]*)", text):
        assert (ROOT / script).exists(), script
        if script == "main.py":
            known = {name for action in make_parser()._actions for name in action.option_strings}
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", flags)) <= known, flags
