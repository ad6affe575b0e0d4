#!/usr/bin/python3
"""Damaged and hostile files: mutants of a corpus, a shard, a checkpoint and a trace, given to every command that reads them.

Usage: mutate.py [COUNT [SEED]]    (VIADUCT: the program, best one with sanitizers; BUILD/clang/viaduct, else BUILD/viaduct)

Each mutant must end a command with an exit status of its own (0, 1, 2) within 10 seconds, without a sanitizer's report,
without memory beyond twice its size and 400 MiB, and without opening anything outside its folder (a FIFO stands there: who
opens it hangs). A crash inside HDF5 on a forged file with a right digest is counted apart (doc/RELIABILITY.md).
"""
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np

import whole
from whole import BUILD, ENVIRONMENT, Place, seal, settings, unseal

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 40
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
SANITIZED = os.path.join(BUILD, "clang", "viaduct")
PROGRAM = os.environ.get("VIADUCT") or (SANITIZED if os.path.exists(SANITIZED) else whole.VIADUCT)
SECONDS, ALLOWANCE = 10.0, 400 << 20


# ---- mutations of bytes ----

def flip(draw, data):
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(draw, data):
    del data[draw.randrange(len(data)):]


def grow(draw, data):
    at = draw.randrange(len(data))
    data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 4096))))


def blank(draw, data):
    at = draw.randrange(len(data))
    n = min(draw.choice((1, 16, 512, 65536)), len(data) - at)
    data[at:at + n] = bytes([draw.choice((0, 255))]) * n


def move(draw, data):
    n = min(draw.choice((8, 512, 4096)), len(data) // 2)
    a, b = draw.randrange(len(data) - n), draw.randrange(len(data) - n)
    data[a:a + n] = data[b:b + n]


# ---- mutations of structure ----

def datasets(f):
    found = []
    f.visititems(lambda name, o: found.append(name) if isinstance(o, h5py.Dataset) else None)
    return found


def replace(f, name, **keywords):
    attributes = dict(f[name].attrs)
    del f[name]
    d = f.create_dataset(name, **keywords)
    for key, value in attributes.items():
        if key not in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"):
            d.attrs[key] = value


def other_type(draw, f, name, outside):
    data = f[name][()]
    replace(f, name, data=np.asarray(data).astype(draw.choice(("i1", "i8", "u4", "f8", "f2", ">f4", "S3"))))


def other_rank(draw, f, name, outside):
    replace(f, name, data=np.asarray(f[name][()]).reshape((1,) * draw.choice((1, 2, 30)) + np.shape(f[name])))


def huge(draw, f, name, outside):
    shape = list(f[name].shape) or [1]
    shape[draw.randrange(len(shape))] = draw.choice((10**6, 10**9, 2**40, 2**62))
    replace(f, name, shape=tuple(shape), dtype=f[name].dtype, chunks=tuple(min(s, 64) for s in shape))


def empty(draw, f, name, outside):
    replace(f, name, shape=(0,) * max(1, f[name].ndim), dtype=f[name].dtype)


def values(draw, f, name, outside):
    d = f[name]
    if d.size == 0 or d.dtype.kind not in "iuf":
        return
    at = tuple(draw.randrange(n) for n in d.shape)
    bad = (np.nan, np.inf, -np.inf, -1.0, 1e300) if d.dtype.kind == "f" else (-1, -2**31, 2**31 - 1, 2**62, 255, 65535)
    value = draw.choice(bad)
    d[at] = np.array([value]).astype("f8" if d.dtype.kind == "f" else "i8").astype(d.dtype)[0]


def drop(draw, f, name, outside):
    del f[name]


def as_group(draw, f, name, outside):
    del f[name]
    f.create_group(name)


def soft_link(draw, f, name, outside):
    del f[name]
    f[name] = h5py.SoftLink(draw.choice(("/nowhere", "/" + name, "/", "/model")))


def external_link(draw, f, name, outside):
    del f[name]
    f[name] = h5py.ExternalLink(outside, "/" + name)


def external_storage(draw, f, name, outside):
    shape, kind = f[name].shape, f[name].dtype
    if not shape:
        return
    del f[name]
    f.create_dataset(name, shape=shape, dtype=kind, external=[(outside, 0, h5py.h5f.UNLIMITED)])


def virtual(draw, f, name, outside):
    shape, kind = f[name].shape, f[name].dtype
    if not shape:
        return
    del f[name]
    layout = h5py.VirtualLayout(shape=shape, dtype=kind)
    layout[...] = h5py.VirtualSource(outside, "/" + name, shape=shape)
    f.create_virtual_dataset(name, layout)


def attribute(draw, f, name, outside):
    keys = list(f.attrs)
    key = draw.choice(keys)
    new = draw.choice((-1, 2**62, 1e308, float("nan"), b"", b"\x1b[2J\xff", b"x" * 60000, np.arange(9)))
    del f.attrs[key]
    if draw.random() < 0.8:
        f.attrs[key] = new


BYTES = (flip, flip, flip, cut, grow, blank, move)
STRUCTURE = (other_type, other_rank, huge, empty, values, values, values, drop, as_group, soft_link, external_link,
             external_storage, virtual, attribute, attribute)


def special(draw, path, outside):
    """Something that is no regular file in the file's place."""
    os.remove(path)
    kind = draw.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        os.mkdir(path)
    elif kind == 2:
        os.symlink("/dev/zero", path)
    else:
        os.symlink(outside, path)


def mutate(draw, path, outside):
    """Changes the file; a name for what was done."""
    how = draw.random()
    if how < 0.04:
        special(draw, path, outside)
        return "special", False
    if how < 0.5:
        kind = draw.choice(BYTES)
        again = draw.random() < 0.3 and unseal(path)
        with open(path, "rb") as f:
            data = bytearray(f.read())
        kind(draw, data)
        with open(path, "wb") as f:
            f.write(data)
        if again:
            seal(path)
        return f"{kind.__name__}{' sealed' if again else ''}", again
    kind = draw.choice(STRUCTURE)
    sealed = unseal(path)
    try:
        with h5py.File(path, "r+", libver="latest") as f:
            kind(draw, f, draw.choice(datasets(f)), outside)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, OverflowError, MemoryError):
        pass  # not every dataset can be changed in every way; what was changed so far is the mutant
    if sealed and draw.random() < 0.9:
        seal(path)
    return f"structure {kind.__name__}", True


# ---- running ----

def run(words, folder):
    """(exit status, output, seconds, peak memory in bytes)."""
    begin = time.monotonic()
    environment = dict(ENVIRONMENT, UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
                       ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=0")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with open(os.path.join(folder, "out"), "w+b") as out:
        p = subprocess.Popen([PROGRAM, *words], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
        pid, status, usage = 0, 0, None
        while pid == 0 and time.monotonic() - begin < SECONDS:
            pid, status, usage = os.wait4(p.pid, os.WNOHANG)
            if pid == 0:
                time.sleep(0.01)
        if pid == 0:
            p.kill()
            os.wait4(p.pid, 0)
            p.returncode = -9
            return None, "", time.monotonic() - begin, 0
        p.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode("utf-8", "replace")
    del before
    return p.returncode, text, time.monotonic() - begin, usage.ru_maxrss << 10


def commands(place, target, path):
    small = settings(run__directory=place.path("mutant"), data__path=place.path("mutants", "data.h5"), valid__interval=0)
    deck = place.deck
    result = [("info", path)]
    if target == "checkpoint":
        result += [("eval", deck, *settings(eval__checkpoint=path)),
                   ("generate", deck, *settings(generate__checkpoint=path)),
                   ("train", deck, *settings(run__directory=place.path("mutant"), run__max_updates=22, valid__interval=0))]
    elif target == "trace":
        result += [("train", deck, *settings(run__directory=place.path("mutant"), run__max_updates=22, valid__interval=0))]
    else:
        result += [("train", deck, *small, *settings(run__max_updates=2, run__resume="never"))]
    return result


def prepare_mutant(place, target):
    """Fresh copies; the path of the file to change."""
    for folder in ("mutant", "mutants"):
        shutil.rmtree(place.path(folder), ignore_errors=True)
    os.makedirs(place.path("mutants"))
    if target in ("corpus", "shard"):
        for name in os.listdir(place.folder):
            if name.startswith("data") and name.endswith(".h5"):
                shutil.copy(place.path(name), place.path("mutants", name))
        return place.path("mutants", "data.h5" if target == "corpus" else "data-train-0000.h5")
    shutil.copytree(place.path("run"), place.path("mutant"), symlinks=True)
    return place.path("mutant", "checkpoints", "update-00000020.h5") if target == "checkpoint" \
        else place.path("mutant", "trace.h5")


def problem_of(result, size):
    status, text, seconds, memory = result
    if status is None:
        return f"waited {seconds:.0f} s"
    if "Sanitizer" in text or "runtime error" in text or status < 0 or status > 128:
        inside = "libhdf5" in text and "viaduct/" not in text.split("libhdf5")[0]
        return f"HDF5 crashed ({status})" if inside else f"crashed ({status}): {text[-1500:]}"
    if status not in (0, 1, 2):
        return f"exit status {status}: {text[-300:]}"
    if memory > 2 * size + ALLOWANCE:
        return f"took {memory >> 20} MiB for a file of {size >> 10} KiB"
    if any(ord(c) < 32 and c not in "\n\t" or ord(c) == 127 for c in text):
        return "printed control characters"
    return ""


def main():
    place = Place(tokens=60000)
    failures, inside, slowest, count = [], 0, 0.0, 0
    try:
        made = place.train("run", run__max_updates=20, checkpoint__keep=1)
        if made.returncode:
            sys.exit(f"not ok train: {made.stderr}")
        os.mkdir(place.path("elsewhere"))
        outside = place.path("elsewhere", "secret.h5")
        os.mkfifo(outside)
        draw = random.Random(SEED)
        for i in range(COUNT):
            target = ("checkpoint", "corpus", "shard", "trace")[i % 4]
            path = prepare_mutant(place, target)
            what, forged = mutate(draw, path, outside)
            size = os.path.getsize(path) if os.path.isfile(path) and not os.path.islink(path) else 0
            for words in commands(place, target, path):
                result = run(words, place.folder)
                slowest = max(slowest, result[2])
                problem = problem_of(result, size)
                if problem.startswith("HDF5 crashed") and forged:
                    inside += 1
                    print(f"# mutant {i}: {target}, {what}, {words[0]}: {problem}", flush=True)
                elif problem:
                    failures.append(i)
                    print(f"not ok mutant {i} of seed {SEED}: {target}, {what}, {words[0]}: {problem}", flush=True)
                    kept = os.environ.get("KEEP")
                    if kept and os.path.isfile(path):
                        shutil.copy(path, os.path.join(kept, f"mutant-{SEED}-{i}.h5"))
            count += 1
            if count % 50 == 0:
                print(f"# {count} mutants so far, slowest command {slowest:.1f} s", flush=True)
    finally:
        place.remove()
    print(f"# {count} mutants, slowest command {slowest:.1f} s, {inside} crashes inside HDF5 on forged files")
    if not failures:
        print(f"ok {count} mutants of corpora, shards, checkpoints and traces end in order")
    sys.exit(1 if failures else 0)


main()
