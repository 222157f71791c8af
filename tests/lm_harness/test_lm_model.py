"""lm-eval's model kvscope: dense is stock HFLM, methods act, and what cannot be is refused before the first answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import save_tiny_model
from tiny_models import save_model

from kvscope.errors import UsageError
from kvscope.harness.lm_harness import answering as module
from kvscope.harness.lm_harness import register_lm_eval
from kvscope.harness.lm_harness.model import KvscopeLM
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan

FAMILIES = ["llama", "gemma3", "gpt_oss"]
SENTENCE = (
    "The quick red fox jumps over one lazy dog and then it sleeps again near our old house "
    "until some friend of it comes by"
)
WORDS = SENTENCE.split()


def text(start: int, n_words: int) -> str:
    return " ".join(WORDS[(start + 3 * at) % len(WORDS)] for at in range(n_words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(made)
    return str(made)


def ask(context: str, **settings: Any) -> Instance:
    return Instance(request_type="generate_until", doc={}, arguments=(context, settings), idx=0)


def scored(context: str, continuation: str) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


def both(folder: str, **more: Any) -> tuple[KvscopeLM, HFLM]:
    kvscope_lm = KvscopeLM(folder, device="cpu", dtype="float32", self_check=False, **more)
    return kvscope_lm, HFLM(folder, device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[KvscopeLM, HFLM]:
    return both(save_model(tmp_path_factory.mktemp("models") / request.param, request.param))


def test_dense_generates_what_stock_does(pair: tuple[KvscopeLM, HFLM]) -> None:
    kvscope_lm, stock = pair
    first = stock.generate_until([ask(text(1, 30), max_gen_toks=12, until=[])], disable_tqdm=True)[0]
    asks = [
        ask(text(1, 30), max_gen_toks=12, until=[]),
        ask(text(1, 30), max_gen_toks=12, until=[first[4:7]]),  # a stop string in the midst of an answer
        ask(text(1, 30), max_gen_toks=12, until=[first[:1]]),  # and one that is its first character
        ask(text(2, 70), max_new_tokens=7, until="\n"),
        ask(text(3, 1), max_gen_toks=5, do_sample=False, temperature=0.0),
    ]
    assert kvscope_lm.generate_until(asks, disable_tqdm=True) == [
        stock.generate_until([each], disable_tqdm=True)[0] for each in asks
    ]


def test_dense_scores_what_stock_does(pair: tuple[KvscopeLM, HFLM]) -> None:
    kvscope_lm, stock = pair
    context = text(4, 40)
    asked = [
        *(scored(context, f" {word}") for word in ("fox", "dog", "house", "the dog sleeps")),  # a choice
        scored("", "The fox sleeps"),  # a prefix token is its context
        scored(text(5, 9) + "  ", "near our house"),  # white space goes with the continuation
        scored(context, " " + text(6, 11)),
    ]
    ours, theirs = (each.loglikelihood(asked, disable_tqdm=True) for each in (kvscope_lm, stock))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-5 * 11)


def test_the_likeliest_continuation_is_told(folder: str) -> None:
    kvscope_lm, stock = both(folder)
    context = text(7, 20)
    likeliest = kvscope_lm.generate_until([ask(context, max_gen_toks=3, until=[])], disable_tqdm=True)[0]
    asked = [scored(context, likeliest), scored(context, " house")]
    found = kvscope_lm.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in stock.loglikelihood(asked, disable_tqdm=True)]
    assert found[0][1]


def test_a_method_acts_on_answers_and_scores(folder: str) -> None:
    """Its continuations are those of the method fed token by token, not of a dense forward."""
    from kvscope.harness.engine.decode import answer_nll, decode
    from kvscope.harness.engine.prefill import prefill
    from kvscope.methods.registry import create_method

    kvscope_lm = KvscopeLM(folder, device="cpu", method="sliding_window:window=16", self_check=False)
    loaded, method = kvscope_lm.loaded, create_method("sliding_window:window=16")
    context = text(8, 400)
    ids = kvscope_lm.tok_encode(context)
    prompt = prefill(loaded, ids[:-1])
    answer = decode(loaded, method, prompt, ids[-1:], max_new_tokens=6, stop_at_eos=False)
    assert kvscope_lm.generate_until([ask(context, max_gen_toks=6, until=[])], disable_tqdm=True) == [answer.text]
    continuation_ids = kvscope_lm.tok_encode(" the lazy dog", add_special_tokens=False)
    [(found, _)] = kvscope_lm.loglikelihood([scored(context, " the lazy dog")], disable_tqdm=True)
    nll = answer_nll(loaded, method, prompt, ids[-1:], continuation_ids)
    assert found == pytest.approx(-nll * len(continuation_ids), abs=1e-4)
    info = kvscope_lm.get_model_info()["kvscope"]
    assert (info["method"], info["method_label"], info["sequences"]) == ("sliding_window", method.label, 2)
    assert 0 < info["share_of_dense"] < 1
    assert info["resident_kv_bytes"] < info["dense_kv_bytes"]
    dense = KvscopeLM(folder, device="cpu", self_check=False)
    dense.generate_until([ask(context, max_gen_toks=6, until=[])], disable_tqdm=True)
    assert dense.get_model_info()["kvscope"]["share_of_dense"] == 1.0
    assert json.loads(json.dumps(info)) == info
    assert f"{info['share_of_dense']:.1%} of dense" in kvscope_lm.summary


def test_batches_do_not_change_answers(folder: str) -> None:
    asks = [ask(text(at, 20 + 7 * at), max_gen_toks=3 + at % 4, until=[]) for at in range(7)]
    asked = [scored(text(at % 3, 20), " " + text(at, 1 + at % 4)) for at in range(9)]
    one, three = (KvscopeLM(folder, device="cpu", batch_size=n, self_check=False) for n in (1, "3"))
    assert one.generate_until(asks, disable_tqdm=True) == three.generate_until(asks, disable_tqdm=True)
    alone, together = (each.loglikelihood(asked, disable_tqdm=True) for each in (one, three))
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert one.get_model_info()["kvscope"]["batch"] == 1
    assert three.get_model_info()["kvscope"]["batch"] == 3


def test_on_a_gpu_every_step_of_answers_and_scores_has_as_many_rows(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no batch changes them."""
    monkeypatch.setattr(module, "step_rows", lambda loaded: 8)
    asks = [ask(text(at, 20), max_gen_toks=3, until=[]) for at in range(5)]
    asked = [scored(text(at % 3, 20), " " + text(at, 1 + at % 4)) for at in range(9)]
    found = []
    for n in (1, 4):
        lm, sizes = KvscopeLM(folder, device="cpu", batch_size=n, self_check=False), set[int]()

        def note(module: Any, args: Any, kwargs: Any, sizes: set[int] = sizes) -> None:
            n_rows, n_tokens = kwargs["input_ids"].shape
            sizes.add(n_rows if n_tokens == 1 else 0)

        lm.loaded.model.register_forward_pre_hook(note, with_kwargs=True)
        found.append((lm.generate_until(asks, disable_tqdm=True), lm.loglikelihood(asked, disable_tqdm=True)))
        assert sizes - {0} == {8}
        assert lm.get_model_info()["kvscope"]["batch"] == n
    assert found[0] == found[1]


def test_memory_that_ends_halves_the_batch(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [ask(text(at, 20), max_gen_toks=4, until=[]) for at in range(6)]
    asked = [scored(text(at, 20), " " + text(at, 3)) for at in range(6)]
    whole = KvscopeLM(folder, device="cpu", batch_size=8, self_check=False)
    answers = whole.generate_until(asks, disable_tqdm=True)
    scores = whole.loglikelihood(asked, disable_tqdm=True)
    for name in ("BatchDecode", "Session"):
        real = getattr(module, name)
        add = real.add

        def full(self: Any, *args: Any, add: Any = add, **kwargs: Any) -> Any:
            rows = self.n_rows if hasattr(self, "n_rows") else len(self.members)
            if rows >= 2:
                raise torch.OutOfMemoryError("out of memory")
            return add(self, *args, **kwargs)

        monkeypatch.setattr(real, "add", full)
        short = KvscopeLM(folder, device="cpu", batch_size=8, self_check=False)
        if name == "BatchDecode":
            assert short.generate_until(asks, disable_tqdm=True) == answers
        else:
            found = short.loglikelihood(asked, disable_tqdm=True)
            assert [value for value, _ in found] == pytest.approx([value for value, _ in scores], abs=1e-4)
        assert short.get_model_info()["kvscope"]["batch"] == 2
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([ask("The fox", do_sample=True, temperature=0.7)], "kvscope decodes greedily"),
        ([ask("The fox", num_beams=4)], "asks for num_beams=4"),
        ([ask("The fox", temperature=0.7)], "kvscope decodes greedily"),
        ([ask("The fox", max_gen_toks=4), ask("The fox", max_gen_toks=0)], "max_gen_toks is 0"),
        ([ask("The fox", max_gen_toks=-3)], "max_gen_toks is -3"),
        ([ask("The fox", until=["a", 3, ""])], "until holds 3, which is no text"),
        ([ask("The fox", max_gen_toks=4), ask(text(0, 3000), max_gen_toks=4)], "nothing is cut"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_first(
    folder: str, requests: Sequence[Instance], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvscope_lm = KvscopeLM(folder, device="cpu", self_check=False, max_length=2048)
    monkeypatch.setattr(module, "prefill", lambda *a, **k: pytest.fail("something was answered"))
    with pytest.raises(UsageError, match=said):
        kvscope_lm.generate_until(list(requests), disable_tqdm=True)


def test_scores_that_cannot_be_are_refused(folder: str) -> None:
    kvscope_lm = KvscopeLM(folder, device="cpu", self_check=False, max_length=64)
    with pytest.raises(UsageError, match="nothing is cut"):
        kvscope_lm.loglikelihood([scored(text(0, 90), " dog")], disable_tqdm=True)
    with pytest.raises(UsageError, match="perplexity of whole texts"):
        kvscope_lm.loglikelihood_rolling([scored("", "The fox")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "quset"}, "Did you mean 'quest'"),
        ({"method": "quest:budget_tokens=64", "kv_budget_tokens": 32}, "is given twice"),
        ({"method": "recency", "kv_recency": 3}, "recency"),
        ({"peft": "adapter"}, "has no argument 'peft'"),
        ({"batch_size": "many"}, "expected auto or a number"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"self_check": "no"}, "self_check is 'no', expected True or False"),
        ({"tokenizer": "another"}, "tokenizer is 'another', and kvscope takes that of the model"),
        ({"pretrained": object()}, "kvscope loads models itself"),
        ({"max_length": 10**6}, "expected 2 to 4,096 tokens"),
    ],
)
def test_bad_arguments_are_one_sentence(folder: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        KvscopeLM(**{"pretrained": folder, "device": "cpu", "self_check": False, **arguments})


@pytest.mark.parametrize(
    ("model", "said"), [("preset:llama-3.1-8b", "no tokenizer"), ("http://localhost:8000/v1", "is a server")]
)
def test_what_has_no_text_or_no_cache_here_is_refused_before_it_loads(
    model: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvscope.harness.lm_harness.model.load_model", lambda *a, **k: pytest.fail("something was loaded")
    )
    with pytest.raises(UsageError, match=said):
        KvscopeLM(model, device="cpu")


def test_a_method_of_a_stranger_is_asked_before_the_first_prompt(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_for_lm_eval.py").write_text(
        "from kvscope.methods.recency.method import Recency\n\n\n"
        "class Own(Recency):\n    name = 'own'\n\n"
        "    def predict(self, *arguments):\n        raise KeyError('nope')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"Method 'own' cannot be used: its predict raised KeyError: 'nope' .strange_"):
        KvscopeLM(folder, device="cpu", method="strange_for_lm_eval:Own", self_check=False)


def test_options_of_a_method_come_as_text_mapping_or_one_by_one(folder: str) -> None:
    ways: list[dict[str, Any]] = [
        {"method": "recency:recency_tokens=128"},
        {"method": {"name": "recency", "recency_tokens": 128}},
        {"method": "recency", "kv_recency_tokens": "128"},
    ]
    labels = {KvscopeLM(folder, device="cpu", self_check=False, **way).method.label for way in ways}
    assert labels == {"recency:recency_tokens=128"}


def test_settings_of_the_model_that_stock_applies_are_named(folder: str, tmp_path: Path) -> None:
    made = tmp_path / "repeats"
    save_tiny_model(made)
    path = made / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.3}))
    kvscope_lm = KvscopeLM(str(made), device="cpu", self_check=False)
    assert kvscope_lm.get_model_info()["kvscope"]["not_applied"] == ["repetition_penalty=1.3"]
    assert KvscopeLM(folder, device="cpu", self_check=False).get_model_info()["kvscope"]["not_applied"] == []
    config = {"model": str(made), "methods": ["dense"], "lengths_tokens": [512], "tasks": ["niah_single_1"]}
    said = [text for text in make_plan(make_config({**config, "device": "cpu"})).warnings if "repetition" in text]
    assert len(said) == 1
    assert "leave out the model's own repetition_penalty=1.3" in said[0]


def test_a_method_that_decodes_twice_claims_no_bytes(folder: str) -> None:
    twice = KvscopeLM(folder, method="lsa:indexer=hindsight,budget_tokens=64", device="cpu", self_check=False)
    assert twice.summary == ""
    twice.generate_until([ask(text(1, 40), max_gen_toks=4, until=[])], disable_tqdm=True)
    info = twice.get_model_info()["kvscope"]
    assert info["sequences"] == 1
    assert not [key for key in info if key.endswith("bytes") or key in ("share_of_dense", "tpot_s")]
    assert "decodes twice" in twice.summary
    assert " B of KV" not in twice.summary


def test_lm_eval_finds_the_model_by_name(folder: str) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from kvscope.tasks.lm_harness import FOLDER

    register_lm_eval()
    register_lm_eval()
    metadata = {"length_tokens": 512, "samples": 3, "seed": 1, "pretrained": folder}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    found = lm_eval.simple_evaluate(
        model="kvscope",
        model_args={"pretrained": folder, "method": "recency", "kv_recency_tokens": 64, "device": "cpu"},
        tasks=["kvscope_niah_single_1"],
        task_manager=manager,
        gen_kwargs="max_gen_toks=4",
        bootstrap_iters=0,
    )
    assert found["config"]["kvscope"]["method_label"] == "recency:recency_tokens=64"
    assert found["config"]["kvscope"]["sequences"] == 3
    assert found["results"]["kvscope_niah_single_1"]["recall,none"] == 0.0


def test_the_largest_batch_of_auto_is_what_is_asked_for(folder: str) -> None:
    two = KvscopeLM(folder, device="cpu", batch_size="auto:4", max_batch_size=2, self_check=False)
    two.generate_until([ask(text(at, 20), max_gen_toks=4, until=[]) for at in range(5)], disable_tqdm=True)
    assert two.get_model_info()["kvscope"]["batch"] == 2


def test_an_empty_prompt_needs_a_first_token(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kvscope_lm = KvscopeLM(folder, device="cpu", self_check=False)
    assert isinstance(kvscope_lm.generate_until([ask("", max_gen_toks=2, until=[])], disable_tqdm=True)[0], str)
    kvscope_lm.add_bos_token = False
    with pytest.raises(UsageError, match="a prompt is empty"):
        kvscope_lm.generate_until([ask("", max_gen_toks=2, until=[])], disable_tqdm=True)


def test_kept_answers_are_of_one_model_and_method(folder: str, tmp_path: Path) -> None:
    """lm-eval keeps answers by the prompt alone: those of another method would be taken for this one's."""
    from lm_eval.api.model import CachingLM

    place = str(tmp_path / "kept.db")
    recency = {"method": "recency:recency_tokens=16", "device": "cpu", "self_check": False}
    asks = [ask(text(at, 60), max_gen_toks=4, until=[]) for at in range(2)]
    first = KvscopeLM(folder, **recency)
    answers = CachingLM(first, place).generate_until(asks)
    again = KvscopeLM(folder, **recency)
    assert CachingLM(again, place).generate_until(asks) == answers
    assert again.summary == "", "nothing was left to answer"
    for other in ({"method": "dense"}, {"dtype": "float16"}, {"add_bos_token": False}):
        with pytest.raises(UsageError, match=r"keeps answers of .*tiny, .*recency_tokens=16, which would be taken"):
            CachingLM(KvscopeLM(folder, **{**recency, **other}), place)
    from sqlitedict import SqliteDict

    with SqliteDict(str(tmp_path / "stock.db"), autocommit=True) as kept:
        kept["a hash"] = "an answer"
    with pytest.raises(UsageError, match="keeps answers of another model"):
        CachingLM(KvscopeLM(folder, **recency), str(tmp_path / "stock.db"))


def test_arguments_name_the_tokenizer_for_tasks_that_read_it(folder: str) -> None:
    """RULER's tasks build their prompts with it, and know no name such as ``reference``."""
    from transformers import AutoTokenizer

    for name in (folder, "reference"):
        arguments = {"pretrained": name, "device": "cpu", "self_check": False}
        KvscopeLM.create_from_arg_obj(arguments, {"batch_size": 1, "max_batch_size": None})
        assert AutoTokenizer.from_pretrained(arguments["tokenizer"]).vocab_size
        KvscopeLM.create_from_arg_obj(arguments)
        KvscopeLM(**{**arguments, "tokenizer": f"{arguments['tokenizer']}/../{Path(arguments['tokenizer']).name}/"})
