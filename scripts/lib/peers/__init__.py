"""Parts of `scripts/bench peers`: ours, the peers and the machine's limits, side by side."""
