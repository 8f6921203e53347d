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

printf '%-42s' registers
printf '%8s' $SM
printf '  at most\n'
while read -r kernel ctas; do
    most=$((65536 / 128 / ctas / 8 * 8)) # they are given out by eights
    [ $most -lt 256 ] || most=255
    printf '%-42s' "$kernel"
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
# The inner loop of attend_hopper: the shortest way from its wait for all but one group of wgmma back to it, which is that
# of a tile with one bias, seen in full, that leaves the maxima as they are. Prints kernel, instructions, what they are.
inner_loops() {
    awk 'function walk(    i, j, k, n, last, ends, line) { # breadth first; from: where an instruction was reached from
             split("", from)
             queue[last = 1] = start
             for (n = 1; n <= last && !(start in from); n++) {
                 i = queue[n]
                 ends = op[i] == "BRA" || op[i] == "EXIT" || op[i] == "RET"
                 split((op[i] == "BRA" ? at[target[i]] : "-") " " (!ends || guarded[i] ? i + 1 : "-"), to, " ")
                 for (k = 1; k <= 2; k++) if ((j = to[k]) != "-" && !(j in from)) { from[j] = i; queue[++last] = j }
             }
             split("", found)
             n = 0
             i = start
             do { found[op[i]]++; n++; i = from[i] } while (i && i != start)
             for (k in found) if (found[k] >= 8) line = line " " k " " found[k]
             print kernel, n, "instructions:" line
         }
         /Function :/ { if (start) walk(); kernel = $3; count = start = 0; split("", at) }
         match($0, /^ +\/\*[0-9a-f]+\*\/ +[^\/;]*;/) {
             n = split(substr($0, RSTART, RLENGTH - 1), w, " ")
             gsub(/[\/*]/, "", w[1])
             at["0x" w[1]] = ++count
             guarded[count] = w[2] ~ /^@/
             op[count] = guarded[count] ? w[3] : w[2]
             sub(/\..*/, "", op[count])
             target[count] = w[n]
             if ($0 ~ /WARPGROUP.DEPBAR.LE gsb0, 0x1 /) start = count
         }
         END { if (start) walk() }' "$1" | c++filt | sed 's/void //; s/psa__//g; s/, /,/g; s/ >/>/g; s/([^)]*)//'
}

for a in $SM; do
    cuobjdump -sass -arch "sm_$a" "$B/psa_cuda.o" >"$B/psa_cuda.sass"
    multiply=$(awk '/Function :/ { name = $3 } / H[G]?MMA/ { found[name] = 1 } END { for (n in found) print n }' \
        "$B/psa_cuda.sass" | grep -cE 'psa__(attend|score)' || true)
    expected=16
    [ "$a" != 90a ] || expected=20
    [ "$multiply" = $expected ] || fail "sm_$a: $multiply kernels have tensor instructions, expected $expected"
    if [ "$a" = 90a ]; then
        inner_loops "$B/psa_cuda.sass" | tee "$B/psa_cuda.loops"
        [ "$(grep -c 'attend_hopper.*HGMMA 1[26]' "$B/psa_cuda.loops")" = 4 ] || fail "attend_hopper has no HGMMA"
        ! awk '$2 > 500' "$B/psa_cuda.loops" | grep . || fail "an inner loop has more than 500 instructions"
    fi
    ! grep -wE 'LDL|STL' "$B/psa_cuda.sass" || fail "sm_$a: local memory"
done
rm "$B/psa_cuda.sass"
echo "psa_cuda.cu: tensor instructions in all kernels of attend and score"
