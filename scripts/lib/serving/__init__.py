"""`scripts/bench serving`: aggregated serving, our connector and the peers' under the same load.

The path of one run: `command` reads the options and asks `vllm_setups`, `sglang_setups` or `urls`
for the set-ups; `groups` says which of them are up together; `stage` opens a group and lets each
take its turn, round by round: single requests whose two legs the client sends itself, for the
handover and for equal tokens, then the framework's own benchmark; `verdict` makes medians and
ratios of the rounds in `results`; `report` prints them, `plot` draws them.

What a framework or a peer needs is in the modules of its name, behind `setup`: a set-up that can be
opened, and the functions of what it then is. What peers need to start without a GPU is in
`vllm_on_cpu` and `sglang_on_cpu`, and stands beside their figures.
"""
