"""What a guest boots from: Debian's own kernel, and a first file system of a few modules.

The kernel is the distribution's, fetched and unpacked but never installed, because ours may lack
RDMA (a container's host) and Debian's cloud kernel does (no rdma_rxe, no 9p). Everything else the
guest needs is the machine's own root, so the first file system holds busybox and what reaches it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "guest"
KERNEL = "linux-image-amd64"  # depends on the newest; "-cloud-amd64" has no rdma_rxe and no 9p
# What reaches the machine's root and carries output; modprobe says what they need in turn.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_rng")
INSMOD = re.compile(r"insmod (.*\.ko(?:\.[a-z]+)?)")  # the path may have blanks
FOLDERS = ("bin", "dev", "proc", "sys", "lower", "up", "new", "modules")
# How what is compressed begins and ends its name, and what opens it: it comes out even when other
# bytes follow it, as they do in a bzImage.
OPENERS = ("xz", b"\xfd7zXZ\x00"), ("zstd", b"\x28\xb5\x2f\xfd")  # Debian 12, Debian 13


class NoGuest(RuntimeError):
    """The guest cannot be prepared on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Image:
    """Files of one prepared guest, all inside its cache folder."""

    version: str  # the kernel's, as `uname -r` will say
    root: Path  # the unpacked package: boot/ and lib/modules/
    kernel: Path
    first: Path  # the first file system


def prepare(cache: Path) -> Image:
    """The image in `cache`, made anew when this recipe changed: half a minute, all in all."""
    recipe = hashlib.sha256(Path(__file__).read_bytes())
    recipe.update((SCRIPTS / "first.sh").read_bytes())
    stamp = recipe.hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two that start at once must not unpack into one folder
        done = cache / f"ready-{stamp}.json"
        if not done.exists():
            for old in cache.glob("ready-*.json"):
                old.unlink()
            shutil.rmtree(cache / "root", ignore_errors=True)
            version, kernel = _unpack(cache / "root")
            (cache / "first.cpio").write_bytes(_first_files(cache / "root", version))
            kernel.rename(cache / "kernel")
            done.write_text(json.dumps({"version": version}))
        version = json.loads(done.read_text())["version"]
    return Image(version, cache / "root", cache / "kernel", cache / "first.cpio")


def _unpack(root: Path) -> tuple[str, Path]:
    """Fetch and unpack the kernel; its version, and the file to boot."""
    package = _newest_kernel()
    with tempfile.TemporaryDirectory() as folder:
        _apt("download", package, folder=Path(folder))
        for file in Path(folder).glob("*.deb"):
            _run("dpkg", "-x", str(file), str(root))
    _both_module_folders(root)
    version = next(path.name for path in (root / "lib/modules").iterdir())
    _run("depmod", "-b", str(root), version)
    packed = root / "boot" / f"vmlinuz-{version}"
    kernel = root / "vmlinux"
    # Unpacked here it boots by PVH; under emulation the guest takes 30 s to unpack it itself.
    data = unpacked_kernel(packed.read_bytes())
    if data is None:
        shutil.copy(packed, kernel)
    else:
        kernel.write_bytes(data)
    return version, kernel


def _newest_kernel() -> str:
    """The package that `linux-image-amd64` stands for now."""
    for line in _run("apt-cache", "depends", KERNEL).splitlines():
        word, _, name = line.partition(":")
        if word.strip() == "Depends":
            return name.strip()
    raise NoGuest(f"apt-cache knows no {KERNEL}: run 'apt-get update'; is this Debian on amd64?")


def _apt(what: str, package: str, folder: Path) -> None:
    command = ["apt-get", "-q", what, package]
    for last in (False, True):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if last or os.geteuid():
            raise NoGuest(
                f"apt-get could not fetch {package} ({done.stderr.strip()[-300:]}); an old list "
                "of packages is the usual reason: run 'apt-get update' as root, then this again"
            )
        _run("apt-get", "-q", "update")


def _both_module_folders(root: Path) -> None:
    """Let kmod find the modules by its own path: /lib to Debian 12, /usr/lib from Debian 13 on."""
    old, new = root / "lib/modules", root / "usr/lib/modules"
    have, lacks = (old, new) if old.is_dir() else (new, old)
    lacks.parent.mkdir(parents=True, exist_ok=True)
    lacks.symlink_to(os.path.relpath(have, lacks.parent))


def unpacked_kernel(packed: bytes) -> bytes | None:
    """The ELF file inside a bzImage, or None when no compression known here gives one."""
    for how, magic in OPENERS:
        at = packed.find(magic)
        while at >= 0:
            data = _opened(how, packed[at:])
            if data.startswith(b"\x7fELF"):
                return data
            at = packed.find(magic, at + 1)
    return None


def _opened(how: str, packed: bytes) -> bytes:
    """What is compressed at the beginning of `packed`; nothing when it is not."""
    if how == "xz":
        try:
            return lzma.LZMADecompressor().decompress(packed)
        except lzma.LZMAError:
            return b""
    # Python has zstd from 3.14 on. The tool complains of what follows, after it wrote the rest.
    tool = shutil.which("zstd")
    if tool is None:
        raise NoGuest("this kernel is compressed by zstd: install Debian's zstd")
    return subprocess.run([tool, "-dcq"], input=packed, capture_output=True, check=False).stdout


def _first_files(root: Path, version: str) -> bytes:
    """A newc cpio archive: busybox, modules in the order of their needs, and first.sh as init."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise NoGuest("no busybox on this machine: install Debian's busybox-static")
    archive = Cpio()
    for folder in FOLDERS:
        archive.add(folder, mode=stat.S_IFDIR | 0o755)
    archive.add("dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", Path(busybox).read_bytes())
    order = []
    for path in _with_needs(root, version):
        name = path.name.split(".ko")[0] + ".ko"
        archive.add(f"modules/{name}", _plain_module(path))
        order.append(name)
    archive.add("modules/order", "\n".join(order).encode())
    archive.add("init", (SCRIPTS / "first.sh").read_bytes())
    return archive.closed()


def _with_needs(root: Path, version: str) -> list[Path]:
    """Files of `MODULES` and of all they need, each after its own needs; built-in ones left out."""
    found: dict[Path, None] = {}  # ordered, each once
    for module in MODULES:
        command = ("modprobe", "-d", str(root), "-S", version, "--show-depends", module)
        for line in _run(*command).splitlines():
            if file := INSMOD.match(line):
                found.setdefault(Path(file[1]))
    return list(found)


def _plain_module(path: Path) -> bytes:
    """A module's bytes as busybox's insmod takes them: Debian 13 compresses them."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _run(*command: str) -> str:
    """What a tool prints; `NoGuest` with its complaint when it fails or is missing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # a user's PATH has no depmod
    tool = shutil.which(command[0], path=path)
    if tool is None:
        raise NoGuest(f"no {command[0]} on this machine")
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoGuest(f"'{' '.join(command)}' failed: {done.stderr.strip()[-300:]}")
    return done.stdout


class Cpio:
    """A newc archive in memory, which the kernel unpacks as its first file system."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._count = 0

    def add(
        self,
        name: str,
        data: bytes = b"",
        mode: int = stat.S_IFREG | 0o755,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        """Append one file, folder or device."""
        self._count += 1
        named = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), rdev (2), name, sum
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(named), 0)
        for part in (b"070701" + b"".join(b"%08x" % field for field in fields) + named, data):
            self._bytes.write(part)
            self._bytes.write(b"\0" * (-self._bytes.tell() % 4))

    def closed(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", mode=0)
        return self._bytes.getvalue()
