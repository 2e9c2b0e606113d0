"""`python main.py fetch NAME`: download published ImageNet weights into `pretrained/`. Not a method; imports no torch.

* An interrupted download resumes where it stopped (HTTP Range) if its address is the same and the server still has the
  same file (If-Range). The file gets its name only when it is whole and verified.
* Published names contain the first digits of the file's sha256 (resnet50-19c8e357.pth), which are compared.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from utils import files
from utils.errors import UserError, did_you_mean
from utils.options import Parser

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "pretrained"
SOURCE = "https://download.pytorch.org/models/"
FILES = {  # pretrained/README.md lists which of these names are confirmed
    "resnet18": "resnet18-5c106cde.pth",
    "resnet34": "resnet34-333f7ec4.pth",
    "resnet50": "resnet50-19c8e357.pth",
    "resnet101": "resnet101-5d3b4d8f.pth",
    "resnet152": "resnet152-b121ed2d.pth",
    "mobilenetv2": "mobilenet_v2-b0353104.pth",
}

_BLOCK = 1 << 20  # bytes of one read
_ATTEMPTS = 4  # without progress
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 0.5  # seconds before the next attempt, times its number
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}  # the only hosts that may use http


def main(argv: Sequence[str]) -> int:
    """Run the verb on a command line and return its exit code.

    Raises:
        UserError: unknown name, refused address, a server that does not answer, or a file that does not match its name.
    """
    parser = Parser(prog="main.py fetch", description="Download pretrained weights into pretrained/.")
    parser.add_argument("name", metavar="NAME", help=f"a backbone ({', '.join(FILES)}) or, with --url, any file name")
    parser.add_argument("--url", help="address of the file, https only; default: torchvision's")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR", help="target folder (default: pretrained/)")

    args = parser.parse_args(argv)

    name = FILES[args.name] if args.name in FILES else str(args.name)
    if name not in FILES.values():
        # our own names have an address; any other needs one, and must not lead out of the folder
        if not args.url:
            known = f"choose one of {', '.join(FILES)}"
            raise UserError(f"fetch: no known weights called {args.name!r}{did_you_mean(args.name, FILES)}; {known}")
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"fetch: {name!r} is not a plain file name")

    print(f"fetch: {download(args.url or SOURCE + name, args.to / name)}")
    return 0


def download(url: str, target: Path) -> str:
    """Download `url` to `target` unless it exists already; return one line about what was done.

    Args:
        url: https, or http on this machine.
        target: final path. `<target>.part` holds the bytes received so far, and a later call with the same address
            continues it; `<target>.part.json` describes the file that it is a part of.

    Raises:
        UserError: see `main`. A file with the wrong sha256 is removed.
    """
    _check_address(url)
    expected = _hash_in(target.name)
    if target.exists():
        if expected and not files.sha256(target).startswith(expected):
            raise UserError(
                f"fetch: {target} exists, but its sha256 does not begin with {expected}; remove it and fetch again"
            )
        return f"{target} already exists"

    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a part from another address could be another file
        note = _read_note(part)
        if note.get("url") != _hash_of(url) and (note or not expected):  # a part without note is checked by its hash
            _drop(part)

        _receive_with_retries(url, part)
        digest = files.sha256(part)
        if expected and not digest.startswith(expected):
            _drop(part)
            raise UserError(
                f"fetch: the file from {url} has sha256 {digest[:16]}..., not {expected}... as in {target.name}; "
                "nothing was installed"
            )
        # the rename comes last: a file of this name is always whole
        os.replace(part, target)
        _note_of(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"fetch: cannot write {target}: {error.strerror or error}") from error

    checked = f"begins with {expected}, as in its name" if expected else "not checked: the name contains no hash"
    return f"{target} ({target.stat().st_size / 2**20:.1f} MiB, sha256 {digest}, {checked})"


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises if it is not a number
        # a space or line break could end the request line early
        if not url.isascii() or any(letter <= " " for letter in url):
            raise ValueError("letters that an address must write as %XX")
    except ValueError as error:
        raise UserError(f"fetch: {url!r} is not an address ({error})") from error
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    raise UserError(f"fetch: {url}: only https addresses are used (http on this machine only)")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Refuse a redirect that leads away from https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: ANN001, ANN201, D102 (signature of the library)
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive_with_retries(url: str, part: Path) -> None:
    """Fill `part`, from its end; after a broken connection try again, at most _ATTEMPTS times without progress."""
    attempt = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is at least as long as the file: start again
                _drop(part)
            # other codes below 500 will not change with a retry
            elif error.code < 500:
                raise UserError(f"fetch: {url}: the server returned {error.code} {error.reason}; see --url") from error
            reason = f"the server returned {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error))
        except ValueError as error:  # a redirect to something that is not an address
            raise UserError(
                f"fetch: {url}: the server redirects to something that is not an address ({error})"
            ) from error

        # progress resets the count: a slow line may break often
        attempt = 1 if _size(part) > before else attempt + 1
        reached = f"{_size(part) / 2**20:.1f} MiB"
        if attempt >= _ATTEMPTS:
            raise UserError(f"fetch: {url}: {reason}; run the same command again to resume from {reached}")
        print(f"fetch: {reason}; resuming from {reached}", file=sys.stderr)
        time.sleep(_PAUSE * attempt)


def _receive(url: str, part: Path) -> None:
    """Send one request; raise ConnectionError if the connection ends too early, or if the file has changed."""
    have, note = _size(part), _read_note(part)
    request = urllib.request.Request(url, headers=_range_headers(have, note) if have else {})
    opener = urllib.request.build_opener(_SafeRedirects)
    with opener.open(request, timeout=_TIMEOUT) as answer:
        if have and answer.status != 206:  # 206: only the rest is sent; otherwise all of it
            have = 0

        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        # what identifies this version of the file
        now = {
            "url": _hash_of(url),
            "etag": answer.headers.get("ETag"),
            "modified": answer.headers.get("Last-Modified"),
            "size": total,
        }

        if have and not _goes_on(answer.headers.get("Content-Range"), have, note, now):
            _drop(part)
            raise ConnectionError("the file on the server has changed")

        with part.open("ab" if have else "wb") as file:
            if not have:  # written after the old bytes are gone, so that a note never describes them
                _note_of(part).write_text(json.dumps(now) + "\n", encoding="ascii")
            got = _copy(answer, file, have, total)
            file.flush()
            # on the disk before it is verified and renamed
            os.fsync(file.fileno())
    if total is not None and got < total:
        raise ConnectionError(f"the connection ended after {got} of {total} bytes")


def _range_headers(have: int, note: dict[str, Any]) -> dict[str, str]:
    """Ask for the rest of the very same file (RFC 9110, 13.1.5: a weak ETag does not promise equal bytes)."""
    etag, modified = note.get("etag"), note.get("modified")
    strong = etag if isinstance(etag, str) and not etag.startswith("W/") else modified
    return {"Range": f"bytes={have}-"} | ({"If-Range": strong} if isinstance(strong, str) else {})


def _goes_on(content_range: str | None, have: int, note: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return True if a response continues the part, even from a server that ignores If-Range."""
    begins = re.match(r"bytes (\d+)-", content_range or "")
    if begins is not None and int(begins[1]) != have:
        return False
    # headers that one of the two lacks cannot differ
    return all(note.get(key) in (None, now[key]) or now[key] is None for key in ("etag", "modified", "size"))


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_note(part: Path) -> dict[str, Any]:
    """Return the note about a part, or {}; it holds the address as a hash, since that may contain a secret."""
    try:
        note = json.loads(_note_of(part).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _drop(part: Path) -> None:
    """Remove a part, then its note."""
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def _hash_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _copy(source: http.client.HTTPResponse, file: BinaryIO, done: int, total: int | None) -> int:
    """Copy to the end with a progress line; return the size of the file so far."""
    start, begun, shown = done, time.monotonic(), 0.0
    tty = sys.stderr.isatty()
    while block := _read_block(source):
        file.write(block)
        done += len(block)
        now = time.monotonic()
        # a terminal gets a moving line, a log one line every 5 s
        if now - shown >= (0.2 if tty else 5.0) or done == total:
            shown = now
            rate = (done - start) / 2**20 / max(now - begun, 1e-3)
            of = f" of {total / 2**20:.1f} MiB ({100 * done / total:.0f} %)" if total else " MiB"
            line = f"fetch: {done / 2**20:.1f}{of}, {rate:.1f} MiB/s"
            print(f"\r{line}" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)
    if tty:
        print(file=sys.stderr)
    return done


def _read_block(source: http.client.HTTPResponse) -> bytes:
    """Return the next bytes; an OSError of the network becomes a ConnectionError, unlike one of the disk."""
    try:
        return source.read1(_BLOCK)
    except OSError as error:
        raise ConnectionError(str(error)) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash_in(name: str) -> str:
    """Return the 8 or more hexadecimal digits before the ending: `resnet50-19c8e357.pth` -> `19c8e357`."""
    match = re.search(r"-([0-9a-f]{8,64})\.[^.]+$", name)
    return match.group(1) if match else ""
