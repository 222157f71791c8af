#!/usr/bin/env bash
# Collect, train and judge indexers of lsa and dsa for the reference model on one GPU, several processes side by side.
#
#     benchmarks/indexers_h100.sh DATA OUT     DATA: shards (tens of GB); OUT: indexers, logs and tables (small)
#
# Training documents have seeds 1000 to 1007, those that judge 2000. Every step is bounded and resumes: an unfinished
# collection is used as far as it got. The best indexer is chosen from OUT/*.eval, on these seeds alone.
set -uo pipefail
data=${1:?usage: benchmarks/indexers_h100.sh DATA OUT}
out=${2:?usage: benchmarks/indexers_h100.sh DATA OUT}
chunk=${CHUNK:-16} collect_s=${COLLECT_S:-150} train_s=${TRAIN_S:-180}
python=${PYTHON:-python}
kvscope=("$python" -m kvscope.cli)
export OMP_NUM_THREADS=1
mkdir -p "$data" "$out"
started=$SECONDS

# Layers 5 and 7 of the reference model retrieve; docs/log.md has how that and the least mass were found.
rule=(--voters layer --label-layers 5,7 --top-p 0.9 --least-mass 0.2)
collect=(lsa collect --model reference --chunk-tokens "$chunk" --least-mass 0.001 --states 64 --token-samples 1024 --quiet)
needles=(-t niah_single_1 -t niah_multikey_2 -t niah_multikey_3 -t niah_multivalue -t niah_multiquery -t vt)

for seed in 1000 1001 1002 1003 1004 1005 1006 1007; do
    {
        timeout "$collect_s" "${kvscope[@]}" "${collect[@]}" -t long_qa -l 4k -l 16k -n 36 --seed $seed -o "$data/qa$seed"
        timeout "$collect_s" "${kvscope[@]}" "${collect[@]}" "${needles[@]}" -l 4k -l 16k -n 6 --seed $seed -o "$data/needles$seed"
    } > "$out/collect$seed.log" 2>&1 &
done
timeout "$collect_s" "${kvscope[@]}" "${collect[@]}" -t long_qa "${needles[@]}" -l 16k -l 32k -n 9 --seed 2000 \
    -o "$data/test" > "$out/collect2000.log" 2>&1 &
wait
echo "collected after $((SECONDS - started)) s"

training=()
for folder in "$data"/qa* "$data"/needles*; do
    [ -f "$folder/manifest.json" ] && training+=(--data "$folder")
done
train() { # NAME OPTIONS...: one candidate for lsa
    local name=$1
    shift
    timeout "$train_s" "${kvscope[@]}" lsa train "${training[@]}" -o "$out/$name" "${rule[@]}" --epochs 6 --patience 9 \
        --target-recall 0.97 "$@" > "$out/$name.log" 2>&1
}
train both-16 --layers 5,7 --lookback 16 --lr 1e-3 &
train both-32 --layers 5,7 --lookback 32 --lr 1e-3 &
train three-16 --layers 2,5,7 --lookback 16 --lr 1e-3 &
train seven-16 --layers 7 --lookback 16 --lr 1e-3 &
train wide-16 --layers 5,7 --lookback 16 --lr 1e-3 --encoder-width 256 --batch-documents 8 &
train fast-16 --layers 5,7 --lookback 16 --lr 3e-3 &
timeout "$train_s" "${kvscope[@]}" dsa train "${training[@]}" -o "$out/dsa" > "$out/dsa.log" 2>&1 &
wait
echo "trained after $((SECONDS - started)) s"

for folder in "$out"/*/; do
    name=$(basename "$folder")
    [ -f "$folder/config.json" ] || { echo "$name: no indexer, see $name.log"; continue; }
    if [ "$name" = dsa ]; then
        "${kvscope[@]}" dsa eval --data "$data/test" --indexer "$folder" -o "$out/$name.eval" > "$out/$name.eval.txt" 2>&1 &
    else
        "${kvscope[@]}" lsa eval --data "$data/test" --indexer "$folder" -o "$out/$name.eval" "${rule[@]}" \
            > "$out/$name.eval.txt" 2>&1 &
    fi
done
wait
echo "evaluated after $((SECONDS - started)) s"
head -n 16 "$out"/*.eval.txt
