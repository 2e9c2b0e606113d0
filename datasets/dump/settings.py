"""The settings of a dump, stored in the folder of its videos, and the frame sizes that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from datasets.readers.frame_pack import SUFFIX, TEMPLATE
from utils import renamed
from utils.errors import UserError

FORMS = ("frames", "packs", "clips")
#: Increase it when the same settings give different bytes than before.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class DumpSettings:
    """How videos are stored. The folder holds a copy, which later dumps into it are compared with.

    Attributes:
        form: "frames", "packs" or "clips".
        short_side: largest length of the shorter side [pixels]; smaller videos keep their size, and 0 keeps every size.
        quality: JPEG quality, 1..100.
        template, base: file names of frames, and number of the first; clips do not use them.
        lossless: PNG instead of JPEG, or H.264 without loss and without chroma subsampling.
        gop: frames from key frame to key frame of a clip.
        crf: constant rate factor of x264 for clips.
    """

    form: str
    short_side: int = 256
    quality: int = 85
    template: str = "img_{:05d}.jpg"
    base: int = 1
    lossless: bool = False
    gop: int = 12
    crf: int = 23
    version: int = VERSION

    def check(self) -> None:
        """Raise UserError for values that are out of range or do not fit together."""
        wrong = ""
        if self.form not in FORMS:
            wrong = f"--as {self.form}: choose one of {', '.join(FORMS)}"
        # 4:2:0 needs even sides, and sides below 16 are less than one macroblock.
        elif self.short_side < 0 or 0 < self.short_side < 16 or self.short_side % 2:
            wrong = f"--short-side {self.short_side}: an even number of pixels, 16 or more, or 0 to keep the size"
        elif not 1 <= self.quality <= 100:
            wrong = f"--quality {self.quality}: 1 to 100"
        elif not TEMPLATE.fullmatch(self.template):
            wrong = f"--template {self.template}: a file name with one number such as img_{{:05d}}.jpg"
        elif self.base not in (0, 1):
            wrong = f"--base {self.base}: 0 or 1"
        elif not 1 <= self.gop <= 250 or not 0 <= self.crf <= 51:
            wrong = f"--gop {self.gop} --crf {self.crf}: 1 to 250 and 0 to 51"
        elif self.lossless != self.template.endswith(".png") and self.form != "clips":
            wrong = f"--template {self.template}: a lossless dump writes .png, any other .jpg"
        elif not self.lossless and not self.template.endswith((".jpg", ".jpeg")):
            wrong = f"--template {self.template}: frames are written as .jpg"

        if wrong:
            raise UserError(f"dump: {wrong}")

    @property
    def ending(self) -> str:
        """The ending that is appended to the name of a video."""
        return {"frames": "", "packs": SUFFIX, "clips": ".mp4"}[self.form]

    def digest(self) -> str:
        """Return a short hash of these settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the settings as one line of JSON."""
        # A folder and its digests hold the old name of a form, so that videos of earlier dumps are not made again.
        form = next((old for old, new in renamed.FORMS.items() if new == self.form), self.form)
        return json.dumps(dataclasses.asdict(self) | {"form": form}, sort_keys=True)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (h, w) of the stored frames of an upright video: never larger; even numbers if scaled or for x264."""
        short = min(height, width)
        if self.short_side == 0 or short <= self.short_side:
            even = self.form == "clips" and not self.lossless and short > 1
            return (height & ~1, width & ~1) if even else (height, width)

        # Round the longer side to the nearest even number.
        long = 2 * round(max(height, width) * self.short_side / short / 2)
        return (self.short_side, long) if height <= width else (long, self.short_side)
