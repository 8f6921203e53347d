#!/bin/bash
# What psa_preload.c does to a program that runs plain ggml: tests/ggml/preload.sh DIR, where DIR holds both. The
# program runs its graph twice.
# The last line is "N passed, N failed".
set -u
dir=$1
passed=0 failed=0

# plain THREADS [NAME=VALUE...]: the program under the library; its output and what the library said.
plain() { env "${@:2}" PSA_LOG=1 LD_PRELOAD="$dir/libpsa_preload.so" "$dir/plain" "$1" 2>"$dir/said"; }

check() { # check NAME COMMAND...
    if "${@:2}"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1)) && echo "FAILED preload: $1" && cat "$dir/said"
    fi
}

said() { [ "$(grep -cE "$1" "$dir/said")" = "$2" ]; } # said PATTERN TIMES

# nmse TEXT NAME LOW HIGH: the error of a node lies between.
nmse() {
    awk -F': NMSE |, hash ' -v name="$2" -v low="$3" -v high="$4" \
        '$1 == name { found = $2 >= low && $2 < high } END { exit !found }' <<<"$1"
}

same() { [ "$(grep -E "$3" <<<"$1")" = "$(grep -E "$3" <<<"$2")" ]; }   # these nodes have the same bits
differ() { ! same "$@"; }

refused() { # refused NAME=VALUE EXPECTED [NAME=VALUE...]: one line, exit status 2, nothing computed
    local out rc
    out=$(plain 1 "$1" "${@:3}")
    rc=$?
    [ $rc = 2 ] && [ -z "$out" ] && [ "$(wc -l <"$dir/said")" = 1 ] && grep -q "$1: expected $2" "$dir/said"
}

for threads in 1 2; do
    stock=$("$dir/plain" $threads)
    : >"$dir/said"
    check 'stock ggml is exact' nmse "$stock" 'long' 0 1e-10

    ours=$(plain $threads)
    check 'long nodes are sparse' differ "$stock" "$ours" '^long:'
    check 'long f16 nodes are sparse' differ "$stock" "$ours" '^long, f16'
    check 'error of a sparse node' nmse "$ours" 'long' 1e-6 1e-2
    check 'error of a sparse f16 node' nmse "$ours" 'long, f16, gqa' 1e-6 1e-2
    check 'the others have the same bits' same "$stock" "$ours" '^(short|few|one|masked)'
    check 'the log: taken' said '^psa: layer [01]: .* density 0\.1[0-9]+, [0-9.]+ ms$' 4
    check 'the log: left' said '^psa: left to ggml: ' 8
    check 'the log: why' said 'left to ggml: psa_ggml: unsupported: an attention mask' 2
    [ $threads = 1 ] && first=$ours
    check 'the same bits for any number of threads' same "$first" "$ours" long

    ours=$(plain $threads PSA_DENSITY=1)
    check 'density 1 is exact' nmse "$ours" 'long' 0 1e-10
    check 'density 1 is exact, f16' nmse "$ours" 'long, f16, gqa' 0 1e-10
    check 'the log: density 1' said 'density 1\.000' 4

    ours=$(plain $threads PSA_MIN_LENGTH=2000)
    check 'everything is short' same "$stock" "$ours" .

    ours=$(plain $threads PSA_LAYERS=1-3)
    check 'layer 0 is not asked for' same "$stock" "$ours" '^long:'
    check 'layer 1 is' differ "$stock" "$ours" '^long, f16'

    ours=$(plain $threads PSA_PRESET=recipe PSA_DENSITY=0.3)
    check 'the recipe' nmse "$ours" 'long' 1e-9 1e-2
    check 'the recipe, f16' nmse "$ours" 'long, f16, gqa' 1e-9 1e-2
    check 'the density asked for' said 'density 0\.(29|30)' 4

    ours=$(plain $threads PSA_PRESET=wan2.1-1.3b)
    check 'a preset' nmse "$ours" 'long' 1e-9 1e-2
    with_grid=$(plain $threads PSA_PRESET=wan2.1-1.3b PSA_GRID=13,10,12)
    check 'an order, where the grid fits' differ "$ours" "$with_grid" '^long:'
    check 'no order where it does not' same "$ours" "$with_grid" '^long, f16'
done

check 'bad preset' refused PSA_PRESET=none 'a name'
check 'causal preset' refused PSA_PRESET=qwen2.5-vl 'one without causal'
check 'bad density' refused PSA_DENSITY=1.5 'a number above 0'
check 'bad length' refused PSA_MIN_LENGTH=long 'a number of tokens'
check 'bad layers' refused PSA_LAYERS=3- 'ranges'
check 'layers backwards' refused PSA_LAYERS=3-2 'ranges'
check 'bad grid' refused PSA_GRID=4,4 'three extents'
check 'grid and tree' refused PSA_GRID=13,10,12 'a preset without a tree' PSA_PRESET=recipe
echo "preload: $passed passed, $failed failed"
[ $failed = 0 ]
