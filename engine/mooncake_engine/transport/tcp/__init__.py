"""Bytes over TCP.

sockets.py opens, stream.py moves, wire.py frames, lane.py asks, server.py and serving.py answer.
"""

from mooncake_engine.transport.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
