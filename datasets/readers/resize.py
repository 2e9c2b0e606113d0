"""Crop a box out of a frame and scale it into its place in the clip: the only resize kernel of the readers."""

from __future__ import annotations

import numpy as np

#: Name of the kernel. Every checkpoint has it, because another kernel gives other pixels.
KERNEL = "cv2-linear"

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, end exclusive


def place(image: np.ndarray, box: Box | None, frame_size: tuple[int, int], out: np.ndarray) -> None:
    """Write one decoded frame, cropped and resized, into its row of a clip.

    If the sizes agree, the pixels are copied exactly. A frame whose size differs from that of its video (a change of
    resolution inside a file, a folder of mixed images) is first scaled as a whole to that size, so that a box always
    means the same part of the picture.

    Args:
        image: (H', W', 3) uint8, one decoded frame.
        box: the part to keep, in pixels of `frame_size`; None = the whole frame.
        frame_size: (H, W) of the video, from its metadata.
        out: (h, w, 3) uint8, written in place; C-contiguous.
    """
    import cv2  # here, because the training process needs only the kernel's name

    height, width = frame_size
    if image.shape[:2] != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

    if box is not None:
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(f"box {tuple(box)} does not lie inside a frame of {width}x{height}")
        image = image[y1:y2, x1:x2]

    if image.shape == out.shape:
        out[...] = image
    else:
        cv2.resize(image, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)
