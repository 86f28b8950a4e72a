"""The second version of the transforms, as far as it is imported."""

from __future__ import annotations

from torchvision.transforms.v2 import functional

__all__ = ["functional"]
