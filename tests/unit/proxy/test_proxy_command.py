"""The proxy as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from harness.servers import free_port
from proxy_stage import Stage, staged

COMMAND = str(Path(sys.executable).parent / "mooncake-connector")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(number: signal.Signals) -> None:
    async def play(stage: Stage) -> None:
        own_port = stage.proxy.port
        given = ("--prefill", stage.prefill.url, "--decode", stage.decode.url)
        process = await asyncio.create_subprocess_exec(
            COMMAND, "proxy", "--port", str(port), *given, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            while b"listens" not in (line := await process.stderr.readline()):
                assert line, "the command ended without having listened"
            stage.proxy.port = port  # from here on the stage talks to the command's proxy
            await stage.health(prefill_in=1, decode_in=1)
            assert (await stage.ask())[:2] == (200, stage.decode.answer)
            process.send_signal(number)
            _, said = await process.communicate()
            assert (process.returncode, b"Traceback" in said) == (0, False)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            stage.proxy.port = own_port

    port = free_port()
    staged(play)
