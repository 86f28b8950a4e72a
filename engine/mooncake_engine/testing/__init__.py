"""Conformance checks, faults and a fake clock for transports: ours and yours."""
