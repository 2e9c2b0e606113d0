"""The other side of `vit.py`: Hugging Face's models, or ours, in a process that answers lines of JSON.

It runs in the interpreter of either side and in a folder of its own, for our `datasets` and `utils` hide packages of
these names. It imports our code only when it runs `ours`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch

CLASSES = {"videomae": "VideoMAE", "vjepa2": "VJEPA2"}
VIT_S = {"width": 384, "depth": 12, "heads": 6}


def huggingface(family: str, config: dict) -> Any:
    """Build a model of transformers by its own configuration class."""
    import transformers  # pyright: ignore[reportMissingImports]  of the peer's environment

    settings = getattr(transformers, f"{CLASSES[family]}Config")(**config)
    return getattr(transformers, f"{CLASSES[family]}ForVideoClassification")(settings)


def draw(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter drawn numbers: weights N(0, .05), biases N(0, .1), weights of norms 1 + N(0, .1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_norm = isinstance(module, torch.nn.LayerNorm) and name == "weight"
                spread = 0.1 if is_norm or name == "bias" else 0.05
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + is_norm)


def logits(request: dict) -> dict:
    """Draw a model, write its tensors, clips and logits to a file."""
    from safetensors.torch import save_file

    model = huggingface(request["family"], request["config"]).eval()
    draw(model, request["seed"])
    model.to(getattr(torch, request["dtype"]))
    generator = torch.Generator().manual_seed(request["seed"] + 1)
    clips = torch.randn(request["shape"], generator=generator).to(getattr(torch, request["dtype"]))
    with torch.inference_mode():
        answer = model(clips.transpose(1, 2)).logits  # (B, C, T, H, W) -> (B, T, C, H, W)
    tensors = {f"weights.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors | {"clips": clips, "logits": answer.contiguous()}, request["file"])
    return {}


def save(request: dict) -> dict:
    """Write a drawn model as transformers does."""
    model = huggingface(request["family"], request["config"])
    draw(model, request["seed"])
    model.save_pretrained(request["folder"])
    return {}


def load(request: dict) -> dict:
    """Load a folder, and write its tensors and the logits of clips that a file holds."""
    import transformers  # pyright: ignore[reportMissingImports]  of the peer's environment
    from safetensors.torch import load_file, save_file

    auto = transformers.AutoModelForVideoClassification
    model, info = auto.from_pretrained(request["folder"], output_loading_info=True)
    clips = load_file(request["clips"])["clips"]
    with torch.inference_mode():
        answer = model.eval()(clips.transpose(1, 2)).logits  # (B, C, T, H, W) -> (B, T, C, H, W)
    tensors = {f"weights.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors | {"logits": answer.contiguous()}, request["file"])
    return {key: sorted(map(str, value)) for key, value in info.items() if value}


class Steps:
    """Forward, backward and AdamW on one drawn batch; the loop is the same for both sides."""

    def __init__(self, side: str, request: dict) -> None:
        torch.manual_seed(0)
        clips = request["batch"], 3, request["frames"], request["size"], request["size"]
        if side == "ours":
            import methods

            options = {"checkpointing": request.get("checkpointing", False), **VIT_S}
            self.model = methods.build(
                type="videomae", backbone="vit3d", num_class=400, num_segments=request["frames"], dropout=0, **options
            )
            self.clips = torch.randn(clips)
        else:
            config = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 400}
            self.model = huggingface("videomae", config | {"image_size": request["size"]}).train()
            self.clips = torch.randn(clips).transpose(1, 2).contiguous()
        self.labels = torch.arange(request["batch"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> float:
        """Return the loss of a step."""
        answer = self.model(self.clips)
        loss = torch.nn.functional.cross_entropy(getattr(answer, "logits", answer), self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    """Answer requests until the input ends."""
    side, before = sys.argv[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.set_num_threads(1)
    steps = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] != "step":
            answer = {"logits": logits, "save": save, "load": load}[request["do"]](request)
        else:
            steps = steps or Steps(side, request)
            started = time.process_time()
            loss = steps.step()
            seconds = time.process_time() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = {"seconds": seconds, "loss": loss, "mib": (peak - before) / 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
