#!/usr/bin/python3
"""viaduct compress and decompress: round trips, the same file for any number of ranks and threads, the size beside eval's
bpc, damage, other models, builds and kernels. The bits of a packed file depend on the machine's BLAS: no golden file."""
import json
import math
import os
import random
import struct
import subprocess

from whole import ENVIRONMENT, Place, command, finish, report, seal, settings, text, unseal, viaduct


def run(verb, source, target, ranks=0, environment=None, **variables):
    words = settings(compress__input=place.path(source), compress__output=place.path(target), **variables)
    return subprocess.run(command(verb, place.deck, *words, ranks=ranks), capture_output=True, text=True, errors="replace",
                          env=dict(ENVIRONMENT, **(environment or {})), timeout=120, check=False)


def write(name, data):
    with open(place.path(name), "wb") as f:
        f.write(data)
    return name


def read(name):
    with open(place.path(name), "rb") as f:
        return f.read()


def exists(name):
    return os.path.exists(place.path(name))


def numbers(done):
    return json.loads(done.stdout.splitlines()[-1])


def round_trips():
    draw = random.Random(3)
    for name, data in (("text", TEXT), ("an empty file", b""), ("one byte", b"e"),
                       ("random bytes", draw.randbytes(3000)), ("three bytes that the model does not know", b"\x00\xff\x80"),
                       ("text with a few of them", b"e" * 2000 + TEXT[:3000] + "é€".encode() + b"e" * 2000 + b"\x00")):
        packed = run("compress", write("in", data), "packed")
        again = run("decompress", "packed", "out")
        report(f"round trip of {name}", packed.returncode == again.returncode == 0 and read("out") == data
               and numbers(packed)["packed"] == len(read("packed")), packed.stderr + again.stderr)
        if name == "random bytes":
            report("bytes outside the vocabulary cost little more than themselves", numbers(packed)["code"] < 1.5 * 3000,
                   packed.stdout)
        if name == "an empty file":
            report("of nothing no code", numbers(packed)["code"] == 0, packed.stdout)
        if name == "text":
            report("streams by the length of the file", (numbers(packed)["streams"], numbers(packed)["group"]) == (4, 4),
                   packed.stdout)


def ranks_and_threads():
    write("in", TEXT)
    variables = {"compress__streams": 7, "compress__group": 2}
    files = {}
    for ranks, threads in ((0, 2), (2, 1), (4, 1)):
        name = f"packed-{ranks}-{threads}"
        done = run("compress", "in", name, ranks, {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
                   **variables)
        files[ranks, threads] = read(name) if done.returncode == 0 else done.stderr
    report("the same file on 1, 2 and 4 ranks, alone with 2 threads", len(set(files.values())) == 1, str(files)[:2000])
    done = run("decompress", "packed-0-2", "out", 3)
    report("unpacked on 3 ranks", done.returncode == 0 and read("out") == TEXT, done.stderr)
    done = run("decompress", "packed-2-1", "out")
    report("unpacked on one rank", done.returncode == 0 and read("out") == TEXT, done.stderr)


def size_of_bpc():
    """The code is as long as eval says: all bytes but the first of a stream cost their nll."""
    write("source", text(4000) + TEXT)
    corpus = place.path("held.h5")
    made = viaduct("prepare", place.path("prepare.nml"), *settings(
        data__path=corpus, prepare__source=place.path("source"), prepare__vocabulary=place.checkpoint("run"),
        prepare__train=4000, prepare__valid=0, prepare__test=len(TEXT)))
    symbols = int(made.stdout.split(" symbols")[0].split()[-1]) if made.returncode == 0 else 0
    for streams, group in ((1, 1), (4, 4)):
        evaluated = viaduct("eval", place.deck, *settings(data__path=corpus, eval__streams=streams, eval__tokens_per_sample=1))
        packed = run("compress", write("in", TEXT), "packed", compress__streams=streams, compress__group=group)
        if evaluated.returncode or packed.returncode:
            report(f"size with {streams} streams", False, made.stderr + evaluated.stderr + packed.stderr)
            continue
        wanted = (numbers(evaluated)["nll"] / math.log(2) + streams * math.log2(symbols)) / 8
        code = numbers(packed)["code"]
        report(f"the size is eval's bpc, {streams} streams in groups of {group}", abs(code / wanted - 1) < 1e-3
               and code * 8 / len(TEXT) < 4.5, f"{code} bytes, eval's nll gives {wanted:.1f}")


def refuse(name, status, message, **variables):
    write("out", b"mine")
    done = run("decompress", "bad", "out", **variables)
    report(f"{name}: refused, and no output", done.returncode == status and message in done.stderr and read("out") == b"mine"
           and not [f for f in os.listdir(place.folder) if ".tmp-" in f], str(done))


def damage():
    run("compress", write("in", TEXT[:2000]), "packed", compress__streams=8, compress__group=3)
    good = read("packed")
    for at in (3, 60, len(good) - 400, len(good) - 40):
        write("bad", good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        refuse(f"byte {at} of {len(good)} flipped", 1, "bad")
    for name, data in (("half of it", good[:len(good) // 2]), ("nothing", b""), ("more", good + b"\n")):
        write("bad", data)
        refuse(name, 1, "no digest at its end" if name != "nothing" else "is empty")
    write("bad", read("run/checkpoints/last.h5"))
    refuse("a checkpoint", 1, "is not a file that `viaduct compress` wrote")
    info = viaduct("info", place.path("packed"))
    report("info describes the file", info.returncode == 0 and "packed file" in info.stdout and "2000 bytes" in info.stdout
           and "OpenBLAS" in info.stdout, str(info))
    write("bad", good[:300] + b"?" + good[301:])
    info = viaduct("info", place.path("bad"))
    report("info of a damaged one", info.returncode == 1 and "damaged" in info.stderr and not info.stdout, str(info))


def forge(change):
    """The packed file with other content and a right digest."""
    write("bad", read("packed"))
    unseal(place.path("bad"))
    write("bad", change(read("bad")))
    seal(place.path("bad"))


def others():
    forge(lambda data: data)
    refuse("another model", 2, "was packed with the checkpoint of update 200", compress__checkpoint=place.checkpoint("run", 190))
    forge(lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    refuse("code that gives other bytes", 1, "another SHA-256 than the original")
    forge(lambda data: data.replace(b"\x03\x00cpu", b"\x03\x00gpu", 1))
    refuse("another backend", 1, "the backend differs: 'gpu' there, 'cpu' here")
    done = run("decompress", "bad", "out", compress__ignore_build=".true.")
    report("compress%ignore_build tries it", done.returncode == 0 and read("out") == TEXT[:2000], done.stderr)
    forge(lambda data: data[:8] + struct.pack("<I", 2) + data[12:])
    refuse("a later format", 1, "has format 2")
    forge(lambda data: data[:160] + struct.pack("<I", 60000) + data[164:])
    refuse("a header that contradicts itself", 1, "contradicts itself")
    forge(lambda data: data)
    for kernel in ("Prescott",):
        done = run("decompress", "bad", "other", environment={"OPENBLAS_CORETYPE": kernel})
        if done.returncode == 0:
            continue  # this OpenBLAS has no such kernel
        report(f"kernel {kernel} is refused by name", done.returncode == 1 and "the kernel differs: '" in done.stderr
               and not exists("other"), str(done))
        done = run("decompress", "bad", "other", environment={"OPENBLAS_CORETYPE": kernel}, compress__ignore_build=".true.")
        report(f"kernel {kernel}, tried: the original or nothing", exists("other") == (done.returncode == 0)
               and (done.returncode == 1 or read("other") == TEXT[:2000]), str(done))


def paths():
    write("in", TEXT[:500])
    for verb in ("compress", "decompress"):
        done = run(verb, "packed" if verb == "decompress" else "in", "packed" if verb == "decompress" else "in")
        report(f"{verb}: the input is no output", done.returncode == 2 and "compress%output" in done.stderr, str(done))
        done = run(verb, "absent", "out")
        report(f"{verb} of a missing file", done.returncode == 1 and "compress%input: cannot open" in done.stderr, str(done))
    done = run("compress", "in", "none/out")
    report("compress into a missing folder", done.returncode == 1 and "compress%output: " in done.stderr, str(done))
    done = run("decompress", "in", "out", device__backend="cuda")
    report("decompress on a GPU", done.returncode == 2 and "computes on the CPU" in done.stderr, str(done))


def transformer_xl():
    """The memory that compress worked with is in the file, whatever the deck of decompress says."""
    words = {"model__arch": "transformer_xl", "span__attn_span": 8192, "span__ramp": 32, "span__aux_loss_scaler": 0,
             "memory__mem_len": 32, "run__max_updates": 20, "optimizer__clip_step": 0}
    trained = place.train("xl", **words)
    model = {"model__arch": "transformer_xl", "span__attn_span": 8192, "span__ramp": 32,
             "compress__checkpoint": place.checkpoint("xl")}
    packed = run("compress", write("in", TEXT[:3000]), "packed", memory__mem_len=20, **model)
    again = run("decompress", "packed", "out", memory__mem_len=32, **model)
    report("Transformer-XL with another memory", packed.returncode == again.returncode == 0 and read("out") == TEXT[:3000]
           and "mem_len = 20" in viaduct("info", place.path("packed")).stdout, trained.stderr + packed.stderr + again.stderr)


def words():
    for name in ("train", "valid", "test"):
        write(name, b"the cat sat on the mat\n" * 60)
    variables = {"data__path": place.path("words.h5"), "run__directory": place.path("words"), "run__max_updates": 1,
                 "valid__interval": 0}
    made = [viaduct("prepare", place.deck, *settings(**variables, **{f"prepare__{n}_text": place.path(n)
                                                                     for n in ("train", "valid", "test")})),
            viaduct("train", place.deck, *settings(**variables)),
            run("compress", "in", "out", run__directory=place.path("words"))]
    report("a model of words is refused", [m.returncode for m in made] == [0, 0, 2] and "are words" in made[2].stderr,
           str(made))


place = Place(tokens=160000)
try:
    TEXT = text(180000)[-20000:]
    trained = place.train("run", run__max_updates=200, valid__interval=0)
    report("train", trained.returncode == 0, trained.stderr)
    round_trips()
    ranks_and_threads()
    size_of_bpc()
    damage()
    others()
    paths()
    transformer_xl()
    words()
finally:
    place.remove()
finish()
