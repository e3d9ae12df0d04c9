"""Add the README, as the overview, and the figures outside of docs/ to the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))


def on_files(files, config):
    for path in FIGURES:
        files.append(File.generated(config, f"figures/benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8").replace("](benchmarks/", "](../benchmarks/")
        markdown = markdown.replace("](docs/", "](")
        # the site has no page for a file of the repository, such as constraints.txt
        markdown = re.sub(r"\[([^]]*)\]\((?!http|\.\./|#)(?![\w/-]+\.(?:md|png))[^)]*\)", r"\1", markdown)
    return markdown.replace("../benchmarks/results/", "figures/benchmarks/")
