"""Budgets as shares of dense's bytes: the nearest that pages allow, the same bytes when opened, and what is refused."""

import pytest
from sequences import assert_predicted, prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import form_on
from kvscope.methods.at_share import DECODED_TOKENS, AtShare
from kvscope.methods.registry import check_one_class_a_name, create_method
from kvscope.methods.shape import ModelShape

SHAPE = ModelShape(
    layers=(0, 2, 3), n_layers=4, n_q_heads=4, n_kv_heads=2, head_dim=32, hidden_size=128, element_bytes=2,
    page_tokens=16, sliding_layers=(1,), sliding_window=64,
)  # fmt: skip
N_TOKENS = 4000
HELD = (
    "recency", "random:chunk_tokens=16", "sliding_window", "snapkv", "pyramidkv", "adakv", "expected_attention",
    "knorm", "tova", "h2o", "snapkv:kv=int4", "lsa:selection=synthetic,chunk_tokens=16", "recency:kv=fp8",
)  # fmt: skip
READ = ("quest", "moba:block_tokens=32", "dsa:selection=synthetic")


def asked(spec: str, option: str, share: float) -> AtShare:
    method = create_method(f"{spec}{',' if ':' in spec else ':'}{option}={share}")
    assert isinstance(method, AtShare)
    method.require(SHAPE)
    return method


def dense_at(n_tokens: int, shape: ModelShape = SHAPE) -> tuple[int, int]:
    """Bytes held and read of dense, when shares are counted."""
    found = create_method("dense").predict(shape, n_tokens, DECODED_TOKENS)
    return found.device_bytes, found.bytes_read_per_step


@pytest.mark.parametrize("share", [0.12, 0.3])
@pytest.mark.parametrize("spec", HELD)
def test_bytes_held_are_the_nearest_to_the_share(spec: str, share: float) -> None:
    method, (held, _) = asked(spec, "share", share), dense_at(N_TOKENS)
    found = method.predict(SHAPE, N_TOKENS, DECODED_TOKENS).device_bytes
    one_page = 3 * 16 * SHAPE.layer_bytes_per_token  # of every layer; heads of their own have pages of their own
    assert abs(found - share * held) <= one_page / 2 + 0.002 * held
    config = method.effective_config(N_TOKENS, SHAPE)
    assert config["share"] == share
    assert not method.is_noop(N_TOKENS, SHAPE)


@pytest.mark.parametrize("share", [0.6, 0.8])
@pytest.mark.parametrize("spec", READ)
def test_bytes_read_are_the_nearest_to_the_share(spec: str, share: float) -> None:
    method, (_, read) = asked(spec, "read_share", share), dense_at(N_TOKENS)
    found = method.predict(SHAPE, N_TOKENS, DECODED_TOKENS)
    one_block = 3 * 2 * 64 * 2 * 32 * 2  # moba: both query heads of a group choose
    assert abs(found.bytes_read_per_step - share * read) <= one_block
    assert found.kv_bytes == create_method("dense").predict(SHAPE, N_TOKENS, DECODED_TOKENS).kv_bytes


def test_budgets_fill_the_pages_that_they_take() -> None:
    tokens = asked("snapkv", "share", 0.25).effective_config(N_TOKENS, SHAPE)["budget_tokens"]
    assert (tokens + DECODED_TOKENS) % SHAPE.page_tokens == 0


def test_the_whole_share_keeps_everything() -> None:
    assert asked("snapkv", "share", 1).is_noop(N_TOKENS, SHAPE)
    assert asked("recency", "share", 1).is_noop(N_TOKENS, SHAPE)


def test_a_share_below_the_least_budget_is_the_least() -> None:
    method = asked("snapkv", "share", 0.001)
    assert 32 <= method.effective_config(N_TOKENS, SHAPE)["budget_tokens"] <= 32 + SHAPE.page_tokens


def test_a_prompt_too_short_for_any_budget_is_refused_or_kept_whole() -> None:
    assert asked("snapkv", "share", 0.5).is_noop(20, SHAPE)


@pytest.mark.parametrize("n_tokens", [0, 1, 17, 31])
@pytest.mark.parametrize("spec", ["quest", "quest:block_tokens=100", "moba:block_tokens=32"])
def test_a_prompt_shorter_than_the_least_budget_is_read_whole(spec: str, n_tokens: int) -> None:
    method = asked(spec, "read_share", 0.05)
    dense = create_method("dense").predict(SHAPE, n_tokens, 1)
    assert method.predict(SHAPE, n_tokens, 1).kv_bytes == dense.kv_bytes
    assert method.is_noop(n_tokens, SHAPE)


def test_shares_of_a_prompt_of_one_token() -> None:
    methods = [*(asked(spec, "share", 0.1) for spec in HELD), *(asked(spec, "read_share", 0.1) for spec in READ)]
    for n_tokens in (0, 1):  # the last token is the question: a prompt of one token leaves none
        assert all(method.predict(SHAPE, n_tokens, 1).device_bytes for method in methods)


def test_labels_settings_and_classes() -> None:
    method = create_method("snapkv:kv=int4,share=0.25,window_tokens=16")
    assert method.label == "snapkv:window_tokens=16,share=0.25,kv=int4"
    assert create_method(method.label).label == method.label
    assert method.describe()["options"]["share"] == 0.25
    assert (method.name, method.saving_kind, method.kv_values()) == ("snapkv", "freed", {"kv": "int4"})
    check_one_class_a_name([method, create_method("snapkv")])
    papers = create_method("snapkv:share=0.25", paper_settings=True)
    assert papers.effective_config(N_TOKENS, SHAPE) == asked("snapkv", "share", 0.25).effective_config(N_TOKENS, SHAPE)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("dense:share=0.1", "Its options are: kv"),
        ("quest:share=0.1", "ask for read_share"),
        ("snapkv:read_share=0.1", "ask for share"),
        ("snapkv:share=0", "above 0 and at most 1"),
        ("snapkv:share=1.5", "above 0 and at most 1"),
        ("snapkv:share=0.1,budget_tokens=64", "give one of them"),
        ("random:share=0.1,budget_bytes=1MiB", "give one of them"),
        ("recency:share=0.1,recency_tokens=64", "a budget sets recency_tokens"),
        ("lsa:share=0.1,mode=threshold", "share=0.1 sets budget_tokens: a budget belongs to mode=budget"),
        ("lsa:share=0.1,indexer=hindsight", "decodes twice"),
        ("moba:read_share=0.1", "give block_tokens"),
        ("lsa:share=0.1,read_share=0.1", "not both"),
        ("snapkv:share=some", "expects a number"),
    ],
)
def test_what_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_method(spec)


SPECS = ("recency:share=0.4", "snapkv:share=0.4", "adakv:share=0.4", "h2o:share=0.4", "quest:read_share=0.5",
         "snapkv:share=0.4,kv=int8", "lsa:selection=synthetic,chunk_tokens=16,share=0.4")  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_opened_is_what_was_predicted(spec: str) -> None:
    loaded = loaded_model("llama")
    prompt = prefilled(loaded, prompt_ids(310), [spec])
    method = form_on(loaded.backend, create_method(spec), loaded.shape)
    with Single(loaded, method, prompt, reserve_tokens=DECODED_TOKENS) as session:
        for token in range(DECODED_TOKENS):
            session.step(token)
        assert_predicted(session.sequence.footprint(), method, method.predict(loaded.shape, 310, DECODED_TOKENS))
