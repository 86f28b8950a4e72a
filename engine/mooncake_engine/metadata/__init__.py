"""Metadata stores: etcd, p2p (no server), memory (one process)."""
