#!/usr/bin/env bash
# The indexers of lsa for the reference model, as those in methods/lsa/indexers were made: collect; train for tau 64 and
# further for tau 4, both on reference answers; train further twice on the model's own (own, own-long); calibrate for
# chunks of 16, 64 and 256; evaluate; and the indexer of dsa (step dsa).
#
#     benchmarks/indexers_h100.sh DATA OUT            every step in order; what is done already is skipped
#     benchmarks/indexers_h100.sh DATA OUT STEP ...   of: collect train further own own-long calibrate eval dsa
#     GPUS="0 1" benchmarks/indexers_h100.sh DATA OUT        collections and evaluations spread over two GPUs
#     SMOKE=1 benchmarks/indexers_h100.sh DATA OUT           everything tiny on a CPU: does it run, not is it good
#
# DATA takes shards (tens of GB), OUT indexers, logs and tables (small). Every process has a limit, from COLLECT_S,
# OWN_COLLECT_S, OWN_LONG_COLLECT_S, TRAIN_S, FURTHER_S, CALIBRATE_S or EVAL_S, in seconds. A collection that reaches its
# own is used as far as it got; of a training the last checkpoint is. Both are said; delete NAME.done or the training's
# folder (and those behind it) to do it again. Whatever ends the script from outside, the same command goes on.
#
# Collections share a GPU. Starting nvidia-cuda-mps-control before helps: without it they take turns on it.
set -uo pipefail
usage="usage: benchmarks/indexers_h100.sh DATA OUT [collect] [train] [further] [own] [own-long] [calibrate] [eval] [dsa]"
data=${1:?$usage}
out=${2:?$usage}
shift 2
python=${PYTHON:-python}
kvscope=("$python" -m kvscope.cli)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
smoke=${SMOKE:-0}
collect_s=${COLLECT_S:-300} own_collect_s=${OWN_COLLECT_S:-120} own_long_collect_s=${OWN_LONG_COLLECT_S:-165}
train_s=${TRAIN_S:-400} further_s=${FURTHER_S:-400} calibrate_s=${CALIBRATE_S:-300} eval_s=${EVAL_S:-500}
if [ "$smoke" = 1 ]; then gpus=(cpu) jobs=${JOBS:-1}; else read -ra gpus <<< "${GPUS:-0}"; jobs=${JOBS:-11}; fi
[ ${#gpus[@]} -gt 0 ] || { echo "GPUS names no GPU: give for example GPUS=\"0 1\"" >&2; exit 2; }
mkdir -p "$data"/{training,further,further-calibration,own,own-long,calibration,last-calibration,evaluation} \
    "$data"/{dsa,dsa-evaluation} "$out" || exit 2

needles=(niah_multikey_2 niah_multikey_3 niah_multivalue niah_multiquery vt niah_single_1)
several=(niah_multivalue niah_multiquery vt)
one=(niah_single_1 niah_multikey_2 niah_multikey_3)
hops=long_qa:types=hops_2+hops_3
# Layers 5 and 7 of the reference model retrieve, and own answers are trained with a smaller least mass
# (docs/lsa-study.md). These steps are from before --revive.
rule=(--voters layer --label-layers "5,7" --top-p 0.9)
sizes=(--layers "5,7" --heads 16 --rank 384 --encoder-width 256 --neighbours 2 --lookback 32 --negatives 8
    --batch-documents 4 --keep recall --patience 99 --revive 0 --seed 0)
epochs=6 further_epochs=3 own_epochs=4 held_out=0.04 further_held_out=0.1 own_held_out=0.05
[ "$smoke" = 1 ] && epochs=2 further_epochs=1 own_epochs=1 held_out=0.4 further_held_out=0.4 own_held_out=0.4

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

each() { # NAME LENGTH SAMPLES "SEED ..." TASK...: one a seed
    local name=$1 length=$2 samples=$3 seed seeds
    read -ra seeds <<< "$4"
    shift 4
    for seed in "${seeds[@]}"; do
        want "$name$length-$seed" "$seed" "$length" "$samples" "$@"
        [ "$smoke" = 1 ] && break
    done
}

plan() { # fill the queue
    local qa=long_qa five=("${one[@]}" niah_multivalue niah_multiquery)
    each training/qa 16k 900 "1000 1001 1002 1003 1004 1005 1006 1007 1008 1009" $qa
    if [ "$smoke" != 1 ]; then
        each training/qa 32k 900 "1050 1051" $qa
        each training/qa 4k 900 1060 $qa
        each training/needles 32k 8 1052 "${needles[@]}"
        each training/needles 4k 90 1061 "${needles[@]}"
    fi
    each training/needles 16k 6 "1100 1101 1102 1110 1111 1112 1120 1121 1122" "${needles[@]}"
    [ "$smoke" = 1 ] || each training/needles 16k 6 "1130 1131 1132 1140 1141 1142 1150 1151 1152" "${needles[@]}"

    each further/needles 4k 5 "1000 1001 1002 1003" niah_multikey_3 niah_multiquery vt niah_single_1
    each further/qa 4k 72 "1004 1005 1006 1007" $qa
    each further/hops 4k 160 "1100 1101" "$hops"
    each further/hops 2k 600 "1110 1111" "$hops+temporal+multi_session"
    each further-calibration/qa 16k 18 2100 $qa
    each further-calibration/needles 16k 3 2100 "${needles[@]}"

    each own/qa 16k 900 "1250 1251 1252" $qa
    each own/hops 16k 900 "1260 1261 1262" "$hops+multi_session"
    each own/needles 16k 16 "1300 1301 1310 1311 1320 1321 1330 1331" "${several[@]}" niah_multikey_3
    if [ "$smoke" != 1 ]; then
        each own/qa 32k 900 1270 $qa
        each own/needles 32k 8 "1340 1341 1342" "${several[@]}"
        each own/needles 4k 20 1272 "${several[@]}" niah_multikey_2 niah_single_1 niah_multikey_3
    fi

    each own-long/qa 16k 2000 "1450 1451 1452" $qa
    each own-long/hops 16k 2000 "1460 1461" "$hops+multi_session"
    each own-long/needles 16k 16 "1420 1421 1422 1423" "${one[@]}" niah_multivalue
    if [ "$smoke" != 1 ]; then
        each own-long/several 16k 16 "1400 1401 1402 1410 1411 1412" "${several[@]}"
        each own-long/qa 32k 900 1470 $qa
        each own-long/qa 64k 900 1471 $qa
        each own-long/several 32k 8 "1430 1431 1432 1433" "${several[@]}"
        each own-long/several 64k 3 "1440 1441 1442 1443 1444" "${several[@]}"
        each own-long/several 128k 2 "1450 1451 1452 1453 1454" "${several[@]}"
        each own-long/all 4k 18 1473 $qa "${several[@]}" "${one[@]}"
    fi

    want calibration/all 2400 16k,32k 6 $qa "${several[@]}" "${one[@]}"
    [ "$smoke" = 1 ] || want calibration/all-long 2401 64k,128k 2 $qa "${several[@]}" "${one[@]}"
    each last-calibration/all 16k 2 "2500 2501" $qa "${one[@]}" "${several[@]}"

    each evaluation/qa 16k 18 "50 51" $qa
    each evaluation/needles 16k 10 50 "${five[@]}"
    if [ "$smoke" != 1 ]; then
        each evaluation/qa 32k 18 "50 51" $qa
        each evaluation/needles 32k 10 50 "${five[@]}"
        each evaluation/qa 64k 12 "50 51 52" $qa
        each evaluation/needles 64k 3 "50 51" "${five[@]}"
    fi

    want dsa/qa16k 1070 16k 900 $qa
    want dsa/needles16k 1071 16k 12 "${needles[@]}"
    want dsa/all4k 1072 4k 20 $qa "${needles[@]}"
    want dsa-evaluation/all16k 2002 16k 4 $qa "${needles[@]}"
}

collect_one() { # GPU NAME SEED LENGTHS SAMPLES TASK...
    local gpu=$1 name=$2 seed=$3 lengths=$4 samples=$5 limit_s=$collect_s code n item
    shift 5
    [ -f "$data/$name.done" ] && return
    local arguments=()
    case $name in
        dsa*) arguments+=(--token-samples 1024) ;; # its indexer reads every layer, and sampled tokens of each prompt
        further/needles*) ;; # of every layer, as it was; the training takes two
        *) arguments+=(--layers "5,7") ;;
    esac
    case $name in
        training/* | further* | dsa*) arguments+=(--answers reference) ;; # older than own answers
        *) arguments+=(--answers own) ;;
    esac
    # Whole shards alone survive a limit, so they are small where one is meant to end the collection.
    case $name in
        own/*) limit_s=$own_collect_s ;;
        own-long/*) limit_s=$own_long_collect_s ;;
    esac
    case $name in
        own*/qa16k* | own*/hops16k*) arguments+=(--shard-documents 9) ;;
        own*) arguments+=(--shard-documents 4) ;;
    esac
    for item in ${lengths//,/ }; do arguments+=(-l "$item"); done
    for item in "$@"; do arguments+=(-t "$item"); done
    on "$gpu" timeout -k 20 "$limit_s" "${kvscope[@]}" lsa collect --model reference --chunk-tokens 16 \
        --least-mass 0.001 --states 64 "${arguments[@]}" -n "$samples" --seed "$seed" -o "$data/$name" --quiet \
        > "$data/$name.log" 2>&1
    code=$?
    n=$(documents "$data/$name")
    case $code in
        0) touch "$data/$name.done" && echo "$name: $n documents" ;;
        124 | 137)
            # Without a document another try may get further; with some it is used, and not begun again.
            [ "$n" -gt 0 ] && touch "$data/$name.done"
            echo "$name: stopped after $limit_s s with $n documents"
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

# -- train, and further three times

trained() { # NAME: print the folder of what a training left: the indexer, or its last checkpoint
    local folder
    [ -f "$out/$1/config.json" ] && echo "$out/$1" && return
    folder=$(ls -d "$out/$1"/checkpoints/epoch-*/ 2> /dev/null | sort | tail -1)
    [ -n "$folder" ] && [ -f "$folder/config.json" ] && echo "${folder%/}" && return
    return 1
}

train_one() { # NAME LIMIT_S EPOCHS LEAST_MASS OPTIONS...: with the collections in `found`
    local name=$1 limit_s=$2 epochs=$3 least_mass=$4 code=0 left
    shift 4
    if ! left=$(trained "$name"); then
        on "${gpus[0]}" timeout -k 20 "$limit_s" "${kvscope[@]}" lsa train "${found[@]}" -o "$out/$name" "${rule[@]}" \
            --least-mass "$least_mass" "${sizes[@]}" --epochs "$epochs" "$@" > "$out/$name.log" 2>&1
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
    train_one tau64 "$train_s" "$epochs" 0.2 --tau 64 --batch-rows 1 --lr 1e-3 --held-out $held_out --target-recall 0.95
}

start_of() { # NAME STEP: fill `start` with what a training left
    start=$(trained "$1") || { echo "nothing to go on from in $out/$1: run the step $2 first" >&2; return 1; }
}

further() {
    local start target=${TARGET_FURTHER:---threshold 0.58}
    sources further || return 1
    start_of tau64 train || return 1
    train_one tau4 "$further_s" "$further_epochs" 0.2 --start "$start" --tau 4 --batch-rows 12 --lr 2e-4 \
        --held-out $further_held_out --target-recall 0.97 || return 1
    start_of tau4 further || return 1
    # A checkpoint's threshold was never set, so 0.58 of it does not mean what it meant: the recall that it had.
    [[ $start == */checkpoints/* ]] && target=${TARGET_FURTHER:---target-recall 0.986}
    calibrate_one tau4-calibrated "$start" further-calibration 0.2 "$target"
}

own_one() { # NAME GROUP START STEP HELD_OUT: trained further on own answers
    local start
    sources "$2" || return 1
    start_of "$3" "$4" || return 1
    train_one "$1" "$further_s" "$own_epochs" 0.1 --start "$start" --tau 4 --batch-rows 8 --lr 3e-4 \
        --held-out "$5" --target-recall 0.985
}

own() { own_one own own tau4-calibrated further $own_held_out; }

own_long() { own_one own-long own-long own own $held_out; }

# -- calibrate and eval

names=(reference reference-chunk64 reference-chunk256) chunks=(16 64 256)

calibrate_one() { # NAME START GROUP LEAST_MASS TARGET OPTIONS...: on the collections of a group
    local name=$1 start=$2 group=$3 least_mass=$4 target=$5 code=0
    shift 5
    sources "$group" || return 1
    # Older than what it was made of: made of another one.
    if [ ! "$out/$name/config.json" -nt "$start/config.json" ]; then
        # shellcheck disable=SC2086 # a target is an option and its value
        on "${gpus[0]}" timeout -k 20 "$calibrate_s" "${kvscope[@]}" lsa calibrate --indexer "$start" "${found[@]}" \
            "${rule[@]}" --least-mass "$least_mass" $target --dtype bfloat16 "$@" -o "$out/$name" \
            > "$out/$name.log" 2>&1 || code=1
    fi
    echo "$name:"
    grep -v '^ *$' "$out/$name.log" | tail -6
    return $code
}

calibrate() {
    local start i code=0 target targets
    start_of own-long own-long || return 1
    target="--target-kept 0.125" targets=("--threshold 0.5" "--target-kept 0.125" "--target-kept 0.165")
    if [ "$smoke" = 1 ]; then # of 1K sinks and window alone are more than these shares
        target="--target-recall 0.9" targets=("--threshold 0.5" "--target-recall 0.9" "--target-recall 0.9")
    fi
    targets=("${TARGET_16:-${targets[0]}}" "${TARGET_64:-${targets[1]}}" "${TARGET_256:-${targets[2]}}")
    calibrate_one calibrated "$start" calibration 0.1 "${TARGET:-$target}" || return 1
    for i in 0 1 2; do
        calibrate_one "${names[i]}" "$out/calibrated" last-calibration 0.2 "${targets[i]}" \
            --chunk-tokens "${chunks[i]}" --cap-tokens 12288 || code=1
    done
    return $code
}

eval_one() { # GPU NAME, with the collections in `found`
    [ "$out/$2.eval.done" -nt "$out/$2/config.json" ] && return
    [ -f "$out/$2/config.json" ] || { echo "no indexer $out/$2: run the step calibrate first" >&2; return 1; }
    on "$1" timeout -k 20 "$eval_s" "${kvscope[@]}" lsa eval "${found[@]}" --indexer "$out/$2" "${rule[@]}" \
        --least-mass 0.2 -o "$out/$2.eval" > "$out/$2.eval.log" 2>&1 && touch "$out/$2.eval.done"
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

steps=(collect train further own own-long calibrate eval dsa)
chosen=("$@")
[ ${#chosen[@]} -gt 0 ] || chosen=("${steps[@]}")
for step in "${chosen[@]}"; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "no step '$step': ${steps[*]}" >&2; exit 2; }
done
for step in "${chosen[@]}"; do
    started=$SECONDS
    echo "== $step"
    run=${step//-/_}
    [ "$step" = eval ] && run=evaluate
    "$run" || { echo "$step failed after $((SECONDS - started)) s" >&2; exit 1; }
    echo "== $step: $((SECONDS - started)) s"
done
