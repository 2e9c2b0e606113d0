"""Every operation against a slow reference for one frame, written here from the definitions (colorsys for the hue)."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest
import torch

from utils import transforms, vision
from utils.errors import UserError
from utils.ops.colorjitter import _NO_CHANGE
from utils.ops.random_erasing import FILL
from utils.transforms import IMAGENET_MEAN, IMAGENET_STD, crop_views, normalise

B, T, H, W = 3, 4, 10, 14


def random_clips(seed: int = 0, shape: tuple[int, ...] = (B, T, H, W, 3)) -> torch.Tensor:
    clips = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    clips[:, :, :2, :2] = 77  # grey pixels: no hue
    clips[:, :, :2, 2:4] = 0
    clips[:, :, 2:4, :2] = 255
    return clips


def random_jitter(sets: int, seed: int = 1) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    rows = np.empty((B, sets, 8))
    rows[..., :3] = generator.uniform(0.3, 1.8, (B, sets, 3))
    rows[..., 3] = generator.uniform(-0.5, 0.5, (B, sets))
    rows[..., 4:] = [[generator.permutation(4) for _ in range(sets)] for _ in range(B)]
    return torch.from_numpy(rows)


def augment(clips: torch.Tensor, *, flip=None, jitter=None, erase=None, **more) -> torch.Tensor:
    """`transforms.augment` of what is given."""
    drawn = {"flip": None if flip is None else flip.view(-1, 1, 1), "colorjitter": jitter, "random_erasing": erase}
    return transforms.augment(clips, {name: rows for name, rows in drawn.items() if rows is not None}, **more)


def grey_of(frame: np.ndarray) -> np.ndarray:
    return frame @ np.array([0.2989, 0.587, 0.114])


def jittered(frame: np.ndarray, row: np.ndarray) -> np.ndarray:
    """ColorJitter on one frame (H, W, 3) of 0..1, pixel by pixel where that is clearest."""
    brightness, contrast, saturation, hue = row[:4]
    for operation in row[4:].astype(int):
        if operation == 0:
            frame = np.clip(frame * brightness, 0, 1)
        elif operation == 1:
            frame = np.clip(contrast * frame + (1 - contrast) * grey_of(frame).mean(), 0, 1)
        elif operation == 2:
            frame = np.clip(saturation * frame + (1 - saturation) * grey_of(frame)[..., None], 0, 1)
        else:
            pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in frame.reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in pixels]
            frame = np.array(turned).reshape(frame.shape)
    return frame


def reference(clips: torch.Tensor, flip=None, jitter=None, erase=None) -> np.ndarray:
    """(B, T, H, W, C) uint8 -> (B, C, T, H, W) float64, frame by frame."""
    out = np.empty(clips.shape)
    for b, t in itertools.product(range(clips.shape[0]), range(clips.shape[1])):
        frame = clips[b, t].numpy() / 255.0
        if flip is not None and flip[b]:
            frame = frame[:, ::-1]
        if jitter is not None:
            frame = jittered(frame, jitter[b, t % jitter.shape[1]].numpy())
        if erase is not None:
            y, x, h, w = erase[b, t % erase.shape[1]].tolist()
            frame = frame.copy()
            frame[y : y + h, x : x + w] = np.array(FILL) / 255 if h else frame[y : y + h, x : x + w]
        out[b, t] = (frame - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return out.transpose(0, 4, 1, 2, 3)


FLIP = torch.tensor([True, False, True])
ERASE = {
    1: torch.tensor([[[2, 3, 4, 5]], [[0, 0, 0, 0]], [[9, 13, 1, 1]]]),
    T: torch.tensor([[[t, 2 * t, 3, 2 + t] if (t + b) % 2 else [0, 0, 0, 0] for t in range(T)] for b in range(B)]),
}


@pytest.mark.parametrize("flip", [None, FLIP, ~torch.zeros(B, dtype=torch.bool), torch.zeros(B, dtype=torch.bool)])
@pytest.mark.parametrize("jitter", [None, 1, T])
@pytest.mark.parametrize("erase", [None, 1, T])
def test_against_the_reference(flip, jitter, erase) -> None:
    clips = random_clips()
    before = clips.clone()
    drawn = {"flip": flip, "jitter": jitter and random_jitter(jitter), "erase": erase and ERASE[erase]}
    out = augment(clips, **drawn, dtype=torch.float64)
    np.testing.assert_allclose(out.numpy(), reference(clips, **drawn), atol=1e-12)
    assert torch.equal(clips, before)
    single = augment(clips, **drawn)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out, atol=2e-4, rtol=0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_order_of_the_operations(order: tuple[int, ...]) -> None:
    clips, jitter = random_clips(3)[:, :1, :5, :6], random_jitter(1)
    jitter[..., 4:] = torch.tensor(order)
    out = augment(clips, jitter=jitter, dtype=torch.float64)
    np.testing.assert_allclose(out.numpy(), reference(clips, jitter=jitter), atol=1e-12)


@pytest.mark.parametrize("number", range(4))
def test_one_operation_at_a_time(number: int) -> None:
    clips, jitter = random_clips(5), random_jitter(T)
    for other in {0, 1, 2, 3} - {number}:
        jitter[..., other] = _NO_CHANGE[other]
    out = augment(clips, jitter=jitter, dtype=torch.float64)
    np.testing.assert_allclose(out.numpy(), reference(clips, jitter=jitter), atol=1e-12)


def test_against_torchvision() -> None:
    functional = vision.load("torchvision.transforms.functional")
    clips, jitter = random_clips(7), random_jitter(1)
    tools = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    out = augment(clips, jitter=jitter, mean=(0, 0, 0), std=(1, 1, 1)).permute(0, 2, 1, 3, 4)
    for b in range(B):
        frames = clips[b].permute(0, 3, 1, 2).float() / 255
        for operation in jitter[b, 0, 4:].int().tolist():
            frames = tools[operation](frames, float(jitter[b, 0, operation]))
        torch.testing.assert_close(out[b], frames, atol=1e-5, rtol=0)


def test_layout_is_channels_last_for_free() -> None:
    clips = random_clips()
    for drawn in ({}, {"jitter": random_jitter(1)}, {"flip": FLIP, "erase": ERASE[1]}):
        out = augment(clips, **drawn)
        assert out.shape == (B, 3, T, H, W)
        assert out.is_contiguous(memory_format=torch.channels_last_3d)
        frames = out.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W), what a 2D network takes
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert frames.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(13, 17), (224, 224)])  # the second is large enough for torch to split it up
def test_bits_do_not_depend_on_the_rest_of_the_batch(threads: int, size: tuple[int, int]) -> None:
    clips = random_clips(2, (B, 2, *size, 3))
    drawn = {"flip": FLIP, "jitter": random_jitter(2), "erase": ERASE[1]}
    before = torch.get_num_threads()
    expected = augment(clips, **drawn)
    try:
        torch.set_num_threads(threads)
        for b in range(B):
            alone = augment(clips[b : b + 1], **{key: value[b : b + 1] for key, value in drawn.items()})
            assert torch.equal(alone[0], expected[b])
    finally:
        torch.set_num_threads(before)


def test_normalise_is_augment_with_nothing_drawn() -> None:
    clips = random_clips()
    np.testing.assert_allclose(normalise(clips).numpy(), reference(clips), atol=1e-6)
    assert torch.equal(normalise(clips), augment(clips))
    neutral = torch.tensor([1.0, 1, 1, 0, 2, 0, 3, 1], dtype=torch.float64).expand(B, 1, 8)
    torch.testing.assert_close(augment(clips, jitter=neutral), normalise(clips), atol=1e-6, rtol=0)
    assert normalise(clips, dtype=torch.bfloat16).dtype == torch.bfloat16
    cropped = random_clips(shape=(B, T, H + 4, W + 6, 3))[:, :, 2:-2, 3:-3]  # not contiguous
    np.testing.assert_allclose(normalise(cropped).numpy(), reference(cropped), atol=1e-6)


@pytest.mark.parametrize("sets", [1, T])
def test_erasing_by_noise_follows_from_its_number_alone(sets: int) -> None:
    clips = random_clips()
    boxes = ERASE[sets]
    numbers = torch.arange(B * sets).view(B, sets, 1) + 2**52
    drawn = torch.cat((boxes, numbers), 2)
    out, normalised = augment(clips, erase=drawn), normalise(clips)
    for b, t in itertools.product(range(B), range(T)):
        y, x, h, w, number = drawn[b, t % sets].tolist()
        expected = normalised[b, :, t].clone()
        if h:
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn((T if sets == 1 else 1, h, w, 3), generator=generator)
            expected[:, y : y + h, x : x + w] = noise[t if sets == 1 else 0].permute(2, 0, 1)
        assert torch.equal(out[b, :, t], expected)
    state = torch.get_rng_state()
    assert torch.equal(augment(clips[1:], erase=drawn[1:]), out[1:]), "the rest of the batch makes no difference"
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(augment(clips, erase=drawn, dtype=torch.float64), out.double(), atol=2e-4, rtol=0)


def test_noise_is_standard_normal() -> None:
    clips = torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
    out = augment(clips, erase=torch.tensor([[[8, 8, 40, 40, 77]]]))[0, :, :, 8:48, 8:48].double()
    assert abs(out.mean()) < 3 / out.numel() ** 0.5
    assert abs(out.var() - 1) < 3 * (2 / out.numel()) ** 0.5
    frames = out.unbind(1)
    assert not torch.equal(frames[0], frames[1])


def test_wrong_shapes_are_refused() -> None:
    clips = random_clips()
    with pytest.raises(ValueError, match=r"colorjitter \(3, 2, 8\) does not fit 3 clips of 4 frames"):
        augment(clips, jitter=random_jitter(2))
    with pytest.raises(ValueError, match=r"random_erasing \(2, 1, 4\) does not fit 3 clips of 4 frames"):
        augment(clips, erase=ERASE[1][:2])


def test_cut_views() -> None:
    frames = random_clips(4, (1, 6, 20, 30, 3))[0]
    rows = np.array([[0, 2, 4], [5, 5, 1], [0, 1, 2]])
    boxes = np.array([[0, 0, 8, 6], [22, 14, 30, 20], [5, 3, 13, 9]])
    flips = np.array([False, True, True])
    views = crop_views(frames, rows, boxes, flips)
    assert views.shape == (3, 3, 6, 8, 3)
    assert views.dtype == torch.uint8
    for v, (x1, y1, x2, y2) in enumerate(boxes):
        for t in range(3):
            expected = frames[rows[v, t]].numpy()[y1:y2, x1:x2]
            np.testing.assert_array_equal(views[v, t].numpy(), expected[:, ::-1] if flips[v] else expected)
    with pytest.raises(ValueError, match="is not inside frames of 30x20"):
        crop_views(frames, rows[:1], np.array([[25, 0, 33, 6]]), flips[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_same_on_a_gpu() -> None:
    clips, drawn = random_clips(), {"flip": FLIP, "jitter": random_jitter(T), "erase": ERASE[T]}
    torch.testing.assert_close(augment(clips.cuda(), **drawn).cpu(), augment(clips, **drawn), atol=1e-5, rtol=0)
    on_device = {key: value.cuda() for key, value in drawn.items()}
    assert torch.equal(augment(clips.cuda(), **on_device), augment(clips.cuda(), **drawn))
    rows, boxes, flips = np.array([[0, 1]]), np.array([[1, 2, 9, 8]]), np.array([True])
    assert torch.equal(crop_views(clips[0].cuda(), rows, boxes, flips).cpu(), crop_views(clips[0], rows, boxes, flips))


NAMES = ["left", "stay", "right", "up", "down"]


def test_mirrored_clips_have_the_mirrored_class() -> None:
    table = transforms.mirrored_classes([["left", 2]], NAMES)
    assert table is not None
    assert table.tolist() == [2, 1, 0, 3, 4]
    labels, flip = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([True, False, True, True, True])
    assert transforms.mirrored_labels(labels, flip, table).tolist() == [2, 0, 1, 0, 3]
    multi_label = torch.nn.functional.one_hot(labels, 5).float()
    multi_label[0, 3] = 1
    mirrored = transforms.mirrored_labels(multi_label, flip, table)
    assert mirrored.dtype == multi_label.dtype
    assert [row.nonzero().flatten().tolist() for row in mirrored] == [[2, 3], [0], [1], [0], [3]]
    assert transforms.mirrored_classes(None, NAMES) is None


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([["left", "rihgt"]], "no class is called 'rihgt' (did you mean right?)"),
        ([["left", "up"], ["right", 0]], "class 0 (left) occurs twice"),
        ([["up", 3]], "class 3 (up) occurs twice"),
    ],
)
def test_classes_that_cannot_be_exchanged(pairs: list, reason: str) -> None:
    with pytest.raises(UserError) as error:
        transforms.mirrored_classes(pairs, NAMES)
    assert reason in str(error.value)
