#!/usr/bin/python3
"""What prepare and its neighbours refuse, so that no file of the user's is lost: outputs that are inputs, shards of
other corpora, two at once, damaged and special sources, names that HDF5 or a shell would read in another way."""
import bz2
import glob
import gzip
import io
import lzma
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zipfile
import zlib

import h5py

from whole import DECK, ENVIRONMENT, command, finish, report, settings, text, viaduct

FOLDER = tempfile.mkdtemp(prefix="viaduct-faults-")
os.chdir(FOLDER)
RAW = text(60000)
RULE = {"prepare__train": 0.8, "prepare__valid": 0.1, "prepare__test": 0.1, "prepare__shard_tokens": 20000}


def write(name, data):
    with open(name, "wb") as f:
        f.write(data)
    return name


def read(name):
    with open(name, "rb") as f:
        return f.read()


def prepare(corpus, source, *words, **variables):
    values = {**RULE, "data__path": f"'{corpus}'", "prepare__source": f"'{source}'", **variables}
    return viaduct("prepare", "empty.nml", *settings(**values), *words, timeout=60)


def expect(name, run, status, *words):
    said = run.stdout + run.stderr
    missing = [w for w in words if w not in said]
    report(name, run.returncode == status and not missing,
           f"exit {run.returncode}, wanted {status}, lacks {missing}: {said[-600:]}")


def is_whole(name):
    return viaduct("info", name).returncode == 0


def outputs_that_are_inputs():
    write("raw.h5", RAW)
    os.symlink("raw.h5", "link.h5")
    os.link("raw.h5", "hard.h5")
    write("shard-train-0000.h5", RAW)
    os.mkdir("sub")
    for corpus in ("raw.h5", "link.h5", "hard.h5", "./sub/../raw.h5"):
        expect(f"the source as {corpus}", prepare(corpus, "raw.h5", prepare__overwrite=".true."), 2,
               "prepare%source", "data%path")
    expect("the source as a shard", prepare("shard.h5", "shard-train-0000.h5"), 2, "a shard of data%path")
    write("deck.h5", b"&prepare /\n")
    expect("the deck as the corpus", viaduct("prepare", "deck.h5", *settings(
        data__path="'deck.h5'", prepare__source="'raw.h5'", **RULE)), 2, "the deck")
    write("other.h5", b"something else")
    expect("overwrite of no corpus", prepare("other.h5", "raw.h5", prepare__overwrite=".true."), 2,
           "is not an HDF5 file")
    for name in (".c.h5.lock", ".c.h5.tmp-77", ".c-train-0000.h5.tmp-77"):
        expect(f"the source as {name}", prepare("c.h5", write(name, RAW)), 2, "prepare%source", "data%path")
        report(f"{name} is untouched", read(name) == RAW)
        os.remove(name)
    write(".c.h5.lock", RAW)
    expect("a file of a user's in the place of the lock", prepare("c.h5", "raw.h5"), 1, ".c.h5.lock", "lock")
    report("the file in the place of the lock is untouched", read(".c.h5.lock") == RAW)
    os.remove(".c.h5.lock")
    write(".words.h5.tmp-77", RAW)
    write(".words-train-0000.h5.tmp-77", b"")
    expect("a corpus beside temporaries", prepare("words.h5", "raw.h5"), 0)
    report("text of a user's stays, a leftover goes", read(".words.h5.tmp-77") == RAW and
           not os.path.exists(".words-train-0000.h5.tmp-77"))
    kept = read("words.h5")
    expect("the vocabulary as the corpus", prepare("words.h5", "raw.h5", prepare__vocabulary="'words.h5'",
                                                   prepare__overwrite=".true."), 2, "prepare%vocabulary")
    report("the vocabulary is untouched", read("words.h5") == kept)
    report("all of them are untouched", read("raw.h5") == read("shard-train-0000.h5") == RAW and
           read("other.h5") == b"something else" and read("deck.h5") == b"&prepare /\n")


def folders_of_failed_commands():
    os.mkdir("empty")
    expect("a source too short for its splits", prepare("deep/er/c.h5", "raw.h5", prepare__train=1000000), 2, "raw.h5")
    expect("the same below an empty folder", prepare("empty//new/c.h5", "raw.h5", prepare__train=1000000), 2, "raw.h5")
    report("folders that it made are gone, others are not", not os.path.exists("deep") and os.listdir("empty") == [])


def outputs_of_runs():
    expect("a corpus", prepare("c.h5", "raw.h5"), 0, "wrote")
    write("train.nml", DECK.format(run="run", corpus="c.h5").encode())
    expect("a run", viaduct("train", "train.nml", *settings(run__max_updates=10)), 0)
    checkpoint = os.path.realpath("run/checkpoints/last.h5")
    os.link("c-train-0001.h5", "hard-shard")
    kept = {p: read(p) for p in ("c.h5", "c-train-0001.h5", "train.nml", checkpoint, "run/log.jsonl", "run/trace.h5")}
    for target in ("c.h5", "c-train-0001.h5", "hard-shard", "./train.nml", "run/checkpoints/last.h5", "run/log.jsonl",
                   "run/trace.h5", "run/.lock", "run/deck.nml"):
        expect(f"nll_file {target}", viaduct("eval", "train.nml", *settings(
            eval__nll_file=f"'{target}'", eval__checkpoint="'run/checkpoints/last.h5'")), 2, "eval%nll_file")
        expect(f"generate%output {target}", viaduct("generate", "train.nml", *settings(
            generate__output=f"'{target}'", generate__checkpoint="'run/checkpoints/last.h5'")), 2, "generate%output")
        expect(f"compress%output {target}", viaduct("compress", "train.nml", *settings(
            compress__input="raw.h5", compress__output=f"'{target}'",
            compress__checkpoint="'run/checkpoints/last.h5'")), 2, "compress%output")
    for target in ("c.h5", "c-train-0001.h5", "train.nml", "other/log.jsonl", "other/checkpoints/update-00000010.h5"):
        expect(f"timeline {target}", viaduct("train", "train.nml", *settings(
            device__timeline=f"'{target}'", run__directory="'other'")), 2, "device%timeline")
    report("files of the run are untouched by eval, generate and compress", all(read(p) == kept[p] for p in kept))
    os.mkdir("mine")
    shutil.copy("train.nml", "mine/deck.nml")
    expect("a deck that would be replaced", viaduct("train", "mine/deck.nml", *settings(run__directory="'mine'")), 2,
           "the deck")
    expect("the deck of the run itself", viaduct("train", "run/deck.nml"), 0)
    report("a run resumes from a checkpoint of its own", viaduct("train", "train.nml", *settings(
        run__max_updates=12, run__resume="'run/checkpoints/last.h5'")).returncode == 0)
    report("inputs of runs are untouched", all(read(p) == kept[p] for p in kept if not p.startswith("run/")) and
           not os.path.exists("other"))
    expect("a result although the nll file cannot be written", viaduct("eval", "train.nml", *settings(
        eval__nll_file="'absent/nll.h5'", eval__checkpoint=f"'{checkpoint}'")), 1, "absent")


def removing_by_name():
    write("upper", RAW.upper())
    prepare("old.h5", "raw.h5")
    os.rename("old.h5", "new.h5")
    expect("shards of a renamed corpus", prepare("old.h5", "upper"), 2, "a shard of another corpus")
    expect("the same source under the old name", prepare("old.h5", "raw.h5", prepare__shard_tokens=10000), 2, "new.h5")
    report("the renamed corpus is whole", is_whole("new.h5") and not os.path.exists("old.h5"))
    prepare("a.h5", "raw.h5")
    shutil.copy("old-train-0001.h5", "a-train-0007.h5")
    foreign = write("a-valid-0009.h5", b"mine")
    prepare("far.h5", "upper", prepare__shard_tokens=1000)
    shutil.copy("far-train-0003.h5", "a-train-0044.h5")
    run = prepare("a.h5", "upper", prepare__overwrite=".true.")
    expect("overwriting beside orphans", run, 0, "a-valid-0009.h5", "left alone")
    report("orphans stay", read(foreign) == b"mine" and is_whole("a.h5"))
    with h5py.File("a.h5") as f, h5py.File("a-train-0000.h5") as shard:
        report("the shards are the new ones", f.attrs["corpus_id"] == shard.attrs["corpus_id"])


def two_at_once():
    """Each has a TMPDIR of its own: of Open MPI's processes that begin together one may fail to make the folder that they
    share there."""
    deck = write("many.nml", b"&data path='many.h5' /\n&prepare source='raw.h5', train=0.8, valid=0.1, test=0.1, "
                             b"shard_tokens=300 /\n")
    for _ in range(3):
        for p in glob.glob("many*.h5"):
            os.remove(p)
        children = [subprocess.Popen(command("prepare", deck), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                     text=True, env=dict(ENVIRONMENT, TMPDIR=tempfile.mkdtemp(dir=FOLDER)))
                    for _ in range(4)]
        said = [c.communicate(timeout=60)[0] for c in children]
        good = all(c.returncode == 0 or "another prepare" in s for c, s in zip(children, said))
        report("four at once: one whole corpus", good and is_whole("many.h5"), str(said))
    report("no lock is left", not glob.glob(".many*"))


def packed():
    c = zlib.compressobj(0, zlib.DEFLATED, 31)
    stored = bytearray(c.compress(RAW) + c.flush())
    stored[5000] ^= 1
    whole = gzip.compress(RAW)
    length = bytearray(whole)
    length[-1] ^= 1
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a", RAW)
    zipped = zipped.getvalue()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        t.add("raw.h5")
    old_tar = bytearray(tar.getvalue())
    old_tar[257:265] = bytes(8)
    checksum = sum(old_tar[:148]) + 8 * 32 + sum(old_tar[156:512])
    old_tar[148:156] = b"%06o\0 " % checksum
    refused = {"flip.gz": (stored, "crc|check|damaged"), "length.gz": (length, "length|check"),
               "between.gz": (gzip.compress(RAW[:999]) + b"junk" + gzip.compress(RAW[999:]), "behind"),
               "after.gz": (whole + b"junk", "behind"), "cut.gz": (whole[:-3], "truncated"),
               "after.bz2": (bz2.compress(RAW) + b"junk", "bzip2"), "cut.bz2": (bz2.compress(RAW)[:-9], "bzip2"),
               "after.xz": (lzma.compress(RAW) + b"junk", "xz"),
               "cut.lzma": (lzma.compress(RAW, format=lzma.FORMAT_ALONE)[:-40], "lzma"),
               "tar": (tar.getvalue(), "tar"), "tar.gz": (gzip.compress(tar.getvalue()), "tar"),
               "old_tar": (old_tar, "tar"),
               "after.zip": (zipped + b"junk", "something else"), "two.zip": (zipped + zipped, "something else"),
               "cut.zip": (zipped[:-30], "truncated"), "twice.gz": (gzip.compress(whole), "gzip"),
               "empty.zip": (b"PK\5\6" + bytes(18), "zip"),
               "7z": (b"7z\xbc\xaf\x27\x1c" + RAW, "7z"), "Z": (b"\x1f\x9d\x90" + RAW, "compress"),
               "skip.zst": (b"\x5d\x2a\x4d\x18\4\0\0\0abcd" + RAW, "skippable"),
               "cab": (b"MSCF\0\0\0\0" + RAW, "cabinet"), "gone.zst": (b"\x28\xb5\x2f\xfd" + RAW, "zstd")}
    for name, (data, word) in refused.items():
        run = prepare(f"refused_{name}.h5", write(name, data))
        good = run.returncode == 1 and any(w in run.stderr for w in word.split("|")) and name in run.stderr
        report(f"{name} is refused", good, f"exit {run.returncode}: {run.stderr}")
    report("nothing refused left a corpus", not glob.glob("refused_*") and not glob.glob(".refused_*"))
    prepare("plain.h5", "raw.h5")
    with h5py.File("plain.h5") as f:
        wanted = f.attrs["corpus_id"]
    read_well = {"two.gz": gzip.compress(RAW[:999]) + gzip.compress(RAW[999:]), "padded.gz": whole + bytes(1000),
                 "t.bz2": bz2.compress(RAW), "two.bz2": bz2.compress(RAW[:999]) + bz2.compress(RAW[999:]),
                 "t.lzma": lzma.compress(RAW, format=lzma.FORMAT_ALONE), "t.xz": lzma.compress(RAW),
                 "short": b"BZh9 is no bzip2, ] no lzma\n" * 99}
    for tool, name in (("zstd", "raw.h5.zst"), ("lz4", "raw.h5.lz4")):
        if shutil.which(tool):
            out = ["-o", name] if tool == "zstd" else [name]
            subprocess.run([tool, "-q", "-f", "raw.h5", *out], check=True)
            read_well[name] = read(name)
    with zipfile.ZipFile("name.zip", "w") as z:
        z.writestr("d\u00e9j\u00e0 \u4e2d.txt", RAW)
    read_well["name.zip"] = read("name.zip")
    for name, data in read_well.items():
        run = prepare(f"well_{name}.h5", write(name, data))
        expect(f"{name} is read", run, 0, "wrote")
        if name != "short" and run.returncode == 0:
            with h5py.File(f"well_{name}.h5") as f:
                report(f"{name}: the same corpus", f.attrs["corpus_id"] == wanted)


def special_sources():
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        for name, word in (("fifo", "a FIFO"), ("socket", "a socket"), ("/dev/null", "a device")):
            expect(f"{word} as source", prepare("special.h5", name), 1, word)
    report("special sources leave nothing", not glob.glob("special*") and not glob.glob(".special*"))


def names():
    prepare("c.h5", "raw.h5")
    with h5py.File("c.h5") as f:
        wanted = f["train"][:].tobytes()
    for name in ("50%b.h5", "a%d.h5", "b%%1.h5", "%.h5", "with space.h5", "star*[a].h5", "n.tmp-1.h5"):
        expect(f"a corpus {name}", prepare(name, "raw.h5"), 0, "wrote")
        with h5py.File(name) as f:
            report(f"{name} through its virtual dataset", f["train"][:].tobytes() == wanted)
    for place in ("~/c.h5", "~user/c.h5", "$HOME/c.h5"):
        expect(f"data%path {place}", prepare(place, "raw.h5"), 2, "data%path", "begins with")
    for variable in ("run__directory", "run__resume", "run__start_from", "device__timeline", "eval__checkpoint",
                     "eval__nll_file", "generate__checkpoint", "generate__output",
                     "generate__prompt_file", "compress__input", "compress__output", "compress__checkpoint"):
        run = viaduct("train", "train.nml", *settings(**{variable: "'~/x'"}))
        expect(f"~ in {variable}", run, 2, variable.replace("__", "%"), "begins with '~'")
    report("no folder ~", not glob.glob("~*") and not glob.glob("$*"))
    expect("./~ is a name", prepare("./~c.h5", "raw.h5"), 0, "wrote")
    expect("a long name", prepare("x" * 240 + ".h5", "raw.h5"), 2, "too long")
    os.mkdir("linked")
    os.symlink("../c.h5", "linked/l.h5")
    report("a linked corpus is read", is_whole("linked/l.h5"))


def splits():
    for train, n in (("1.0", len(RAW)), ("1", len(RAW)), ("2", 2)):
        name = f"all{train}.h5"
        expect(f"train = {train}", prepare(name, "raw.h5", prepare__train=train, prepare__valid=0, prepare__test=0), 0)
        with h5py.File(name) as f:
            report(f"train = {train}: {n} tokens", f["train"].shape[0] == n, str(f["train"].shape))
    expect("more than all", prepare("more.h5", "raw.h5", prepare__train=1, prepare__valid=0.1), 2, "more than 1")


write("empty.nml", b"&prepare /\n")
try:
    for case in (outputs_that_are_inputs, folders_of_failed_commands, outputs_of_runs, removing_by_name, two_at_once,
                 packed, special_sources, names, splits):
        case()
finally:
    os.chdir("/")
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
