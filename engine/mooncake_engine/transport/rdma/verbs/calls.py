"""libibverbs.so.1 loaded, its functions declared, and their results turned into errors."""

from __future__ import annotations

import ctypes

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs.base import VerbsError, VerbsMissing

_int, _pointer = ctypes.c_int, abi.Pointer

#: name -> (result, arguments)
_FUNCTIONS: dict[str, tuple[object, ...]] = {
    "ibv_get_device_list": (ctypes.POINTER(_pointer), ctypes.POINTER(_int)),
    "ibv_free_device_list": (None, ctypes.POINTER(_pointer)),
    "ibv_get_device_name": (ctypes.c_char_p, _pointer),
    "ibv_open_device": (_pointer, _pointer),
    "ibv_close_device": (_int, _pointer),
    "ibv_query_device": (_int, _pointer, _pointer),
    "ibv_query_port": (_int, _pointer, ctypes.c_uint8, _pointer),
    "_ibv_query_gid_table": (
        *(ctypes.c_ssize_t, _pointer, _pointer),
        *(ctypes.c_size_t, ctypes.c_uint32, ctypes.c_size_t),
    ),
    "ibv_alloc_pd": (_pointer, _pointer),
    "ibv_dealloc_pd": (_int, _pointer),
    "ibv_reg_mr_iova2": (
        *(_pointer, _pointer, _pointer),
        *(ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint),
    ),
    "ibv_dereg_mr": (_int, _pointer),
    "ibv_create_comp_channel": (_pointer, _pointer),
    "ibv_destroy_comp_channel": (_int, _pointer),
    "ibv_create_cq": (_pointer, _pointer, _int, _pointer, _pointer, _int),
    "ibv_destroy_cq": (_int, _pointer),
    "ibv_get_cq_event": (_int, _pointer, ctypes.POINTER(_pointer), ctypes.POINTER(_pointer)),
    "ibv_ack_cq_events": (None, _pointer, ctypes.c_uint),
    "ibv_create_qp": (_pointer, _pointer, _pointer),
    "ibv_modify_qp": (_int, _pointer, _pointer, _int),
    "ibv_query_qp": (_int, _pointer, _pointer, _int, _pointer),
    "ibv_destroy_qp": (_int, _pointer),
    "ibv_wc_status_str": (ctypes.c_char_p, _int),
}
_OPTIONAL = {
    "ibv_reg_dmabuf_mr": (
        *(_pointer, _pointer, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint64, _int, _int),
    ),
}


def load() -> ctypes.CDLL:
    """The library. Raises `VerbsMissing`, which says what to install."""
    try:
        library = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    except OSError as error:
        raise VerbsMissing(
            f"libibverbs.so.1 cannot be loaded ({error}); install it: apt-get install libibverbs1 "
            "ibverbs-providers (Debian, Ubuntu), dnf install libibverbs (RHEL, Fedora)"
        ) from error
    for name, (result, *arguments) in {**_FUNCTIONS, **_OPTIONAL}.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            if name in _OPTIONAL:
                continue
            raise VerbsMissing(
                f"libibverbs.so.1 has no {name}; it must be of rdma-core 28 (2020) or newer"
            ) from error
        function.restype, function.argtypes = result, arguments
    return library


def made(pointer: int | None, attempted: str) -> int:
    """The pointer that a verbs call returned. Raises `VerbsError` when it is NULL."""
    if not pointer:
        raise VerbsError(ctypes.get_errno(), attempted)
    return pointer


def done(result: int, attempted: str) -> None:
    """Raise `VerbsError` unless a verbs call returned 0; it returns an errno, or -1 and sets it."""
    if result:
        raise VerbsError(ctypes.get_errno() if result == -1 else abs(result), attempted)


def u32(address: int) -> int:
    """The 32 bits at an address: a field of a structure of the library's."""
    return ctypes.c_uint32.from_address(address).value
