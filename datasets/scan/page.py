"""Render the page of a scan: one HTML file without scripts. All data is escaped, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.files import Row

_NUMBERS = ("label", "videos", "bad")  # columns that hold numbers
_ROWS = 500  # of one table, so that browsers stay fast; scan.json has all
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a7fb5; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .3rem 0; } .quiet { opacity: .7; } .bad { color: var(--bad); font-weight: 600; }
ul.numbers { display: flex; flex-wrap: wrap; gap: .6rem 2rem; list-style: none; padding: 0; margin: .8rem 0; }
ul.numbers b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } figure { margin: .4rem 0; } figcaption { font-size: .85rem; }
svg { display: block; } rect { fill: var(--bar); } rect.bad { fill: var(--bad); }
.wide { overflow-x: auto; max-height: 28rem; overflow-y: auto; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .15rem .6rem; vertical-align: top; }
th { position: sticky; top: 0; background: Canvas; } tr + tr td { border-top: 1px solid var(--line); }
td.n, th.n { width: 1%; text-align: right; font-variant-numeric: tabular-nums; }
td.path { overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
"""


def render(summary: Row) -> str:
    """Return the page for the summary of `scan_results.write`."""
    # The policy allows this one style sheet by its hash, and nothing else: no script in a file name can run.
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"

    lists: Sequence[Row] = summary["lists"]
    names = ", ".join(Path(part["list"]).name for part in lists)
    level = {"header": "frames counted", "ends": "first, middle and last frame decoded", "all": "every frame decoded"}
    body = [f"<h1>{_text(names)}</h1>", f'<p class="quiet">{level[summary["decode"]]}, {summary["seconds"]} s</p>']
    body += [_same(summary["same"])] if summary["same"] else []
    body += [_list(part) for part in lists]

    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(names)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _list(part: Row) -> str:
    # All lists have the same numbers in the same order, so that pages can be compared.
    numbers = [
        (part["videos"], "in the list"),
        (part["good"], "can be read"),
        (len(part["bad"]), "bad"),
        (len(part["shorter"]), "shorter"),
        (len(part["wrong_counts"]), "wrong frame counts"),
        (part["repeated"], "repeated lines"),
        (part["variable_rate"], "variable frame rate"),
        (part["rotated"], "rotated by the header"),
    ]
    items = "".join(f"<li><b>{number:,}</b>{what}</li>" for number, what in numbers)

    figures = [
        _histogram("frames", part["frames"]),
        _histogram("seconds", part["seconds"]),
        _histogram("frames/s", part["fps"]),
    ]
    tables = [
        _counts("Kinds", part["kinds"]),
        _counts("Sizes", part["sizes"]),
        _counts("Codecs", part["codecs"]),
        _counts("Containers", part["formats"]),
        _counts("Reasons", part["reasons"]),
    ]

    return "\n".join(
        [
            f"<section><h2>{_text(part['list'])}</h2>",
            f'<p class="quiet">root {_text(part["root"])}, sha256 {_text(part["sha256"][:12])}</p>',
            f'<ul class="numbers">{items}</ul>',
            f'<div class="row">{"".join(figures)}</div>',
            _files("Bad files", part["bad"]),
            _files("Shorter: the last frames do not decode", part["shorter"]),
            _files("Wrong frame counts", part["wrong_counts"]),
            _files("Remarks", part["notes"]),
            f'<div class="row">{"".join(tables)}</div>',
            _classes(part["classes"]),
            "</section>",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[str], total: int) -> str:
    more = f'<p class="quiet">{total - _ROWS:,} more in scan.json</p>' if total > _ROWS else ""
    columns = "".join(f'<th class="{"n" if name in _NUMBERS else ""}">{name}</th>' for name in head)
    return f'<div class="wide"><table><tr>{columns}</tr>{"".join(rows)}</table></div>{more}'


def _files(title: str, files: Sequence[Row]) -> str:
    if not files:
        return ""

    rows = (
        f'<tr><td class="path">{_text(one["path"])}</td><td class="n">{one["label"]}</td>'
        f"<td>{_text(one['what'])}</td></tr>"
        for one in files[:_ROWS]
    )

    return f"<h3>{title} ({len(files):,})</h3>" + _table(("file", "label", "what"), rows, len(files))


def _counts(title: str, counts: dict[str, int]) -> str:
    if not counts:
        return ""
    rows = (
        f'<tr><td class="n">{count:,}</td><td>{_text(name)}</td></tr>' for name, count in list(counts.items())[:_ROWS]
    )
    return f"<div><h3>{title}</h3>" + _table(("videos", ""), rows, len(counts)) + "</div>"


def _same(groups: Sequence[Row]) -> str:
    # First the groups that spoil an accuracy: across lists, then with different labels.
    ordered = sorted(groups, key=lambda group: (not group["across"], not group["labels_differ"]))
    rows = []

    for group in ordered[:_ROWS]:
        where = '<span class="bad">across lists</span>' if group["across"] else "one list"
        where += ', <span class="bad">labels differ</span>' if group["labels_differ"] else ""
        # A group may hold thousands of files: 20 are enough to see the pattern.
        files = "<br>".join(
            f"{_text(Path(one['list']).name)}: {_text(one['path'])} ({one['label']})" for one in group["members"][:20]
        )
        rows.append(f'<tr><td>{where}</td><td>same {group["how"]}</td><td class="path">{files}</td></tr>')

    across = sum(group["across"] for group in groups)
    sentence = f"<p>{len(groups):,} groups of files hold the same video, {across:,} of them across lists.</p>"
    return f"<h2>The same video more than once</h2>{sentence}" + _table(("where", "how", "files"), rows, len(groups))


def _classes(classes: Sequence[Row]) -> str:
    most = max((row["videos"] for row in classes), default=0) or 1
    rows = []
    for row in classes[:_ROWS]:
        # Bars are 200 pixels wide for the class with most videos: readable ones first, then bad ones.
        good = 200 * (row["videos"] - row["bad"]) / most
        bar = f'<svg width="204" height="12"><rect width="{good:.1f}" height="12"/>'
        bar += f'<rect class="bad" x="{good:.1f}" width="{200 * row["bad"] / most:.1f}" height="12"/></svg>'
        none = "" if row["videos"] > row["bad"] else ' <span class="bad">no readable video</span>'
        rows.append(
            f'<tr><td class="n">{row["label"]}</td><td>{_text(row["name"])}{none}</td>'
            f'<td class="n">{row["videos"]:,}</td><td class="n">{row["bad"]:,}</td><td>{bar}</td></tr>'
        )

    return f"<h3>Classes ({len(classes):,})</h3>" + _table(("label", "name", "videos", "bad", ""), rows, len(classes))


def _histogram(what: str, spread: Row) -> str:
    bins = spread["bins"]
    if not bins:
        return ""

    # 240 pixels for all bins, 70 pixels for the fullest one.
    most, width = max(bins), 240 / len(bins)
    high = [70 * count / most for count in bins]
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{70 - high[i]:.1f}" width="{width - 1:.1f}" height="{high[i]:.1f}">'
        f"<title>{spread['from'] + i * spread['step']:.5g} and more: {count:,}</title></rect>"
        for i, count in enumerate(bins)
    )

    caption = f"{what}: {spread['least']:g} to {spread['most']:g}, median {spread['median']:g}"
    return (
        f'<figure><svg width="240" height="72" role="img" aria-label="{_text(caption)}">{bars}</svg>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )
