"""The `shm` transport: engines of one machine copy straight out of each other's memory."""

from mooncake_engine.transport.shm.transport import ShmTransport

__all__ = ["ShmTransport"]
