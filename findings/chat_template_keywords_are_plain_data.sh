#!/usr/bin/env bash
# apply_chat_template hands its keyword arguments to the template as plain data: a function becomes text.
#
# Versions: transformers 5.24.0 (5.23.0 does the same; with 5.17.0 functions and dates reach the template), tokenizers as
# it asks for, jinja2 3.1.6, Python 3.11. No torch is needed.
# The documentation says that keywords are accessible by the template. Functions and dates no longer are.
# Seen: a template that calls a function given by keyword raises "TypeError: 'str' object is not callable", since the
# template sees the text <function>. A datetime.date is the text <date>, without its attributes.
# This holds for strftime_now, too. The templates of Llama 3.1 and others call it for today's date, and transformers itself
# supplies it. A keyword of that name, which was to fix the date, takes the built-in's place and ends in the same error.
# Who is hit: whoever fixes the date, so that prompts and prefix caches are the same tomorrow. A macro that is written in
# front of the template works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
seen_with() {
  rm -rf "$folder/venv"
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$1" "jinja2==3.1.6" "numpy<3"
  "$folder/venv/bin/python" "$folder/probe.py" 2> "$folder/stderr" || { tail -5 "$folder/stderr"; exit 1; }
}
cat > "$folder/probe.py" <<'PYTHON'
from datetime import date

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def rendered(template, **keywords):
    chat = [{"role": "user", "content": "Hi."}]
    try:
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **keywords)
        return "a function" if text.startswith("<function <lambda>") else text
    except TypeError as error:
        return f"TypeError: {error}"


seen = {
    "a function, called": rendered("{{ day() }}", day=lambda: "Monday"),
    "a function, written": rendered("{{ day }}", day=lambda: "Monday"),
    "a date": rendered("{{ day }}", day=date(2024, 7, 26)),
    "the built-in strftime_now": rendered("{{ strftime_now('%%') }}"),
    "strftime_now by keyword": rendered("{{ strftime_now('%d') }}", strftime_now=lambda form: "26"),
    "a macro in front": rendered("{% macro strftime_now(form) %}26{% endmacro %}{{ strftime_now('%d') }}"),
}
import transformers

for what, text in seen.items():
    print(f"{transformers.__version__}: {what}: {text}")
plain = transformers.__version__ != "5.17.0"
not_callable = "TypeError: 'str' object is not callable"
assert list(seen.values()) == [
    not_callable if plain else "Monday",
    "<function>" if plain else "a function",
    "<date>" if plain else "2024-07-26",
    "%",
    not_callable if plain else "26",
    "26",
], "it has changed"
PYTHON
seen_with 5.17.0
seen_with 5.24.0
