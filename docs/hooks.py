"""Add the figures and files outside of docs/ to the site, where the pages link to them."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))


def on_files(files, config):
    for path in FIGURES:
        files.append(File.generated(config, f"figures/benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("../benchmarks/results/", "figures/benchmarks/")
