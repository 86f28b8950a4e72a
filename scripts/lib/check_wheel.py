"""What is in the wheel, and what must not be: `check_wheel.py WHEEL SOURCE_FOLDER`."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

#: Made by a compiler where there is one, and then in the wheel; loaded by ctypes.
NATIVE = "mooncake_engine/native/_loops.abi3.so"
PACKAGES = {"mooncake_connector": "", "mooncake_engine": "engine"}  # import name -> folder above
BUILT_ON_DEMAND = "mooncake_connector/bench/native"  # C that the benchmark compiles where it runs


def problems(wheel: Path, source: Path) -> list[str]:
    """One sentence per difference between the wheel and both packages' folders."""
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.endswith("/")}
    expected = {
        str(file.relative_to(source / above))
        for package, above in PACKAGES.items()
        for file in (source / above / package).rglob("*")
        if file.is_file()
        and (file.suffix in {".py", ".json", ".typed"} or BUILT_ON_DEMAND in file.parent.as_posix())
    }
    found = [f"{name} is not in the wheel" for name in sorted(expected - shipped)]
    found += [
        f"{name} does not belong in the wheel"
        for name in sorted(shipped - expected - {NATIVE})
        if not name.split("/")[0].endswith(".dist-info")
    ]
    if NATIVE not in shipped and shutil.which("gcc"):
        found.append(
            f"{NATIVE} is missing, though this machine has a compiler; see the build's log"
        )
    if "mooncake_connector/data/mooncake.json" not in shipped:
        found.append(
            "mooncake_connector/data/mooncake.json, which `config init` writes, is missing"
        )
    return found


if __name__ == "__main__":
    complaints = problems(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(complaints) or f"{Path(sys.argv[1]).name}: holds both packages, nothing else")
    sys.exit(bool(complaints))
