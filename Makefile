# make deps demo    install what is missing, build, classify a shipped clip with a shipped model
# make deps test    install what is missing, build, run every test; the last line is "N passed, N failed"
# make              build everything into build/
# make bench        measure this machine (options: make bench ARGS="--n 4096 --threads 1")
# make ggml         fetch ggml and build it into build/ggml, once: a peer for tools/bench_peers.py
# make test-ggml    psa inside ggml (examples/ggml), in two versions of it, which are fetched and built once
# make cuda         psa_cuda.o, with checks of what nvcc made of it
# make fuzz       fuzz the reading of checkpoints
# make check-symbols   what the header exports and needs
#
# With nvcc on the PATH psa and classify get --backend cuda, which takes minutes to compile; make NVCC= does without.

CC     ?= cc
CFLAGS ?= -O2 -g
B      ?= build
STD    ?= -std=c99
PYTHON ?= python3
WARN   ?= -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Werror
DEPS   := build-essential libstb-dev libcjson-dev libopenblas-dev ffmpeg

FLAGS   = $(STD) -I. -Itools $(WARN) $(CFLAGS) $(CPPFLAGS) -DPSA_CFLAGS='"$(CFLAGS)"'
HEADERS = $(wildcard *.h */*.h)
object  = $(patsubst %.c,$B/%.o,$1)

all: $B/psa $B/fidelity $B/classify $B/clips $B/test_psa $B/npydiff
	@$(if $(NVCC),,echo "there is no nvcc: psa and classify are built without --backend cuda")

$B/psa: $(call object,tools/psa.c)
$B/fidelity: $(call object,tools/fidelity.c)
$B/dump_qkv: $(call object,tools/dump_qkv.c)
$B/clips: $(call object,tools/clips.c)
$B/classify: $(call object,$(wildcard examples/classify*.c))
$B/psa $B/fidelity: LDLIBS += -lcjson
$B/classify $B/dump_qkv: LDLIBS += -lcjson -lopenblas
$B/test_psa: $(call object,$(filter-out tests/npydiff.c,$(wildcard tests/*.c)))
$B/npydiff: $(call object,tests/npydiff.c)
$B/readme: $B/readme.o
$B/tools/dump_qkv.o: examples/classify.c
$B/tools/fidelity.o: WARN += -Wno-unused-function # it takes but parts of run.h and draw.h
$B/tools/clips.o: CFLAGS += -ffp-contract=off # the same clips everywhere
$B/examples/classify.o: CFLAGS += -O3 # its loops over rows are written for the vectoriser

$B/psa $B/fidelity $B/dump_qkv $B/classify $B/clips $B/test_psa $B/npydiff $B/readme:
	$(CC) $(CFLAGS) $(LDFLAGS) $^ -o $@ $(LDLIBS) -lm -pthread

# deps goes first where it is asked for, with make -j too.
$B/%.o: %.c $(HEADERS) Makefile | $(filter deps,$(MAKECMDGOALS))
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -c $< -o $@

$B/readme.o: $B/readme.c $(HEADERS)
	$(CC) $(FLAGS) -c $< -o $@

# The first C example of README.md.
$B/readme.c: README.md
	@mkdir -p $(@D)
	awk '/^```/ { if (inside) exit; inside = $$0 == "```c"; next } inside' $< > $@

deps:
	@command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || \
	    { echo "make deps: needs Debian or Ubuntu; elsewhere install what these packages hold: $(DEPS)" >&2; exit 1; }
	@missing=; for p in $(DEPS); do \
	    dpkg-query -W -f '$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	    echo "installing$$missing"; \
	    if [ "$$(id -u)" = 0 ]; then as_root="env"; else as_root="sudo env"; fi; \
	    $$as_root apt-get update -qq && \
	    $$as_root DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

demo: $B/classify
	$B/classify examples/data/model examples/data/clips --order gilbert --score-norm --compare
	$B/classify examples/data/model examples/data/clips/two.mp4 --order gilbert --score-norm --compare \
	    --png $B/demo --query 3,0,6,4,10
	@echo "pictures of what attention read: $B/demo/summary.png, frames.png, levels.png, density.png"

# The test binary goes last: its last line is the result.
test: all $B/readme $B/test_cuda $B/emu/psa $B/emu/classify
	$B/readme
	BUILD=$B tests/psa.sh
	BUILD=$B tests/fidelity.sh
	BUILD=$B tests/classify.sh
	BUILD=$B tests/demo.sh
	BUILD=$B tests/cuda/backend.sh
	$B/test_cuda
	$B/test_psa

bench: $B/psa
	$B/psa bench $(ARGS)

# The package on PyPI is ggml's source with Python bindings; headers and libraries land beside them, in include and lib.
# GGML_NATIVE: all instruction sets of this CPU. CC and CXX on the command line reach CMake through the environment.
ggml: $B/ggml
$B/ggml: | $B
	@rm -rf $@.part && CMAKE_ARGS=-DGGML_NATIVE=ON $(PYTHON) -m pip install --no-cache-dir --target $@.part --no-deps \
	    --no-binary ggml-python ggml-python==0.0.45 >$@.log 2>&1 && mv $@.part $@ || \
	    { echo "make ggml: failed, $@.log says why; needs pip, PyPI and a C++ compiler" >&2; false; }
$B:
	@mkdir -p $@

$B/ggml-new: | $B
	PYTHON=$(PYTHON) tests/ggml/build.sh $@

# Programs for a version of ggml lie beside its headers and libraries.
GGML_BUILD = $(CC) $(FLAGS) -Iexamples/ggml -Itests/ggml -isystem $(@D)/include $< -o $@
GGML_LINK  = -L$(@D)/lib -Wl,--disable-new-dtags,-rpath,$(abspath $(@D))/lib -lggml -lggml-cpu -lggml-base -lm -pthread
GGML_NEEDS = $(HEADERS) $(wildcard */ggml/*.h) Makefile

$B/%/test_ggml: tests/ggml/test_ggml.c $(GGML_NEEDS) | $B/%
	$(GGML_BUILD) $(GGML_LINK)
$B/%/plain: tests/ggml/plain.c $(GGML_NEEDS) | $B/%
	$(GGML_BUILD) $(GGML_LINK)
$B/%/dit: examples/ggml/dit.c $(GGML_NEEDS) | $B/%
	$(GGML_BUILD) $(GGML_LINK)
$B/%/libpsa_preload.so: examples/ggml/psa_preload.c $(GGML_NEEDS) | $B/%
	$(GGML_BUILD) -shared -fPIC -ldl -lm

test-ggml: $(foreach g,ggml ggml-new,$(addprefix $B/$g/,test_ggml plain dit libpsa_preload.so))
	@for g in ggml ggml-new; do \
	    tests/ggml/preload.sh $B/$$g && tests/ggml/dit.sh $B/$$g && $B/$$g/test_ggml || exit 1; done

# Everything that the header exports starts with psa_; it has no writable data, does not print or end the program, and
# links with libc, libm and threads alone. PSA_STATIC exports nothing, PSA_NO_THREADS does without threads.
check-symbols:
	@mkdir -p $B
	$(CC) -xc -DPSA_IMPLEMENTATION -fno-pie -c psa.h -o $B/symbols.o
	nm -g --defined-only $B/symbols.o | grep -q ' T psa_attention$$'
	! nm -g --defined-only $B/symbols.o | grep -v ' psa_[a-z]'
	! nm $B/symbols.o | grep -i ' [bdcs] '
	! nm -u $B/symbols.o | grep -wE 'exit|_exit|abort|printf|fprintf|puts|perror|stdout|stderr|getenv|__assert_fail'
	printf 'int main(void) { return 0; }' | $(CC) -no-pie -xc - -xnone $B/symbols.o -o $B/symbols -lm -pthread
	$(CC) -xc -DPSA_IMPLEMENTATION -DPSA_STATIC -c psa.h -o $B/symbols.o
	! nm -g --defined-only $B/symbols.o | grep .
	$(CC) -xc -DPSA_IMPLEMENTATION -DPSA_NO_THREADS -c psa.h -o $B/symbols.o
	! nm -u $B/symbols.o | grep pthread

# Ten minutes of libFuzzer on everything that reads a checkpoint. Needs clang and libclang-rt-dev.
fuzz:
	@mkdir -p $B/corpus
	clang $(STD) -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -I. -Itools -Iexamples \
	    tests/fuzz/checkpoint.c -lcjson -o $B/fuzz
	$B/fuzz -max_total_time=600 -max_len=8192 -dict=tests/fuzz/words.dict $(ARGS) $B/corpus tests/fuzz/seeds

clean:
	rm -rf $B

include tools/cuda.mk

.PHONY: all deps demo test bench ggml test-ggml check-symbols fuzz clean
.DELETE_ON_ERROR:
