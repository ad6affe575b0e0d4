#!/usr/bin/python3
"""doc/analysis/plot_attention_cost.py on sweeps made up: the fit finds what they were made of; one line of complaint about
what is no sweep."""
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "doc", "analysis", "plot_attention_cost.py")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import finish, report  # noqa: E402

FIXED, SLOPE = 0.05, 0.02  # ms, ms for a million pairs


def sweep(spans):
    """As bench_attention prints it for 16 streams."""
    text = "streams 16 dropout 0.3\nlayer\tMpairs\tforward\tbackward\tboth\tTFLOP/s of 11 products\n0\t4.0\t1\t1\t2\t3\n"
    for span in spans:
        pairs = 16 * 512 * (min(span + 33, 8192) + 7 * 65) / 1e6
        both = FIXED + SLOPE * pairs
        text += f"span {span}\t{pairs:.4f}\t{both / 3:.5f}\t{both * 2 / 3:.5f}\t{both:.5f}\t70\n"
    return text


def plot(folder, text, *words):
    path = os.path.join(folder, "sweep.txt")
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return subprocess.run([sys.executable, SCRIPT, path, *words], capture_output=True, text=True, check=False)


with tempfile.TemporaryDirectory(prefix="viaduct-test-") as folder:
    picture = os.path.join(folder, "cost.png")
    good = plot(folder, sweep(2**i for i in range(3, 14)), "-o", picture, "--gpu", "made up")
    whole = FIXED + SLOPE * 16 * 512 * 8 * 8192 / 1e6
    report("a good sweep: a picture, and the figures it was made of",
           good.returncode == 0 and "0.050 ms + 20.00 us" in good.stdout and f"{whole:.2f} with all" in good.stdout
           and open(picture, "rb").read(8) == b"\x89PNG\r\n\x1a\n", str(good))
    svg = plot(folder, sweep(2**i for i in range(3, 14)), "-o", os.path.join(folder, "cost.svg"))
    report("another kind of picture", svg.returncode == 0 and "<svg" in open(os.path.join(folder, "cost.svg")).read(), str(svg))
    for name, text, words, message in (
            ("no sweep", "streams 16 dropout 0.3\n0\t4.0\t1\t1\t2\t3\n", (), "no sweep of spans"),
            ("nothing", "", (), "no sweep of spans"),
            ("a torn line", sweep([8, 512, 1024, 2048]) + "span 4096\t37", (), "cannot be read"),
            ("short spans alone", sweep([8, 16, 32, 64, 128]), (), "fewer than 3 spans from 512"),
            ("no folder", sweep([8, 512, 1024, 2048]), ("-o", os.path.join(folder, "none", "x.png")), "No such file")):
        bad = plot(folder, text, *words)
        report(f"{name}: one line", bad.returncode == 1 and message in bad.stderr and bad.stderr.count("\n") == 1, str(bad))
finish()
