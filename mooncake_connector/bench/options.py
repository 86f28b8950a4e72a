"""What `bench transfer` was asked for, checked before anything starts."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from mooncake_engine.errors import ConfigError

from mooncake_connector import config_legacy
from mooncake_connector.bench.base import Route
from mooncake_connector.bench.kv import ARRANGEMENTS, MODELS
from mooncake_connector.bench.sweep import doubling

if TYPE_CHECKING:
    from collections.abc import Iterable

PEERS = ("mooncake", "nixl", "ucx", "zmq", "gloo")
ROUTES = {"tcp": Route.TCP, "shm": Route.SAME_HOST, "rdma": Route.RDMA}
OPS = ("read", "write", "mix")
WORKLOADS = ("sweep", "kv", "fragmentation")
#: Pages of the fragmentation workload, in tokens: SGLang's default, vLLM's, the cure, the extreme.
PAGE_SIZES = (1, 16, 64, 256)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Mode(enum.StrEnum):
    """Which sides this command starts."""

    TARGET = "target"
    INITIATOR = "initiator"
    BOTH = "both"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of one run; sizes in bytes, times in seconds.

    `rounds` are valid ones; 0: one of each row, valid or not.
    """

    mode: Mode = Mode.BOTH
    workload: str = "sweep"
    seg_name: str = ""
    target_seg_name: str = ""
    op: str = "read"
    protocol: str = "tcp"
    metadata_server: str = "P2PHANDSHAKE"
    devices: tuple[str, ...] = ()
    buffer: int = 1 << 30
    blocks: tuple[int, int] = (4096, 64 << 20)
    batches: tuple[int, int] = (1, 1)
    threads: tuple[int, ...] = (1,)
    duration: float = 5.0
    rounds: int = 0
    minutes: float = 30.0
    contiguous: bool = False
    check_consistency: bool = False
    limits: bool = True
    peers: tuple[str, ...] = ()
    busy_python: bool = False
    busy_loops: int = 0
    model: str = "llama-3-8b"
    tokens: int = 2048
    page_size: int = 16
    tp_size: int = 1
    arrangement: str = "vllm"
    seed: int = 0
    json: str = ""
    plot: str = ""

    @property
    def route(self) -> Route:
        """What carries the bytes."""
        return ROUTES[self.protocol]

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Of the workloads that have pages."""
        return PAGE_SIZES if self.workload == "fragmentation" else (self.page_size,)


def size(text: str, flag: str) -> int:
    """Bytes of "4096", "4K", "1M", "2G", "1MiB"; all are powers of 1024."""
    found = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise ConfigError(f"{flag}={text}: not a size; write bytes, or as 4K, 1M, 2G")
    return int(found[1]) * _UNITS[found[2].upper()]


def counts(text: str, flag: str) -> tuple[int, ...]:
    """Numbers above 0, comma between: "1,4,8,12"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{flag}={text}: not a list of numbers above 0, as in 1,4,8,12")
    return tuple(dict.fromkeys(int(part) for part in parts))


def span(single: int | None, start: int, stop: int, flag: str) -> tuple[int, int]:
    """First and last of a sweep; `single` (seed's --block_size, --batch_size) is both."""
    if single is not None:
        return single, single
    if not 0 < start <= stop:
        raise ConfigError(f"--start_{flag}={start} --max_{flag}={stop}: the sweep has no row")
    return start, stop


def thread_counts(listed: str, start: int, stop: int) -> tuple[int, ...]:
    """`--threads 1,4,8` as they are, otherwise the doubling that tebench does."""
    if listed:
        return counts(listed, "--threads")
    return tuple(doubling(*span(None, start, stop, "num_threads")))


def names(text: str) -> tuple[str, ...]:
    """Parts between commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def mode(asked: str, target_seg_name: str) -> Mode:
    """Without --mode: an initiator where there is a target to go to, otherwise both sides."""
    one = Mode(_one_of(asked or ("initiator" if target_seg_name else "both"), Mode, "--mode"))
    if (one is Mode.INITIATOR) != bool(target_seg_name):
        raise ConfigError(
            f"--mode={one} with --target_seg_name={target_seg_name or '(none)'}: an initiator "
            "needs the address that a target printed, and nobody else does"
        )
    return one


def metadata_server(text: str) -> str:
    """As the engine takes it: P2PHANDSHAKE, or etcd's addresses."""
    if text.lower() in ("", "p2p"):
        return "P2PHANDSHAKE"
    config_legacy.metadata_server(text, "--metadata_server")
    return text


def segment_type(text: str, *, has_cuda: bool) -> None:
    """Where the memory lies: DRAM; VRAM needs CUDA, and this build moves host memory only."""
    one = _one_of(text.upper(), ("DRAM", "VRAM"), "--seg_type")
    if one == "DRAM":
        return
    if not has_cuda:
        raise ConfigError("--seg_type=VRAM needs CUDA, and this machine has no CUDA driver")
    raise ConfigError("--seg_type=VRAM: this benchmark moves host memory only; use DRAM")


def checked(options: Options) -> Options:
    """The same options; what only shows when several are seen together is refused here.

    Raises:
        ConfigError: One sentence that names the flags.
    """
    _one_of(options.op, OPS, "--op_type")
    _one_of(options.protocol, ROUTES, "--protocol")
    _one_of(options.workload, WORKLOADS, "--workload")
    _one_of(options.model, MODELS, "--model")
    _one_of(options.arrangement, ARRANGEMENTS, "--kv_layout")
    for peer in options.peers:
        _one_of(peer, PEERS, "--peers")
    if options.workload != "sweep" and options.threads != (1,):
        raise ConfigError(f"--workload={options.workload} is one request, so --threads must be 1")
    if options.busy_loops < 0:
        raise ConfigError(f"--busy_loops={options.busy_loops}: not a number of processes")
    for flag, value in (("duration", options.duration), ("minutes", options.minutes)):
        if not 0 < value < 1e6:
            raise ConfigError(f"--{flag}={value}: not a time above 0")
    if options.plot and not options.plot.endswith((".png", ".html")):
        raise ConfigError(f"--plot={options.plot}: its name must end in .png or .html")
    for flag, name in (("json", options.json), ("plot", options.plot)):
        if name and not Path(name).resolve().parent.is_dir():
            raise ConfigError(f"--{flag}={name}: there is no such folder")
    return options


def _one_of(value: str, known: Iterable[str], flag: str) -> str:
    known = list(known)
    if value not in known:
        raise ConfigError(f"{flag}={value}: known are {', '.join(known)}")
    return value
