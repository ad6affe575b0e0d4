#!/usr/bin/python3
"""Strange things in a run's folder: pipes, folders and other files among the checkpoints, links that became files,
checkpoints that claim more than they hold. Nothing of them is lost, and nothing waits or allocates for them."""
import os
import resource
import shutil

import h5py

from h5_files import changed
from whole import Place, finish, report, settings, viaduct

place = Place(60000)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
    return path


def run_of(name):
    """A copy of the good run: (its folder, the folder of its checkpoints)."""
    folder = place.path(name)
    shutil.copytree(place.path("good"), folder, symlinks=True)
    return folder, os.path.join(folder, "checkpoints")


def train(folder, **variables):
    return viaduct("train", place.deck, *settings(run__directory=folder, valid__interval=0, **variables), timeout=60)


def said(result):
    return f"status {result.returncode}: {result.stdout} {result.stderr}"


def foreign_among_checkpoints():
    folder, checkpoints = run_of("foreign")
    names = {name: os.path.join(checkpoints, name) for name in (
        "update-00000300.h5", "update-00000400.h5", "update-00000500.h5", "notes.txt", "update-00000020.h5.bak")}
    os.mkfifo(names["update-00000300.h5"])
    os.mkdir(names["update-00000400.h5"])
    write(os.path.join(names["update-00000400.h5"], "inside"), b"mine")
    write(names["update-00000500.h5"], b"not a checkpoint\n" * 40)
    write(names["notes.txt"], b"mine")
    shutil.copy(os.path.join(checkpoints, "update-00000020.h5"), names["update-00000020.h5.bak"])
    text = read(names["update-00000500.h5"])
    result = train(folder, run__max_updates=60, checkpoint__keep=1)
    output = result.stdout + result.stderr
    report("a pipe, a folder and text named like checkpoints: the run resumes from the newest good one",
           result.returncode == 0 and "resumes after update 20 " in output, said(result))
    report("each of them is named once",
           all(output.count(names[f"update-00000{n}00.h5"]) == 1 for n in (3, 4, 5)), said(result))
    left = sorted(os.listdir(checkpoints))
    report("they and other files stay while old checkpoints go",
           set(names) < set(left) and read(names["update-00000500.h5"]) == text and
           os.listdir(names["update-00000400.h5"]) == ["inside"] and "update-00000060.h5" in left and
           "update-00000020.h5" not in left, str(left))


def links_that_are_files(link):
    """cp and rsync -L turn links into files; who keeps a single checkpoint may keep that one alone."""
    for alone in (False, True):
        name = f"{link} {'alone' if alone else 'beside others'}"
        folder, checkpoints = run_of(name.replace(" ", "-"))
        at = os.path.join(checkpoints, f"{link}.h5")
        data = read(os.path.join(checkpoints, "update-00000020.h5"))
        if os.path.lexists(at):
            os.remove(at)
        write(at, data)
        for other in os.listdir(checkpoints) if alone else ():
            if other != f"{link}.h5":
                os.remove(os.path.join(checkpoints, other))
        result = train(folder, run__max_updates=22)
        output = result.stdout + result.stderr
        resumed = result.returncode == 0 and "resumes after update 20 " in output
        refused = result.returncode in (1, 2) and at in output
        kept = [n for n in os.listdir(checkpoints) if os.path.isfile(os.path.join(checkpoints, n)) and
                not os.path.islink(os.path.join(checkpoints, n)) and read(os.path.join(checkpoints, n)) == data]
        report(f"a plain file {name} is resumed from or refused, and not lost", (resumed or refused) and kept, said(result))


def foreign_in_run():
    """What a run opens in its folder is a file of its own, or is left as it is; nothing waits for a FIFO."""
    mine = b"my own words\n" * 30
    for name in (".lock", "log.jsonl", "deck.nml"):
        folder, _ = run_of("fifo-" + name)
        os.remove(os.path.join(folder, name))
        os.mkfifo(os.path.join(folder, name))
        result = train(folder, run__max_updates=22)
        report(f"a FIFO in the place of {name} is refused", result.returncode in (1, 2) and name in result.stderr,
               said(result))
    for kind in ("file", "link"):
        folder, checkpoints = run_of("lock-" + kind)
        lock, victim = os.path.join(folder, ".lock"), os.path.join(folder, "victim")
        os.remove(lock)
        if kind == "link":
            write(victim, mine)
            os.symlink("victim", lock)
        else:
            write(lock, mine)
        result = train(folder, run__max_updates=22)
        report(f"a {kind} of a user's in the place of .lock is refused and kept",
               result.returncode == 1 and ".lock" in result.stderr and read(lock) == mine, said(result))
    folder, checkpoints = run_of("temporary")
    notes = write(os.path.join(checkpoints, ".notes.tmp-3"), mine)
    left = write(os.path.join(checkpoints, ".update-00000030.h5.tmp-3"), mine)
    result = train(folder, run__max_updates=22)
    report("leftovers of checkpoints go, other hidden files stay",
           result.returncode == 0 and read(notes) == mine and not os.path.exists(left), said(result))


def wrong_names():
    folder, checkpoints = run_of("renamed")
    shutil.copy(os.path.join(checkpoints, "update-00000020.h5"), os.path.join(checkpoints, "update-00000900.h5"))
    before = read(os.path.join(checkpoints, "update-00000900.h5"))
    result = train(folder, run__max_updates=22)
    output = result.stdout + result.stderr
    report("a checkpoint under another update's name is named and kept",
           "update-00000900.h5" in output and read(os.path.join(checkpoints, "update-00000900.h5")) == before and
           (result.returncode in (1, 2) or "resumes after update 20 " in output), said(result))


def contradictions():
    """The attribute `update` and /position/update: every command that reads a checkpoint compares them."""
    folder, checkpoints = run_of("contradiction")
    target = os.path.join(checkpoints, "update-00000020.h5")
    for value in (-5, 19, 10 ** 12):
        with changed(target) as f:
            f.attrs.modify("update", value)
        for name, words in (("info", ["info", target]), ("train", ["train", place.deck, *settings(
                run__directory=folder, run__resume=target)]), ("eval", ["eval", place.deck, *settings(
                    eval__checkpoint=target)]), ("generate", ["generate", place.deck, *settings(
                        generate__checkpoint=target)])):
            result = viaduct(*words)
            report(f"{name}: a checkpoint of update 20 whose attribute says {value}",
                   result.returncode == 1 and str(value) in result.stderr and target in result.stderr, said(result))


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))


def claims():
    """A few hundred kilobytes that claim gigabytes: refused for what they say, before memory is asked for."""
    good = place.checkpoint("good", 20)
    with h5py.File(good, "r") as f:
        rows = f["memory/layer0"].shape
    for name, path, shape in (("memory rows", "memory/layer0", (rows[0], 10 ** 8, rows[2])),
                              ("streams of memory", "memory/layer0", (10 ** 8, rows[1], rows[2])),
                              ("weights", "model/layer0/attention/wq", (10 ** 5, 10 ** 5)),
                              ("symbols", "vocabulary/symbol", (10 ** 8, 100))):
        folder, checkpoints = run_of("claims-" + name.replace(" ", "-"))
        target = os.path.join(checkpoints, "update-00000020.h5")
        with changed(target) as f:
            names = []
            f.visit(names.append)
            if path not in f:
                path = next(n for n in names if n.startswith(path.split("/", maxsplit=1)[0] + "/") and isinstance(
                    f[n], h5py.Dataset) and f[n].ndim == len(shape))
            kind = f[path].dtype
            del f[path]
            f.create_dataset(path, shape=shape, dtype=kind, chunks=tuple(min(n, 64) for n in shape))
        for other in os.listdir(checkpoints):
            if other not in (os.path.basename(target), "last.h5"):
                os.remove(os.path.join(checkpoints, other))
        result = viaduct("train", place.deck, *settings(run__directory=folder, run__max_updates=22), timeout=60,
                         preexec_fn=limit)
        report(f"a checkpoint that claims 10^8 {name} is refused",
               result.returncode == 1 and result.stderr.count("viaduct: error: ") == 1 and
               path.split("/")[-1] in result.stderr and "out of memory" not in result.stderr and
               "no memory" not in result.stderr, said(result))
        result = viaduct("eval", place.deck, *settings(eval__checkpoint=target), timeout=60, preexec_fn=limit)
        ignores = path.startswith("memory/")
        report(f"eval of it {'does without memory rows' if ignores else 'refuses'}",
               result.returncode == (0 if ignores else 1) and "out of memory" not in result.stderr, said(result))


def text_for_terminals():
    """What a file's attributes and links say is printed without control characters."""
    folder, checkpoints = run_of("escapes")
    target = os.path.join(checkpoints, "update-00000020.h5")
    with changed(target) as f:
        f.attrs.create("git_version", b"\x1b[2J\r\xc2\x9b", dtype="S6")
        f["memory/\x1b[31m"] = [1.0]
    result = viaduct("info", target)
    report("control characters in attributes and names are escaped",
           result.returncode == 0 and "\x1b" not in result.stdout and result.stdout.count("\\x1b") == 2, said(result))
    with changed(target) as f:
        count = f["vocabulary/length"][...]
        del f["vocabulary/length"]
        f["vocabulary/length"] = count.astype("f4")
    result = viaduct("eval", place.deck, *settings(eval__checkpoint=target))
    report("a vocabulary of other types is refused", result.returncode == 1 and "integers" in result.stderr, said(result))


made = place.train("good", run__max_updates=20, checkpoint__keep=2, valid__interval=0)
report("a good run for the cases", made.returncode == 0, made.stderr)
foreign_among_checkpoints()
links_that_are_files("last")
links_that_are_files("best")
foreign_in_run()
wrong_names()
text_for_terminals()
contradictions()
claims()
place.remove()
finish()
