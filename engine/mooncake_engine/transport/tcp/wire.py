"""What two engines say to each other over one lane, and what is believed of it. Pure.

    initiator                                target
    HELLO   magic, version, incarnation ->
                                          <- WELCOME magic, version, verdict, incarnation
    then, one at a time:
    REQUEST header, addresses, lengths, grant [write: the bytes] ->
                                          <- ANSWER header [reason | read: the bytes]

All integers are little-endian. HELLO and WELCOME keep their form in every version.

What comes before bytes has a length that `ALIGN` divides. The kernel copies a stream into pages one
after the other, and what lies askew in them is copied out more slowly: 2048 x 128 KiB took 16 %
longer behind answers of 16 bytes than behind answers of 64.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from mooncake_engine.types import Slice, Uint64s

MAGIC = b"mooncake"
VERSION = 2
ALIGN = 64
MAX_RUNS = 1024  # one sendmsg or recvmsg
MAX_NBYTES = 1 << 30  # one call moves at most 2 GiB - 4 KiB
MAX_GRANT = 1024
MAX_REASON = 1024
MAX_INCARNATION = 63  # a Pascal string of 64 bytes

HELLO = struct.Struct("<8sH64p54x")  # magic, version, the incarnation that we look for
WELCOME = struct.Struct("<8sHH64p52x")  # magic, version, Verdict, the incarnation that is here
REQUEST = struct.Struct("<BxHIQQ")  # operation, grant bytes, runs, nbytes, request id
ANSWER = struct.Struct("<BxH4xQ48x")  # status, reason bytes, request id

# Addresses first: they start at offset 0 of the body and so stay aligned for numpy.
MAX_BODY = MAX_RUNS * 16 + MAX_GRANT + ALIGN

_OP_CODES = {Op.READ: 1, Op.WRITE: 2}
_OPS = {code: op for op, code in _OP_CODES.items()}
_STATUS_CODES = {Status.OK: 0, Status.REFUSED: 1}
_STATUSES = {code: status for status, code in _STATUS_CODES.items()}


class Malformed(Exception):
    """The peer sent what this protocol does not know; only its connection ends."""


class Verdict(enum.IntEnum):
    """Answer to a HELLO."""

    WELCOME = 0
    OTHER_INCARNATION = 1
    OTHER_VERSION = 2
    LANES_FULL = 3


class Welcome(NamedTuple):
    """A decoded WELCOME."""

    version: int
    verdict: Verdict
    incarnation: str


class Request(NamedTuple):
    """A decoded and checked REQUEST header."""

    op: Op
    grant_size: int
    runs: int
    nbytes: int
    request_id: int

    @property
    def body_size(self) -> int:
        """Bytes of addresses, lengths and grant that follow the header, and what fills them up."""
        return _filled(REQUEST.size + 16 * self.runs + self.grant_size) - REQUEST.size


def pack_hello(incarnation: str) -> bytes:
    """Ask for the engine that started as `incarnation`."""
    return HELLO.pack(MAGIC, VERSION, incarnation.encode())


def unpack_hello(data: bytes) -> tuple[int, str]:
    """Version and wanted incarnation. Raises `Malformed` for another protocol."""
    magic, version, incarnation = HELLO.unpack(data)
    check_magic(magic)
    return version, _text(incarnation)


def check_magic(data: bytes) -> None:
    """Raise `Malformed` unless the peer opened with our magic."""
    if data != MAGIC:
        raise Malformed(f"it speaks another protocol (its first bytes are {data!r})")


def pack_welcome(verdict: Verdict, incarnation: str) -> bytes:
    """Tell who we are and whether requests may follow."""
    return WELCOME.pack(MAGIC, VERSION, verdict, incarnation.encode())


def unpack_welcome(data: bytes) -> Welcome:
    """Raises `Malformed` for another protocol."""
    magic, version, verdict, incarnation = WELCOME.unpack(data)
    check_magic(magic)
    try:
        return Welcome(version, Verdict(verdict), _text(incarnation))
    except ValueError as unknown:
        raise Malformed(f"it answered with verdict {verdict}, unknown here") from unknown


def pack_request(piece: Slice, request_id: int) -> bytes:
    """Header, addresses, lengths and grant of one slice."""
    grant, runs = piece.grant, piece.remote.size
    header = REQUEST.pack(_OP_CODES[piece.op], len(grant), runs, piece.nbytes, request_id)
    frame = b"".join((header, piece.remote.tobytes(), piece.lengths.tobytes(), grant))
    return frame.ljust(_filled(len(frame)), b"\0")


def _filled(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def unpack_request(data: bytes) -> Request:
    """Decode a header; every size in it is checked before anything is allocated for it."""
    code, grant_size, runs, nbytes, request_id = REQUEST.unpack(data)
    op = _OPS.get(code)
    if op is None:
        raise Malformed(f"operation {code} is unknown")
    if not 0 < runs <= MAX_RUNS:
        raise Malformed(f"{runs} runs in a slice; 1 to {MAX_RUNS} are allowed")
    if not 0 < nbytes <= MAX_NBYTES:
        raise Malformed(f"{nbytes} bytes in a slice; 1 to {MAX_NBYTES} are allowed")
    if grant_size > MAX_GRANT:
        raise Malformed(f"a grant of {grant_size} bytes; at most {MAX_GRANT} are allowed")
    return Request(op, grant_size, runs, nbytes, request_id)


def check_lengths(lengths: Uint64s, nbytes: int) -> None:
    """Raise `Malformed` unless all lengths are positive and add up to `nbytes`."""
    # Each is at most 2**30 and there are at most 1024 of them, so the sum cannot wrap.
    if not lengths.min() or lengths.max() > nbytes or int(lengths.sum()) != nbytes:
        raise Malformed(f"the lengths of {lengths.size} runs do not add up to {nbytes} bytes")


def pack_answer(status: Status, request_id: int, reason: str = "") -> bytes:
    """Header of an answer, and the reason of a refusal."""
    text = reason.encode()[:MAX_REASON]
    return ANSWER.pack(_STATUS_CODES[status], len(text), request_id) + text


def unpack_answer(data: bytes, request_id: int) -> tuple[Status, int]:
    """Status and size of the reason that follows. Raises `Malformed`."""
    code, reason_size, echoed = ANSWER.unpack(data)
    status = _STATUSES.get(code)
    if status is None or reason_size > MAX_REASON or echoed != request_id:
        raise Malformed(
            f"the answer to request {request_id} was for {echoed}, with status code {code} and "
            f"a reason of {reason_size} bytes"
        )
    return status, reason_size


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as bad:
        raise Malformed("its incarnation is not UTF-8") from bad
