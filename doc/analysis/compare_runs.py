#!/usr/bin/python3
"""Runs of Viaduct's side by side, by updates and by seconds:

    compare_runs.py [NAME=]RUN_DIRECTORY... [-o PICTURE]

reads log.jsonl and deck.nml of each RUN_DIRECTORY and prints two tables of bits per symbol in training and validation:
after the same number of updates, and after the same time. The time is that of training: tokens over tokens a second;
validations and checkpoints do not count. With -o a picture of both is written (the format follows its extension, PNG by default). Between
two lines of a log values are interpolated; the tables end where the shortest run ends. Exit status: 0 done, 1 a
log cannot be read or the picture cannot be written, 2 the command line is wrong.

The tables need Python alone; the picture needs matplotlib (Debian: python3-matplotlib). The log: doc/FILES.md.
"""
import argparse
import os
import sys

from viaduct_files import FileError, log, named_runs, read_text, setting

ROWS = 8
INK, MUTED, GRID = "#1f2933", "#5b6770", "#e1e5e9"
COLOURS = ["#2f6fb3", "#d1495b", "#2a9d6f", "#e08e1b", "#7d5ba6", "#8c6248"]
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.frameon": False,
    "legend.fontsize": 9, "figure.dpi": 150, "savefig.dpi": 150, "lines.solid_capstyle": "round",
}


def tokens_per_update(directory):
    """Those of a whole block of all streams, by the deck that the run wrote."""
    path = os.path.join(directory, "deck.nml")
    deck, tokens = read_text(path), 1
    for name in ("batch_streams", "tokens_per_sample"):
        value = setting(deck, "data", name)
        if not isinstance(value, int):
            raise FileError(f"{path}: no {name}")
        tokens *= value
    return tokens


def read_log(directory):
    """Of a run {"train": [(update, seconds, bpc)..], "valid": the same, "wall": seconds in all}."""
    tokens = tokens_per_update(directory)
    run, seconds, last = {"train": [], "valid": [], "wall": 0.0}, 0.0, 0
    for row in log(directory):
        update = row["num_updates"]
        if "valid_bpc" in row:
            run["valid"].append((update, seconds, row["valid_bpc"]))
        elif "bpc" in row and row.get("wps", 0) > 0:
            seconds, last = seconds + (update - last) * tokens / row["wps"], update
            run["train"].append((update, seconds, row["bpc"]))
        run["wall"] = row.get("wall", run["wall"])
    if not run["train"]:
        raise FileError(f"{os.path.join(directory, 'log.jsonl')}: no rows of training")
    return run


def at(rows, column, x):
    """bpc where the column (0: updates, 1: seconds) is x; None where the rows do not reach."""
    for before, after in zip(rows, rows[1:]):
        if before[column] <= x <= after[column]:
            step = after[column] - before[column]
            return before[2] + (after[2] - before[2]) * ((x - before[column]) / step if step > 0 else 0)
    return rows[0][2] if len(rows) == 1 and rows[0][column] == x else None


def round_step(x):
    """A step of 1, 2 or 5 times a power of ten, at least x."""
    size = 10.0 ** len(str(int(x))) if x >= 1 else 1.0
    return next(s for s in (size / 10, size / 5, size / 2, size) if s >= x)


def table(runs, column, what):
    end = min(run["train"][-1][column] for run in runs.values())
    step = round_step(max(1.0, end / ROWS))
    width = max(16, *(len(name) for name in runs))
    lines = [f"{what:>9}" + "".join(f"  {name:>{width}}" for name in runs),
             f"{'':>9}" + "".join(f"  {'training  valid':>{width}}" for _ in runs)]
    places = [step * i for i in range(1, int(end / step) + 1)]
    for x in places if places and places[-1] == end else places + [end]:
        cells = []
        for run in runs.values():
            both = [at(run[part], column, x) for part in ("train", "valid")]
            cells.append("  ".join("     -" if value is None else f"{value:6.3f}" for value in both))
        lines.append(f"{x:9,.{0 if end >= 10 else 1}f}" + "".join(f"  {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def draw(runs, path):
    try:
        import matplotlib
    except ImportError as missing:
        raise FileError(f"{missing}; on Debian: apt-get install python3-matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from pictures import end_ticks
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axes, column, label in ((panels[0], 0, "updates"), (panels[1], 1, "seconds of training")):
        for (name, run), colour in zip(runs.items(), COLOURS * len(runs)):
            x, y = [r[column] for r in run["train"]], [r[2] for r in run["train"]]
            axes.plot(x, y, color=colour, linewidth=1.6, label=f"{name}, training".replace("$", r"\$"))
            if run["valid"]:
                axes.plot([r[column] for r in run["valid"]], [r[2] for r in run["valid"]], color=colour, linewidth=0,
                          marker="o", markersize=4, clip_on=False, label=f"{name}, validation".replace("$", r"\$"))
        last = max(run["train"][-1][column] for run in runs.values())
        axes.set_xlim(0, last)
        axes.set_xlabel(label)
        end_ticks(axes, last, 3.4)
    panels[0].set_ylabel("bpc (bits per symbol)")
    panels[0].legend()
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Bits per symbol of runs of Viaduct's by updates and by seconds, out of "
                                                 "their log.jsonl.")
    parser.add_argument("runs", metavar="[NAME=]RUN_DIRECTORY", nargs="+", help="a run, and what to call it")
    parser.add_argument("-o", metavar="PICTURE", dest="output", help="where a picture goes")
    arguments = parser.parse_args()
    try:
        runs = {name: read_log(directory) for name, directory in named_runs(arguments.runs, parser).items()}
        for column, what in ((0, "updates"), (1, "seconds")):
            print(table(runs, column, what))
        for name, run in runs.items():
            update, seconds, _ = run["train"][-1]
            print(f"{name}: {update:,} updates in {seconds:,.1f} s of training, {run['wall']:,.1f} s with all the rest")
        if arguments.output:
            draw(runs, arguments.output)
            print(arguments.output)
    except FileError as failure:
        sys.exit(f"compare_runs.py: {failure}")
    except (OSError, ValueError) as failure:
        sys.exit(f"compare_runs.py: {arguments.output}: {getattr(failure, 'strerror', None) or failure}")


if __name__ == "__main__":
    main()
