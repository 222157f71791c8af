#!/usr/bin/env bash
# Memory and speed of the presets on one GPU of 80 GB, in steps of under four minutes each.
#
#     benchmarks/footprint_h100.sh OUT            every step in order; what is done already is skipped
#     benchmarks/footprint_h100.sh OUT STEP ...   these steps
#
# Each step is one `kvscope run` into OUT/STEP and resumes: a step that ends with "time limit" or a timeout goes on when
# it is called again. OUT/STEP.log has what it printed, OUT/STEP/report the tables and figures.
set -uo pipefail
out=${1:?usage: benchmarks/footprint_h100.sh OUT [STEP ...]}
shift
mkdir -p "$out"
python=${PYTHON:-python}
lsa=lsa:selection=synthetic,budget_tokens=16384
common=(--set footprint_timeout_s=200 --time-limit 110)

kv() { # STEP ARGUMENTS...: one bounded kvscope run
    local step=$1 started=$SECONDS code
    shift
    timeout 235 "$python" -m kvscope.cli run "$@" "${common[@]}" --out "$out/$step" > "$out/$step.log" 2>&1
    code=$?
    case $code in
        0) echo "$step: done in $((SECONDS - started)) s" ;;
        124) echo "$step: stopped after 235 s, call it again to go on" ;;
        *) echo "$step: exit $code after $((SECONDS - started)) s: $(grep -v '^ *$' "$out/$step.log" | tail -1)" ;;
    esac
}

gpu-tests() { # what only a GPU can show of the parts below
    timeout 235 "$python" -m pytest -q -rs tests/sweep/test_gpu.py > "$out/gpu-tests.log" 2>&1
    echo "gpu-tests: exit $?: $(tail -1 "$out/gpu-tests.log")"
}
oom-512k() { # exit 1 expected: dense is an oom row with bytes, lsa finishes
    kv oom-512k --model preset:llama-3.1-8b -m dense -m $lsa --kv synthetic --length 512k --set footprint_decode_tokens=65
}
prefill-32k-128k() { # real prefill of dense and lsa
    kv prefill-32k-128k --model preset:llama-3.1-8b -m dense -m $lsa --length 32k --length 128k \
        --set footprint_decode_tokens=129
}
synthetic-128k() { # every kind of method; dense_kv is 16 GiB
    kv synthetic-128k --model preset:llama-3.1-8b -m dense -m sliding_window -m recency -m random -m quest -m moba \
        -m $lsa --kv synthetic --length 128k --set footprint_decode_tokens=65
}
synthetic-256k() {
    kv synthetic-256k --model preset:llama-3.1-8b -m dense -m recency -m quest -m $lsa --kv synthetic --length 256k \
        --set footprint_decode_tokens=65
}
llama-2-7b() { # no GQA: 512 KiB a token, 32 GiB at 64K
    kv llama-2-7b --model preset:llama-2-7b -m dense -m recency -m $lsa --kv synthetic --length 32k --length 64k \
        --set footprint_decode_tokens=65
}
longest-24gib() { # lsa at least 6x dense; the host mirror of 512K is 72 GiB
    kv longest-24gib --model preset:qwen3-8b -m dense -m $lsa --find-max --gpu-budget 24GiB \
        --set find_max_limit_tokens=512k --set footprint_decode_tokens=17
}
longest-card() { # the card's own figure for dense, and what bounds it
    kv longest-card --model preset:llama-3.1-8b -m dense --find-max --set footprint_decode_tokens=17
}
throughput-128k() { # largest batch, tokens a second
    kv throughput-128k --model preset:llama-3.1-8b -m dense -m recency -m $lsa --throughput --length 128k \
        --set footprint_decode_tokens=65
}
throughput-256k() {
    kv throughput-256k --model preset:llama-3.1-8b -m dense -m recency -m $lsa --throughput --length 256k \
        --set footprint_decode_tokens=65
}

steps=(gpu-tests oom-512k prefill-32k-128k synthetic-128k synthetic-256k llama-2-7b longest-24gib longest-card
    throughput-128k throughput-256k)
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${steps[@]}")
for step in "${chosen[@]}"; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "no step '$step': ${steps[*]}" >&2; exit 2; }
    "$step"
done
