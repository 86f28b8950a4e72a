"""`mooncake-connector bench`: our transfer engine, the machine's limit and the peers, in turns."""
