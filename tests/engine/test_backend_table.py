"""The table of backends: a kind of cache from outside the tree runs through load, prefill, decode and a whole sweep."""

from pathlib import Path
from types import SimpleNamespace

import plain_backend
import pytest
import torch
import transformers
from sessions import Single
from tiny_models import prompt_ids, runnable_methods

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import BACKENDS, NoForm, backend_of, require_token_attention
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.sweep import run
from kvscope.methods.registry import create_method

KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # K and V, two layers, two heads of 16, fp32


def tiny(**changes):
    """Return a tiny stock model of the type the plain backend is for."""
    torch.manual_seed(0)
    config = transformers.OlmoConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None, **changes,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def install(folder, monkeypatch, line, *, group="kvscope.backends"):
    """Make a package with one entry point importable here and in worker processes, as pip would."""
    metadata = folder / "plain_backend-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plain_backend\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{line}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(plain_backend.__file__).parent}", prepend=":")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, monkeypatch, f"{plain_backend.MODEL_TYPE} = plain_backend:Plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk with the reference model's tokenizer."""
    where = tmp_path_factory.mktemp("models") / "tiny-olmo"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    model = tiny()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


def test_a_model_type_without_a_line_is_paged():
    assert backend_of(tiny().config).name == "paged"
    assert backend_of(object()).name == "paged"


@pytest.mark.parametrize("model_type", BACKENDS)
def test_every_line_of_the_table_gives_the_backend_of_its_model_type(model_type):
    assert backend_of(SimpleNamespace(model_type=model_type)).name == model_type


@pytest.mark.usefixtures("installed")
def test_prefill_and_decode_are_the_backends_own():
    model = tiny()
    ids, fed = prompt_ids(50), prompt_ids(6, seed=2)
    with torch.no_grad():
        expected = model(torch.tensor([[*ids, *fed]])).logits[0, 50:]
    loaded = wrap_model(model, None, name="plain")
    assert (loaded.backend.name, loaded.attention_backend) == ("plain", plain_backend.ATTENTION)
    prompt = prefill(loaded, ids, chunk_tokens=16)
    assert isinstance(prompt, plain_backend.PlainPrompt)
    assert prompt.prefill_s > 0
    with Single(loaded, create_method("dense"), prompt, reserve_tokens=6) as session:
        logits = torch.stack([session.step(token) for token in fed])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    result = decode(loaded, create_method("recency:recency_tokens=20"), prompt, fed[:1], max_new_tokens=4)
    assert result.footprint_last.kv_bytes == (20 + 4) * KV_BYTES_PER_TOKEN


@pytest.mark.usefixtures("installed")
def test_an_empty_prompt_is_legal():
    loaded = wrap_model(tiny(), None, name="plain")
    result = decode(loaded, create_method("dense"), prefill(loaded, []), [5], max_new_tokens=3)
    assert result.footprint_last.kv_bytes == 3 * KV_BYTES_PER_TOKEN


@pytest.mark.usefixtures("installed", "server_set_aside")
def test_a_sweep_gives_its_rows_and_the_worker_finds_it(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = make_config(
        {
            "model": folder, "methods": ["dense", "recency:recency_tokens=100", "quest"], "tasks": ["niah_single_1"],
            "lengths_tokens": [512], "samples": 1, "max_new_tokens": 4, "footprint": True,
            "footprint_lengths_tokens": [512], "footprint_decode_tokens": 8, "device": "cpu",
        }
    )  # fmt: skip
    plan = make_plan(config)
    assert plan.unsupported("quest", 512) == "quest needs pages, and plain has none"
    assert "plain tensors of 512 tokens." in plan.warnings
    shown = run(config, out=tmp_path / "run", progress=False)
    samples = shown.samples.set_index("method")
    assert samples["status"].to_dict() == {"dense": "ok", "recency": "ok", "quest": "unsupported"}
    footprints = shown.footprint.set_index("method")
    assert footprints["status"].to_dict() == {"dense": "ok", "recency": "ok", "quest": "unsupported"}
    for method, held_tokens in (("dense", footprints.loc["dense", "prompt_tokens"]), ("recency", 100)):
        row = footprints.loc[method]
        assert plain_backend.ATTENTION in row["backend"]
        # Mean over the steps: the tokens held after the first of 8, after the second, and so on.
        assert row["resident_kv_bytes"] == pytest.approx((held_tokens + 4.5) * KV_BYTES_PER_TOKEN, abs=1)


@pytest.mark.usefixtures("installed")
def test_what_it_cannot_do_is_refused_with_its_own_words(folder):
    with pytest.raises(UsageError, match="has plain tensors, which are not filled with synthetic values"):
        make_plan(make_config({"model": folder, "methods": ["dense"], "kv": "synthetic", "device": "cpu"}))
    loaded = load_model(folder, device="cpu")
    with pytest.raises(UsageError, match="has plain tensors, which are not filled with synthetic values"):
        synthetic_prompt(loaded, 64, mirror=False)
    with pytest.raises(UsageError, match="'m' keeps plain tensors, and studies read the attention over single tokens"):
        require_token_attention(loaded.backend, model="m", what="studies")


def test_two_backends_of_one_model_type_are_a_conflict(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "deepseek_v4 = plain_backend:Plain")
    with pytest.raises(UsageError, match=r"'deepseek_v4' has 2 backends .*plain_backend:Plain.*uninstall all but one"):
        backend_of(transformers.DeepseekV4Config())


@pytest.mark.parametrize("value", ["not_there_at_all:Plain", "plain_backend:NotThere"])
def test_a_backend_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, value):
    install(tmp_path, monkeypatch, f"olmo = {value}")
    with pytest.raises(UsageError, match=f"backend '{value}' of model type 'olmo' cannot be loaded"):
        backend_of(tiny().config)


@pytest.mark.parametrize("spec", runnable_methods())
def test_a_method_without_a_form_still_describes_itself(spec):
    method = create_method(spec)
    none = NoForm(method, "because")
    assert none.describe() == method.describe()
    assert (none.label, none.name, none.saving_kind) == (method.label, method.name, method.saving_kind)
    assert getattr(none, "selection", "free") == getattr(method, "selection", "free")
    shape = backend_of(tiny().config).shape(tiny().config, element_bytes=4)
    assert none.unsupported(shape, "cpu") == ["because"]
    assert none.is_noop(4096, shape) == method.is_noop(4096, shape)
    assert none.effective_config(4096, shape) == method.effective_config(4096, shape)
    assert none.collectors(0) == []
    for use in (lambda: none.predict(shape, 4096), lambda: none.open(None, "cpu")):
        with pytest.raises(ValueError, match="because"):
            use()
