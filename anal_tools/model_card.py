"""Write README.md of an exported folder: data, protocol, accuracy with interval, recipe, hashes, licence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from anal_tools.evaluate import scoring
from anal_tools.evaluate.protocols import Protocol
from anal_tools.evaluate.results import Results
from anal_tools.experiments import data_set
from utils import config, metrics, run_dir
from utils.errors import UserError
from utils.version import VERSION

if TYPE_CHECKING:
    from anal_tools.predict.predictor import Predictor

# Keys that belong to this machine, or that do not matter to a user of the folder.
_NOT_SHOWN = {
    "train_root", "val_root", "train_source", "val_source", "published", "workers", "print_freq", "save_minutes",
    "watchdog_minutes", "memcached", "metadata", "class_names", "teacher", "deadline_seconds", "prefetch",
}  # fmt: skip


def text(predictor: Predictor, results: Path, weights: str, digest: str) -> str:
    """Return the card.

    Args:
        predictor: of the checkpoint.
        results: folder of the experiment's results.
        weights: name of the weights file next to the card.
        digest: sha256 of the weights file.
    """
    assert predictor.cfg is not None, "made from an experiment or a checkpoint"
    cfg, about = predictor.cfg, predictor.about
    return "\n".join(
        [
            *_front(predictor.initial, about["type"]),
            f"# {about['type']} {about['backbone']}, {len(predictor.classes)} classes",
            "",
            f"Trained and evaluated with Zoetrope {VERSION} (code {run_dir.revision()}).",
            "",
            "## Data",
            "",
            f"- data set: {data_set(cfg)}, {len(predictor.classes)} classes, in the order of `id2label`",
            f"- training list {Path(cfg.train_source).name}, validation list {Path(cfg.val_source).name}",
            f"- input: {Protocol(predictor.spec).text}, sampling `{predictor.spec.sampling.preset}`",
            "",
            "## Evaluation",
            "",
            *_evaluations(results, about["weights_hash"]),
            "",
            "transformers' processors take one centre crop of the frames that they are given; with views other than "
            "those of the table the accuracy differs.",
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps(_shown(config.to_dict(cfg), cfg.model.pretrained), indent=2, default=str),
            "```",
            "",
            "## Weights",
            "",
            f"- `{weights}`: sha256 {digest}",
            f"- checkpoint of the run: sha256 {about['weights_hash']}",
            *_initial(predictor.initial),
            "",
        ]
    )


def _front(initial: Mapping[str, str], kind: str) -> Iterator[str]:
    """Yield the lines of the front matter. Trained weights inherit a licence that forbids commercial use."""
    from methods.interop import provenance

    licence = initial.get("licence", "")
    yield "---"
    yield "library_name: transformers"
    yield "pipeline_tag: video-classification"
    if provenance.is_non_commercial(licence):
        yield f"license: {licence}"
    yield "tags:"
    yield f"- {kind}"
    yield "- zoetrope"
    yield "---"
    yield ""


def _evaluations(results: Path, weights_hash: str) -> list[str]:
    """Return a table of the evaluations of exactly these weights."""
    rows = []
    for name in Results.names(results.parent):
        # Results that cannot be read do not stop an export
        with contextlib.suppress(UserError):
            result = Results.load(results.parent, name)
            if result.summary.get("weights_hash") == weights_hash:
                rows.append(_row(name, result))
    if not rows:
        return ["Not evaluated: there is no result of these weights next to them."]

    head = [
        "| result | list | views | top-1 (95 % interval) | top-5 (95 % interval) | videos | not readable |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *rows]


def _row(name: str, result: Results) -> str:
    videos: metrics.Videos = result.videos
    cells = [name, f"{Path(result.summary.get('list', '')).name} ({result.summary.get('list_hash', '')[:12]})"]
    cells.append(str(result.protocol["text"]))
    for k in (1, 5):
        right = videos.right(k)
        low, high = (100 * end for end in scoring.interval(right))
        cells.append(f"{100 * right.mean():.2f} ({low:.2f} to {high:.2f})")
    cells += [str(len(result.labels)), str(int(videos.failed.sum()))]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"  # a bar would end the cell


def _shown(tree: Mapping[str, object], pretrained: bool | str) -> dict[str, object]:
    """Return a config without the keys that belong to this machine."""
    shown_keys = {
        key: _shown(value, pretrained) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if key not in _NOT_SHOWN
    }
    # Of the initial weights the name only, without the path
    return shown_keys | (
        {"pretrained": Path(pretrained).name} if "pretrained" in shown_keys and isinstance(pretrained, str) else {}
    )


def _initial(initial: Mapping[str, str]) -> list[str]:
    """Return lines on the initial weights."""
    from methods.interop import provenance

    if not initial:
        return ["- initial weights: random, or not recorded by the run"]
    line = provenance.licence_line(initial) or "licence of the initial weights: not known"
    return [f"- initial weights: {initial['name']}, sha256 {initial['sha256']}", f"- {line}"]
