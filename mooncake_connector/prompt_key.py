"""A name for a prompt's KV: equal keys mean that the same tokens give the same bytes. Pure."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def prompt_key(token_ids: Sequence[int], extras: Iterable[str] = ()) -> str:
    """Hash of the prompt and of all else that its KV depends on.

    Args:
        token_ids: The whole prompt; a list, or an array (of 64-bit integers, in SGLang).
        extras: LoRA name, hashes of images and their positions, cache salt: in a fixed order.

    Returns:
        32 hexadecimal digits. For 1000 tokens 50 us, most of it a list's conversion; an array 6.
    """
    digest = hashlib.blake2b(np.asarray(token_ids, "<u4").tobytes(), digest_size=16)
    for extra in extras:
        encoded = extra.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
