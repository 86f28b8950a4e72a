"""`sglang.launch_server` whose stock Mooncake backend runs on a machine without a GPU.

    python -P sglang_on_cpu.py --model-path ... --disaggregation-transfer-backend mooncake_tcp

The one thing that no flag changes: Mooncake's sender says that it takes page numbers in pinned
memory behind a CUDA event (`supports_host_tensor_indices`), and then the first request ends the
prefill server with "pin_memory=True requires a CUDA or other accelerator backend". Every other
backend of SGLang's gets its page numbers as plain numpy, and so does Mooncake's here.

SGLang starts its schedulers by "spawn", which runs this file again in each of them. Only there is
Mooncake's module imported: in the launcher it would bring prometheus_client in before SGLang has
named the folder that its processes share metrics in, and no metrics would be shown.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
else:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False
