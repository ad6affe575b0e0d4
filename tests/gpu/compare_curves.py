#!/usr/bin/env python3
"""Compares runs of some seeds with reference curves, mean with mean. Usage:
compare_curves.py trimmed|masked|transformer_xl REFERENCE_FOLDER SECONDS LIMIT LOG.jsonl...

Held: the bpc over 25 updates at the updates below; for the adaptive spans the validation at the same updates and the
longest and the mean span at the end, to 30 %; the slowest run's wall time to the limit. Prints a table and lines 'ok' and
'not ok'. A single seed lies up to 0.06 bits from the mean of the others: the first loss of one seed and another differs by up
to 0.4 bits, and a part of that stays for some hundred updates.
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


def read_log(path):
    """Rows of training and bpc of validation by their updates."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return ({r["num_updates"]: r for r in rows if "loss" in r}, {r["num_updates"]: r["valid_bpc"] for r in rows if "valid_bpc" in r})


def mean_and_seeds(values):
    return f"{mean(values):.3f} ({', '.join(f'{x:.3f}' for x in values)})"


def main():
    curve, folder, seconds, limit = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    updates, train_bound, valid_bound = CURVES[curve]
    files = sorted(glob.glob(os.path.join(folder, f"{curve}_seed[0-9].json")))
    if not files:
        sys.exit(f"not ok {curve}: no reference in {folder}")
    seeds = [json.load(open(f, encoding="utf-8")) for f in files]
    train = [{row[0]: row for row in s["train"]} for s in seeds]
    valid = [dict(s["valid"]) for s in seeds]
    logs = [read_log(path) for path in sys.argv[5:]]

    print(f"# {curve}: {len(logs)} seeds, reference {len(files)}\n# update, training: mean (seeds), reference; validation: the same")
    for u in updates:
        if not logs or not all(u in rows and u in bpc for rows, bpc in logs):
            report(f"{curve} update {u}", False, "not in each log")
            continue
        ours, theirs = [rows[u]["bpc"] for rows, _ in logs], [t[u][1] for t in train]
        ours_valid, theirs_valid = [bpc[u] for _, bpc in logs], [v[u] for v in valid]
        print(f"# {u:6d}  {mean_and_seeds(ours)}, {mean_and_seeds(theirs)};  {mean_and_seeds(ours_valid)}, {mean_and_seeds(theirs_valid)}")
        off = mean(ours) - mean(theirs)
        report(f"{curve} train at {u}", abs(off) <= train_bound, f"off by {off:+.3f} (bound {train_bound})")
        off = mean(ours_valid) - mean(theirs_valid)
        if valid_bound is not None:
            report(f"{curve} valid at {u}", abs(off) <= valid_bound, f"off by {off:+.3f} (bound {valid_bound})")
    last = max(updates)
    ends = [rows[last] for rows, _ in logs if last in rows]
    spans = (("mean", "avg_span", 2), ("longest", "max_span", 3)) if len(train[0][last]) == 5 else ()
    for name, key, column in spans:
        want, have = mean(t[last][column] for t in train), mean(e[key] for e in ends) if ends else float("nan")
        report(f"{curve} {name} span", abs(have / want - 1) <= SPAN, f"{have:.2f} tokens ({', '.join(f'{e[key]:.2f}' for e in ends)}), "
               f"reference {want:.2f} ({', '.join(f'{t[last][column]:.2f}' for t in train)}) (bound 30 %)")
    report(f"{curve} wall time", seconds <= limit, f"{seconds:.1f} s, reference {mean(t[last][-1] for t in train):.0f} s "
           f"(bound {limit:.0f} s), {mean(e['wps'] for e in ends) if ends else 0:.0f} tokens/s at the end")
    print(f"{curve}: {'FAIL' if failed else 'PASS'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
