#!/usr/bin/env bash
# The RDMA tests on the devices of the machine that this runs on, once with each verbs binding.
#   rdma_tests.sh LOGS [PYTEST ARGUMENTS]
# Exit status: 1 the default binding's run failed, 2 pyverbs', 3 both.
set -uo pipefail
logs=$1
shift
# An emulated guest takes 25 s to import what a test needs, and a folder in memory keeps no caches.
options=(-p no:cacheprovider --timeout 300)
export PYTHONDONTWRITEBYTECODE=1
status=0

.venv/bin/python -m pytest "${options[@]}" tests/rdma "$@" 2>&1 |
    tee "$logs/test-rdma.log" || status=1

# What a binding promises, and the transport over it; the rest does not depend on the binding.
if [[ -x .venv-pyverbs/bin/python ]]; then
    MC_VERBS_BINDING=pyverbs .venv-pyverbs/bin/python -m pytest "${options[@]}" \
        tests/rdma/test_verbs_*.py tests/rdma/test_transport_conformance.py "$@" 2>&1 |
        tee "$logs/test-rdma-pyverbs.log" || status=$((status + 2))
else
    echo "pyverbs tests not run: this system has no python3-pyverbs of its own" |
        tee "$logs/test-rdma-pyverbs.log"
    [[ -z ${MOONCAKE_GUEST:-} ]] || status=$((status + 2)) # the guest has it
fi
exit $status
