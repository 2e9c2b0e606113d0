"""Make class-activation maps for the report: the frames of a mistake, coloured by what the network used in them.

The network that was evaluated sees the same frames again (`methods/cam.py`). A map takes a forward pass and, for
Grad-CAM, a part of a backward pass. So maps are made on request only, for the most confident mistakes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anal_tools import folds
from anal_tools.evaluate import scoring
from anal_tools.evaluate.results import Results
from anal_tools.report import media
from anal_tools.report.media import EvaluatedVideos, Maps, Seen
from utils.errors import MediaError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

ALL = -1  # instead of a class: the map is that of the answer, for all classes
MOST_HEAT = 0.65  # share of the colour where the map is largest
SAME = 0.05  # difference of a class probability up to which the network counts as the one that was evaluated


@dataclass(frozen=True)
class Looker:
    """A network with the normalisation of its input and the layer of its maps.

    Attributes:
        net: in evaluation mode, float32.
        normalise: uint8 (1, T, h, w, C) -> the network's input.
        layer: layer of Grad-CAM; "" for a transformer.
        digest: sha256 of its weights.
    """

    net: nn.Module
    normalise: Callable[[Tensor], Tensor]
    layer: str
    digest: str

    @property
    def method(self) -> str:
        """The name of the kind of map, for the page."""
        return f"Grad-CAM of {self.layer}" if self.layer else "attention rollout"

    def look(self, crops: np.ndarray, classes: Sequence[int]) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Return maps and class probabilities.

        Args:
            crops: (T, h, w, 3) uint8.
            classes: classes that get a map; a transformer has one map for all.

        Returns:
            class or ALL -> map (T, h, w) in 0..1, and probabilities (K,).
        """
        import torch

        from methods import cam
        from utils import view_batches

        device = next(self.net.parameters()).device
        with view_batches.full_precision():  # no TF32: the answer is compared with the evaluation's
            clip = self.normalise(torch.from_numpy(np.ascontiguousarray(crops))[None].to(device))
            if self.layer:
                class_maps = cam.grad_cam(self.net, clip, classes, self.layer)
                values, logits = dict(zip(classes, class_maps.values, strict=True)), class_maps.logits
            else:
                shares, logits = cam.attention_rollout(self.net, clip)
                values = {ALL: shares - shares.min()}  # shares of attention are never 0: the smallest gets no colour

        frames = {number: cam.upsample(one, crops.shape[:3]).float().cpu() for number, one in values.items()}
        # Scale each map to a maximum of 1; a map of zeros stays as it is
        scaled = {number: (one / one.max().clamp_min(1e-30)).numpy() for number, one in frames.items()}
        return scaled, logits.double().softmax(0).cpu().numpy()


def make(
    exp: Path,
    results: Results,
    rows: Sequence[int],
    folder: Path,
    *,
    layer: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[int, Maps], str]:
    """Make the maps of some videos; existing sheets are kept.

    Args:
        exp: experiment folder.
        results: its evaluation.
        rows: rows of the results; the maps are for the predicted and for the true class.
        folder: folder of the sheets.
        layer: layer of Grad-CAM; None for `cam.choose_layer`.
        say: called with lines about progress.

    Returns:
        row -> the data about its maps that the page needs, and a line for the page.

    Raises:
        UserError: videos or weights of the evaluation are missing, or the layer has no map.
    """
    from datasets.readers import open_reader

    source = media.source_of(exp, results)

    folder.mkdir(parents=True, exist_ok=True)
    maps: dict[int, Maps] = {}
    looked: list[str] = []
    failed = other = done = 0
    # Each fold has its own network
    for part, part_rows in parts_of(exp, results, rows):
        looker = None
        with contextlib.closing(open_reader(source.reader, source.records)) as reader:
            for row in part_rows:
                try:
                    seen = media.seen_of(source, reader, row)
                    crops = media.crops_of(reader, row, seen, seen.frames)
                except MediaError:
                    failed += 1
                    continue
                # Built at the first video that can be read: the choice of the layer needs a clip
                looker = looker or looker_of(part, crops, layer)
                maps[row], same = _sheets(looker, source, row, seen, crops, folder)
                other += not same
                done += 1
                if done % 20 == 0:
                    say(f"maps of {done} of {len(rows)} videos")
        looked += [looker.method] if looker else []

    note = f"{'; '.join(dict.fromkeys(looked))}, for the {len(maps)} most confident mistakes." if maps else ""
    note += f" {failed} videos could not be read." if failed else ""
    if other:
        note += f" On {other} of them the network answers differently than in the evaluation: has the code changed?"
    return maps, note.strip()


def parts_of(exp: Path, results: Results, rows: Sequence[int]) -> list[tuple[Results, list[int]]]:
    """Return the evaluations whose networks saw these rows: the folds of a pooled result, else the result itself."""
    pooled = results.summary.get("folds")
    if not pooled:
        return [(results, list(rows))]

    # A pooled result has the rows of its folds one after the other
    parts, start = [], 0
    for fold, about in pooled.items():
        end = start + int(about["videos"])
        part_rows = [row for row in rows if start <= row < end]
        if part_rows:
            parts.append((Results.load(exp / folds.FOLDER / fold, results.name), part_rows))
        start = end
    return parts


def looker_of(results: Results, crops: np.ndarray, layer: str | None) -> Looker:
    """Build the network of an evaluation.

    Args:
        results: the evaluation.
        crops: (T, h, w, 3) uint8 of a clip, for the choice of the layer.
        layer: layer of Grad-CAM; None to choose it.

    Raises:
        UserError: its weights are missing, or have changed.
    """
    import torch

    import methods
    from anal_tools.evaluate.network import build_for_evaluation, read_steady
    from anal_tools.predict.predictor import config_of
    from methods import cam, interop
    from utils.dist import World
    from utils.engine.evaluate import normaliser
    from utils.engine.network import model_arguments

    # The config and the weights as they were evaluated
    cfg = config_of(results.summary, results.folder.with_name(f"{results.name}.json"), [])
    weights = Path(str(results.summary.get("weights")))
    if not weights.exists():
        weights = results.exp / weights.name  # the folder was moved
    if not weights.exists():
        raise UserError(f"{weights}: the evaluated weights are missing; evaluate again")

    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    build = functools.partial(methods.build, **model_arguments(cfg, pretrained=False))
    state, digest = read_steady(weights, functools.partial(interop.load_checkpoint, build=build), world)
    if digest != results.summary.get("weights_hash"):
        raise UserError(f"{weights}: these are not the evaluated weights; evaluate again")

    net = build_for_evaluation(cfg, state, weights, world)
    looker = Looker(net, normaliser(cfg), "", digest)
    if cam.is_transformer(net):
        if layer:
            raise UserError(f"--cam-layer {layer}: {cfg.model.type} is a transformer; its maps have no layer")
        return looker
    if layer is None:
        clip = torch.from_numpy(np.ascontiguousarray(crops))[None].to(world.device)
        layer = cam.choose_layer(net, looker.normalise(clip))
    return dataclasses.replace(looker, layer=layer)


def _sheets(
    looker: Looker, source: EvaluatedVideos, row: int, seen: Seen, crops: np.ndarray, folder: Path
) -> tuple[Maps, bool]:
    """Return the sheets of one video, and whether the network answers as it did in the evaluation."""
    results = source.results
    classes = list(dict.fromkeys((int(np.argmax(results.scores[row])), int(results.labels[row]))))
    numbers = classes if looker.layer else [ALL]
    # A sheet's name contains everything that it depends on, so an existing one can be kept
    how = [looker.digest, looker.layer, MOST_HEAT, seen.frames.tolist(), seen.box, seen.size, seen.flip]
    sheets = {number: folder / f"{media.stem_of(source, row, [*how, number])}.jpg" for number in numbers}

    same = True
    if not all(sheet.exists() for sheet in sheets.values()):
        maps, answer = looker.look(crops, classes)
        # PySlowFast's test per position averages over windows, so it does not keep the plain logits of the view
        if not scoring.kept_protocol(results).window:
            logits = results.logits[row, seen.view].astype(np.float64)
            kept = np.exp(logits - logits.max())
            same = float(np.abs(kept / kept.sum() - answer).max()) <= SAME
        for number, sheet in sheets.items():
            media.write_sheet(heated(crops[seen.picked], maps[number][seen.picked]), sheet)

    shown = [(number, f"media/{sheet.name}") for number, sheet in sheets.items()]
    return {"shown": shown, "frames": seen.frames[seen.picked].tolist(), **media.layout_of(seen)}, same


def heated(frames: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return frames in grey with a map over them, from no colour through yellow to red.

    Args:
        frames: (F, h, w, 3) uint8.
        heat: (F, h, w) in 0..1.

    Returns:
        (F, h, w, 3) uint8.
    """
    grey = frames @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    share = (MOST_HEAT * heat)[..., None]  # (F, h, w, 1)
    colour = np.stack([np.full_like(heat, 255.0), 220.0 * (1 - heat), np.zeros_like(heat)], -1)  # (F, h, w, 3)
    return np.rint(grey[..., None] * (1 - share) + colour * share).astype(np.uint8)
