"""Conformance checks, faults on command and a far side to kill, for transports: ours and yours."""
