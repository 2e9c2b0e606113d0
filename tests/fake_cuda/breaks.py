"""Where torch.compile breaks the graph of a method's training step; no GPU and no compiler is needed for that.

python -m tests.fake_cuda.breaks METHOD
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def breaks(method: str) -> dict[str, Any]:
    """Number of dropouts, graphs of the first step, and graphs that later steps add."""
    import torch
    import torch._dynamo
    from torch._dynamo.utils import counters

    import methods
    from tests.fake_cuda.cases import smallest
    from utils import dist, draws, sync_bn
    from utils.engine.network import place
    from utils.shards import ShardPlan

    torch.manual_seed(0)
    shards = ShardPlan(1, 2, 1, 0, 1)
    frames = 8 if method == "slowfast" else 4
    net = methods.build(**smallest(method) | {"num_class": 5, "num_segments": frames, "dropout": 0.5})
    net = sync_bn.convert(place(net, torch.device("cpu"), "fp32"), shards, sync_stats=True)
    bn_stats = sync_bn.BnStats(net, shards, dist.World())
    model: Any = torch.compile(net, backend="eager")
    clips = torch.randn(2, frames, 32, 32, 3).permute(0, 4, 1, 2, 3)
    graphs = []
    for step in range(3):
        model.train()
        with draws.rng_scope(0, step, (0,), 2):
            answer = model(clips)
            logits = answer if isinstance(answer, torch.Tensor) else answer.logits
            logits.sum().backward()
        bn_stats.after_micro_batch(0)
        bn_stats.after_step()
        graphs.append(counters["stats"]["unique_graphs"])
    dropouts = sum(isinstance(layer, draws.Dropout) and layer.p > 0 for layer in net.modules())
    return {"method": method, "dropouts": dropouts, "graphs": graphs[0], "more": graphs[-1] - graphs[0]}


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        os.environ |= {"TORCH_LOGS": "graph_breaks", "TORCH_LOGS_OUT": log.name}
        broken = breaks(sys.argv[1])
        places = re.findall(r"Graph break in user code at (\S+?):\d+", log.read())
        broken["files"] = sorted({"/".join(Path(place).parts[-2:]) for place in places})
        print(json.dumps(broken))
