#!/bin/sh
# Runs build/fidelity: the tree recipe is far nearer to dense than the paper's attention on real heads, at equal density.
cd "$(dirname "$0")/.." || exit 1
. tests/check.sh
one=tests/data/qkv/flow_bbb_l2h0_8x16x16.npy
other=tests/data/qkv/flow_bbb_l5h1_8x16x16.npy
heads="$one $other"
golden=tests/data/golden/attention/d64

fidelity() { "$build/fidelity" "$@"; }

# error METHOD ARGUMENTS...: of the one method and density
error() {
    method=$1
    shift
    fidelity "$@" --density .1 --only "$method" | awk 'END { sub(/ *\([0-9.]+ costs.*/, ""); print $NF }'
}

# below A FACTOR B: A < FACTOR * B, both positive
below() { awk -v a="$1" -v f="$2" -v b="$3" 'BEGIN { print a, f, b; exit !(a > 0 && b > 0 && a < f * b) }'; }

recipe=$(error "(recipe)" $heads)
check "recipe: less than half of upstream-like's error" below "$recipe" 0.5 "$(error upstream $heads)"
check "and of that of binary masks from exact scores" below "$recipe" 0.5 "$(error "binary, Gilbert, exact" $heads)"
check "sharpened: still less than half" below "$(error "(recipe)" $heads --sharpness 2)" 0.5 \
    "$(error upstream $heads --sharpness 2)"
own=$(error "(recipe)" $one)
check "a head's own trees are the default" [ "$own" = "$(error "(recipe)" $one --trees $one)" ]
check "they are better than another head's" below "$own" 0.9 "$(error "(recipe)" $one --trees $other)"

check "separate files, picture" fidelity --q ${golden}_q.npy --k ${golden}_k.npy --v ${golden}_v.npy --grid 2,16,16 \
    --density .3,.5 --png "$tmp/f.png"
check "it is a PNG" sh -c "head -c 4 $tmp/f.png | grep -q PNG"
check "JSON" prints '"flow_bbb_l2h0_8x16x16.npy"' fidelity $one --density .1 --only upstream --json
check "a costly prefix is reported" prints "(0.1 costs 0\." fidelity $one --density .1 --only upstream \
    --prefix 1024 --grid 4,16,16

check "no file" rejected "expected files, or --q" fidelity
check "not stacked" rejected "expected \[3,N,D\] or \[3,H,N,D\]" fidelity ${golden}_q.npy
check "no grid" rejected "no grid in its name" fidelity --q ${golden}_q.npy --k ${golden}_k.npy --v ${golden}_v.npy
check "the wrong grid" rejected "2048 tokens; the grid 2x2x2" fidelity $heads --grid 2,2,2
check "no such method" rejected "no method's name contains it" fidelity $heads --only nothing
check "groups of heads" rejected "expected a multiple of --heads-per-kv 2" fidelity $heads --heads-per-kv 2
check "no such folder" rejected "cannot write the picture" fidelity $one --density .1 --only upstream --png "$made/no/f"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
