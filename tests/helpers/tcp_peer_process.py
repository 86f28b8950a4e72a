"""A serving tcp side: prints its segment record in hex and serves until it is killed."""

from __future__ import annotations

import sys

import msgspec
from tcp_sides import Side

side = Side()
side.memory[:] = 7
print(msgspec.msgpack.encode(side.record).hex(), flush=True)
sys.stdin.read()
side.transport.close()
