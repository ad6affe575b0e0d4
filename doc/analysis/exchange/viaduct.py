"""Viaduct's checkpoints: HDF5 with a digest at the end. Layout: doc/FILES.md."""
import datetime
import hashlib
import io
import os

import h5py
import numpy as np

from .model import ConvertError, Model, deck_read, deck_write
from .torch_files import replace

SEAL = 81  # bytes: the line with the SHA-256 of all bytes before it
FORMAT_VERSION = 3
# of /position and /statistics: type, units, long_name
NUMBERS = {
    "position/update": ("<i8", "1", "updates done"),
    "position/epoch": ("<i8", "1", "epoch of the next update, counted from 1"),
    "position/block": ("<i8", "1", "block of the epoch that the next update reads, counted from 0"),
    "statistics/best_valid_bpc": ("<f8", "bits", "lowest bits per symbol of a validation so far; NaN where there was none"),
    "statistics/best_valid_update": ("<i8", "1", "updates done at that validation; 0: none"),
    "statistics/last_valid_update": ("<i8", "1", "updates done at the last validation; 0: none"),
    "statistics/log_nll": ("<f8", "nats", "training loss since the last row of log.jsonl, sum"),
    "statistics/log_targets": ("<f8", "tokens", "predicted tokens since the last row of log.jsonl"),
    "statistics/log_seconds": ("<f8", "s", "time of the updates since the last row of log.jsonl"),
    "statistics/trace_nll": ("<f8", "nats", "training loss since the last row of trace.h5, sum"),
    "statistics/trace_targets": ("<f8", "tokens", "predicted tokens since the last row of trace.h5"),
    "statistics/trace_seconds": ("<f8", "s", "time of the updates since the last row of trace.h5"),
    "loss_scale/scale": ("<f8", "1", "factor by which the loss is multiplied"),
    "loss_scale/clean_updates": ("<i8", "1", "updates without overflow since the factor changed"),
    "loss_scale/skipped_updates": ("<i8", "1", "updates skipped for overflow since the run began"),
}


def sealed(path):
    """The content before the digest, after comparing it."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    seal = content[-SEAL:]
    if not seal.startswith(b"\nviaduct sha256 "):
        raise ConvertError(f"{path}: not a whole checkpoint of Viaduct (there is no digest at its end)")
    content = content[:-SEAL]
    if seal[16:-1] != hashlib.sha256(content).hexdigest().encode():
        raise ConvertError(f"{path}: damaged: the digest at its end is that of other content")
    return content


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def datasets(group):
    return {name: item for name, item in group.items()
            if isinstance(item, h5py.Dataset) and item.attrs.get("CLASS") != b"DIMENSION_SCALE"}


def symbols_of(file):
    """Bytes and counts of the symbols of a checkpoint or a corpus."""
    length, symbol = file["vocabulary/length"][:], file["vocabulary/symbol"][:]
    return [bytes(s[:n]) for s, n in zip(symbol, length)], [int(n) for n in file["vocabulary/count"][:]]


def read(path, _options):
    with h5py.File(io.BytesIO(sealed(path)), "r") as file:
        if text(file.attrs.get("viaduct_kind", "")) != "checkpoint":
            raise ConvertError(f"{path}: not a checkpoint of Viaduct")
        if int(file.attrs.get("format_version", 1)) != FORMAT_VERSION:
            raise ConvertError(f"{path}: format version {int(file.attrs.get('format_version', 1))}; this program reads "
                               f"version {FORMAT_VERSION} (a resumed run writes it)")
        deck = text(file.attrs["settings"])
        symbols, counts = symbols_of(file)
        model = Model(
            settings=deck_read(deck), deck=deck, corpus_id=text(file.attrs["corpus_id"]), update=int(file.attrs["update"]),
            tensors={name: d[()] for name, d in datasets(file["model"]).items()},
            states={s: {name: d[()] for name, d in datasets(g).items()} for s, g in file["optimizer"].items()},
            memory={name: d[()] for name, d in datasets(file["memory"]).items()},
            symbols=symbols, counts=counts)
        for name, (dtype, _, _) in NUMBERS.items():
            if name in file:
                model.numbers[name] = file[name][()].item() if dtype == "<f8" else int(file[name][()])
    return model


class Writer:
    """Datasets with units, long names and scales, as Viaduct writes them."""

    def __init__(self, file):
        self.file, self.scales = file, {}

    def attribute(self, item, name, value):
        data = value.encode()
        item.attrs.create(name, np.array(data, h5py.string_dtype("utf-8", len(data) or 1)))

    def group(self, name):
        return self.file.require_group(name) if name in self.file else self.file.create_group(name, track_order=True)

    def scale(self, group, dimension, length):
        key = (group.name, dimension, length)
        if key not in self.scales:
            name = dimension if dimension not in group else f"{dimension}_{length}"
            scale = group.create_dataset(name, (length,), ">f4")
            scale.make_scale(f"This is a netCDF dimension but not a netCDF variable.{length:10d}")
            self.attribute(scale, "units", "1")
            self.attribute(scale, "long_name", f"dimension {name}; it has no values of its own")
            self.scales[key] = scale
        return self.scales[key]

    def put(self, path, array, dimensions, units, long_name):
        group_name, _, name = path.rpartition("/")
        group = self.group(group_name)
        scales = [self.scale(group, d, n) for d, n in zip(dimensions, array.shape)]
        chunked = {"chunks": self.chunks(array), "fletcher32": True} if array.ndim and array.size else {}
        dataset = group.create_dataset(name, data=array, **chunked)
        for axis, scale in zip(dataset.dims, scales):
            axis.attach_scale(scale)
        self.attribute(dataset, "units", units)
        self.attribute(dataset, "long_name", long_name)

    @staticmethod
    def chunks(array):
        chunk = list(array.shape)
        for axis in range(len(chunk)):
            while np.prod(chunk) * array.itemsize > 512 * 1024 and chunk[axis] > 1:
                chunk[axis] = (chunk[axis] + 1) // 2
        return tuple(chunk)


def dimensions_of(name, array):
    if name.endswith("current_val"):
        return {1: ("span_of_layer",), 3: ("head", "row", "column")}[array.ndim]
    if name.split(".")[-1] in ("r_w", "r_r"):
        return "head", "head_feature"
    names = list({1: ("feature",), 2: ("out_feature", "in_feature"), 3: ("table", "head_feature", "distance")}[array.ndim])
    if name.startswith(("in_emb.", "out_emb.", "word_emb.", "crit.")):
        names[0] = "symbol"
    return names


def numbers_of(model):
    """/position and /statistics of a model that another program trained: no validations, the first epoch."""
    numbers = {name: 0 for name in NUMBERS if not name.startswith("loss_scale/")}
    numbers.update({"position/update": model.update, "position/epoch": 1, "position/block": model.update,
                    "statistics/best_valid_bpc": float("nan")})
    return {**numbers, **model.numbers}


def fill(file, model):
    out = Writer(file)
    numbers = numbers_of(model)
    about = {"Conventions": f"Viaduct-{FORMAT_VERSION}", "viaduct_kind": "checkpoint",
             "corpus_id": model.corpus_id or "0" * 32, "settings": model.deck or deck_write(model.settings),
             "viaduct_version": "none: converted by convert.py", "git_version": "unknown",
             "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
             "title": model.settings.get("run%title", "")}
    for name, value in about.items():
        if value:
            out.attribute(file, name, value)
    file.attrs["format_version"] = np.int64(FORMAT_VERSION)
    file.attrs["update"] = np.int64(model.update)
    if numbers["statistics/best_valid_update"] > 0:
        file.attrs["best_valid_bpc"] = np.float64(numbers["statistics/best_valid_bpc"])
    for name, value in numbers.items():
        dtype, units, long_name = NUMBERS[name]
        out.put(name, np.array(value, dtype), (), units, long_name)
    width = max(len(s) for s in model.symbols)
    table = np.zeros((len(model.symbols), width), np.uint8)
    for row, symbol in zip(table, model.symbols):
        row[:len(symbol)] = list(symbol)
    out.put("vocabulary/symbol", table, ("symbol_id", "byte"), "1",
            "bytes of each symbol, padded with zeros behind vocabulary/length")
    out.put("vocabulary/length", np.array([len(s) for s in model.symbols], "<i4"), ("symbol_id",), "bytes",
            "length of each symbol")
    out.put("vocabulary/count", np.array(model.counts or [0] * len(model.symbols), "<i8"), ("symbol_id",), "tokens",
            "occurrences of each symbol in the whole source")
    for name, array in model.tensors.items():
        out.put(f"model/{name}", array, dimensions_of(name, array), "1", f"parameter of {name}")
    out.group("optimizer")
    for state, tensors in model.states.items():
        for name, array in tensors.items():
            out.put(f"optimizer/{state}/{name}", array, dimensions_of(name, array), "1", f"{state} of {name}")
    out.group("memory")
    for name, array in model.memory.items():
        out.put(f"memory/{name}", array, ("stream", "position", "feature"), "1",
                f"previous inputs of layer {name[len('layer'):]}, oldest position first")


def write(path, model):
    if model.symbols is None:
        raise ConvertError("the source does not say which symbols its ids stand for: name a file with --symbols")
    memory = io.BytesIO()
    with h5py.File(memory, "w", libver="latest", track_order=True) as file:
        fill(file, model)
    content = memory.getvalue()
    seal = b"\nviaduct sha256 " + hashlib.sha256(content).hexdigest().encode() + b"\n"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace(path, lambda file: file.write(content + seal))
