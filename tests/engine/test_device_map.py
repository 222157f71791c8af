"""A model over several devices: the map, and an engine that keeps every layer's cache beside it, pretended on a CPU."""

import json
from contextlib import nullcontext

import pytest
import torch
from pretended import Pretended, put, spread
from tiny_models import PAGE_TOKENS, build_stock, loaded_model, prompt_ids, save_tiny, stock_model

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import NoForm, form_on
from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.decoding import Request
from kvscope.harness.engine.device_map import AskedMap, found_devices, place, read_device_map
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.rehearsal import rehearsed
from kvscope.harness.engine.self_check import self_check
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods.base import CacheMethod, union_collectors
from kvscope.methods.registry import create_method
from kvscope.methods.shape import ModelShape
from kvscope.specs import parse_spec

TWO = ("cpu:1", "cpu:2")
LSA = "lsa:chunk_tokens=16,recency_tokens=16"
METHODS = [
    "dense",
    "recency:recency_tokens=40",
    "random:recency_tokens=16,chunk_tokens=16,fraction=0.5",
    "sliding_window:window=32",
    "snapkv:budget_tokens=40,window_tokens=8",
    "snapkv:budget_tokens=24,window_tokens=4,interval_steps=4",
    "pyramidkv:budget_tokens=40,window_tokens=8",
    "adakv:budget_tokens=40,window_tokens=8",
    "knorm:budget_tokens=40",
    "expected_attention:budget_tokens=40",
    "h2o:budget_tokens=40",
    "tova:budget_tokens=40",
    "quest:budget_tokens=48,block_tokens=16",
    "moba:budget_tokens=48,block_tokens=16",
    "msa:budget_tokens=48,block_tokens=16",
    "dsa:selection=synthetic,budget_tokens=40",
    "dsa:indexer=oracle,budget_tokens=40",
    f"{LSA},selection=synthetic,budget_fraction=0.4,tau=3",
    f"{LSA},selection=synthetic,budget_fraction=0.4,tau=2,refresh=stale1",
    f"{LSA},indexer=attention,budget_fraction=0.4,tau=2",
    f"{LSA},indexer=hindsight,budget_fraction=0.4,tau=2",
    f"{LSA},indexer=landmark,budget_fraction=0.4,tau=2",
    "dense:kv=int8",
    "recency:recency_tokens=60,kv=fp8",
    "snapkv:budget_tokens=70,window_tokens=8,kv=int4",
    "quest:budget_tokens=48,block_tokens=16,kv=int8",
    f"{LSA},selection=synthetic,budget_fraction=0.4,tau=3,kv=int8",
]


def method_of(spec):
    return create_method(parse_spec(spec, kind="method"))


def two_devices(name, asked=None):
    """Return a tiny model over two pretended devices; call it within ``Pretended``."""
    stock = stock_model(name)
    found = place(asked or AskedMap(None, TWO), stock, spec=name, element_bytes=4)
    return wrap_model(spread(stock, dict(found.modules)), None, name=name, page_tokens=PAGE_TOKENS)


def answer(loaded, method, n_tokens=100):
    """Decode a few tokens of a prompt of several chunks."""
    assert method.unsupported(loaded.shape, loaded.device) == []
    ids = prompt_ids(n_tokens)
    kv = prefill(loaded, ids[:-1], collectors=union_collectors([method], loaded.shape.layers), chunk_tokens=64)
    request = rehearsed(
        loaded, Request(method=method, prompt=kv, forced_ids=ids[-1:], max_new_tokens=7, stop_at_eos=False)
    )
    return decode(loaded, request.method, kv, ids[-1:], max_new_tokens=7, stop_at_eos=False)


# -- the tool itself


def test_pretended_devices_do_not_mix():
    with Pretended() as mode:
        a, b = torch.ones(2, device="cpu:1"), torch.ones(2).to("cpu:2")
        assert (a.device, b.device, (a + 1)[0].device) == (*map(torch.device, TWO), torch.device("cpu:1"))
        for mixed in (lambda: a + b, lambda: torch.cat([a, b]), lambda: a + torch.ones(2), lambda: a[b.long()]):
            with pytest.raises(RuntimeError):
                mixed()
        a.copy_(b)
        a[:1] = b[:1]
        assert (a + b.to(a.device)).device == a.device
        assert (a * torch.tensor(2.0)).cpu().device == torch.device("cpu")
    assert mode.used == set(TWO)


# -- the engine


@pytest.mark.parametrize("spec", METHODS)
def test_two_devices_answer_as_one_and_hold_the_same_bytes(spec):
    expected = answer(loaded_model("llama"), method_of(spec))
    with Pretended():
        loaded = two_devices("llama")
        method = form_on(loaded.backend, method_of(spec), loaded.shape)
        found = answer(loaded, method)
    assert found.ids == expected.ids
    assert (found.footprint_peak, found.footprint_mean) == (expected.footprint_peak, expected.footprint_mean)
    assert (found.residency, found.bytes_recalled) == (expected.residency, expected.bytes_recalled)


@pytest.mark.parametrize("name", ["afmoe", "gemma3", "gpt_oss"])
def test_windows_tied_weights_and_experts_span_devices(name):
    spec = "sliding_window:window=32"
    expected = answer(loaded_model(name), method_of(spec))
    with Pretended():
        loaded = two_devices(name)
        assert self_check(loaded).passed
        found = answer(loaded, method_of(spec))
        kinds = [type(each) for each in loaded.rotations.values()]
    assert kinds == [type(each) for each in loaded_model(name).rotations.values()]
    assert (found.ids, found.footprint_peak) == (expected.ids, expected.footprint_peak)


def test_every_layer_is_cached_where_it_is():
    with Pretended():
        loaded = two_devices("llama")
        assert loaded.shape.devices == ("cpu:1", "cpu:1", "cpu:2", "cpu:2") == found_devices(loaded.model)
        kv = prefill(loaded, prompt_ids(50))
        cache = method_of("dense").open(kv, loaded.device, reserve_tokens=2)
        assert [str(pages.device) for pages in cache.pool.pages.values()] == list(loaded.shape.devices)
        assert [str(hidden.device) for hidden in kv.last_hidden.values()] == list(loaded.shape.devices)
        assert {pages.device for pages in kv.pages.values()} == {torch.device("cpu")}
        assert kv.peak_device_kv_bytes == prefill(loaded_model("llama"), prompt_ids(50)).peak_device_kv_bytes


@pytest.mark.parametrize("spec", ["dense", "adakv:budget_tokens=40,window_tokens=8", f"{LSA},indexer=attention"])
def test_a_cache_in_one_place_would_be_noticed(spec, monkeypatch):
    with Pretended():
        loaded, method, ids = two_devices("llama"), method_of(spec), prompt_ids(100)
        kv = prefill(loaded, ids, collectors=union_collectors([method], loaded.shape.layers), chunk_tokens=64)
        monkeypatch.setattr(ModelShape, "device_of", lambda shape, layer, device: device)
        with pytest.raises(RuntimeError, match=r"mixes \['cpu:1', 'cpu:2'\]|from elsewhere"):
            decode(loaded, method, kv, ids[-1:], max_new_tokens=2, stop_at_eos=False)


def test_sequences_share_eager_steps_and_say_why_there_is_no_graph():
    requests = [("dense", 60), ("quest:budget_tokens=48,block_tokens=16", 80)]

    def answers(loaded):
        with BatchDecode(loaded, decode_graph="auto") as batch:
            rows = []
            for spec, n_tokens in requests:
                method, ids = method_of(spec), prompt_ids(n_tokens)
                kv = prefill(loaded, ids[:-1], collectors=union_collectors([method], loaded.shape.layers))
                rows.append(batch.add(Request(method=method, prompt=kv, forced_ids=ids[-1:], max_new_tokens=5)))
            while batch.under_way:
                batch.step()
        return [row.result for row in rows]

    expected = answers(loaded_model("llama"))
    with Pretended():
        found = answers(two_devices("llama"))
    assert [each.ids for each in found] == [each.ids for each in expected]
    assert all("the model is on 2 devices, and a graph is of one" in each.step_backend for each in found)


@pytest.mark.parametrize("spec", ["dense", "quest", f"{LSA},indexer=landmark,budget_fraction=0.4"])
def test_synthetic_pages_span_devices(spec):
    sizes = []
    for several in (False, True):
        with Pretended() if several else nullcontext():
            loaded, method = (two_devices("llama") if several else loaded_model("llama")), method_of(spec)
            kv = synthetic_prompt(
                loaded, 200, mirror=True, collectors=union_collectors([method], loaded.shape.layers), chunk_tokens=64
            )
            sizes.append(decode(loaded, method, kv, [5], max_new_tokens=4, stop_at_eos=False).footprint_peak)
    assert sizes[0] == sizes[1]


def test_what_keeps_layers_together_is_refused():
    class OneDevice(type(method_of("dense"))):
        spans_devices = False

    with Pretended():
        loaded = two_devices("llama")
        form = form_on(loaded.backend, OneDevice(), loaded.shape)
        assert isinstance(form, NoForm)
        assert "keeps the whole sequence on one device" in form.unsupported(loaded.shape, loaded.device)[0]
    assert not CacheMethod.spans_devices


# -- the map


def test_layers_are_dealt_out_and_all_else_stays_on_the_first():
    found = place(AskedMap(None, ("cuda:0", "cuda:1", "cuda:2")), stock_model("llama"), spec="m", element_bytes=2)
    assert found.layers == ("cuda:0", "cuda:1", "cuda:1", "cuda:2")
    assert found.devices == ("cuda:0", "cuda:1", "cuda:2")
    assert found.text() == "cuda:0 (layer 0), cuda:1 (layers 1-2), cuda:2 (layer 3)"
    assert {found.modules[name] for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")} == {
        "cuda:0"
    }
    n_parameters = sum(parameter.numel() for parameter in stock_model("llama").parameters())
    assert sum(found.weights_bytes.values()) == 2 * n_parameters


def test_a_file_is_read_as_transformers_reads_one(tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"model": 1, "model.layers.3": "cuda:0", "lm_head": 0}))
    monkeypatch.setattr("kvscope.harness.engine.device_map._n_gpus", lambda: 2)
    found = place(read_device_map(str(path)), stock_model("llama"), spec="m", element_bytes=2)
    assert found.layers == ("cuda:1", "cuda:1", "cuda:1", "cuda:0")
    assert found.devices == ("cuda:1", "cuda:0")  # that of the embeddings first
    assert found.modules["lm_head"] == "cuda:0"
    with Pretended():
        elsewhere = {name: f"cpu:{int(device[-1]) + 1}" for name, device in found.modules.items()}
        loaded = wrap_model(spread(stock_model("llama"), elsewhere), None, page_tokens=PAGE_TOKENS)
        assert loaded.device == torch.device("cpu:2")
        assert answer(loaded, method_of("dense")).ids == answer(loaded_model("llama"), method_of("dense")).ids


WHOLE = {"model": "cuda:0", "lm_head": "cuda:0"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model": "cuda:0"}, "says nothing of 'lm_head.weight'"),
        ({**WHOLE, "model.layer.0": "cuda:1"}, "which model 'm' has not. Did you mean 'model.layers.0'?"),
        ({**WHOLE, "model.layers.0.mlp": "cuda:1"}, "puts 'model.layers.0' of model 'm' on cuda:0, cuda:1"),
        ({**WHOLE, "model.layers.0": "cpu"}, "name GPUs alone, or the CPU alone"),
        ({**WHOLE, "model.layers.0": "disk"}, "on 'disk', expected cuda:N, N or cpu"),
        ({**WHOLE, "model.layers.0": True}, "on True, expected cuda:N, N or cpu"),
        ({**WHOLE, "model.layers.0": -1}, "on -1, expected"),
        ([], "expected an object of module: device"),
        ({}, "expected an object of module: device"),
        ("{", "is not valid JSON"),
        (None, "There is no file"),
    ],
)
def test_a_map_that_cannot_be_is_refused_in_a_sentence(given, sentence, tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    if given is not None:
        path.write_text(given if isinstance(given, str) else json.dumps(given))
    monkeypatch.setattr("kvscope.harness.engine.device_map._n_gpus", lambda: 2)
    with pytest.raises(UsageError) as error:
        place(read_device_map(str(path)), stock_model("llama"), spec="m", element_bytes=2)
    assert sentence in str(error.value)


def test_tied_weights_have_one_device(monkeypatch):
    asked = AskedMap({"model": "cuda:0", "lm_head": "cuda:1"}, ("cuda:0", "cuda:1"))
    with torch.device("meta"):
        tied = build_stock("llama", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="they are the same weights: give both one device"):
        place(asked, tied, spec="m", element_bytes=2)
    assert place(AskedMap(None, TWO), tied, spec="m", element_bytes=2).modules["lm_head"] == "cpu:1"


def test_devices_that_are_not_there_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cuda:7"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert read_device_map("balanced") == AskedMap(None, ("cuda:0", "cuda:1"))
    with pytest.raises(UsageError, match="puts modules on cuda:7, and torch sees 2 GPUs here"):
        read_device_map(str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_device_map("auto") == AskedMap(None, ("cpu",))
    with pytest.raises(UsageError, match="and torch sees no GPU here: name devices that are there"):
        read_device_map(str(path))


def test_transformers_loads_by_a_map(tmp_path):
    modules = place(AskedMap(None, ("cpu",)), stock_model("afmoe"), spec="m", element_bytes=4).modules
    folder = str(save_tiny(tmp_path / "model", "afmoe"))
    by_map, whole = (load_model(folder, device="cpu", modules=each) for each in (modules, None))
    assert "_hf_hook" in vars(by_map.model)  # its inputs go to the embeddings' device
    assert answer(by_map, method_of("dense")).ids == answer(whole, method_of("dense")).ids
    preset = load_model("preset:tiny", device="cpu", modules=modules_of_preset())
    assert (
        answer(preset, method_of("dense")).ids
        == answer(load_model("preset:tiny", device="cpu"), method_of("dense")).ids
    )


def modules_of_preset():
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")
    return dict.fromkeys(names, "cpu")


def test_one_device_needs_no_map():
    model = stock_model("llama")
    found = place(AskedMap({"": "cpu"}, ("cpu",)), model, spec="m", element_bytes=4)
    assert (found.devices, found_devices(model)) == (("cpu",), ())
    assert put(torch.ones(1), "cpu:1").device == torch.device("cpu")  # nothing is pretended outside the mode
