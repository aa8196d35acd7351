"""The HTML around a report: one page with its style, tables and figures. Every text is escaped here."""

import html
from collections.abc import Iterable, Sequence

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #222;
  background: #fff; max-width: 62rem; margin: 2rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; padding-top: .9rem; border-top: 1px solid #ddd; }
p, li { max-width: 46rem; } p { margin: .4rem 0; } .note { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .7rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; border-bottom: 1px solid #eee; }
td { white-space: nowrap; }
th { color: #555; font-weight: 600; border-bottom: 1px solid #bbb; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: break-word;
  min-width: 7rem; max-width: 18rem; }
table.dense td { white-space: pre-line; line-height: 1.3; }
table.text th, table.text td { text-align: left; vertical-align: top; }
table.text td { white-space: normal; overflow-wrap: anywhere; }
table.text td:first-child { white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 1rem 2rem; }
figure { margin: .6rem 0; } figcaption { font-weight: 600; font-size: .9rem; }
svg { max-width: 100%; height: auto; display: block; }
pre { background: #f7f7f7; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
summary { cursor: pointer; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document; `title` is text, the sections are markup."""
    name = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading (text) and what follows it (markup)."""
    return f"<h2>{html.escape(title)}</h2>\n{''.join(parts)}\n"


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of text: `note` is small and grey, `lead` is not."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table of texts: `numbers` is aligned right after the first column, `dense` keeps the line breaks
    of its cells, `text` is aligned left."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def figure(caption: str, svg: str) -> str:
    """A figure; the caption is text and may be empty, `svg` is markup."""
    title = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{title}{svg}</figure>"


def side_by_side(figures: Iterable[str]) -> str:
    """Figures (markup) beside each other where the window is wide enough."""
    return f'<div class="figures">{"".join(figures)}</div>'


def collapsible(summary: str, text: str) -> str:
    """Preformatted text under a line that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def html_list(texts: Iterable[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"
