"""Build one HTML file from text, tables and pictures: nothing to load, no script; wide content scrolls in its box.

The functions take text, escape it and return HTML; `section` and `document` take HTML.
"""

import base64
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>$title</title>
<style>
body { max-width: 70rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a;
       background: #fff; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; padding-top: .8rem; border-top: 1px solid #ddd }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { max-width: 46rem; margin: .4rem 0 }
.wide { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th { vertical-align: bottom; border-bottom-color: #888 }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; padding-left: 0 }
.failed, .failed td:first-child { color: #a40000; font-weight: 600 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
figure { margin: 0; max-width: 36rem }
img { width: 100%; height: auto }
figcaption { font-size: .9rem; color: #444 }
.note { border-left: 4px solid #b8860b; padding: .2rem .8rem; background: #fdf7e7; margin: 1rem 0; max-width: 46rem }
.note summary { font-weight: 600 }
.note ul { margin: .3rem 0; padding-left: 1.2rem }
dl { margin: .3rem 0 }
dt { font-weight: 600; font-size: .9rem }
dd { margin: 0 0 .5rem; white-space: pre-wrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; font-size: .8rem }
summary { cursor: pointer; margin: .5rem 0 }
</style>
</head>
<body>
$body
</body>
</html>
""")


def document(title: str, body: Iterable[str]) -> str:
    return _PAGE.substitute(title=escape(title), body="\n".join(body))


def section(heading: str, *body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(body) + "\n</section>"


def heading(text: str, level: int = 3) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(title: str, lines: Sequence[str]) -> str:
    """Return a highlighted list; a long one is folded."""
    items = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
    opened = " open" if len(lines) <= 12 else ""
    return f'<details class="note"{opened}><summary>{escape(title)}</summary>{items}</details>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], failed: Sequence[bool] = ()) -> str:
    """Return a table of text; `failed` rows are highlighted."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for i, row in enumerate(rows):
        start = '<tr class="failed">' if i < len(failed) and failed[i] else "<tr>"
        lines.append(start + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Drop the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def figures(pictures: Sequence[tuple[Path, str]]) -> str:
    """Return pictures with their captions, side by side where there is room."""
    shown = []
    for path, caption in pictures:
        code = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{code}">'
        shown.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return '<div class="figures">\n' + "\n".join(shown) + "\n</div>"


def pairs(items: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items) + "</dl>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, *body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(body) + "\n</details>"


def listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def date(stamp: str) -> str:
    return datetime.fromisoformat(stamp).strftime("%d %B %Y, %H:%M UTC")


def ending(text: str, most: int = 80) -> str:
    """Return a text on one line, without its beginning if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"…{line[-most:]}"
