"""What a caller may register, as a `Region`. The only engine module that may know torch.

torch is never imported here: whoever hands in a tensor has imported it.
"""

from __future__ import annotations

import mmap
import sys
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import InvalidTransfer
from mooncake_engine.types import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def describe(memory: object, length: int | None, location: str, page_bytes: int = 0) -> Region:
    """Address, length in bytes and location of an address, a numpy array or a torch tensor.

    A tensor knows its own location ("cpu", "cuda:0"); `location` is for the others.

    Raises:
        InvalidTransfer: Not one of those, a missing or contradicting length, or gaps in it.
    """
    if page_bytes < 0:
        raise InvalidTransfer(f"pages of {page_bytes} bytes: give more, or 0 if there are none")
    if isinstance(memory, int):
        if length is None:
            raise InvalidTransfer(f"registering the address {memory:#x} needs its length in bytes")
        return Region(memory, length, location, None, page_bytes)
    if isinstance(memory, np.ndarray):
        address, nbytes = int(memory.__array_interface__["data"][0]), int(memory.nbytes)
        _check_dense(memory.shape, memory.strides, memory.itemsize, "numpy array")
    else:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(memory, torch.Tensor):
            raise InvalidTransfer(
                f"cannot register a {type(memory).__name__}; "
                "give an address with a length, a numpy array, or a torch tensor"
            )
        size = memory.element_size()
        address, nbytes = int(memory.data_ptr()), int(memory.numel()) * size
        strides = tuple(stride * size for stride in memory.stride())
        _check_dense(tuple(memory.shape), strides, size, "tensor")
        location = str(memory.device)
    if length is not None and length != nbytes:
        raise InvalidTransfer(f"length {length} contradicts the {nbytes} bytes handed in")
    return Region(address, nbytes, location, memory, page_bytes)


def is_device(location: str) -> bool:
    """True for memory that a CPU cannot simply read, such as "cuda:0"."""
    return location.split(":", 1)[0] != "cpu"


def pages(length: int) -> NDArray[np.uint8]:
    """`length` zero bytes that start at a page; the array owns them."""
    return np.frombuffer(mmap.mmap(-1, length), np.uint8)


def _check_dense(shape: Sequence[int], strides: Sequence[int], size: int, what: str) -> None:
    """A permuted view passes (vLLM's KV caches are such), one with gaps does not."""
    if 0 in shape:
        return  # the region table refuses its length of 0
    steps = sorted((step, count) for step, count in zip(strides, shape, strict=True) if count > 1)
    expected = size
    for step, count in steps:
        if step != expected:
            raise InvalidTransfer(
                f"a {what} of shape {tuple(shape)} with strides {tuple(strides)} (bytes) is not "
                "contiguous; register what it is a view of"
            )
        expected *= count
