"""The few calls of the CUDA driver that RDMA needs, by ctypes on libcuda.so.1; no toolkit needed.

`cuInit` is called when a `Driver` is made: afterwards a forked child cannot use CUDA, so one is
made only by who already has memory of a GPU in its hands.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_int, _pointer, _size, _u64 = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong

_Result = TypeVar("_Result", ctypes.c_int, ctypes.c_void_p)

_LIBRARY = "libcuda.so.1"
_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
_OF_CURRENT_CONTEXT = 0  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX
TO_OWNER = 100  # CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER, also as a level of native ordering

#: name -> arguments; all return a CUresult
_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (_pointer,),
    "cuDeviceGet": (_pointer, _int),
    "cuDeviceGetAttribute": (_pointer, _int, _int),
    "cuDeviceGetPCIBusId": (_pointer, _int, _int),
    "cuDevicePrimaryCtxRetain": (_pointer, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxPushCurrent_v2": (_pointer,),
    "cuCtxPopCurrent_v2": (_pointer,),
    "cuMemGetAddressRange_v2": (_pointer, _pointer, _u64),
    "cuGetErrorName": (_int, _pointer),
    "cuGetErrorString": (_int, _pointer),
    "cuMemGetHandleForAddressRange": (_pointer, _u64, _size, _int, _u64),
    "cuFlushGPUDirectRDMAWrites": (_int, _int),
}
_OPTIONAL = {
    "cuMemGetHandleForAddressRange": "CUDA 11.7 (driver 515)",
    "cuFlushGPUDirectRDMAWrites": "CUDA 11.3 (driver 465)",
}


class CudaError(Exception):
    """The driver is missing or a call failed; the message says which and why."""


class Attribute(enum.IntEnum):
    """CU_DEVICE_ATTRIBUTE_*."""

    GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS = 117  # bit 0: cuFlushGPUDirectRDMAWrites works
    GPU_DIRECT_RDMA_WRITES_ORDERING = 118  # TO_OWNER or more: no flush is needed
    DMA_BUF_SUPPORTED = 124


class Driver:
    """libcuda, initialised. GPUs are numbered as in "cuda:N". Safe from any thread."""

    def __init__(self, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        """Load libcuda by `load`. Raises `CudaError`: not installed, too old, or no GPU."""
        try:
            self._library = load(_LIBRARY)
        except OSError as error:
            raise CudaError(f"{_LIBRARY} cannot be loaded ({error})") from error
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                if name in _OPTIONAL:
                    continue
                raise CudaError(f"{_LIBRARY} has no {name}") from error
            function.restype, function.argtypes = _int, arguments
        self._call("cuInit", 0)

    def count(self) -> int:
        """GPUs that this process may use (CUDA_VISIBLE_DEVICES)."""
        return self._ask(_int(), "cuDeviceGetCount").value

    def attribute(self, gpu: int, which: Attribute) -> int:
        """A device attribute; 0 when the driver is too old to know it."""
        try:
            return self._ask(_int(), "cuDeviceGetAttribute", int(which), self._device(gpu)).value
        except CudaError:  # CUDA_ERROR_INVALID_VALUE
            return 0

    def pci_address(self, gpu: int) -> str:
        """Such as 0000:3b:00.0, as sysfs writes it."""
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, len(text), self._device(gpu))
        return text.value.decode().lower()

    def export(self, gpu: int, address: int, length: int) -> int:
        """A DMA-BUF of memory of a GPU, as a descriptor that the caller closes.

        Args:
            gpu: Whose memory it is.
            address: Multiple of the host's page size.
            length: Bytes, likewise.
        """
        with self._current(gpu):
            fd = _int(-1)
            self._ask(fd, "cuMemGetHandleForAddressRange", address, length, _DMA_BUF_FD, 0)
            return fd.value

    def allocation(self, gpu: int, address: int) -> tuple[int, int]:
        """(address, length) of the allocation or mapping that `address` lies in."""
        with self._current(gpu):
            start, length = _u64(), _size()
            self._call("cuMemGetAddressRange_v2", *map(ctypes.byref, (start, length)), address)
            return start.value, length.value

    def flush(self, gpu: int) -> None:
        """Block until writes of NICs that have completed are visible to the GPU's kernels."""
        with self._current(gpu):
            self._call("cuFlushGPUDirectRDMAWrites", _OF_CURRENT_CONTEXT, TO_OWNER)

    def _device(self, gpu: int) -> int:
        return self._ask(_int(), "cuDeviceGet", gpu).value

    @contextlib.contextmanager
    def _current(self, gpu: int) -> Iterator[None]:
        """Our threads have no context. The primary one is torch's, and alive with its memory."""
        device = self._device(gpu)
        context = self._ask(_pointer(), "cuDevicePrimaryCtxRetain", device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._ask(_pointer(), "cuCtxPopCurrent_v2")
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def _ask(self, into: _Result, name: str, *arguments: object) -> _Result:
        self._call(name, ctypes.byref(into), *arguments)
        return into

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise CudaError(f"{_LIBRARY} has no {name}; {_OPTIONAL[name]} has")
        result = function(*arguments)
        if result:
            texts = [ctypes.c_char_p(), ctypes.c_char_p()]
            for text, ask in zip(texts, ("cuGetErrorName", "cuGetErrorString"), strict=True):
                getattr(self._library, ask)(result, ctypes.byref(text))
            what = ": ".join((text.value or b"?").decode() for text in texts)
            raise CudaError(f"{name} failed with {result} ({what})")
