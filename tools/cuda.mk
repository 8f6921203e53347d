# cuda.mk - psa_cuda.cu: for GPUs where nvcc is on the PATH, and on the emulator of the tests.

ifeq ($(origin NVCC), undefined)
NVCC := $(shell command -v nvcc)
endif

# Architectures; later ones run the PTX of the first.
ARCHS := 80 86 89 90a 100 120
ifneq ($(NVCC),)
KNOWN := $(shell $(NVCC) --list-gpu-code)
SM    := $(foreach a,$(ARCHS),$(if $(filter sm_$(a:a=),$(KNOWN)),$a))
CUDA  := $(patsubst %/bin/,%,$(dir $(realpath $(shell command -v $(NVCC)))))
$B/tools/psa.o $B/examples/classify.o: FLAGS += -DPSA_CUDA -isystem $(CUDA)/include
$B/tools/psa.o $B/examples/classify.o: $B/psa_cuda.o # so that they are made again where nvcc is new
$B/psa $B/classify: $B/psa_cuda.o
$B/psa $B/classify: LDLIBS += -L$(CUDA)/lib64 -lcudart_static -lstdc++ -ldl -lrt
endif

$B/psa_cuda.o: psa_cuda.cu psa.h
	@mkdir -p $(@D)
	@echo "psa_cuda.cu for $(SM:%=sm_%) takes minutes;$(if $(filter-out $(SM),$(ARCHS)), \
	    this nvcc does not know $(patsubst %,sm_%,$(filter-out $(SM),$(ARCHS)));) make NVCC= does without"
	@$(NVCC) -O3 -std=c++17 --threads 0 -Xcompiler -Wall,-Wextra -Xptxas -v -gencode arch=compute_80,code=compute_80 \
	    $(foreach a,$(SM),-gencode arch=compute_$a,code=sm_$a) -c $< -o $@ >$B/psa_cuda.log 2>&1 || \
	    { grep -E 'error|fatal' $B/psa_cuda.log >&2; false; }

cuda: $(if $(NVCC),$B/psa_cuda.o)
	B=$B SM="$(SM)" tests/cuda/compile.sh

# The emulator: gcc or clang, x86-64 or AArch64, glibc. Its fibers longjmp between stacks. -O1 compiles twice as fast.
EMULATED = $(CXX) -std=c++17 $(WARN) -Wno-unknown-pragmas -O1 -g -I. -Itests/cuda -U_FORTIFY_SOURCE

$B/emu/psa_cuda.o: psa_cuda.cu psa.h $(wildcard tests/cuda/*.h) Makefile tools/cuda.mk
	@mkdir -p $(@D)
	$(EMULATED) -DPSA_CUDA_EMULATED -xc++ -c $< -o $@

$B/test_cuda: tests/cuda/test_cuda.cpp $B/emu/psa_cuda.o tools/gpu_model.h
	$(CC) -xc -DPSA_IMPLEMENTATION $(CFLAGS) -c psa.h -o $B/emu/psa.o
	$(EMULATED) $(filter %.cpp %.o,$^) $B/emu/psa.o -o $@ -lm -pthread

# The programs with a stand-in for the CUDA runtime.
$B/emu/%.o: %.c $(HEADERS) tests/cuda/cuda_runtime_api.h Makefile tools/cuda.mk
	@mkdir -p $(@D)
	$(CC) $(FLAGS) -DPSA_CUDA -Itests/cuda -c $< -o $@

$B/emu/psa: $B/emu/tools/psa.o $B/emu/psa_cuda.o
$B/emu/classify: $B/emu/examples/classify.o $B/emu/psa_cuda.o
$B/emu/psa: LDLIBS += -lcjson
$B/emu/classify: LDLIBS += -lcjson -lopenblas
$B/emu/psa $B/emu/classify:
	$(CXX) $(LDFLAGS) $^ -o $@ $(LDLIBS) -lm -pthread

.PHONY: cuda
