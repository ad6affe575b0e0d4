"""A model between two kinds of checkpoint: float32 tensors under Viaduct's names, settings of a deck, symbols."""
import re
from dataclasses import dataclass, field

import numpy as np

SPAN = "attn.attn.adaptive_span._mask.current_val"
STATES = {"adagrad": ("adagrad_sum",), "adam": ("adam_m", "adam_v")}


class ConvertError(Exception):
    """What is wrong with a file or a request, in one line."""


@dataclass
class Model:
    settings: dict  # "model%n_layer": 12, ...: texts, integers, floats, booleans
    tensors: dict  # name in /model of a checkpoint: float32 array
    states: dict = field(default_factory=dict)  # "adagrad_sum": {name of a tensor: float32 array}
    memory: dict = field(default_factory=dict)  # "layer0": [stream, position, feature]
    symbols: list = None  # bytes of each symbol, by id; None: the file does not say
    counts: list = None  # occurrences of each symbol
    update: int = 0
    numbers: dict = field(default_factory=dict)  # "position/epoch": integer, "statistics/log_nll": float, ...
    corpus_id: str = ""
    deck: str = ""  # the resolved deck, where the source holds one
    notes: list = field(default_factory=list)  # lines for the user

    def xl(self):
        return self.settings["model%arch"] == "transformer_xl"

    def symbols_needed(self):
        rows = len(self.tensors["word_emb.emb_layers.0.weight" if self.xl() else "in_emb.weight"])
        return rows


def layout(settings, symbols):
    """{name: shape} of the tensors of such a model, in the order of Viaduct's checkpoints."""
    get = settings.__getitem__
    d, heads, inner, layers = (get(f"model%{x}") for x in ("d_model", "n_head", "d_inner", "n_layer"))
    d_head = settings.get("model%d_head") or d // heads
    shapes = {}
    if get("model%arch") == "transformer_xl":
        width = heads * d_head
        shapes["word_emb.emb_layers.0.weight"] = (symbols, d)
        for n in range(layers):
            biases = f"layers.{n}." if settings.get("model%untie_r", True) else ""
            shapes[biases + "r_w"] = shapes[biases + "r_r"] = (heads, d_head)
            for name, shape in (
                    ("dec_attn.qkv_net.weight", (3 * width, d)), ("dec_attn.r_net.weight", (width, d)),
                    ("dec_attn.o_net.weight", (d, width)), ("dec_attn.layer_norm.weight", (d,)),
                    ("dec_attn.layer_norm.bias", (d,)), ("pos_ff.CoreNet.0.weight", (inner, d)),
                    ("pos_ff.CoreNet.0.bias", (inner,)), ("pos_ff.CoreNet.3.weight", (d, inner)),
                    ("pos_ff.CoreNet.3.bias", (d,)), ("pos_ff.layer_norm.weight", (d,)),
                    ("pos_ff.layer_norm.bias", (d,))):
                shapes[f"layers.{n}.{name}"] = shape
        shapes["crit.out_layers.0.bias"] = (symbols,)
        return shapes
    shapes["in_emb.weight"] = (symbols, d)
    shapes["key_pe"] = (1, d_head, get("span%attn_span"))
    for n in range(layers):
        shapes[f"layers.{n}.{SPAN}"] = (1,) if settings.get("span%per_layer") else (heads, 1, 1)
        for name in ("query", "key", "val", "out"):
            shapes[f"layers.{n}.attn.proj_{name}.weight"] = (d, d)
        for name, shape in (("norm1.weight", (d,)), ("norm1.bias", (d,)), ("ff.fc1.weight", (inner, d)),
                            ("ff.fc1.bias", (inner,)), ("ff.fc2.weight", (d, inner)), ("ff.fc2.bias", (d,)),
                            ("norm2.weight", (d,)), ("norm2.bias", (d,))):
            shapes[f"layers.{n}.{name}"] = shape
    shapes["out_emb.weight"] = (symbols, d)
    shapes["out_emb.bias"] = (symbols,)
    return shapes


def check(model, path):
    """Every tensor is there, none is left over, all shapes and values are possible; brings them into order."""
    shapes = layout(model.settings, model.symbols_needed())
    for what, tensors in [("", model.tensors)] + [(f"{s} of ", t) for s, t in model.states.items()]:
        missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
        if missing:
            raise ConvertError(f"{path}: there is no {what}{sorted(missing)[0]} (of {len(missing)} that are missing)")
        if unknown:
            raise ConvertError(f"{path}: {what}{sorted(unknown)[0]} is no tensor of this model: it has parts that "
                               "Viaduct's models do not have")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ConvertError(f"{path}: {what}{name} is {list(tensors[name].shape)}, not {list(shape)}")
            if not np.isfinite(tensors[name]).all():
                raise ConvertError(f"{path}: {what}{name} holds a value that is not finite")
        ordered = {name: np.ascontiguousarray(tensors[name], dtype="<f4") for name in shapes}
        tensors.clear()
        tensors.update(ordered)
    for name, z in model.tensors.items():
        if name.endswith(SPAN) and not ((z >= 0) & (z <= 1)).all():
            raise ConvertError(f"{path}: {name} is outside 0..1")
    if model.symbols is not None and len(model.symbols) != model.symbols_needed():
        raise ConvertError(f"{path}: the model has {model.symbols_needed()} symbols, but the vocabulary lists "
                           f"{len(model.symbols)}")


# ---- decks ----

def deck_value(text):
    if text in (".true.", ".false."):
        return text == ".true."
    if text.startswith("'"):
        return text[1:-1].replace("''", "'")
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text.replace("d", "e"))


def deck_read(text):
    """{'group%name': value} of a resolved deck, which has one variable a line."""
    settings, group = {}, ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("&"):
            group = line[1:]
        elif "=" in line:
            name, value = line.split("=", 1)
            settings[f"{group}%{name.strip()}"] = deck_value(value.strip())
    return settings


def deck_write(settings):
    groups = {}
    for name, value in settings.items():
        group, variable = name.split("%")
        if isinstance(value, bool):
            value = ".true." if value else ".false."
        elif isinstance(value, str):
            value = "'" + value.replace("'", "''") + "'"
        groups.setdefault(group, []).append(f"  {variable} = {value!r}" if isinstance(value, float)
                                            else f"  {variable} = {value}")
    return "".join(f"&{group}\n" + "\n".join(lines) + "\n/\n" for group, lines in groups.items())


# ---- symbols ----

LINE_END = ("<eos>", "</s>")


def symbols_from_names(names, words=False):
    """Bytes of each symbol. Where all names but those in angle brackets (and fairseq's fillers) are the numbers of bytes,
    as in the texts made from enwik8 for these programs, a symbol is the byte, and the end of a line is a newline."""
    def special(name):
        return re.fullmatch(r"<.*>|</s>|madeupword\d+", name)

    plain = [name for name in names if not special(name)]
    numbers = not words and plain and all(re.fullmatch(r"\d{1,3}", x) and int(x) < 256 for x in plain)
    symbols = []
    for name in names:
        if name in LINE_END:
            symbols.append(b"\n" if numbers else b"</s>")
        elif numbers and not special(name):
            symbols.append(bytes([int(name)]))
        else:
            symbols.append(name.encode("utf-8", "surrogateescape"))
    if len(set(symbols)) != len(symbols):
        raise ConvertError("the vocabulary lists a symbol twice: "
                           f"{sorted(x for x in symbols if symbols.count(x) > 1)[0]!r}")
    return symbols


def names_of_symbols(symbols, line_end):
    """The reverse, for a program that calls the end of a line `line_end`."""
    words = b"</s>" in symbols or all(len(x) > 1 for x in symbols)
    names = []
    for symbol in symbols:
        if symbol == (b"</s>" if words else b"\n"):
            names.append(line_end)
        elif not words and len(symbol) == 1:
            names.append(str(symbol[0]))
        else:
            names.append(symbol.decode("utf-8", "surrogateescape"))
    return names
