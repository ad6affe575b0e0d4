# Viaduct. `make help` lists the targets.
CC      ?= gcc
MPICC   ?= mpicc
BUILD   ?= build
HDF5    := $(shell for p in hdf5-openmpi hdf5-serial hdf5; do pkg-config --exists $$p 2>/dev/null && echo $$p && break; done)
PKGS    := $(HDF5) mpi openblas libarchive nettle jansson
VERSION := 0.1.0
GIT     := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

WARN    := -Wall -Wextra -Wpedantic -Werror
OPT     ?= -O3 -march=native -fno-math-errno -fno-trapping-math
CFLAGS  ?=
ALL_CFLAGS := -std=c11 -D_GNU_SOURCE -g $(OPT) -fopenmp $(WARN) -Isrc -Iio -I. \
  $(patsubst -I%,-isystem %,$(shell pkg-config --cflags $(PKGS) 2>/dev/null)) \
  -DVD_VERSION='"$(VERSION)"' $(CFLAGS)
LIBS    := $(shell pkg-config --libs $(PKGS) 2>/dev/null) -lm -lpthread

LIB_SRC  := $(filter-out src/main.c,$(wildcard src/*.c)) $(wildcard src/cpu/*.c) $(wildcard io/*.c)
F32_OBJ  := $(LIB_SRC:%.c=$(BUILD)/f32/%.o)
F64_OBJ  := $(LIB_SRC:%.c=$(BUILD)/f64/%.o)
UNIT     := $(patsubst tests/unit/%.c,$(BUILD)/tests/%,$(wildcard tests/unit/test_*.c))
MATH     := $(patsubst tests/math/%.c,$(BUILD)/tests/%,$(wildcard tests/math/*.c))

all: $(BUILD)/viaduct

$(BUILD)/viaduct: $(BUILD)/f32/src/main.o $(BUILD)/libviaduct.a
	$(CC) -fopenmp $(CFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/libviaduct.a: $(F32_OBJ)
	rm -f $@ && ar rcs $@ $^
$(BUILD)/libviaduct_f64.a: $(F64_OBJ)
	rm -f $@ && ar rcs $@ $^
$(BUILD)/f32/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/f64/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DVD_DOUBLE -MMD -MP -c -o $@ $<
$(BUILD)/tests/%: tests/unit/%.c $(BUILD)/libviaduct.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -MMD -MP -MF $@.d -o $@ $< $(BUILD)/libviaduct.a $(LIBS) -lcmocka
$(BUILD)/tests/%: tests/math/%.c $(BUILD)/libviaduct_f64.a
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DVD_DOUBLE -MMD -MP -MF $@.d -o $@ $< $(BUILD)/libviaduct_f64.a $(LIBS) -lcmocka

.PHONY: all
-include $(F32_OBJ:.o=.d) $(F64_OBJ:.o=.d) $(UNIT:=.d) $(MATH:=.d)
