"""A name for a model's configuration: equal digests mean that KV of one fits the other. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The same model lies elsewhere on another host, saved by another version of the library.
_NO_MATTER = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def model_digest(config: Mapping[str, Any], extras: Mapping[str, str]) -> str:
    """Hash of what the KV depends on beside weights and prompt: shape, rope, lengths, ...

    Args:
        config: The model's Hugging Face configuration, as a dictionary.
        extras: What else the framework computes with: quantization, element type.

    Returns:
        16 hexadecimal digits.
    """
    kept = {name: value for name, value in config.items() if name not in _NO_MATTER}
    text = json.dumps({**kept, **extras}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
