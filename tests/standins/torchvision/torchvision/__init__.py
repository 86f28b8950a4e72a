"""Stands in for `torchvision` where SGLang runs on a CPU in tests. Users need none of it.

The wheel on PyPI is a CUDA build that does not load beside a CPU torch, and SGLang, with the part
of transformers that it uses, imports image processing when it starts that no text model calls.
Here is what those import lines name, and nothing that would work on an image.
"""

from __future__ import annotations

from torchvision import io, transforms

__all__ = ["io", "transforms"]
__version__ = "0.0.0+standin"
