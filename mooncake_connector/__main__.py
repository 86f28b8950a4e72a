"""`python -m mooncake_connector`."""

from __future__ import annotations

from mooncake_connector.cli import main

main()
