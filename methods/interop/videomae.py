"""Convert names of VideoMAE and VideoMAE v2: Hugging Face's, and those of the authors' files, also pre-trained.

The authors' files have one epsilon, Hugging Face's have two. A folder's config.json holds the number of heads; for the
authors' files it is that of the published network of their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from methods.interop import _vit
from methods.interop._names import Converted, Options, convert, has

if TYPE_CHECKING:
    from methods.interop._config import HfConfig

SLOW_FIRST = None  # no SlowFast here
NEEDS: dict[str, str] = {}
HEADS = ("fc_norm.",)  # missing in a pre-trained file, so that fine-tuning starts with a new one
BIAS = "qv"  # k has none
FRAMES = 16  # default of transformers
LICENCE = "cc-by-nc-4.0"  # of the weights that the authors publish
FOLDER_HEAD_EPS = 1e-5  # of fc_norm: torch's default, which no config holds
ARCHITECTURE = "VideoMAEForVideoClassification"
MODEL_TYPE = "videomae"

_ORIGINAL = {"eps": "1e-06", "head_eps": "1e-06"}
# fine-tuned, pre-trained and converted files have different prefixes
_PREFIX = r"(?:encoder\.|model\.|backbone\.)?"
RULES = (
    (r"(?:decoder|encoder_to_decoder)\..*|mask_token", None),
    (_PREFIX + r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
    (_PREFIX + r"(blocks\.\d+\..*)", r"backbone.\1"),
    (_PREFIX + r"norm\.(.*)", r"backbone.norm.\1"),
    (_PREFIX + r"fc_norm\.(.*)", r"fc_norm.\1"),
    (_PREFIX + r"head\.(.*)", r"classifier.\1"),
)
_PRETRAINING = ("decoder.", "encoder_to_decoder.", "mask_token")  # no logit depends on these


def is_hf(names: Mapping[str, Tensor]) -> bool:
    """Return True for the names that transformers uses."""
    return has(names, r"(videomae\.)?embeddings\.patch_embeddings\.projection\.weight$")


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    # a 3D patch embedding; image transformers have the same names and four axes
    patch = next((names[name] for name in names if name.endswith("patch_embed.proj.weight")), None)
    original = has(names, _PREFIX + r"(blocks\.0\.attn\.q_bias|fc_norm\.weight)$")

    return is_hf(names) or (original and patch is not None and patch.dim() == 5)


def table(names: Mapping[str, Tensor]) -> _vit.Table:
    """Return {our name: transformers' names}, for as many blocks as the names have (theirs or ours)."""
    stem = "videomae."
    blocks = _vit.numbers(names, r"(?:videomae\.encoder\.layer|backbone\.blocks)\.(\d+)\.")
    entries = _vit.pairs("backbone.patch_embed", f"{stem}embeddings.patch_embeddings.projection")

    for number in blocks:
        ours, theirs = f"backbone.blocks.{number}", f"{stem}encoder.layer.{number}"
        attention = f"{theirs}.attention.attention"
        entries |= _vit.pairs(f"{ours}.norm1", f"{theirs}.layernorm_before")
        entries |= _vit.joined(f"{ours}.attn.qkv", attention, ("query", "key", "value"), ("weight",))
        entries |= {f"{ours}.attn.{name}": (f"{attention}.{name}",) for name in ("q_bias", "v_bias")}
        entries |= _vit.pairs(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
        entries |= _vit.pairs(f"{ours}.norm2", f"{theirs}.layernorm_after")
        entries |= _vit.pairs(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
        entries |= _vit.pairs(f"{ours}.mlp.fc2", f"{theirs}.output.dense")

    entries |= _vit.pairs("backbone.norm", f"{stem}layernorm")
    return entries | _vit.pairs("fc_norm", "fc_norm") | _vit.pairs("classifier", "classifier")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    if not is_hf(state):
        result = convert(state, RULES)
        result.needs = _ORIGINAL | _vit.published_heads(result.state, giant=16)
    else:
        skipped, twice, renamed = [], [], dict[str, Tensor]()
        for name, tensor in state.items():
            known = _transformers_name(name)
            if name.startswith(_PRETRAINING):
                skipped.append(name)
            # the same tensor with and without the model's prefix: one of them must be wrong
            elif known in renamed:
                twice.append(name)
            else:
                renamed[known] = tensor

        result = _vit.to_ours(renamed, table(renamed))
        result.skipped, result.unknown = skipped, result.unknown + twice

    if "classifier.weight" in result.state:
        # fc_norm follows the mean over the tokens; without it the first token is classified
        result.needs["pooling"] = "mean" if "fc_norm.weight" in result.state else "first"
    if result.needs.get("pooling") == "first":
        result.needs.pop("head_eps", None)  # there is no such norm
    return result


def _transformers_name(name: str) -> str:
    """Return a name as transformers writes it: with the model's prefix, which an encoder lacks, and with `q_bias`."""
    if name.startswith(("embeddings.", "encoder.", "layernorm.")):
        name = f"videomae.{name}"
    for old, new in (("query.bias", "q_bias"), ("value.bias", "v_bias")):
        name = name.replace(f".attention.attention.{old}", f".attention.attention.{new}")
    return name


def needs(config: HfConfig, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the options that a folder's config holds and no tensor shows, as text."""
    options = {"eps": repr(config.number("layer_norm_eps", 1e-12))}
    options["heads"] = str(config.count("num_attention_heads", 12))
    return options | ({"head_eps": repr(FOLDER_HEAD_EPS)} if "fc_norm.weight" in state else {})


def arguments(config: HfConfig, state: Mapping[str, Tensor]) -> Options:
    """Return the arguments of `methods.build` that a folder describes.

    Args:
        config: values of the folder's config.json.
        state: its tensors under our names.

    Raises:
        UserError: the two contradict each other, or describe a different network.
    """
    config.require("hidden_act", "gelu")
    config.require("num_channels", 3)

    # Refuse a config of a different size before any memory is allocated for it.
    config.agree(
        _vit.shape_of(state),
        width=config.count("hidden_size", 768),
        depth=config.count("num_hidden_layers", 12),
        mlp=config.count("intermediate_size", 3072),
        patch=config.side("patch_size", 16),
        tubelet=config.count("tubelet_size", 2),
    )
    # transformers renamed the key
    bias = config.flag("qkv_bias" if "qkv_bias" in config.values else "qv_bias", True)
    config.agree({"q and v biases": _vit.bias_of(state) != "none"}, **{"q and v biases": bias})

    heads = config.count("num_attention_heads", 12)
    options = {"type": "videomae", **_vit.backbone_options(state, heads=heads, bias=BIAS)}
    options |= {"num_segments": config.count("num_frames", FRAMES), "eps": config.number("layer_norm_eps", 1e-12)}
    # the norm of the mean; the first token has no such norm
    if config.flag("use_mean_pooling", True):
        return options | {"head_eps": FOLDER_HEAD_EPS}
    return options | {"pooling": "first"}


def side(config: HfConfig) -> int:
    """Return the height and width of the frames, pixels."""
    return config.side("image_size", 224)


def written(arch: _vit.Architecture) -> Options:
    """Return the keys of config.json for one of our networks."""
    return {
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": arch.mlp,
        "patch_size": arch.patch,
        "tubelet_size": arch.tubelet,
        "num_channels": 3,
        "num_frames": arch.frames,
        "image_size": arch.side,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": arch.eps,
        "qv_bias": arch.bias != "none",
        "qkv_bias": arch.bias != "none",  # transformers 4's name
        "use_mean_pooling": arch.pooling == "mean",
    }
