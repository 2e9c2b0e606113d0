"""Build one HTML file from the style, the scripts and the data; it loads nothing and runs nothing from elsewhere.

The policy names the sha256 of the only style and the only script, so nothing else can run, whether it comes from a name
in the data or from a file next to the page. `'self'` is for pictures and clips on a web server; a page opened from disk
has the origin `file:`. `require-trusted-types-for` makes the browser refuse HTML that the script builds from text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# One scope: each file may use what those before it define.
SCRIPTS = ("dom", "data", "charts", "videos", "matrix", "summary", "errors", "lists", "comparison", "app")
# Key of a section: its title
SECTIONS = {
    "summary": "Summary",
    "matrix": "Confusion matrix",
    "errors": "Errors",
    "classes": "Classes",
    "videos": "Videos",
    "labels": "Label errors",
    "compare": "Comparison",
}


def render(
    *,
    title: str,
    protocol: str,
    headline: Sequence[tuple[str, str]],
    footer: str,
    sections: Sequence[str],
    blocks: Mapping[str, object],
) -> str:
    """Return the page as HTML.

    Args:
        title: heading.
        protocol: the line below it.
        headline: (number, description) pairs.
        footer: last line.
        sections: keys of SECTIONS, in the order of the links.
        blocks: id -> plain values, as JSON in the page.
    """
    # All files in one function, so that no name is global
    script = "(() => {\n'use strict';\n" + "\n".join(_read(f"js/{name}.js") for name in SCRIPTS) + "})();"
    style = _read("style.css")
    template = string.Template(_read("page.html"))
    # Every text from outside passes through html.escape or as_json
    return template.substitute(
        policy=html.escape(policy(style, script), quote=True),
        style=style,
        script=script,
        title=html.escape(title),
        protocol=html.escape(protocol),
        headline="".join(
            f"<li><b>{html.escape(number)}</b><span>{html.escape(what)}</span></li>" for number, what in headline
        ),
        links="".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name in sections),
        footer=html.escape(footer),
        blocks="\n".join(
            f'<script type="application/json" id="{key}">{as_json(v)}</script>' for key, v in blocks.items()
        ),
    )


def policy(style: str, script: str) -> str:
    """Return the content security policy of a page with this style and this script."""
    parts = {
        "default-src": "'none'",
        "script-src": f"'{_sha256(script)}'",
        "style-src": f"'{_sha256(style)}'",
        "img-src": "'self' file:",
        "media-src": "'self' file:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def as_json(values: object) -> str:
    """Return JSON for a script element: ASCII, and no character that has a meaning in HTML."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def words(values: np.ndarray) -> str:
    """Return an array of 16-bit numbers as base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u2").tobytes()).decode("ascii")


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
