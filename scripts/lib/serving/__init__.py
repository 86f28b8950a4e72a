"""`scripts/bench serving`: aggregated serving, our connector and the peers' under the same load.

The path of one run: `command` reads the options and asks `catalogue` for the set-ups; `stage` opens
a group of them at a time and takes the rounds in turns (`probe` for single requests whose two legs
the client sends itself, `Running.load` for the framework's own benchmark); `verdict` makes
medians and ratios of them; `report` prints the table, writes the JSON and draws the picture.

What a framework or a peer needs is in `vllm*.py` and `sglang*.py`, behind `setup.py`.
"""
