#!/usr/bin/python3
"""Ids never lose their meaning: a checkpoint holds its vocabulary, other corpora are read by the bytes of their symbols or
refused, and a new run may begin from a checkpoint's parameters."""
import json
import os
import shutil

import h5py
import numpy as np

from whole import Place, finish, report, settings, viaduct


def prepare(place, name, data, train, valid=2000, test=2000):
    """A corpus of the bytes `data`, split by counts."""
    with open(place.path(name + ".txt"), "wb") as f:
        f.write(data)
    words = settings(data__path=place.path(name + ".h5"), prepare__source=place.path(name + ".txt"), prepare__train=train,
                     prepare__valid=valid, prepare__test=test)
    made = viaduct("prepare", place.path("prepare.nml"), *words)
    assert made.returncode == 0, made.stderr
    return place.path(name + ".h5")


def bpc(place, corpus, run="run"):
    done = viaduct("eval", place.deck, *settings(data__path=corpus, eval__checkpoint=place.checkpoint(run)))
    return (json.loads(done.stdout.splitlines()[-1])["bpc"] if done.returncode == 0 else None), done


def parameters(path):
    with h5py.File(path, "r") as f:
        found = {}
        f["model"].visititems(lambda name, o: found.__setitem__(name, o[()]) if isinstance(o, h5py.Dataset) else None)
        return found


def vocabulary_of(path):
    with h5py.File(path, "r") as f:
        return [bytes(s[:n]) for s, n in zip(f["vocabulary/symbol"][()], f["vocabulary/length"][()])]


place = Place(tokens=60000)
try:
    with open(place.path("text"), "rb") as source:
        whole_text = source.read()
    made = place.train("run", run__max_updates=20)
    report("train", made.returncode == 0, made.stderr)
    report("a checkpoint holds its vocabulary", vocabulary_of(place.checkpoint("run")) == vocabulary_of(place.corpus))

    other = prepare(place, "capitals", whole_text.upper().swapcase().replace(b" ", b"~"), 50000)
    value, done = bpc(place, other)
    report("symbols that the model lacks are refused and named",
           done.returncode == 2 and "not in the model's vocabulary" in done.stderr and "'~'" in done.stderr, done.stderr)
    done = viaduct("generate", place.deck, *settings(data__path=other, generate__checkpoint=place.checkpoint("run")))
    report("generate refuses them too", done.returncode == 2 and "'~'" in done.stderr, done.stderr)

    # The same test split twice: once in a corpus that lacks a symbol, so that ids are others, once in one that has all.
    lacking = whole_text.replace(b"(", b"")[:50000]
    less = prepare(place, "less", lacking, 46000)
    same = prepare(place, "same", lacking[:45000] + whole_text[:3000] + lacking[45000:], 49000)
    report("the corpora number their symbols differently", vocabulary_of(less) != vocabulary_of(same))
    a, first = bpc(place, less)
    b, second = bpc(place, same)
    report("ids are mapped by the symbols' bytes", a is not None and a == b, f"{a} and {b}: {first.stderr}{second.stderr}")

    # Vocabularies that are given: all bytes, a checkpoint's, one that lacks a symbol.
    def given(name, vocabulary, source="less.txt"):
        return viaduct("prepare", place.path("prepare.nml"), *settings(
            data__path=place.path(name + ".h5"), prepare__source=place.path(source), prepare__train=46000,
            prepare__valid=2000, prepare__test=2000, prepare__vocabulary=vocabulary))
    done = given("bytes", "bytes")
    report("prepare takes all bytes", done.returncode == 0
           and vocabulary_of(place.path("bytes.h5")) == [bytes([i]) for i in range(256)], done.stderr)
    done = given("taken", place.checkpoint("run"))
    report("prepare takes over a checkpoint's vocabulary", done.returncode == 0
           and vocabulary_of(place.path("taken.h5")) == vocabulary_of(place.corpus), done.stderr)
    c, third = bpc(place, place.path("taken.h5"))
    report("its tokens are the model's", c is not None and c == a, f"{a} and {c}: {third.stderr}")
    done = given("refused", place.checkpoint("run"), "capitals.txt")
    report("prepare refuses a vocabulary that lacks symbols",
           done.returncode == 2 and "'~'" in done.stderr and not os.path.exists(place.path("refused.h5")), done.stderr)

    # Bytes with the ids of a vocabulary of more than 256 symbols take two bytes a token.
    with open(place.path("words.txt"), "w") as f:
        f.write(" ".join([f"w{i}" for i in range(300)] + list("abc")))
    done = viaduct("prepare", place.path("prepare.nml"), *settings(
        data__path=place.path("words.h5"), prepare__source="", **{f"prepare__{k}_text": place.path("words.txt")
                                                                  for k in ("train", "valid", "test")}))
    report("a corpus of 304 words", done.returncode == 0 and len(vocabulary_of(place.path("words.h5"))) == 304, done.stderr)
    abc = b"abc" * 20000
    with open(place.path("abc.txt"), "wb") as f:
        f.write(abc)
    done = given("wide", place.path("words.h5"), "abc.txt")
    report("prepare takes over a vocabulary of words for bytes", done.returncode == 0, done.stderr)
    symbols = vocabulary_of(place.path("wide.h5"))
    with h5py.File(place.path("wide.h5")) as f:
        ids = f["train"][()]
    report("its tokens are the bytes", ids.dtype == np.uint16
           and b"".join(symbols[i] for i in ids) == abc[:46000], f"{ids.dtype} {ids[:6]}")

    done = place.train("tuned", data__path=less, run__start_from=place.checkpoint("run"), run__max_updates=1,
                       optimizer__lr="1d-30", span__aux_loss_scaler=0)
    report("a run starts from a checkpoint's parameters on other data", done.returncode == 0, done.stderr)
    old, new = parameters(place.checkpoint("run")), parameters(place.checkpoint("tuned"))
    report("its parameters are the checkpoint's", set(old) == set(new) and all(np.array_equal(old[k], new[k]) for k in old))
    with h5py.File(place.checkpoint("tuned"), "r") as f:
        report("it begins at update 0 with a fresh optimiser", int(f.attrs["update"]) == 1)
    report("it has the model's vocabulary", vocabulary_of(place.checkpoint("tuned")) == vocabulary_of(place.corpus))
    shutil.move(place.path("run"), place.path("away"))
    done = place.train("tuned", data__path=less, run__start_from=place.checkpoint("run"), run__max_updates=3)
    report("after a requeue it resumes from its own checkpoints", done.returncode == 0, done.stderr)
    shutil.move(place.path("away"), place.path("run"))
    done = place.train("wrong", run__start_from=place.checkpoint("run"), run__max_updates=1, model__d_inner=32)
    report("a model of another shape is refused before anything is written",
           done.returncode == 2 and "model%d_inner" in done.stderr and not os.path.exists(place.path("wrong")), done.stderr)
    done = place.train("run", data__path=less, run__max_updates=22)
    report("run%resume still refuses another corpus", done.returncode == 2 and "other tokens" in done.stderr, done.stderr)
finally:
    place.remove()
finish()
