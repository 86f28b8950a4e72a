"""A stub of libcuda.so.1: stands for a driver and GPUs that this machine lacks.

Its functions have the signatures of <cuda.h> and are called through the C calling convention, so a
wrong declaration on our side shows as a wrong value here. It keeps the driver's rules that matter:
a context must be current, an export is whole pages within one allocation.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Any

SUCCESS, INVALID_VALUE, NO_DEVICE, INVALID_CONTEXT, NOT_SUPPORTED = 0, 1, 100, 201, 801
_NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 100: b"CUDA_ERROR_NO_DEVICE"}

_u64, _int, _pointer = ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # CUdevice and the enums are int, CUdeviceptr 64 bits
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (ctypes.POINTER(_int),),
    "cuDeviceGet": (ctypes.POINTER(_int), _int),
    "cuDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cuDeviceGetPCIBusId": (ctypes.POINTER(ctypes.c_char), _int, _int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_pointer), _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxPushCurrent_v2": (_pointer,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_pointer),),
    "cuMemGetAddressRange_v2": (ctypes.POINTER(_u64), ctypes.POINTER(ctypes.c_size_t), _u64),
    "cuGetErrorName": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemGetHandleForAddressRange": (_pointer, _u64, ctypes.c_size_t, _int, ctypes.c_ulonglong),
    "cuFlushGPUDirectRDMAWrites": (_int, _int),
}
#: GPU n is CUdevice 40 + n with the context 0xC0DE_0000_0000 + n: mixed up, they do not pass.
_DEVICE, _CONTEXT = 40, 0xC0DE_0000_0000

FLUSH_OPTIONS, ORDERING, DMA_BUF = 117, 118, 124


class StubCuda:
    """Loaded in place of the library; one for each test."""

    def __init__(self, gpus: int = 1, *, without: tuple[str, ...] = ()) -> None:
        self.gpus = gpus
        #: (GPU, attribute) -> value
        self.attributes = {
            (gpu, which): value
            for gpu in range(gpus)
            for which, value in ((FLUSH_OPTIONS, 1), (ORDERING, 100), (DMA_BUF, 1))
        }
        self.allocations: list[tuple[int, int]] = []  # (address, length)
        self.exports: list[tuple[int, int, int, int]] = []  # (GPU, address, length, fd)
        self.flushes: list[tuple[int, int, int]] = []  # (GPU, target, scope)
        self.loads = 0
        self.retained = 0
        self.result = SUCCESS  # of export and flush
        self._stack = threading.local()
        for name, arguments in _SIGNATURES.items():
            if name not in without:
                kind = ctypes.CFUNCTYPE(_int, *arguments)
                setattr(self, name, kind(getattr(self, f"_{name.removesuffix('_v2')}")))

    def load(self, name: str) -> StubCuda:
        assert name == "libcuda.so.1"
        self.loads += 1
        return self

    @property
    def _contexts(self) -> list[int]:
        """Of this thread."""
        if not hasattr(self._stack, "contexts"):
            self._stack.contexts = []
        contexts: list[int] = self._stack.contexts
        return contexts

    def _cuInit(self, flags: int) -> int:  # noqa: N802 - the library's names, here and below
        return SUCCESS if self.gpus and flags == 0 else NO_DEVICE

    def _cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802, ANN401 - a ctypes pointer
        count[0] = self.gpus
        return SUCCESS

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802, ANN401 - ditto
        device[0] = _DEVICE + ordinal
        return SUCCESS if ordinal < self.gpus else INVALID_VALUE

    def _cuDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:  # noqa: N802, ANN401 - ditto
        known = self.attributes.get((device - _DEVICE, which))
        if known is None:
            return INVALID_VALUE
        value[0] = known
        return SUCCESS

    def _cuDeviceGetPCIBusId(self, text: Any, length: int, device: int) -> int:  # noqa: N802, ANN401 - ditto
        address = b"0000:%02X:00.0\0" % (0x3B + device - _DEVICE)
        assert length >= len(address)
        ctypes.memmove(text, address, len(address))
        return SUCCESS

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:  # noqa: N802, ANN401 - ditto
        context[0] = _CONTEXT + device - _DEVICE
        self.retained += 1
        return SUCCESS

    def _cuDevicePrimaryCtxRelease(self, device: int) -> int:  # noqa: N802 - ditto
        assert 0 <= device - _DEVICE < self.gpus
        self.retained -= 1
        return SUCCESS

    def _cuCtxPushCurrent(self, context: int) -> int:  # noqa: N802 - ditto
        self._contexts.append(context)
        return SUCCESS

    def _cuCtxPopCurrent(self, context: Any) -> int:  # noqa: N802, ANN401 - ditto
        context[0] = self._contexts.pop()
        return SUCCESS

    def _cuMemGetAddressRange(self, start: Any, length: Any, address: int) -> int:  # noqa: N802, ANN401 - ditto
        for base, size in self.allocations:
            if base <= address < base + size:
                start[0], length[0] = base, size
                return SUCCESS
        return INVALID_VALUE

    def _cuGetErrorName(self, result: int, text: Any) -> int:  # noqa: N802, ANN401 - ditto
        text[0] = _NAMES.get(result)
        return SUCCESS if result in _NAMES else INVALID_VALUE

    def _cuGetErrorString(self, result: int, text: Any) -> int:  # noqa: N802, ANN401 - ditto
        return self._cuGetErrorName(result, text)

    def _cuMemGetHandleForAddressRange(  # noqa: N802 - ditto
        self, handle: int, address: int, length: int, kind: int, flags: int
    ) -> int:
        if not self._contexts:
            return INVALID_CONTEXT
        pages = address % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
        inside = any(at <= address and address + length <= at + n for at, n in self.allocations)
        if self.result or not (pages and inside and (kind, flags) == (1, 0)):
            return self.result or INVALID_VALUE
        fd = os.memfd_create("stub-dmabuf")
        ctypes.c_int.from_address(handle).value = fd
        self.exports.append((self._contexts[-1] - _CONTEXT, address, length, fd))
        return SUCCESS

    def _cuFlushGPUDirectRDMAWrites(self, target: int, scope: int) -> int:  # noqa: N802 - ditto
        if not self._contexts:
            return INVALID_CONTEXT
        self.flushes.append((self._contexts[-1] - _CONTEXT, target, scope))
        return self.result
