"""Row: each planted mistake is caught, and the loader copies ahead without a copy on the main thread."""

from __future__ import annotations

import json
from typing import Any

from tests.fake_cuda import build


def row() -> dict[str, Any]:
    """Run the plants, and four steps with the real loader."""
    plants = {plant["plant"]: plant for plant in build.run("plants")}
    clean = len(plants["nothing"]["waits"])
    caught = {name: "error" in plant or len(plant["waits"]) > clean for name, plant in plants.items()}
    loading = build.run("loading")[0]
    copied, ahead = loading["main_thread_bytes_of_clips"], loading["clips_copied_before_the_wait"]
    measured = {"caught": caught, "main_thread_bytes": copied, "micro_batches_copied_before_the_wait": ahead}
    good = not caught.pop("nothing") and all(caught.values()) and len(caught) >= 4 and copied == 0 and ahead == 2
    return {"measured": measured, "holds": good}


if __name__ == "__main__":
    print(json.dumps(row()))
