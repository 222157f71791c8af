"""Loading: folders, names, refusals with every reason, and attention that refuses what it does not know."""

import pytest
import torch
import transformers
from tiny_models import build_stock, loaded_model, save_tiny, tiny_config

from kvscope.errors import EnvironmentProblem, KvscopeError, UsageError
from kvscope.harness.engine import names
from kvscope.harness.engine.backend import backend_of
from kvscope.harness.engine.configs import max_length_tokens
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.engine.glue import kvscope_attention
from kvscope.harness.engine.loading import load_config
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.names import known_models


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "smollm3", "afmoe"])
def test_a_local_folder_loads(tmp_path, name):
    folder = save_tiny(tmp_path / "tiny", name)
    loaded = load_model(str(folder), device="cpu", page_tokens=32)
    assert (loaded.name, loaded.spec) == ("tiny", str(folder))
    assert loaded.dtype == torch.float32
    config = load_config(str(folder))
    assert loaded.shape == loaded.backend.shape(config, element_bytes=4, page_tokens=32, revision=loaded.revision)
    assert loaded.max_length_tokens == 16384
    assert loaded.revision.startswith("sha256:")
    assert loaded.revision == load_model(str(folder)).revision
    assert loaded.tokenizer.decode(loaded.tokenizer("a word")["input_ids"]) == "a word"
    assert load_model(str(folder), dtype="bf16").shape.element_bytes == 2
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_shape_of_a_hybrid_model():
    shape = loaded_model("gpt_oss").shape
    assert (shape.layers, shape.sliding_layers, shape.sliding_window) == ((1, 3), (0, 2), 24)
    assert (shape.n_q_heads, shape.n_kv_heads, shape.head_dim) == (4, 2, 32)
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 32 * 4
    # 100 tokens are 7 pages of 16 in two layers; the window of 24 holds 23 tokens between steps, 24 after one.
    assert shape.dense_kv_bytes(100) == 7 * 16 * shape.kv_bytes_per_token + 2 * 23 * shape.layer_bytes_per_token
    assert shape.dense_kv_bytes(99, 1) == 7 * 16 * shape.kv_bytes_per_token + 2 * 24 * shape.layer_bytes_per_token
    assert shape.dense_kv_bytes(5) == 16 * shape.kv_bytes_per_token + 2 * 5 * shape.layer_bytes_per_token


def test_unknown_names_get_a_hint():
    with pytest.raises(UsageError, match="Did you mean 'reference'"):
        load_model("refrence")
    with pytest.raises(UsageError, match="no model folder '/not/there'"):
        load_model("/not/there")
    assert "reference" in known_models()


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_damaged_folder_is_named(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=f"'{folder}' cannot be loaded"):
        load_model(str(folder))


def test_a_missing_reference_model_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(names, "REFERENCE_MODEL_FOLDER", tmp_path)
    with pytest.raises(UsageError, match="reference model is missing"):
        load_model("reference")


def test_a_hub_id_that_does_not_load_is_explained(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(
        UsageError, match=r"'Qwen/Qwen3-8' .*Did you mean 'Qwen/Qwen3-8B'.*network.*couldn't connect"
    ) as e:
        load_model("Qwen/Qwen3-8")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        ("cuda", EnvironmentProblem, "no CUDA GPU"),
        ("cuda:0", EnvironmentProblem, "no CUDA GPU"),
        ("cuda:99", UsageError, "There is no device 'cuda:99': torch sees no GPU"),
        ("gpu", UsageError, "not one of"),
        ("cpu:1", UsageError, "not one of"),
    ],
)
def test_devices_are_checked(tmp_path, monkeypatch, device, error, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=text):
        load_model(str(save_tiny(tmp_path / "tiny")), device=device)


@pytest.mark.parametrize(("n_gpus", "there"), [(1, "cuda:0 alone"), (2, "2 GPUs, cuda:0 to cuda:1")])
def test_an_index_that_no_gpu_has_is_a_usage_error(monkeypatch, n_gpus, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert resolve_device(f"cuda:{n_gpus - 1}") == torch.device("cuda", n_gpus - 1)
    with pytest.raises(UsageError, match=f"There is no device 'cuda:{n_gpus}': torch sees {there}"):
        resolve_device(f"cuda:{n_gpus}")


def test_dtypes_are_checked(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'float32'"):
        load_model(str(save_tiny(tmp_path / "tiny")), dtype="float23")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: transformers.T5Config(), "encoder-decoder"),
        (lambda: tiny_config("mistral_sliding"), "every layer is a sliding-window layer"),
        (lambda: transformers.DeepseekV3Config(), "latent attention"),
        (lambda: transformers.DeepseekV32Config(), "backend of its own"),
        (lambda: transformers.Qwen3NextConfig(), "not a KV cache"),
        (lambda: transformers.BloomConfig(), "attention interface"),
        (lambda: transformers.RwkvConfig(), "names no attention heads"),
        (lambda: transformers.Llama4TextConfig(), "see their own chunk of the text only"),
    ],
    ids=["t5", "mistral_sliding", "deepseek_v3", "deepseek_v32", "qwen3_next", "bloom", "rwkv", "llama4"],
)
def test_architectures_that_cannot_be_run_are_refused(config, reason):
    with pytest.raises(UsageError, match=reason):
        backend_of(config()).shape(config(), element_bytes=4)


def test_a_model_without_decoder_layers_is_refused():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, is_decoder=True, **sizes)
    with pytest.raises(UsageError, match="its decoder has 0 layers in"):
        wrap_model(transformers.AutoModelForCausalLM.from_config(config), None)


def test_rotary_tables_that_change_with_the_length_limit_the_length():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 512,
    }
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=512)
    assert max_length_tokens(config) == 512
    assert max_length_tokens(tiny_config("llama")) == 16384, "llama3's table is the same at every length"


def test_loading_the_model_leaves_the_stock_implementations_alone():
    loaded_model("llama")
    ids = torch.tensor([[4, 5, 6]])
    for name in ("sdpa", "eager"):
        model = build_stock("llama")
        model.set_attn_implementation(name)
        assert model(ids).logits.isfinite().all()


def attend(**changes):
    tensors = {name: torch.randn(1, heads, 3, 8) for name, heads in (("query", 2), ("key", 1), ("value", 1))}
    return kvscope_attention(torch.nn.Linear(1, 1), **{**tensors, "attention_mask": None, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_attention_refuses_what_it_would_have_to_ignore(changes, text):
    assert attend()[0].shape == (1, 3, 2, 8)
    with pytest.raises(KvscopeError, match=text):
        attend(**changes)
