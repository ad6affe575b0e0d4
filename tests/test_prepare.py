#!/usr/bin/python3
"""viaduct prepare as a whole: packings, ranks, texts, reruns, kills, damage, other programs that read the files."""
import collections
import glob
import gzip
import hashlib
import lzma
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile

import h5py
import numpy as np
import xarray

from whole import ENVIRONMENT, SOURCE, command, finish, report, settings, viaduct

FOLDER = tempfile.mkdtemp(prefix="viaduct-prepare-")
SPLITS = ("train", "valid", "test")
random.seed(1)
RAW = bytes(random.choices(range(256), weights=[(i * 37) % 101 if i not in (0, 7, 200) else 0 for i in range(256)],
                           k=400000))


def path(*parts):
    return os.path.join(FOLDER, *parts)


def write(name, data):
    with open(path(name), "wb") as f:
        f.write(data)
    return path(name)


def prepare(name, *words, ranks=0, check=False, **variables):
    """Runs with data%path = NAME.h5 in the folder; prepare__... variables by keyword."""
    deck = write("empty.nml", b"&prepare /\n")
    values = {"data__path": f"'{path(name)}.h5'"}
    for key, value in variables.items():
        values[f"prepare__{key}"] = f"'{value}'" if isinstance(value, str) and not value.startswith(".") else value
    words = list(words) + settings(**values)
    return viaduct("prepare", deck, *words, *(["--check"] if check else []), ranks=ranks)


RULE = {"train": 0.8, "valid": 0.1, "test": 0.1, "shard_tokens": 30000}


def tokens(name):
    with h5py.File(path(name + ".h5")) as f:
        return [f[s][:] for s in SPLITS]


def symbols(name):
    with h5py.File(path(name + ".h5")) as f:
        v = f["vocabulary"]
        return [bytes(s[:n]) for s, n in zip(v["symbol"][:], v["length"][:])]


def listing(name):
    """What the folder holds of a corpus: name -> (inode, time of change), so that 'not touched' shows."""
    found = glob.glob(path(name + "*.h5")) + glob.glob(path("." + name + "*"))
    return {os.path.basename(p): (os.stat(p).st_ino, os.stat(p).st_mtime_ns) for p in found}


def digest(name):
    """Of the tokens as they lie in the shards, without the files' dates."""
    total = hashlib.md5()
    for p in sorted(glob.glob(path(name + "-*.h5"))):
        with h5py.File(p) as f:
            total.update(os.path.basename(p)[len(name):].encode() + f["tokens"][:].tobytes() + f.attrs["corpus_id"])
    return total.hexdigest()


def expect(name, run, status, *words):
    said = run.stdout + run.stderr
    missing = [w for w in words if w not in said]
    report(name, run.returncode == status and not missing, f"exit {run.returncode}, wanted {status}, lacks {missing}: {said}")


def packings():
    plain = write("raw", RAW)
    packed = {"plain": plain, "gz": write("raw.gz", gzip.compress(RAW)), "xz": write("raw.xz", lzma.compress(RAW)),
              "gz_of_two": write("two.gz", gzip.compress(RAW[:1000]) + gzip.compress(RAW[1000:]))}
    with zipfile.ZipFile(path("raw.zip"), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("raw", RAW)
    packed["zip"] = path("raw.zip")
    wanted = None
    for kind, source in packed.items():
        run = prepare(f"p_{kind}", source=source, **RULE)
        expect(f"prepare from {kind}", run, 0, f"400000 bytes, md5 {hashlib.md5(RAW).hexdigest()}", "is not enwik8")
        wanted = wanted or digest("p_plain")
        report(f"{kind}: the same tokens", digest(f"p_{kind}") == wanted)
    for ranks in (1, 2, 4):
        for kind in ("plain", "xz"):
            prepare(f"r{ranks}_{kind}", ranks=ranks, source=packed[kind], deflate=2, **RULE)
            report(f"{ranks} ranks from {kind}: the same tokens", digest(f"r{ranks}_{kind}") == wanted)
    got, names = tokens("p_plain"), symbols("p_plain")
    back = b"".join(b"".join(names[t] for t in split) for split in got)
    report("the tokens are the source", back == RAW and [len(s) for s in got] == [320000, 40000, 40000])
    report("the vocabulary is the distinct bytes in order", names == [bytes([b]) for b in sorted(set(RAW))])
    with h5py.File(path("p_plain.h5")) as f:
        count = collections.Counter(RAW)
        report("the vocabulary counts the whole source",
               [int(c) for c in f["vocabulary/count"]] == [count[n[0]] for n in names])
    shutil.copytree(FOLDER, path("moved"), ignore=lambda d, n: [x for x in n if not x.startswith("p_plain")])
    os.mkdir(path("away"))
    for p in glob.glob(path("moved", "*")):
        shutil.move(p, path("away"))
    with h5py.File(path("away", "p_plain.h5")) as f:
        report("the folder can move", np.array_equal(f["train"][:], got[0]))


def other_programs():
    prepare("p_other", source=path("raw"), deflate=1, **RULE)
    for p in (path("p_other.h5"), path("p_other-train-0000.h5")):
        name = os.path.basename(p)
        for engine in ("netcdf4", "h5netcdf"):
            with xarray.open_dataset(p, engine=engine) as d:
                good = all(v.attrs.get("units") and v.attrs.get("long_name") for v in d.variables.values())
                dims = {v: d[v].dims for v in d.variables}
                want = ({s: (s + "_token",) for s in SPLITS} if name == "p_other.h5" else {"tokens": ("token",)})
                report(f"xarray ({engine}) reads {name}", good and dims == want and d[list(want)[0]].values.any(), str(dims))
        dump = subprocess.run(["h5dump", p], capture_output=True, text=True, check=False)
        report(f"h5dump reads {name}", dump.returncode == 0 and "error" not in dump.stderr, dump.stderr)
        with h5py.File(p) as f:
            report(f"creation order is tracked in {name}", f["/"].id.get_create_plist().get_link_creation_order() != 0)
    for engine in ("netcdf4", "h5netcdf"):
        with xarray.open_dataset(path("p_other.h5"), engine=engine, group="vocabulary") as d:
            report(f"xarray ({engine}) reads the vocabulary", d["symbol"].dims == ("symbol_id", "byte")
                   and d["count"].dims == ("symbol_id",) and int(d["count"].sum()) == len(RAW))


def dictionary(texts):
    """As fairseq's preprocessing does it: </s> at the end of each line, falling count, then the word."""
    split = [[w for line in t.decode().splitlines() for w in line.split() + ["</s>"]] for t in texts]
    count = collections.Counter(w for s in split for w in s)
    order = sorted(count, key=lambda w: (-count[w], w.encode()))
    return split, order, count


def check_words(name, texts):
    split, order, count = dictionary(texts)
    got, names = tokens(name), [s.decode() for s in symbols(name)]
    same = [[names[t] for t in s] for s in got] == split
    with h5py.File(path(name + ".h5")) as f:
        counts = [int(c) for c in f["vocabulary/count"]] == [count[w] for w in order]
    report(f"{name}: tokens, dictionary and counts", same and names == order and counts)


def texts():
    few = [b"10 32 255\n\n  7\t10 \n", b"32 new 10", b"\xc3\xa9t\xc3\xa9 10\r\n10\n"]
    words = [f"w{i}" for i in range(2000)]
    many = [" ".join(random.choices(words, k=n)).replace("w7 ", "w7\n").encode() + b"\n" for n in (50000, 3000, 2000)]
    for name, data in (("few", few), ("many", many)):
        files = {f"{s}_text": write(f"{name}.{s}.txt", t) for s, t in zip(SPLITS, data)}
        for ranks in (0, 3):
            run = prepare(f"t_{name}{ranks}", ranks=ranks, shard_tokens=7000 if name == "many" else 3, **files)
            expect(f"prepare from texts ({name}, {ranks} ranks)", run, 0, "symbols; tokens: train")
            check_words(f"t_{name}{ranks}", data)
    with h5py.File(path("t_many0.h5")) as f:
        report("more than 256 symbols are uint16", f["train"].dtype == np.uint16)
    large = write("large.txt", " ".join(str(i) for i in range(65536)).encode())
    run = prepare("t_large", train_text=large, valid_text=large, test_text=large)
    expect("more than 65535 words", run, 1, "more than 65535 different words")
    long = write("long.txt", b"x" * 5000)
    expect("a word without an end", prepare("t_long", train_text=long, valid_text=long, test_text=long), 1,
           "more than 1024 bytes")
    report("a failed run leaves nothing", not listing("t_la") and not listing("t_lo"), str(listing("t_l")))


FIXTURES = os.path.join(SOURCE, "tests", "fixtures")
FAIRSEQ = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}  # type in the index: numpy's


def fairseq_folder(name, ids, code=8, lines=None, items=(7, 0, 1)):
    """Data as fairseq-preprocess writes it, of items of these lengths and of what is left; the same for the three splits."""
    os.makedirs(path(name), exist_ok=True)
    sizes = [*items, len(ids) - sum(items)]
    dtype = np.dtype(FAIRSEQ.get(code, "<f4"))
    places = dtype.itemsize * np.concatenate([[0], np.cumsum(sizes)[:-1]])
    index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, len(sizes)) + np.array(sizes, "<i4").tobytes() + \
        places.astype("<i8").tobytes()
    for split in SPLITS:
        write(os.path.join(name, f"{split}.bin"), ids.astype(dtype).tobytes())
        write(os.path.join(name, f"{split}.idx"), index)
    if lines is None:
        shutil.copy(os.path.join(FIXTURES, "fairseq_dict.txt"), path(name, "dict.txt"))
    else:
        write(os.path.join(name, "dict.txt"), lines)
    return {f"{split}_text": path(name, f"{split}.bin") for split in SPLITS}


def fairseq():
    """The fixture is of fairseq-preprocess itself."""
    ids = np.fromfile(os.path.join(FIXTURES, "fairseq_valid.bin"), "<u2")
    with open(os.path.join(FIXTURES, "fairseq_dict.txt"), encoding="ascii") as f:
        names = [line.split(" ")[0] for line in f]
    wanted = [b"<s>", b"<pad>", b"\n", b"<unk>"] + [x.encode() if x.startswith("made") else bytes([int(x)]) for x in names]
    files = fairseq_folder("fs", ids)
    for split in SPLITS:
        for part in ("bin", "idx"):
            shutil.copy(os.path.join(FIXTURES, f"fairseq_valid.{part}"), path("fs", f"{split}.{part}"))
    for ranks in (0, 3):
        run = prepare(f"fs{ranks}", ranks=ranks, shard_tokens=500, **files)
        expect(f"prepare from fairseq's data, {ranks} ranks", run, 0, "train.bin (fairseq)", "56 symbols")
        with h5py.File(path(f"fs{ranks}.h5")) as f:
            counts, kind = f["vocabulary/count"][:], f.attrs["symbols"]
        report("ids, symbols and counts are fairseq's", all((t == ids).all() for t in tokens(f"fs{ranks}")) and
               symbols(f"fs{ranks}") == wanted and kind == b"bytes" and
               (counts == 3 * np.bincount(ids, minlength=56)).all(), f"{symbols(f'fs{ranks}')} {wanted}")
    expect("once more", prepare("fs0", shard_tokens=500, **files), 0, "already there")
    for code, dtype in FAIRSEQ.items():
        expect(f"as {dtype}", prepare(f"fs_{code}", **fairseq_folder(f"fs_{code}", ids, code)), 0, "wrote")
        report(f"tokens of {dtype} are the same", all((t == ids).all() for t in tokens(f"fs_{code}")))
    gzip_like = fairseq_folder("fs_gz", np.array([0x8b1f, 8] + [5] * 20) % 40000, 8, "".join(
        f"{n} 1\n" for n in range(40000)).encode())
    expect("tokens that look like gzip", prepare("fs_gz", **gzip_like), 0, "40004 symbols")
    words = fairseq_folder("fs_words", np.array([4, 5, 2, 3, 5, 6, 6, 2, 4]), 8, b"the 5\n\xc3\xa9t\xc3\xa9 3 \r\n32 2\n")
    expect("a dictionary of words", prepare("fs_words", **words), 0, "7 symbols")
    report("its symbols are words", symbols("fs_words")[2:] == [b"</s>", b"<unk>", b"the", b"\xc3\xa9t\xc3\xa9", b"32"])
    expect("all bytes as vocabulary", prepare("fs_all", vocabulary="bytes", **files), 0, "256 symbols")
    report("tokens are the bytes", bytes(tokens("fs_all")[0]) == b"".join(wanted[i] for i in ids))


def wrong_fairseq():
    ids = np.arange(4, 40)
    files = fairseq_folder("fw", ids)
    good = {x: open(path("fw", x), "rb").read() for x in ("train.bin", "train.idx", "dict.txt")}
    idx, text = good["train.idx"], good["dict.txt"]
    for name, file, data, *says in (
            ("a short .bin", "train.bin", good["train.bin"][:-2], "train.bin is not as long as", "(72 bytes)"),
            ("a short index", "train.idx", idx[:-1], "train.idx has 73 bytes, which 4 items do not have"),
            ("half a header", "train.idx", idx[:20], "train.idx is not whole"),
            ("an index of another kind", "train.idx", b"x" + idx[1:], "no index of fairseq's mmap format"),
            ("another version", "train.idx", idx[:9] + b"\2" + idx[10:], "no index of fairseq's mmap format"),
            ("an older format", "train.idx", b"TNTIDX\0\0" + idx[8:], "--dataset-impl mmap"),
            ("tokens of float", "train.idx", idx[:17] + b"\6" + idx[18:], "no type of integers"),
            ("an unknown type", "train.idx", idx[:17] + b"\xc8" + idx[18:], "no type of integers"),
            ("items in disorder", "train.idx", idx[:-8] + b"\4" + idx[-7:], "item 3 does not begin"),
            ("a token that is no symbol", "train.bin", good["train.bin"][:-2] + b"\x38\0", "token 35 is 56",
             "symbols 0 to 55"),
            ("a dictionary without counts", "dict.txt", text + b"word\n", "dict.txt: line 53 is not a symbol"),
            ("a zero behind a count", "dict.txt", text + b"word 1\0\n", "dict.txt: line 53 is not a symbol"),
            ("more symbols than ids", "dict.txt", b"".join(b"w%d 1\n" % n for n in range(65532)),
             "dict.txt has more than 65531 symbols"),
            ("a symbol twice", "dict.txt", text + b"32 1\n", "dict.txt: line 53 has a symbol again"),
            ("a special symbol twice", "dict.txt", text + b"<unk> 1\n", "line 53 has a symbol again"),
            ("no dictionary", "dict.txt", None, "dict.txt: No such file")):
        if data is None:
            os.remove(path("fw", file))
        else:
            write(os.path.join("fw", file), data)
        expect(f"fairseq: {name}", prepare("fw", **files), 1, *says)
        write(os.path.join("fw", file), good[file])
    for file in ("train.idx", "dict.txt"):
        os.link(path("fw", file), path("fw-train-0000.h5"))
        expect(f"fairseq: {file} as a shard", prepare("fw", **files), 2, f"the {file.removeprefix('train')} of prepare%train_text",
               "a shard of data%path")
        os.remove(path("fw-train-0000.h5"))
    report("nothing was written of wrong data", not listing("fw"), str(listing("fw")))
    expect("the data as it was", prepare("fw", **files), 0, "wrote")


def wrong():
    raw = path("raw")
    expect("a short source", prepare("w", source=raw), 2, "has 400000 bytes", "ask for 100000000", "prepare%train = 0.9")
    expect("a missing source", prepare("w", source=path("absent"), **RULE), 1, "absent: No such file")
    expect("a folder as source", prepare("w", source=FOLDER, **RULE), 1, "is not a regular file but a folder")
    expect("an empty source", prepare("w", source=write("empty", b""), **RULE), 2, "is empty")
    expect("a path without .h5", viaduct("prepare", write("x.nml", b"&prepare /"), *settings(
        data__path=f"'{path('w.hdf')}'", prepare__source=f"'{raw}'")), 2, "must end in NAME.h5")
    for kind, data in (("gz", gzip.compress(RAW)), ("xz", lzma.compress(RAW))):
        cut = write(f"cut.{kind}", data[:len(data) // 2])
        expect(f"a truncated {kind}", prepare("w", source=cut, **RULE), 1, f"cut.{kind}")
    flipped = bytearray(open(path("raw.zip"), "rb").read())
    flipped[len(flipped) // 2] ^= 4
    expect("a damaged zip", prepare("w", source=write("bad.zip", flipped), **RULE), 1, "bad.zip (zip)")
    with zipfile.ZipFile(path("several.zip"), "w") as z:
        z.writestr("a", b"one")
        z.writestr("b", b"two")
    expect("a zip of two files", prepare("w", source=path("several.zip"), **RULE), 1, "more than one file")
    write("file", b"")
    expect("a folder that is a file", prepare("file/w", source=raw, **RULE), 1, "cannot write", "file")
    report("nothing was written", not listing("w"), str(listing("w")))
    expect("--check", prepare("c", source=raw, check=True, **RULE), 0, "tokens: train 320000", "would be written")
    report("--check writes nothing", not listing("c") and not os.path.exists(path("deep")))
    expect("--check of a folder to be made", prepare("deep/er/c", source=raw, check=True, **RULE), 0, "would be written")
    report("--check makes no folder", not os.path.exists(path("deep")))
    expect("missing folders are made", prepare("deep/er/c", source=raw, **RULE), 0, "wrote")


def limited(size):
    """In a mount namespace of its own: a tiny file system; prints what prepare said, ends as it did."""
    os.makedirs(path("tiny"), exist_ok=True)
    script = (f"mount -t tmpfs -o size={size} none {path('tiny')} || exit 77\n"
              f"{command()[0]} prepare {path('empty.nml')} --set data%path=\"'{path('tiny', 'f.h5')}'\" "
              f"--set prepare%source=\"'{path('raw')}'\" --set prepare%train=0.8 --set prepare%valid=0.1 "
              f"--set prepare%test=0.1 --set prepare%shard_tokens=30000\nstatus=$?\nls -A {path('tiny')} | sed 's/^/left: /'\n"
              "exit $status")
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=ENVIRONMENT,
                          check=False)


def full_disk():
    run = limited("120k")
    if run.returncode == 77 or "unshare" in run.stderr:
        print("ok a full folder # skip: no file system can be mounted here")
        return
    expect("a full folder", run, 1, "No space left on device", "f-")
    report("a full folder is left empty", "left:" not in run.stdout, run.stdout)
    expect("a folder with room", limited("4m"), 0, "wrote")


def rerun():
    raw, changed = path("raw"), write("changed", RAW[:-1] + b"!")
    prepare("i", source=raw, **RULE)
    before = listing("i")
    expect("a rerun", prepare("i", source=raw, ranks=2, **RULE), 0, "already there")
    report("a rerun touches nothing", listing("i") == before)
    expect("a rerun from a zip of it", prepare("i", source=path("raw.zip"), **RULE), 0, "already there")
    expect("another source", prepare("i", source=changed, **RULE), 2, "exists already", "prepare%overwrite")
    expect("other shards", prepare("i", source=raw, **dict(RULE, shard_tokens=20000)), 2, "its shards have 30000 tokens")
    expect("another split", prepare("i", source=raw, **dict(RULE, train=0.7)), 2, "split in another way")
    report("a refusal touches nothing", listing("i") == before)
    expect("overwrite", prepare("i", source=changed, overwrite=".true.", **dict(RULE, shard_tokens=100000)), 0, "replaced")
    report("overwrite leaves no shard of before", len(glob.glob(path("i-*.h5"))) == 6, str(listing("i")))
    write("j.h5", b"not a corpus at all")
    expect("something else in the place", prepare("j", source=raw, **RULE), 2, "j.h5 is not an HDF5 file", "overwrite")


def damage():
    def flip(p):
        with open(p, "r+b") as f:
            f.seek(os.path.getsize(p) // 3)
            byte = f.read(1)[0]
            f.seek(-1, 1)
            f.write(bytes([byte ^ 16]))

    def evaluate(words):
        deck = write("eval.nml", b"&run directory='nowhere' /\n")
        return viaduct("train", deck, *settings(data__path=f"'{path('d')}.h5'", run__directory=f"'{path('run')}'",
                                                data__batch_streams=2, data__tokens_per_sample=64, model__n_layer=1,
                                                model__d_model=16, model__n_head=1, model__d_inner=16,
                                                span__attn_span=32, run__max_updates=4000), *words)

    shard = "d-train-0003.h5"
    for name, harm, word in (("missing", os.remove, "No such file"),
                             ("truncated", lambda p: os.truncate(p, os.path.getsize(p) // 2), "truncated"),
                             ("empty", lambda p: os.truncate(p, 0), "is empty")):
        prepare("d", source=path("raw"), **RULE)
        harm(path(shard))
        expect(f"training on a {name} shard", evaluate([]), 1, shard, word)
        expect(f"preparing again over a {name} shard", prepare("d", source=path("raw"), **RULE), 0, "made anew", shard)
        report(f"a {name} shard is whole again", digest("d") == digest("p_plain"))
    flip(path(shard))
    expect("training on a flipped bit", evaluate([]), 1, shard, "damaged")


def kills():
    big = write("big", RAW * 8)
    rule = dict(RULE, shard_tokens=40000)
    deck = write("k.nml", (f"&data path='{path('k.h5')}' /\n&prepare source='{big}', train=0.8, valid=0.1, test=0.1, "
                           f"shard_tokens=40000 /\n").encode())
    prepare("whole", source=big, **rule)
    wanted, midway, shards_wanted = digest("whole"), 0, len(glob.glob(path("whole-*.h5")))
    good = True
    for i in range(10):
        for old in glob.glob(path("k-*.h5")):
            os.remove(old)
        child = subprocess.Popen(command("prepare", deck), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        # Killed once some shards are there, more of them each time.
        while child.poll() is None and len(glob.glob(path("k-*.h5"))) < 1 + i * shards_wanted // 12:
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        shards = len(glob.glob(path("k-*.h5")))
        midway += 0 < shards < shards_wanted and not os.path.exists(path("k.h5"))
        if os.path.exists(path("k.h5")):
            good = good and digest("k") == wanted
            os.remove(path("k.h5"))
    report("what a killed run leaves never looks whole", good and midway >= 3, f"{midway} kills fell into the writing")
    write(".k-train-0001.h5.tmp-99999", b"\x89HDF\r\n\x1a\nleft by a killed run")
    expect("a run after kills", prepare("k", source=big, ranks=2, **rule), 0, "wrote")
    report("it is whole", digest("k") == wanted)
    report("leftovers are gone", not glob.glob(path(".k*")), str(glob.glob(path(".k*"))))


def sources_that_change():
    """Each file of a source is touched while the shards are written: the first one is there, the last one is not yet."""
    ids = np.arange(3000000) % 7 + 4
    changed = fairseq_folder("change", ids, lines=b"".join(b"%d 1\n" % (65 + i) for i in range(7)))
    text = write("change.txt", bytes(range(65, 72)) * 1000000)
    single = {"source": text, "train": 0.8, "valid": 0.1, "test": 0.1}
    for name, files in (("change.txt", single), ("change/test.bin", changed), ("change/valid.idx", changed),
                        ("change/dict.txt", changed)):
        values = {f"prepare__{k}": f"'{v}'" if isinstance(v, str) else v for k, v in files.items()}
        words = settings(data__path=f"'{path('ch')}.h5'", prepare__shard_tokens=20000, **values)
        with subprocess.Popen(command("prepare", write("empty.nml", b"&prepare /\n"), *words), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT) as child:
            while child.poll() is None and not glob.glob(path("ch-*.h5")):
                time.sleep(0.0005)
            os.utime(path(name))
            said = child.communicate(timeout=60)[0]
        left = glob.glob(path("ch*.h5"))
        report(f"{name} changes while it is read", child.returncode == 1 and f"{path(name)} changed while it was read" in said
               and not left, f"status {child.returncode}, {len(left)} files are left: {said[-600:]}")


try:
    for case in (packings, other_programs, texts, fairseq, wrong_fairseq, sources_that_change, wrong, full_disk, rerun, damage,
                 kills):
        case()
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
