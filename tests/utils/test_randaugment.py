"""RandAugment: pixels against torchvision's tensor functions, and that clips and frames do not see each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from datasets.plan.ops.randaugment import OPERATIONS
from utils import transforms, vision
from utils.ops import randaugment

functional: Any = vision.load("torchvision.transforms.functional")
BILINEAR = functional.InterpolationMode.BILINEAR
FILL = [128.0, 128.0, 128.0]


def frames_of(kind: str, height: int, width: int, count: int = 3) -> torch.Tensor:
    """(T, H, W, C) uint8: noise, a dark gradient, or one grey value."""
    if kind == "noise":
        return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(1)).byte()
    if kind == "flat":
        return torch.full((count, height, width, 3), 77, dtype=torch.uint8)
    rise = torch.arange(width).view(1, 1, width, 1) * torch.arange(1, count + 1).view(-1, 1, 1, 1)
    return (rise + torch.arange(height).view(1, height, 1, 1) + torch.tensor([0, 9, 30])).clamp(max=190).byte()


def affine(images: torch.Tensor, *, shear: tuple[float, float] = (0, 0), by: tuple[float, float] = (0, 0)) -> Any:
    degrees = [math.degrees(math.atan(factor)) for factor in shear]
    centre = [0, 0] if any(shear) else None
    return functional.affine(images, 0.0, [-by[0], -by[1]], 1.0, degrees, BILINEAR, FILL, centre)


def reference(name: str, images: torch.Tensor, argument: float) -> torch.Tensor:
    """One operation by torchvision; what it lacks is written out."""
    by_name = {
        "autocontrast": lambda: functional.autocontrast(images),
        "equalize": lambda: functional.equalize(images),
        "invert": lambda: functional.invert(images),
        "rotate": lambda: functional.rotate(images, argument, BILINEAR, fill=FILL),
        "posterize": lambda: functional.posterize(images, int(argument)),
        "solarize": lambda: functional.solarize(images, argument) if argument < 256 else images,
        "solarize_add": lambda: torch.where(images < 128, (images.int() + int(argument)).clamp(max=255), images).byte(),
        "saturation": lambda: functional.adjust_saturation(images, argument),
        "contrast": lambda: functional.adjust_contrast(images, argument),
        "brightness": lambda: functional.adjust_brightness(images, argument),
        "sharpness": lambda: functional.adjust_sharpness(images, argument),
        "shear_x": lambda: affine(images, shear=(argument, 0)),
        "shear_y": lambda: affine(images, shear=(0, argument)),
        "translate_x": lambda: affine(images, by=(argument, 0)),
        "translate_y": lambda: affine(images, by=(0, argument)),
    }
    return by_name[name]()


ENHANCED = (0.1, 0.37, 1.0, 1.63, 1.9)
ARGUMENTS = {
    "rotate": (-21.3, 0.0, 7.77, 30.0),
    "posterize": (1, 2, 4),
    "solarize": (0, 77, 128, 256),
    "solarize_add": (0, 77, 110),
    "shear_x": (-0.21, 0.0, 0.3),
    "shear_y": (-0.21, 0.0, 0.3),
    "translate_x": (-10.08, 3.0, 6.3),
    "translate_y": (-10.08, 3.0, 6.3),
} | dict.fromkeys(("saturation", "contrast", "brightness", "sharpness"), ENHANCED)


def rows(*operations: tuple[str, float], places: int | None = None) -> torch.Tensor:
    """(1, 1, n, 2) of one clip."""
    numbers = [[float(OPERATIONS.index(name)), argument] for name, argument in operations]
    numbers += [[-1.0, 0.0]] * ((places or len(numbers)) - len(numbers))
    return torch.tensor([[numbers]], dtype=torch.float64)


def no_colour(_: Any) -> torch.Tensor:
    raise AssertionError


@pytest.mark.parametrize("kind", ["noise", "dark", "flat"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_those_of_torchvision(name: str, kind: str) -> None:
    for height, width in ((24, 33), (31, 16)):
        frames = frames_of(kind, height, width)
        for argument in ARGUMENTS.get(name, (0.0,)):
            before = frames.clone()
            augmented = randaugment.apply(frames[None], rows((name, argument)), no_colour)[0].permute(0, 3, 1, 2)
            expected = torch.cat([reference(name, image[None], argument) for image in frames.permute(0, 3, 1, 2)])
            assert torch.equal(frames, before), "the input is left as it is"
            assert torch.equal(augmented, expected), (argument, (augmented.int() - expected.int()).abs().max())


def test_no_bits_left_is_black() -> None:
    """PIL's posterize of 0 bits; torchvision's refuses the mask."""
    assert not randaugment.apply(frames_of("noise", 8, 8)[None], rows(("posterize", 0)), no_colour).any()


def test_operations_follow_each_other_in_the_order_drawn() -> None:
    frames = frames_of("noise", 16, 16)
    for first, second in (("solarize", "contrast"), ("contrast", "solarize")):
        arguments = {"solarize": 100.0, "contrast": 1.6}
        drawn = rows((first, arguments[first]), (second, arguments[second]), places=4)
        expected = frames.permute(0, 3, 1, 2)
        for name in (first, second):
            expected = reference(name, expected, arguments[name])
        assert torch.equal(randaugment.apply(frames[None], drawn, no_colour)[0].permute(0, 3, 1, 2), expected)


def test_each_clip_has_its_own_and_frames_too_if_wanted() -> None:
    clips = torch.stack([frames_of("noise", 12, 12, 2), frames_of("dark", 12, 12, 2), frames_of("noise", 12, 12, 2)])
    invert, nothing = [OPERATIONS.index("invert"), 0.0], [-1.0, 0.0]
    drawn = torch.tensor([[[invert]], [[nothing]], [[invert]]], dtype=torch.float64)
    augmented = randaugment.apply(clips, drawn, no_colour)
    assert torch.equal(augmented, torch.stack([255 - clips[0], clips[1], 255 - clips[2]]))
    drawn = torch.tensor([[[invert], [nothing]], [[nothing], [invert]], [[nothing], [nothing]]], dtype=torch.float64)
    augmented = randaugment.apply(clips, drawn, no_colour)
    assert torch.equal(augmented[0], torch.stack([255 - clips[0, 0], clips[0, 1]]))
    assert torch.equal(augmented[1], torch.stack([clips[1, 0], 255 - clips[1, 1]]))
    assert torch.equal(augmented[2], clips[2])
    with pytest.raises(ValueError, match="does not fit"):
        randaugment.apply(clips, drawn[:2], no_colour)


def test_the_bits_of_a_clip_do_not_depend_on_its_batch() -> None:
    generator = np.random.default_rng(0)
    clips = torch.from_numpy(generator.integers(0, 256, (4, 3, 20, 20, 3), np.uint8))
    numbers = np.stack([generator.integers(0, len(OPERATIONS), (4, 1, 4)), np.full((4, 1, 4), 1.0)], -1)
    drawn = {"randaugment": torch.from_numpy(numbers.astype(np.float64))}
    together = transforms.augment(clips, drawn)
    for clip in range(4):
        alone = transforms.augment(clips[clip : clip + 1], {"randaugment": drawn["randaugment"][clip : clip + 1]})
        assert torch.equal(together[clip : clip + 1], alone)
