#!/bin/bash
# A small run of examples/ggml/dit.c and what it refuses: tests/ggml/dit.sh DIR, where DIR holds it.
# The last line is "N passed, N failed".
set -u
dit=$1/dit out=$1/dit.txt png=$1/dit.png
passed=0 failed=0

check() { # check NAME COMMAND...
    if "${@:2}"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1)) && echo "FAILED dit: $1" && cat "$out"
    fi
}

# rows RUN KIND CONDITION N: N steps of that kind in that run, and they all fulfil the condition ($5 density, $6 error).
rows() {
    awk -v run="$1" -v kind="$2" -v n="$4" '
        /^[a-z]/ { here = $1 == run || index($0, run) == 1 }
        /^  step/ && here { sub("kept map", "kept-map"); if ($3 == kind) { all++; good += ('"$3"') } }
        END { exit !(all == n && good == n) }' "$out"
}

refused() { # refused EXPECTED ARGUMENT...: one line, exit status 2
    "$dit" "${@:2}" >"$out" 2>&1
    [ $? = 2 ] && [ "$(wc -l <"$out")" = 1 ] && grep -q "^dit: .*$1" "$out"
}

rm -f "$png"
"$dit" --grid 4,12,20 --layers 2 --heads 1 --steps 4 --warmup 1 --keep 3 --png "$png" >"$out" 2>&1
check 'exit status' [ $? = 0 ]
check 'dense run' rows ggml dense '$5 == 1 && $6 == 0' 4
check 'warm-up is dense' rows 'psa  ' dense '$5 == 1 && $6 == 0' 1
check 'sparse steps' rows 'psa  ' sparse '$5 > 0.13 && $5 < 0.17 && $6 > 0.0001 && $6 < 0.1' 3
check 'scored steps beside kept maps' rows 'psa, map' sparse '$5 < 0.17 && $6 > 0.0001 && $6 < 0.1' 1
check 'kept maps drift, a little' rows 'psa, map' kept-map '$5 < 0.17 && $6 < 0.1 && $7 > 0 && $7 < $6' 2
check 'a picture' grep -q PNG "$png"
check 'bad grid' refused 'three extents' --grid 3,4
check 'bad number' refused 'a whole number' --heads 0
check 'unknown option' refused 'expected an option' --colour 3
check 'missing value' refused 'expected an option' --png
echo "dit: $passed passed, $failed failed"
[ $failed = 0 ]
