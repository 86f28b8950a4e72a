"""Image transforms: names to import, nothing to call."""

from __future__ import annotations

from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]
