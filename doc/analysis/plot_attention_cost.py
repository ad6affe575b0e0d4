#!/usr/bin/python3
"""What attention costs as one head's span grows and the others stay short:

    build/cuda/bench_attention 16 0.3 51 sweep >sweep.txt
    plot_attention_cost.py sweep.txt [-o PICTURE] [--gpu NAME]

draws the measured times of one layer, forward and backward, over the span of that head, and beside them what the layer
would take if every head cost what the longest costs. That line is computed: time = fixed + slope * (query, key) pairs,
by least squares over the measured points from 512 tokens on, at the pairs of all heads at the longest span. PICTURE
(attention_cost.png) may end in .png, .svg or .pdf. Exit status: 0 done, 1 the text cannot be read or holds no sweep, or
the picture cannot be written, 2 the command line is wrong.

Needs numpy and matplotlib (Debian: python3-matplotlib).
"""
import argparse
import re
import sys

try:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker
except ImportError as missing:
    sys.exit(f"plot_attention_cost.py: {missing}; on Debian: apt-get install python3-matplotlib")

# As bench_attention has it: queries of a block, heads, the span and the reach (span + ramp + 1) of the short ones.
BLOCK, N_HEAD, SHORT, SHORT_REACH = 512, 8, 32, 32 + 33
FIT_FROM = 512  # tokens: below, the kernels' fixed costs rule
INK, MUTED, GRID = "#1f2933", "#5b6770", "#e1e5e9"
MEASURED, WHOLE = "#2f6fb3", "#d1495b"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED,
    "legend.frameon": False, "legend.fontsize": 9, "figure.dpi": 110, "savefig.dpi": 110, "svg.hashsalt": "viaduct",
}


class SweepError(Exception):
    """What is wrong with the text, in one line."""


def read_sweep(path):
    """Streams, and an array [point, (span, pairs in millions, forward ms, backward ms, both ms)]."""
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read()
    streams = re.search(r"^streams (\d+)\b", text, re.MULTILINE)
    rows = [line.split("\t") for line in re.findall(r"^span \d+\t.*$", text, re.MULTILINE)]
    try:
        points = np.array([[float(r[0].split()[1]), *(float(x) for x in r[1:5])] for r in rows])
    except (ValueError, IndexError):
        raise SweepError(f"{path}: a line of the sweep cannot be read") from None
    if not streams or len(points) < 4 or points.ndim != 2 or points.shape[1] != 5 or not (points > 0).all():
        raise SweepError(f"{path}: no sweep of spans; `bench_attention 16 0.3 51 sweep` prints one")
    if (points[:, 0] >= FIT_FROM).sum() < 3:
        raise SweepError(f"{path}: fewer than 3 spans from {FIT_FROM} tokens on")
    return int(streams.group(1)), points[np.argsort(points[:, 0])]


def all_heads_long(streams, points):
    """(fixed ms, ms for a million pairs, ms of the layer with all heads at each span)."""
    queries = streams * BLOCK / 1e6
    long_head = points[:, 1] - queries * (N_HEAD - 1) * SHORT_REACH
    fit = points[:, 0] >= FIT_FROM
    slope, fixed = np.polyfit(points[fit, 1], points[fit, 4], 1)
    return fixed, slope, np.maximum(points[:, 4], fixed + slope * N_HEAD * long_head)


def draw(streams, points, gpu):
    span = points[:, 0]
    whole = all_heads_long(streams, points)[2]
    figure, axes = plt.subplots(figsize=(7.2, 4.3), layout="constrained")
    axes.plot(span, whole, color=WHOLE, linestyle=(0, (5, 3)), linewidth=1.5,
              label=f"{N_HEAD} heads × the longest span (computed)")
    axes.plot(span, points[:, 4], color=MEASURED, marker="o", markersize=4.5, linewidth=1.6,
              label="each head its own span (measured)")
    for i in (int(np.argmin(np.abs(span - 1024))), len(span) - 1):
        axes.annotate(f"{points[i, 4]:.2f} ms", (span[i], points[i, 4]), (6, -10), textcoords="offset points",
                      ha="left", color=MEASURED, fontsize=8.5)
        axes.annotate(f"{whole[i]:.2f} ms", (span[i], whole[i]), (-5, 6), textcoords="offset points", ha="right",
                      color=WHOLE, fontsize=8.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(points[:, 4].min() / 1.6, whole.max() * 1.5)
    axes.xaxis.set_major_locator(ticker.FixedLocator(span))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel(f"span of one head, tokens (the other {N_HEAD - 1}: {SHORT})")
    axes.set_ylabel("forward and backward of one layer, ms")
    axes.set_title(f"Attention costs what each head's span costs: {streams} streams of {BLOCK}, bf16"
                   + (f", {gpu}" if gpu else ""), loc="left", fontsize=10.5)
    axes.legend(loc="upper left")
    return figure


def main():
    parser = argparse.ArgumentParser(description="The time of attention over one head's span, out of what "
                                                 "bench_attention's sweep prints.")
    parser.add_argument("text", metavar="SWEEP", help="what `bench_attention 16 0.3 51 sweep` printed")
    parser.add_argument("-o", metavar="PICTURE", dest="output", default="attention_cost.png")
    parser.add_argument("--gpu", metavar="NAME", default="", help="what it was measured on, for the title")
    arguments = parser.parse_args()
    try:
        streams, points = read_sweep(arguments.text)
        plt.rcParams.update(STYLE)
        # No date and no version in the file: the same text gives the same bytes.
        metadata = {"Software": None} if arguments.output.endswith(".png") else {"Date": None}
        draw(streams, points, arguments.gpu).savefig(arguments.output, metadata=metadata)
    except SweepError as failure:
        sys.exit(f"plot_attention_cost.py: {failure}")
    except (OSError, ValueError) as failure:
        sys.exit(f"plot_attention_cost.py: {failure}")
    fixed, slope, whole = all_heads_long(streams, points)
    print(f"{arguments.output}: {fixed:.3f} ms + {1e3 * slope:.2f} us for a million pairs; at {points[-1, 0]:.0f} tokens "
          f"{points[-1, 4]:.3f} ms measured, {whole[-1]:.2f} with all heads as long")


if __name__ == "__main__":
    main()
