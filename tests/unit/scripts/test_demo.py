"""What the demo concludes from its rows; the servers are the integration tests' matter."""

from __future__ import annotations

import msgspec
from demo import summary
from harness.comparison import SHARED_PREFIX, SUFFIXES, Row, prompts
from harness.sglang import _settings


def row(path: str = "shm", *, equal: bool = True) -> Row:
    return Row("p", 24, equal, 1, 2, 3, 4, 5, 6, path, (7,), (7,))


def test_the_summary_counts_equal_prompts_and_names_every_path() -> None:
    found = summary([row("tcp"), row("-"), row("shm", equal=False), row("shm")])
    assert (found.prompts, found.identical, found.path) == (4, 3, "shm+tcp")


def test_a_run_that_moved_nothing_names_no_path() -> None:
    assert summary([row("-"), row("-")]).path == "-"


def test_the_json_has_one_object_per_prompt() -> None:
    written = msgspec.json.decode(msgspec.json.encode(summary([row()])))
    assert set(written) == {"prompts", "identical", "path", "rows"}
    assert written["rows"][0]["disaggregated_tokens"] == [7]


def test_the_last_two_prompts_begin_alike_and_end_otherwise() -> None:
    named = prompts([1, 65])
    assert [len(ids) for ids in named.values()] == [1, 65, *(SHARED_PREFIX + n for n in SUFFIXES)]
    *_, first, second = named.values()
    assert first[:SHARED_PREFIX] == second[:SHARED_PREFIX]
    assert first[SHARED_PREFIX] != second[SHARED_PREFIX]


def test_settings_of_a_server_keep_the_endpoints_beside_what_a_test_sets() -> None:
    more = {"testing": True, "engine": {"protocol": "tcp", "metadata": {"lease_ttl_s": 5}}}
    assert _settings("127.0.0.1:2379", more) == {
        "testing": True,
        "engine": {
            "host": "127.0.0.1",
            "protocol": "tcp",
            "metadata": {"backend": "etcd", "endpoints": ["127.0.0.1:2379"], "lease_ttl_s": 5},
        },
    }
    assert "metadata" not in _settings("", {})["engine"]
