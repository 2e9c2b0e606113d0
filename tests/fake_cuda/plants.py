"""Mistakes that are planted into a training step on a fake GPU, to see that the suite catches them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.fake_cuda import cases


def after_loss(loss: Callable[..., Any], spoil: Callable[[Any], object]) -> Callable[..., Any]:
    """Return the loss with `spoil` behind it, which gets the logits."""

    def spoiled(*arguments: Any) -> Any:
        value, logits = loss(*arguments)
        spoil(logits)
        return value, logits

    return spoiled


def mix_in_host_memory(logits: Any) -> object:
    import torch

    return logits.detach() + torch.ones(logits.shape)


def copy_from_pageable_memory(logits: Any) -> object:
    import torch

    return torch.tensor([1.0, 2.0], device=logits.device)


def copy_that_claims_not_to_block(logits: Any) -> object:
    import torch

    return torch.zeros(4).to(logits.device, non_blocking=True)


def count_a_mask(logits: Any) -> object:
    return logits[logits > 0]


PLANTS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda logits: None,
    "item": lambda logits: logits.sum().item(),
    "cpu": lambda logits: logits.detach().cpu(),
    "tolist": lambda logits: logits[0].detach().tolist(),
    "bool": lambda logits: bool(logits.max() > 0),
    "blocking copy": copy_from_pageable_memory,
    "pageable copy": copy_that_claims_not_to_block,
    "mask": count_a_mask,
    "nonzero": lambda logits: logits.nonzero(),
    "CPU tensor": mix_in_host_memory,
}

if __name__ == "__main__":
    with cases.started(cases.Gpu(sys.argv[1]), "tsn", precision="fp32", sets=cases.WITHOUT_COLOURS) as (run, step):
        step(0)
        loss = run.loss
        for name, spoil in PLANTS.items():
            run.__dict__["loss"] = after_loss(loss, spoil)
            try:
                result = step(1)
            except RuntimeError as error:  # of the last one
                result = {"error": str(error)}
            print(json.dumps({"plant": name, **result}), flush=True)
