#!/bin/sh
# Runs build/psa on tests/data/golden: goldens through files, stages against the whole, options, and everything that can
# be wrong with its input. Needs build/psa and build/npydiff.
cd "$(dirname "$0")/.." || exit 1
. tests/check.sh
golden=tests/data/golden
mkdir "$made" || exit 1

# Upstream's f32 rounding is up to 1.2e-6 for out and lse, less for scores; the library adds about as much.
bound=2e-6

psa() { "$build/psa" "$@"; }
near() { "$build/npydiff" "$1" "$2" "${3:-$bound}"; }

# differ A B: neither is missing, and they are not the same
differ() { [ -s "$1" ] && [ -s "$2" ] && ! cmp -s "$1" "$2"; }

# npy DESCR SHAPE: the header that numpy and psa write, 128 bytes; data FILE: what follows it
npy() { printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '$1', 'fortran_order': False, 'shape': ($2), }"; }
data() { tail -c +129 "$1"; }
zeros() { head -c "$1" /dev/zero; }
numbers() { data "$1" | od -An -v -tf4 | tr -s ' ' '\n' | grep .; }

# inputs NAME: the golden q, k and v
inputs() {
    echo "--q $golden/attention/$1_q.npy --k $golden/attention/$1_k.npy --v $golden/attention/$1_v.npy"
}
d64=$(inputs d64) # N 512, two heads
qk=${d64% --v*}
blocks="--block-q 32 --block-k 16"
some="$blocks --level-end .2,.3,.5,.8" # blocks at every level up to 8

# attend NAME ARGUMENTS...: into $tmp/NAME.npy and $tmp/NAME_lse.npy
attend() {
    out=$1
    shift
    psa attend "$@" --out "$tmp/$out.npy" --lse "$tmp/${out}_lse.npy"
}

# attends_as NAME ARGUMENTS...: the bits of an earlier result
attends_as() {
    as=$1
    shift
    attend again "$@" && cmp "$tmp/$as.npy" "$tmp/again.npy" && cmp "$tmp/${as}_lse.npy" "$tmp/again_lse.npy"
}

# attends_near PREFIX ARGUMENTS...: out and lse of PREFIX, within the bound
attends_near() {
    as=$1
    shift
    attend again "$@" && near "$as.npy" "$tmp/again.npy" && near "${as}_lse.npy" "$tmp/again_lse.npy"
}
attends_golden() {
    as=$1
    shift
    attend again "$@" && near "$golden/${as}_out.npy" "$tmp/again.npy" &&
        near "$golden/${as}_lse.npy" "$tmp/again_lse.npy"
}

# makes FILE COMMAND ARGUMENTS...: --out is the very file
makes() {
    want=$1
    shift
    psa "$@" --out "$tmp/made.npy" && cmp "$want" "$tmp/made.npy"
}

# levels NAME VALID ARGUMENTS...: psa mask makes the golden levels, wherever VALID is not 0; every entry of VALID stands
# for as many blocks
levels() {
    want=$golden/mask/$1_levels.npy valid=$golden/mask/$1_$2.npy
    shift 2
    psa mask "$@" --out "$tmp/levels.npy" || return 1
    [ "$(wc -c <"$want")" -eq "$(wc -c <"$tmp/levels.npy")" ] || return 1
    run=$(($(data "$want" | wc -c) / $(data "$valid" | wc -c)))
    {
        data "$valid" | od -An -v -tu1
        echo differences
        cmp -l "$want" "$tmp/levels.npy"
    } | awk -v run=$run '
        /differences/ { begun = 1; next }
        !begun { for (i = 1; i <= NF; i++) valid[n++] = $i; next }
        $1 <= 128 || valid[int(($1 - 129) / run)] { print "byte " $1 " differs"; bad = 1 }
        END { exit bad || !n }'
}

# row_sum SUM GOLDEN FILE: the golden map, whose rows sum to SUM, made to sum to 1
row_sum() {
    numbers "$2" >"$tmp/want.txt"
    numbers "$3" >"$tmp/found.txt"
    paste "$tmp/want.txt" "$tmp/found.txt" | awk -v sum="$1" -v bound=$bound '
        NF != 2 || $2 - $1 / sum > bound || $1 / sum - $2 > bound { print NR ": " $0; bad = 1 }
        END { exit bad || !NR }'
}

# sums_to_1 FILE NK: rows of a score map
sums_to_1() {
    numbers "$1" | awk -v nk="$2" '
        { sum += $1; bad = bad || !($1 >= 0) }
        NR % nk == 0 { bad = bad || sum < .99999 || sum > 1.00001; sum = 0 }
        END { print NR " entries"; exit bad || !NR || NR % nk }'
}

# json FILE KEY...: an object with these keys in which brackets close and every number is one
json() {
    file=$1
    shift
    for key in "$@"; do
        grep -q "\"$key\":" "$file" || { echo "no $key"; return 1; }
    done
    [ "$(head -c 1 "$file")" = "{" ] && [ "$(tail -n 1 "$file")" = "}" ] &&
        ! grep -q -i -E ':[[:space:]]*-?(null|nan|inf)' "$file" &&
        [ "$(tr -cd '[{' <"$file" | wc -c)" -eq "$(tr -cd ']}' <"$file" | wc -c)" ]
}

# picture FILE: begins and ends like a PNG
picture() {
    [ "$(od -An -tx1 -N8 "$1" | tr -d ' \n')" = 89504e470d0a1a0a ] &&
        [ "$(tail -c 12 "$1" | od -An -tx1 | tr -d ' \n')" = 0000000049454e44ae426082 ] && [ "$(wc -c <"$1")" -gt 2000 ]
}

# refused TEXT ARGUMENTS...: attend with valid inputs and these arguments
refused() {
    text=$1
    shift
    rejected "$text" psa attend $d64 --out "$made/out.npy" --lse "$made/lse.npy" --stats "$made/stats.json" "$@"
}

sets=$(psa info | sed -n 's/^instruction sets: \(.*\) (.*/\1/p')

echo "# goldens: attention"
for isa in $sets; do
    for d in d64 d128; do
        for kind in attention causal; do
            [ $kind = causal ] && causal=--causal || causal=
            check "$kind/$d, $isa" attends_golden "$kind/$d" $(inputs $d) --levels "$golden/$kind/${d}_levels.npy" \
                --block-q 128 --block-k 128 $causal --isa "$isa"
        done
    done
done

echo "# goldens: scores"
for isa in $sets; do
    for size in "128 128" "128 64" "64 64"; do
        q=${size% *} k=${size#* }
        check "score_sample $q x $k, $isa" psa score --q "$golden/score_sample/q.npy" --k "$golden/score_sample/k.npy" \
            --sample 1 --block-q "$q" --block-k "$k" --isa "$isa" --out "$tmp/scores.npy"
        check "score_sample $q x $k, $isa: the map" near "$golden/score_sample/score_${q}_$k.npy" "$tmp/scores.npy"
    done
    for stride in 8 16; do
        for way in bidir causal; do
            [ $way = causal ] && causal=--causal || causal=
            check "score_antidiagonal s$stride $way, $isa" psa score --q "$golden/score_antidiagonal/q.npy" \
                --k "$golden/score_antidiagonal/k.npy" --score antidiagonal --stride $stride --block-k 128 $causal \
                --isa "$isa" --out "$tmp/scores.npy"
            check "score_antidiagonal s$stride $way, $isa: the map" row_sum $((128 / stride)) \
                "$golden/score_antidiagonal/sum_s${stride}_$way.npy" "$tmp/scores.npy"
        done
    done
done

echo "# goldens: masks"
ends() {
    case $1 in
    l124) echo .15,.25,.45,.45 ;;
    wan14b) echo .4,.5,.6,.8 ;;
    topk8 | default) echo .05,.15,.25,.5 ;;
    empty4) echo .1,.15,.15,.35 ;;
    qwen) echo .7,.8,.9,.9 ;;
    esac
}
for c in l124 wan14b topk8 empty4; do
    for mode in topk topk_newtype thresholdbound thresholdbound_newtype; do
        case $mode in
        topk*) rule="--mask topk" ;;
        *) rule="--mask threshold --min-full .06" ;;
        esac
        check "${c}_$mode" levels ${c}_$mode row_valid --scores "$golden/mask/scores.npy" $rule --level-end "$(ends $c)"
    done
done
for way in bidir causal; do
    [ $way = causal ] && causal=--causal || causal=
    for c in topk_default topk_wan14b energybound_qwen energybound_wan14b; do
        case $c in
        topk*) rule="--mask topk" ;;
        *) rule="--mask threshold --inclusive" ;;
        esac
        check "qwen_${c}_$way" levels qwen_${c}_$way block_valid --scores "$golden/mask/qwen_scores_$way.npy" $rule \
            --level-end "$(ends "${c#*_}")" --sink --diagonal --block-k 128 $causal
    done
done
for block in 32 64 128; do
    nk=$((512 / block))
    { npy "<f4" "1, 2, 1, $nk" && zeros $((8 * nk)); } >"$tmp/flat.npy"
    for t in zero wan qwen; do
        case $t in
        zero) thresholds=0,0,-1 ;;
        wan) thresholds=.7,.65,.6 ;;
        qwen) thresholds=.75,.7,.7 ;;
        esac
        { npy "|u1" "1, 2, 1, $nk" && data "$golden/similarity/cap_b${block}_$t.npy"; } >"$tmp/cap.npy"
        check "similarity cap b$block $t" makes "$tmp/cap.npy" mask --scores "$tmp/flat.npy" \
            --k "$golden/similarity/k.npy" --block-k $block --level-end 0,0,0,1 --sim-min $thresholds
    done
done

echo "# goldens: orders"
for f in "$golden"/order/*.npy; do
    name=$(basename "$f" .npy)
    grid=${name#*_} tile=
    case $name in
    tile_*) tile="--tile $(echo "${grid#*_}" | tr x ,)" ;;
    esac
    check "$name" makes "$f" order --order "${name%%_*}" --grid "$(echo "${grid%_*}" | tr x ,)" $tile
done

echo "# stages and the whole"
for kind in sample antidiagonal pooled exact; do
    check "score $kind" psa score $qk $blocks --score $kind --out "$tmp/scores.npy"
    check "score $kind: rows sum to 1" sums_to_1 "$tmp/scores.npy" 32
    check "score $kind, causal" psa score $qk $blocks --score $kind --causal --out "$tmp/scores.npy"
    check "score $kind, causal: rows sum to 1" sums_to_1 "$tmp/scores.npy" 32
done
cmp_stages() { # SCORING MASKING: psa score and psa mask make what psa attend saves
    psa attend $d64 $1 $2 --out "$tmp/out.npy" --save-scores "$tmp/s.npy" --save-levels "$tmp/l.npy" &&
        makes "$tmp/s.npy" score $qk $1 && makes "$tmp/l.npy" mask --scores "$tmp/s.npy" --k "${qk#*--k }" $2
}
check "score and mask as in attend: top-k" cmp_stages "$blocks --seed 7 --sample .5 --score-norm" "$some --skip-mean"
check "score and mask as in attend: counts" cmp_stages "$blocks --scale .2" "$blocks --level-count 1,0,4,9"
check "score and mask as in attend: pooled groups" cmp_stages "$blocks --score pooled --score-group 8,16" "$some"
check "score and mask as in attend: threshold" cmp_stages "$blocks --score pooled" \
    "$some --mask threshold --min-full .1 --prefix 20 --suffix 3"
check "score and mask as in attend: density" cmp_stages "$blocks --score pooled --tilt" "$some --density .3"
check "score and mask as in attend: causal" cmp_stages "$blocks --score antidiagonal --stride 16 --causal" \
    "$some --mask threshold --inclusive --causal --sink --diagonal --sim-min .7,.6,.5"
for options in "--skip-mean" "--causal" "--order gilbert --grid 8,8,8" "--order hybrid --grid 8,8,8"; do
    check "$options" attend saved $d64 $some $options --save-levels "$tmp/saved_levels.npy"
    check "$options: the same bits from --levels" attends_as saved $d64 $some $options \
        --levels "$tmp/saved_levels.npy"
done
{ npy "<i4" "1, 2, 16, 32" && data "$tmp/saved_levels.npy" | sed 's/\(.\)/\1\x00\x00\x00/g'; } >"$tmp/int32_levels.npy"
check "int32 levels" attends_as saved $d64 $blocks --order hybrid --grid 8,8,8 --levels "$tmp/int32_levels.npy"

echo "# threads, seed"
whole="$d64 $some --score-norm --order hybrid --grid 8,8,8"
check "one thread" attend one $whole --threads 1 --save-scores "$tmp/s1.npy" --save-levels "$tmp/l1.npy"
for n in 2 5; do
    check "$n threads: out and lse" attends_as one $whole --threads $n --save-scores "$tmp/s.npy" \
        --save-levels "$tmp/l.npy"
    check "$n threads: scores" cmp "$tmp/s1.npy" "$tmp/s.npy"
    check "$n threads: levels" cmp "$tmp/l1.npy" "$tmp/l.npy"
done
check "another seed" psa score $qk $blocks --seed 18446744073709551615 --out "$tmp/s2.npy"
check "the same seed" makes "$tmp/s2.npy" score $qk $blocks --seed 18446744073709551615
check "no seed" psa score $qk $blocks --out "$tmp/s3.npy"
check "other seeds give other scores" differ "$tmp/s2.npy" "$tmp/s3.npy"

echo "# orders and dense attention"
check "dense" attend dense $d64 --mask dense
check "every block at level 1" attends_near "$tmp/dense" $d64 --level-end 1
for order in "gilbert --grid 8,8,8" "gilbert --grid 5,10,10 --prefix 9 --suffix 3" "tile --grid 8,8,8 --tile 3,5,4" \
    "semantic --clusters 9" "hybrid --grid 4,8,16"; do
    check "$order" attends_near "$tmp/dense" $d64 --mask dense --order $order
done
check "sparse" attend sparse $d64 $some
check "sparse is not dense" differ "$tmp/dense.npy" "$tmp/sparse.npy"
check "the order changes what is skipped" attend ordered $d64 $some --order gilbert --grid 8,8,8
check "the order changes what is skipped: so the result" differ "$tmp/sparse.npy" "$tmp/ordered.npy"

echo "# trees, tilt, predicted error, density"
for order in tree tree_kv "tree_kv --grid 8,8,8" "tree --metric euclid" "tree --prefix 9 --suffix 3"; do
    check "$order, every block at level 1" attend level1 $d64 --level-end 1 --order $order
    check "$order, every block at level 1: dense" near "$tmp/dense.npy" "$tmp/level1.npy" 4e-6 # both have the bound
done
check "tree" attend tree $d64 $some --order tree
check "tree: not the raster's result" differ "$tmp/sparse.npy" "$tmp/tree.npy"
check "tree, Euclid's metric" attend euclid $d64 $some --order tree --metric euclid
check "tree, Euclid's metric: another order" differ "$tmp/euclid.npy" "$tmp/tree.npy"
check "tilt" attend tilt $d64 $some --tilt
check "tilt: another result" differ "$tmp/sparse.npy" "$tmp/tilt.npy"
recipe="$d64 $blocks --order tree --tilt --mask error --density .2"
check "recipe" attend recipe $recipe --save-levels "$tmp/recipe_levels.npy" --threads 1
check "recipe: threads" attends_as recipe $recipe --threads 3
check "recipe: the same bits from --levels" attends_as recipe $recipe --levels "$tmp/recipe_levels.npy"
for options in "" "--mask threshold" "--mask error" "--budget head" "--mask error --budget head --skip-mean"; do
    check "--density .25 $options" prints "^density 0\.2[45]" psa attend $d64 $blocks --density .25 $options --out \
        "$tmp/out.npy"
done
check "--lambda: all is worth its price" attends_near "$tmp/dense" $d64 $blocks --mask error --lambda 1e-14
check "--lambda: one mean of a row is" prints "^density 0\.0020" psa attend $d64 $blocks --mask error --lambda 1e4 --out \
    "$tmp/out.npy"
check "--lambda is for mask error" refused "lambda 0.1: expected a price for mask ERROR" --lambda .1
check "--lambda or --density" refused "lambda 0.1: expected a price" --mask error --lambda .1 --density .2
check "trees are not causal" refused "a token order cannot be causal" --order tree --causal
check "mask error is not causal" refused "without causality" --mask error --causal
check "mask error needs groups" refused "groups of at least 2 keys" --mask error --score-group 8,1
check "no such metric" refused "metric" --metric cosine
check "no such budget" refused "budget" --budget block

echo "# presets"
for preset in $(psa info | awk 'begun > 1 { print $1 } begun { begun++ } /^presets:/ { begun = 1 }'); do
    check "$preset" attend preset $d64 --preset "$preset" --order none
done
check "paper-25" attend preset $d64 --preset paper-25 --order none
check "paper-25 is what it says" attends_as preset $d64 --level-end .15,.25,.45
check "paper-25 in its order" attend preset $d64 --preset paper-25 --grid 8,8,8
check "paper-25 in its order: the same by hand" attends_as preset $d64 --level-end .15,.25,.45 --order gilbert \
    --grid 8,8,8
check "paper-25 with other blocks" attend preset $d64 --preset paper-25 --order none --block-k 32
check "an option overrides the preset after it" attends_as preset $d64 --block-k 32 --order none --preset paper-25
check "a preset's order needs a grid" refused "order 'gilbert' of preset wan2.1-14b needs --grid" --preset wan2.1-14b

echo "# shapes and types"
head=$((512 * 64 * 4))
for t in q k v; do
    file=$golden/attention/d64_$t.npy
    { npy "<f4" "512, 64" && data "$file" | head -c $head; } >"$tmp/${t}2d.npy"
    { npy "<f4" "1, 2, 512, 64" && data "$tmp/${t}2d.npy" && data "$tmp/${t}2d.npy"; } >"$tmp/${t}twice.npy"
    { npy "<f4" "2, 512, 64" && data "$file"; } >"$tmp/${t}3d.npy"
    { npy "<f4" "512, 1, 64" && data "$tmp/${t}2d.npy"; } >"$tmp/${t}one.npy"
    printf '\223NUMPY\002\000t\000\000\000%-115s\n' \
        '{"shape":(1,2,512,64,),"fortran_order":False,"descr":"<f4"}' >"$tmp/${t}v2.npy"
    data "$file" >>"$tmp/${t}v2.npy"
done
check "version 2.0, keys in another order" attends_as sparse --q "$tmp/qv2.npy" --k "$tmp/kv2.npy" --v "$tmp/vv2.npy" \
    $some
renamed() { { npy "<f4" "$3" && data "$1"; } | cmp - "$2"; }
check "3-D" attend 3d --q "$tmp/q3d.npy" --k "$tmp/k3d.npy" --v "$tmp/v3d.npy" $some
check "3-D: out" renamed "$tmp/sparse.npy" "$tmp/3d.npy" "2, 512, 64"
check "3-D: lse" renamed "$tmp/sparse_lse.npy" "$tmp/3d_lse.npy" "2, 512"
check "2-D" attend 2d --q "$tmp/q2d.npy" --k "$tmp/k2d.npy" --v "$tmp/v2d.npy" $some
{ npy "<f4" "512, 64" && data "$tmp/sparse.npy" | head -c $head; } >"$tmp/head.npy"
{ npy "<f4" "512," && data "$tmp/sparse_lse.npy" | head -c 2048; } >"$tmp/head_lse.npy"
check "2-D: out of the first head" cmp "$tmp/head.npy" "$tmp/2d.npy"
check "2-D: lse of the first head" cmp "$tmp/head_lse.npy" "$tmp/2d_lse.npy"
check "GQA: heads of the same keys" attend gqa --q "$golden/attention/d64_q.npy" --k "$tmp/ktwice.npy" \
    --v "$tmp/vtwice.npy" $some
check "GQA: one head of keys" attends_as gqa --q "$golden/attention/d64_q.npy" --k "$tmp/k2d.npy" \
    --v "$tmp/v2d.npy" $some

check "2-D, dense" attend dense2d --q "$tmp/q2d.npy" --k "$tmp/k2d.npy" --v "$tmp/v2d.npy" --mask dense

# A token that is alone in its head attends to itself: out is v in the type of q, as the library rounds.
for type in f16 bf16; do
    [ $type = f16 ] && descr="<f2" error=0.005 || descr="<u2" error=0.05
    { npy "$descr" "512, 1, 64" && zeros $((head / 2)); } >"$tmp/nought.npy"
    for t in q k v; do
        check "$t in $type" attend $t --q "$tmp/nought.npy" --k "$tmp/kone.npy" --v "$tmp/${t}one.npy"
        { npy "$descr" "512, 64" && data "$tmp/$t.npy"; } >"$tmp/${t}short.npy"
    done
    check "files in $type" attend short --q "$tmp/qshort.npy" --k "$tmp/kshort.npy" --v "$tmp/vshort.npy" $some
    check "--type $type" attends_as short --q "$tmp/q2d.npy" --k "$tmp/k2d.npy" --v "$tmp/v2d.npy" --type $type $some
    check "$type and back" attend long --q "$tmp/qshort.npy" --k "$tmp/kshort.npy" --v "$tmp/vshort.npy" --type f32 \
        --mask dense
    check "$type and back: near float32" near "$tmp/dense2d.npy" "$tmp/long.npy" $error
done

echo "# pictures and reports"
check "picture" psa attend $d64 $some --out "$tmp/out.npy" --png "$tmp/a.png"
check "picture: PNG" picture "$tmp/a.png"
check "picture again" psa attend $d64 $some --out "$tmp/out.npy" --png "$tmp/b.png" --threads 3
check "picture again: the same" cmp "$tmp/a.png" "$tmp/b.png"
check "picture of another map" psa attend $d64 $some --causal --out "$tmp/out.npy" --png "$tmp/c.png"
check "picture of another map: PNG" picture "$tmp/c.png"
check "picture of another map: another" differ "$tmp/a.png" "$tmp/c.png"
check "statistics" psa attend $d64 $some --out "$tmp/out.npy" --stats "$tmp/stats.json" --compare
check "statistics: JSON" json "$tmp/stats.json" B Hq Hkv Nq Nk D Dv nq nk density sparsity mul_adds dense_mul_adds \
    pairs level_blocks head_density seconds total dense threads isa
# level-end .2,.3,.5,.8 of 32 blocks: 6, 3, 7 and 9 at levels 1, 2, 4, 8; in 2 heads of 16 query blocks
check "statistics: density" grep -q '"density":.0.3242' "$tmp/stats.json"
check "statistics: blocks of level 4" grep -q '"4":.224' "$tmp/stats.json"
check "statistics: work" grep -q '"mul_adds":.2[0-9]*,' "$tmp/stats.json"
check "compare" prints "relative error  *0\.[0-9]" psa attend $d64 $some --out "$tmp/out.npy" --compare
check "compare: dense with dense" prints "relative error  *0  *L2" psa attend $d64 --mask dense --out "$tmp/out.npy" \
    --compare
check "info" prints "^psa [0-9]" psa info
check "info: the recipe" prints "^  recipe .* error *tree *density 0.15$" psa info
check "help" prints "psa attend" psa help
for command in attend score mask order bench; do
    check "$command --help" prints "^psa $command" psa $command --help
done

echo "# bench"
tiny="--n 256 --d 64 --heads 1 --threads 2"
bench_row() { grep -c "\"topic\":.\"$1\"" "$tmp/bench.json"; }
# bench_rows TOPIC COUNT ARGUMENTS...: as many rows, and no other topic's
bench_rows() {
    topic=$1 count=$2
    shift 2
    psa bench --topic "$topic" --json "$@" >"$tmp/bench.json" && [ "$(bench_row "$topic")" -eq "$count" ] &&
        [ "$(grep -c '"topic"' "$tmp/bench.json")" -eq "$count" ]
}
# ratios COUNT: rows that have a base
ratios() { [ "$(grep -c '"ratio"' "$tmp/bench.json")" -eq "$1" ]; }
# bench_value KEY NAME: the median of KEY in the row of that name
bench_value() {
    awk -v key="\"$1\":" -v name="\"$2\"" '
        /"name":/ { mine = index($0, name) }
        mine && index($0, key) { inside = 1 }
        inside && /"median":/ { print $2 + 0; exit }' "$tmp/bench.json"
}
check "bench" psa bench --n 256,300 --d 64,80 --heads 2 --density .3 --threads 2 --type f16 --json
cp "$tmp/log" "$tmp/bench.json"
check "bench: JSON" json "$tmp/bench.json" cpu compiler flags threads isa block_k density_asked rows topic name n d \
    type repeats seconds bytes median min max gflops gbytes_per_second ns_per_token ratio at_least at_most met density \
    relative_error largest_error
for shown in "dense peak" "call error.against.dense" "density block.128,.all.levels" "decode threads.2:.queries.16" \
    "linear ns/token" "head-size dense" "threads threads.2:.whole.call.*>=.1.9" "memory f16,.whole.call"; do
    check "bench: all topics: ${shown% *}" [ "$(bench_row "${shown% *}")" -gt 0 ]
    check "bench: $shown" prints "${shown#* }" psa bench --topic "${shown% *}" $tiny
done
check "bench: scalar code when asked" prints "scalar f32" psa bench --topic dense $tiny --isa scalar --type f32
check "bench: two topics" prints "^memory: " psa bench --topic call,memory $tiny
check "bench: rows of call" bench_rows call 8 $tiny
check "bench: rows of call against another" ratios 7
check "bench: rows of recipe" bench_rows recipe 17 $tiny
check "bench: rows of recipe against dense" ratios 16
check "bench: rows of density" bench_rows density 16 $tiny --block-k 32
check "bench: rows of density against dense" ratios 15
check "bench: rows of decode" bench_rows decode 14 $tiny --type bf16
check "bench: rows of decode against reading" ratios 10
check "bench: rows of linear" bench_rows linear 18 $tiny --n 256,300,512
check "bench: rows of linear against the first" ratios 12
check "bench: rows of head-size" bench_rows head-size 4 $tiny --d 48,64,80,128
check "bench: rows of head-size against neighbours" ratios 2
check "bench: rows of threads" bench_rows threads 9 $tiny --threads 3
check "bench: rows of threads against one" ratios 6
check "bench: rows of memory" bench_rows memory 2 $tiny --type f32
# K and V of 256 x 64 floats, 2 x 4 block pairs, 2 threads
check "bench: memory allowed" [ "$(bench_value bytes "f32, allowance")" = 2228232 ]
same_ratio() {
    awk -v bytes="$(bench_value bytes "f32, whole call")" -v ratio="$(bench_value ratio "f32, whole call")" '
        BEGIN { error = bytes / 2228232 - ratio; exit !(ratio > 0 && error < 1e-5 && error > -1e-5) }'
}
check "bench: memory ratio" same_ratio
check "bench: head size" rejected "expected a multiple of 8" psa bench --n 256 --d 12
check "bench: block size" rejected "block-k 48: expected 16, 32, 64 or 128" psa bench --n 256 --block-k 48
check "bench: lists" rejected "n '256,': expected N,..." psa bench --n 256,
check "bench: no memory" rejected "not enough memory for the tensors" psa bench --topic recipe --json --d 256 \
    --n 16777216 --heads 64
check "bench: topics" rejected "topic 'call,speed': expected some of dense, call, recipe, density" psa bench --topic call,speed
for option in "--d 7" "--d 264" "--n 0" "--heads 0" "--heads x" "--density 0" "--density 1.01" "--threads 0" \
    "--type f64" "--isa sse9"; do
    check "bench $option" rejected "${option% *} '${option#* }': expected" psa bench $option
done

echo "# commands and options"
check "unknown command" rejected "unknown command 'paint'; known: attend" psa paint
check "no gradients yet" rejected "unknown command 'grad'" psa grad --q "$golden/backward/q.npy"
no_command() {
    psa 2>"$tmp/stderr" >"$tmp/stdout"
    [ $? -eq 2 ] && [ ! -s "$tmp/stdout" ] && grep -q "psa attend" "$tmp/stderr"
}
check "no command" no_command
check "unknown option" refused "unknown option '--fast'; known: .*--block-q" --fast
check "a word" refused "unknown option 'fast'" fast
check "another command's option" rejected "unknown option '--levels'" psa score $qk --out "$made/s.npy" \
    --levels "$tmp/l.npy"
check "info takes none" rejected "unknown option '--all'" psa info --all
check "no value" refused "threads needs a value" --threads
check "no inputs" rejected "q FILE is required" psa attend --out "$made/out.npy"
check "no values" rejected "v FILE is required" psa attend $qk --out "$made/out.npy"
for command in "attend $d64" "score $qk" "mask --scores $golden/mask/scores.npy" "order --order tile --grid 2,2,2"; do
    check "${command%% *}: no --out" rejected "out FILE is required" psa $command
done
check "mask: no scores" rejected "scores FILE is required" psa mask --out "$made/l.npy"
check "mask: cap without keys" rejected "sim-min needs --k" psa mask --scores "$golden/mask/scores.npy" --sim-min .5 \
    --out "$made/l.npy"
check "order: none" rejected "order gilbert or --order tile" psa order --grid 2,2,2 --out "$made/o.npy"
check "order: semantic" rejected "order gilbert or --order tile" psa order --order semantic --grid 2,2,2 --out \
    "$made/o.npy"
check "order: no grid" rejected "grid T,H,W is required" psa order --order gilbert --out "$made/o.npy"
check "order: too many tokens" rejected "too many tokens" psa order --order gilbert --grid 65536,65536,2 --out \
    "$made/o.npy"
check "a grid that is not N" refused "with 0 prefix and 0 suffix tokens it does not make N = 512" --order gilbert \
    --grid 8,8,7
check "orders are not causal" refused "causal" --causal --order gilbert --grid 8,8,8
psa info | grep -q "^CUDA: built without" && check "cuda" refused "cuda: built without CUDA" --backend cuda
check "scores of nothing" refused "nothing is scored" --mask dense --save-scores "$made/s.npy"

while read -r option value; do
    check "$option $value" refused "^psa attend: $option '$value': expected" "$option" "$value"
done <<EOF
--block-q 0
--block-q -16
--block-q 1x
--block-q 64.0
--block-q 0x40
--block-q 99999999999999999999
--block-k +16
--stride 0
--clusters 0
--threads 0
--threads 4097
--prefix -1
--suffix 1e3
--suffix 9999999999999999999
--seed -1
--seed 18446744073709551616
--seed 0x1
--sample 0
--sample 1.01
--sample -0.5
--sample nan
--sample inf
--sample .5.5
--sample 0x1p-2
--sample 1e-999
--min-full -0.1
--min-full 1.5
--scale 0
--scale 1e-60
--scale 1e31
--scale -inf
--level-end 0,0
--level-end .1,,.2
--level-end .1,
--level-end .1,1.1
--level-end -.1,.2
--level-end 1,1,1,1,1,1,1,1,1
--level-count 0
--level-count 1.5,2
--level-count -1,2
--sim-min x
--sim-min .1,.1,.1,.1,.1,.1,.1,.1
--grid 8,8
--grid 8,8,8,1
--grid 8,0,64
--tile 2,8
--score best
--mask sparse
--order hilbert
--isa sse9
--type f64
--backend gpu
--preset none
EOF
check "--sample with no text" refused "sample '': expected" --sample ""
check "--out with no text" rejected "out '': expected FILE" psa attend $d64 --out ""

echo "# settings that the library rejects"
while read -r what options; do
    check "$options" refused "$what" $options
done <<EOF
block_q --block-q 8
block_q --block-q 257
block_k --block-k 48
block_k --block-k 256
level_end --level-end .3,.2
stride --score antidiagonal --stride 48
EOF

echo "# .npy files"
q=$golden/attention/d64_q.npy
size=$(wc -c <"$q")
# bad NAME TEXT SHELL: what the shell code prints, as --q
bad() {
    eval "$3" >"$tmp/bad.npy"
    check "$1" refused "^psa attend: $tmp/bad.npy: .*$2" --q "$tmp/bad.npy"
}
bad "empty" "not a .npy file" ":"
bad "cut in the magic" "not a .npy file" 'head -c 5 "$q"'
bad "cut in the length" "truncated .npy header" 'head -c 9 "$q"'
bad "cut in the header" "truncated .npy header" 'head -c 100 "$q"'
bad "no data" "truncated, 0 bytes" 'head -c 128 "$q"'
bad "a byte short" "truncated, 262143 bytes of data where the shape needs 262144" 'head -c $((size - 1)) "$q"'
bad "a byte more" "trailing bytes, 262145" 'cat "$q"; echo'
bad "bad magic" "not a .npy file" 'printf "\223NUMPI"; tail -c +7 "$q"'
bad "version 3.0" "unknown .npy version" 'printf "\223NUMPY\003"; tail -c +8 "$q"'
bad "version 1.1" "unknown .npy version" 'printf "\223NUMPY\001\001"; tail -c +9 "$q"'
bad "a .npz" "not a .npy file" 'printf "PK\003\004"; zeros 1000'
bad "Fortran order" "Fortran order; expected C order" 'sed "1s/False/True /" "$q"'
bad "big endian" "element type '>f4'" 'sed "1s/<f4/>f4/" "$q"'
bad "float64" "element type '<f8'; expected float32" 'npy "<f8" "512, 64"; data "$q"'
bad "uint8" "element type '|u1'; expected float32" 'npy "|u1" "512, 64"; zeros 32768'
bad "complex" "element type '<c8'" 'npy "<c8" "512, 64"; data "$q"'
bad "1-D" "1 axes; expected 2 to 4" 'npy "<f4" "65536,"; data "$q"'
bad "5-D" "5 axes; expected 2 to 4" 'npy "<f4" "1, 1, 2, 512, 64"; data "$q"'
bad "9-D" "damaged .npy header" 'npy "<f4" "1, 1, 1, 1, 1, 1, 2, 512, 64"; data "$q"'
bad "an axis of length 0" "an axis of length 0" 'npy "<f4" "1, 2, 0, 64"'
bad "a negative axis" "damaged .npy header" 'npy "<f4" "1, 2, -512, 64"; data "$q"'
bad "a shape beyond memory" "the shape is too large" 'npy "<f4" "4294967296, 4294967296, 64"; data "$q"'
bad "a number that does not fit" "damaged .npy header" 'npy "<f4" "99999999999999999999, 64"; data "$q"'
bad "a number for a shape" "damaged .npy header" 'npy "<f4" "65536"; data "$q"'
bad "no dictionary" "damaged .npy header" 'sed "1s/{/(/" "$q"'
bad "a key twice" "damaged .npy header" 'sed "1s/fortran_order.: False/descr\": \"<f4\"      /" "$q"'
bad "an unknown key" "damaged .npy header" 'sed "1s/shape/shope/" "$q"'
bad "text after the dictionary" "damaged .npy header" 'sed "1s/}  /}x /" "$q"'
check "no such file" refused "none.npy: No such file" --q "$tmp/none.npy"
check "a directory" refused "$tmp: " --q "$tmp"

# q, k and v do not fit: shaped NAME TEXT OPTION SHAPE BYTES
shaped() {
    { npy "<f4" "$4" && zeros "$5"; } >"$tmp/shaped.npy"
    check "$1" refused "$2" "$3" "$tmp/shaped.npy"
}
shaped "k of another head size" "head size D is 128; expected 64 as in $q" --k "2, 256, 128" 262144
shaped "k of another batch" "batch size B is 2; expected 1" --k "2, 1, 512, 64" 262144
shaped "v of another length" "token count N is 511; expected 512 as in .*_k.npy" --v "2, 511, 64" 261632
shaped "v of another number of heads" "head count H is 1; expected 2" --v "1, 1, 512, 64" 131072
shaped "k and v of 3 heads for q of 2" "head count H is 2; expected 3" --k "3, 512, 64" 393216
shaped "queries that keys' heads do not divide" "Hq\|heads" --q "3, 512, 64" 393216
shaped "head size 60" "head size\|D is\|ne\[0\]" --q "2, 512, 60" 245760
check "v of another type" refused "element type bf16; expected f32 as in .* (or --type)" --q "$tmp/q2d.npy" \
    --k "$tmp/k2d.npy" --v "$tmp/short.npy"

echo "# maps"
levels_file() {
    { npy "$1" "$2" && shift 2 && cat "$@"; } >"$tmp/map.npy"
}
zeros 32 >"$tmp/32"
{ zeros 31 && printf '\003'; } >"$tmp/31and3"
{ zeros 31 && printf '\200'; } >"$tmp/31and128"
levels_file "|u1" "1, 2, 4, 8" "$tmp/32" "$tmp/32"
check "nothing to see" attend nothing $d64 --levels "$tmp/map.npy"
{ npy "<f4" "1, 2, 512, 64" && zeros 262144; } >"$tmp/zeros.npy"
check "nothing to see: zeros" cmp "$tmp/zeros.npy" "$tmp/nothing.npy"
levels_file "|u1" "1, 2, 8, 4" "$tmp/32" "$tmp/32"
check "levels of another shape" refused "shape \[1,2,8,4\]; expected .* = \[1,2,4,8\] for blocks of 128 .* and 64" \
    --levels "$tmp/map.npy"
levels_file "|u1" "2, 4, 8" "$tmp/32" "$tmp/31and3"
check "level 3" refused "level" --levels "$tmp/map.npy"
levels_file "|u1" "2, 4, 8" "$tmp/32" "$tmp/31and128"
check "a level beyond block_k" refused "level" --levels "$tmp/map.npy"
levels_file "<i4" "2, 4, 2" "$tmp/32" "$tmp/31and3"
check "an int32 level beyond all" refused "map.npy: level 50331648; expected 0 or a power of two" \
    --levels "$tmp/map.npy"
levels_file "<f4" "2, 4, 2" "$tmp/32" "$tmp/32"
check "float32 levels" refused "map.npy: element type '<f4'; expected uint8 or int32" --levels "$tmp/map.npy"
check "uint8 scores" rejected "element type '|u1'; expected float32" psa mask --out "$made/l.npy" \
    --scores "$golden/attention/d64_levels.npy"
check "scores for keys of another batch" rejected "batch size B is 1; expected 3" psa mask --out "$made/l.npy" \
    --scores "$golden/mask/scores.npy" --k "$golden/similarity/k.npy"
check "scores for other blocks" rejected "shape \[1,1,4,4\]; expected .* = \[1,1,4,8\]" psa mask --out "$made/l.npy" \
    --scores "$golden/score_sample/score_128_128.npy" --k "$golden/score_sample/k.npy"

echo "# outputs"
check "no such folder" rejected "cannot write: No such file" psa attend $d64 --out "$made/none/out.npy"
check "a file for a folder" rejected "cannot write: Not a directory" psa score $qk --out README.md/s.npy
check "a folder" rejected "cannot write: not a regular file" psa order --order gilbert --grid 2,2,2 --out "$tmp"
check "a device" rejected "cannot write: not a regular file" psa mask --scores "$golden/mask/scores.npy" --out /dev/null
check "two outputs of one name" refused "two outputs have this name" --png "$made/out.npy"
check "two outputs of one name, spelt differently" refused "two outputs have this name" --png "$made/./out.npy"
for option in --lse --save-scores --save-levels --stats --png; do
    check "$option cannot be written" rejected "/none/x: cannot write" psa attend $d64 --out "$made/out.npy" $option \
        /none/x
    check "$option cannot be created" rejected "/proc/x: cannot write" psa attend $d64 --out "$made/out.npy" $option \
        /proc/x
done
echo old >"$tmp/old.npy"
survives() {
    psa attend $d64 --out "$tmp/old.npy" --lse /proc/x
    [ $? -eq 2 ] && [ "$(cat "$tmp/old.npy")" = old ]
}
check "an earlier file survives an error" survives
check "an earlier file is replaced" psa attend $d64 $some --out "$tmp/old.npy"
check "an earlier file is replaced: whole" cmp "$tmp/sparse.npy" "$tmp/old.npy"
no_temporary() { ! ls "$tmp" | grep -E '(npy|png|json)\.[0-9]'; }
check "no temporary file stays" no_temporary
full() {
    psa info >/dev/full
    [ $? -eq 2 ]
}
[ ! -e /dev/full ] || check "stdout cannot be written" full

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
