"""Prompts in chat templates: tokens are those of stock ``apply_chat_template``, lengths exact, faults in a sentence."""

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import KINDS

from kvscope.errors import UsageError
from kvscope.harness.engine.chat import ChatTokenizer, chat_tokenizer
from kvscope.tasks.registry import create_task

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endfor %}"
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}" + CHATML
THINKING = (
    CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "dated": DATED, "thinking": THINKING}


def with_template(kind: str, template: Any) -> Any:
    tokenizer = copy.deepcopy(KINDS[kind]())
    tokenizer.chat_template = template
    return tokenizer


def stock_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    made = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, **options)
    return list(made["input_ids"])


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
@pytest.mark.parametrize("template", ["chatml", "inst"])
@pytest.mark.parametrize("name", ["niah_single_1", "vt", "fwe", "long_qa"])
def test_a_prompt_is_stocks_and_has_its_length(kind: str, template: str, name: str) -> None:
    tokenizer = with_template(kind, TEMPLATES[template])
    chat, task = chat_tokenizer(tokenizer, "auto"), create_task(name)
    assert chat is not None
    length_tokens = task.min_length_tokens(chat) + 100
    made = task.build(chat, length_tokens=length_tokens, sample=0, seed=3)
    assert list(made.ids) == stock_ids(tokenizer, made.text)
    assert len(made.ids) == length_tokens - task.max_new_tokens
    # Where question and evidence stand is told in the same tokens.
    question = tokenizer.decode(made.ids[made.question_start :])
    assert made.text.splitlines()[-1].split()[-1] in question
    assert made.text.splitlines()[0] not in question
    for start, end in made.evidence_spans:
        assert "".join(tokenizer.decode(made.ids[start:end]).split()) in "".join(made.text.split())


def test_white_space_that_a_template_strips_moves_no_place() -> None:
    chat = ChatTokenizer(with_template("qwen", None), INST)
    text = "  \n Where is it? \n"
    made = chat(text, return_offsets_mapping=True)
    assert made["input_ids"] == stock_ids(with_template("qwen", INST), text)
    told = [text[start:end] for start, end in made["offset_mapping"]]
    assert "".join(told) == "Where is it?"


def test_several_texts_and_no_special_tokens_are_encoded_as_ever() -> None:
    tokenizer = with_template("qwen", CHATML)
    chat = ChatTokenizer(tokenizer, CHATML)
    assert chat(["a", "b"])["input_ids"] == [stock_ids(tokenizer, "a"), stock_ids(tokenizer, "b")]
    plain = chat("a b", add_special_tokens=False)["input_ids"]
    assert plain == tokenizer("a b", add_special_tokens=False)["input_ids"]


def test_prompts_are_the_same_on_another_day_and_leave_no_room_for_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatTokenizer(with_template("qwen", None), DATED)
    assert "Today is 26 Jul 2024." in chat.decode(chat("Hello.")["input_ids"])
    tokenizer = with_template("qwen", THINKING)
    chat = ChatTokenizer(tokenizer, THINKING)
    assert chat("Hello.")["input_ids"] == stock_ids(tokenizer, "Hello.", enable_thinking=False)
    assert chat("Hello.")["input_ids"] != stock_ids(tokenizer, "Hello.")


def test_which_template_is_taken(tmp_path: Path) -> None:
    bare = with_template("qwen", None)
    assert chat_tokenizer(bare, "auto") is None
    assert chat_tokenizer(None, "auto") is None  # a preset
    assert chat_tokenizer(with_template("qwen", CHATML), "none") is None
    (tmp_path / "chat.jinja").write_text(INST)
    from_file = chat_tokenizer(with_template("qwen", CHATML), str(tmp_path / "chat.jinja"))
    own = chat_tokenizer(with_template("qwen", INST), "auto")
    named = chat_tokenizer(with_template("qwen", {"default": INST, "tool_use": CHATML}), "auto")
    assert None not in (from_file, own, named)
    assert {each.sha256 for each in (from_file, own, named) if each} == {ChatTokenizer(bare, INST).sha256}
    assert ChatTokenizer(bare, CHATML).sha256 != ChatTokenizer(bare, INST).sha256


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in %}", "cannot be used"),
        ("{{ messages[7]['content'] }}", "cannot be used"),
        ("{{ raise_exception('System role is needed') }}", "System role is needed"),
        ("{{ 'Hello.' }}", "does not hold the text of a user as it is"),
        ("{{ messages[0]['content'] | upper }}", "does not hold the text of a user as it is"),
        (5, "is 5, and no text"),
        ({"tool_use": CHATML, "rag": CHATML}, "several chat templates and no default"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(template: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        chat_tokenizer(with_template("qwen", template), "auto")
    assert "--chat-template" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no template")
    with pytest.raises(UsageError, match=r"^The chat template in .*notes\.txt does not hold the text of a user"):
        chat_tokenizer(with_template("qwen", CHATML), str(tmp_path / "notes.txt"))


def test_a_template_that_changes_some_texts_is_refused_at_those() -> None:
    changing = CHATML.replace("m['content']", "m['content'].replace('&', 'and')")
    chat = ChatTokenizer(with_template("qwen", None), changing)
    assert chat("salt and pepper")["input_ids"]
    with pytest.raises(UsageError, match="does not hold the text of a user"):
        chat("salt & pepper")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    tokenizer = with_template("qwen", CHATML)

    class Slow:
        is_fast, name_or_path, chat_template = False, "slow", CHATML
        get_chat_template = tokenizer.get_chat_template

    with pytest.raises(UsageError, match="--chat-template none"):
        chat_tokenizer(Slow(), "auto")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), (b"\xff\xfe", "not UTF-8"), ("folder", "regular")]
)
def test_a_bad_file_is_one_sentence(content: bytes | str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        chat_tokenizer(with_template("qwen", None), str(path))


def test_a_preset_takes_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="A preset has no tokenizer"):
        chat_tokenizer(None, str(tmp_path / "chat.jinja"))
