"""Bytes over TCP.

dialer.py opens, stream.py moves, wire.py frames, lane.py asks, server.py greets, serving.py
answers, failures.py explains.
"""

from mooncake_engine.transport.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
