#!/bin/bash
# A newer ggml than the package ggml-python has, from the source of llama.cpp in the package llama-cpp-python:
# headers and libraries in DIR/include and DIR/lib. tests/ggml/build.sh DIR
set -eu
dir=$1
part=$dir.part
source=$part/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml
trap 'echo "tests/ggml/build.sh: failed, $dir.log says why; needs pip, PyPI, cmake and a C++ compiler" >&2' ERR

rm -rf "$part" && mkdir "$part" && exec 3>"$dir.log"
"${PYTHON:-python3}" -m pip download -d "$part" --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 >&3 2>&3
tar -xf "$part"/*.tar.gz -C "$part" "${source#"$part"/}"
touch "$source/ggml.pc.in" # CMake asks for it, the package lacks it
cmake -S "$source" -B "$part/b" -DCMAKE_BUILD_TYPE=Release -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF \
    -DCMAKE_INSTALL_PREFIX="$PWD/$part/ggml" -DCMAKE_INSTALL_LIBDIR=lib >&3 2>&3
cmake --build "$part/b" --target install -j"$(nproc)" >&3 2>&3
mv "$part/ggml" "$dir"
rm -rf "$part"
