"""What a user of the engine gets where process_vm calls are forbidden."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from mooncake_engine.engine import TransferEngine
from mooncake_engine.iovec import address_of
from shm_child import engine_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from shm_peers import Child

MIB = 1 << 20


def test_allocated_memory_goes_over_shm_and_any_other_over_tcp(
    child: Callable[..., Child],
) -> None:
    elsewhere = np.full(MIB, 5, np.uint8)
    with TransferEngine(engine_config()) as engine:
        allocated = engine.allocate(MIB)
        allocated[:] = 6
        for array, path in ((allocated, "shm"), (elsewhere, "tcp")):
            if array is elsewhere:
                engine.register_memory(array)
            reader = child("engine")  # a new one: it chooses its path by what is registered now
            record = msgspec.msgpack.encode(engine.record()).hex()
            got = reader.do("read", record=record, remote=address_of(array), length=MIB)
            assert got == [path, "ok", hashlib.blake2b(array.tobytes()).hexdigest()]
            reader.do("close")
