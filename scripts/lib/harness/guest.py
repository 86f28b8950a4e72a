"""A virtual machine with RDMA devices over this machine's own files: `python -m harness.guest`.

    python scripts/lib/harness/guest.py [--share FOLDER] [--env NAME[=VALUE]] -- COMMAND...

The guest sees the whole file system under the same paths, the checkout and its environments too;
what it writes is lost, except below a `--share`. It has two Soft-RoCE rails (see guest/rails.sh).
The exit status is the command's; 124: out of time; 125: the guest died, its console is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.guest_image import SCRIPTS, Image, NoGuest, prepare
from harness.process import end_like_ctrl_c

if TYPE_CHECKING:
    from collections.abc import Sequence

CACHE = SCRIPTS.parents[2] / ".cache" / "guest"
LIMIT_S = 1200.0
TIMED_OUT = 124
DIED = 125
MEMORY = "2G"  # numpy, pytest and two engines take under 1 GiB; the rest is what the guest writes
CPUS = 2
# Quick to boot: nothing here is an attacker, and nobody is to debug the kernel.
KERNEL_OPTIONS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable"
    " random.trust_cpu=on audit=0 selinux=0 apparmor=0 cryptomgr.notests rcupdate.rcu_expedited=1"
)
# Of the caller's environment, beside MC_* and MOONCAKE_*.
KEPT = ("HOME", "LANG", "PATH", "VIRTUAL_ENV", "PYTHONPATH", "CI", "TERM")


@dataclass(frozen=True)
class Order:
    """What one guest is to do."""

    command: Sequence[str]
    shares: Sequence[Path] = ()  # folders that it may write
    environment: Sequence[str] = ()  # NAME, as it is here, or NAME=VALUE
    limit_s: float = LIMIT_S
    rails: bool = True


def run(order: Order, image: Image) -> int:
    """Boot, pass on what the command prints, and return its exit status, `TIMED_OUT` or `DIED`."""
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        control = Path(folder)
        _write_control(control, order, image)
        console = control / "console.log"
        reading, writing = os.pipe()
        qemu = subprocess.Popen(
            _qemu(control, order, image, writing),
            stdin=subprocess.DEVNULL,
            pass_fds=[writing],
            start_new_session=True,  # Ctrl-C is handled here
        )
        os.close(writing)
        in_time = False
        try:
            in_time = _pass_on(reading, time.monotonic() + order.limit_s)
        finally:
            if qemu.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    qemu.wait(5.0 if in_time else 0.0)  # it is powering off
                qemu.kill()
                qemu.wait()
            os.close(reading)
        status = control / "status"
        if status.exists():
            return int(status.read_text())
        why = "is not done in time" if not in_time else "died without a result"
        print(f"guest: it {why}; the end of its console:", file=sys.stderr)
        print(console.read_text(errors="replace")[-4000:], file=sys.stderr)
        return DIED if in_time else TIMED_OUT


def _write_control(control: Path, order: Order, image: Image) -> None:
    """The folder that the guest has at /run/guest."""
    quoted = shlex.quote
    settings = {
        "GUEST_LIMIT": str(int(order.limit_s) + 30),
        "GUEST_MODULES": quoted(str((image.root / "lib/modules").resolve())),
        "GUEST_FOLDER": quoted(str(Path.cwd())),
        "GUEST_SHARES": f"({' '.join(quoted(str(share.resolve())) for share in order.shares)})",
        "GUEST_RAILS": quoted(str(SCRIPTS / "rails.sh")) if order.rails else "''",
    }
    lines = "".join(f"{name}={value}\n" for name, value in settings.items())
    (control / "settings.sh").write_text(lines)
    kept = {n: v for n, v in os.environ.items() if n in KEPT or n.startswith(("MC_", "MOONCAKE_"))}
    for wish in order.environment:
        name, given, value = wish.partition("=")
        kept[name] = value if given else os.environ.get(name, "")
    kept["MOONCAKE_GUEST"] = "1"
    exports = "".join(f"export {name}={quoted(value)}\n" for name, value in kept.items())
    (control / "environment.sh").write_text(exports)
    (control / "command.sh").write_text(f"exec {shlex.join(order.command)}\n")
    (control / "second.sh").write_bytes((SCRIPTS / "second.sh").read_bytes())


def _qemu(control: Path, order: Order, image: Image, output: int) -> list[str]:
    if shutil.which("qemu-system-x86_64") is None:
        raise NoGuest("no qemu-system-x86_64 on this machine: install Debian's qemu-system-x86")
    hardware = _hardware_virtualisation()
    folders = {"control": control} | {f"share{i}": p.resolve() for i, p in enumerate(order.shares)}
    command = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35", "-smp", str(CPUS), "-m", MEMORY),
        *("-accel", "kvm" if hardware else "tcg,thread=multi,tb-size=512"),
        *("-cpu", "host" if hardware else "max"),  # numpy 2 needs x86-64-v2
        *("-kernel", str(image.kernel), "-initrd", str(image.first), "-append", KERNEL_OPTIONS),
        *("-serial", f"file:{control / 'console.log'}", "-device", "virtio-serial"),
        *("-chardev", f"file,id=output,path=/dev/fd/{output},append=on"),
        *("-device", "virtserialport,chardev=output,name=output"),
        *("-object", "rng-random,id=random,filename=/dev/urandom"),
        *("-device", "virtio-rng,rng=random"),
        *("-fsdev", "local,id=m,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=m,mount_tag=machine"),
    ]
    for tag, folder in folders.items():
        escaped = str(folder).replace(",", ",,")
        command += (
            *("-fsdev", f"local,id={tag},path={escaped},security_model=none,multidevs=remap"),
            *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        )
    return command


def _hardware_virtualisation() -> bool:
    """True where KVM runs a stock kernel: /dev/kvm of a PVM host is there and then hangs."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and ("vmx" in flags or "svm" in flags)


def _pass_on(reading: int, deadline: float) -> bool:
    """Copy the guest's output to ours until it ends; False when `deadline` came first."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if select.select([reading], [], [], left)[0]:
            data = os.read(reading, 65536)
            if not data:
                return True
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def main() -> int:
    """Parse the command line, prepare, run."""
    parser = argparse.ArgumentParser(
        prog="guest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true", help="fetch and unpack only")
    parser.add_argument("--share", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS")
    parser.add_argument("--no-rails", action="store_true", help="boot without Soft-RoCE")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    end_like_ctrl_c()
    try:
        image = prepare(CACHE)
        if options.prepare:
            return 0
        if not options.command:
            parser.error("what is the guest to run? Give a command after --")
        rails = not options.no_rails
        order = Order(options.command, options.share, options.env, options.limit, rails)
        return run(order, image)
    except NoGuest as missing:
        print(f"guest: {missing}", file=sys.stderr)
        return DIED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
