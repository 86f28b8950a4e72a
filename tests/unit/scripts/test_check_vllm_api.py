from __future__ import annotations

import pytest
from check_vllm_api import methods, verdicts

BASE = """
class Base:
    @abstractmethod
    def start_load_kv(self, context, **kwargs): ...
    def get_finished(self, ids): ...
    def finished(self, request, blocks=None): ...
    @classmethod
    def layout(cls, config): ...
class Unrelated:
    def get_finished(self): ...
"""


def compare(ours: str) -> dict[str, str]:
    body = "\n".join(f"    {line}" for line in ours.splitlines())
    return verdicts(methods(BASE, ("Base",)), methods(f"class Ours:\n{body}", ("Ours",)))


START = "def start_load_kv(self, context, **kwargs): ..."


def test_a_connector_with_the_same_signatures_fits() -> None:
    ours = (
        f"{START}\n"
        "def finished(self, request, blocks=None): ...\n"
        "@classmethod\ndef layout(cls, config): ..."
    )
    assert set(compare(ours).values()) == {"fits"}


def test_an_abstract_method_that_we_lack_is_named() -> None:
    assert compare("def get_finished(self, ids): ...")["start_load_kv"].startswith("abstract")


@pytest.mark.parametrize(
    ("ours", "name", "complaint"),
    [
        ("def start_load_kv(self, context): ...", "start_load_kv", "more keywords"),
        ("def get_finished(self, names): ...", "get_finished", "arguments differ: ids"),
        ("def get_finished(self): ...", "get_finished", "arguments differ"),
        ("def get_finished(self, ids, more): ...", "get_finished", "needs more arguments"),
        ("def finished(self, request, blocks): ...", "finished", "optional there"),
        ("def gone_from_vllm(self): ...", "gone_from_vllm", "unknown there"),
    ],
)
def test_a_signature_that_cannot_be_called_is_told(ours: str, name: str, complaint: str) -> None:
    assert complaint in compare(ours)[name]


def test_a_private_helper_of_ours_is_no_matter_of_vllm() -> None:
    assert "_helper" not in compare(f"{START}\ndef _helper(self): ...")
