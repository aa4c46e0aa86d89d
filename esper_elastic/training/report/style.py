"""The style sheet of a report, light and dark.

Owns every colour and size of the page; the drawings have none of their own.
"""

from __future__ import annotations

from ...palette import GRID, HAPPENINGS, INK, QUIET

_LIGHT = {"ink": INK, "quiet": QUIET, "grid": GRID, "page": "#f6f7f9", "card": "#ffffff", "loss": "#d1495b", "evaluated": "#2f6690"}
_DARK = {
    "ink": "#e8eaf0",
    "quiet": "#9aa3b2",
    "grid": "#2c323d",
    "page": "#12151b",
    "card": "#1a1e26",
    "loss": "#ff7d8e",
    "evaluated": "#74b3e8",
}

_RULES = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 0 0 10px }
p { margin: 0 0 8px }
.quiet, caption, .tile span { color: var(--quiet) }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 18px 20px; margin-top: 18px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin-top: 20px }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 16px; overflow-wrap: anywhere }
.tile b { display: block; font-size: 21px; line-height: 1.3; font-variant-numeric: tabular-nums }
.tile span { font-size: 13px; display: block }
.scroll { overflow: auto; max-height: 75vh }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--quiet); font-weight: 600; position: sticky; top: 0; background: var(--card); z-index: 1 }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap }
td.words { overflow-wrap: anywhere; min-width: 170px }
td small { display: block; color: var(--quiet); font-size: 12px; overflow-wrap: anywhere }
.badge { font-weight: 600; white-space: nowrap }
.up { color: var(--refused) } .down { color: var(--grow) }
details summary { cursor: pointer; color: var(--quiet) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; margin: 8px 0 0 }
.choice { display: inline-block; margin: 0 14px 10px 0; color: var(--quiet); font-size: 13.5px; cursor: pointer }
.plot { display: block; width: 100%; height: auto; font-size: 12px }
.strip { display: block; width: 260px; height: 22px }
svg text { fill: var(--ink) }
svg text.tick { fill: var(--quiet) } svg text.label { font-weight: 600; font-size: 13px }
svg .end { text-anchor: end } svg .middle { text-anchor: middle }
svg text.cross { text-anchor: middle; font-size: 20px; font-weight: 700; fill: var(--refused) }
svg text.inside { font-size: 11.5px; pointer-events: none } svg text.inside.deep { fill: var(--card) }
.grid { stroke: var(--grid) } .axis { stroke: var(--quiet) }
.line { fill: none; stroke: var(--mark); stroke-width: 2; stroke-linejoin: round } .faint { stroke-width: 1; opacity: .35 }
.area { fill: var(--mark); opacity: .13 } .dot, .mark { fill: var(--mark) } .mark:hover { stroke: var(--ink) }
.guide { stroke: var(--mark); stroke-dasharray: 4 3; opacity: .5 }
.width { fill: var(--grow) }
.latency { fill: var(--evaluated); opacity: .4 } .median { stroke: var(--ink); stroke-width: 2.5 }
svg text.loss, svg text.evaluated { fill: var(--mark); font-weight: 600 }
@media print { .scroll { max-height: none } .choice { display: none } body { background: none } }
"""

VERDICTS = ("applied", "refused", "rolled back", "restored", "waiting")


def style_sheet() -> str:
    """The whole style sheet."""
    schemes = [{**base, **{name: shades[dark] for name, shades in HAPPENINGS.items()}} for dark, base in enumerate((_LIGHT, _DARK))]
    light, dark = ("; ".join(f"--{name}: {colour}" for name, colour in scheme.items()) for scheme in schemes)
    marks = "\n".join(f".{name} {{ --mark: var(--{name}) }}" for name in ("loss", "evaluated", *HAPPENINGS))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"{marks}\n.rolled-back, .restored {{ --mark: var(--refused) }}\n.waiting, .all {{ --mark: var(--quiet) }}\n"
        f".applied {{ --mark: var(--grow) }}\n.badge {{ color: var(--mark) }}{_RULES}{_filters()}"
    )


def _filters() -> str:
    """A choice of one verdict hides the rows of the others, without a script."""
    names = [verdict.replace(" ", "-") for verdict in VERDICTS]
    return "".join(f".decisions:has(#show-{name}:checked) tbody tr:not(.{name}) {{ display: none }}\n" for name in names)
