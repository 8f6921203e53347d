#!/bin/bash
# What can be known of psa_cuda.cu's machine code without a GPU: nvcc has no warnings, no kernel spills or uses local
# memory, registers are as few as the design needs, the kernels that multiply have tensor instructions.
# Usage: B=build SM="80 90a ..." tests/cuda/compile.sh, after $B/psa_cuda.o was made for these architectures. The tensor
# instructions are looked up where there is a cuobjdump; nvcc's packages on PyPI have none, the triton package has.
set -eu
cd "$(dirname "$0")/../.."
B=${B:-build}
SM=${SM-}
log=$B/psa_cuda.log
kernels=$B/psa_cuda.kernels

# CTAs of 128 threads that an SM is to hold by its 65536 registers. By its shared memory it holds as many or more where
# that is 227 KB; what a kernel takes of it is asserted in the source and tested on the emulator.
design='attend<bf16,tiles<128,64,64,3>> 2
attend<bf16,tiles<128,64,128,2>> 2
attend<bf16,tiles<64,64,64,3>> 4
attend<bf16,tiles<64,64,128,2>> 2
attend<bf16,tiles<64,32,256,2>> 2
score<bf16,score_shape<64>> 2
score<bf16,score_shape<128>> 2
score<bf16,score_shape<256>> 2
pool<bf16> 5
mask 6
list 6
combine 6'

if [ -z "$SM" ]; then
    echo "psa_cuda.cu: not compiled, there is no nvcc"
    exit 0
fi
fail() { echo "psa_cuda.cu: $*" >&2; exit 1; }

! grep -i warning "$log" || fail "nvcc warns"

# A line per kernel and architecture: name, architecture, bytes of stack, of spills, registers.
awk '/Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
     /bytes stack frame/ { stack = $1; spills = $5 + $9 }
     /Used [0-9]+ registers/ { match($0, /Used [0-9]+/)
                               print name, arch, stack, spills, substr($0, RSTART + 5, RLENGTH - 5) }' "$log" |
    c++filt -p | sed 's/psa__//g; s/, /,/g; s/ >/>/g' >"$kernels"
! awk '$3 != 0 || $4 != 0' "$kernels" | grep . || fail "a kernel spills or has a stack"

printf '%-36s' registers
printf '%8s' $SM
printf '  at most\n'
while read -r kernel ctas; do
    most=$((65536 / 128 / ctas / 8 * 8)) # they are given out by eights
    [ $most -lt 256 ] || most=255
    printf '%-36s' "$kernel"
    for a in $SM; do
        found=$(awk -v a="$kernel" -v b="${kernel/bf16/f16}" -v arch="sm_$a" \
            '($1 == a || $1 == b) && $2 == arch && $5 > n { n = $5 } END { print n + 0 }' "$kernels")
        printf '%8s' "$found"
        [ "$found" -gt 0 ] && [ "$found" -le $most ] || fail "$kernel: $found registers on sm_$a"
    done
    printf '%9s\n' $most
done <<<"$design"
[ "$(awk '{ print $1 }' "$kernels" | sort -u | wc -l)" = 21 ] || fail "expected 21 kernels in the report of ptxas"
echo "psa_cuda.cu: compiles for sm_${SM// /, sm_}; no warnings, spills or local memory"

if ! command -v cuobjdump >/dev/null; then
    echo "psa_cuda.cu: its machine code was not looked at, there is no cuobjdump"
    exit 0
fi
for a in $SM; do
    cuobjdump -sass -arch "sm_$a" "$B/psa_cuda.o" >"$B/psa_cuda.sass"
    multiply=$(awk '/Function :/ { name = $3 } /HMMA/ { found[name] = 1 } END { for (n in found) print n }' \
        "$B/psa_cuda.sass" | grep -cE 'psa__(attend|score)' || true)
    [ "$multiply" = 16 ] || fail "sm_$a: $multiply kernels have tensor instructions, expected 16"
    ! grep -wE 'LDL|STL' "$B/psa_cuda.sass" || fail "sm_$a: local memory"
done
rm "$B/psa_cuda.sass"
echo "psa_cuda.cu: tensor instructions in all 16 kernels of attend and score"
