#!/usr/bin/python3
"""Pictures of a run of Viaduct, finished or still in progress:

    plot_run.py RUN_DIRECTORY [-o DIRECTORY]

reads RUN_DIRECTORY/trace.h5 and writes
    bpc.png          bits per symbol over updates, training and validation
    spans.png        the attention span of every head over updates, a panel for each layer
    final_spans.png  the span of every layer and head at the last row of the trace
    training.png     learning rate, gradient norm and speed over updates
into RUN_DIRECTORY, or where -o says. Prints a line for each picture. Exit status: 0 done, 1 the trace cannot be read or
a picture cannot be written, 2 the command line is wrong.

Needs h5py, numpy and matplotlib (Debian: python3-h5py python3-matplotlib). The layout of a trace: doc/FILES.md.
"""
import argparse
import os
import sys
import warnings

try:
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import colors, ticker

    import h5py  # noqa: F401 (viaduct_files reads with it)
    from pictures import end_ticks
    from viaduct_files import FileError, one_line, open_trace, setting
except ImportError as missing:
    sys.exit(f"plot_run.py: {missing}; on Debian: apt-get install python3-h5py python3-matplotlib")

DPI = 150
WIDTH = 8  # inches: 1200 pixels
INK, MUTED, GRID = "#1f2933", "#5b6770", "#e1e5e9"
TRAIN, VALID = "#2f6fb3", "#d1495b"
HEADS = ["#2f6fb3", "#e08e1b", "#2a9d6f", "#d1495b", "#7d5ba6", "#8c6248", "#d774b0", "#5aa9c9"]
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.frameon": False,
    "legend.fontsize": 9, "figure.dpi": DPI, "savefig.dpi": DPI, "lines.solid_capstyle": "round",
}


def read_trace(directory):
    """The trace of a run, which has a row at least."""
    trace = open_trace(directory)
    if len(trace["update"]) == 0:
        raise FileError(f"{trace['path']}: no rows yet; the first comes after trace%interval updates")
    return trace


def number(deck, group, name):
    """A number of a resolved deck; None where it is not there."""
    value = setting(deck, group, name)
    return float(value) if isinstance(value, (int, float)) else None


# ---- common to all pictures ----

def plain(label):
    """Text that matplotlib must not take for mathematics."""
    return label.replace("$", r"\$")


def thousands(value, _=None):
    return f"{value:,.0f}"


def tokens(value):
    """A span as people write it: three digits below ten tokens are noise."""
    if not np.isfinite(value):
        return "nan"
    return f"{value:.1f}" if 0.05 <= value < 9.95 else f"{value:,.0f}"


def describe(trace):
    """The line below the title: what was trained."""
    deck, (_, n_layer, n_head) = trace["deck"], trace["span"].shape
    parts = [f"{n_layer} layer{'s' * (n_layer != 1)} × {n_head} head{'s' * (n_head != 1)}"]
    for group, name, words in (("model", "d_model", "d_model {}"), ("span", "attn_span", "attn_span {} tokens"),
                               ("span", "softmax", "{} softmax"), ("data", "batch_streams", "{} streams")):
        value = setting(deck, group, name)
        if value:
            parts.append(words.format(value))
    return " · ".join(parts)


def fit(figure, label, most):
    """Makes a text at most `most` of the figure wide: smaller down to three quarters, then shorter."""
    renderer, words, size = figure.canvas.get_renderer(), label.get_text(), label.get_fontsize()
    wide = lambda: label.get_window_extent(renderer).width / figure.bbox.width
    if wide() > most:
        label.set_fontsize(max(0.75 * size, 0.98 * size * most / wide()))
    while wide() > most and len(words) > 8:
        words = words[:min(len(words) - 1, int(len(words) * most / wide()))].rstrip("\\ ")
        label.set_text(words + "…")


def headline(figure, trace, what, foot=0):
    """The run's title, and below it what the picture shows of which model, at a fixed distance from the edge whatever the
    height; `foot` inches stay free below."""
    inches = figure.get_figheight()
    left = 0.012
    for down, words, how in ((0.10, trace["title"], {"fontsize": 12.5, "fontweight": "bold"}),
                             (0.37, f"{what} · {describe(trace)}", {"fontsize": 9, "color": MUTED})):
        fit(figure, figure.text(left, 1 - down / inches, plain(words), ha="left", va="top", **how), 0.976)
    figure.set_layout_engine("constrained", rect=(0, foot / inches, 1, 1 - (0.62 + foot) / inches), w_pad=0.06, h_pad=0.06)


def update_axis(axes, trace, columns=1, label=True):
    """From 0 to the last update of the trace, for one of `columns` panels of a picture."""
    last = max(int(trace["update"][-1]), 1)
    axes.set_xlim(0, last)
    end_ticks(axes, last, WIDTH / columns - 0.5)
    if label:
        axes.set_xlabel("updates")


def line(axes, x, y, **how):
    """A line, or a dot where there is one value only."""
    if np.count_nonzero(np.isfinite(y)) == 1:
        how.update(marker="o", markersize=5)
    return axes.plot(x, y, **how)


def smoothed(update, value, rows):
    """Centred mean over about `rows` rows, each weighted with the updates that it stands for; narrower at both ends,
    so that it does not lag where the curve is steep."""
    weight = np.diff(update, prepend=0).astype(float)
    good = np.isfinite(value) & (weight > 0)
    sums = np.concatenate([[0], np.cumsum(np.where(good, weight * np.where(good, value, 0), 0))])
    weights = np.concatenate([[0], np.cumsum(np.where(good, weight, 0))])
    at = np.arange(len(value))
    half = np.minimum(rows // 2, np.minimum(at, len(value) - 1 - at))
    low, high = at - half, at + half + 1
    total = weights[high] - weights[low]
    return np.where(total > 0, (sums[high] - sums[low]) / np.where(total > 0, total, 1), np.nan)


# ---- the pictures ----

def bpc_axis(axes, values):
    """Logarithmic where the values span more than a factor of two: all of the fall is seen, and so is its end."""
    values = values[np.isfinite(values) & (values > 0)]
    axes.set_ylabel("bpc (bits per symbol)")
    if len(values) == 0 or values.max() < 2 * values.min():
        return
    low, high = values.min() / 1.06, values.max() * 1.06
    ticks = [t for t in (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16)
             if low <= t <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if len(ticks) >= 2:
        axes.yaxis.set_major_locator(ticker.FixedLocator(ticks))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def plot_bpc(trace):
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
    update, train, valid = trace["update"], trace["train_bpc"], trace["valid"]
    rows = max(1, len(update) // 40) | 1
    step = np.median(np.diff(update, prepend=0))
    if rows > 1:
        line(axes, update, train, color=TRAIN, alpha=0.35, linewidth=0.8, label="training")
        line(axes, update, smoothed(update, train, rows), color=TRAIN, linewidth=2,
             label=f"training, mean of {rows * step:,.0f} updates")
    else:
        line(axes, update, train, color=TRAIN, linewidth=2, label="training")
    shown = [train]
    what = "bits per symbol"
    if valid is not None and np.isfinite(valid["bpc"]).any():
        best = np.nanargmin(valid["bpc"])
        axes.plot(valid["update"], valid["bpc"], color=VALID, linewidth=1.6, marker="o", markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.7, label="validation", zorder=3, clip_on=False)
        axes.plot(valid["update"][best], valid["bpc"][best], marker="o", markersize=9, color=VALID, fillstyle="none",
                  linestyle="none", clip_on=False, label=f"best: {valid['bpc'][best]:.3f} at update {valid['update'][best]:,}")
        shown.append(valid["bpc"])
    bpc_axis(axes, np.concatenate(shown))
    update_axis(axes, trace)
    axes.legend(loc="upper right")
    headline(figure, trace, what)
    return figure


def head_colors(n_head):
    if n_head <= len(HEADS):
        return HEADS[:n_head]
    return [colors.to_hex(c) for c in plt.get_cmap("viridis")(np.linspace(0, 0.92, n_head))]


def span_scale(axes, trace, axis="y"):
    """Linear below one token, logarithmic above, up to attn_span where the deck tells it."""
    span, limit = trace["span"], trace["attn_span"]
    top = max(np.nanmax(span, initial=1, where=np.isfinite(span)), limit or 10)
    set_scale, set_limit = (axes.set_yscale, axes.set_ylim) if axis == "y" else (axes.set_xscale, axes.set_xlim)
    set_scale("symlog", linthresh=1, linscale=0.5)
    set_limit(0, top * 1.35)
    ticks = [0] + [10.0**k for k in range(int(np.log10(top)) + 1)]
    if axis == "x" and len(ticks) > 3:  # the panel is narrow
        ticks = [0, 10.0**(len(ticks) // 2 - 1), ticks[-1]]
    ruler = axes.yaxis if axis == "y" else axes.xaxis
    ruler.set_major_locator(ticker.FixedLocator(ticks))
    ruler.set_minor_locator(ticker.NullLocator())
    ruler.set_major_formatter(thousands)


def span_panel(axes, trace, layer, keep, palette, columns):
    span, update = trace["span"][:, layer, :], trace["update"]
    handles = [line(axes, update[keep], span[keep, head], color=palette[head], linewidth=1.1, alpha=0.9,
                    label=f"head {head}")[0] for head in range(span.shape[1])]
    handles += line(axes, update[keep], span[keep].mean(axis=1), color=INK, linewidth=2, label="mean")
    if trace["attn_span"]:
        handles.append(axes.axhline(trace["attn_span"], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)),
                                    label="attn_span"))
    axes.set_title(f"layer {layer}", loc="left", fontsize=9.5, fontweight="bold", pad=4)
    mean, longest = f"mean {tokens(span[-1].mean())}", f"longest {tokens(span[-1].max())}"
    axes.set_title(f"{mean}, {longest}" if columns <= 3 else longest if columns == 4 else "", loc="right", fontsize=7.8,
                   color=MUTED, pad=4)
    return handles


def grid_columns(n):
    """Columns of a grid of n panels, without empty places where there is such a grid."""
    if n <= 3:
        return n
    choices = (2,) if n == 4 else (3, 4, 5) if n <= 12 else (4, 6, 5) if n <= 24 else (6, 5)
    return next((c for c in choices if n % c == 0), choices[0])


def plot_spans(trace):
    n_rows, n_layer, n_head = trace["span"].shape
    columns = grid_columns(n_layer)
    lines = -(-n_layer // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(WIDTH, 1.35 + (1.75 if lines > 1 else 2.6) * lines),
                                sharex=True, sharey=True, squeeze=False)
    # More points than pixels only cost time.
    keep = np.unique(np.linspace(0, n_rows - 1, min(n_rows, 2000)).astype(int))
    palette = head_colors(n_head)
    for layer, axes in enumerate(grid.flat):
        if layer >= n_layer:
            axes.set_axis_off()
            continue
        handles = span_panel(axes, trace, layer, keep, palette, columns)
        update_axis(axes, trace, columns, label=False)
        # Where the lowest line is not full, all lines have numbers, so that all are as high and as far from each other.
        lowest = layer // columns == lines - 1
        axes.tick_params(labelbottom=lowest or n_layer % columns != 0)
        if lowest:
            axes.set_xlabel("updates")
    span_scale(grid[0, 0], trace)
    figure.supylabel("span (tokens)", fontsize=9.5)
    if n_head > 16:  # A colour for each head; the first and the last tell the order.
        handles = [handles[0], handles[n_head - 1]] + handles[n_head:]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 10), fontsize=8, handlelength=1.4,
                  columnspacing=1.2, borderaxespad=0.3)
    last = trace["span"][-1]
    headline(figure, trace, f"attention spans, mean {tokens(last.mean())} and longest {tokens(last.max())} tokens",
             foot=0.05 + 0.19 * -(-len(handles) // 10))
    return figure


def heat_map(figure, axes, trace, span):
    """The spans as a table whose colours follow their logarithm."""
    n_layer, n_head = span.shape
    # Up to the longest span that there is, not to attn_span, which short spans are all far from.
    top = max(10.0, np.nanmax(span, initial=2, where=np.isfinite(span)))
    scale = colors.LogNorm(vmin=1, vmax=top)
    shades = colors.ListedColormap(plt.get_cmap("YlGnBu")(np.linspace(0.08, 1, 256)))
    image = axes.imshow(np.clip(span, 1, top), norm=scale, cmap=shades, aspect="auto", origin="lower")
    size = min(9.5, 68 / n_head, 260 / n_layer)
    for layer in range(n_layer if size >= 4 else 0):
        for head in range(n_head):
            value = span[layer, head]
            dark = np.isfinite(value) and scale(max(value, 1)) > 0.55
            axes.text(head, layer, tokens(value), ha="center", va="center", fontsize=size,
                      color="white" if dark else INK)
    axes.grid(False)
    axes.set_xticks(np.arange(n_head + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_layer + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for ruler, n in ((axes.xaxis, n_head), (axes.yaxis, n_layer)):
        ruler.set_major_locator(ticker.FixedLocator(range(0, n, 1 if n <= 16 else -(-n // 12))))
    axes.set_xlabel("head")
    axes.set_ylabel("layer (0 at the input)")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=30, label="span (tokens)",
                          use_gridspec=False)
    bar.ax.yaxis.set_major_formatter(thousands)
    bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
    bar.outline.set_visible(False)


def plot_final_spans(trace):
    span = trace["span"][-1]
    n_layer, n_head = span.shape
    figure, (table, bars) = plt.subplots(1, 2, figsize=(WIDTH, min(9, max(3.0, 1.6 + 0.33 * n_layer))), sharey=True,
                                         gridspec_kw={"width_ratios": [3.2, 1]})
    heat_map(figure, table, trace, span)
    layers = np.arange(n_layer)
    bars.barh(layers, span.mean(axis=1), height=0.62, color="#9fb8d1", label="mean")
    bars.plot(span.max(axis=1), layers, linestyle="none", marker="D", markersize=5, color=TRAIN, label="longest",
              clip_on=False)
    span_scale(bars, trace, axis="x")
    bars.tick_params(axis="y", which="both", length=0, labelleft=False)
    bars.spines["left"].set_visible(False)
    bars.grid(axis="y", visible=False)
    bars.set_xlabel("span (tokens)")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8.5, handlelength=1.2, columnspacing=1)
    headline(figure, trace, f"spans after {trace['update'][-1]:,} updates, mean {tokens(span.mean())}, "
                            f"longest {tokens(span.max())} tokens")
    return figure


def plot_training(trace):
    figure, grid = plt.subplots(1, 3, figsize=(WIDTH, 2.9))
    panels = (("learning_rate", "learning rate", "#7d5ba6"), ("grad_norm", "gradient norm, before clipping", "#e08e1b"),
              ("tokens_per_second", "tokens per second, all ranks", "#2a9d6f"))
    update = trace["update"]
    for axes, (name, title, color) in zip(grid, panels):
        value = trace[name]
        line(axes, update, value, color=color, linewidth=1.6 if name == "learning_rate" else 1.0)
        axes.set_title(title, loc="left", fontsize=9)
        update_axis(axes, trace, len(panels))
        good = value[np.isfinite(value) & (value > 0)]
        if name == "grad_norm" and len(good) and good.max() > 5 * good.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if good.max() < 100 * good.min() else (1,)))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(0, good.max() * 1.08 if len(good) else 1)
        if name == "tokens_per_second":
            axes.yaxis.set_major_formatter(thousands)
    headline(figure, trace, "training")
    return figure


PICTURES = (("bpc.png", plot_bpc), ("spans.png", plot_spans), ("final_spans.png", plot_final_spans),
            ("training.png", plot_training))


def main():
    parser = argparse.ArgumentParser(description="Pictures of a run of Viaduct's: bpc.png, spans.png, "
                                                 "final_spans.png and training.png out of its trace.h5.")
    parser.add_argument("run_directory", metavar="RUN_DIRECTORY", help="the directory of the run (run%%directory)")
    parser.add_argument("-o", metavar="DIRECTORY", dest="output",
                        help="where the pictures go (created where missing); default: RUN_DIRECTORY")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run_directory
    try:
        trace = read_trace(arguments.run_directory)
        name = os.path.basename(os.path.abspath(arguments.run_directory))
        trace["title"] = (setting(trace["deck"], "run", "title") or "").strip() or name
        trace["attn_span"] = number(trace["deck"], "span", "attn_span")
        os.makedirs(output, exist_ok=True)
        plt.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from current font")
        for name, plot in PICTURES:
            if trace["span"][-1].size == 0 and "span" in name:
                continue  # A model without heads has no spans to show.
            figure = plot(trace)
            path = os.path.join(output, name)
            figure.savefig(path)
            plt.close(figure)
            print(path)
    except FileError as failure:
        sys.exit(f"plot_run.py: {failure}")
    except OSError as failure:
        sys.exit(f"plot_run.py: {failure.filename or output}: {failure.strerror or one_line(failure)}")


if __name__ == "__main__":
    main()
