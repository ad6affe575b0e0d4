"""What `viaduct eval` wrote to eval%attention_file: each head's mean weight by distance, and its weights before some tokens."""
import base64
import glob
import math
import os

import h5py
import numpy as np

from viaduct_files import open_attention

from . import chart, heat, palette, svg
from .markup import el

PER_OCTAVE = 6              # bins of distances, where single ones lie closer
MEAN_FROM, TEXT_FROM = 1e-6, 1e-3  # where the scales of weights begin; they end at 1
MOST_TOKENS, MOST_LEVELS = 256, 400000  # of the text before a token; levels of all positions, layers and heads together


def is_attention(path):
    try:
        with h5py.File(path, "r") as file:
            return isinstance(file.get("distance_weight"), h5py.Dataset)
    except OSError:
        return False


def in_folder(run):
    return [path for path in sorted(glob.glob(os.path.join(glob.escape(run["folder"]), "*.h5"))) if is_attention(path)]


def load(path):
    """What open_attention() returns, with "symbols" as they can be seen, and "source"."""
    found = open_attention(path)
    found["symbols"], found["source"] = [shown(symbol) for symbol in found["symbols"]], os.path.basename(path)
    return found


def shown(symbol):
    """A symbol as it can be seen."""
    named = {b"\n": "↵\n", b"\t": "⇥", b"\r": "␍"}.get(symbol)
    if named:
        return named
    try:
        word = symbol.decode()
    except UnicodeDecodeError:
        word = ""
    return word if word.isprintable() and word else "".join(f"\\x{byte:02x}" for byte in symbol)


# ---- numbers ----

def bins_of(n):
    """First distances of the bins, and the end of the last."""
    edges = np.round(2 ** (np.arange(0, PER_OCTAVE * math.log2(n + 1)) / PER_OCTAVE)).astype(int) - 1
    return np.unique(np.append(edges[edges < n], n))


def along(distance, n):
    """Where a distance begins on the axis, which is logarithmic in one more than it: 0 to 1."""
    return np.log(distance + 1) / math.log(n + 1)


def levels(weight, least):
    """Steps of a scale that is logarithmic from `least` to 1; below it 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        step = 1 + np.floor((palette.LEVELS - 1) * (1 - np.log(weight) / math.log(least)))
    return np.where(weight >= least, np.minimum(step, palette.LEVELS - 1), 0).astype(np.uint8)


def mean_distances(weight):
    total = weight.sum(-1)
    return (weight * np.arange(weight.shape[-1])).sum(-1) / np.where(total > 0, total, np.nan)


def script_data(found):
    """What page.js reads of a file: steps of the scale, as bytes in base64."""
    weight = found["distance_weight"]
    layers, heads, n = weight.shape
    edges = bins_of(n)
    mean = np.add.reduceat(weight, edges[:-1], axis=-1) / np.diff(edges)
    result = {"layers": layers, "heads": heads, "edges": [round(1000 * float(along(e, n)), 2) for e in edges],
              "map": packed(levels(mean, MEAN_FROM))}
    if has_positions(found):
        count, n = size_of(found)
        some = found["position_weight"][:count, :, :, :n]
        both = np.concatenate([some.mean(axis=2, keepdims=True), some], axis=2)[..., ::-1]
        result["tokens"], result["text"] = n, packed(levels(both, TEXT_FROM))
        result["positions"] = [position(found, k, n) for k in range(count)]
    return result


def has_positions(found):
    return found["position_weight"] is not None and len(found["position_weight"]) > 0


def size_of(found):
    """How many positions, and how many tokens before each, the page has: of large models fewer."""
    layers, heads, n = found["distance_weight"].shape
    each = layers * (heads + 1)
    count = max(1, min(len(found["position"]), MOST_LEVELS // (32 * each)))
    return count, min(n, MOST_TOKENS, max(32, MOST_LEVELS // (count * each)))


def packed(values):
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def symbol(found, token):
    return found["symbols"][token] if 0 <= token < len(found["symbols"]) else ""


def position(found, k, n):
    """The text before a predicted token, oldest first, the token, and what it cost."""
    return {"at": int(found["position"][k]), "context": [symbol(found, t) for t in found["context"][k, :n][::-1]],
            "token": symbol(found, found["token"][k]), "bits": chart.number(found["nll"][k] / math.log(2), 3)}


# ---- markup ----

def scale(title, least):
    n, decades = palette.LEVELS, round(-math.log10(least))
    labels = [((1 + (n - 1) * k / decades) / n, f"{10.0 ** (k - decades):g}".replace("e-0", "e-")) for k in range(0, decades + 1, 1 if decades < 5 else 2)]
    return heat.scale(title, labels)


def slider(name, label, last, number, first=0):
    identifier = f"attention-{name}-{number}"
    return [el("label", label, for_=identifier),
            el("input", type="range", id=identifier, min="0", max=str(last), value=str(first), step="1", disabled=last == 0)]


def heat_map(found, number):
    _, heads, n = found["distance_weight"].shape
    ticks = [(0, "0")] + [(10 ** k, f"{10 ** k:,}") for k in range(7) if 10 ** k < n]
    labels = [el("text", label, class_="tick", x=svg.percent((along(d, n) + along(d + 1, n)) / 2), y="100%", dy="1.5em",
                 text_anchor="middle") for d, label in ticks]
    return [*heat.plot(f"attention-cells-{number}", f"attention-title-{number}", labels, heads, "still "),
            el("p", "distance (tokens)", class_="x-unit")]


def distance_table(found):
    distance = mean_distances(found["distance_weight"])
    finite = distance[np.isfinite(distance)]
    return heat.matrix(distance, max(10.0, finite.max() if finite.size else 0), "Mean distance of every layer's and head's attention")


def text_strip(found, number):
    """The text before a predicted token, which page.js shades."""
    if not has_positions(found):
        return None
    heads = found["distance_weight"].shape[1]
    options = [el("option", "mean of all", value="0"), *(el("option", str(h), value=str(h + 1)) for h in range(heads))]
    count, n = size_of(found)
    # That with the longest text comes first, of several the one in the middle: where a stream begins there is hardly any.
    length = (found["context"][:count, :n] >= 0).sum(1)
    first = min(range(count), key=lambda k: (-length[k], abs(k - count // 2)))
    return el("div", el("h4", "The text before some tokens"), scale("weight", TEXT_FROM),
              el("div", *slider("position", "Position", count - 1, number, first),
                 el("div", el("label", "Head ", for_=f"attention-head-{number}"),
                    el("select", *options, id=f"attention-head-{number}")), class_="reader-of-layer"),
              el("p", "", class_="note", id=f"attention-words-{number}"), el("pre", "", class_="sample strip", tabindex="0",
                                                                            role="region", id=f"attention-text-{number}",
                                                                            aria_label="Text before the predicted token"))


def part(found, number):
    """The part of a file, which page.js fills."""
    about = found["attributes"]
    words = f"{found['source']}: split {about.get('split', '?')}, checkpoint of update {about.get('checkpoint_update', '?')}"
    layers = found["distance_weight"].shape[0]
    return el("div", el("h3", words),
              el("div", el("h4", "Mean weight by distance, one layer's heads"), scale("mean weight", MEAN_FROM),
                 el("div", *slider("layer", "Layer", layers - 1, number), el("span", "0", id=f"attention-now-{number}"),
                    class_="reader-of-layer"), *heat_map(found, number), text_strip(found, number), class_="needs-script"),
              el("h4", "Mean distance of the attention, in tokens"), distance_table(found), class_="attention")

