#!/usr/bin/python3
"""Pictures of how a model attends:

    plot_attention.py ATTENTION_FILE [-o DIRECTORY] [--position K]... [--tokens N]

reads what `viaduct eval` wrote to eval%attention_file and writes
    attention_distance.png    each head's mean attention weight by distance, a panel for each layer
    attention_position_K.png  for position K of the file, the text before the predicted token and the weight that every
                              layer gives to each of its last N tokens
beside the file, or where -o says. Without --position: the position in the middle; N is 64 by default. Prints a line for
each picture. Exit status: 0 done, 1 the file cannot be read or a picture cannot be written, 2 the command line is wrong.

Needs h5py, numpy and matplotlib (Debian: python3-h5py python3-matplotlib). The layout of the file: doc/FILES.md.
"""
import argparse
import os
import sys

try:
    import numpy as np
    from matplotlib import colors, ticker

    import plot_run  # chooses a matplotlib without a display
    from matplotlib import pyplot as plt
    from plot_run import DPI, INK, MUTED, STYLE, WIDTH, grid_columns, head_colors, headline, tokens
    from viaduct_files import FileError, one_line, open_attention, setting
except ImportError as missing:
    sys.exit(f"plot_attention.py: {missing}; on Debian: apt-get install python3-h5py python3-matplotlib")

LEAST = 1e-6      # weights below it are not drawn
PER_OCTAVE = 6    # bins of distances that are averaged where they lie closer than that
MOST_ROWS = 32    # of a position's heat map; more heads than that are averaged over each layer
ZERO = 0.5        # where distance 0 lies on the logarithmic axis


def described(attention):
    """What headline() of plot_run wants to know of a model."""
    deck = attention["deck"]
    return {"title": attention["attributes"].get("title") or setting(deck, "run", "title") or "attention", "deck": deck,
            "span": attention["span"][None]}


def bins_of(n):
    """First distances of the bins, and the end of the last: single ones up to PER_OCTAVE, then about as many an octave."""
    edges = np.unique(np.round(2 ** np.arange(0, np.log2(max(n, 2)) + 1, 1 / PER_OCTAVE)).astype(int))
    return np.concatenate([[0], edges[edges < n], [n]]) if n > 1 else np.array([0, 1])


def binned(weight):
    """(distances, mean weight [..., bin]): each bin's mean, at the geometric middle of its distances."""
    edges = bins_of(weight.shape[-1])
    mean = np.add.reduceat(weight, edges[:-1], axis=-1) / np.diff(edges)
    first, last = edges[:-1], edges[1:] - 1
    return np.where(first == 0, ZERO, np.sqrt(first * last)), mean


def distance_axis(axes, last, has_zero):
    axes.set_xscale("log")
    axes.set_xlim(0.9 * (ZERO if has_zero else 1), max(last, 2) * 1.1)
    ticks = [10.0**k for k in range(int(np.log10(max(last, 2))) + 1)]
    axes.xaxis.set_major_locator(ticker.FixedLocator([ZERO] * has_zero + ticks))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: "0" if x == ZERO else f"{x:,.0f}")


def plot_distances(attention):
    weight = attention["distance_weight"]
    n_layer, n_head, n = weight.shape
    x, mean = binned(weight)
    columns = grid_columns(n_layer)
    lines = -(-n_layer // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(WIDTH, 1.35 + (1.75 if lines > 1 else 2.6) * lines), sharex=True,
                                sharey=True, squeeze=False)
    palette, far = head_colors(n_head), np.arange(n)
    for layer, axes in enumerate(grid.flat):
        if layer >= n_layer:
            axes.set_axis_off()
            continue
        handles = [axes.plot(x, np.where(mean[layer, head] >= LEAST, mean[layer, head], np.nan), color=palette[head],
                             linewidth=1.2, label=f"head {head}")[0] for head in range(n_head)]
        distance = (weight[layer] * far).sum(-1) / weight[layer].sum(-1)
        axes.set_title(f"layer {layer}", loc="left", fontsize=9.5, fontweight="bold", pad=4)
        axes.set_title(f"mean distance {tokens(distance.mean())}" if columns <= 4 else "", loc="right", fontsize=7.8,
                       color=MUTED, pad=4)
        lowest = layer // columns == lines - 1
        axes.tick_params(labelbottom=lowest or n_layer % columns != 0)
        if lowest:
            axes.set_xlabel("distance (tokens)")
    distance_axis(grid[0, 0], n - 1, bool(weight[..., 0].any()))
    grid[0, 0].set_yscale("log")
    grid[0, 0].set_ylim(10 ** np.floor(np.log10(mean[mean >= LEAST].min(initial=0.1))), 1.3)
    grid[0, 0].yaxis.set_minor_locator(ticker.NullLocator())
    figure.supylabel("mean weight at a distance", fontsize=9.5)
    if n_head > 16:  # a colour for each head; the first and the last tell the order
        handles = [handles[0], handles[-1]]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 10), fontsize=8, handlelength=1.4,
                  columnspacing=1.2, borderaxespad=0.3)
    headline(figure, described(attention), f"attention by distance, {attention['attributes']['split']} split",
             foot=0.05 + 0.19 * -(-len(handles) // 10))
    return figure


def shown(symbol):
    """A symbol as a label: what would not be seen is written as a sign."""
    named = {b" ": "␣", b"\n": "↵", b"\t": "⇥"}.get(symbol)
    if named:
        return named
    word = symbol.decode("utf-8", "replace")
    return word.replace("$", r"\$") if word.isprintable() else f"{symbol.hex()}"


def plot_position(attention, k, n):
    """The strip of text, oldest token left, over one row for each head, or for the mean of a layer's heads."""
    weight = attention["position_weight"][k]
    n_layer, n_head, n_distance = weight.shape
    n = min(n, n_distance)
    rows, names = weight.reshape(-1, n_distance), [f"{layer}.{head}" for layer in range(n_layer) for head in range(n_head)]
    what = "layer.head"
    if len(rows) > MOST_ROWS:
        rows, names, what = weight.mean(1), [str(layer) for layer in range(n_layer)], "layer, mean of heads"
    context, symbols = attention["context"][k, :n][::-1], attention["symbols"]
    labels = ["·" if token < 0 else shown(symbols[token]) for token in context]
    height = 1.75 + 0.17 * len(rows)
    figure, axes = plt.subplots(figsize=(max(WIDTH, 1.2 + 0.135 * n), height))
    image = axes.imshow(rows[:, :n][:, ::-1], aspect="auto", cmap="Greys", norm=colors.PowerNorm(0.5, vmin=0, vmax=rows.max()))
    axes.grid(False)
    axes.set_yticks(range(len(rows)), names, fontsize=min(8, 120 / len(rows) + 3))
    axes.set_ylabel(what)
    axes.set_xticks(range(n), labels, family="monospace", fontsize=8 if max(map(len, labels)) < 3 else 6,
                    rotation=0 if max(map(len, labels)) < 3 else 90)
    axes.tick_params(axis="x", length=0)
    beyond = 1 - rows[:, :n].sum(1) / rows.sum(1)
    axes.set_xlabel(f"the {n} tokens before the predicted one, which is {shown(symbols[attention['token'][k]])!r}, at "
                    f"{attention['nll'][k] / np.log(2):.2f} bits; {100 * beyond.mean():.0f} % of the attention lies before them",
                    fontsize=8.5, color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, use_gridspec=False)
    bar.set_label("weight", fontsize=8.5)
    bar.outline.set_visible(False)
    headline(figure, described(attention), f"attention at token {attention['position'][k]:,} of the "
             f"{attention['attributes']['split']} split")
    return figure


def pictures(attention, positions, n):
    """(name, function that makes the figure) of each picture."""
    yield "attention_distance.png", lambda: plot_distances(attention)
    for k in positions:
        yield f"attention_position_{k}.png", lambda k=k: plot_position(attention, k, n)


def arguments_of(words):
    parser = argparse.ArgumentParser(prog="plot_attention.py", description="Pictures of how a model of Viaduct's attends.")
    parser.add_argument("file", metavar="ATTENTION_FILE", help="what eval%%attention_file named")
    parser.add_argument("-o", metavar="DIRECTORY", dest="output", help="where the pictures go; default: beside the file")
    parser.add_argument("--position", metavar="K", type=int, action="append", help="which position, from 0 on")
    parser.add_argument("--tokens", metavar="N", type=int, default=64, help="tokens of the text that are shown")
    found = parser.parse_args(words)
    if found.tokens < 1:
        parser.error("--tokens is at least 1")
    return found, parser


def main(words):
    arguments, parser = arguments_of(words)
    folder = arguments.output or os.path.dirname(os.path.abspath(arguments.file))
    try:
        attention = open_attention(arguments.file)
    except FileError as failure:
        print(f"plot_attention.py: {failure}", file=sys.stderr)
        return 1
    there = 0 if attention["position"] is None else len(attention["position"])
    positions = arguments.position if arguments.position is not None else [there // 2] if there else []
    if any(not 0 <= k < there for k in positions):
        parser.error(f"--position: the file has {there} positions" + (f", 0 to {there - 1}" if there else ""))
    plt.rcParams.update(STYLE)
    try:
        os.makedirs(folder, exist_ok=True)
        for name, draw in pictures(attention, positions, arguments.tokens):
            figure = draw()
            path = os.path.join(folder, name)
            figure.savefig(path, dpi=DPI)
            plt.close(figure)
            print(path)
    except OSError as failure:
        print(f"plot_attention.py: {one_line(failure)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
