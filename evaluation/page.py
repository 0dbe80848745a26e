"""The pieces of a report's page: text, tables, small drawings, and the document with its style and script.

Whatever comes from rows, answers or settings passes through `text` or html.escape, and none of it stands inside the
style or the script. The content security policy permits the page's own style and script and embedded pictures only.
"""

import base64
import math
import re
from hashlib import sha256
from html import escape

LETTERS = 300  # of a question or an answer, at most


def document(title: str, head: str, sections: dict[str, str]) -> str:
    """The whole page. `title` is plain text; `head` and the bodies of `sections` are HTML, an empty one is left out."""
    shown = [(name.replace(" ", "-").lower(), name, body) for name, body in sections.items() if body]
    links = "".join(f'<a href="#{link}">{name}</a>' for link, name, _ in shown)
    main = "\n".join(f'<section id="{link}"><h2>{name}</h2>{body}</section>' for link, name, body in shown)
    style, script = (base64.b64encode(sha256(part.encode()).digest()).decode() for part in (CSS, JS))
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{text(title)}</title><style>{CSS}</style></head>
<body><header><h1>{text(title)}</h1>{head}</header><nav>{links}</nav>
<main>{main}</main><script>{JS}</script></body></html>
"""


def text(value, most: int = LETTERS) -> str:
    """Anything as text for an element or a quoted attribute, cut to `most` letters."""
    value = str(value)
    return escape(value if len(value) <= most else value[:most] + "…")


def percent(found: dict) -> str:
    return f"{100 * found['mean']:.1f}% <small>{100 * found['low']:.1f} to {100 * found['high']:.1f}</small>"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th><td>{"</td><td>".join(row[1:])}</td></tr>' for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def legend(names, marks: str) -> str:
    return " &ensp; ".join(f'<b class="k{i}">{marks[i]} {text(name)}</b>' for i, name in enumerate(names))


def grid(told: str, figures: list[tuple[str, str]]) -> str:
    """Figures of (caption, body) side by side under a sentence; nothing where there is none."""
    body = "".join(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>" for caption, drawn in figures)
    return f'<p>{told}</p><div class="grid">{body}</div>' if figures else ""


def bars(found: list[dict]) -> str:
    """Means and their intervals from 0 to 100%, a line for each kind; the numbers stand beside it."""
    height = 12 * len(found)
    marks = f'<path class="rule" d="M0 0V{height}m80 0V0m80 0V{height}"/>'
    for i, one in enumerate(found):
        low, mean, high = (round(160 * one[end], 1) for end in ("low", "mean", "high"))
        shape = f'<path d="M{mean - 2} {12 * i + 4}h4v4h-4z"/>' if i else f'<circle cx="{mean}" cy="6" r="2"/>'
        marks += f'<g class="k{i}"><path class="span" d="M{low} {12 * i + 1}H{high}v10H{low}z"/>{shape}</g>'
    box = f'viewBox="-4 0 168 {height}" width="168" height="{height}"'
    return f'<svg class="bars" {box} aria-hidden="true">{marks}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, that enclose a range."""
    rough = (high - low or abs(high) or 1) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(first + 1, last) + 1)]


def along(axis: list[float], value: float, start: float, end: float) -> float:
    """Where a value stands on an axis that is drawn from `start` to `end`."""
    return round(start + (end - start) * (value - axis[0]) / (axis[-1] - axis[0]), 1)


def plot(xs: list[float], ys: list[float], x_name: str, said: str, drawn: str) -> str:
    """What is `drawn`, in axes with numbers: x from 50 to 390, y from 190 up to 24. `said` is the alternative text."""
    for y in ys:
        place = along(ys, y, 190, 24)
        number = f'<text x="44" y="{place + 4}" text-anchor="end">{y:,g}</text>'
        drawn = f'<path class="rule" d="M50 {place}H390"/>{number}' + drawn
    for x in xs:
        drawn += f'<text x="{along(xs, x, 50, 390)}" y="208" text-anchor="middle">{x:,g}</text>'
    drawn += f'<text x="220" y="230" text-anchor="middle">{x_name}</text>'
    return f'<svg viewBox="0 0 412 236" role="img" aria-label="{text(said, 2000)}">{drawn}</svg>'


def sheet(figures: list[tuple[list[str], str]]) -> str:
    """Plots under the names of their lines, side by side in one SVG file that needs no page around it."""
    shown = ""
    for number, (names, drawn) in enumerate(figures):
        told = (f'<tspan class="k{i}" dx="{8 * i}">{"—●"[i]} {text(name)}</tspan>' for i, name in enumerate(names))
        told = f'<text x="50" y="20">{"".join(told)}</text>'
        plotted = f'<svg y="24" width="412" height="236">{drawn}</svg>'
        shown += f'<svg x="{420 * number}" width="412" height="260">{told}{plotted}</svg>'
    box = f'viewBox="0 0 {420 * len(figures)} 264" width="{420 * len(figures)}" height="264"'
    style = f"{painted(LIGHT)}@media (prefers-color-scheme:dark){{{painted(DARK)}}}"
    paper = '<rect class="paper" width="100%" height="100%"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{style}</style>{paper}\n{shown}</svg>\n'


def painted(colours: str) -> str:
    """A lone drawing's style with its colours written out: not every viewer of SVG files knows CSS variables."""
    known = dict(one.removeprefix("--").split(":") for one in colours.split(";"))
    rules = DRAWN + ".paper{fill:var(--bg)}svg{font-family:system-ui,sans-serif}tspan{stroke:none!important}"
    return re.sub(r"var\(--(\w+)\)", lambda found: known[found[1]], rules)


# ------------------------------------------------------------------------------------------------------ style, script

LIGHT = "--fg:#1b1f24;--dim:#59636e;--bg:#fff;--card:#f5f7f9;--line:#d4dae0;--a:#0072b2;--b:#b35900"
DARK = "--fg:#e6edf3;--dim:#9aa5b1;--bg:#101418;--card:#191f26;--line:#343d48;--a:#56b4e9;--b:#e69f00"
DRAWN = """\
.k0{color:var(--a);stroke:var(--a);fill:var(--a)}.k1{color:var(--b);stroke:var(--b);fill:var(--b)}
.k0,.k1{stroke-width:1.4}polyline{fill:none!important}svg text{fill:var(--dim);font-size:13px}
.rule{stroke:var(--line);fill:none}.dashed{stroke:var(--dim);stroke-dasharray:4 4;fill:none}
"""

CSS = """
:root{LIGHT}
@media screen and (prefers-color-scheme:dark){
:root{DARK}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{margin:0 auto;max-width:1120px;padding:16px;font:15px/1.45 system-ui,sans-serif;color:var(--fg);
background:var(--bg);print-color-adjust:exact;-webkit-print-color-adjust:exact;-webkit-text-size-adjust:100%}
h1,h2,h3,p,dd,pre,figcaption,summary,tbody th,.texts td{overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.4em 0}h3{font-size:1em;margin:.5em 0}
h2{font-size:1.2rem;margin:2.2em 0 .4em;padding-top:.4em;border-top:1px solid var(--line)}
a{color:inherit;text-decoration-color:var(--dim)}small,.dim{color:var(--dim);font-size:.85em}
.big{font-size:2rem;margin:.2em 0 .5em}.big small{font-size:1rem}dl,dd,figure{margin:0}dt{color:var(--dim)}
header dl{display:flex;flex-wrap:wrap;gap:8px}header dl div{background:var(--card);border-radius:6px;padding:6px 12px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:16px}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--line)}td{white-space:nowrap}
th:first-child,.texts *{text-align:left}tbody th{font-weight:400;min-width:8em}
thead th{color:var(--dim);font-weight:500;vertical-align:bottom}
.texts td{white-space:normal;min-width:8em}.texts *{vertical-align:top}.texts tbody th{overflow-wrap:break-word}
DRAWN.bars{vertical-align:middle}svg .count{fill:var(--fg);font-size:12px}.span{opacity:.35;stroke:none}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:24px}
.grid svg{width:100%;max-width:440px}figcaption{margin-bottom:6px}figure{min-width:0;break-inside:avoid}
.heat th,.heat td{padding:1px;border:0;font-size:.87em;text-align:center}
.heat tbody th{min-width:6em;max-width:11em;text-align:left;padding-right:6px;overflow-wrap:break-word}
.tall thead th+th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;max-height:12em;padding:2px .9em}
.heat i{display:block;min-width:2.6em;min-height:2em;padding:3px;font-style:normal;border:2px solid transparent}
HEAT.h9,.h10{color:#fff}.heat .hit{border-color:var(--fg)}.right{color:var(--a)}.wrong{color:var(--b)}
summary{cursor:pointer;padding:4px 0}pre{white-space:pre-wrap;background:var(--card);padding:12px}
form{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:12px 0}
select,input{font:inherit;padding:4px 8px;max-width:100%;color:inherit;background:var(--bg);border:1px solid var(--dim)}
.store{position:absolute;width:0;height:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,230px),1fr));gap:12px}
article{background:var(--card);border-radius:6px;border-top:4px solid var(--a);padding:10px;break-inside:avoid}
article.wrong{border-top-style:double;border-color:var(--b)}article.right,article.wrong{color:var(--fg)}
article div{display:flex;gap:4px}article svg,.gone{flex:1;min-width:0;height:170px;margin:0}
.gone{display:grid;place-items:center;background:var(--line);color:var(--dim);padding:8px;text-align:center}
article dl{display:grid;grid-template-columns:auto 1fr;gap:0 8px}article .dim{margin:.5em 0 0}
@media (max-width:600px){th,td{padding:4px}td small{display:block}.bars{width:90px;height:auto}.big{font-size:1.6rem}}
@media print{nav,form{display:none!important}body{max-width:none;padding:0;font-size:11px}h2,p{break-after:avoid}
.cards{grid-template-columns:repeat(4,minmax(0,1fr))}.wide{overflow:visible}}
""".replace("HEAT", "".join(f".h{n}{{background:rgb(0 114 178/{n}0%)}}" for n in range(1, 11)))
CSS = CSS.replace("LIGHT", LIGHT).replace("DARK", DARK).replace("DRAWN", DRAWN)

JS = """
const form = document.forms[0], wanted = form.elements, cards = [...document.querySelectorAll('article')];
const plain = text => text.replace(/\\s+/g, ' ').trim().toLowerCase();
const texts = cards.map(card => plain(card.textContent));
function apply() {
  const sought = plain(wanted.q.value);
  cards.forEach((card, i) => {
    const fits = name => !wanted[name].value || card.dataset[name] === wanted[name].value;
    card.hidden = !fits('type') || !fits('answer') || !texts[i].includes(sought);
  });
  form.querySelector('output').textContent = cards.filter(card => !card.hidden).length + ' shown';
}
function follow() {
  if (location.hash && !location.hash.includes('=')) return;  // a section
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of ['type', 'answer', 'q']) wanted[name].value = state.get(name) || '';
  apply();
  if (location.hash) document.getElementById('pictures').scrollIntoView();
}
form.hidden = false;
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('input', () => {
  const state = [...new FormData(form)].filter(([, value]) => value);
  history.replaceState(null, '', '#' + new URLSearchParams(state));
  apply();
});
addEventListener('hashchange', follow);
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(part => { part.open = true; }));
follow();
"""
