"""What can be chosen, what each wrong choice is told in one line, and what is read from a model's config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

from aot_cache.errors import AotCacheError, DeclarationError, UnknownName
from aot_cache.models.qwen3_5.settings import SIZES, read_config, settings

Json = Any

# As released; the same numbers from independent sources: NVIDIA's Model-Optimizer (0.8B, 4B, 9B), THUDM's slime (27B).
RELEASED = {
    #        hidden layers heads kv value heads MLP tied
    "0.8b": (1024, 24, 8, 2, 16, 3584, True),
    "4b": (2560, 32, 16, 4, 32, 9216, True),
    "9b": (4096, 32, 16, 4, 32, 12288, False),
    "27b": (5120, 64, 24, 4, 48, 17408, False),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "linear_num_value_heads")
NAMES += ("intermediate_size", "tie_word_embeddings")


def written(folder: Path, content: Json) -> str:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_the_sizes_are_the_released_ones_and_tiny_ones() -> None:
    assert {*SIZES} == {*RELEASED, "35b-a3b", "tiny", "tiny-moe"}


def test_numbers_of_the_mixture_of_experts_are_those_of_transformers() -> None:
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    text, theirs = SIZES["35b-a3b"], Qwen3_5MoeTextConfig().to_dict()
    same = {*text} - {"rope_parameters", "mtp_num_hidden_layers"}
    assert {name: text[name] for name in same} == {name: theirs[name] for name in same}
    assert [text[name] for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")] == [256, 8, 512]


@pytest.mark.parametrize("size", RELEASED)
def test_numbers_of_a_size(size: str) -> None:
    text = SIZES[size]
    assert tuple(text[name] for name in NAMES) == RELEASED[size]
    same = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "head_dim": 256}
    same |= {"linear_conv_kernel_dim": 4, "vocab_size": 248320, "mtp_num_hidden_layers": 1}
    assert {name: text[name] for name in same} == same
    assert text["rope_parameters"]["partial_rotary_factor"] == 0.25
    # Pairs of the part of a head that turns are shared out among the three axes of an image.
    assert 2 * sum(text["rope_parameters"]["mrope_section"]) == 0.25 * 256


def test_every_fourth_layer_attends() -> None:
    from aot_cache.models.qwen3_5.modules import config_of

    for size, (_, layers, *_) in RELEASED.items():
        kinds = config_of(settings(size=size)).layer_types
        assert kinds == (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4)


# --- options --------------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    found = settings()
    assert (found.drafts, found.width, found.tp, found.dtype, found.name) == (0, 1, 1, "bfloat16", "qwen3.5-0.8b")
    assert settings(spec="mtp").drafts == 2 and settings(spec="mtp", num_speculative_tokens=3).width == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": "3b"}, "unknown size '3b' of qwen3.5"),
        ({"spec": "eagle"}, "expected one of none, mtp as --spec"),
        ({"spec": ""}, "expected one of none, mtp as --spec"),
        ({"dtype": "int8"}, "expected one of bfloat16, float16, float32 as --dtype"),
        ({"max_batch": 0}, "--max-batch of at least 1"),
        ({"num_speculative_tokens": 2}, "--spec mtp with --num-speculative-tokens"),
        ({"spec": "mtp", "num_speculative_tokens": -1}, "--num-speculative-tokens of at least 0"),
        ({"max_model_len": 1}, "--max-model-len of at least 2"),
        ({"max_model_len": 3, "spec": "mtp"}, "--max-model-len of at least 4"),
        ({"prefill_chunk": 0}, "prefill_chunk of at least 1"),
        ({"tp": 0}, "--tp of at least 1"),
        ({"tp": 4}, "--tp that divides num_key_value_heads = 2"),
        ({"tp": 3, "size": "27b"}, "--tp that divides num_key_value_heads = 4"),
        ({"tp": 4, "size": "35b-a3b"}, "--tp that divides num_key_value_heads = 2"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: str) -> None:
    with pytest.raises(AotCacheError) as caught:
        settings(**options)
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_that_is_not_known_names_those_that_are() -> None:
    with pytest.raises(UnknownName, match=r"qwen3\.5-0\.8b.*--model PATH/config\.json"):
        settings(size="3b")


@given(length=st.integers(4, 100_000), drafts=st.integers(0, 7), chunk=st.integers(1, 4096), tp=st.sampled_from([1, 2]))
def test_what_follows_from_options(length: int, drafts: int, chunk: int, tp: int) -> None:
    length = max(length, 2 + drafts)
    spec = "mtp" if drafts else "none"
    found = settings(
        spec=spec, num_speculative_tokens=drafts, max_model_len=length, prefill_chunk=chunk, tp=tp, size="tiny"
    )
    # The last step begins at most at the last token but one, and writes its drafts behind.
    assert found.cache_len % 64 == 0 and length + found.width <= found.cache_len < length + found.width + 64
    assert 1 <= found.prefill_chunk <= min(chunk, length - 1)
    assert found.width == 1 + drafts and found.conv_channels * tp == 2 * 2 * 32 + 4 * 32


# --- config.json ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_file_gives_what_is_in_it(size: str, nested: bool, tmp_path: Path) -> None:
    text = dict(SIZES[size])
    around = text["model_type"].removesuffix("_text")
    path = written(tmp_path, {"model_type": around, "text_config": text} if nested else text)
    found = settings(config=path, size="nobody looks at it", spec="mtp")
    assert found.text == text and found.name == path


def test_the_text_goes_before_what_is_around_it(tmp_path: Path) -> None:
    text = dict(SIZES["0.8b"])
    del text["tie_word_embeddings"]
    around = {"model_type": "qwen3_5", "tie_word_embeddings": True, "hidden_size": 1, "text_config": text}
    found = read_config(Path(written(tmp_path, around)))
    assert found["tie_word_embeddings"] is True and found["hidden_size"] == 1024


def test_rotation_under_its_older_name(tmp_path: Path) -> None:
    text = dict(SIZES["tiny"])
    text["rope_scaling"] = text.pop("rope_parameters")
    assert read_config(Path(written(tmp_path, text)))["rope_parameters"] == SIZES["tiny"]["rope_parameters"]


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_what_transformers_writes(size: str, tmp_path: Path) -> None:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

    from aot_cache.models.qwen3_5.modules import config_of

    fields, tiny = SIZES[size], settings(size=size)
    whole: Any = Qwen3_5MoeConfig if size == "tiny-moe" else Qwen3_5Config
    text = type(config_of(tiny))(**{k: v for k, v in fields.items() if k != "model_type"})
    text.save_pretrained(tmp_path / "text")
    whole(text_config=text.to_dict()).save_pretrained(tmp_path / "whole")
    for folder in ("text", "whole"):
        found = settings(config=str(tmp_path / folder / "config.json"), spec="none")
        assert found.kind == tiny.kind == fields["model_type"]
        ours, theirs = config_of(tiny).to_dict(), config_of(found).to_dict()
        assert {k: v for k, v in ours.items() if k in fields} == {k: theirs[k] for k in ours if k in fields}
        assert ours["layer_types"] == theirs["layer_types"]


def without(*names: str, size: str = "tiny", **more: Json) -> Json:
    return {name: value for name, value in SIZES[size].items() if name not in names} | more


def mixture(*names: str, **more: Json) -> Json:
    return without(*names, size="tiny-moe", **more)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "cannot read config file "),
        ("{", "cannot read config file "),
        ("[]", "a JSON object in "),
        ("null", "a JSON object in "),
        ({"text_config": None}, "text_config"),
        ({"text_config": [1]}, "text_config"),
        ({}, "model_type None"),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next'"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "llama"}}, "model_type 'llama'"),
        (
            without(model_type="qwen3_5_moe_text"),
            "lacks moe_intermediate_size, num_experts, num_experts_per_tok, shared",
        ),
        (mixture("num_experts"), "lacks num_experts;"),
        (mixture(model_type="qwen3_5_text"), "lacks intermediate_size;"),
        (mixture(model_type="qwen3_5_moe_vision"), "model_type 'qwen3_5_moe_vision'"),
        (mixture(num_experts="8"), "num_experts"),
        (mixture(num_experts_per_tok=0), "num_experts_per_tok"),
        (mixture(num_experts_per_tok=9), "of at most num_experts = 8"),
        (without("head_dim"), "lacks head_dim"),
        (without("head_dim", "vocab_size", "rope_parameters"), "lacks head_dim, rope_parameters, vocab_size"),
        (without(num_attention_heads="8"), "num_attention_heads"),
        (without(intermediate_size=None), "intermediate_size"),
        (without(hidden_size=0), "hidden_size"),
        (without(vocab_size=True), "vocab_size"),
    ],
)
def test_a_config_file_that_is_wrong(content: Json, error: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DeclarationError) as caught:
        settings(config=path)
    assert error in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"cannot read config file .*nowhere\.json: No such file"):
        settings(config=str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("name", ["moe_intermediate_size", "shared_expert_intermediate_size"])
def test_experts_that_cannot_be_split(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixture(**{name: 33}))
    with pytest.raises(DeclarationError, match=f"--tp that divides {name} = 33, found --tp 2"):
        settings(config=path, tp=2)


@pytest.mark.parametrize("layers", [None, 0, 2])
def test_a_model_without_its_draft(layers: int | None, tmp_path: Path) -> None:
    text = without("mtp_num_hidden_layers") | ({} if layers is None else {"mtp_num_hidden_layers": layers})
    path = written(tmp_path, text)
    with pytest.raises(DeclarationError, match=r"a model with one MTP layer for --spec mtp.*--spec none"):
        settings(config=path, spec="mtp")
    assert settings(config=path).drafts == 0


@given(
    st.dictionaries(
        st.sampled_from([*{*SIZES["tiny"], *SIZES["tiny-moe"]}, "text_config", "rope_scaling"]),
        st.one_of(
            st.none(), st.booleans(), st.integers(-2, 8), st.text(max_size=3), st.lists(st.integers(), max_size=2)
        ),
        max_size=3,
    ),
    st.sampled_from(["tiny", "tiny-moe"]),
)
def test_any_config_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Json, size: str) -> None:
    path = written(tmp_path_factory.mktemp("any"), {**SIZES[size], **changes})
    try:
        found = settings(config=path, spec="mtp")
    except DeclarationError:
        return
    assert found.conv_channels > 0


def test_settings_import_no_torch() -> None:
    code = "import sys, aot_cache.models.qwen3_5.settings; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=True)
    assert done.stdout.strip() == "False"
