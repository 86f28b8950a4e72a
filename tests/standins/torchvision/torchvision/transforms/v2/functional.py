"""The second version of the transforms as functions, as far as it is imported."""

from __future__ import annotations

from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode"]
