"""Convert optimiser, learning rate and length of a run of an MMAction2 config, 0.x or 1.x."""

from __future__ import annotations

from collections.abc import Sequence

from anal_tools.import_config.draft import Draft
from anal_tools.import_config.source import ForeignDict

LR = "lr_scheduler."


def take_optimizer(optimizer: ForeignDict, groups: ForeignDict, draft: Draft) -> None:
    """Fill the optimiser's keys, except the learning rate.

    Args:
        optimizer: their section with type and lr.
        groups: their section with `constructor` and `paramwise_cfg`: `optimizer` itself in 0.x, `optim_wrapper` in 1.x.
    """
    name = optimizer.text("type")
    if name == "SGD":
        draft.exact("momentum", optimizer.number("momentum", 0.0), optimizer, "momentum")
        draft.exact("nesterov", optimizer.flag("nesterov", False), optimizer, "nesterov")
        draft.built_in(optimizer, "type")
        if optimizer.number("dampening", 0):
            draft.left_out(optimizer, "dampening", note="the momentum has no dampening here")
    elif name == "AdamW":
        draft.exact("optimizer.type", "adamw", optimizer, "type")
        draft.exact("optimizer.betas", optimizer.numbers("betas", (0.9, 0.999)), optimizer, "betas")
        draft.exact("optimizer.eps", optimizer.number("eps", 1e-8), optimizer, "eps")
    else:
        optimizer.fail("type", f"{name!r} is not supported here; use SGD or AdamW")

    draft.exact("weight_decay", optimizer.number("weight_decay", 0.0), optimizer, "weight_decay")
    _groups(groups, draft, adamw=name == "AdamW")


def _groups(groups: ForeignDict, draft: Draft, *, adamw: bool) -> None:
    """Convert learning rates and weight decays of parameter groups."""
    constructor, wise = groups.text("constructor"), groups.part("paramwise_cfg")
    # The constructor chooses a known grouping
    if constructor in ("TSMOptimWrapperConstructor", "TSMOptimizerConstructor"):
        # fc_lr5: five times the rate for the classifier (TSM)
        five = wise.flag("fc_lr5", False)
        draft.exact("policy", True, groups, "constructor")
        draft.exact("model.kwargs.fc_lr5", five, wise, "fc_lr5")
    elif constructor == "LearningRateDecayOptimizerConstructor":
        draft.exact("optimizer.layer_decay", wise.number("decay_rate"), wise, "decay_rate")
        groups.skip("constructor")
        wise.skip("decay_type", "num_layers")
    elif constructor not in ("", "DefaultOptimWrapperConstructor", "DefaultOptimizerConstructor"):
        groups.fail("constructor", f"{constructor!r} makes parameter groups that do not exist here")

    # Multipliers of weight decay: only 0, no decay, exists here
    norm, bias = (wise.number(key, 1) == 0 for key in ("norm_decay_mult", "bias_decay_mult"))
    if adamw:
        draft.built_in(wise, "norm_decay_mult", "bias_decay_mult", note="AdamW decays neither norms nor biases here")
    elif norm:
        draft.exact(
            "no_wd",
            True if bias else "bn",
            wise,
            *(key for key in ("norm_decay_mult", "bias_decay_mult") if key in wise),
        )
    elif bias or wise.number("norm_decay_mult", 1) != 1 or wise.number("bias_decay_mult", 1) != 1:
        for key in ("norm_decay_mult", "bias_decay_mult"):
            if key in wise:
                draft.left_out(wise, key, note="no_wd spares norms, or norms and biases")

    # All other multipliers
    for key, value in wise.values.items():
        if wise.full(str(key)) not in wise.read:
            draft.left_out(wise, str(key), note=f"no such parameter groups here ({value!r})")


def take_clip(holder: ForeignDict, key: str, draft: Draft) -> None:
    """Convert gradient clipping by the norm."""
    clip = holder.part(key)
    if not clip.values:
        return
    if clip.number("norm_type", 2) != 2:
        clip.fail("norm_type", "gradients are limited by their 2-norm here")

    draft.exact("clip_grad", clip.number("max_norm"), clip, "max_norm")
    clip.skip("norm_type")


# ------------------------------------------------------------------------------------------------------------------ 1.x


def take_schedulers(schedulers: Sequence[ForeignDict], optimizer: ForeignDict, epochs: float, draft: Draft) -> None:
    """Fill `lr_scheduler.*` from 1.x's `param_scheduler`.

    There a schedule by epoch counts from its `begin`, and each schedule acts on the rate that the others have left.
    """
    warm = [one for one in schedulers if one.text("type") == "LinearLR"]
    main = [one for one in schedulers if one.text("type") != "LinearLR"]
    if len(warm) > 1 or len(main) > 1:
        schedulers[-1].fail("type", "one warm-up and one schedule make the learning rate here")

    # With a warm-up, their lr is the peak: warmup_lr here
    lr = float(optimizer.number("lr"))
    draft.exact(LR + ("warmup_lr" if warm else "base_lr"), lr, optimizer, "lr")
    warm_up = _warm_up(warm[0], lr, draft) if warm else 0.0

    if not main:
        _constant(lr, draft)
    elif main[0].text("type") == "CosineAnnealingLR":
        _cosine(main[0], warm_up, epochs, draft)
    elif main[0].text("type") in ("MultiStepLR", "StepLR"):
        _multi_step(main[0], warm_up, epochs, draft)
    else:
        main[0].fail("type", f"{main[0].text('type')!r} is not supported here; use steps, cosine or a linear warm-up")


def _by_epoch(scheduler: ForeignDict) -> None:
    if not scheduler.flag("by_epoch", True):
        scheduler.fail("by_epoch", "a schedule in iterations for a run in epochs; give begin, end and T_max in epochs")
    scheduler.skip("by_epoch", "type", "verbose")


def _warm_up(warm: ForeignDict, lr: float, draft: Draft) -> float:
    """Return the epoch in which the warm-up reaches its peak."""
    _by_epoch(warm)
    begin, end = warm.number("begin", 0), warm.number("end")
    if begin or warm.number("end_factor", 1.0) != 1 or end <= 1:
        warm.fail("begin", "a warm-up begins with the run, takes more than an epoch and ends at the rate itself here")

    draft.exact(LR + "base_lr", lr * warm.number("start_factor", 1 / 3), warm, "start_factor")
    warm.skip("begin", "end_factor")

    if warm.flag("convert_to_iter_based", False):
        note = "at its peak one iteration later than there"
        draft.other(LR + "warmup_epochs", end, warm, "end", "convert_to_iter_based", note=note)
        return end

    warm.skip("convert_to_iter_based")
    # LinearLR by epoch takes `end` values, of which the last, at epoch end - 1, is the peak
    note = f"their LinearLR of {end:g} epochs is at its peak in the last of them"
    draft.other(LR + "warmup_epochs", end - 1, warm, "end", note=note, comment=note)
    draft.values[LR + "warmup_by"] = "epoch"
    return end - 1


def _constant(lr: float, draft: Draft) -> None:
    # The schema has no schedule for a constant rate
    draft.ours_only(LR + "type", "COSINE", "from base_lr to the same min_lr: constant")
    draft.values[LR + "min_lr"] = lr


def _cosine(main: ForeignDict, warm_up: float, epochs: float, draft: Draft) -> None:
    _by_epoch(main)
    begin = main.number("begin", 0)
    length = main.number("T_max", epochs - begin)

    draft.exact(LR + "type", "COSINE", main, "type")
    # eta_min_ratio is relative to the peak rate
    peak = float(str(draft.values.get(LR + "warmup_lr", draft.values[LR + "base_lr"])))
    low = main.number("eta_min", 0) if "eta_min_ratio" not in main else main.number("eta_min_ratio") * peak
    draft.exact(LR + "min_lr", low, main, *(key for key in ("eta_min", "eta_min_ratio") if key in main.values))

    step_by = "iteration" if main.flag("convert_to_iter_based", False) else "epoch"
    draft.exact(LR + "step_by", step_by, main, "convert_to_iter_based")

    if begin + length != epochs:
        draft.other(LR + "max_epoch", epochs, main, "T_max", note="the cosine ends with the run here")
    # Warm-up and cosine overlap: there their factors are multiplied
    if warm_up and begin < warm_up:
        draft.values[LR + "warmup_type"] = "factor_linear"  # both act at once
        begin = 0.0

    if begin and begin != warm_up:
        draft.exact(LR + "cosine_begin_epoch", begin, main, "begin")
    main.skip("begin", "end", "T_max")


def _multi_step(main: ForeignDict, warm_up: float, epochs: float, draft: Draft) -> None:
    _by_epoch(main)
    begin, gamma = main.number("begin", 0), main.number("gamma", 0.1)

    if main.text("type") == "StepLR":
        every = main.count("step_size")
        if every < 1:
            main.wrong("step_size", "a number of epochs")
        # The bound keeps a typo in max_epochs from making a huge list
        marks: list[float] = [float(mark) for mark in range(every, int(min(epochs, 1e4)), every)]
        keys = ("step_size",)
    else:
        marks, keys = main.numbers("milestones"), ("milestones",)
    # Steps after the end of the run have no effect
    at = [mark + begin for mark in marks if mark + begin < epochs]
    if not at:
        main.skip("begin", "end", "gamma", *keys)
        _constant(float(str(draft.values.get(LR + "warmup_lr", draft.values[LR + "base_lr"]))), draft)
        return

    draft.exact(LR + "type", "STEP", main, "type")
    if begin:
        note = f"their milestones count from begin ({begin:g}), whatever the file seems to say"
        draft.other(LR + "lr_epochs", at, main, *keys, "begin", note=note, comment=note)
    else:
        draft.exact(LR + "lr_epochs", at, main, *keys)
    draft.exact(LR + "lr_mults", [gamma] * len(at), main, "gamma")

    # A step during the warm-up: there the factors are multiplied
    if warm_up and at[0] < warm_up:
        draft.values[LR + "warmup_type"] = "factor_linear"

    main.flag("convert_to_iter_based", False)
    main.skip("begin", "end")


# ------------------------------------------------------------------------------------------------------------------ 0.x


def take_lr_config(config: ForeignDict, optimizer: ForeignDict, draft: Draft) -> None:
    """Fill `lr_scheduler.*` from 0.x's `lr_config`."""
    lr = float(optimizer.number("lr"))
    policy = config.text("policy", "fixed")

    by_epoch = config.flag("by_epoch", True)
    if not by_epoch and policy.lower() == "step":
        config.fail("by_epoch", "steps in iterations for a run in epochs; give them in epochs")

    # The schedule; one number as `step` means a step every so many epochs
    if policy.lower() == "step":
        gamma, steps = (
            config.number("gamma", 0.1),
            config.numbers("step") if not isinstance(config.raw("step"), int) else [],
        )
        if isinstance(config.raw("step"), int):
            every = config.count("step")
            last = float(str(draft.values[LR + "max_epoch"]))
            steps = [float(at) for at in range(every, int(min(last, 1e4)), every)] if every > 0 else []
        if steps:
            draft.exact(LR + "type", "STEP", config, "policy")
            draft.exact(LR + "lr_epochs", steps, config, "step")
            draft.exact(LR + "lr_mults", [gamma] * len(steps), config, "gamma")
        else:
            _constant(lr, draft)
    elif policy == "CosineAnnealing":
        draft.exact(LR + "type", "COSINE", config, "policy")
        low = config.number("min_lr") if "min_lr" in config else config.number("min_lr_ratio", 0) * lr
        draft.exact(LR + "min_lr", low, config, *(key for key in ("min_lr", "min_lr_ratio") if key in config.values))
        draft.exact(LR + "step_by", "epoch" if by_epoch else "iteration", config, "by_epoch")
    elif policy == "fixed":
        _constant(lr, draft)
    else:
        config.fail("policy", f"{policy!r} is not supported here; use step, CosineAnnealing or fixed")

    config.skip("by_epoch", "policy", "step", "min_lr", "min_lr_ratio", "gamma")

    # The warm-up multiplies the schedule's rate, starting at warmup_ratio
    form = config.text("warmup")
    if not form:
        draft.exact(LR + "base_lr", lr, optimizer, "lr")
        config.skip("warmup_iters", "warmup_ratio", "warmup_by_epoch")
        return

    if form not in ("linear", "constant", "exp"):
        config.wrong("warmup", "linear, constant or exp")

    unit = "warmup_epochs" if config.flag("warmup_by_epoch", False) else "warmup_steps"
    draft.exact(LR + "warmup_type", f"factor_{form}", config, "warmup")
    draft.exact(LR + unit, config.count("warmup_iters"), config, "warmup_iters", "warmup_by_epoch")
    draft.exact(LR + "base_lr", lr * config.number("warmup_ratio", 0.1), config, "warmup_ratio")
    draft.exact(LR + "warmup_lr", lr, optimizer, "lr")
