"""Moves bytes between registered regions of two processes; knows nothing of KV caches."""

from mooncake_engine.batch import Batch
from mooncake_engine.config import (
    EngineConfig,
    MetadataConfig,
    RdmaConfig,
    ShmConfig,
    TcpConfig,
)
from mooncake_engine.engine import TransferEngine
from mooncake_engine.errors import (
    ConfigError,
    EngineClosed,
    EngineError,
    InvalidTransfer,
    MetadataError,
    OutOfBounds,
    PathUnavailable,
    UnknownSegment,
)
from mooncake_engine.prepared import PreparedTransfer
from mooncake_engine.segment import Segment
from mooncake_engine.transport.registry import register_transport
from mooncake_engine.types import (
    Completion,
    Op,
    Path,
    Region,
    RegionRecord,
    SegmentRecord,
    Status,
)

__all__ = [
    "Batch",
    "Completion",
    "ConfigError",
    "EngineClosed",
    "EngineConfig",
    "EngineError",
    "InvalidTransfer",
    "MetadataConfig",
    "MetadataError",
    "Op",
    "OutOfBounds",
    "Path",
    "PathUnavailable",
    "PreparedTransfer",
    "RdmaConfig",
    "Region",
    "RegionRecord",
    "Segment",
    "SegmentRecord",
    "ShmConfig",
    "Status",
    "TcpConfig",
    "TransferEngine",
    "UnknownSegment",
    "register_transport",
]
