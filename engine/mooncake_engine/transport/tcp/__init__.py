"""Bytes over TCP.

sockets.py and dialer.py open, stream.py moves, wire.py frames, lane.py asks, server.py accepts,
serving.py answers, failures.py explains.
"""

from mooncake_engine.transport.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
