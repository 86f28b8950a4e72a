"""Image transforms as functions: what others name when they are imported."""

from __future__ import annotations

from enum import Enum
from typing import NoReturn


class InterpolationMode(Enum):
    """How an image is resized; tables of image processors are keyed by these."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(*_: object, **__: object) -> NoReturn:
    """Refuse."""
    raise NotImplementedError("this stand-in for torchvision converts no image")
