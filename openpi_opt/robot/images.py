"""Camera images as the model takes them: uint8, 224 x 224, padded to keep their proportions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 224


def prepared(name: str, image: object, size: int = SIZE) -> NDArray[np.uint8]:
    """[height, width, 3] or [3, height, width], uint8 or floats in [0, 1] -> [size, size, 3] uint8.

    As openpi does it: floats are cut to whole steps, and the picture is resized by PIL's bilinear
    filter and centred on black.

    Raises ValueError: names the image that is no picture, or out of range.
    """
    array = np.asarray(image)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {list(array.shape)}; it must be [height, width, 3] or "
            "[3, height, width]"
        )
    if array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f":
        if not (float(array.min()) >= 0.0 and float(array.max()) <= 1.0):  # NaN compares false
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}; floats are in [0, 1], "
                "pixels of 0 to 255 are uint8"
            )
        array = (255 * array).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is {array.dtype}; it must be uint8, or floats in [0, 1]")
    return resized(array, size)


def resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """[height, width, 3] uint8 -> [size, size, 3], the larger side `size`, the rest black."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return np.ascontiguousarray(image)
    ratio = max(width / size, height / size)
    rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))
    scaled = Image.fromarray(np.ascontiguousarray(image)).resize(
        (columns, rows), Image.Resampling.BILINEAR
    )
    out = np.zeros((size, size, 3), np.uint8)
    top, left = (size - rows) // 2, (size - columns) // 2
    out[top : top + rows, left : left + columns] = np.asarray(scaled)
    return out
