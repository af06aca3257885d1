"""One HTML file that needs no other: style and charts are inside, there is no script."""

from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f5f7f9; --ink: #1b2733; --soft: #566472; --line: #d9dfe5;
  --mark: #2f86c9; --warm: #d5702a; }
@media (prefers-color-scheme: dark) { :root { --back: #12171d; --card: #1a2129; --ink: #e4e9ee; --soft: #9aa8b5;
  --line: #313b46; --mark: #5aa9e3; --warm: #e88f52; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 34px 24px 72px; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { font-size: 27px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 46px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
p.caption { margin: 4px 0 14px; color: var(--soft); max-width: 84ch; }
nav { margin: 20px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
a { color: var(--mark); text-decoration: none; }
a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px; margin: 24px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 15px; }
.card b { display: block; font-size: 21px; line-height: 1.3; font-weight: 620; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 550; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
details { margin: 12px 0 0; }
summary { cursor: pointer; color: var(--mark); font-size: 14px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 15px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.answer { border-left: 4px solid var(--warm); background: var(--card); border-radius: 0 8px 8px 0;
  padding: 12px 16px; margin: 14px 0; font-size: 17px; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p>$subtitle</p>
</header>
$cards
<nav>$contents</nav>
$sections
</main>
</body>
</html>
"""
)


class Section(NamedTuple):
    """A heading, a caption (text) and a body (HTML); `name` is its anchor."""

    name: str
    title: str
    caption: str
    body: str


def page(title: str, subtitle: str, cards: Sequence[tuple[str, str]], sections: Iterable[Section]) -> str:
    """Returns the page; `cards` are (value, name) of each number at the top."""
    listed = list(sections)
    numbers = (f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards)
    return _PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        style=_STYLE,
        cards=f'<div class="cards">{"".join(numbers)}</div>',
        contents="".join(f'<a href="#{each.name}">{escape(each.title)}</a>' for each in listed),
        sections="\n".join(map(_section, listed)),
    )


def _section(section: Section) -> str:
    caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n{caption}\n{section.body}\n</section>'


def callout(text: str) -> str:
    """Returns a sentence set apart."""
    return f'<p class="answer">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Returns a table of text cells; the last `numbers` columns are aligned to the right."""
    attributes = [""] * (len(header) - numbers) + [' class="number"'] * numbers

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}{a}>{escape(cell)}</{tag}>" for a, cell in zip(attributes, cells, strict=True))
        return f"<tr>{inside}</tr>"

    head = f"<thead>{line(header, 'th')}</thead>" if any(header) else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def folded(summary: str, body: str) -> str:
    """Returns HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    """Returns text unchanged, in a fixed-width font."""
    return f"<pre>{escape(text)}</pre>"
