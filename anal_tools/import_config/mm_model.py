"""Convert the network of an MMAction2 config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from anal_tools.import_config.draft import Draft
from anal_tools.import_config.source import ForeignDict, shown
from methods.fetch import FILES

NON_LOCAL = ((0, 0, 0), (1, 0, 1, 0), (1, 0, 1, 0, 1, 0), (0, 0, 0))  # every second block of res3 and res4
# Networks of torchvision that exist here
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet161")
# (embed_dims, depth, num_heads): our backbone
TRANSFORMERS = {
    (384, 12, 6): "vit3d_small",
    (768, 12, 12): "vit3d_base",
    (1024, 24, 16): "vit3d_large",
    (1280, 32, 16): "vit3d_huge",
}
# Options that have one value in our networks; a different value is a different network.
PLAIN_2D = {
    "style": "pytorch",
    "num_stages": 4,
    "in_channels": 3,
    "strides": (1, 2, 2, 2),
    "dilations": (1, 1, 1, 1),
}
PLAIN_3D = {
    "style": "pytorch",
    "num_stages": 4,
    "in_channels": 3,
    "spatial_strides": (1, 2, 2, 2),
    "temporal_strides": (1, 1, 1, 1),
    "dilations": (1, 1, 1, 1),
    "conv1_stride_t": 1,
    "conv1_stride_s": 2,
    "pool1_stride_t": 1,
    "pool1_stride_s": 2,
    "with_pool1": True,
    "with_pool2": False,
    "inflate_style": "3x1x1",
}
# SlowOnly and the Slow pathway inflate res4 and res5 only; the Fast pathway inflates all stages
SLOW = PLAIN_3D | {"conv1_kernel": (1, 7, 7), "inflate": (0, 0, 1, 1), "base_channels": 64}
FAST = PLAIN_3D | {"conv1_kernel": (5, 7, 7), "inflate": (1, 1, 1, 1), "lateral": False}
# The neck of the TPN paper's configs (arXiv 2004.03548), on res4 and res5
TPN_NECK = {
    "in_channels": (1024, 2048),
    "out_channels": 1024,
    "spatial_modulation_cfg": {"in_channels": (1024, 2048), "out_channels": 2048},
    "upsample_cfg": {"scale_factor": (1, 1, 1)},
    "downsample_cfg": {"downsample_scale": (1, 1, 1)},
    "level_fusion_cfg": {
        "in_channels": (1024, 1024),
        "mid_channels": (1024, 1024),
        "out_channels": 2048,
        "downsample_scales": ((1, 1, 1), (1, 1, 1)),
    },
}
# type of their head: (their default dropout, their default init_std)
HEADS: Mapping[str, tuple[float, float]] = {
    "TSNHead": (0.4, 0.01),
    "TSMHead": (0.8, 0.001),
    "I3DHead": (0.5, 0.01),
    "SlowFastHead": (0.8, 0.01),
    "TPNHead": (0.4, 0.01),
    "TimeSformerHead": (0.0, 0.02),
}


def take_model(model: ForeignDict, draft: Draft) -> None:
    """Fill `model.*`.

    Raises:
        UserError: there is no such network here.
    """
    backbone, head = model.part("backbone"), model.part("cls_head")

    name = backbone.text("type")
    # 1.x writes mmcls.ResNet or mmpretrain.ResNet for classes of other packages
    kind = BACKBONES.get(re.sub(r"^mm(cls|pretrain)\.", "", name))
    if kind is None:
        backbone.fail("type", f"{name!r} is not supported here; use one of {', '.join(BACKBONES)}")
    model.skip("type")
    method = kind(backbone, draft)

    # The neck and the head need the method that the backbone gives
    if "neck" in model:
        method = _tpn(model.part("neck"), model, method, draft)
    draft.values["model.type"] = method
    _head(head, method, draft)

    _loose_ends(model, backbone, draft)


def fixed(source: ForeignDict, expected: Mapping[str, object], draft: Draft) -> None:
    """Check options that have no key here; raise UserError if one differs from our network."""
    for key, value in expected.items():
        if key in source.values and _lists(source.raw(key)) != _lists(value):
            source.fail(key, f"{shown(source.values[key])} makes a different network; the one here has {value!r}")
    draft.built_in(source, *expected)


def _lists(value: object) -> object:
    """Return a value with lists in place of tuples, at all depths."""
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------------ backbones


def _depth(backbone: ForeignDict, draft: Draft, known: tuple[int, ...]) -> str:
    depth = backbone.count("depth", 50)
    if depth not in known:
        backbone.fail("depth", f"{depth} is not one of {', '.join(map(str, known))}")
    draft.exact("model.backbone", f"resnet{depth}", backbone, "type", "depth")
    return f"resnet{depth}"


def _norms(backbone: ForeignDict, draft: Draft, *, has_options: bool) -> None:
    """Take over frozen statistics of batch norm, and report options of normalisation that do not exist here."""
    for key, default in (("norm_eval", False), ("partial_bn", False)):
        if backbone.flag(key, default) and not has_options:
            draft.left_out(backbone, key, note="no option of 3D networks here: batch norm is trained")
        elif has_options and key in backbone:
            draft.exact(f"model.kwargs.{key}", backbone.flag(key, default), backbone, key)
        else:
            draft.built_in(backbone, key)

    norm = backbone.part("norm_cfg")
    # SyncBN there spans all GPUs; a group size here depends on the cluster, so the user sets it
    if norm.text("type", "BN") == "SyncBN":
        draft.left_out(
            backbone, "norm_cfg", note="set model.kwargs.bn_group_size to the number of GPUs that share statistics"
        )
    elif norm.flag("requires_grad", True):
        draft.built_in(backbone, "norm_cfg")
    else:
        draft.left_out(backbone, "norm_cfg", note="scale and shift of batch norm are trained here")

    if backbone.number("frozen_stages", -1) >= 0:
        draft.left_out(backbone, "frozen_stages", note="no stage is frozen here")
    draft.built_in(backbone, "frozen_stages", "act_cfg", "conv_cfg", "out_indices")
    draft.left_out(backbone, "with_cp", note="it saves memory and changes no number")


def _weights(backbone: ForeignDict, draft: Draft) -> None:
    """Decide on `model.pretrained`: True for ImageNet weights that `main.py fetch` has, else the user sets a path."""
    start, init = backbone.raw("pretrained"), backbone.parts("init_cfg")

    # 1.x: init_cfg names the checkpoint; 0.x: pretrained
    key = "pretrained"
    for one in init:
        if one.text("type") == "Pretrained":
            start, key = one.raw("checkpoint"), "init_cfg"
        one.skip(*map(str, one.values))

    backbone.skip("init_cfg")
    if start in (None, False):
        draft.exact("model.pretrained", False, backbone, *([key] if key in backbone.values else []))
        return

    network = str(draft.values["model.backbone"])
    # URL or scheme, as "torchvision://resnet50" or ".../mobilenet_v2_....pth"
    text = str(start)
    is_imagenet = network.removesuffix("v2") in text.replace("_", "").lower() or start is True
    if is_imagenet and network in FILES and "kinetics" not in text:
        fetch = f"`python main.py fetch {network}`"
        note = f"weights of ImageNet, from {fetch}: perhaps a different file than {text.rpartition('/')[2]}"
        draft.other("model.pretrained", True, backbone, key, note=note, comment=fetch)
    else:
        draft.left_out(backbone, key, note="download the file and give its path in model.pretrained")

    draft.built_in(backbone, "pretrained2d", "torchvision_pretrain")


def _resnet(backbone: ForeignDict, draft: Draft) -> str:
    _depth(backbone, draft, (18, 34, 50, 101, 152))
    fixed(backbone, PLAIN_2D, draft)
    _norms(backbone, draft, has_options=True)
    _weights(backbone, draft)
    return "tsn"


def _torchvision(backbone: ForeignDict, draft: Draft) -> str:
    draft.exact("model.backbone", backbone.text("type").removeprefix("torchvision."), backbone, "type")
    _weights(backbone, draft)
    return "tsn"


def _resnext(backbone: ForeignDict, draft: Draft) -> str:
    draft.exact("model.backbone", "resnext101_32x4d", backbone, "type")
    fixed(backbone, PLAIN_2D | {"depth": 101, "groups": 32, "width_per_group": 4}, draft)
    _norms(backbone, draft, has_options=True)
    _weights(backbone, draft)
    return "tsn"


def _mobileone(backbone: ForeignDict, draft: Draft) -> str:
    draft.exact("model.backbone", "mobileone_s4", backbone, "type")
    fixed(backbone, {"arch": "s4"}, draft)
    draft.built_in(backbone, "deploy", note="the branches are joined in a deployed network, which changes no number")
    _norms(backbone, draft, has_options=True)
    _weights(backbone, draft)
    return "tsn"


def _mobileone_tsm(backbone: ForeignDict, draft: Draft) -> str:
    # First the keys of the shift: `_mobileone` reports those that are left
    _shift(backbone, draft)
    _mobileone(backbone, draft)
    return "tsm"


def _resnet_tsm(backbone: ForeignDict, draft: Draft) -> str:
    _shift(backbone, draft)
    # "blockres": the shift is inside the residual branch (TSM paper, figure 3b)
    fixed(backbone, {"shift_place": "blockres"}, draft)
    if backbone.flag("temporal_pool", False):
        draft.exact("model.kwargs.temporal_pool", True, backbone, "temporal_pool")
    _resnet(backbone, draft)

    mode = _non_local(backbone, draft, scaled=False)
    if mode:
        draft.exact("model.kwargs.non_local", mode, backbone, "non_local", "non_local_cfg")
    return "tsm"


def _shift(backbone: ForeignDict, draft: Draft) -> None:
    if not backbone.flag("is_shift", True):
        backbone.fail("is_shift", "without shifts this is a TSN; set type='ResNet' and TSNHead")
    draft.exact("model.kwargs.shift_div", backbone.count("shift_div", 8), backbone, "shift_div")
    draft.built_in(backbone, "is_shift")
    draft.built_in(backbone, "num_segments", note="the frames of train_pipeline decide")


def _non_local(backbone: ForeignDict, draft: Draft, *, scaled: bool) -> str | None:
    """Return the form of the non-local blocks; None without such blocks."""
    places = _lists(backbone.raw("non_local"))
    # For each stage 0 or 1, or a list of 0 and 1 for its blocks
    if not places or not any(
        map(any, places) if isinstance(places, list) and isinstance(places[0], list) else [places != [0] * 4]
    ):
        draft.built_in(backbone, "non_local", "non_local_cfg")
        return None

    if places != _lists(NON_LOCAL):
        backbone.fail(
            "non_local", f"here, blocks come after {NON_LOCAL}, every second one of res3 and res4 of a ResNet-50"
        )

    form = backbone.part("non_local_cfg")
    fixed(form, {"sub_sample": True, "use_scale": scaled, "norm_cfg": {"type": "BN3d", "requires_grad": True}}, draft)
    return form.text("mode", "embedded_gaussian")


def _mobilenet(backbone: ForeignDict, draft: Draft) -> str:
    draft.exact("model.backbone", "mobilenetv2", backbone, "type")
    fixed(backbone, {"widen_factor": 1.0}, draft)
    _norms(backbone, draft, has_options=True)
    _weights(backbone, draft)
    return "tsn"


def _mobilenet_tsm(backbone: ForeignDict, draft: Draft) -> str:
    _shift(backbone, draft)
    _mobilenet(backbone, draft)
    return "tsm"


def _slowonly(backbone: ForeignDict, draft: Draft) -> str:
    _depth(backbone, draft, (18, 34, 50, 101))
    fixed(backbone, SLOW | {"lateral": False}, draft)
    _norms(backbone, draft, has_options=False)
    _weights(backbone, draft)

    zero = backbone.flag("zero_init_residual", True)
    draft.exact("model.kwargs.zero_init_residual", zero, backbone, "zero_init_residual")
    # Their 3D blocks divide by the square root of the channels, unlike the 2D ones
    mode = _non_local(backbone, draft, scaled=True)
    if mode:
        draft.exact("model.kwargs.non_local", mode, backbone, "non_local", "non_local_cfg")
        draft.values["model.kwargs.non_local_form"] = "mmaction2"
    return "slowonly"


def _slowfast(backbone: ForeignDict, draft: Draft) -> str:
    slow, fast = backbone.part("slow_pathway"), backbone.part("fast_pathway")
    alpha, rate = backbone.count("speed_ratio", 8), backbone.count("resample_rate", 8)
    if alpha != rate:
        backbone.fail("resample_rate", f"{rate} is not speed_ratio ({alpha}); the Fast pathway sees every frame here")

    name = _depth(slow, draft, (18, 34, 50, 101))
    backbone.skip("type")
    # Ratios: alpha is that of the frame rates, beta that of the channels (SlowFast paper, section 3)
    draft.exact("model.kwargs.alpha", alpha, backbone, "speed_ratio", "resample_rate")
    beta = backbone.count("channel_ratio", 8)
    draft.exact("model.kwargs.beta_inv", beta, backbone, "channel_ratio")

    # The pathways may differ in depth
    other = fast.count("depth", 50)
    fast_name = f"resnet{other}"
    draft.exact("model.kwargs.fast_backbone", None if fast_name == name else fast_name, fast, "depth")
    draft.exact("model.kwargs.fusion_kernel", slow.count("fusion_kernel", 5), slow, "fusion_kernel")
    draft.exact("model.kwargs.lateral_norm", slow.flag("lateral_norm", False), slow, "lateral_norm")

    # How MMAction2 picks the Slow frames, and the order of the pathways before its classifier
    draft.values |= {"model.kwargs.slow_index": "strided", "model.kwargs.slow_first": False}
    for path, fixed_options in ((slow, SLOW | {"lateral": True}), (fast, FAST | {"base_channels": 64 // max(beta, 1)})):
        fixed(path, fixed_options | {"type": "resnet3d", "lateral_infl": 2, "pretrained": None}, draft)
        _norms(path, draft, has_options=False)

    zero = slow.flag("zero_init_residual", True)
    draft.exact("model.kwargs.zero_init_residual", zero, slow, "zero_init_residual")
    fast.skip("zero_init_residual")

    # Two pathways have no ImageNet weights that fit
    if backbone.raw("pretrained"):
        draft.left_out(backbone, "pretrained", note="download the file and give its path in model.pretrained")
    draft.values["model.pretrained"] = False
    backbone.skip("init_cfg")
    return "slowfast"


def _vit(backbone: ForeignDict, draft: Draft) -> str:
    size = (backbone.count("embed_dims", 768), backbone.count("depth", 12), backbone.count("num_heads", 12))
    name = TRANSFORMERS.get(size)
    # The named backbones have four sizes; spell out any other one
    if name is None:
        draft.exact("model.backbone", "vit3d", backbone, "type")
        for ours, theirs, default in (("width", "embed_dims", 768), ("depth", "depth", 12), ("heads", "num_heads", 12)):
            draft.exact(f"model.kwargs.{ours}", backbone.count(theirs, default), backbone, theirs)
        draft.exact("model.kwargs.mlp_ratio", backbone.number("mlp_ratio", 4), backbone, "mlp_ratio")
    else:
        draft.exact("model.backbone", name, backbone, "type", "embed_dims", "depth", "num_heads")
        fixed(backbone, {"mlp_ratio": 4}, draft)

    # Tokens, attention and pooling
    draft.exact("model.kwargs.patch", backbone.count("patch_size", 16), backbone, "patch_size")
    draft.exact("model.kwargs.tubelet", backbone.count("tubelet_size", 2), backbone, "tubelet_size")
    draft.exact("model.kwargs.qkv_bias", "qv" if backbone.flag("qkv_bias", True) else "none", backbone, "qkv_bias")
    draft.exact(
        "model.kwargs.pooling",
        "mean" if backbone.flag("use_mean_pooling", True) else "first",
        backbone,
        "use_mean_pooling",
    )
    draft.exact("model.kwargs.drop_path", backbone.number("drop_path_rate", 0.0), backbone, "drop_path_rate")
    draft.exact("model.kwargs.attention_dropout", backbone.number("attn_drop_rate", 0.0), backbone, "attn_drop_rate")

    norm = backbone.part("norm_cfg")
    eps = norm.number("eps", 1e-6)
    fixed(norm, {"type": "LN"}, draft)
    draft.exact("model.kwargs.eps", eps, norm, *(["eps"] if "eps" in norm else []))
    draft.values["model.kwargs.head_eps"] = eps  # the norm of the head has the same epsilon there

    fixed(
        backbone,
        {
            "in_channels": 3,
            "drop_rate": 0.0,
            "init_values": 0.0,
            "use_learnable_pos_emb": False,
            "return_feat_map": False,
        },
        draft,
    )

    draft.built_in(backbone, "img_size", "num_frames", note="the clips decide")
    _weights(backbone, draft)
    return "videomae"


# Type of their backbone: function that fills the draft and returns our method
BACKBONES: Mapping[str, Callable[[ForeignDict, Draft], str]] = {
    "ResNet": _resnet,
    "ResNetTSM": _resnet_tsm,
    "ResNeXt": _resnext,
    **dict.fromkeys((f"torchvision.{name}" for name in TORCHVISION), _torchvision),
    "MobileOne": _mobileone,
    "MobileOneTSM": _mobileone_tsm,
    "MobileNetV2": _mobilenet,
    "MobileNetV2TSM": _mobilenet_tsm,
    "ResNet3dSlowOnly": _slowonly,
    "ResNet3dSlowFast": _slowfast,
    "VisionTransformer": _vit,
}


# ----------------------------------------------------------------------------------------------------------------- rest


def _tpn(neck: ForeignDict, model: ForeignDict, base: str, draft: Draft) -> str:
    if neck.text("type") != "TPN" or base not in ("slowonly", "tsm"):
        neck.fail(
            "type", f"{neck.text('type')!r} on {base} is not supported here; use TPN on ResNet3dSlowOnly or ResNetTSM"
        )
    # Options of the base method that TPN does not have
    for key in ("norm_eval", "partial_bn"):
        if draft.values.pop(f"model.kwargs.{key}", False):
            model.part("backbone").fail(key, "no option of TPN here: batch norm is trained")

    fixed(neck, TPN_NECK, draft)
    neck.skip("type")
    scales = neck.part("temporal_modulation_cfg")
    draft.exact("model.kwargs.base", base, neck, "type")
    draft.exact("model.kwargs.scales", scales.numbers("downsample_scales", (8, 8)), scales, "downsample_scales")
    draft.exact("model.kwargs.flow", neck.text("flow_type", "cascade"), neck, "flow_type")

    # Their neck without aux_head_cfg has no auxiliary loss
    aux = neck.part("aux_head_cfg")
    draft.exact("model.kwargs.aux_weight", aux.number("loss_weight", 0.5) if aux.values else 0.0, aux, "loss_weight")

    draft.built_in(aux, "out_channels", note="the auxiliary head has model.num_class classes")
    draft.built_in(model.part("test_cfg"), "fcn_test", note="the average of a larger crop's map is the same here")

    return "tpn"


def _head(head: ForeignDict, method: str, draft: Draft) -> None:
    name = head.text("type")
    if name not in HEADS:
        head.fail("type", f"{name!r} is not supported here; use one of {', '.join(HEADS)}")
    dropout, std = HEADS[name]

    draft.built_in(head, "type", "in_channels")
    draft.exact("model.num_class", head.count("num_classes"), head, "num_classes")
    draft.exact("model.dropout", head.number("dropout_ratio", dropout), head, "dropout_ratio")
    # init_scale is relative to a standard deviation of 0.02
    if method == "videomae":
        draft.exact("model.kwargs.init_scale", head.number("init_std", std) / 0.02, head, "init_std")
    else:
        draft.exact("model.kwargs.fc_std", head.number("init_std", std), head, "init_std")

    if name in ("TSNHead", "TSMHead", "TPNHead"):
        fixed(head.part("consensus"), {"type": "AvgConsensus", "dim": 1}, draft)
    if method == "tsn":
        draft.values["model.kwargs.consensus"] = "features"  # TSNHead averages before its classifier

    fixed(
        head,
        {
            "spatial_type": "avg",
            "is_shift": True,
            "temporal_pool": bool(draft.values.get("model.kwargs.temporal_pool")),
        },
        draft,
    )

    draft.built_in(head, "num_segments", note="the frames of train_pipeline decide")
    draft.built_in(head, "topk", note="top-1 and top-5 are always computed")
    _loss(head, draft)


def _loss(head: ForeignDict, draft: Draft) -> None:
    if "label_smooth_eps" in head:
        draft.exact("label_smooth", head.number("label_smooth_eps"), head, "label_smooth_eps")

    loss = head.part("loss_cls")
    name = loss.text("type", "CrossEntropyLoss")
    if name == "BCELossWithLogits" or head.flag("multi_class", False):
        draft.exact("loss", "bce", head, "loss_cls", "multi_class")
    elif name == "CrossEntropyLoss":
        fixed(loss, {"type": name, "loss_weight": 1.0, "class_weight": None}, draft)
    else:
        loss.fail("type", f"{name!r} is not supported here; use CrossEntropyLoss (ce) or BCELossWithLogits (bce)")

    head.skip("multi_class")


def _loose_ends(model: ForeignDict, backbone: ForeignDict, draft: Draft) -> None:
    """Convert normalisation, mixing of clips, and options of training and test."""
    pre = model.part("data_preprocessor")
    if pre.values:
        # 1.x normalises and mixes in the preprocessor, 0.x in the pipeline and train_cfg
        normalisation(pre, draft)
        pre.skip("type", "format_shape", "to_float32")
        if pre.flag("to_rgb", False):
            draft.built_in(pre, "to_rgb", note="frames are RGB here")
        blending(pre, "blending", draft)

    train = model.part("train_cfg")
    blending(train, "blending", draft)

    model.part("test_cfg").skip("average_clips", "feature_extraction")
    draft.left_out(
        model.part("test_cfg"), "max_testing_views", note="the views that go through at once follow from the memory"
    )
    draft.built_in(model, "train_cfg", "test_cfg") if not train.values else None


def normalisation(source: ForeignDict, draft: Draft) -> None:
    """Convert mean and standard deviation from pixels of 0..255 to 0..1."""
    for key in ("mean", "std"):
        if key in source:
            values = [round(value / 255, 6) for value in source.numbers(key)]
            draft.exact(f"augmentation.{key}", values, source, key)


def blending(source: ForeignDict, key: str, draft: Draft) -> None:
    """Convert mixup and CutMix."""
    if key not in source:
        return
    one = source.part(key)
    name = one.text("type")
    # RandomBatchAugment chooses one of several; any other type is the augmentation itself
    augments = one.parts("augments") if name == "RandomBatchAugment" else [one]

    for augment in augments:
        kind = {"MixupBlending": "mix_up", "CutmixBlending": "cutmix"}.get(augment.text("type"))
        if kind is None:
            augment.fail("type", f"{augment.text('type')!r} is not supported here; use Mixup or Cutmix")
        note = "one number for the whole batch in both; neighbouring clips are mixed here, a random permutation there"
        draft.other(f"augmentation.{kind}", augment.number("alpha", 0.2), augment, "alpha", note=note)
        augment.skip("type", "num_classes")

    if name == "RandomBatchAugment":
        # Without probs all are equally likely
        probabilities = one.numbers("probs") if "probs" in one else [0.5] * len(augments)
        if len(augments) != 2 or round(sum(probabilities), 6) != 1:
            one.fail("probs", "a step takes one of mixup and CutMix here; their probabilities must sum to 1")
        cut = next((p for p, a in zip(probabilities, augments, strict=True) if a.text("type") == "CutmixBlending"), 0.5)
        draft.exact("augmentation.mix_up_switch", cut, one, *(["probs"] if "probs" in one else []))
        one.skip("type")
