#!/usr/bin/python3
"""Transformer-XL as a program: the same run on any number of ranks, exact resume while memories still grow, evaluation
with other memories, and what a deck may not change."""
import json
import os
import sys

import h5py
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from whole import Place, finish, report, settings, viaduct  # noqa: E402

# A head wider than d_model / n_head; a memory of no whole number of blocks, still growing at update 4.
DECK = """&run title='tiny', directory='{run}', max_updates=40, log_interval=1 /
&data path='{corpus}', tokens_per_sample=32, batch_streams=4 /
&model arch='transformer_xl', n_layer=2, d_model=32, n_head=2, d_head=24, d_inner=64, dropout=0.1, dropatt=0.1 /
&memory mem_len=100 /
&optimizer method='adam', lr=0.002, schedule='cosine', clip_norm=0.25 /
&valid interval=20, streams=2, max_blocks=8 /
&checkpoint interval=3, keep=100 /
&trace interval=5 /
&eval streams=3, tokens_per_sample=32, split='test' /
&generate prompt='int ', tokens=20 /
"""

place = Place()
with open(place.deck, "w", encoding="utf-8") as deck:
    deck.write(DECK.format(run=place.path("run"), corpus=place.corpus))


def tensors(path):
    """Every dataset of a checkpoint that is no dimension scale."""
    found = {}
    with h5py.File(path, "r") as f:
        f.visititems(lambda name, o: found.__setitem__(name, o[...]) if isinstance(o, h5py.Dataset)
                     and o.attrs.get("CLASS") != b"DIMENSION_SCALE" and "statistics" not in name else None)
    return found


def losses(run):
    return np.array([x["loss"] for x in place.log(run)[0]])


def evaluate(run, ranks=0, **variables):
    result = viaduct("eval", place.deck, *settings(run__directory=place.path(run), **variables), ranks=ranks)
    figures = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return (json.loads(figures[-1])["bpc"] if figures else float("nan")), result


for name, ranks, more in (("one", 1, {}), ("two", 2, {}), ("three", 3, {}), ("halved", 1, {"data__micro_streams": 3})):
    trained = place.train(name, ranks=ranks, **more)
    report(f"40 updates, {name}", trained.returncode == 0, trained.stderr)
one = losses("one")
report("40 losses that fall", len(one) == 40 and one[-5:].mean() < one[:5].mean() - 0.5, str(one))
for name in ("two", "three", "halved"):
    error = np.max(np.abs(losses(name) / one - 1))
    report(f"losses of {name} within 1e-5", error < 1e-5, f"{error}")
rate = [x["lr"] for x in place.log("one")[0]]
wanted = [0.001 * (1 + np.cos(np.pi * u / 40)) for u in range(40)]
report("the learning rate is the cosine's", np.allclose(rate, wanted, rtol=1e-4, atol=1e-9), f"{rate} {wanted}")
rows = [tensors(place.checkpoint("one", u))["memory/layer1"].shape[1] for u in (3, 6)]
report("memories grow from nothing to mem_len", rows == [96, 100], str(rows))

whole = tensors(place.checkpoint("one"))
for update in (3, 6):
    again = place.train(f"again-{update}", ranks=1, run__resume=place.checkpoint("one", update))
    got = tensors(place.checkpoint(f"again-{update}"))
    wrong = [k for k in sorted(set(whole) | set(got)) if k not in whole or k not in got
             or whole[k].tobytes() != got[k].tobytes()]
    report(f"resumed after update {update}: the same bits", again.returncode == 0 and not wrong, f"{again.stderr} {wrong}")
other = place.train("others", ranks=3, run__resume=place.checkpoint("two", 3))
error = np.max(np.abs(losses("others") / one[3:] - 1))
report("resumed on 3 ranks after 2: losses within 1e-5", other.returncode == 0 and error < 1e-5, f"{other.stderr} {error}")

plain = [evaluate("one", ranks)[0] for ranks in (1, 2, 3)]
report("1, 2 and 3 ranks evaluate alike", np.ptp(plain) < 1e-6, str(plain))
changed = {"memory__mem_len": 200, "memory__clamp_len": 60, "memory__same_length": "T", "memory__initial": "zeros"}
long, said = evaluate("one", eval__tokens_per_sample=20, **changed)
# A model of 40 updates hardly uses its memory: what matters is a difference beyond that of rounding (1e-9 between ranks).
report("other memories: another figure, and said", abs(long - plain[0]) > 2e-8
       and all(f"works with memory%{x}" in said.stdout for x in ("mem_len = 200", "clamp_len = 60", "same_length", "initial = 'zeros'"))
       and "as many zeros where a stream begins" in said.stdout,
       str(said))
# 300 tokens never fill this memory: a token sees all before it, in blocks of any length.
a = evaluate("one", eval__streams=1, eval__tokens_per_sample=1, memory__mem_len=7000, eval__max_blocks=300)[0]
b = evaluate("one", eval__streams=1, eval__tokens_per_sample=60, memory__mem_len=7000, eval__max_blocks=5)[0]
report("under a memory that holds all, the block's length changes nothing but rounding", abs(a / b - 1) < 1e-5, f"{a} {b}")
for variable, value in (("model__n_layer", 3), ("model__arch", "adaptive_span"), ("model__untie_r", "F")):
    figure, said = evaluate("one", **{variable: value})
    report(f"eval refuses another {variable}", said.returncode == 2 and variable.replace("__", "%") in said.stderr, str(said))
text = [viaduct("generate", place.deck, *settings(run__directory=place.path("one"), **more))
        for more in ({}, {"memory__mem_len": 8})]
report("text, and text with a shorter memory", all(t.returncode == 0 and t.stdout.startswith("int ") for t in text)
       and "memory%mem_len = 8" in text[1].stderr, str(text))
for variable, value in (("span__attn_span", 64), ("model__emb_dropout", 0.1), ("optimizer__clip_step", 0.03),
                        ("model__d_model", 33), ("optimizer__warmup_updates", 40), ("optimizer__min_lr", 0.1)):
    said = place.train("refused", **{variable: value})
    report(f"train refuses {variable} = {value}", said.returncode == 2 and variable.replace("__", "%") in said.stderr
           and not os.path.exists(place.path("refused")), str(said))
said = viaduct("train", place.deck, "--check", *settings(run__directory=place.path("dry")))
report("the dry run tells the memory that a rank needs", said.returncode == 0 and "with full memories" in said.stdout, str(said))
said = viaduct("info", place.checkpoint("one"))
report("info lists Adam's state and no spans", said.returncode == 0 and "adam_v" in said.stdout
       and "spans, tokens" not in said.stdout, str(said))
shorter = place.train("shorter", run__resume=place.checkpoint("one", 9), memory__mem_len=50, run__max_updates=12)
report("a run resumes with a shorter memory, and prints it and the bent schedule", shorter.returncode == 0
       and "resumes with memory%mem_len = 50 (was 100)" in shorter.stdout and "run%max_updates = 12" in shorter.stdout
       and tensors(place.checkpoint("shorter"))["memory/layer0"].shape[1] == 50, str(shorter))
for updates in (6, 9):
    none = place.train("none", memory__mem_len=0, run__max_updates=updates)
report("a run without any memory trains and continues", none.returncode == 0 and "resumes after update 6" in none.stdout,
       str(none))
tied = place.train("tied", run__max_updates=5, model__untie_r="F", memory__same_length="T", memory__clamp_len=20)
report("shared biases, same_length and clamp_len train", tied.returncode == 0 and "model/r_w" in
       tensors(place.checkpoint("tied")), tied.stderr)
place.remove()
finish()
