#!/bin/bash
# What can be known of psa_cuda.cu without a GPU: it compiles for every architecture without warnings, no kernel spills
# or uses local memory, the kernels that multiply have tensor instructions. Prints registers per kernel (those of bf16;
# f16 is the same). Shared memory per kernel is asserted in the source.
# Usage: [NVCC=nvcc] [CUOBJDUMP=cuobjdump] [B=build] tests/cuda/compile.sh; leaves $B/psa_cuda.o, for all architectures.
set -eu
cd "$(dirname "$0")/../.."
B=${B:-build}
NVCC=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
CUOBJDUMP=${CUOBJDUMP:-$(command -v cuobjdump || echo "$(dirname "$NVCC")/cuobjdump")}
archs='80 86 89 90a 100 120'
log=$B/psa_cuda.log
kernels=$B/psa_cuda.kernels

if ! command -v "$NVCC" >/dev/null; then
    echo "psa_cuda.cu: skipped, there is no nvcc"
    exit 0
fi
fail() { echo "psa_cuda.cu: $*" >&2; exit 1; }

mkdir -p "$B"
flags=(-O3 -std=c++17 --threads 2 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v
       -gencode arch=compute_80,code=compute_80) # PTX, for what comes later
for a in $archs; do flags+=(-gencode "arch=compute_$a,code=sm_$a"); done
"$NVCC" "${flags[@]}" -c psa_cuda.cu -o "$B/psa_cuda.o" >"$log" 2>&1 ||
    fail "does not compile: $(grep -m 1 -E 'error|warning' "$log")"

# A line per kernel and architecture: name, architecture, bytes of stack, of spills, registers.
awk '/Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
     /bytes stack frame/ { stack = $1; spills = $5 + $9 }
     /Used [0-9]+ registers/ { match($0, /Used [0-9]+/)
                               print name, arch, stack, spills, substr($0, RSTART + 5, RLENGTH - 5) }' "$log" |
    c++filt -p | sed 's/psa__//g; s/, /,/g; s/ >/>/g' >"$kernels"
found=$(cut -d' ' -f1 "$kernels" | sort -u | wc -l)
[ "$found" -ge 20 ] || fail "found $found kernels in the report of ptxas, expected 20 or more"
! awk '$3 != 0 || $4 != 0' "$kernels" | grep . || fail "a kernel spills or has a stack"

for a in $archs; do
    echo "sm_$a, registers:$(awk -v arch="sm_$a" '$2 == arch && !/[<]f16/ { printf " %s %s", $1, $5 }' "$kernels")"
done
echo "psa_cuda.cu: compiles for sm_${archs// /, sm_}; no warnings, spills or local memory"

if ! command -v "$CUOBJDUMP" >/dev/null; then
    echo "psa_cuda.cu: its machine code was not looked at, there is no cuobjdump"
    exit 0
fi
for a in $archs; do
    "$CUOBJDUMP" -sass -arch "sm_$a" "$B/psa_cuda.o" >"$B/psa_cuda.sass"
    multiply=$(awk '/Function :/ { name = $3 } /HMMA/ { found[name] = 1 } END { for (n in found) print n }' \
        "$B/psa_cuda.sass" | grep -cE 'psa__(attend|score)' || true)
    [ "$multiply" = 16 ] || fail "sm_$a: $multiply kernels have tensor instructions, expected 16"
    ! grep -wE 'LDL|STL' "$B/psa_cuda.sass" || fail "sm_$a: local memory"
done
rm "$B/psa_cuda.sass"
echo "psa_cuda.cu: tensor instructions in all 16 kernels of attend and score"
