#!/usr/bin/env python3
"""Compares runs of some seeds with reference curves, mean with mean. Usage:
compare_curves.py trimmed|masked|transformer_xl REFERENCE_FOLDER SECONDS LIMIT LOG.jsonl...

Held: the bpc over 25 updates at the updates below; for the adaptive spans the validation at the same updates and the
longest and the mean span at the end; the slowest run's wall time to the limit. Prints a table and lines 'ok' and 'not ok'.

The first loss of one seed and another differs by up to 0.4 bits, and a part of that stays for some hundred updates. With a
standard deviation SD of one run, the means of n runs and of m reference runs differ by chance with a standard error of
SD sqrt(1/n + 1/m): 0.020 for three runs of 'trimmed' against two. Its bpc in training is held to three standard errors. Two
references say too little about SD, so that ten runs of seeds 1 to 4 gave it (doc/notes/2026-11-26-curves.md). Its longest
span is one head's, the maximum of 96: from 14 to 55 tokens over eight runs whose bpc agreed. It is held to the range of
three standard errors of its logarithm, which finds spans that do not grow, or grow without end, and no less.
"""
import glob
import json
import math
import os
import sys

# Updates, bounds of training (None: from the spread of seeds) and of validation (None: shown only).
CURVES = {"trimmed": (range(400, 1401, 200), None, 0.08), "masked": (range(400, 1001, 200), 0.05, 0.08),
          "transformer_xl": (range(200, 601, 200), 0.06, None)}
SPAN = 0.30
# 'trimmed', standard deviations of one run: of its bpc in training, and of the logarithm of its longest span.
TRIMMED_BPC, TRIMMED_LONGEST = 0.022, 0.48
failed = 0


def report(name, good, what):
    global failed
    failed += not good
    print(f"{'ok' if good else 'not ok'} {name}: {what}")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def three_errors(sd, n, m):
    """Three standard errors of the difference between the means of n and of m values."""
    return 3 * sd * math.sqrt(1 / max(n, 1) + 1 / m)


def read_log(path):
    """Rows of training and bpc of validation by their updates."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return ({r["num_updates"]: r for r in rows if "loss" in r}, {r["num_updates"]: r["valid_bpc"] for r in rows if "valid_bpc" in r})


def mean_and_seeds(values):
    return f"{mean(values):.3f} ({', '.join(f'{x:.3f}' for x in values)})"


def report_span(curve, name, have, want):
    """Spans are held to SPAN; the longest of 'trimmed', by the geometric mean, to three standard errors of its logarithm."""
    ratio = mean(have) / mean(want) if have else float("nan")
    least, most = 1 - SPAN, 1 + SPAN
    if (curve, name) == ("trimmed", "longest"):
        ratio = math.exp(mean(map(math.log, have)) - mean(map(math.log, want))) if have else float("nan")
        most = math.exp(three_errors(TRIMMED_LONGEST, len(have), len(want)))
        least = 1 / most
    report(f"{curve} {name} span", least <= ratio <= most, f"{mean_and_seeds(have) if have else 'none'} tokens, "
           f"reference {mean_and_seeds(want)}: ratio {ratio:.2f} (bounds {least:.2f}, {most:.2f})")


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
    if train_bound is None:
        train_bound = three_errors(TRIMMED_BPC, len(logs), len(seeds))

    print(f"# {curve}: {len(logs)} seeds, reference {len(files)}\n# update, training: mean (seeds), reference; validation: the same")
    for u in updates:
        if not logs or not all(u in rows and u in bpc for rows, bpc in logs):
            report(f"{curve} update {u}", False, "not in each log")
            continue
        ours, theirs = [rows[u]["bpc"] for rows, _ in logs], [t[u][1] for t in train]
        ours_valid, theirs_valid = [bpc[u] for _, bpc in logs], [v[u] for v in valid]
        print(f"# {u:6d}  {mean_and_seeds(ours)}, {mean_and_seeds(theirs)};  {mean_and_seeds(ours_valid)}, {mean_and_seeds(theirs_valid)}")
        off = mean(ours) - mean(theirs)
        report(f"{curve} train at {u}", abs(off) <= train_bound, f"off by {off:+.3f} (bound {train_bound:.3f})")
        off = mean(ours_valid) - mean(theirs_valid)
        if valid_bound is not None:
            report(f"{curve} valid at {u}", abs(off) <= valid_bound, f"off by {off:+.3f} (bound {valid_bound})")
    last = max(updates)
    ends = [rows[last] for rows, _ in logs if last in rows]
    if len(train[0][last]) == 5:
        for name, key, column in (("mean", "avg_span", 2), ("longest", "max_span", 3)):
            report_span(curve, name, [e[key] for e in ends], [t[last][column] for t in train])
    report(f"{curve} wall time", seconds <= limit, f"{seconds:.1f} s, reference {mean(t[last][-1] for t in train):.0f} s "
           f"(bound {limit:.0f} s), {mean(e['wps'] for e in ends) if ends else 0:.0f} tokens/s at the end")
    print(f"{curve}: {'FAIL' if failed else 'PASS'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
