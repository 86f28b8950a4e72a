"""What an installation promises. `scripts/check` runs this against the installed wheel too."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import mooncake_engine

import mooncake_connector

# Imports every module, but for the framework folders, and says which frameworks were asked for,
# also by an import that a `try` would hide. A fresh process: here others have imported much.
IMPORT_ALL = """
import importlib, pkgutil, sys

asked = set()

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "vllm", "sglang"}:
            asked.add(name)

sys.meta_path.insert(0, Watch())
for root in sys.argv[1:]:
    package = importlib.import_module(root)
    for found in pkgutil.walk_packages(package.__path__, root + "."):
        parts = found.name.split(".")
        if parts[1] in {"vllm", "sglang"} or parts[-1] == "__main__":  # __main__ runs the command
            continue
        if parts[-1].startswith("pyverbs"):  # wants the distribution's pyverbs, and says so
            continue
        if parts[-1] == "_loops":  # plain C, loaded by ctypes: no module
            continue
        importlib.import_module(found.name)
print(*sorted(asked))
"""


def test_no_module_outside_the_framework_folders_asks_for_a_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "mooncake_connector", "mooncake_engine"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


def test_vllm_finds_the_connector_by_its_entry_point() -> None:
    [entry] = metadata.entry_points(group="vllm.general_plugins", name="mooncake_connector")
    assert callable(entry.load())  # loading it must not need vLLM: that is what register() is for


def test_both_packages_say_that_they_are_typed() -> None:
    for package in ("mooncake_connector", "mooncake_engine"):
        assert resources.files(package).joinpath("py.typed").is_file()


def test_both_packages_come_from_one_installation() -> None:
    homes = [Path(package.__file__).parent for package in (mooncake_connector, mooncake_engine)]
    same_folder = homes[0].parent == homes[1].parent
    same_checkout = homes[0].parent / "engine" == homes[1].parent
    assert same_folder or same_checkout
