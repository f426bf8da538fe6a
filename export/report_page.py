"""The page of a bundle: one file of HTML with its style and drawings inside, which loads nothing and runs nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.export.replacing import scratch_folder
from diffusionblocks.export.report import Report, gather
from diffusionblocks.runtime import manifest as manifests
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

log = logging.getLogger(__name__)

NAME = "report.html"
UNUSUAL = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What is raised where a manifest says something in another way than the page knows."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1d1f23; --soft: #5d636e; --edge: #d8dbe0; --card: #ffffff;
  --c0: #1f6fb2; --c1: #c2571a; --c2: #2e8540; --c3: #8a4fbf; --c4: #b3261e; --c5: #7a6a00; --c6: #00808a; --c7: #555b66; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --ink: #e9eaec; --soft: #a2a8b3; --edge: #363b44; --card: #1d2026;
  --c0: #6cb2ee; --c1: #f0965a; --c2: #74c987; --c3: #c39bea; --c4: #f28b82; --c5: #d8c65a; --c6: #5ccad3; --c7: #b4bac5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .note { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0; }
dl div { background: var(--card); border: 1px solid var(--edge); border-radius: .4rem; padding: .4rem .6rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.trunk { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; padding: 0; margin: .5rem 0; }
.trunk > li { flex: 1 1 11rem; background: var(--card); border: 1px solid var(--edge); border-top: .3rem solid var(--c7); border-radius: .4rem; padding: .5rem .6rem; }
.trunk > li > b { display: block; } .trunk small { display: block; color: var(--soft); } .trunk ul { margin: .3rem 0 0; padding: 0; list-style: none; font-size: .8rem; color: var(--soft); }
.trunk .k0 { border-top-color: var(--c0); } .trunk .k1 { border-top-color: var(--c1); } .trunk .k2 { border-top-color: var(--c2); } .trunk .k3 { border-top-color: var(--c3); }
.trunk .k4 { border-top-color: var(--c4); } .trunk .k5 { border-top-color: var(--c5); } .trunk .k6 { border-top-color: var(--c6); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 0 1rem; } .charts section { min-width: 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: .4rem; padding: .5rem; }
.chart { display: block; width: 100%; height: auto; } .chart text { fill: var(--ink); font-size: 13px; } .chart .tick { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--edge); stroke-width: 1; } .line { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { opacity: .14; }
.line.k0 { stroke: var(--c0); } .line.k1 { stroke: var(--c1); } .line.k2 { stroke: var(--c2); } .line.k3 { stroke: var(--c3); }
.line.k4 { stroke: var(--c4); } .line.k5 { stroke: var(--c5); } .line.k6 { stroke: var(--c6); } .line.k7 { stroke: var(--c7); }
.band.k0, .mark.k0 { fill: var(--c0); } .band.k1, .mark.k1 { fill: var(--c1); } .band.k2, .mark.k2 { fill: var(--c2); } .band.k3, .mark.k3 { fill: var(--c3); }
.band.k4, .mark.k4 { fill: var(--c4); } .band.k5, .mark.k5 { fill: var(--c5); } .band.k6, .mark.k6 { fill: var(--c6); } .band.k7, .mark.k7 { fill: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .3rem 0 0; list-style: none; font-size: .85rem; }
.legend span { display: inline-block; width: 1.6rem; border-top: .2rem solid; vertical-align: middle; margin-right: .35rem; } .legend .dashed { border-top-style: dashed; }
.legend .k0 { color: var(--c0); } .legend .k1 { color: var(--c1); } .legend .k2 { color: var(--c2); } .legend .k3 { color: var(--c3); }
.legend .k4 { color: var(--c4); } .legend .k5 { color: var(--c5); } .legend .k6 { color: var(--c6); } .legend .k7 { color: var(--c7); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85rem; overflow-wrap: break-word; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid var(--edge); } td { font-variant-numeric: tabular-nums; min-width: 5rem; } td:last-child { min-width: 11rem; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 500; }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #333; --edge: #bbb; } body { max-width: none; padding: 0; font-size: 11pt; }
  figure, .trunk > li, tr { break-inside: avoid; } h2 { break-after: avoid; } .scroll { overflow: visible; } table { overflow-wrap: anywhere; } td, td:last-child { min-width: 0; } }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ report.title }} - DiffusionBlocks</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ report.title }}</h1>
<p class="note">Converted to DiffusionBlocks: a network in the memory of one block.</p>
</header>
<main>
<dl>
{%- for name, value in report.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
<section id="trunk">
<h2>The trunk</h2>
<ol class="trunk">
{%- for box in report.trunk %}
<li{% if box.kind >= 0 %} class="k{{ box.kind % 7 }}"{% endif %}><b>{{ box.name }}</b>
{%- for line in box.lines %}<small>{{ line }}</small>{% endfor %}
{%- if box.units %}<ul>{% for unit in box.units %}<li>{{ unit }}</li>{% endfor %}{% if box.more %}<li>and {{ box.more }} more</li>{% endif %}</ul>{% endif %}</li>
{%- endfor %}
</ol>
</section>
<div class="charts">
{%- for figure in report.figures %}
<section id="{{ figure.name }}">
<h2>{{ figure.title }}</h2>
{%- if figure.chart %}
<figure>
{{ svg(figure) }}
{%- if figure.chart.legend %}
<ul class="legend">
{%- for name, kind, dashed in figure.chart.legend %}
<li><span class="k{{ kind % 8 }}{{ ' dashed' if dashed }}"></span>{{ name }}</li>
{%- endfor %}
</ul>
{%- endif %}
</figure>
{%- endif %}
{%- if figure.note %}
<p class="note">{{ figure.note }}</p>
{%- endif %}
</section>
{%- endfor %}
</div>
{%- for table in report.tables %}
<section id="{{ table.name }}">
<h2>{{ table.title }}</h2>
{%- if table.rows %}
<div class="scroll"><table>
<thead><tr>{% for cell in table.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in table.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endif %}
{%- if table.note %}
<p class="note">{{ table.note }}</p>
{%- endif %}
</section>
{%- endfor %}
</main>
</body>
</html>
"""


def page(report: Report) -> str:
    """The page as text; every name and value is escaped."""

    def svg(figure: Any) -> Markup:
        return Markup(figure.chart.svg(figure.name))

    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(report=report, style=Markup(STYLE), svg=svg)


def add_page(folder: Path, checks: Sequence[Mapping[str, Any]] | None = None, name: str | None = None) -> None:
    """Write a bundle's page into it; a bundle that cannot be shown is whole without one, which is said.

    A bundle that has its name already never holds a part of a page: it is written beside the bundle, where the next export clears what a killed process left, and moved in.
    ``name``: see :func:`report.gather`; given where the folder is still being made.

    Raises:
        OSError: it cannot be written.
    """
    try:
        made = gather(folder, manifests.read(folder), checks, name=name)
        text = page(made)
    except UNUSUAL as error:
        log.warning("no page for %s: %r", folder, error)
        return
    _write(text, folder / NAME, scratch_beside=folder if name is None else None)


def write_page(report: Report, path: Path) -> None:
    """Write the page under another name, then rename it.

    Raises:
        OSError: it cannot be written.
    """
    _write(page(report), path)


def _write(text: str, path: Path, scratch_beside: Path | None = None) -> None:
    place = path.parent if scratch_beside is None else scratch_folder(scratch_beside)
    partial = place / f"{path.name}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        if scratch_beside is not None:
            place.rmdir()
