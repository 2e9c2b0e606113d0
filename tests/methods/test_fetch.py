"""`python main.py fetch` against a real HTTP server on this machine: resume, cut connections, wrong content."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from methods import fetch
from utils.errors import UserError

CONTENT = bytes(range(256)) * 12_000  # 3 MB
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Server(ThreadingHTTPServer):
    """Serves its content at any path, with ranges and an ETag."""

    content = CONTENT
    etag = '"first"'
    if_range = True  # whether it heeds If-Range
    fail_after_cut = False  # answer 503 once no answer is left to cut

    cut_after: list[int]  # bytes after which the next answers end early
    fail_with: list[int]  # status codes of the next answers
    ranges: bool
    asked: list[str]  # the Range header of each request


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]  # the only one that has this handler

    def do_GET(self) -> None:
        byte_range = self.headers.get("Range", "")
        self.server.asked.append(byte_range)
        if self.server.fail_after_cut and not self.server.cut_after:
            self.send_error(503)
            return
        if self.server.fail_with:
            self.send_error(self.server.fail_with.pop(0))
            return
        if self.path.startswith("/elsewhere"):
            self.send_response(302)
            self.send_header("Location", "http://example.invalid/x")
            self.end_headers()
            return
        match = re.fullmatch(r"bytes=(\d+)-", byte_range) if self.server.ranges else None
        if self.server.if_range and self.headers.get("If-Range", self.server.etag) != self.server.etag:
            match = None
        content = self.server.content
        start = int(match.group(1)) if match else 0
        if match and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        end = start + self.server.cut_after.pop(0) if self.server.cut_after else None
        self.wfile.write(content[start:end])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "_PAUSE", 0.0)
    served = Server(("127.0.0.1", 0), Handler)
    served.cut_after, served.fail_with, served.ranges, served.asked = [], [], True, []
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def address(server: Server, path: str = NAME) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def run(server: Server, folder: Path, name: str = NAME) -> int:
    return fetch.main([name, "--url", address(server, name), "--to", str(folder)])


def test_download_with_progress(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, tmp_path / "new" / "folder") == 0
    assert (tmp_path / "new" / "folder" / NAME).read_bytes() == CONTENT
    out, err = capsys.readouterr()
    assert hashlib.sha256(CONTENT).hexdigest() in out
    assert "as in its name" in out
    assert "2.9 of 2.9 MiB (100 %)" in err
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [NAME]
    assert run(server, tmp_path / "new" / "folder") == 0
    assert "already exists" in capsys.readouterr().out
    assert server.asked == [""]


def test_goes_on_where_the_connection_broke(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.cut_after = [1_000_000, 500_000]
    assert run(server, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=1000000-", "bytes=1500000-"]
    assert "the connection ended" in capsys.readouterr().err


def test_goes_on_in_a_later_call(server: Server, tmp_path: Path) -> None:
    server.cut_after = [700_000]
    server.fail_with = []
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1234])
    assert run(server, tmp_path) == 0
    assert server.asked == ["bytes=1234-", "bytes=701234-"]
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 5000)
    assert run(server, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_left_over_that_is_too_long_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * (len(CONTENT) + 10))
    assert run(server, tmp_path) == 0
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_wrong_content_is_not_installed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not 00000000.*nothing was installed"):
        run(server, tmp_path, "net-00000000.pth")
    assert not list(tmp_path.iterdir())


def test_damaged_left_over_is_not_installed(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="nothing was installed"):
        run(server, tmp_path)
    assert run(server, tmp_path) == 0  # the damaged part is gone: the next call starts from the beginning


def test_a_wrong_file_in_place_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    with pytest.raises(UserError, match="remove it"):
        run(server, tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"mine"


def test_server_errors(server: Server, tmp_path: Path) -> None:
    server.fail_with = [503, 500]
    assert run(server, tmp_path) == 0
    server.fail_with = [404]
    with pytest.raises(UserError, match="returned 404"):
        run(server, tmp_path, "other.pth")
    server.fail_with = [503] * 9
    with pytest.raises(UserError, match="returned 503; run the same command again"):
        run(server, tmp_path, "other.pth")
    assert len(server.fail_with) == 5


def test_name_without_hash_says_that_it_was_not_checked(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, tmp_path, "plain.pth") == 0
    assert "not checked" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://example.org/a.pth", "ftp://127.0.0.1/a", "file:///etc/passwd", "a.pth"])
def test_only_https_or_this_machine(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="only https"):
        fetch.main(["a.pth", "--url", url, "--to", str(tmp_path)])


def test_a_redirect_may_not_leave_https(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="example.invalid.*only https"):
        run(server, tmp_path, "elsewhere.pth")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"'resnet5'.*did you mean resnet50\?|did you mean resnet"):
        fetch.main(["resnet5"])
    with pytest.raises(UserError, match="not a plain file name"):
        fetch.main(["../x.pth", "--url", "https://example.org/x.pth"])


def test_unwritable_folder(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(server, tmp_path / "file")


def test_wrong_content_is_exit_code_2_and_no_torch_is_imported(server: Server, tmp_path: Path, repo_root: Path) -> None:
    """As a user runs it."""
    arguments = ["fetch", "net-00000000.pth", "--url", address(server), "--to", str(tmp_path)]
    probe = (
        "import sys; from main import main; code = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments], capture_output=True, text=True, cwd=repo_root, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert "nothing was installed" in done.stderr
    assert not list(tmp_path.iterdir())


def part_of(server: Server, folder: Path, name: str = "plain.pth") -> None:
    """A download of a name without a hash that broke after 1000 bytes."""
    server.cut_after, server.fail_with = [1000], []
    with pytest.raises(UserError, match="to resume from"):
        fetch_until_it_fails(server, folder, name)
    assert (folder / f"{name}.part").stat().st_size == 1000
    server.asked.clear()


def fetch_until_it_fails(server: Server, folder: Path, name: str) -> None:
    server.fail_after_cut = True
    try:
        run(server, folder, name)
    finally:
        server.fail_after_cut = False


def test_a_part_of_another_address_is_not_continued(server: Server, tmp_path: Path) -> None:
    part_of(server, tmp_path)
    other = address(server, "mirror/plain.pth")
    assert fetch.main(["plain.pth", "--url", other, "--to", str(tmp_path)]) == 0
    assert server.asked == [""]
    assert (tmp_path / "plain.pth").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["plain.pth"]
    (tmp_path / "second.pth.part").write_bytes(b"x" * 5000)  # no note of its source, and no hash to check it
    assert run(server, tmp_path, "second.pth") == 0
    assert (tmp_path / "second.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_a_file_that_changed_on_the_server_is_not_mixed(server: Server, tmp_path: Path, knows_if_range: bool) -> None:
    server.if_range = knows_if_range
    part_of(server, tmp_path)
    server.content, server.etag = CONTENT[::-1], '"second"'
    assert run(server, tmp_path, "plain.pth") == 0
    assert (tmp_path / "plain.pth").read_bytes() == CONTENT[::-1]
    assert server.asked == (["bytes=1000-"] if knows_if_range else ["bytes=1000-", ""])


def test_the_same_address_goes_on(server: Server, tmp_path: Path) -> None:
    part_of(server, tmp_path)
    assert run(server, tmp_path, "plain.pth") == 0
    assert server.asked == ["bytes=1000-"]
    assert (tmp_path / "plain.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["https://[bad", "https://a:port/x", "https://a.org/\u00e9", "https://a.org/a b"])
def test_what_is_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="is not an address"):
        fetch.main(["a.pth", "--url", url, "--to", str(tmp_path)])
