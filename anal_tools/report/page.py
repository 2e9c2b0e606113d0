"""One HTML file out of the style, the scripts and the data: nothing is loaded from elsewhere, nothing foreign can run.

The policy names the sha256 of the one style and the one script, so that no other can run: not from a name in the data,
not from a file beside the page. `'self'` is for pictures and clips on a web server; opened from disk the page has the
origin `file:`. `require-trusted-types-for` makes the browser refuse HTML made of text by the script itself.
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
    """The page.

    Args:
        title: heading.
        protocol: one line under it.
        headline: (number, what it is).
        footer: last line.
        sections: keys of SECTIONS, in the order of the links.
        blocks: id -> plain values, as JSON in the page.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_read(f"js/{name}.js") for name in SCRIPTS) + "})();"
    style = _read("style.css")
    template = string.Template(_read("page.html"))
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
    """The content security policy of a page with this style and this script."""
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
    """JSON that can stand in a script element: ASCII, and no character that HTML gives a meaning to."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def words(values: np.ndarray) -> str:
    """An array of 16-bit numbers as base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u2").tobytes()).decode("ascii")


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
