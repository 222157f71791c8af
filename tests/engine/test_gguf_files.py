"""GGUF files as models: unpacked once, named for what they are, and every damage one sentence of the plan."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MakeConfig
from tokenizers.pre_tokenizers import ByteLevel

from kvscope.errors import UsageError
from kvscope.harness.engine import gguf_files
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import resolve_model
from kvscope.harness.passes.plan import make_plan

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
WIDTH, VOCAB, LAYERS = 32, 320, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(tmp_path: Path, *, eos: int = 0) -> Path:
    """Write a Llama of two layers in Q8_0, with a byte-level vocabulary."""
    import gguf

    path = tmp_path / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for add, value in (
        (writer.add_context_length, 2048), (writer.add_embedding_length, WIDTH), (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, 2 * WIDTH), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_rope_dimension_count, 16), (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, VOCAB),
        (writer.add_rope_freq_base, 10_000.0),
    ):  # fmt: skip
        add(value)
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "ab", "ba"]  # transformers 5.17 takes no file of one merge
    tokens += [f"<|{index}|>" for index in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 258 + [3] * (VOCAB - 259))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(0)
    (writer.add_int32 if eos < 0 else writer.add_uint32)("tokenizer.ggml.eos_token_id", eos)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    tensor("token_embd.weight", VOCAB, WIDTH)
    tensor("output_norm.weight", WIDTH)
    tensor("output.weight", VOCAB, WIDTH)
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (16, WIDTH),
            "attn_v": (16, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (2 * WIDTH, WIDTH),
            "ffn_up": (2 * WIDTH, WIDTH), "ffn_down": (WIDTH, 2 * WIDTH),
        }.items():  # fmt: skip
            tensor(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
def test_a_file_or_its_folder_is_a_model(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = resolve_model(str(packed))
    assert name == "tiny.Q8_0 (GGUF Q8_0, unpacked)"
    assert (Path(folder) / "model.safetensors").is_file()
    loaded = load_model(str(packed), device="cpu")
    assert (loaded.name, loaded.shape.n_layers) == (name, LAYERS)

    def again(*_: Any) -> None:
        raise AssertionError("it was unpacked a second time")

    monkeypatch.setattr(gguf_files, "_unpack", again)
    assert resolve_model(str(packed.parent)) == (folder, name)


@needs_gguf
def test_weights_are_those_of_the_file(packed: Path) -> None:
    import gguf

    wanted = next(each for each in gguf.GGUFReader(packed).tensors if each.name == "blk.1.ffn_up.weight")
    model = load_model(str(packed), device="cpu").model
    found = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].detach().numpy()
    np.testing.assert_array_equal(found, gguf.quants.dequantize(wanted.data, wanted.tensor_type))


@needs_gguf
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_one_sentence_of_the_plan(packed: Path, small: MakeConfig, kept: float) -> None:
    data = packed.read_bytes()
    packed.write_bytes(data[: int(len(data) * kept)])
    refused(small, packed, "is cut off or damaged")


@needs_gguf
@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path, small: MakeConfig, token: int) -> None:
    refused(small, written(tmp_path, eos=token), f"names token {token} as its eos_token_id, and has {VOCAB} tokens")


def test_a_file_that_is_none_is_refused(tmp_path: Path, small: MakeConfig) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    refused(small, path, "does not begin with 'GGUF'")
    path.write_bytes(b"PK\3\4 something else")
    refused(small, path, "does not begin with 'GGUF'")


def test_without_the_package_it_is_said_which(
    tmp_path: Path, small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    refused(small, path, r"needs the package gguf .*pip install 'kvscope\[gguf\]'")


def test_a_folder_of_several_is_asked_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files: give --model one, as a\.gguf"):
        resolve_model(str(tmp_path))


def refused(small: MakeConfig, path: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern) as caught:
        make_plan(small(model=str(path)))
    assert "\n" not in str(caught.value)
    assert not [each for each in path.parent.glob("cache/kvscope/gguf/*") if each.name.startswith(".")]
    shutil.rmtree(path.parent / "cache", ignore_errors=True)
