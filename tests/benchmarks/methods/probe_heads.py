"""Twenty heads of a probe in one pass beside runs of one head: losses, CPU seconds of a step, memory. ViT-S encoder.

An attentive head (three blocks, forward and backward) costs .8 of the forward pass of ViT-S's twelve blocks, so twenty
heads in one pass cannot be cheaper than (1 + 20 x .8) / (20 x 1.8) = .47 of twenty runs. The published probes sit on
encoders of 24 blocks and more; `deep` measures that ratio.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from typing import Any

from tests.benchmarks.rows import ROOT, environment, run_rows

RATES, DECAYS = (5.0, 3.0, 1.0, 0.3, 0.1), (0.01, 0.1, 0.4, 0.8)
BATCH, FRAMES, SIZE, CLASSES = 2, 16, 112, 174
ROUNDS = 5


def worker(head: str, what: str, depth: str = "12") -> dict[str, Any]:
    """Measure one way in this process: "all" heads, "one", "encoder" alone, or "bare": all heads on ready tokens."""
    import torch

    import methods
    from methods.probe import Probe
    from utils import draws, optim
    from utils.loss import training_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid: Any = {"lr_mults": RATES, "decays": DECAYS} if what in ("all", "bare") else {"decays": (0.1,)}
    model = methods.build(
        type="probe",
        backbone="vit3d",
        width=384,
        depth=int(depth),
        heads=6,
        num_class=CLASSES,
        num_segments=FRAMES,
        dropout=0.0,
        encoder="videomae",
        head=head,
        **grid,
    )
    assert isinstance(model, Probe)
    optimizer = optim.build(model, lr=1e-3, type="adamw")
    clips, labels = torch.randn(BATCH, 3, FRAMES, SIZE, SIZE), torch.arange(BATCH)
    with torch.no_grad():
        tokens = model.backbone(clips)
    ready = tokens.mean(1) if head == "linear" else tokens
    seconds = []
    for step in range(ROUNDS + 1):
        began = time.process_time()
        model.train()
        if what == "encoder":
            with torch.no_grad():
                model.backbone(clips)
        else:
            optimizer.zero_grad(set_to_none=True)
            with draws.rng_scope(0, step, (0,), BATCH):
                is_bare = what == "bare"
                answer = torch.stack([h(ready, model.dropout) for h in model.heads]) if is_bare else model(clips)
                loss, _ = training_loss(answer, labels)
            loss.sum().backward()
            optimizer.step()
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"seconds": sorted(seconds[1:])[ROUNDS // 2], "peak_mib": peak}


def measured(head: str, what: str, depth: int = 12) -> dict[str, Any]:
    """Run `worker` in a process of its own."""
    argv = [sys.executable, "-m", "tests.benchmarks.methods.probe_heads", "worker", head, what, str(depth)]
    env = environment({"OMP_NUM_THREADS": "1"})
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def heads() -> dict:
    """Compare the ways; the bounds are the issue's."""
    figures = {head: {what: measured(head, what) for what in WAYS[head]} for head in WAYS}
    times = {head: {what: ways[what]["seconds"] for what in ways} for head, ways in figures.items()}
    linear, attentive = times["linear"], times["attentive"]
    ratios = {
        "linear: 20 heads / one": linear["all"] / linear["one"],
        "attentive: 20 heads / (encoder + 20 bare heads)": attentive["all"]
        / (attentive["encoder"] + attentive["bare"]),
        "attentive: 20 heads / 20 runs": attentive["all"] / (20 * attentive["one"]),
    }
    deep = {what: measured("attentive", what, 24)["seconds"] for what in ("all", "one")}
    worst = largest_difference()
    holds = all(ratio <= bound for ratio, bound in zip(ratios.values(), (1.25, 1.05, 0.4), strict=True))
    shown = {name: round(ratio, 3) for name, ratio in ratios.items()}
    shown["attentive, encoder of 24 blocks: 20 heads / 20 runs"] = round(deep["all"] / (20 * deep["one"]), 3)
    return {"measured": {**shown, "losses": f"{worst:.1e}", "ways": figures}, "holds": holds and worst <= 1e-5}


def largest_difference(steps: int = 4) -> float:
    """Return the largest relative difference between the losses of a head in one pass and in a run of its own."""
    import torch

    import methods
    from utils import draws, optim
    from utils.loss import training_loss

    def losses(rate: float, **grid: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"backbone": "vit3d_small", "num_class": CLASSES, "num_segments": 4, "encoder": "videomae"}
        model = methods.build(type="probe", head="linear", dropout=0.5, **sizes, **grid)
        optimizer = optim.build(model, lr=rate, type="adamw")
        generator, losses_of = torch.Generator().manual_seed(1), []
        for step in range(steps):
            model.train()
            optimizer.zero_grad(set_to_none=True)
            clips = torch.randn(2, 3, 4, 32, 32, generator=generator)
            with draws.rng_scope(0, step, (0,), 2):
                loss, _ = training_loss(model(clips), torch.tensor([0, 1]))
            loss.sum().backward()
            optim.apply(optimizer, torch.amp.GradScaler("cpu", enabled=False), max_norm=1.0)
            losses_of.append(loss.detach().reshape(-1))
        return torch.stack(losses_of, 1)  # (heads, steps)

    together = losses(1e-3, lr_mults=RATES, decays=DECAYS)
    alone = torch.cat([losses(1e-3 * rate, decays=(decay,)) for rate, decay in itertools.product(RATES, DECAYS)])
    return float(((together - alone) / alone).abs().max())


WAYS = {"linear": ("all", "one"), "attentive": ("all", "one", "encoder", "bare")}
ROWS = {
    "probe_heads": (
        "20 heads in one pass / 20 runs of one head, ViT-S encoder",
        "losses 1e-5; linear <= 1.25 of one; attentive <= 1.05 of encoder + bare heads, <= .4 of 20 runs",
        heads,
    )
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
    else:
        sys.exit(run_rows(ROWS))
