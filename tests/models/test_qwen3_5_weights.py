"""Weights go to disk and back, come from transformers' own files, and are shared out among ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import qwen
import torch
from limits import HANGS
from safetensors.torch import load_file, save_file
from torch import Tensor

from aot_cache.errors import DeclarationError
from aot_cache.models.qwen3_5 import modules, weights
from aot_cache.models.qwen3_5.engine import make_engine
from aot_cache.models.qwen3_5.settings import SIZES

HERE = Path(__file__).parent
ASKED = {0: (qwen.prompt(40), 10), 2: (qwen.prompt(3), 12)}


KINDS = ("tiny", "tiny-moe")


def expected(size: str = "tiny") -> dict[int, list[int]]:
    return {slot: qwen.expected(prompt, count, size) for slot, (prompt, count) in ASKED.items()}


def saved(folder: Path, left_out: str = "", size: str = "tiny", **changed: Tensor) -> str:
    """The tests' model as a checkpoint in two files."""
    named = {k: v.clone() for k, v in weights.names(qwen.weighted(size)).items() if k != left_out} | changed
    halves = sorted(named)[: len(named) // 2]
    save_file({k: v for k, v in named.items() if k in halves}, folder / "model-00001-of-00002.safetensors")
    save_file({k: v for k, v in named.items() if k not in halves}, folder / "model-00002-of-00002.safetensors")
    return str(folder)


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("drafts", [0, 2])
def test_there_and_back(drafts: int, size: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = make_engine(qwen.tiny(drafts, size), "cpu", saved(tmp_path, size=size))
    assert qwen.serve(made, ASKED) == expected(size)
    for name, value in weights.wanted(made.model.net):
        assert torch.equal(value, weights.names(qwen.weighted(size))[name]), name


def test_names_are_those_of_the_released_checkpoints() -> None:
    """As vLLM's qwen3_5_mtp.py reads them, too."""
    named = weights.names(qwen.weighted())
    layer = {"self_attn.q_proj", "self_attn.q_norm", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"}
    draft = {"mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"}
    wanted = {f"{name}.weight" for name in draft | {f"mtp.layers.0.{one}" for one in layer}}
    wanted |= {f"model.layers.3.{one}.weight" for one in layer} | {"model.embed_tokens.weight", "model.norm.weight"}
    wanted |= {"model.layers.0.linear_attn.A_log", "model.layers.0.linear_attn.conv1d.weight"}
    assert wanted <= {*named} and "lm_head.weight" not in named
    assert named["mtp.fc.weight"].shape == (64, 128)


def test_names_of_experts() -> None:
    """One tensor of all experts of a layer, as released, in the draft, too."""
    named = weights.names(qwen.weighted("tiny-moe"))
    shapes = {"experts.gate_up_proj": [8, 64, 64], "experts.down_proj": [8, 64, 32], "gate.weight": [8, 64]}
    shapes |= {"shared_expert.down_proj.weight": [64, 32], "shared_expert_gate.weight": [1, 64]}
    for prefix in ("model.layers.0.mlp.", "model.layers.3.mlp.", "mtp.layers.0.mlp."):
        assert {one: list(named[prefix + one].shape) for one in shapes} == shapes


def test_experts_that_transformers_saved(tmp_path: Path) -> None:
    """One by one; and one that is missing or of another shape."""
    torch.manual_seed(1)
    qwen.original("tiny-moe").save_pretrained(tmp_path)
    made = make_engine(qwen.tiny(size="tiny-moe"), "cpu", str(tmp_path))
    assert qwen.serve(made, ASKED) == expected("tiny-moe")
    (file,) = tmp_path.glob("*.safetensors")
    named = load_file(file)
    (one,) = [name for name in named if name.endswith("layers.2.mlp.experts.7.up_proj.weight")]
    for changed, error in (
        ({}, "no weight model.layers.2.mlp.experts.7.up"),
        ({one: torch.ones(31, 64)}, "of one shape"),
    ):
        save_file({name: value for name, value in named.items() if name != one} | changed, file)
        with pytest.raises(DeclarationError) as caught:
            make_engine(qwen.tiny(size="tiny-moe"), "cpu", str(tmp_path))
        assert error in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_a_folder_that_transformers_saved(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    if prefix == "model.":
        qwen.original().save_pretrained(tmp_path)
    else:
        from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
        text = qwen.original().config.to_dict()
        whole = Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
        )
        whole.model.language_model.load_state_dict(qwen.original().model.state_dict())
        whole.save_pretrained(tmp_path)
    from safetensors import safe_open

    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert f"{prefix}layers.0.linear_attn.A_log" in [*opened.keys()]
    assert qwen.serve(make_engine(qwen.tiny(), "cpu", str(tmp_path)), ASKED) == expected()


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """Not tied: the checkpoint has an lm_head, and it is the one that speaks."""
    text = {**SIZES["tiny"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(text))
    untied = qwen.tiny(0, config=str(tmp_path / "config.json"))
    head = weights.names(qwen.weighted())["model.embed_tokens.weight"].flip(0)
    made = make_engine(untied, "cpu", saved(tmp_path, **{"lm_head.weight": head}))
    first = made.start(0, qwen.prompt(40))
    assert first == 511 - qwen.expected(qwen.prompt(40), 1)[0]


# --- what is wrong with a folder ------------------------------------------------------------------------------------------


def refused(folder: str, drafts: int = 1) -> str:
    with pytest.raises(DeclarationError) as caught:
        make_engine(qwen.tiny(drafts), "cpu", folder)
    assert "\n" not in str(caught.value) and folder in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_no_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(str(tmp_path / name)).startswith("no *.safetensors in ")


def test_a_missing_weight(tmp_path: Path) -> None:
    folder = saved(tmp_path, left_out="mtp.fc.weight")
    assert refused(folder).startswith("no weight mtp.fc.weight in ")
    assert qwen.serve(make_engine(qwen.tiny(), "cpu", folder), ASKED) == expected(), "nobody asks for the draft"


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, **{"model.norm.weight": torch.ones(63)})).startswith(
        "expected weight model.norm.weight of shape [64], found [63]"
    )


@pytest.mark.parametrize("content", [b"", b"no safetensors"])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(str(tmp_path))


# --- ranks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", KINDS)
def test_parts_make_the_whole(size: str) -> None:
    """Each rank has whole heads, and together they have each once."""
    parts, one = qwen.tiny(1, size, tp=2), qwen.tiny(1, size)
    shapes = {name: value.shape for name, value in weights.wanted(modules.make(parts, "cpu"))}
    for name, value in weights.names(qwen.weighted(size)).items():
        shared = [weights.part(name, value, parts, rank) for rank in range(2)]
        assert shared[0].shape == shared[1].shape == shapes[name], name
        assert weights.part(name, value, one, 0) is value
        if shared[0].shape == value.shape:
            assert all(torch.equal(value, half) for half in shared), name
        else:
            halves, whole = torch.cat([half.flatten() for half in shared]), value.flatten()
            assert torch.equal(halves.sort().values, whole.sort().values), name


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"}
    for size in KINDS:
        (tmp_path / size).mkdir()
    folders = {size: saved(tmp_path / size, size=size) for size in KINDS}
    command = [sys.executable, "-W", "ignore", str(HERE / "qwen_rank.py"), json.dumps(folders), json.dumps(ASKED)]
    jobs = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        told = [json.loads(job.communicate(timeout=HANGS)[0].splitlines()[-1]) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    wanted = {size: {str(slot): tokens for slot, tokens in expected(size).items()} for size in KINDS}
    rows = 4 * 2 * 32 // 2  # queries and gates of half of the heads
    said = {"tiny": [wanted["tiny"]] * 2, "tiny-moe": [wanted["tiny-moe"]]}  # with drafts and without; with drafts
    assert told == [{size: {"said": said[size], "rows": rows} for size in KINDS}] * 2
