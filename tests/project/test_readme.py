"""The README's Python blocks run as printed, and the links of all pages lead to existing files."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].isfinite() and names["loss"] > 0
    for name in ("hidden", "weight"):
        gradient = names[name].grad
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert not names["hidden"].grad[:, :9].any(), "rows of the prompt have no gradient"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name} links to {target}"


def test_citation_names_the_paper():
    assert "2402.00856" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
