#!/usr/bin/env python3
"""Compares the log of a run with reference curves, of two seeds where there are two. Usage:
compare_curves.py trimmed|masked|transformer_xl LOG.jsonl REFERENCE_FOLDER SECONDS LIMIT

Held: the bpc over 25 updates at the updates below to the mean of the seeds; for the adaptive spans the validation at the
same updates and the longest and the mean span at the end, to 30 %; the run's wall time to the limit. Prints a table and
lines 'ok' and 'not ok'.
"""
import glob
import json
import os
import sys

# Updates, bounds of training and validation (None: shown only).
CURVES = {"trimmed": (range(400, 1401, 200), 0.04, 0.08), "masked": (range(400, 1001, 200), 0.05, 0.08),
          "transformer_xl": (range(200, 601, 200), 0.06, None)}
SPAN = 0.30
failed = 0


def report(name, good, what):
    global failed
    failed += not good
    print(f"{'ok' if good else 'not ok'} {name}: {what}")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def main():
    curve, log, folder, seconds, limit = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), float(sys.argv[5])
    updates, train_bound, valid_bound = CURVES[curve]
    files = sorted(glob.glob(os.path.join(folder, f"{curve}_seed[0-9].json")))
    if not files:
        sys.exit(f"not ok {curve}: no reference in {folder}")
    seeds = [json.load(open(f, encoding="utf-8")) for f in files]
    train = [{row[0]: row for row in s["train"]} for s in seeds]
    valid = [dict(s["valid"]) for s in seeds]
    rows = [json.loads(line) for line in open(log, encoding="utf-8")]
    ours = {r["num_updates"]: r for r in rows if "loss" in r}
    ours_valid = {r["num_updates"]: r["valid_bpc"] for r in rows if "valid_bpc" in r}

    print(f"# {curve}: {len(files)} seeds\n# update  train   reference (seeds)         valid   reference (seeds)")
    for u in updates:
        a, b = [t[u][1] for t in train], [v[u] for v in valid]
        if u not in ours or u not in ours_valid:
            report(f"{curve} update {u}", False, "not in the log")
            continue
        print(f"# {u:6d}  {ours[u]['bpc']:.3f}   {mean(a):.3f} ({', '.join(f'{x:.3f}' for x in a)})   "
              f"  {ours_valid[u]:.3f}   {mean(b):.3f} ({', '.join(f'{x:.3f}' for x in b)})")
        off = ours[u]["bpc"] - mean(a)
        report(f"{curve} train at {u}", abs(off) <= train_bound, f"off by {off:+.3f} (bound {train_bound})")
        off = ours_valid[u] - mean(b)
        if valid_bound is not None:
            report(f"{curve} valid at {u}", abs(off) <= valid_bound, f"off by {off:+.3f} (bound {valid_bound})")
    last = max(updates)
    spans = (("mean", "avg_span", 2), ("longest", "max_span", 3)) if len(train[0][last]) == 5 else ()
    for name, key, column in spans:
        want = mean(t[last][column] for t in train)
        have = ours[last][key] if last in ours else float("nan")
        report(f"{curve} {name} span", abs(have / want - 1) <= SPAN, f"{have:.2f} tokens, reference {want:.2f} (bound 30 %)")
    report(f"{curve} wall time", seconds <= limit, f"{seconds:.1f} s, reference {mean(t[last][-1] for t in train):.0f} s "
           f"(bound {limit:.0f} s), {ours[last]['wps'] if last in ours else 0:.0f} tokens/s at the end")
    print(f"{curve}: {'FAIL' if failed else 'PASS'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
