"""Reading images: names to import, and a refusal for whoever reads one."""

from __future__ import annotations

from enum import Enum
from typing import NoReturn


class ImageReadMode(Enum):
    """How an image is decoded, as far as it is named elsewhere."""

    RGB = 3


def decode_image(*_: object, **__: object) -> NoReturn:
    """Refuse."""
    raise NotImplementedError("this stand-in for torchvision decodes no image")
