"""InfiniBand and RoCE by libibverbs; docs/rdma.md."""

from mooncake_engine.transport.rdma.transport import RdmaTransport

__all__ = ["RdmaTransport"]
