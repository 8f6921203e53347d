#!/bin/sh
# Runs build/classify on the tiny checkpoints in tests/data/models: goldens, videos, and everything that can be wrong
# with its input. Needs build/classify and build/npydiff; the checks of compressed video need ffmpeg as well.
cd "$(dirname "$0")/.." || exit 1
. tests/check.sh
models=tests/data/models
clip=tests/data/clip.mp4
mae=$models/videomae-tiny-d64-f32
jepa=$models/vjepa2-tiny-d32-f32
sharded=$models/vjepa2-tiny-d64-f16-sharded

classify() { "$build/classify" "$@"; }
near() { "$build/npydiff" "$@"; }
to_file() { classify "$@" --logits "$made/logits.npy"; }

# dense GOLDEN BOUND ARGUMENTS...: the logits with these arguments are the golden ones
dense() {
    golden=$1 bound=$2
    shift 2
    classify "$@" --logits "$tmp/logits.npy" && near "$golden" "$tmp/logits.npy" "$bound"
}

# pixels GOLDEN BOUND ARGUMENTS...: the same for the model's input
pixels() {
    golden=$1 bound=$2
    shift 2
    classify "$@" --save-pixels "$tmp/pixels.npy" && near "$golden" "$tmp/pixels.npy" "$bound"
}

# variant MODEL FILE EDIT: $tmp/model is a copy of the checkpoint in which a sed script has changed one file
variant() {
    rm -rf "$tmp/model"
    cp -r "$1" "$tmp/model"
    sed "$3" "$1/$2" >"$tmp/model/$2"
}

# cut MODEL FILE BYTES: likewise, with the file cut off after so many bytes
cut() {
    rm -rf "$tmp/model"
    cp -r "$1" "$tmp/model"
    head -c "$3" "$1/$2" >"$tmp/model/$2"
}

# bytes N OCTAL: N equal bytes
bytes() { head -c "$1" /dev/zero | tr '\000' "\\$2"; }

# y4m COLOUR LUMA CHROMA: 8 frames of 37 x 53 in red, with this many bytes of luma and of each chroma plane
y4m() {
    printf 'YUV4MPEG2 W37 H53 F25:1 Ip A1:1 C%s\n' "$1"
    for i in 1 2 3 4 5 6 7 8; do
        printf 'FRAME\n'
        bytes "$2" 121
        bytes "$3" 132
        bytes "$3" 360
    done
}

# npy_header FRAMES: of uint8 frames of 37 x 53
npy_header() {
    printf '\223NUMPY\001\000v\000%-117s\n' "{'descr': '|u1', 'fortran_order': False, 'shape': ($1, 53, 37, 3), }"
}

# The frames of y4m in RGB: what BT.601 makes of (81, 90, 240) is (254, 0, 0).
red_frames() {
    npy_header 8
    bytes $((8 * 53 * 37)) 376 | sed 's/\(.\)/\1\x00\x00/g'
}

# grey_frames OCTAL...: a grey frame for each value
grey_frames() {
    npy_header $#
    for grey in "$@"; do
        bytes $((53 * 37 * 3)) "$grey"
    done
}

echo "# goldens, dense attention"
for m in "$models"/*/; do
    m=${m%/}
    check "$(basename "$m"): logits" dense "$m/logits.npy" 2e-5 "$m" --pixels "$m/pixel_values.npy" --dense
    check "$(basename "$m"): logits, scalar" dense "$m/logits.npy" 2e-5 "$m" --pixels "$m/pixel_values.npy" --dense \
        --isa scalar
    [ -e "$m/frames_u8.npy" ] || continue
    check "$(basename "$m"): pixels from frames" pixels "$m/pixel_values.npy" 0 "$m" --frames "$m/frames_u8.npy"
    check "$(basename "$m"): logits from frames" dense "$m/logits.npy" 2e-5 "$m" --frames "$m/frames_u8.npy" --dense
done

echo "# sparse attention"
for m in "$models"/*/; do
    m=${m%/}
    check "$(basename "$m"): top-1 as dense" prints "top-1 agrees" classify "$m" --pixels "$m/pixel_values.npy" \
        --compare \
        --block-q 16 --block-k 16 --level-end .2,.3,.5,1
    check "$(basename "$m"): every block at level 1" dense "$m/logits.npy" 2e-5 "$m" --pixels "$m/pixel_values.npy" \
        --level-end 1 --block-q 16 --block-k 16
    check "$(basename "$m"): Gilbert order is undone" dense "$m/logits.npy" 2e-5 "$m" --pixels "$m/pixel_values.npy" \
        --mask dense --order gilbert --block-q 32 --block-k 16
done
sparse="--pixels $jepa/pixel_values.npy --preset paper-25 --block-q 16 --block-k 16"
check "one thread" classify "$jepa" $sparse --threads 1 --logits "$tmp/one.npy"
check "three threads give the same bits" dense "$tmp/one.npy" 0 "$jepa" $sparse --threads 3
check "sparse logits are not the dense ones" sh -c "! $build/npydiff $jepa/logits.npy $tmp/one.npy 1e-4"
check "counts of blocks" classify "$jepa" $sparse --preset default --level-count 1,1
check "price" classify "$jepa" $sparse --preset recipe --lambda .1
check "JSON report" prints '"top1_agrees":.*true' classify "$jepa" $sparse --compare --json

echo "# video without ffmpeg"
red_frames >"$tmp/red.npy"
check "red frames" classify "$jepa" --frames "$tmp/red.npy" --save-pixels "$tmp/red_pixels.npy"
y4m 420jpeg 1961 513 >"$tmp/420.y4m"
y4m 422 1961 1007 >"$tmp/422.y4m"
y4m 444 1961 1961 >"$tmp/444.y4m"
for colour in 420 422 444; do
    check "y4m $colour, portrait, odd size" env PATH=/nonexistent "$build/classify" "$jepa" "$tmp/$colour.y4m" \
        --save-pixels "$tmp/pixels.npy"
    check "y4m $colour: the same pixels" near "$tmp/red_pixels.npy" "$tmp/pixels.npy" 0
done
grey_frames 10 20 30 40 50 60 70 100 110 120 130 >"$tmp/eleven.npy"
grey_frames 10 20 30 50 60 70 110 120 >"$tmp/eight.npy"
check "8 of 11 frames: 0 1 2 4 5 6 8 9" classify "$jepa" --frames "$tmp/eight.npy" --save-pixels "$tmp/eight_pixels.npy"
check "8 of 11 frames: the same pixels" pixels "$tmp/eight_pixels.npy" 0 "$jepa" --frames "$tmp/eleven.npy"
check "two videos" prints "top-1 agrees on . of 2 inputs" classify "$jepa" "$tmp/420.y4m" "$tmp/444.y4m" --compare

if command -v ffmpeg >/dev/null; then
    echo "# video through ffmpeg"
    check "mp4" prints "clip.mp4: 64 frames of 96, 32 x 8 x 8 = 2048 tokens" classify "$sharded" "$clip" --num-frames 64
    check "mp4: top-1 as dense" prints "top-1 agrees" classify "$sharded" "$clip" --num-frames 64 --compare --preset \
        paper-25
    check "mp4: pixels" classify "$jepa" "$clip" --save-pixels "$tmp/mp4.npy"
    check "mp4 to y4m" ffmpeg -nostdin -v error -i "$clip" -pix_fmt yuv420p "$tmp/clip.y4m"
    check "y4m: the same pixels but for rounding and chroma" pixels "$tmp/mp4.npy" 0.05 "$jepa" "$tmp/clip.y4m"
    check "mp4 to portrait, odd size" ffmpeg -nostdin -v error -i "$clip" -vf transpose=1,scale=121:243 \
        -pix_fmt yuv444p "$tmp/-o dd.mkv"
    check "portrait, odd size, awkward name" classify "$jepa" "$tmp/-o dd.mkv"
    (cd "$tmp" && mv -- "-o dd.mkv" "http:x.mkv")
    check "a name that looks like an address" sh -c "cd $tmp && $build/classify $PWD/$jepa http:x.mkv"
    check "a frame more than there are" rejected "at least 97 frames, found 96" to_file "$jepa" "$clip" --num-frames 97
    check "a text file" rejected "Invalid data" to_file "$jepa" README.md
    check "sound only" ffmpeg -nostdin -v error -f lavfi -i sine=duration=1 "$tmp/sound.wav"
    check "sound only: rejected" rejected "matches no streams" to_file "$jepa" "$tmp/sound.wav"
else
    echo "# no ffmpeg: compressed video is not checked"
fi
check "ffmpeg is missing" sh -c "PATH=/nonexistent $build/classify $jepa $clip 2>&1 | grep -q 'needs ffmpeg in PATH'"

echo "# arguments"
check "none" rejected "expected MODEL" to_file
check "no input" rejected "expected MODEL" to_file "$jepa"
check "two inputs" rejected "expected MODEL" to_file "$jepa" "$clip" --pixels "$jepa/pixel_values.npy"
check "unknown option" rejected "unknown option '--fast'; known: --pixels" to_file "$jepa" "$clip" --fast
check "no value" sh -c "$build/classify $jepa $clip --threads 2>&1 | grep -q -e '--threads needs a value'"
check "no number" rejected "threads '2x': expected a whole number" to_file "$jepa" "$clip" --threads 2x
check "not in the list" rejected "score 'best': expected one of sample," to_file "$jepa" "$clip" --score best
check "bad list" rejected "level-end '.1,,.2': expected F,F" to_file "$jepa" "$clip" --level-end .1,,.2
check "list of zeros" rejected "level-end '0,0': expected F,F" to_file "$jepa" "$clip" --level-end 0,0
check "unknown preset" rejected "preset 'none': expected one of wan2.1-14b" to_file "$jepa" "$clip" --preset none
check "an order of another program" rejected "order 'tile': expected one of none, gilbert, tree" to_file "$jepa" "$clip" \
    --order tile
check "pictures with trees" rejected "every head has its own" to_file "$jepa" "$clip" --png "$tmp/p" \
    --order tree
check "not for this program" rejected "unknown option '--causal'" to_file "$jepa" "$clip" --causal
check "causal preset" rejected "causal" to_file "$jepa" "$clip" --preset qwen2.5-vl
check "a block size the library rejects" rejected "block_k" to_file "$jepa" --pixels "$jepa/pixel_values.npy" \
    --block-k 48
check "frames for VideoMAE" rejected "takes exactly 8" to_file "$mae" "$clip" --num-frames 16
check "output cannot be written" sh -c \
    "$build/classify $jepa --pixels $jepa/pixel_values.npy --logits /nonexistent/l.npy; [ \$? -eq 2 ]"

echo "# input arrays"
check "no file" rejected "No such file" to_file "$jepa" --pixels "$tmp/none.npy"
check "frames as pixels" rejected "expected float32 .clips" to_file "$jepa" --pixels "$jepa/frames_u8.npy"
check "pixels as frames" rejected "expected uint8" to_file "$jepa" --frames "$jepa/pixel_values.npy"
check "another size" rejected "the model takes 8 frames of 64 x 64" to_file "$mae" --pixels "$jepa/pixel_values.npy"
head -c 3000 "$jepa/pixel_values.npy" >"$tmp/cut.npy"
check "cut short" rejected "cut.npy" to_file "$jepa" --pixels "$tmp/cut.npy"

echo "# videos"
check "no file" rejected "No such file" to_file "$jepa" "$tmp/none.mp4"
head -c 20000 "$tmp/420.y4m" >"$tmp/cut.y4m"
check "y4m cut short" rejected "cut short" to_file "$jepa" "$tmp/cut.y4m"
sed '1s/420jpeg/420p10/' "$tmp/420.y4m" >"$tmp/deep.y4m"
check "y4m of 10 bits" rejected "found 420p10" to_file "$jepa" "$tmp/deep.y4m"
sed '1s/W37/W0/' "$tmp/420.y4m" >"$tmp/flat.y4m"
check "y4m of no width" rejected "found 0 x 53" to_file "$jepa" "$tmp/flat.y4m"

echo "# checkpoints"
in="--pixels $jepa/pixel_values.npy"

# length N: as a little-endian u64
length() {
    for i in 0 1 2 3 4 5 6 7; do printf "\\$(printf %o $(($1 >> 8 * i & 255)))"; done
}
header_size() { od -An -v -tu8 -N8 "$1" | tr -d ' '; }
header() { tail -c +9 "$1" | head -c "$(header_size "$1")"; }

# reheader MODEL FILE EDIT [BYTES]: $tmp/model is a copy in which a sed script has changed the header of a safetensors
# file; it may become longer or shorter. BYTES are put after the data.
reheader() {
    variant "$1" config.json ''
    header "$1/$2" | sed "$3" >"$tmp/header"
    {
        length "$(wc -c <"$tmp/header")"
        cat "$tmp/header"
        tail -c +$((9 + $(header_size "$1/$2"))) "$1/$2"
        printf '%s' "${4-}"
    } >"$tmp/model/$2"
}

# Where to cut a file, the last place first: a JSON file of one item a line after every line but the last; a safetensors
# file inside and after its length and its header and where a tensor begins or ends.
line_ends() { awk '{ at += length($0) + 1; print at }' "$1" | sed '$d' | sort -rn; }
tensor_ends() {
    data=$((8 + $(header_size "$1")))
    {
        printf '%s\n' 0 4 8 9 $((data / 2)) $((data - 1)) $data
        header "$1" | grep -o 'data_offsets":\[[0-9,]*' | grep -o '[0-9]*' | awk -v data=$data '{ print data + $1 }'
    } | sort -rnu | sed 1d
}

# cut_at PLACES MODEL FILE ARGUMENTS...: rejected wherever the file is cut off
cut_at() {
    places=$1 file=$3
    variant "$2" config.json ''
    shift 3
    [ "$(echo "$places" | wc -l)" -ge 20 ] || return 1
    for at in $places; do
        dd if=/dev/null of="$tmp/model/$file" bs=1 seek="$at" 2>/dev/null
        [ "$(wc -c <"$tmp/model/$file")" -eq "$at" ] && rejected "$file: " to_file "$tmp/model" "$@" || {
            echo "cut off at byte $at: $(cat "$tmp/stderr")"
            return 1
        }
    done
}

# pokes OFFSET COMMAND...: what the command prints goes over the bytes of $tmp/model/model.safetensors from there on
pokes() {
    offset=$1
    shift
    "$@" | dd of="$tmp/model/model.safetensors" bs=1 seek="$offset" conv=notrunc 2>/dev/null
}
check "no folder" rejected "config.json: No such file" to_file "$tmp/nothing" $in
cut "$jepa" config.json 200
check "config.json cut short" rejected "config.json: not valid JSON" to_file "$tmp/model" $in
check "config.json cut off after any line" cut_at "$(line_ends "$jepa/config.json")" "$jepa" config.json $in
variant "$jepa" config.json 's/"vjepa2"/"llama"/'
check "another model" rejected "expected videomae or vjepa2" to_file "$tmp/model" $in
variant "$jepa" config.json 's/"gelu"/"gelu_new"/'
check "another activation" rejected "expected gelu, found gelu_new" to_file "$tmp/model" $in
variant "$jepa" config.json 's/"patch_size": 8/"patch_size": "8"/'
check "text for a number" rejected "\"patch_size\": expected" to_file "$tmp/model" $in
variant "$jepa" config.json 's/"num_attention_heads": 2/"num_attention_heads": 3/'
check "heads that do not divide" rejected "num_attention_heads 3" to_file "$tmp/model" $in
variant "$jepa" config.json 's/"5": "bowling"/"6": "bowling"/'
check "a label number too high" rejected "id2label" to_file "$tmp/model" $in
variant "$jepa" config.json '/"0": "abseiling"/d; s/"5": "bowling"/"0": "bowling"/'
check "a label too few" rejected "classifier.weight: expected shape .5, 64., found .6, 64." to_file "$tmp/model" $in
variant "$jepa" config.json 's/"num_hidden_layers": 3/"num_hidden_layers": 4/'
check "a layer too many" rejected "vjepa2.encoder.layer.3.norm1.weight is missing" to_file "$tmp/model" $in
variant "$jepa" config.json ''
rm "$tmp/model/video_preprocessor_config.json"
check "no preprocessor settings" rejected "found no video_preprocessor_config.json" to_file "$tmp/model" \
    --frames "$jepa/frames_u8.npy"
variant "$jepa" video_preprocessor_config.json 's/"resample": 2/"resample": 5/'
check "unknown resampling" rejected "resample" to_file "$tmp/model" --frames "$jepa/frames_u8.npy"

check "preprocessor settings cut off after any line" cut_at "$(line_ends "$jepa/video_preprocessor_config.json")" \
    "$jepa" video_preprocessor_config.json --frames "$jepa/frames_u8.npy"
variant "$jepa" config.json ''
echo '{"video_processor": 3}' >"$tmp/model/processor_config.json"
check "a number for the video processor" rejected "\"video_processor\": expected" to_file "$tmp/model" \
    --frames "$jepa/frames_u8.npy"

check "safetensors cut off at any tensor" cut_at "$(tensor_ends "$jepa/model.safetensors")" "$jepa" \
    model.safetensors $in
for n in 0 1 2 3 4 5 6 7; do
    variant "$jepa" config.json ''
    flipped=$(printf '%o' $(($(od -An -tu1 -j$n -N1 "$jepa/model.safetensors") ^ 128)))
    pokes $n printf "\\$flipped"
    check "safetensors: byte $n of the length is wrong" rejected "model.safetensors: " to_file "$tmp/model" $in
done
for n in $(($(wc -c <"$jepa/model.safetensors") - 7)) 100000001 9223372036854775807 -1; do
    variant "$jepa" config.json ''
    pokes 0 length $n
    check "safetensors: a header of $n bytes" rejected "expected a header of at most 100000000 bytes" to_file \
        "$tmp/model" $in
done
variant "$jepa" config.json ''
rm "$tmp/model/model.safetensors"
mkdir "$tmp/model/model.safetensors"
check "safetensors: a folder" rejected "model.safetensors: " to_file "$tmp/model" $in
variant "$jepa" model.safetensors 's/"classifier.bias"/"classifier.bxxs"/'
check "a tensor is missing" rejected "classifier.bias is missing; expected one of shape .6." to_file "$tmp/model" $in
variant "$jepa" model.safetensors 's/"shape":\[6,64\]/"shape":[64,6]/'
check "a tensor of another shape" rejected "expected shape .6, 64., found .64, 6." to_file "$tmp/model" $in
variant "$jepa" model.safetensors 's/"shape":\[6,64\]/"shape":[6,63]/'
check "a shape that does not fill the data" rejected "expected 1512 bytes for its shape, found 1536" to_file \
    "$tmp/model" $in
variant "$jepa" model.safetensors 's/"F32"/"I32"/g'
check "a type that is no weight's" rejected "expected type F32, F16 or BF16, found I32" to_file "$tmp/model" $in
variant "$jepa" model.safetensors 's/"classifier.bias":{/"classifier.bias":[/'
check "a broken header" rejected "not valid JSON" to_file "$tmp/model" $in

# The file begins with classifier.bias [0,24], classifier.weight [24,1560].
variant "$jepa" model.safetensors 's/\[24,1560\]/[20,1556]/'
check "tensors overlap" rejected "tensors classifier.bias and classifier.weight overlap" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/\[24,1560\]/[1560,24]/'
check "a tensor ends before it begins" rejected "classifier.weight: its data ends before it begins" to_file \
    "$tmp/model" $in
reheader "$jepa" model.safetensors 's/\[24,1560\]/[24,9007199254740992]/'
check "a tensor past the end" rejected "classifier.weight ends at byte 9007199254.*, but the file has" to_file \
    "$tmp/model" $in
for offsets in '-4,20' '0.5,24.5' '0' '0,24,24' '"0","24"' '1e999,24' 'null,24'; do
    reheader "$jepa" model.safetensors "s/\[0,24\]/[$offsets]/"
    check "offsets $offsets" rejected "classifier.bias: expected \"data_offsets\": .begin, end" to_file "$tmp/model" $in
done
for shape in '6.5' '-6' '9007199254740994' '6,9007199254740992' '"6"'; do
    reheader "$jepa" model.safetensors "s/\"shape\":\[6\]/\"shape\":[$shape]/"
    check "shape $shape" rejected "classifier.bias: an extent of its shape" to_file "$tmp/model" $in
done
reheader "$jepa" model.safetensors 's/"shape":\[6\]/"shape":[1,1,1,1,1,1,1,1,6]/'
check "a shape of nine extents" rejected "a list of at most 8 extents" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"classifier.bias":{[^}]*},//'
check "a gap before the first tensor" rejected "bytes [0-9]* to [0-9]* belong to no tensor" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"classifier.weight":{[^}]*},//'
check "a gap between tensors" rejected "bytes [0-9]* to [0-9]* belong to no tensor" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors '' x
check "a byte after the last tensor" rejected "bytes 1032704 to 1032704 belong to no tensor" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"classifier.weight"/"classifier.bias"/'
check "two tensors of one name" rejected "there are two tensors classifier.bias" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"pt"/"\xe4"/'
check "a header that is not UTF-8" rejected "not UTF-8 (at byte 27)" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"pt"/"p\x00"/'
check "a header with a NUL" rejected "not valid JSON (at byte 28)" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"classifier.bias"/"classifier.bias\\u0000"/'
check "a name with a NUL" rejected "a NUL in a string (at byte " to_file "$tmp/model" $in
reheader "$jepa" model.safetensors 's/"classifier.bias":{/"classifier\\nbias\\u001b[2J":{"dtype":3,/'
check "a name of several lines" rejected "tensor classifier bias .2J: expected \"dtype\"" to_file "$tmp/model" $in
reheader "$jepa" model.safetensors '/"classifier.weight":{"dtype":"F32"/s//"classifier.weight":{"dtype":"F8_E4M3FNUZ"/'
check "a type nobody knows" rejected "classifier.weight: expected type F32, F16 or BF16, found F8_E4M3FNUZ" to_file \
    "$tmp/model" $in

last=$(($(wc -c <"$jepa/model.safetensors") - 8 - $(header_size "$jepa/model.safetensors")))
extra="\"extra\":{\"dtype\":\"F8_E4M3FNUZ\",\"shape\":[3],\"data_offsets\":[$last,$((last + 3))]}"
reheader "$jepa" model.safetensors "s/}} *\$/},$extra}/" xyz
check "a type nobody knows, not used: the same logits" dense "$jepa/logits.npy" 2e-5 "$tmp/model" $in --dense
for spaces in ' ' '  ' '   '; do
    reheader "$jepa" model.safetensors "s/\$/$spaces/"
    check "data begin at byte $(header_size "$tmp/model/model.safetensors") + 8" \
        [ $(($(header_size "$tmp/model/model.safetensors") % 4)) -eq ${#spaces} ]
    check "f32 that is not aligned: the same logits" dense "$jepa/logits.npy" 2e-5 "$tmp/model" $in --dense
done
reheader "$sharded" model-00002-of-00003.safetensors 's/$/ /'
check "f16 that is not aligned: the same logits" dense "$sharded/logits.npy" 2e-5 "$tmp/model" \
    --pixels "$sharded/pixel_values.npy" --dense
variant "$mae" model.safetensors 's/layer.1.attention.attention.v_bias/layer.1.attention.attention.x_bias/'
check "VideoMAE: no value bias" rejected "v_bias is missing" to_file "$tmp/model" --pixels "$mae/pixel_values.npy"

in="--pixels $sharded/pixel_values.npy"
variant "$sharded" config.json ''
rm "$tmp/model/model-00002-of-00003.safetensors"
check "a shard is missing" rejected "model-00002-of-00003.safetensors: No such file" to_file "$tmp/model" $in
for n in 1 2 3; do
    shard=model-0000$n-of-00003.safetensors
    check "shard $n cut off at any tensor" cut_at "$(tensor_ends "$sharded/$shard")" "$sharded" $shard $in
done
check "the index cut off after any line" cut_at "$(line_ends "$sharded/model.safetensors.index.json")" "$sharded" \
    model.safetensors.index.json $in
reheader "$sharded" model-00003-of-00003.safetensors \
    's/"classifier.bias"/"pooler.cross_attention_layer.cross_attn.k_proj.bias"/'
check "two shards have one tensor" rejected "two tensors pooler.cross_attention_layer.cross_attn.k_proj.bias" to_file \
    "$tmp/model" $in
variant "$sharded" config.json ''
echo '{"weight_map": {}}' >"$tmp/model/model.safetensors.index.json"
check "an index of nothing" rejected "expected \"weight_map\", an object with tensors" to_file "$tmp/model" $in
variant "$sharded" model.safetensors.index.json '/classifier.bias/s/"model-.*"/3/'
check "an index of numbers" rejected "classifier.bias: expected the name of a file beside the index" to_file \
    "$tmp/model" $in
variant "$sharded" model.safetensors.index.json '/classifier.bias/s/0000.-of/00002-of/'
check "the index is wrong" rejected "classifier.bias is not in model-00002" to_file "$tmp/model" $in
variant "$sharded" model.safetensors.index.json '/classifier.bias/s/model-0000.-of/..\/model-of/'
check "the index leaves the folder" rejected "the name of a file beside the index" to_file "$tmp/model" $in
rm "$tmp/model/model.safetensors.index.json"
check "no weights" rejected "neither model.safetensors nor" to_file "$tmp/model" $in

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
