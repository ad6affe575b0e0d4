#!/usr/bin/python3
"""bpc of a split: the same on any number of ranks, every token once, and the nll file sums to what is printed."""
import json
import os
import sys

import h5py
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from whole import Place, finish, report, settings, viaduct  # noqa: E402

place = Place()


def evaluate(ranks, **variables):
    result = viaduct("eval", place.deck, *settings(**variables), ranks=ranks)
    if result.returncode:
        return {"bpc": float("nan"), "error": result.stderr}
    return json.loads([line for line in result.stdout.splitlines() if line.startswith("{")][-1])


trained = place.train("run", run__max_updates=20)
report("train", trained.returncode == 0, trained.stderr)
with h5py.File(place.corpus, "r") as f:
    length = {split: f[split].shape[0] for split in ("train", "valid", "test")}

for streams in (1, 3, 7):
    # blocks of 50 divide no stream evenly: the tail counts too
    figures = []
    for ranks in (1, 2, 4):
        path = place.path(f"nll-{streams}-{ranks}.h5")
        figures.append(evaluate(ranks, eval__split="test", eval__streams=streams, eval__tokens_per_sample=50,
                                eval__nll_file=path))
        with h5py.File(path, "r") as f:
            nll = f["nll"][...].astype(float)
            units = f["nll"].attrs["units"]
            kind = f.attrs["viaduct_kind"]
        total = np.nansum(nll) / (length["test"] - 1) / np.log(2)
        report(f"nll file of {streams} streams on {ranks} ranks sums to the bpc",
               len(nll) == length["test"] and np.isnan(nll[0]) and not np.isnan(nll[1:]).any()
               and abs(total / figures[-1]["bpc"] - 1) < 1e-6 and units in (b"nats", "nats") and kind in (b"nll", "nll"),
               f"{total} {figures[-1]}")
    report(f"{streams} streams: 1, 2 and 4 ranks agree", np.ptp([x["bpc"] for x in figures]) < 1e-6, str(figures))
    report(f"{streams} streams: every token but the first is predicted",
           all(x["predicted"] == length["test"] - 1 and x["tokens"] == length["test"] for x in figures), str(figures))

# The validations of a run share its parameters and keep their buffers; eval makes a model of its own from the file.
kept = place.train("kept", ranks=2, run__max_updates=40, valid__interval=10, checkpoint__interval=10, checkpoint__keep=9)
logged = {x["num_updates"]: x["valid_bpc"] for x in place.log("kept")[1]}
again = {u: evaluate(1, eval__checkpoint=place.checkpoint("kept", u), eval__split="valid", eval__streams=2,
                     eval__tokens_per_sample=32, eval__max_blocks=4)["bpc"] for u in (10, 20, 30, 40)}
report("every validation of a run is what eval finds in its checkpoint",
       kept.returncode == 0 and set(logged) == set(again) and all(abs(logged[u] / again[u] - 1) < 1e-7 for u in again),
       f"{kept.stderr} {logged} {again}")

a = evaluate(1, eval__split="valid", eval__streams=1, eval__tokens_per_sample=1)
b = evaluate(1, eval__split="valid", eval__streams=1, eval__tokens_per_sample=64)
report("the block's length changes nothing but rounding: memory reaches as far",
       abs(a["bpc"] / b["bpc"] - 1) < 1e-5, f"{a} {b}")
one = viaduct("generate", place.deck, *settings(generate__tokens=40))
two = viaduct("generate", place.deck, *settings(generate__tokens=40), ranks=2)
report("text is the same alone and on 2 ranks, and begins with the prompt",
       one.returncode == 0 and one.stdout == two.stdout and one.stdout.startswith("int ")
       and len(one.stdout.rstrip("\n")) >= 30, f"{one} {two}")
report("and 2 ranks print that one idles", "one rank" in two.stderr, two.stderr)
several = [viaduct("generate", place.deck, *settings(generate__tokens=40, generate__samples=n), ranks=ranks)
           for n, ranks in ((3, 0), (3, 2), (2, 3))]
cut = several[0].stdout.split("--- sample ")
report("samples are the same alone and on 2 ranks, the first is that of one sample",
       several[0].returncode == 0 and several[0].stdout == several[1].stdout and len(cut) == 4
       and cut[1].rstrip("\n") == "1 of 3 ---\n" + one.stdout.rstrip("\n"), str(several))
report("and on more ranks than samples",
       several[2].stdout.replace(" of 2 ", " of 3 ").rstrip("\n").split("--- sample ")
       == [part.rstrip("\n") if i == 2 else part for i, part in enumerate(cut[:3])], str(several))
other = viaduct("generate", place.deck, *settings(generate__tokens=40, run__seed=7))
report("another seed gives another text", other.returncode == 0 and other.stdout != one.stdout, other.stderr)
kept = place.path("kept.txt")
with open(kept, "w", encoding="utf-8") as f:
    f.write("kept")
wrong = viaduct("generate", place.deck, *settings(generate__output=kept, generate__prompt="int \u00e9"))
with open(kept, encoding="utf-8") as f:
    report("a prompt that cannot be continued leaves the output as it was", wrong.returncode == 2 and f.read() == "kept",
           str(wrong))

# A corpus of words: blanks come back between them, and line ends for </s>.
with open(place.path("words.txt"), "w", encoding="utf-8") as f:
    f.write("a cat sat\non the mat\n" * 200)
words = settings(**{f"prepare__{split}_text": place.path("words.txt") for split in ("train", "valid", "test")})
words += settings(data__path=place.path("words.h5"), run__directory=place.path("of_words"), run__max_updates=2,
                  generate__prompt="the  cat", generate__tokens=60)
made = [viaduct(command, place.deck, *words) for command in ("prepare", "train", "generate")]
said = made[-1].stdout
report("text of words: blanks between them, line ends for </s>, no other words",
       all(m.returncode == 0 for m in made) and said.startswith("the cat ") and "\n" in said and "</s>" not in said
       and len(said.split()) + said.count("\n") == 62 and set(said.split()) <= set("a cat sat on the mat".split()),
       "\n".join(map(str, made)))
unknown = viaduct("generate", place.deck, *words, *settings(generate__prompt="the cats"))
report("a word that is none of the corpus is named", unknown.returncode == 2 and "no word 'cats'" in unknown.stderr,
       str(unknown))
place.remove()
finish()
