#!/usr/bin/python3
"""Bytes of a file packed by `viaduct compress` and by other programs, as a table in markdown.

    tests/bench/compress_table.py DECK FILE [--train TEXT] [--ranks N] [--set GROUP%NAME=VALUE]...

FILE should be text that the model of the deck was not trained on. TEXT is what it was trained on: with it there is a
column of what FILE costs a program that has packed TEXT just before, size(TEXT + FILE) - size(TEXT), since a model has
seen TEXT as well. Programs that are not installed are left out (Debian: xz-utils zstd brotli bzip2 p7zip-full zpaq). The
model counts with its parameters as float32 and as xz -9e packs them."""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np

# name, command; {i} and {o} are input and output
PROGRAMS = (("bzip2 -9", "bzip2 -9 -c {i} > {o}"),
            ("xz -9e", "xz -9e -T1 -c {i} > {o}"),
            ("zstd --ultra -22", "zstd -q --ultra -22 --long=27 -c {i} > {o}"),
            ("brotli -q 11", "brotli -q 11 -w 24 -c {i} > {o}"),
            ("ppmd (7z)", "7z a -bd -y -t7z -mx=9 -m0=PPMd:o=16:mem=256m {o}.7z {i} > {o}.log && mv {o}.7z {o}"),
            ("zpaq -m5", "zpaq a {o}.zpaq {i} -m5 -t1 > {o}.log 2>&1 && mv {o}.zpaq {o}"))


def size(command, path, folder):
    """(bytes, seconds)"""
    out = os.path.join(folder, "out")
    if os.path.exists(out):
        os.remove(out)
    start = time.monotonic()
    subprocess.run(command.format(i=shlex.quote(path), o=shlex.quote(out)), shell=True, check=True)
    return os.path.getsize(out), time.monotonic() - start


def viaduct(args, folder):
    """The numbers that compress prints, seconds, and the path of the checkpoint."""
    build = os.environ.get("BUILD") or os.path.join(os.path.dirname(__file__), "..", "..", "build")
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(args.ranks)]
    words = [w for s in args.set for w in ("--set", s)] + ["--set", f"compress%output={os.path.join(folder, 'packed')}"]
    start = time.monotonic()
    done = subprocess.run((mpirun if args.ranks > 1 else []) + [os.path.join(build, "viaduct"), "compress", args.deck, *words,
                                                               "--set", f"compress%input={args.file}"],
                          stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - start
    checkpoint = re.search(r"checkpoint +(.*), update", done.stdout).group(1)
    return json.loads(done.stdout.splitlines()[-1]), seconds, checkpoint


def parameters(checkpoint, folder):
    """Bytes of the parameters as float32, and of those packed by xz."""
    path = os.path.join(folder, "parameters")
    with h5py.File(checkpoint) as f, open(path, "wb") as out:
        for tensor in (t for t in f["/model"].values() if not h5py.h5ds.is_scale(t.id)):
            out.write(np.asarray(tensor, dtype="<f4").tobytes())
    return os.path.getsize(path), size("xz -9e -T1 -c {i} > {o}", path, folder)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deck")
    parser.add_argument("file")
    parser.add_argument("--train")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    n = os.path.getsize(args.file)
    folder = tempfile.mkdtemp(prefix="viaduct-compress-")
    try:
        both = os.path.join(folder, "both")
        if args.train:
            with open(both, "wb") as out:
                for path in (args.train, args.file):
                    with open(path, "rb") as f:
                        shutil.copyfileobj(f, out)
        print(f"| {n} bytes, packed by | bytes | bits per byte | behind the training text | s |\n|---|---|---|---|---|")
        print(f"| nothing | {n} | 8.000 | | |")
        for name, command in PROGRAMS:
            if not shutil.which(command.split()[0]):
                continue
            packed, seconds = size(command, args.file, folder)
            behind = size(command, both, folder)[0] - size(command, args.train, folder)[0] if args.train else ""
            print(f"| {name} | {packed} | {8 * packed / n:.3f} | {behind} | {seconds:.1f} |", flush=True)
        result, seconds, checkpoint = viaduct(args, folder)
        raw, dense = parameters(checkpoint, folder)
        print(f"| viaduct, the code alone | {result['code']} | {8 * result['code'] / n:.3f} | {result['code']} | |")
        for name, more in (("viaduct", 0), ("viaduct and its parameters by xz", dense), ("viaduct and its parameters, float32", raw)):
            print(f"| {name} | {result['packed'] + more} | {8 * (result['packed'] + more) / n:.3f} | | "
                  f"{f'{seconds:.1f}' if more == 0 else ''} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
