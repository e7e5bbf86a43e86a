"""What README says of the files, and what it links to, is so."""

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_it_is_one_screen():
    assert len(README.split()) <= 900


def test_the_files_are_about_as_long_as_it_says():
    rows = re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \|", README, re.M)
    assert len(rows) > 8
    for name, lines in rows:
        files = sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name]
        actual = sum(len(file.read_text().splitlines()) for file in files)
        assert actual == pytest.approx(int(lines.replace(",", "")), rel=0.15), name


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target
