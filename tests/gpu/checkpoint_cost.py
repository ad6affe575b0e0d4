#!/usr/bin/env python3
"""What a validation and a best checkpoint cost a 12-layer bf16 run on a GPU: checkpoint_cost.py CORPUS [UPDATES [INTERVAL]]

Trains with the sizes of fairseq's adaptive_span example (64 streams of 512, validation of 8 streams). The log has a line for
every update: the cost is the time from an update's line to its validation's, and from there to the next update's, less the
time of an update. A thread writes the checkpoint beside the loop, so the updates right after it are reported, too. One line of
JSON. Environment: VIADUCT, the program.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VIADUCT = os.environ.get("VIADUCT") or os.path.join(ROOT, "build", "viaduct")
DECK = """&run title='cost', directory='{folder}/run', max_updates={updates}, log_interval=1 /
&data path='{corpus}', tokens_per_sample=512, batch_streams=64 /
&model n_layer=12, d_model=512, n_head=8, d_inner=2048, dropout=0.3, init='fairseq' /
&span attn_span=8192, ramp=32, softmax='trimmed', aux_loss_scaler=5d-7 /
&optimizer lr=0.07, warmup_updates=1000, clip_step=0.03 /
&valid interval={interval}, streams=8 /
&checkpoint interval=1000000, keep=1 /
&device precision='bf16' /
"""
AFTER = 40  # updates during which the checkpoint may still be written


def main(corpus, updates=320, interval=100):
    with tempfile.TemporaryDirectory(prefix="viaduct-cost-") as folder:
        deck = os.path.join(folder, "deck.nml")
        with open(deck, "w", encoding="utf-8") as f:
            f.write(DECK.format(folder=folder, corpus=os.path.abspath(corpus), updates=updates, interval=interval))
        start = time.monotonic()
        subprocess.run([VIADUCT, "train", deck], check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - start
        with open(os.path.join(folder, "run", "log.jsonl"), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        size = os.path.getsize(os.path.join(folder, "run", "checkpoints", "last.h5"))
    wall = {r["num_updates"]: r["wall"] for r in rows if "loss" in r}
    valid = {r["num_updates"]: r["wall"] for r in rows if "valid_bpc" in r}
    best = [u for u in valid if u + 1 in wall]
    took = {u: wall[u] - wall[u - 1] for u in wall if u - 1 in wall and u - 1 not in valid}
    beside = [took[u] for u in took if any(0 < u - v <= AFTER for v in valid)]
    plain = statistics.median(took[u] for u in took if u > 10 and not any(0 < u - v <= AFTER for v in valid))
    print(json.dumps({
        "update_ms": round(1e3 * plain, 2),
        "update_ms_after_checkpoint": round(1e3 * statistics.median(beside), 2),
        "validation_s": [round(valid[u] - wall[u], 3) for u in valid],
        "best_checkpoint_s": [round(wall[u + 1] - valid[u] - plain, 3) for u in best],
        "slowest_of_40_after_s": [round(max(took[u] for u in took if 0 < u - v <= AFTER), 3) for v in best],
        "valid_bpc": [r["valid_bpc"] for r in rows if "valid_bpc" in r],
        "checkpoint_mib": round(size / 2**20), "updates": updates,
        "first_line_s": round(wall[1], 2), "last_line_s": round(max(valid.values()), 2), "whole_s": round(whole, 2)}))


main(sys.argv[1], *(int(x) for x in sys.argv[2:4]))
