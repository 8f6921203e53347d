#!/bin/sh
# The demo: build/clips draws what it says, and build/classify with the trained model of examples/data gives the answers
# of the reference implementation, with every way of feeding it. Needs build/classify, build/clips and build/npydiff.
cd "$(dirname "$0")/.." || exit 1
. tests/check.sh
model=examples/data/model
golden=tests/data/demo

classify() { "$build/classify" "$@"; }
clips() { "$build/clips" "$@"; }

# near GOLDEN BOUND ARGUMENTS...: the logits with these arguments are these
near() {
    expected=$1 bound=$2
    shift 2
    classify "$model" "$@" --logits "$tmp/logits.npy" && "$build/npydiff" "$expected" "$tmp/logits.npy" "$bound"
}

# at_least BOUND KEY FILE: the first number under this key in a JSON report is at least this
at_least() {
    value=$(sed -n "s/^.*\"$2\":[[:space:]]*\([-0-9.e+]*\).*/\1/p" "$3" | head -n 1)
    echo "$2: $value, expected at least $1"
    awk "BEGIN { exit !(\"$value\" != \"\" && $value + 0 >= $1) }"
}

echo "# clips"
check "a clip" sh -c "$build/clips --seed 7 $tmp/seven.y4m >$tmp/label"
check "the same everywhere" [ "$(cksum <"$tmp/seven.y4m")" = "$(cat "$golden/seven.cksum")" ]
check "its label" grep -qx "$(cat "$golden/seven.label")" "$tmp/label"
check "training clips: a byte and RGB frames each" \
    [ "$(clips --size 32 --frames 4 --digit 16 --count 3 - | wc -c)" -eq $((3 * (1 + 4 * 32 * 32 * 3))) ]
head -n 21 examples/data/eval.csv >"$tmp/list.csv"
mkdir "$tmp/eval"
check "20 clips of the evaluation list" clips --list "$tmp/list.csv" "$tmp/eval"
check "20 files" [ "$(ls "$tmp/eval" | wc -l)" -eq 20 ]
printf 'a.y4m,9 moving up,1000001\n' >"$tmp/wrong.csv"
check "a label that is not the seed's" rejected 'line 1: seed 1000001 is a clip of "4 moving left"' \
    clips --list "$tmp/wrong.csv" "$tmp/eval"
printf 'a.y4m\n' >"$tmp/short.csv"
check "a line without a seed" rejected "line 1: expected file,label,seed" clips --list "$tmp/short.csv" "$tmp/eval"
check "no file" rejected "expected one FILE.y4m" clips
check "a bad number" rejected "expected a whole number from 16" clips --size 3 "$tmp/a.y4m"
check "a folder that is not there" rejected "cannot write" clips "$tmp/none/a.y4m"
check "pictures that are none" rejected "cannot read the pictures" clips --digits README.md "$tmp/a.y4m"

echo "# evaluation"
eval="--eval $tmp/list.csv --root $tmp/eval"
check "20 clips, dense: the reference's logits" near "$golden/logits.npy" 5e-5 $eval --dense
check "20 clips: top-1 is right" sh -c "$build/classify $model $eval --compare --json --order gilbert \
    --score-norm >$tmp/report"
check "top-1 of PSA" at_least 0.8 top1 "$tmp/report"
check "top-1 agrees with dense" at_least 0.9 agreement "$tmp/report"
check "20 clips, the recipe" sh -c "$build/classify $model $eval --compare --json --preset recipe >$tmp/report"
check "top-1 of the recipe" at_least 0.8 top1 "$tmp/report"
check "its top-1 agrees with dense" at_least 0.9 agreement "$tmp/report"
check "text report" prints "top-1, % (95 % interval)" classify "$model" $eval --limit 2 --dense
cp "$tmp/list.csv" "$tmp/eval/"
check "relative to the list" classify "$model" --eval "$tmp/eval/list.csv" --limit 1
check "the first 3" prints '"clips":.*3,' classify "$model" $eval --limit 3 --dense --json
printf '"0001.y4m","4 moving left"\n\n# comment\n0001.y4m,16\n0001.y4m,17\n' >"$tmp/numbers.csv"
check "quotes, comments, label numbers" prints '"top1":.*0.6666' classify "$model" --eval "$tmp/numbers.csv" \
    --root "$tmp/eval" --json
printf '0001.y4m,4 moving left\nnone.y4m,4 moving left\n' >"$tmp/unread.csv"
unread() {
    classify "$model" --eval "$tmp/unread.csv" --root "$tmp/eval" --json >"$tmp/out" 2>"$tmp/stderr"
    [ $? -eq 2 ] && grep -q "none.y4m: No such file" "$tmp/stderr" && grep -q '"unread":.*1,' "$tmp/out"
}
check "a video that cannot be read: said, counted, status 2" unread
printf '0001.y4m,eleven\n' >"$tmp/eleven.csv"
check "an unknown label" rejected 'line 1: "eleven" is not a label' classify "$model" --eval "$tmp/eleven.csv"
printf '0001.y4m\n' >"$tmp/nolabel.csv"
check "no label" rejected "line 1: expected path,label" classify "$model" --eval "$tmp/nolabel.csv"
printf '# nothing\n' >"$tmp/empty.csv"
check "an empty list" rejected "the list is empty" classify "$model" --eval "$tmp/empty.csv"
check "nothing can be read" sh -c "$build/classify $model --eval $tmp/list.csv --root $tmp 2>&1 | tail -n 1 |
    grep -q 'no video of the list could be read'"
check "limit without a list" rejected "no use without --eval" classify "$model" "$tmp/seven.y4m" --limit 3

echo "# clips, crops, folders, types"
check "one clip" classify "$model" "$tmp/seven.y4m" --dense --logits "$tmp/seven.npy"
check "f16 q, k and v" near "$tmp/seven.npy" 0.02 "$tmp/seven.y4m" --dense --type f16
check "bf16 q, k and v" near "$tmp/seven.npy" 0.2 "$tmp/seven.y4m" --dense --type bf16
mkdir "$tmp/folder"
cp "$tmp/eval/0001.y4m" "$tmp/eval/0002.y4m" "$tmp/folder/"
echo text >"$tmp/folder/readme.txt"
check "a folder and a video" prints "top-1 agrees on [23] of 3 inputs" classify "$model" "$tmp/folder" \
    "$tmp/seven.y4m" \
    --compare
mkdir "$tmp/bare"
check "a folder without videos" rejected "the folder holds no videos" classify "$model" "$tmp/bare"
check "a short video, spread" rejected "expected at least 64 frames, found 32" classify "$model" "$tmp/seven.y4m" \
    --num-frames 64
check "a short video, with a stride: its last frame repeats" classify "$model" "$tmp/seven.y4m" --num-frames 64 \
    --frame-stride 1
if command -v ffmpeg >/dev/null; then
    # Every frame twice: the two interleaved clips, and one of stride 2 from the start, are the clip itself.
    check "twice" ffmpeg -nostdin -v error -i "$tmp/seven.y4m" -vf fps=32 "$tmp/twice.y4m"
    check "two clips interleave" near "$tmp/seven.npy" 1e-5 "$tmp/twice.y4m" --dense --clips 2
    check "stride 2" near "$tmp/seven.npy" 1e-5 "$tmp/twice.y4m" --dense --frame-stride 2
    check "two clips, three crops" prints "2 clips x 3 crops" classify "$model" "$tmp/twice.y4m" --clips 2 --crops 3
    for way in hstack vstack; do
        check "$way" ffmpeg -nostdin -v error -y -i "$tmp/seven.y4m" -i "$tmp/seven.y4m" -i "$tmp/seven.y4m" \
            -filter_complex $way=3 "$tmp/$way.y4m"
        check "$way: three crops are three times the clip" near "$tmp/seven.npy" 1e-5 "$tmp/$way.y4m" --dense --crops 3
    done
fi

echo "# memory"
# lean ARGUMENTS...: the program's own code aside, the peak is at most 1.2 times weights and activations together
lean() {
    classify "$model" "$@" --threads 2 --json >"$tmp/report" || return 1
    sed -n 's/^.*"\(.*\)_bytes":[[:space:]]*\([0-9.e+]*\).*/\1 \2/p' "$tmp/report" >"$tmp/bytes"
    cat "$tmp/bytes"
    awk '{ n[$1] = $2 }
         END { exit !(n["program"] && n["peak"] - n["program"] <= 1.2 * (n["weights"] + n["activations"])) }' "$tmp/bytes"
}
check "PSA" lean "$tmp/seven.y4m"
check "dense" lean "$tmp/seven.y4m" --dense
check "bf16" lean "$tmp/seven.y4m" --type bf16
check "both, of 20 videos" lean "$tmp/eval" --compare
check "with pictures" lean "$tmp/seven.y4m" --png "$tmp/png0"

echo "# pictures"
check "pictures" classify "$model" "$tmp/seven.y4m" --order gilbert --compare --png "$tmp/png"
for name in frames levels density summary; do
    check "$name.png" sh -c "head -c 4 $tmp/png/$name.png | grep -q PNG"
done
check "another query" classify "$model" "$tmp/seven.y4m" --query 0,1,3,8,8 --png "$tmp/png2"
check "it is another picture" sh -c "! cmp -s $tmp/png/frames.png $tmp/png2/frames.png"
check "no such layer" rejected "below 5,2,16,16,16" classify "$model" "$tmp/seven.y4m" --query 5,1,3,8,8 --png "$tmp/p3"
check "dense" rejected "exclude each other" classify "$model" "$tmp/seven.y4m" --dense --png "$tmp/p3"
check "two videos" rejected "exactly one video" classify "$model" "$tmp/seven.y4m" "$tmp/seven.y4m" --png "$tmp/p3"
check "nothing was made" [ ! -e "$tmp/p3" ]
check "a file in the way" rejected "seven.y4m" classify "$model" "$tmp/seven.y4m" --png "$tmp/seven.y4m"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
