# Viaduct. `make help` lists the targets. Everything that is built lies under BUILD.
#
# On a cluster with modules:  make CC=mpicc HDF5_ROOT=/its/folder ARCH=x86-64-v3  (doc/GUIDE.md, "On a cluster: modules")
ifeq ($(origin CC),default)
CC := gcc
endif
BUILD  ?= build
# One name for one folder, relative where it lies in the tree: lists of the headers that objects were made from name it.
override BUILD := $(patsubst $(CURDIR)/%,%,$(BUILD))
PREFIX ?= /usr/local
PYTHON ?= /usr/bin/python3
# What the program is compiled for: `native` is this machine; name the oldest machine where nodes differ.
ARCH   ?= native

VERSION := 0.1.0
GIT     := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

DEBIAN_PACKAGES := gcc make pkgconf libhdf5-openmpi-dev hdf5-tools libopenmpi-dev openmpi-bin libopenblas-openmp-dev \
  libarchive-dev zlib1g-dev librandom123-dev libjansson-dev nettle-dev zip xz-utils git python3 python3-h5py python3-matplotlib \
  python3-xarray python3-netcdf4 python3-h5netcdf libcmocka-dev gfortran clang clang-format clang-tidy \
  libomp-14-dev libclang-rt-14-dev libfuzzer-14-dev procps shellcheck
# What `make check-slurm` needs besides. srun --mpi=pmix loads libpmix.so, which only the -dev package has.
SLURM_PACKAGES := slurm-wlm slurm-wlm-basic-plugins munge libpmix-dev

# Debian lets several OpenBLAS live side by side. Ours shares its threads with the program: the OpenMP one, by its path.
OPENBLAS_OPENMP := $(if $(OPENBLAS_ROOT),,$(firstword $(wildcard /usr/lib/*/openblas-openmp)))
PKG_CONFIG := $(if $(OPENBLAS_OPENMP),PKG_CONFIG_PATH=$(OPENBLAS_OPENMP)/pkgconfig:$$PKG_CONFIG_PATH )pkg-config
HDF5 := $(shell for p in hdf5-openmpi hdf5-serial hdf5; do pkg-config --exists $$p 2>/dev/null && echo $$p && break; done)
PKGS ?= $(or $(HDF5),hdf5) mpi openblas libarchive zlib nettle jansson
# A folder that the user names goes before what pkg-config knows: HDF5_ROOT, MPI_ROOT, ...
ROOTS := HDF5 MPI OPENBLAS LIBARCHIVE ZLIB NETTLE JANSSON RANDOM123
PKGS_ROOTED := $(filter $(foreach r,$(ROOTS),$(if $($(r)_ROOT),$(shell echo $(r) | tr A-Z a-z)%)),$(PKGS))
PKGS_KNOWN  := $(shell for p in $(filter-out $(PKGS_ROOTED),$(PKGS)); do $(PKG_CONFIG) --exists $$p 2>/dev/null && echo $$p; done)
PKGS_CFLAGS := $(patsubst -I%,-isystem %,$(if $(PKGS_KNOWN),$(shell $(PKG_CONFIG) --cflags $(PKGS_KNOWN))))
PKGS_LIBS   := $(if $(PKGS_KNOWN),$(shell $(PKG_CONFIG) --libs $(PKGS_KNOWN)))
# The others are looked for by hand. Random123 is headers alone and has no .pc file.
PKGS_OTHER := $(filter-out $(PKGS_KNOWN),$(PKGS)) $(if $(RANDOM123_ROOT),random123,$(if $(wildcard /usr/include/Random123/philox.h),,random123))
FIND_LIBRARIES = $(foreach r,$(ROOTS),$(if $($(r)_ROOT),$(r)_ROOT='$($(r)_ROOT)')) CC='$(CC)' CFLAGS='$(PKGS_CFLAGS) $(CFLAGS)' sh jobs/find_libraries.sh
PKGS_FOUND := $(if $(strip $(PKGS_OTHER)),$(shell $(FIND_LIBRARIES) $(PKGS_OTHER)))
PKGS_MISSING := $(patsubst M%,%,$(filter M%,$(PKGS_FOUND)))
PKGS_CFLAGS += $(patsubst C-I%,-isystem %,$(filter C%,$(PKGS_FOUND)))
PKGS_LIBS += $(patsubst L%,%,$(filter L%,$(PKGS_FOUND)))

# No -ffast-math: non-finite values must be seen. Contraction to fused multiply-adds is named because -std=c11 turns it
# off. The release leaves out the checks that values agree on all ranks (NDEBUG); OPT="-O1" keeps them.
OPT     ?= -O3 -march=$(ARCH) -fno-math-errno -fno-trapping-math -ffp-contract=fast -DNDEBUG
WARN    := -Wall -Wextra -Wpedantic -Werror
# clang calls it a warning when it does not vectorise a loop; that is no fault of the source.
WARN    += $(if $(findstring clang,$(CC)),-Wno-pass-failed)
CFLAGS  ?=
LDFLAGS ?=
# For what the fuzz targets run, and for nothing else (see FUZZED).
FUZZ_CFLAGS ?=
ALL_CFLAGS := -std=c11 -D_GNU_SOURCE -g $(OPT) -fopenmp $(WARN) -I. $(PKGS_CFLAGS) $(CFLAGS)
comma := ,
CUDA_HOME ?= /usr/local/cuda
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard $(CUDA_HOME)/bin/nvcc))
# The CUDA part is built where there is a CUDA Toolkit; CUDA=no leaves it out, CUDA=yes makes a missing one an error.
HAVE_CUDA_HEADERS := $(wildcard $(CUDA_HOME)/include/cublasLt.h)
HAVE_CUDA := $(if $(filter no,$(CUDA)),,$(and $(NVCC),$(HAVE_CUDA_HEADERS)))
ifeq ($(CUDA)$(HAVE_CUDA),yes)
$(error CUDA=yes, but there is no CUDA Toolkit: nvcc in PATH or under CUDA_HOME=$(CUDA_HOME), with include/cublasLt.h)
endif
# Whether this machine has an NVIDIA GPU. `make quickstart` asks, because it builds what this machine can run.
HAVE_GPU = $(or $(wildcard /dev/nvidia0 /proc/driver/nvidia/gpus/*),$(shell nvidia-smi -L 2>/dev/null | grep '^GPU '))
# As many jobs as cores for a recipe that calls make, unless the user chose -j: its job server then serves all.
PARALLEL = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))
# One architecture for now: the kernels were written for and measured on Hopper. LINEINFO=-lineinfo lets profilers and
# compute-sanitizer name source lines; it takes a tenth of the time to compile kernels.
NVCC_FLAGS ?= -std=c++17 -O3 $(LINEINFO) -gencode=arch=compute_90a,code=sm_90a -Xcompiler -fPIC,-fvisibility=hidden -I.
LINK = $(CC) -fopenmp $(CFLAGS) $(LDFLAGS) $(if $(OPENBLAS_OPENMP),-Wl$(comma)-rpath$(comma)$(OPENBLAS_OPENMP))
# Objects before archives, in whichever order the rules named them.
LINKED = $(filter %.o,$^) $(filter %.a,$^)
LIBS := -lhdf5_hl $(PKGS_LIBS) -lm -lpthread -ldl

LIB_SRC := $(wildcard src/*/*.c io/*.c)
F32_OBJ := $(LIB_SRC:%.c=$(BUILD)/f32/%.o)
# Rooms that do not know the type `real` are compiled once, for both libraries. tests/test_house.py holds them to it.
WITHOUT_REAL := src/base/% src/deck/% io/%
F64_OBJ := $(patsubst %.c,$(BUILD)/f64/%.o,$(filter-out $(WITHOUT_REAL),$(LIB_SRC))) \
  $(patsubst %.c,$(BUILD)/f32/%.o,$(filter $(WITHOUT_REAL),$(LIB_SRC)))
# Test programs hold a main(); other sources beside them are linked into each of them.
UNIT_ALL := $(filter-out tests/unit/fuzz_%,$(wildcard tests/unit/*.c))
MATH_ALL := $(wildcard tests/math/*.c)
UNIT_SRC := $(if $(UNIT_ALL),$(shell grep -l '^int main' $(UNIT_ALL)))
MATH_SRC := $(if $(MATH_ALL),$(shell grep -l '^int main' $(MATH_ALL)))
UNIT_AUX := $(patsubst %.c,$(BUILD)/f32/%.o,$(filter-out $(UNIT_SRC),$(UNIT_ALL)))
MATH_AUX := $(patsubst %.c,$(BUILD)/f64/%.o,$(filter-out $(MATH_SRC),$(MATH_ALL)))
UNIT := $(UNIT_SRC:tests/unit/%.c=$(BUILD)/tests/%)
MATH := $(MATH_SRC:tests/math/%.c=$(BUILD)/tests/%)
FUZZ_SRC := $(wildcard tests/fuzz_*.c tests/*/fuzz_*.c)
FUZZ := $(patsubst %.c,$(BUILD)/tests/%,$(notdir $(FUZZ_SRC)))
# One short line for each file; V=1 shows the commands.
SAY := $(if $(V),@:,@printf '  %-5s %s\n')
Q   := $(if $(V),,@)
C_FILES = $(wildcard src/*.[ch] src/*/*.[ch] io/*.[ch] cuda/*/*.[ch] cuda/*/*.cu cuda/*/*.cuh tests/*.[ch] tests/*/*.[ch] tests/cuda/*.cu tests/cuda/*.cuh)

.PHONY: bundle cuda cuda-c gpu-tests gpu-check gpu-bench all unit math stand-in tests fuzz help deps check check-run check-slurm check-tsan coverage quickstart quickstart-run report bench \
  enwik8 format lint lint-quick lint-shell install uninstall clean FORCE
.SECONDARY:
.DELETE_ON_ERROR:

all: $(BUILD)/viaduct $(if $(HAVE_CUDA),cuda) ## The program, build/viaduct, and its CUDA part where there is a CUDA Toolkit
cuda: $(BUILD)/libviaduct_cuda.so ## The CUDA part, build/libviaduct_cuda.so, which the program loads where there is a GPU
unit: $(UNIT)
math: $(MATH) $(BUILD)/tests/check_golden_f32
tests: unit math stand-in ## The test programs, build/tests/
fuzz: $(FUZZ)

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9_.-]+:.*## / { printf "make %-22s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: BUILD=$(BUILD) CC=$(CC) ARCH=$(ARCH) PREFIX=$(PREFIX) CFLAGS= LDFLAGS= DEPS=no (skip deps)"

$(BUILD)/viaduct: $(BUILD)/f32/src/main.o $(BUILD)/libviaduct.a
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $^ $(LIBS)
$(BUILD)/libviaduct.a: $(F32_OBJ)
	@rm -f $@
	$(SAY) AR $@
	$(Q)ar rcs $@ $^
$(BUILD)/libviaduct_f64.a: $(F64_OBJ)
	@rm -f $@
	$(SAY) AR $@
	$(Q)ar rcs $@ $^
$(BUILD)/f32/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(SAY) CC $@
	$(Q)$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<
# Only tests run the program in double: -O2 compiles in a fifth less time.
$(BUILD)/f64/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(SAY) CC $@
	$(Q)$(CC) $(ALL_CFLAGS) $(if $(filter -O3,$(OPT)),-O2) -DVD_DOUBLE -MMD -MP -c -o $@ $<
VERSION_FLAGS := -DVD_VERSION='"$(VERSION)"' -DVD_GIT_VERSION='"$(GIT)"'
$(BUILD)/f32/src/base/version.o: $(BUILD)/version
$(BUILD)/f32/src/base/version.o: private ALL_CFLAGS += $(VERSION_FLAGS)
# What the program and its CUDA part share, in one number, so that a part of another build is refused: a checksum of the
# headers of the table between them, and of all that these include.
INCLUDED = $(sort $1 $(shell sed -n 's/^\#include "\(.*\)"/\1/p' $1))
ALL_INCLUDED = $(if $(filter-out $1,$2),$(call ALL_INCLUDED,$2,$(call INCLUDED,$2)),$1)
INTERFACE_HEADERS := $(call ALL_INCLUDED,,$(wildcard src/ops/*.h))
INTERFACE_FLAGS := -DVD_CUDA_INTERFACE=$(firstword $(shell cat $(INTERFACE_HEADERS) | cksum))U
INTERFACE_OBJ := $(addprefix $(BUILD)/,f32/src/comm/device.o f64/src/comm/device.o pic/cuda/backend/device.o \
  f32/tests/cuda/ops_side.o f64/tests/cuda/ops_side.o f32/tests/gpu/gpu_ops.o)
$(INTERFACE_OBJ): private ALL_CFLAGS += $(INTERFACE_FLAGS)

# An archive, so that each test takes what it calls and no others: with all of it every test would be the whole program.
$(BUILD)/libunit.a: $(UNIT_AUX)
	@rm -f $@
	$(SAY) AR $@
	$(Q)ar rcs $@ $^
$(UNIT): $(BUILD)/tests/%: $(BUILD)/f32/tests/unit/%.o $(BUILD)/libunit.a $(BUILD)/libviaduct.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $^ $(LIBS) -lcmocka
$(MATH): $(BUILD)/tests/%: $(BUILD)/f64/tests/math/%.o $(MATH_AUX) $(BUILD)/libviaduct_f64.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $(LINKED) $(LIBS) -lcmocka
$(BUILD)/tests/rounding: $(BUILD)/f64/tests/gpu/update_case.o
# The golden files once more, over the library that ships.
GPU_AUX := $(patsubst %.c,$(BUILD)/f32/%.o,tests/gpu/gpu_ops.c tests/gpu/op_times.c)
$(BUILD)/tests/check_golden_f32: $(BUILD)/f32/tests/math/check_golden.o $(MATH_AUX:$(BUILD)/f64/%=$(BUILD)/f32/%) $(GPU_AUX) $(BUILD)/libviaduct.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $^ $(LIBS)
# The CUDA kernels, the library of them that the program loads, and their test programs.
# The slow ones first, so that all cores are busy to the end.
CUDA_SRC := $(wildcard cuda/attention/*_mma.cu cuda/kernels/norm.cu) $(wildcard cuda/attention/*_wgmma.cu)
CUDA_SRC += $(filter-out $(CUDA_SRC),$(wildcard cuda/*/*.cu))
CUDA_OBJ := $(patsubst %.cu,$(BUILD)/%.o,$(CUDA_SRC))
# ptxas reports where it waits for a wgmma before its registers are used again. The dK/dV kernel is measured as it is.
NVCC_NOTICES := ^ptxas info .*\(C75(17|19)\) warpgroup\.
CUDA_C_OBJ := $(patsubst %.c,$(BUILD)/pic/%.o,$(wildcard cuda/*/*.c) src/base/error.c src/base/clock.c)
$(BUILD)/pic/%.o: %.c $(BUILD)/flags
	@mkdir -p $(@D)
	$(SAY) CC $@
	$(Q)$(CC) $(ALL_CFLAGS) -isystem $(CUDA_HOME)/include -fPIC -fvisibility=hidden -MMD -MP -c -o $@ $<
$(BUILD)/libviaduct_cuda.so: $(CUDA_OBJ) $(CUDA_C_OBJ)
	$(SAY) LINK $@
	$(Q)$(NVCC) -shared -cudart static -o $@ $^ -Xlinker -rpath,$(CUDA_HOME)/lib64 -Xlinker --exclude-libs,ALL -lcublasLt
$(BUILD)/%.o: %.cu
	@mkdir -p $(@D)
	$(SAY) NVCC $@
	$(Q)$(NVCC) $(NVCC_FLAGS) -MMD -MP -MF $(@:.o=.d) -MT $@ -c -o $@ $< 2>$(@:.o=.log) && failed= || failed=yes; \
	  grep -vE '$(NVCC_NOTICES)' $(@:.o=.log) >&2; rm -f $(@:.o=.log); [ -z "$$failed" ]
cuda-c: $(if $(HAVE_CUDA_HEADERS),$(CUDA_C_OBJ)) ## The C sources of the CUDA part alone, where there is a Toolkit
# cuda/backend/nccl.c over stand-ins for CUDA's runtime and for libnccl.so.2, which dlopen finds by the program's rpath
# (not its runpath: LD_LIBRARY_PATH, where the true one may be, comes before that).
STAND_IN_OBJ := $(patsubst %,$(BUILD)/pic/%.o,tests/stand_in/test_nccl tests/stand_in/cuda_stand_in cuda/backend/nccl \
  cuda/backend/nccl_library cuda/backend/symmetric_memory src/base/error src/base/clock)
stand-in: $(if $(and $(HAVE_CUDA_HEADERS),$(wildcard $(addsuffix /nccl.h,$(CUDA_HOME)/include /usr/local/include /usr/include))),$(BUILD)/tests/test_nccl)
$(BUILD)/tests/test_nccl: $(STAND_IN_OBJ) | $(BUILD)/tests/stand_in/libnccl.so.2
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $^ $(LIBS) -lcmocka -Wl,--disable-new-dtags,-rpath,'$$ORIGIN/stand_in'
$(BUILD)/tests/stand_in/libnccl.so.2: $(BUILD)/pic/tests/stand_in/nccl_stand_in.o
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -shared -o $@ $^
CUDA_PROGRAMS := $(patsubst tests/cuda/%.cu,$(BUILD)/cuda/%,$(wildcard tests/cuda/*.cu))
# An archive, so that each program takes the kernels that it calls and no others: all of them are 14 MB.
$(BUILD)/libkernels.a: $(CUDA_OBJ)
	$(SAY) AR $@
	$(Q)rm -f $@ && $(AR) rcs $@ $^
$(CUDA_PROGRAMS): $(BUILD)/cuda/%: $(BUILD)/tests/cuda/%.o $(BUILD)/libkernels.a
	$(SAY) LINK $@
	$(Q)$(NVCC) $(NVCC_FLAGS) -o $@ $^
# The ops of the CUDA library against the double CPU reference: one source drives each side, compiled for each.
TEST_OPS_OBJ := $(patsubst %.c,$(BUILD)/f64/%.o,$(wildcard tests/cuda/*.c))
$(BUILD)/cuda/test_ops: $(TEST_OPS_OBJ) $(BUILD)/f32/tests/cuda/ops_side.o $(BUILD)/libviaduct_f64.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $^ $(LIBS)
# Whole models on the GPU, through the same table.
GPU_PROGRAMS := $(BUILD)/gpu/one_update $(BUILD)/gpu/bench_train $(BUILD)/gpu/silent_peer
$(BUILD)/gpu/one_update: $(BUILD)/f32/tests/gpu/update_case.o
$(GPU_PROGRAMS): $(BUILD)/gpu/%: $(BUILD)/f32/tests/gpu/%.o $(GPU_AUX) $(BUILD)/libviaduct.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -o $@ $(LINKED) $(LIBS)
gpu-tests: $(CUDA_PROGRAMS) $(BUILD)/cuda/test_ops $(GPU_PROGRAMS) ## The CUDA kernels' test programs (needs nvcc)
gpu-check: all gpu-tests $(BUILD)/tests/check_golden_f32 ## On a GPU node: every check of the CUDA backend but the long curves
	@BUILD='$(BUILD)' bash tests/gpu/check.sh $(ONLY)
gpu-bench: all gpu-tests ## On a GPU node: tokens per second at spans as they are learnt, beside PyTorch
	@BUILD='$(BUILD)' bash tests/gpu/bench.sh
# Other nodes may have older processors: compiled for what all of the last ten years know, in a build folder of its own.
bundle: ## build/bundle/ and its archive: program, CUDA part, libraries, checks, for nodes without a package registry
	@$(MAKE) --no-print-directory BUILD='$(BUILD)/portable' ARCH=x86-64-v3 all gpu-tests '$(BUILD)/portable/tests/check_golden_f32'
	@BUILD='$(BUILD)' bash jobs/bundle.sh '$(BUILD)/portable'
# Fuzz targets want clang and FUZZ_CFLAGS with -fsanitize=fuzzer-no-link (tests/run.sh builds them so): libFuzzer then sees
# which branches were taken in the rooms of FUZZED. With it, loops over numbers take twice as long: they stay without.
FUZZED := $(filter src/base/% src/deck/%,$(LIB_SRC)) $(FUZZ_SRC)
$(FUZZED:%.c=$(BUILD)/f32/%.o): private ALL_CFLAGS += $(FUZZ_CFLAGS)
$(FUZZ): $(BUILD)/tests/%: $(BUILD)/libviaduct.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(LINK) -fsanitize=fuzzer -o $@ $(filter %/$*.o,$^) $(BUILD)/libviaduct.a $(LIBS)
$(foreach s,$(FUZZ_SRC),$(eval $(BUILD)/tests/$(basename $(notdir $s)): $(BUILD)/f32/$(s:.c=.o)))

# Files that change only when what they hold does, so that what depends on them is remade only then.
$(BUILD)/flags: FORCE
	@$(if $(PKGS_MISSING),$(FIND_LIBRARIES) --explain $(PKGS_MISSING); echo "'make deps' installs all packages on Debian." >&2; exit 1)
	@mkdir -p $(@D)
	@printf '%s\n' '$(CC) $(ALL_CFLAGS) $(FUZZ_CFLAGS)' | cmp -s - $@ || printf '%s\n' '$(CC) $(ALL_CFLAGS) $(FUZZ_CFLAGS)' >$@
$(BUILD)/version: FORCE
	@mkdir -p $(@D)
	@echo '$(VERSION) $(GIT)' | cmp -s - $@ || echo '$(VERSION) $(GIT)' >$@

deps: ## Install the Debian packages that building and testing need (root or sudo), or say which
	@[ "$(DEPS)" = no ] || DEBIAN_PACKAGES="$(DEBIAN_PACKAGES)" sh jobs/deps.sh
# The packages may just have been installed: make is called anew so that it looks for them again.
check: deps ## Every test; ends with 'N passed, N failed'
	@$(MAKE) --no-print-directory check-run
# MAKE_COMMAND: a line that names MAKE itself runs even under `make -n`.
check-run:
	@BUILD='$(BUILD)' PYTHON='$(PYTHON)' CC='$(CC)' MAKE='$(MAKE_COMMAND)' bash tests/run.sh $(ONLY)
# Not part of `make check`: it takes some minutes of waiting, and installs Slurm.
check-slurm: ## Job scripts under a Slurm of the test's own, two nodes on this machine (needs root); ONLY=NAME as above
	@[ "$(DEPS)" = no ] || DEBIAN_PACKAGES="$(DEBIAN_PACKAGES) $(SLURM_PACKAGES)" sh jobs/deps.sh
	@$(MAKE) --no-print-directory '$(BUILD)/viaduct'
	@BUILD='$(BUILD)' $(PYTHON) tests/slurm/check_slurm.py $(ONLY)
# What runs on threads of its own, under ThreadSanitizer, in a build folder of its own. Libraries are not built with it.
TSAN := $(addprefix $(BUILD)/tsan/tests/test_,thread watchdog task_queue reader)
# All that these tests call: a third of the library. Where a file is missing here, the linker says so.
TSAN_SRC = $(wildcard src/base/*.c io/*.c) src/comm/watchdog.c src/train/task_queue.c
check-tsan: ## ThreadSanitizer: the tests of threads, watchdog, task queue and reader (clang)
	@$(MAKE) --no-print-directory BUILD='$(BUILD)/tsan' CC=clang CUDA=no OPT='-O1 -fno-omit-frame-pointer' CFLAGS=-fsanitize=thread LIB_SRC='$(TSAN_SRC)' $(TSAN)
	@export OMP_NUM_THREADS=1 TSAN_OPTIONS=ignore_noninstrumented_modules=1; \
	  for t in $(TSAN); do $$t || exit 1; done
# Counting each line slows the program down: a build folder of its own. The counters are variables, so that the test of
# conventions, and all else that does not run the program, stay out.
coverage: ## Which lines the tests run, by room; ONLY=NAME runs the tests whose name contains it
	@BUILD='$(BUILD)/coverage' PYTHON='$(PYTHON)' CC='$(CC)' CUDA=no OPT=-O1 CFLAGS=--coverage MAKE='$(MAKE_COMMAND)' RUN_ONLY=yes \
	  bash tests/run.sh $(ONLY); status=$$?; $(PYTHON) tests/coverage.py '$(BUILD)/coverage' && exit $$status
quickstart: deps ## Corpus, training on two ranks, evaluation and pictures, within 6 minutes on 2 cores
	@$(MAKE) --no-print-directory quickstart-run
# A CUDA part that was built before stays.
quickstart-run: private WITH_CUDA = $(if $(CUDA),$(CUDA),$(if $(HAVE_CUDA),$(if $(HAVE_GPU),yes,no),no))
quickstart-run:
	@$(if $(HAVE_CUDA),echo "$(if $(filter no,$(WITH_CUDA)),No NVIDIA GPU here: the CUDA part is not built (CUDA=yes builds it).,The CUDA part is built; CUDA=no leaves it out.)")
	@$(MAKE) --no-print-directory $(PARALLEL) CUDA=$(WITH_CUDA) all
	@BUILD='$(BUILD)' PYTHON='$(PYTHON)' bash jobs/quickstart.sh
report: ## RUN=FOLDER: a page of HTML about a run, RUN/report.html; RUNS="FOLDER..." are other runs beside it
	@$(PYTHON) doc/analysis/report.py $(if $(RUN),'$(RUN)',$(error make report needs RUN=FOLDER, the folder of a run)) $(RUNS)
bench: all ## Tokens per second beside the same model in PyTorch (TORCH_PYTHON=a python with torch)
	@BUILD='$(BUILD)' bash tests/bench/run.sh
enwik8: ## Fetch enwik8.zip into data/ and verify it
	@bash jobs/fetch_enwik8.sh
format: ## Format all C sources with clang-format
	clang-format -i $(C_FILES)
# The analyser follows the paths through each function: three quarters of the time. `make check` runs all else.
LINT_EXTRA = -isystem $(CUDA_HOME)/include $(VERSION_FLAGS) $(INTERFACE_FLAGS)
# Sources that include headers of the CUDA Toolkit are left out where there is none.
NOT_LINTED = $(if $(HAVE_CUDA_HEADERS),,cuda/% tests/stand_in/%)
lint: lint-shell ## clang-tidy over the C sources, shellcheck over the scripts: warnings are errors
lint-quick: private TIDY = -clang-analyzer-*
lint-quick: ## clang-tidy without its analyser; TIDY_FILES=io/% names the files
lint lint-quick:
	@printf '%s\n' $(filter-out $(NOT_LINTED),$(or $(filter $(or $(TIDY_FILES),%.c),$(filter %.c,$(C_FILES))),$(error no file matches TIDY_FILES))) | xargs -P $(or $(JOBS),$$(nproc)) -I{} \
	  clang-tidy --quiet --warnings-as-errors='*' $(if $(TIDY),--checks='$(TIDY)') {} -- $(filter-out -Werror,$(ALL_CFLAGS)) $(LINT_EXTRA)
lint-shell:
	@shellcheck $(wildcard .ci/run jobs/*.sh tests/*.sh tests/*/*.sh)
# For clangd and other tools that ask how a file is compiled. Quotes in the flags are escaped as JSON wants it.
compile_commands.json: export COMPILE = $(subst ",\",$(subst \,\\,$(CC) $(ALL_CFLAGS) $(LINT_EXTRA)))
compile_commands.json: FORCE ## How each C file is compiled, for editors
	@{ sep='['; for f in $(filter %.c,$(C_FILES)); do \
	  printf '%s\n{"directory": "$(CURDIR)", "file": "%s", "command": "%s -c %s"}' "$$sep" "$$f" "$$COMPILE" "$$f"; sep=,; \
	  done; printf '\n]\n'; } >$@
INSTALL = @PREFIX='$(abspath $(PREFIX))' DESTDIR='$(DESTDIR)' BUILD='$(BUILD)' CUDA='$(if $(HAVE_CUDA),yes,no)' bash jobs/install.sh
install: all ## Install under PREFIX (DESTDIR is honoured)
	$(INSTALL) install
uninstall: ## Remove what `make install` with the same PREFIX and DESTDIR installed
	$(INSTALL) uninstall
clean: ## Remove everything that was built
	rm -rf $(BUILD)

-include $(CUDA_C_OBJ:.o=.d) $(STAND_IN_OBJ:.o=.d) $(BUILD)/pic/tests/stand_in/nccl_stand_in.d $(CUDA_OBJ:.o=.d) $(wildcard $(BUILD)/tests/cuda/*.d) $(F32_OBJ:.o=.d) $(F64_OBJ:.o=.d) $(BUILD)/f32/src/main.d $(wildcard $(BUILD)/f*/tests/*/*.d)
