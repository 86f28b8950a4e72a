"""The guest's preparation, as far as it needs no virtual machine; `scripts/test rdma` boots one."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from harness import guest
from harness.guest_image import Cpio, Image, NoGuest, unpacked_kernel

if TYPE_CHECKING:
    from pathlib import Path

ELF = b"\x7fELF" + bytes(range(256)) * 64


def test_a_kernel_compressed_by_xz_is_found_among_what_only_looks_like_one() -> None:
    decoy, real = lzma.compress(b"not a kernel"), lzma.compress(ELF, check=lzma.CHECK_CRC32)
    packed = b"MZ" + b"\xfd7zXZ\x00 in a message" + decoy + real + b"\x00size"
    assert unpacked_kernel(packed) == ELF


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the tool is installed with the rdma tier")
def test_a_kernel_compressed_by_zstd_is_found_too() -> None:
    real = subprocess.run(["zstd", "-cq"], input=ELF, capture_output=True, check=True).stdout
    assert unpacked_kernel(b"MZ" + real + b"\x00size") == ELF


def test_a_kernel_that_is_compressed_in_another_way_is_booted_as_it_is() -> None:
    assert unpacked_kernel(b"MZ" + ELF) is None


def test_an_archive_holds_its_files_as_the_kernel_reads_them() -> None:
    archive = Cpio()
    archive.add("bin", mode=0o040755)
    archive.add("bin/five", b"bytes")
    data = io.BytesIO(archive.closed())
    found = {}
    while True:
        fields = [int(field, 16) for field in split(data.read(110))]
        name = data.read(fields[11]).rstrip(b"\0").decode()
        data.seek(-data.tell() % 4, os.SEEK_CUR)
        found[name] = (fields[1], data.read(fields[6]))
        data.seek(-data.tell() % 4, os.SEEK_CUR)
        if name == "TRAILER!!!":
            break
    assert found["bin"] == (0o040755, b"")
    assert found["bin/five"] == (0o100755, b"bytes")


def split(header: bytes) -> list[str]:
    assert header[:6] == b"070701"
    return [header[at : at + 8].decode() for at in range(6, 110, 8)]


class Stand:
    """A program in place of QEMU, a line of shell that knows $control and $output."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
        program = folder / "qemu-system-x86_64"
        program.write_text(
            f"#!{sys.executable}\n"
            "import os, re, sys\n"
            "told = ' '.join(sys.argv)\n"
            "os.environ['control'] = re.search(r'file:(\\S+)/console', told)[1]\n"
            "os.environ['output'] = re.search(r'path=(/dev/fd/\\d+)', told)[1]\n"
            f"os.execvp('bash', ['bash', '-c', {line!r}])\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        self.image = Image("6", folder, folder / "kernel", folder / "first")

    def run(self, *command: str, **order: float) -> int:
        return guest.run(guest.Order(command, **order), self.image)  # type: ignore[arg-type]  # limit_s only


def test_the_commands_exit_status_and_output_are_the_guests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("MC_GID_INDEX", "two words")
    line = (
        "source $control/environment.sh; bash $control/command.sh >$output; echo 7 >$control/status"
    )
    stand = Stand(tmp_path, monkeypatch, line)
    assert stand.run("sh", "-c", 'echo "$MC_GID_INDEX, $MOONCAKE_GUEST"') == 7
    assert capfdbinary.readouterr().out == b"two words, 1\n"


def test_a_guest_that_dies_gives_no_success_and_shows_its_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(tmp_path, monkeypatch, "echo 'Kernel panic' >$control/console.log")
    assert stand.run("true") == guest.DIED
    assert "Kernel panic" in capsys.readouterr().err


def test_a_guest_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, monkeypatch, "touch $control/console.log; exec sleep 60")
    begin = time.monotonic()
    assert stand.run("true", limit_s=0.5) == guest.TIMED_OUT
    assert time.monotonic() - begin < 30


def test_a_machine_without_the_packages_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoGuest, match="apt-cache"):
        guest.prepare(tmp_path / "cache")
