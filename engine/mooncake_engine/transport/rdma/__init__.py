"""InfiniBand and RoCE by libibverbs; docs/rdma.md."""
