"""One module per transfer engine, see `mooncake_connector.bench.base`."""
