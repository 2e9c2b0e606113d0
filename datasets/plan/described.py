"""Describe the sampling presets in words, with frame numbers as examples.

`table` makes the table of docs/sampling.md. Exported models carry `rule_of_test` in their metadata, so that users of a
model elsewhere can choose the same frames. Letters: n frames of the video, S = `num_segments`, L = `clip_len`,
tau = `frame_interval`, T = S L frames of a clip; k = 0 .. S-1, j = 0 .. T-1; V test clips, v = 0 .. V-1. All frame
numbers count from 0, and [x] is x rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets.plan.sampling import PRESETS, Sampling, most_clips, test_frames
from utils.errors import UserError

#: Video lengths of the examples: much longer than a clip, about as long, and shorter.
EXAMPLE_FRAMES = (300, 100, 12, 3)
EXAMPLE_FPS = 30.0  # the rate at which `pyslowfast` takes every frame_interval-th frame


@dataclass(frozen=True)
class Rule:
    """Describe one preset in words.

    Attributes:
        tool: the tool that defines the rule.
        train: the frames of a training clip.
        test: the frames of one test clip.
        more: the frames of several test clips; "" if only one is defined.
        use: when to choose it.
    """

    tool: str
    train: str
    test: str
    more: str
    use: str


# Phrases that several rules share.
_TSN_TRAIN = "one random frame in each of S equal parts; frame 0 if n < S"
_WINDOW = "a random window"
_SPREAD = "[a + j T tau / (T - 1)], none beyond frame a + T tau - 1, where a = [(n - T tau) / 2]"
_SHORT = "if n <= T tau, [n / tau] frames, evenly from the first to the last, then"

RULES: dict[str, Rule] = {
    "tsn": Rule(
        "TSN and TSM repositories",
        f"{_TSN_TRAIN} (L > 1: the L frames from there)",
        "[(n - L + 1) / S * (k + 1/2)] and the L - 1 frames after it, none beyond n - 1",
        "the second clip has [(n - L + 1) / S * k]",
        "whole short videos, motion; the safe choice for your own videos",
    ),
    "tsm_dense": Rule(
        "TSM repository, MMAction2's DenseSampleFrames",
        f"{_WINDOW} of 64 frames, S of them [64 / S] apart",
        "(a + k [64 / S]) mod n, where a = [(n - 64) / 2], or 0 in shorter videos",
        "a goes in V even steps from 0 to n - 64",
        "Kinetics recipes of TSM and TPN that test with ten clips",
    ),
    "mmaction2_0x": Rule(
        "MMAction2 0.x, SampleFrames",
        "S random starts, one in each equal part of where a clip fits; from each L frames tau apart, mod n",
        "(a + tau i) mod n for i = 0 .. L-1, where a = [(n - L tau + 1) / S * (k + 1/2)], or 0 if n < L tau",
        "S = 1: V parts in place of S; else the second clip starts at the beginning of each part",
        "configs and weights of MMAction2 0.x",
    ),
    "mmaction2_1x": Rule(
        "MMAction2 1.x, SampleFrames",
        "as mmaction2_0x",
        "L = 1: [n / S * (k + 1/2)]; L > 1: (a + tau i) mod n for i = 0 .. L-1, where, with m = n - (L - 1) tau - 1, "
        "a = [m / 2] for S = 1, else k m / (S - 1) rounded to the nearest; m = 0 in shorter videos",
        "S = 1: a = v m / (V - 1) rounded (L = 1: [n / V * (v + 1/2)]); else a second clip of S more starts",
        "configs and weights of MMAction2 1.x",
    ),
    "pyslowfast": Rule(
        "PySlowFast",
        f"{_WINDOW} of w = T tau fps / 30 frames: T of them, evenly from its first to its last",
        "[a + j (w - 1) / (T - 1)], none beyond n - 1, where a = (n - w) / 2, or 0 in shorter videos",
        "a = (n - w) v / V",
        "SlowFast and its weights; seconds count, not frames",
    ),
    "pp": Rule(
        "PaddleVideo, PP-TSN",
        _TSN_TRAIN,
        "[n / S * (k + 1/2)]; 0 if n <= S",
        "",
        "configs and weights of PP-TSN",
    ),
    "pp_tsm": Rule(
        "PaddleVideo, PP-TSM",
        "one random frame in each of S parts of [n / S] frames; if n < S, frame k mod n",
        "p k + [(p - 1) / 2], where p = [n / S]; if n < S, frame k mod n",
        "",
        "configs and weights of PP-TSM",
    ),
    "videomae": Rule(
        "VideoMAE on Kinetics",
        f"{_WINDOW} of T tau frames: T of them, evenly from its first to its last",
        f"{_SPREAD}; {_SHORT} the last one repeated",
        "T neighbours among every tau-th frame, in V even steps from the first to the last",
        "VideoMAE and its weights on Kinetics (on Something-Something: tsn)",
    ),
    "vjepa2": Rule(
        "V-JEPA 2",
        f"{_WINDOW} of T tau frames: T of them, evenly from its first to its last",
        f"{_SPREAD}; if n <= T tau, as videomae for a video of n - 1 frames",
        "the middle window of each of V parts; if these are too short, V overlapping windows in even steps",
        "V-JEPA 2 and probes on it",
    ),
    "one_per_segment": Rule(
        "Pytorch Video Analysis, whose config format we use",
        _TSN_TRAIN,
        "[(n - S + 1) / S * (k + 1/2)]; 0 if n <= S",
        "",
        "configs that were written for it; it is the default, so that they keep their meaning",
    ),
}


def rule_of_test(s: Sampling, num_clips: int) -> dict[str, object]:
    """Return which frames the test clips have, in words and by example, as plain values for a JSON file.

    Returns:
        `preset`, `letters`, `rule`, `more` (about several clips) and `examples`: frame count -> (num_clips, T) ordinals
        of a video of that length at `examples_fps`.
    """
    rule = RULES[s.preset]
    numbers = {"S": s.num_segments, "L": s.clip_len, "tau": s.frame_interval, "T": s.frames_per_clip, "V": num_clips}

    return {
        "preset": s.preset,
        "letters": "n frames of the video, counted from 0; k = 0..S-1, j = 0..T-1, v = 0..V-1; [x] is x rounded down",
        "numbers": numbers,
        "rule": rule.test,
        "more": rule.more if num_clips > 1 else "",
        "examples_fps": EXAMPLE_FPS,
        "examples": {str(n): test_frames(s, n, EXAMPLE_FPS, num_clips).tolist() for n in EXAMPLE_FRAMES},
    }


def table() -> str:
    """Return the table of docs/sampling.md, with a row for each preset."""
    rows = ["| preset | frames in training | one test clip | test clips | use it for |", "|---|---|---|---|---|"]

    for preset in PRESETS:
        rule = RULES[preset]
        row = (f"`{preset}` ({rule.tool})", rule.train, rule.test, _clips(preset), rule.use)
        rows.append(f"| {' | '.join(row)} |")

    return "\n".join(rows)


def examples() -> str:
    """Return the second table of docs/sampling.md: one test clip, S = 8; some presets: T = 8, tau 8."""
    rows = ["| preset | n = 100 | n = 12 |", "|---|---|---|"]
    for preset in PRESETS:
        cells = (", ".join(map(str, test_frames(_usual(preset), n, EXAMPLE_FPS)[0])) for n in (100, 12))
        rows.append(f"| `{preset}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _usual(preset: str) -> Sampling:
    """Return a clip of eight frames as in recipes: eight segments, or every eighth frame of one segment."""
    try:
        return Sampling(preset, 1, 8, 8)
    except UserError:  # the preset takes single frames
        return Sampling(preset, 8)


def _clips(preset: str) -> str:
    """Return how many test clips there may be, and the frames of several clips."""
    dense = most_clips(_usual(preset))
    segments = most_clips(Sampling(preset, 8))

    # A preset may allow any number for one segment, and only a few for several.
    if dense is None and segments is None:
        return f"any V: {RULES[preset].more}"
    most = f"1 or {segments}" if segments == 2 else "1"
    count = f"any V with S = 1, else {most}" if dense is None else most
    return f"{count}: {RULES[preset].more}" if RULES[preset].more else count
