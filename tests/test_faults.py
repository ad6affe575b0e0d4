#!/usr/bin/python3
"""What users and disks do wrong: each case gives an exit status, a distinctive part of the message, and leaves the
folder of the run as it was."""
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import ENVIRONMENT, Place, command, finish, report, settings, viaduct  # noqa: E402

place = Place(60000)
DECK = place.deck


def listing(folder):
    """Every path below, with size and time of change: did anything get written?"""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(at, name)
            found[path] = (os.lstat(path).st_size, os.lstat(path).st_mtime_ns)
    return found


def case(name, words, status, message, ranks=0, **keywords):
    before = listing(place.folder)
    result = viaduct(*words, ranks=ranks, **keywords)
    said = result.stderr
    good = result.returncode == status and re.search(message, said) is not None
    # One message, once, whatever the number of ranks.
    good = good and said.count("viaduct: error: ") == 1
    after = listing(place.folder)
    changed = sorted(k for k in set(before) | set(after) if before.get(k) != after.get(k))
    report(name, good and not changed, f"status {result.returncode}, {said!r}, changed {changed}")


def deck(name, text):
    path = place.path(name)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def train(**variables):
    return ["train", DECK, *settings(**variables)]


def damaged(source, target, how):
    shutil.copyfile(source, target)
    with open(target, "r+b") as f:
        how(f)
    return target


def halve(f):
    f.truncate(os.path.getsize(f.name) // 2)


def flipper(dataset):
    """Flips one bit within the first chunk of a dataset."""
    def flip(f):
        with h5py.File(f.name, "r") as h:
            d = h[dataset]
            where = d.id.get_chunk_info(0).byte_offset if d.chunks else d.id.get_offset()
        f.seek(where + 1)
        byte = f.read(1)[0]
        f.seek(where + 1)
        f.write(bytes([byte ^ 16]))
    return flip


def command_lines():
    case("no command", [], 2, "no command given")
    case("unknown command", ["trian", DECK], 2, "no command 'trian'; the nearest is 'train'")
    case("unknown option", ["train", DECK, "--chekc"], 2, "'--chekc' is unknown")
    case("option without its value", ["train", DECK, "--set"], 2, "--set wants GROUP%NAME=VALUE")
    case("no deck", ["train"], 2, "the deck is missing")
    case("no file", ["info"], 2, "the file is missing")
    case("an argument too many", ["train", DECK, "more"], 2, "'more' is one argument too many")
    case("--check of another command", ["eval", DECK, "--check"], 2, "--check is for train")
    case("--set of a command without deck", ["info", "x", "--set", "a%b=1"], 2, "--set is for commands that read a deck")
    case("--markdown of another command", ["train", DECK, "--markdown"], 2, "--markdown is for input")
    case("help on an unknown variable", ["input", "model%n_layers"], 2, "model%n_layer")
    case("help on an unknown group", ["input", "modle"], 2, "nearest known group is model")
    case("unknown command on 2 ranks is said once", ["trian", DECK], 2, "'train'", ranks=2)


def decks():
    case("deck missing", ["train", place.path("none.nml")], 2, "none.nml: cannot read the deck")
    case("deck is a folder", ["train", place.folder], 2, "cannot read the deck")
    for name, text, message in (
            ("group without end", "&run title='x',\n", r"1\.nml:\d+:\d+: "),
            ("unknown group", "&runn title='x' /\n", "runn.*run"),
            ("unknown variable", "&run titel='x' /\n", "titel.*title"),
            ("unquoted string", "&run title=hello /\n", "title"),
            ("real for an integer", "&model n_layer=3.0 /\n", "n_layer = 3.0"),
            ("too many values", "&model n_layer=3,4 /\n", "n_layer"),
            ("out of range", "&model n_layer=0 /\n", "n_layer = 0 is out of range"),
            ("unknown word", "&span softmax='mask' /\n", "'masked' or 'trimmed'"),
            ("widths that do not fit", "&model d_model=30, n_head=4 /\n", "n_head = 4")):
        path = deck("1.nml", text)
        case(f"deck: {name}", ["train", path], 2, message)
    for variable, value, message in (
            ("model%n_layers", "2", "model%n_layer"), ("model%n_layer", "x", "not an integer"),
            ("model%dropout", "1.5", "out of range"), ("optimizer%lr", "-1", "out of range"),
            ("data%path", "", "data%path")):
        case(f"--set {variable}={value}", ["train", DECK, "--set", f"{variable}={value}"], 2, message)
    case("--set without a value", ["train", DECK, "--set", "nonsense"], 2, "GROUP%NAME=VALUE")
    case("wrong deck on 2 ranks is said once", ["train", DECK, "--set", "model%n_layer=0"], 2, "out of range", ranks=2)
    case("more ranks than streams", train(data__batch_streams=1), 2, "too few for 2 ranks", ranks=2)
    case("unknown validation split", train(valid__split="held"), 2, "split")
    case("more streams than tokens", train(data__batch_streams=100000), 2, "too few for data%batch_streams")
    case("more validation streams than tokens", train(valid__streams=100000), 2, "too few for valid%streams")


def corpora():
    case("no corpus", train(data__path=place.path("none.h5")), 1, "none.h5: No such file")
    case("corpus is text", train(data__path=place.path("text")), 1, "not an HDF5 file")
    case("corpus is a shard", train(data__path=place.path("data-train-0000.h5")), 1, "of kind 'shard'; 'corpus' is wanted")
    case("truncated corpus", train(data__path=damaged(place.corpus, place.path("cut.h5"), halve)), 1, "cut.h5")
    shard, kept = place.path("data-train-0001.h5"), place.path("kept")
    os.rename(shard, kept)
    case("missing shard", train(), 1, "data-train-0001.h5.*No such file")
    case("missing shard, seen by a dry run", train() + ["--check"], 1, "data-train-0001.h5")
    damaged(kept, shard, halve)
    case("truncated shard", train(), 1, "data-train-0001.h5")
    shutil.copyfile(place.path("data-train-0000.h5"), shard)
    case("another shard in its place", train(), 1, "data-train-0001.h5")
    os.remove(shard)
    os.rename(kept, shard)
    first = place.path("data-train-0000.h5")
    os.rename(first, kept)
    damaged(kept, first, flipper("tokens"))
    run = place.path("flipped")
    result = viaduct(*train(run__directory=run), ranks=2)
    report("flipped bit in a shard stops the run and is named",
           result.returncode == 1 and "data-train-0000.h5" in result.stderr and not os.path.exists(
               os.path.join(run, "checkpoints", "last.h5")), f"{result.returncode} {result.stderr}")
    os.remove(first)
    os.rename(kept, first)
    case("source missing", ["prepare", place.path("prepare.nml"), *settings(
        data__path=place.path("new.h5"), prepare__source=place.path("none"))], 1, "none: No such file")


def folders():
    under = place.path("text", "run")
    case("run folder under a file", train(run__directory=under), 1, "Not a directory")
    case("run folder under a file, dry run", train(run__directory=under) + ["--check"], 1, "Not a directory")
    case("run folder where nobody can write", train(run__directory="/proc/viaduct"), 1, "/proc/viaduct")
    case("nll file in a missing folder", ["eval", DECK, *settings(run__directory=place.path("good"),
         eval__nll_file=place.path("none", "nll.h5"))], 1, "none")
    case("text into a missing folder", ["generate", DECK, *settings(
        run__directory=place.path("good"), generate__output=place.path("none", "text"))], 1, "No such file")
    full = place.path("full")
    # A limit on the size of files stands for a full disk; a wide model, so that MPI's own files stay below it.
    result = viaduct(*train(run__directory=full, run__max_updates=1, valid__interval=0, model__d_inner=60000),
                     preexec_fn=limit)
    folder = os.path.join(full, "checkpoints")
    left = os.listdir(folder) if os.path.isdir(folder) else ["no folder"]
    report("no room for a checkpoint: status 1, said so, nothing half-written",
           result.returncode == 1 and "the checkpoint was not written" in result.stderr and not left,
           f"{result.returncode} {result.stderr} {left}")


    going = place.path("going")
    result = viaduct(*train(run__directory=going, run__max_updates=10**9, checkpoint__interval=2, valid__interval=0,
                            model__d_inner=60000), preexec_fn=limit, ranks=2)
    left = os.listdir(os.path.join(going, "checkpoints"))
    report("a checkpoint that fails beside the loop ends the run, on 2 ranks",
           result.returncode == 1 and "the checkpoint was not written" in result.stderr and not left
           and result.stderr.count("viaduct: error: ") == 1, f"{result.returncode} {result.stderr} {left}")


def limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, resource.RLIM_INFINITY))


def checkpoints():
    good = place.path("good")
    words = {"run__directory": good, "run__max_updates": 20}
    case("resume = 'never' where there are checkpoints", train(**words, run__resume="never"), 2, "run%resume = 'never'")
    last = place.path("good", "checkpoints", "update-00000020.h5")
    for variable, value in (("model__n_layer", 3), ("model__d_inner", 32), ("data__batch_streams", 2),
                            ("data__tokens_per_sample", 16), ("run__seed", 5), ("span__attn_span", 64)):
        name = variable.replace("__", "%")
        case(f"resume with another {name}", train(**words, **{variable: value}), 2,
             rf"{name} = {value}, but the checkpoint .* was made with \d+")
    other = Place(50000)
    case("resume with other data", train(**words, data__path=other.corpus), 2, "holds other tokens")
    other.remove()
    case("resume from an older one where newer ones are", train(
        run__directory=good, run__resume=place.path("good", "checkpoints", "update-00000010.h5")), 2, "a newer one, of update 20")
    case("resume from what is missing", train(run__directory=place.path("new"), run__resume=place.path("no.h5")), 1, "no.h5")
    cut = damaged(last, place.path("cut-checkpoint.h5"), halve)
    case("resume from a truncated checkpoint", train(run__directory=place.path("new"), run__resume=cut), 1, "cut-checkpoint.h5")
    case("eval of a truncated checkpoint", ["eval", DECK, *settings(eval__checkpoint=cut)], 1, "cut-checkpoint.h5")
    flipped = damaged(last, place.path("flipped.h5"), flipper("model/key_pe"))
    case("eval of a flipped checkpoint", ["eval", DECK, *settings(eval__checkpoint=flipped)], 1, "flipped.h5|key_pe")
    case("generate of a flipped checkpoint on 2 ranks", ["generate", DECK, *settings(generate__checkpoint=flipped)], 1,
         "flipped.h5|key_pe", ranks=2)
    case("eval of a corpus as checkpoint", ["eval", DECK, *settings(eval__checkpoint=place.corpus)], 1, "of kind 'corpus'")
    case("eval without any checkpoint", ["eval", DECK, *settings(run__directory=place.path("none"))], 1, "there is no checkpoint")
    case("eval of an unknown split", ["eval", DECK, *settings(run__directory=good, eval__split="held")], 2, "held")
    case("prompt with an unknown byte", ["generate", DECK, *settings(run__directory=good, generate__prompt="a\u00e9")], 2,
         "no symbol for byte 2")
    case("info on text", ["info", place.path("text")], 1, "not an HDF5 file")
    case("info on nothing", ["info", place.path("none")], 1, "No such file")
    bad = place.path("bad")
    shutil.copytree(good, bad, symlinks=True)
    for name in os.listdir(os.path.join(bad, "checkpoints")):
        path = os.path.join(bad, "checkpoints", name)
        if not os.path.islink(path):
            with open(path, "r+b") as f:
                halve(f)
    case("resume where all checkpoints are damaged", train(run__directory=bad), 1, "all 2 checkpoints .* are damaged")


def numbers():
    result = place.train("infinite", ranks=2, optimizer__lr=1e30, optimizer__clip_step=0, optimizer__warmup_updates=0,
                         valid__interval=0, checkpoint__interval=1)
    report("a loss that is not finite: update and tensor or loss named, last good checkpoint intact",
           result.returncode == 1 and re.search(r"update \d+: the (loss|gradient)", result.stderr) is not None
           and "the last good checkpoint is" in result.stderr, f"{result.returncode} {result.stderr}")


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def two_runs():
    """A second run in the folder of a living one is turned away; kill -9 ends the lock; leftovers go."""
    folder = place.path("locked")
    last, lock = os.path.join(folder, "checkpoints", "last.h5"), os.path.join(folder, ".lock")
    # As in real runs, a dry run that reads the newest checkpoint ends long before checkpoint%keep newer ones replace it.
    words = {"run__directory": folder, "valid__interval": 0, "checkpoint__interval": 200}
    with subprocess.Popen(command(*train(**words, run__max_updates=10**9)), env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as first:
        try:
            until = time.monotonic() + 60
            while first.poll() is None and not os.path.exists(last) and time.monotonic() < until:
                time.sleep(0.01)
            deck_before, lock_before = os.stat(os.path.join(folder, "deck.nml")), os.stat(lock)
            for ranks in (0, 2):
                second = viaduct(*train(**words), ranks=ranks)
                report(f"a second run in one folder is turned away, {ranks or 1} ranks",
                       second.returncode == 1 and second.stderr.count("viaduct: error: ") == 1
                       and f"another run is at work in run%directory {folder}" in second.stderr
                       and f"host {os.uname().nodename}, process {first.pid})" in second.stderr,
                       f"{second.returncode} {second.stderr}")
            dry = viaduct(*train(**words), "--check")
            report("a dry run beside a living one", dry.returncode == 0, dry.stderr)
            same = [os.stat(os.path.join(folder, "deck.nml")), os.stat(lock)]
            report("the living run continues, its files untouched", first.poll() is None and [
                (x.st_ino, x.st_mtime_ns) for x in same] == [(x.st_ino, x.st_mtime_ns) for x in (deck_before, lock_before)],
                   str(same))
        finally:
            first.kill()
    for name in (".log.jsonl.tmp-1", ".trace.h5.tmp-1", ".deck.nml.tmp-1", ".notes.tmp-1"):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write("left")
    # The newest by its name: a kill may have come between a checkpoint and the link last.h5 to it.
    update = max(int(n[7:-3]) for n in os.listdir(os.path.dirname(last)) if re.fullmatch(r"update-\d+\.h5", n))
    third = viaduct(*train(**words, run__max_updates=update + 1))
    left = [n for n in os.listdir(folder) if ".tmp-" in n]
    report("after kill -9 the next run continues, and removes what was left",
           third.returncode == 0 and f"resumes after update {update} " in third.stdout and left == [".notes.tmp-1"]
           and f"process {first.pid}" not in read(lock), f"{third.returncode} {third.stderr} {third.stdout} {left}")


made = place.train("good", run__max_updates=20, checkpoint__keep=2, valid__interval=0)
report("a good run for the cases", made.returncode == 0, made.stderr)
command_lines()
decks()
corpora()
folders()
checkpoints()
numbers()
two_runs()
place.remove()
finish()
