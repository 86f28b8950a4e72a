"""Starts real servers and talks to them: what the demo, the benchmarks and the tests share."""
