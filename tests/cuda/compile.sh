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
# attend_hopper has 384 threads and one CTA; its warpgroups then share these registers out by themselves.
design='attend<bf16,tiles<128,64,64,3,4>> 2
attend<bf16,tiles<128,64,128,2,4>> 2
attend<bf16,tiles<64,64,64,3,4>> 4
attend<bf16,tiles<64,64,128,2,4>> 2
attend<bf16,tiles<64,32,256,2,4>> 2
attend_hopper<bf16,tiles<128,128,64,4,8>> 3
attend_hopper<bf16,tiles<128,128,128,2,8>> 3
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
! grep 'C75[0-9][0-9]' "$log" || fail "wgmma is serialised"

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
[ "$(awk '{ print $1 }' "$kernels" | sort -u | wc -l)" = 25 ] || fail "expected 25 kernels in the report of ptxas"
echo "psa_cuda.cu: compiles for sm_${SM// /, sm_}; no warnings, spills or local memory"

if ! command -v cuobjdump >/dev/null; then
    echo "psa_cuda.cu: its machine code was not looked at, there is no cuobjdump"
    exit 0
fi
# What attend_hopper is made of: instructions that it has 16 times at least.
mix() {
    [ "$(awk '/Function :/ { name = $3 } /HGMMA/ { found[name] = 1 } END { for (n in found) print n }' \
        "$B/psa_cuda.sass" | grep -c psa__attend_hopper || true)" = 4 ] || fail "attend_hopper has no HGMMA"
    awk '/Function :/ { take = $3 ~ /attend_hopperI9psa__bf16/; if (take) print $3 }
         take && match($0, /^ +\/\*[0-9a-f]+\*\/ +(@!?U?P[0-9T]+ +)?[A-Z0-9_.]+/) {
             split(substr($0, RSTART, RLENGTH), w, " "); op = w[2] ~ /^@/ ? w[3] : w[2]
             sub(/\..*/, "", op); print op }' \
        "$B/psa_cuda.sass" | c++filt | awk '/attend_hopper/ { name = $0; next } { n[name, $1]++; names[name]; ops[$1] }
         END { for (name in names) { printf "%s:", name
                   for (op in ops) if (n[name, op] >= 16) printf " %s %d", op, n[name, op]
                   print "" } }' | sed 's/psa__//g; s/void //; s/(.*)//'
}

for a in $SM; do
    cuobjdump -sass -arch "sm_$a" "$B/psa_cuda.o" >"$B/psa_cuda.sass"
    multiply=$(awk '/Function :/ { name = $3 } / H[G]?MMA/ { found[name] = 1 } END { for (n in found) print n }' \
        "$B/psa_cuda.sass" | grep -cE 'psa__(attend|score)' || true)
    expected=16
    [ "$a" != 90a ] || expected=20
    [ "$multiply" = $expected ] || fail "sm_$a: $multiply kernels have tensor instructions, expected $expected"
    [ "$a" != 90a ] || mix
    ! grep -wE 'LDL|STL' "$B/psa_cuda.sass" || fail "sm_$a: local memory"
done
rm "$B/psa_cuda.sass"
echo "psa_cuda.cu: tensor instructions in all kernels of attend and score"
