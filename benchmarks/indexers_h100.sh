#!/usr/bin/env bash
# The indexers of lsa for the reference model, as those in methods/lsa/indexers were made: collect, train for tau 64,
# train further for tau 4, calibrate for chunks of 16, 64 and 256, evaluate; and that of dsa (step dsa).
#
#     benchmarks/indexers_h100.sh DATA OUT            every step in order; what is done already is skipped
#     benchmarks/indexers_h100.sh DATA OUT STEP ...   of these steps: collect train further calibrate eval dsa
#     GPUS="0 1" benchmarks/indexers_h100.sh DATA OUT        collections and evaluations spread over two GPUs
#     SMOKE=1 benchmarks/indexers_h100.sh DATA OUT           everything tiny on a CPU: does it run, not is it good
#
# DATA takes shards (tens of GB), OUT indexers, logs and tables (small). Every process has a limit, from COLLECT_S,
# TRAIN_S, FURTHER_S, CALIBRATE_S or EVAL_S, in seconds. A collection that reaches its own is used as far as it got; of
# a training the last checkpoint is. Both are said; delete NAME.done or the training's folder (and those behind it) to do
# it again. Whatever ends the script from outside, the same command goes on.
set -uo pipefail
usage="usage: benchmarks/indexers_h100.sh DATA OUT [collect] [train] [further] [calibrate] [eval] [dsa]"
data=${1:?$usage}
out=${2:?$usage}
shift 2
python=${PYTHON:-python}
kvscope=("$python" -m kvscope.cli)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
smoke=${SMOKE:-0}
collect_s=${COLLECT_S:-300} train_s=${TRAIN_S:-400} further_s=${FURTHER_S:-400}
calibrate_s=${CALIBRATE_S:-300} eval_s=${EVAL_S:-500}
if [ "$smoke" = 1 ]; then gpus=(cpu) jobs=${JOBS:-1}; else read -ra gpus <<< "${GPUS:-0}"; jobs=${JOBS:-11}; fi
[ ${#gpus[@]} -gt 0 ] || { echo "GPUS names no GPU: give for example GPUS=\"0 1\"" >&2; exit 2; }
mkdir -p "$data"/{training,further,calibration,evaluation,dsa,dsa-evaluation} "$out" || exit 2

needles=(niah_multikey_2 niah_multikey_3 niah_multivalue niah_multiquery vt niah_single_1)
hops=long_qa:types=hops_2+hops_3
# Layers 5 and 7 of the reference model retrieve (docs/lsa-study.md).
rule=(--voters layer --label-layers 5,7 --top-p 0.9 --least-mass 0.2)
sizes=(--layers 5,7 --heads 16 --rank 384 --encoder-width 256 --neighbours 2 --lookback 32 --negatives 8
    --batch-documents 4 --keep recall --patience 99 --seed 0)
epochs=6 further_epochs=3 held_out=0.04 further_held_out=0.1
[ "$smoke" = 1 ] && epochs=2 further_epochs=1 held_out=0.4 further_held_out=0.4

on() { # GPU COMMAND...: run it there; "cpu" is no GPU
    local gpu=$1
    shift
    [ "$gpu" = cpu ] && gpu=
    CUDA_VISIBLE_DEVICES=$gpu "$@"
}

documents() { # FOLDER: how many a collection holds
    "$python" - "$1" <<'PYTHON'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1], "manifest.json")
shards = json.loads(path.read_text())["shards"] if path.is_file() else []
print(sum(len(shard["documents"]) for shard in shards))
PYTHON
}

# -- collect: the tasks, lengths, samples and seeds of the shipped indexers; 900 are asked for where time is the limit

queue=()
want() { # NAME SEED LENGTHS SAMPLES TASK...: one collection, lengths comma-separated
    local name=$1 seed=$2 lengths=$3 samples=$4
    shift 4
    if [ "$smoke" = 1 ]; then
        lengths=1k
        samples=$((samples < 4 ? samples : 4))
        [ $# -gt 1 ] && samples=1
    fi
    queue+=("$name $seed $lengths $samples $*")
}

plan() { # fill the queue
    local seed
    local qa_16k=($(seq 1000 1009)) needles_16k=(1100 1101 1102 1110 1111 1112 1120 1121 1122 1130 1131 1132 1140 1141
        1142 1150 1151 1152)
    local short=(1000 1001 1002 1003) short_qa=(1004 1005 1006 1007) hops_4k=(1100 1101) hops_2k=(1110 1111)
    if [ "$smoke" = 1 ]; then
        qa_16k=(1000) needles_16k=(1100) short=(1000) short_qa=(1004) hops_4k=(1100) hops_2k=(1110)
    fi
    for seed in "${qa_16k[@]}"; do want training/qa16k-$seed $seed 16k 900 long_qa; done
    if [ "$smoke" != 1 ]; then
        for seed in 1050 1051; do want training/qa32k-$seed $seed 32k 900 long_qa; done
        want training/qa4k-1060 1060 4k 900 long_qa
        want training/needles32k-1052 1052 32k 8 "${needles[@]}"
        want training/needles4k-1061 1061 4k 90 "${needles[@]}"
    fi
    for seed in "${needles_16k[@]}"; do want training/needles16k-$seed $seed 16k 6 "${needles[@]}"; done
    for seed in "${short[@]}"; do
        want further/needles4k-$seed $seed 4k 5 niah_multikey_3 niah_multiquery vt niah_single_1
    done
    for seed in "${short_qa[@]}"; do want further/qa4k-$seed $seed 4k 72 long_qa; done
    for seed in "${hops_4k[@]}"; do want further/hops4k-$seed $seed 4k 160 "$hops"; done
    for seed in "${hops_2k[@]}"; do want further/hops2k-$seed $seed 2k 600 "$hops+temporal+multi_session"; done
    want calibration/qa16k 2100 16k 18 long_qa
    want calibration/needles16k 2100 16k 3 "${needles[@]}"
    local five=(niah_single_1 niah_multikey_2 niah_multikey_3 niah_multivalue niah_multiquery)
    want evaluation/qa 50 16k,32k 36 long_qa
    want evaluation/needles 50 16k,32k 10 "${five[@]}"
    if [ "$smoke" != 1 ]; then
        want evaluation/qa64k 50 64k 36 long_qa
        want evaluation/needles64k 50 64k 6 "${five[@]}"
    fi
    want dsa/qa16k 1070 16k 900 long_qa
    want dsa/needles16k 1071 16k 12 "${needles[@]}"
    want dsa/all4k 1072 4k 20 long_qa "${needles[@]}"
    want dsa-evaluation/all16k 2002 16k 4 long_qa "${needles[@]}"
}

collect_one() { # GPU NAME SEED LENGTHS SAMPLES TASK...
    local gpu=$1 name=$2 seed=$3 lengths=$4 samples=$5 code n each
    shift 5
    [ -f "$data/$name.done" ] && return
    # dsa's indexer reads every layer, and sampled tokens of each prompt.
    local arguments=(--layers 5,7)
    [[ $name == dsa* ]] && arguments=(--token-samples 1024)
    for each in ${lengths//,/ }; do arguments+=(-l "$each"); done
    for each in "$@"; do arguments+=(-t "$each"); done
    on "$gpu" timeout -k 20 "$collect_s" "${kvscope[@]}" lsa collect --model reference --chunk-tokens 16 \
        --least-mass 0.001 --states 64 "${arguments[@]}" -n "$samples" --seed "$seed" -o "$data/$name" --quiet \
        > "$data/$name.log" 2>&1
    code=$?
    n=$(documents "$data/$name")
    case $code in
        0) touch "$data/$name.done" && echo "$name: $n documents" ;;
        124 | 137)
            # Without a document another try may get further; with some it is used, and not begun again.
            [ "$n" -gt 0 ] && touch "$data/$name.done"
            echo "$name: stopped after $collect_s s with $n documents"
            ;;
        *) echo "$name: exit $code with $n documents: $(grep -v '^ *$' "$data/$name.log" | tail -1)" ;;
    esac
}

collect() {
    local workers=$((jobs * ${#gpus[@]})) worker
    queue=()
    plan
    for ((worker = 0; worker < workers; worker++)); do
        (
            for ((i = worker; i < ${#queue[@]}; i += workers)); do
                read -ra item <<< "${queue[i]}"
                collect_one "${gpus[worker % ${#gpus[@]}]}" "${item[@]}"
            done
        ) &
    done
    wait
}

sources() { # GROUP: fill `found` with --data of every collection of it that holds a document
    local folder
    found=()
    for folder in "$data/$1"/*/; do
        [ "$(documents "$folder")" -gt 0 ] && found+=(--data "${folder%/}")
    done
    [ ${#found[@]} -gt 0 ] && return
    echo "no documents in $data/$1: run the step collect first" >&2
    return 1
}

# -- train and further

trained() { # NAME: print the folder of what a training left: the indexer, or its last checkpoint
    local folder
    [ -f "$out/$1/config.json" ] && echo "$out/$1" && return
    folder=$(ls -d "$out/$1"/checkpoints/epoch-*/ 2> /dev/null | sort | tail -1)
    [ -n "$folder" ] && [ -f "$folder/config.json" ] && echo "${folder%/}" && return
    return 1
}

train_one() { # NAME LIMIT_S EPOCHS OPTIONS...: with the collections in `found`
    local name=$1 limit_s=$2 epochs=$3 code=0 left
    shift 3
    if ! left=$(trained "$name"); then
        on "${gpus[0]}" timeout -k 20 "$limit_s" "${kvscope[@]}" lsa train "${found[@]}" -o "$out/$name" "${rule[@]}" \
            "${sizes[@]}" --epochs "$epochs" "$@" > "$out/$name.log" 2>&1
        code=$?
        if ! left=$(trained "$name"); then
            [ $code = 124 ] && echo "$name: no epoch was over after $limit_s s; give it more" >&2 && return 1
            echo "$name: exit $code and no checkpoint: $(grep -v '^ *$' "$out/$name.log" | tail -1)" >&2
            return 1
        fi
    fi
    case $left in
        */checkpoints/*) echo "$name: unfinished; its last checkpoint is taken: $(basename "$left") of $epochs" \
            "(delete $out/$name to train anew)" ;;
        *) echo "$name: $(tail -1 "$out/$name.log")" ;;
    esac
}

train() {
    sources training || return 1
    train_one tau64 "$train_s" "$epochs" --tau 64 --batch-rows 1 --lr 1e-3 --held-out $held_out --target-recall 0.95
}

further() {
    local start
    sources further || return 1
    start=$(trained tau64) || { echo "nothing to train further in $out/tau64: run the step train first" >&2; return 1; }
    train_one tau4 "$further_s" "$further_epochs" --start "$start" --tau 4 --batch-rows 12 --lr 2e-4 \
        --held-out $further_held_out --target-recall 0.97
}

# -- calibrate and eval

names=(reference reference-chunk64 reference-chunk256) chunks=(16 64 256)

calibrate() {
    local start i code=0 targets
    sources calibration || return 1
    start=$(trained tau4) || { echo "nothing to calibrate in $out/tau4: run the step further first" >&2; return 1; }
    targets=("${TARGET_16:---threshold 0.58}" "${TARGET_64:---threshold 0.70}" "${TARGET_256:---threshold 0.80}")
    if [[ $start == */checkpoints/* ]]; then
        # A checkpoint's threshold was never set, so none of it means what it meant: the recalls those thresholds had.
        targets=("${TARGET_16:---target-recall 0.986}" "${TARGET_64:---target-recall 0.972}"
            "${TARGET_256:---target-recall 0.969}")
        echo "calibrate: of a checkpoint, by ${targets[*]}"
    fi
    for i in 0 1 2; do
        # Older than what it was made of: made of another one.
        if [ ! "$out/${names[i]}/config.json" -nt "$start/config.json" ]; then
            # shellcheck disable=SC2086 # a target is an option and its value
            on "${gpus[0]}" timeout -k 20 "$calibrate_s" "${kvscope[@]}" lsa calibrate --indexer "$start" "${found[@]}" \
                "${rule[@]}" --chunk-tokens "${chunks[i]}" ${targets[i]} --dtype bfloat16 -o "$out/${names[i]}" \
                > "$out/${names[i]}.log" 2>&1 || code=1
        fi
        echo "${names[i]}:"
        grep -v '^ *$' "$out/${names[i]}.log" | tail -6
    done
    return $code
}

eval_one() { # GPU NAME, with the collections in `found`
    [ "$out/$2.eval.done" -nt "$out/$2/config.json" ] && return
    [ -f "$out/$2/config.json" ] || { echo "no indexer $out/$2: run the step calibrate first" >&2; return 1; }
    on "$1" timeout -k 20 "$eval_s" "${kvscope[@]}" lsa eval "${found[@]}" --indexer "$out/$2" "${rule[@]}" \
        -o "$out/$2.eval" > "$out/$2.eval.log" 2>&1 && touch "$out/$2.eval.done"
}

evaluate() {
    local i pids=() code=0 at
    sources evaluation || return 1
    at=$([ "$smoke" = 1 ] && echo 1 || echo 3) # a CPU takes one after the other
    for i in 0 1 2; do
        eval_one "${gpus[i % ${#gpus[@]}]}" "${names[i]}" &
        pids+=($!)
        [ $(((i + 1) % at)) = 0 ] && { for pid in "${pids[@]}"; do wait "$pid" || code=1; done; pids=(); }
    done
    for i in 0 1 2; do
        echo "${names[i]}:"
        grep -E '^(policy|indexer) |^[A-Z].*Error' "$out/${names[i]}.eval.log" || tail -2 "$out/${names[i]}.eval.log"
    done
    return $code
}

dsa() {
    sources dsa || return 1
    if [ ! -f "$out/dsa/config.json" ]; then
        on "${gpus[0]}" timeout -k 20 "$train_s" "${kvscope[@]}" dsa train "${found[@]}" -o "$out/dsa" > "$out/dsa.log" 2>&1
    fi
    tail -1 "$out/dsa.log"
    [ -f "$out/dsa/config.json" ] || return 1
    sources dsa-evaluation || return 1
    on "${gpus[0]}" timeout -k 20 "$eval_s" "${kvscope[@]}" dsa eval "${found[@]}" --indexer "$out/dsa" -o "$out/dsa.eval" \
        > "$out/dsa.eval.log" 2>&1 || { tail -2 "$out/dsa.eval.log"; return 1; }
    grep -E '^(indexer|oracle|recency) +all' "$out/dsa.eval.log"
}

steps=(collect train further calibrate eval dsa)
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${steps[@]}")
for step in "${chosen[@]}"; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "no step '$step': ${steps[*]}" >&2; exit 2; }
done
for step in "${chosen[@]}"; do
    started=$SECONDS
    echo "== $step"
    run=$step
    [ "$step" = eval ] && run=evaluate
    "$run" || { echo "$step failed after $((SECONDS - started)) s" >&2; exit 1; }
    echo "== $step: $((SECONDS - started)) s"
done
