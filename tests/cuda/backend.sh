#!/bin/sh
# --backend cuda of psa and classify beside --backend cpu, on the emulator of CUDA threads: build/emu/psa and
# build/emu/classify. Needs build/npydiff.
cd "$(dirname "$0")/../.." || exit 1
. tests/check.sh
golden=tests/data/golden/attention
mkdir "$made" || exit 1

psa() { "$build/emu/psa" "$@"; }
classify() { "$build/emu/classify" examples/data/model examples/data/clips/two.y4m --num-frames 8 "$@"; }
near() { "$build/npydiff" "$1" "$2" "$3"; }
inputs() { echo "--q $golden/$1_q.npy --k $golden/$1_k.npy --v $golden/$1_v.npy"; }
d64=$(inputs d64) # N 512, two heads
some="--block-q 32 --block-k 16 --level-end .2,.3,.5,.8"

# like_cpu BOUND ARGUMENTS...: out and lse on the level map that the CPU chose, scores
like_cpu() {
    bound=$1
    shift
    psa attend "$@" --out "$tmp/cpu.npy" --lse "$tmp/cpu_lse.npy" --save-levels "$tmp/levels.npy" &&
        psa attend "$@" --out "$tmp/cuda.npy" --lse "$tmp/cuda_lse.npy" --levels "$tmp/levels.npy" --backend cuda &&
        near "$tmp/cpu.npy" "$tmp/cuda.npy" "$bound" && near "$tmp/cpu_lse.npy" "$tmp/cuda_lse.npy" "$bound"
}

# chooses_like_cpu ARGUMENTS...: scores, and the level map that is made of them but for ties
chooses_like_cpu() {
    for backend in cpu cuda; do
        psa attend "$@" --out "$tmp/out.npy" --save-scores "$tmp/$backend.npy" --save-levels "$tmp/${backend}_l.npy" \
            --backend $backend || return 1
    done
    near "$tmp/cpu.npy" "$tmp/cuda.npy" 0.02 &&
        [ "$(cmp -l "$tmp/cpu_l.npy" "$tmp/cuda_l.npy" | wc -l)" -le $(($(wc -c <"$tmp/cpu_l.npy") / 20)) ]
}

echo "# psa"
check "info" prints "^CUDA: emulator, compute capability 8.0" psa info
check "d64" like_cpu 0.03 $d64 $some
check "d128" like_cpu 0.03 $(inputs d128) $some
check "causal" like_cpu 0.03 $d64 $some --causal
check "order gilbert" like_cpu 0.03 $d64 $some --order gilbert --grid 8,8,8
check "order semantic, one for every head" like_cpu 0.03 $d64 $some --order semantic
for score in sample antidiagonal pooled exact; do
    check "chosen by $score" chooses_like_cpu $d64 $some --score $score
done
check "chosen by groups" chooses_like_cpu $d64 $some --score pooled --score-group 8,8
check "threshold, cap" chooses_like_cpu $d64 $some --mask threshold --sim-min .2,.2
check "compare" prints "^relative error" psa attend $d64 $some --compare --backend cuda --out "$tmp/out.npy"
check "statistics" psa attend $d64 $some --backend cuda --out "$tmp/out.npy" --stats "$tmp/stats.json"
check "statistics name the device" prints '"device":.*"emulator' cat "$tmp/stats.json"

refused() {
    text=$1
    shift
    rejected "$text" psa attend $d64 --out "$made/out.npy" --lse "$made/lse.npy" --backend cuda "$@"
}
check "too large a stride" refused "stride \* D is too large" --score antidiagonal --stride 64
psa attend $d64 $some --out "$tmp/out.npy" --save-levels "$tmp/levels.npy" >"$tmp/log"
{
    head -c -1 "$tmp/levels.npy"
    printf '\003'
} >"$tmp/bad.npy"
check "a map with level 3" refused "level" $some --levels "$tmp/bad.npy"

for backend in cuda model; do
    check "bench, $backend" prints "attend at 0.3" psa bench --backend $backend --n 256 --d 64 --heads 1 --density .3
    check "bench, $backend, JSON" prints '"tflops"' psa bench --backend $backend --n 256 --d 64 --heads 1 --json
done
check "bench: topics are the CPU's" rejected "topic has no use" psa bench --backend model --topic dense

echo "# classify"
for option in "--order gilbert" --dense; do
    check "$option, on the CPU" classify $option --logits "$tmp/cpu.npy"
    check "$option" prints "2 moving down" classify $option --backend cuda --logits "$tmp/cuda.npy"
    check "$option: the same logits" near "$tmp/cpu.npy" "$tmp/cuda.npy" 0.02
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
