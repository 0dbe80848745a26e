"""The page of a report: the document with its style and script, and the pieces of HTML that its sections are made of.

Whatever comes from rows, answers or settings passes through `text` or html.escape, and none of it gets into the style
or the script. The content security policy permits this style, this script and embedded pictures, and nothing else.
"""

import base64
from hashlib import sha256
from html import escape
from pathlib import Path

from evaluation import charts

FOLDER = Path(__file__).parent
MAX_LETTERS = 300  # of a question or an answer


def document(title: str, head: str, sections: dict[str, str]) -> str:
    """The whole page. `title` is plain text; `head` and the sections are HTML. Empty sections are left out."""
    shown = [(name.replace(" ", "-").lower(), name, body) for name, body in sections.items() if body]
    links = "".join(f'<a href="#{link}">{name}</a>' for link, name, _ in shown)
    main = "\n".join(f'<section id="{link}"><h2>{name}</h2>{body}</section>' for link, name, body in shown)
    style, script = _style(), (FOLDER / "page.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{text(title)}</title><style>{style}</style></head>
<body><header><h1>{text(title)}</h1>{head}</header><nav>{links}</nav>
<main>{main}</main><script>{script}</script></body></html>
"""


def _style() -> str:
    """Dark colours are for screens that ask for them; paper is light."""
    light, dark = ("".join(f"--{k}:{v};" for k, v in colours.items()) for colours in (charts.LIGHT, charts.DARK))
    roots = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{roots}\n{charts.style()}{(FOLDER / 'page.css').read_text(encoding='utf-8')}"


def _hash(source: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(sha256(source.encode()).digest()).decode()


def text(value, limit: int = MAX_LETTERS) -> str:
    """Any value as text for an element or a quoted attribute, cut to `limit` letters."""
    value = str(value)
    return escape(value if len(value) <= limit else value[:limit] + "…")


def percent(mean: dict) -> str:
    """A mean and its interval (see `statistics.mean_with_interval`) in percent."""
    return f"{100 * mean['mean']:.1f}% <small>{100 * mean['low']:.1f} to {100 * mean['high']:.1f}</small>"


def points(difference: dict) -> str:
    """A difference and its interval (see `statistics.difference_with_interval`) in percentage points."""
    low, mean, high = (100 * difference[end] for end in ("low", "mean", "high"))
    return f"{mean:+.1f} <small>{low:+.1f} to {high:+.1f}</small>"


def table(head: list[str], rows: list[list[str]], css_class: str = "") -> str:
    """A table whose cells are HTML, those of `head` plain text that is escaped already. The first cell of a row is its
    heading. A narrow window shows each row as a block, in which the other cells have the head's names before them; a
    confusion table ("heat") scrolls instead."""
    top, body = "".join(f'<th scope="col">{cell}</th>' for cell in head), ""
    for first, *others in rows:
        cells = "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in zip(head[1:], others, strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    top, body = f"<thead><tr>{top}</tr></thead>", f"<tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{css_class}">{top}{body}</table></div>'


def legend(names, marks: str) -> str:
    """The names of series 0 and 1 in their colours, each after its mark."""
    return " &ensp; ".join(f'<b class="k{i}">{marks[i]} {text(name)}</b>' for i, name in enumerate(names))


def grid(intro: str, figures: list[tuple[str, str]]) -> str:
    """Figures of (caption, body) side by side, below a sentence; nothing where there are none."""
    body = "".join(f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>" for caption, drawing in figures)
    return f'<p>{intro}</p><div class="grid">{body}</div>' if figures else ""
