from __future__ import annotations

from mooncake_connector.model_digest import model_digest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "_name_or_path": "/models/tiny",
    "transformers_version": "4.57.1",
    "torch_dtype": "float32",
    "dtype": "float32",
}
EXTRAS = {"vllm.quantization": "None", "vllm.dtype": "torch.float32"}


def test_a_digest_does_not_change_between_releases() -> None:
    """Nodes of two releases compare theirs: what went into it, and how, must stay."""
    assert model_digest(CONFIG, EXTRAS) == "7496dbfca1922e0f"


def test_the_same_model_in_another_folder_or_saved_by_another_version_has_the_same_digest() -> None:
    elsewhere = CONFIG | {"_name_or_path": "/mnt", "transformers_version": "5", "dtype": "bfloat16"}
    del elsewhere["torch_dtype"]
    assert model_digest(dict(reversed(elsewhere.items())), EXTRAS) == model_digest(CONFIG, EXTRAS)


def test_shape_rope_and_element_type_make_another_digest() -> None:
    digests = {
        model_digest(CONFIG, EXTRAS),
        model_digest(CONFIG | {"hidden_size": 512}, EXTRAS),
        model_digest(CONFIG | {"rope_scaling": {"type": "yarn", "factor": 8.0}}, EXTRAS),
        model_digest(CONFIG, EXTRAS | {"vllm.dtype": "torch.bfloat16"}),
    }
    assert len(digests) == 4


def test_what_json_does_not_know_counts_by_its_text() -> None:
    assert model_digest({"layers": frozenset({1})}, {}) == model_digest(
        {"layers": "frozenset({1})"}, {}
    )


def test_the_given_configuration_is_left_as_it_was() -> None:
    given = dict(CONFIG)
    model_digest(given, EXTRAS)
    assert given == CONFIG
