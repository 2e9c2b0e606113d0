"""The odd files: every reader and scan on broken real videos, against a plain decode.

`python -m tests.benchmarks.data.odd_files --write docs/odd_files.md` measures and writes the table. Each file is read
in a separate process with a deadline, so that a hang or a crash is a result and not the end.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import ROOT, run_rows, workspace

DEADLINE = 300.0  # seconds that one file may take; generous, because the machine may be busy
_TOLERANCE = 8.0  # mean difference of a colour value for decoders that convert colours otherwise
Row = dict[str, Any]


def odd(work: Path) -> Row:
    """58 files through every reader and scan.

    Returns:
        {"measured": text, "holds": bool}; the table goes to work/odd.json.
    """
    work.mkdir(parents=True, exist_ok=True)
    data, table = measure(work)
    (work / "odd.json").write_text(json.dumps(table, indent=1))
    readers = sorted({name for row in table.values() for name in row["readers"]})
    counts = {word: 0 for word in ("decoded", "partly", "refused", "wrong", "hang", "crash")}
    silent = 0
    for row in table.values():
        for answer in row["readers"].values():
            counts[answer["is"]] += 1
            silent += answer["is"] in ("refused", "partly") and not answer["why"]
    unexplained = [name for name, row in table.items() if any(not why for why in row["disagrees"].values())]
    scan_wrong = [name for name, row in table.items() if not _scan_is_right(row)]
    bad = counts["wrong"] + counts["hang"] + counts["crash"] + silent + len(unexplained) + len(scan_wrong)
    measured = (
        f"{len(table)} files of {data.name}, readers {', '.join(readers)}: "
        + ", ".join(f"{count} {word}" for word, count in counts.items())
        + f"; {silent} refused without a reason; scan wrong on {len(scan_wrong)}; differs from odd_decoders.csv on "
        f"{sum(bool(row['disagrees']) for row in table.values())}, unexplained {len(unexplained)}"
    )
    return {"measured": measured, "holds": bad == 0 and len(table) == 58}


def measure(work: Path) -> tuple[Path, dict[str, Row]]:
    """Read every file with a plain decode, every reader and scan; compare."""
    data = ROOT.parent / "shared" / "data"
    with open(data / "odd_decoders.csv", newline="") as file:
        decoders = {row["path"]: row for row in csv.DictReader(file)}
    names = sorted(decoders)
    frames = work / "frames"
    shutil.rmtree(frames, ignore_errors=True)
    reference = run("reference", names, str(data), {}, frames)
    table: dict[str, Row] = {name: {"reference": reference[name], "readers": {}} for name in names}
    for kind, spec in specs(work):
        with spec as fields:
            if fields is None:
                continue
            as_frames = kind in ("frames", "memcached")
            answers = run(kind, names, str(data), fields, frames, reference)
        for name in names:
            table[name]["readers"][kind] = judge(reference[name], answers[name], exact=kind != "dali")
            if as_frames and not answers[name].get("file") and answers[name]["is"] not in ("hang", "crash"):
                table[name]["readers"][kind] |= {"is": "wrong", "why": "a video file was taken for an image"}
    scanned = scan(work, names, data)
    for name in names:
        table[name]["scan"] = scanned[name]
        table[name]["disagrees"] = disagreements(table[name], decoders[name])
    shutil.rmtree(frames, ignore_errors=True)
    return data, table


def specs(work: Path) -> Iterator[tuple[str, contextlib.AbstractContextManager[Row | None]]]:
    """(reader, context that gives the fields of its ReaderSpec, or None where it cannot be used here)."""
    from datasets.readers import READERS

    for kind in READERS:
        if kind == "memcached":
            yield kind, memcached(work)
        elif kind == "dali":
            there = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali")
            yield kind, contextlib.nullcontext({} if there else None)
        elif kind != "encoded":  # a part of dali
            yield kind, contextlib.nullcontext({})


@contextlib.contextmanager
def memcached(work: Path) -> Iterator[Row | None]:
    """A memcached of our own on a socket in a short folder; None where there is none."""
    program = shutil.which("memcached")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="zoe-") as folder:
        path = f"{folder}/s"
        user = ["-u", "daemon"] if os.geteuid() == 0 else []
        os.chmod(folder, 0o777)  # noqa: S103  the server gives up root and makes its socket there
        server = subprocess.Popen([program, "-s", path, "-m", "256", "-I", "32m", *user])
        try:
            while True:
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)
                    break
                time.sleep(0.05)
            names = {"servers": [f"unix:{path}"], "timeout_ms": 5000.0, "connect_timeout_ms": 5000.0}
            yield {"memcached": names | {"secret_file": None, "namespace": ""}}
        finally:
            server.terminate()
            server.wait()


def run(
    kind: str, names: list[str], root: str, spec: Row, frames: Path, reference: dict[str, Row] | None = None
) -> dict[str, Row]:
    """What a child says of each file; it is replaced when it hangs or dies."""
    answers: dict[str, Row] = {}
    job = frames.parent / f"job_{kind}.json"
    while len(answers) < len(names):
        rest = [name for name in names if name not in answers]
        content = {"kind": kind, "names": rest, "root": root, "spec": spec, "frames": str(frames)}
        job.write_text(json.dumps(content | {"reference": reference}))
        argv = [sys.executable, "-m", "tests.benchmarks.data.odd_files", "--child", str(job)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT) as child:
            assert child.stdout is not None
            for name in rest:
                if not select.select([child.stdout], [], [], DEADLINE)[0]:
                    child.kill()
                    answers[name] = {"is": "hang", "why": f"no answer within {DEADLINE:g} s"}
                    break
                line = child.stdout.readline()
                if not line:
                    answers[name] = {"is": "crash", "why": f"the process ended with {child.wait()}"}
                    break
                answers[name] = json.loads(line)
    return answers


def child(job: str) -> None:
    """Answer one line of JSON for each file of a job."""
    content = json.loads(Path(job).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in content["names"]:
        if content["kind"] == "reference":
            answer = plain_decode(Path(content["root"]) / name, Path(content["frames"]) / name)
        else:
            answer = ask_reader(content, name)
        print(json.dumps(answer), file=out, flush=True)


def plain_decode(path: Path, folder: Path) -> Row:
    """Decode a file from its start to its end or first error, without any of our code; keep three frames as BMP."""
    import av
    import cv2
    import numpy as np
    from av.error import FFmpegError

    def all_frames() -> Iterator[av.VideoFrame]:
        with av.open("file:" + str(path)) as container:
            stream = next(one for one in container.streams.video if one.codec_context is not None)
            stream.codec_context.thread_count = 1
            yield from container.decode(stream)

    decoded: Row = {"frames": 0, "why": "", "digests": {}, "thumbs": {}}
    try:
        for _ in all_frames():
            decoded["frames"] += 1
    except (FFmpegError, StopIteration, RuntimeError) as error:
        decoded["why"] = getattr(error, "strerror", None) or "no video stream"
    count = decoded["frames"]
    ordinals = sorted({0, count // 2, count - 1}) if count else []
    try:
        for ordinal, frame in enumerate(all_frames() if ordinals else ()):
            if ordinal in ordinals:
                image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
                decoded |= {"height": image.shape[0], "width": image.shape[1], "rotation": round(frame.rotation)}
                decoded["codec"], decoded["pixels"] = frame_codec(path), frame.format.name
                decoded["digests"][ordinal], decoded["thumbs"][ordinal] = fingerprint(image)
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"img_{len(decoded['digests']):05d}.bmp"), image[..., ::-1])
    except (FFmpegError, StopIteration, RuntimeError):
        pass
    return decoded


def frame_codec(path: Path) -> str:
    """Name of the first video stream's codec."""
    import av

    with av.open("file:" + str(path)) as container:
        return container.streams.video[0].codec_context.name


def fingerprint(image: Any) -> tuple[str, list[int]]:
    """Hash of the pixels, and an 8x8 picture of them."""
    import cv2
    import xxhash

    small = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA)
    return f"{image.shape} {xxhash.xxh3_128_hexdigest(image.tobytes())}", small.reshape(-1).tolist()


def ask_reader(content: Row, name: str) -> Row:
    """Metadata and three frames of one file by one of our readers; of frame readers, of the folder that was kept of it."""
    import numpy as np

    from datasets.lists.records import Records
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec
    from utils.errors import MediaError

    kind, reference = content["kind"], content["reference"][name]
    as_frames = kind in ("frames", "memcached")
    ordinals = [int(key) for key in reference["digests"]]
    folder = Path(content["frames"])
    answer: Row = {"is": "", "why": "", "digests": {}, "thumbs": {}}

    def opened(path: str, root: Path) -> Any:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
            listed.write(f"{path}\t0\n")
            listed.flush()
            records = Records.load(listed.name, root, num_class=1)
        return open_reader(reader_spec(kind, **content["spec"]), records)

    try:
        if as_frames:
            answer["file"] = refusal(opened(name, Path(content["root"])))
            if not ordinals:
                return answer | {"is": "refused", "why": answer["file"]}
            reader = opened(name, folder)
        else:
            reader = opened(name, Path(content["root"]))
        metadata = reader.probe(0)
        answer |= {"frames": metadata.frames, "height": metadata.height, "width": metadata.width}
        asked = range(len(ordinals)) if as_frames else ordinals
        if not ordinals:
            reader.read(0, np.array([0]), None, (8, 8), np.empty((1, 8, 8, 3), np.uint8))
            return answer | {"is": "decoded"}
        for ordinal, key in zip(asked, ordinals, strict=True):
            out = np.empty((1, metadata.height, metadata.width, 3), np.uint8)
            reader.read(0, np.array([ordinal]), None, (metadata.height, metadata.width), out)
            answer["digests"][key], answer["thumbs"][key] = fingerprint(out[0])
        answer["is"] = "decoded"
        if not as_frames and metadata.frames > reference["frames"]:
            last = np.array([metadata.frames - 1])
            reader.read(0, last, None, (8, 8), np.empty((1, 8, 8, 3), np.uint8))
        answer["by"] = "PyAV" if getattr(reader, "fallbacks", None) else ""  # what DALI did not take
        reader.close()
    except MediaError as error:
        answer |= {"is": "partly" if answer["is"] else "refused", "why": error.reason}
    return json.loads(json.dumps(answer))


def refusal(reader: Any) -> str:
    """Why a frame reader does not take a video file for an image; "" if it does."""
    from utils.errors import MediaError

    try:
        reader.probe(0)
    except MediaError as error:
        return error.reason
    return ""


def judge(reference: Row, answer: Row, *, exact: bool) -> Row:
    """Compare what a reader delivered with the plain decode."""
    if answer["is"] in ("hang", "crash"):
        return answer
    short = {name: answer.get(name) for name in ("is", "why", "frames", "height", "width", "by")}
    if answer["is"] in ("decoded", "partly") and not reference["frames"]:
        return short | {"is": "wrong", "why": "frames of a file that does not decode"}
    for ordinal in reference["digests"]:
        if answer["is"] == "refused":
            break
        if exact:
            same = answer["digests"].get(ordinal) == reference["digests"][ordinal]
        else:
            thumb, other = answer["thumbs"].get(ordinal), reference["thumbs"][ordinal]
            same = thumb is not None and sum(abs(a - b) for a, b in zip(thumb, other, strict=True)) / len(thumb) <= _TOLERANCE
        if not same:
            return short | {"is": "wrong", "why": f"frame {ordinal} is not the one of a plain decode"}
    return short


def scan(work: Path, names: list[str], data: Path) -> dict[str, Row]:
    """`main.py scan --decode all` on all files: real count, or the reason."""
    shutil.rmtree(work / "scan", ignore_errors=True)
    (work / "odd.txt").write_text("".join(f"{name}\t0\n" for name in names))
    argv = [sys.executable, "main.py", "scan", str(work / "odd.txt"), "--root", str(data), "--out", str(work / "scan")]
    argv += ["--decode", "all", "--workers", "2", "--deadline", f"{DEADLINE:g}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    summary = json.loads((work / "scan" / "scan.json").read_text())["lists"][0]
    rows: dict[str, Row] = {one["path"]: {"bad": one["what"]} for one in summary["bad"]}
    for line in (work / "scan" / "odd.clean.txt").read_text().splitlines():
        path, frames, _ = line.rsplit(maxsplit=2)
        rows[path] = {"bad": "", "frames": int(frames)}
    remarks: dict[str, list[str]] = {}
    for one in summary["notes"]:
        remarks.setdefault(one["path"], []).append(one["what"])
    return {name: rows[name] | {"notes": remarks.get(name, [])} for name in names}


def _scan_is_right(row: Row) -> bool:
    """A file of which every frame decodes is kept with its real count; any other one is named with a reason."""
    whole = row["reference"]["frames"] > 0 and not row["reference"]["why"]
    kept = not row["scan"]["bad"] and row["scan"]["frames"] == row["reference"]["frames"]
    return kept if whole else bool(row["scan"]["bad"])


def disagreements(row: Row, decoder_row: dict[str, str]) -> dict[str, str]:
    """Where odd_decoders.csv says another count or size than our video reader: decoder -> why ("" = not explained)."""
    ours, reference = row["readers"]["video"], row["reference"]
    decoded = ours["is"] in ("decoded", "partly")
    frames = (ours["frames"] if ours["is"] == "decoded" else reference["frames"]) if decoded else 0
    reasons = {}
    for column, text in decoder_row.items():
        if column == "path":
            continue
        count = int(re.findall(r"\d+", text)[0])
        size = re.search(r"\((\d+), (\d+)", text)
        theirs = tuple(map(int, size.groups())) if size and count else None
        shown_size = (ours["height"], ours["width"]) if decoded else None
        if count != frames:
            av1 = count == 0 and reference.get("codec", "").endswith("av1") or reference.get("codec") == "libdav1d"
            reasons[column] = "that build has no AV1 decoder" if av1 else ""
        elif theirs and theirs != shown_size:
            turned = theirs == (shown_size or (0, 0))[::-1] and reference.get("rotation", 0) % 180 == 90
            reasons[column] = "gives the coded size; the header says to turn it, which we do" if turned else ""
        elif ours["is"] == "partly" and text.startswith("ok"):
            reasons[column] = "ends at the first error as if the file ended there; we report which frames are lost"
    return reasons


_REFUSED_KINDS = (
    "## Refused kinds",
    "",
    "Formats that name other files are refused before their demuxer runs, whatever the name of the file:",
    "HLS playlists (`.m3u8`), DASH manifests, SDP session descriptions, `concat` and `ffconcat` scripts,",
    "image patterns. Single pictures are not videos: use the reader `frames` for them. Formats that",
    "are not in `datasets/readers/video_index.py:FORMATS` are refused too, and so are frames of more than",
    "36 million pixels (8K has 33 million).",
    "",
)


def write_table(table: dict[str, Row]) -> str:
    """docs/odd_files.md."""
    readers = list(next(iter(table.values()))["readers"])
    lines = [
        "# Odd and broken files",
        "",
        "This page shows what each reader and `python main.py scan --decode all` do with 58 real files from",
        "the test suites of decoders, compared with a plain decode of the whole file (PyAV, from the start).",
        "`python -m tests.benchmarks.data.odd_files --write docs/odd_files.md` writes it. The files are not",
        "part of the repository.",
        "",
        "- A number counts the frames of the file. Its first, middle and last frame equal those of the plain",
        f"  decode (`dali`: within {_TOLERANCE:g} of 255 on average, because it converts colours itself).",
        "- `frames` and `memcached` read these three frames, stored as images. Given any of the 58 files",
        "  themselves, they report that it is not an image.",
        "- `dali`: *(PyAV)* marks files that DALI does not take; without a GPU, as here, it has no H.264.",
        "- *no*: refused, with the reason in the last column.",
        "",
        "| file | video | plain decode | " + " | ".join(readers) + " | scan | reason, remark |",
        "|" + "---|" * (len(readers) + 5),
    ]
    for name, row in table.items():
        reference = row["reference"]
        what = f"{reference['codec']} {reference['width']}x{reference['height']}" if reference["frames"] else ""
        cells = [_cell(row["readers"][kind], reference, kind) for kind in readers]
        bad = row["scan"]["bad"]
        remarks = dict.fromkeys([bad, *(answer["why"] for answer in row["readers"].values()), *row["scan"]["notes"]])
        remarks |= dict.fromkeys(f"{column.split('_')[0]}: {why}" for column, why in row["disagrees"].items())
        text = "; ".join(remark.replace("|", "/") for remark in remarks if remark and "image" not in remark)
        shown = "bad" if bad else str(row["scan"]["frames"])
        count = f"{reference['frames']}{', then an error' if reference['frames'] and reference['why'] else ''}"
        lines.append(f"| {name.removeprefix('odd/')} | {what} | {count} | {' | '.join(cells)} | {shown} | {text} |")
    lines += ["", *_agreement(table)]
    return "\n".join(lines) + "\n"


def _cell(answer: Row, reference: Row, kind: str) -> str:
    if answer["is"] == "decoded":
        count: int = reference["frames"] if kind in ("frames", "memcached") else answer["frames"]
        return f"{count} ({answer['by']})" if answer.get("by") else str(count)
    words = {"refused": "no", "partly": f"{reference['frames']} of {answer['frames']}"}
    return words.get(answer["is"]) or str(answer["is"]).upper()


def _agreement(table: dict[str, Row]) -> list[str]:
    """The paragraph on the counts that OpenCV and PyAV gave."""
    columns = sorted({column for row in table.values() for column in row["disagrees"]})
    lines = [*_REFUSED_KINDS, "## Against two other decoders", ""]
    lines.append("Counts and sizes are those of a plain loop over OpenCV 5.0.0 and PyAV 18.1.0, uncorrected.")
    for column in columns:
        files = [(name, row["disagrees"][column]) for name, row in table.items() if column in row["disagrees"]]
        agree = f"{len(table) - len(files)} of {len(table)} files agree with the reader `video`; the others:"
        lines += ["", f"{column.split('_')[0]}: {agree}", ""]
        lines += [f"- {name.removeprefix('odd/')}: {why or 'not explained'}" for name, why in files]
    return lines


def metadata_gain() -> None:
    """CPU of probing and reading TSN-8 at 224 pixels without and with `data.metadata`: median of 7, in ms."""
    import numpy as np

    from datasets.lists.records import Records
    from datasets.plan.sampling import Sampling
    from datasets.plan.train import draw, resolve
    from datasets.readers import open_reader
    from datasets.scan import verb as scan_verb
    from tests.datasets.specs import reader_spec, train_spec

    data, spec = ROOT.parent / "shared" / "data", train_spec(Sampling("tsn", 8))
    names = ("ucf11/v_biking_01_01.mpg", "c3d/v_ApplyEyeMakeup_g01_c01.avi", "mmaction2/demo.mp4")
    out = np.empty((8, 224, 224, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "list.txt")
        listed.write_text("".join(f"single/{name} 0\n" for name in names))
        scan_verb.main([str(listed), "--root", str(data), "--out", folder, "--decode", "header", "--workers", "1"])
        records = Records.load(listed, data, num_class=1)
        for i, name in enumerate(names):
            taken: dict[str | None, list[float]] = {None: [], f"{folder}/metadata.bin": []}
            for position in range(7):
                for metadata, times in taken.items():
                    reader = open_reader(reader_spec("video", metadata=metadata), records)
                    began = time.process_time()
                    plan = resolve(draw(1, 0, position, spec), reader.probe(i), spec, i)
                    reader.read(i, plan.frames, plan.box, plan.size, out)
                    times.append(1000 * (time.process_time() - began))
                    reader.close()
            without, known = (round(float(np.median(times)), 1) for times in taken.values())
            print(json.dumps({"file": name, "ms_without": without, "ms_with_metadata": known}))


ROWS = {
    "odd": (
        "the 58 odd files through every reader and scan",
        "no hang, no crash, no silent wrong frame; each decoded, or named with a reason",
        lambda: odd(workspace()),
    ),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    elif sys.argv[1:2] == ["--write"]:
        place = Path(tempfile.mkdtemp(prefix="zoetrope-odd-"))
        outcome = odd(place)
        Path(sys.argv[2]).write_text(write_table(json.loads((place / "odd.json").read_text())))
        print(json.dumps(outcome))
        sys.exit(not outcome["holds"])
    elif sys.argv[1:] == ["--metadata"]:
        metadata_gain()
    else:
        sys.exit(run_rows(ROWS))
