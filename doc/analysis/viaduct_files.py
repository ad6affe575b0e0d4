"""Reads what a run of Viaduct leaves, from Python:

    from viaduct_files import log, nll, open_attention, open_checkpoint, open_trace, spans
    trace = open_trace("runs/first")                    # columns as numpy arrays
    print(trace["update"][-1], trace["train_bpc"][-1], spans(trace)[-1].max())
    with open_checkpoint("runs/first/checkpoints/best.h5", verify=True) as file:
        print(file["/model/in_emb.weight"].shape, spans(file))
    bpc = [row["valid_bpc"] for row in log("runs/first") if "valid_bpc" in row]

Every path is that of a run's folder or of the file itself. FileError says in one line what is wrong with a file. Needs
h5py and numpy (Debian: python3-h5py), but for log(), settings() and setting(), which need Python alone;
open_trace(..., xarray=True) and open_attention(..., xarray=True) need xarray with h5netcdf or netCDF4. The layout of the files: doc/FILES.md.
"""
import hashlib
import json
import os
import re

SEAL = 81  # bytes: the line with the SHA-256 of all bytes before it
COLUMNS = ("update", "span", "train_bpc", "learning_rate", "grad_norm", "tokens_per_second")  # of every trace


class FileError(Exception):
    """What is wrong with a file, in one line."""


def text(value):
    """A text attribute as str: h5py gives some as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def one_line(failure):
    return " ".join(str(failure).split())


def named_runs(words, parser):
    """{name: folder} of the words [NAME=]RUN_DIRECTORY of a command line; without a name, that of the folder."""
    runs = {}
    for word in words:
        name, mark, directory = word.partition("=")
        directory = directory if mark else word
        name = name if mark else os.path.basename(os.path.abspath(word))
        if name in runs:
            parser.error(f"two runs are called '{name}'")
        runs[name] = directory
    return runs


# ---- decks ----

def settings(deck):
    """A resolved deck, which has one variable a line, as {"group%name": value}: int, float, bool or str."""
    found, group = {}, None
    for line in deck.splitlines():
        begin = re.fullmatch(r"\s*&(\w+)\s*", line)
        variable = re.fullmatch(r"\s*(\w+)\s*=\s*(.*?)\s*", line)
        if begin:
            group = begin[1].lower()
        elif variable and group:
            found[f"{group}%{variable[1].lower()}"] = plain_value(variable[2])
    return found


def plain_value(word):
    if len(word) > 1 and word[0] == word[-1] == "'":
        return word[1:-1].replace("''", "'")
    if word.lower() in (".true.", ".false."):
        return word.lower() == ".true."
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def setting(deck, group, name):
    """One variable of a resolved deck; None where it is not there."""
    return settings(deck).get(f"{group}%{name}")


# ---- HDF5 files ----

def digest_is_right(path):
    """Whether the SHA-256 at the end of a file is that of the bytes before it; None where there is none."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL
        if left < 0:
            return None
        found = hashlib.sha256()
        while left > 0:
            piece = file.read(min(left, 1 << 20))
            found.update(piece)
            left -= len(piece)
        seal = re.fullmatch(rb"\nviaduct sha256 ([0-9a-f]{64})\n", file.read(SEAL))
    return seal[1].decode() == found.hexdigest() if seal else None


def open_file(path, kind, missing="", verify=False):
    """The HDF5 file of this kind ("trace", "checkpoint", "nll", "attention", "corpus", "shard"), open for reading. verify: the digest at
    its end is compared first. The caller closes it."""
    import h5py
    what = f"{kind} file" if kind in ("nll", "attention") else kind
    if not os.path.exists(path):
        raise FileError(f"{path}: there is no {what}{missing}")
    if not os.access(path, os.R_OK):
        raise FileError(f"{path}: no permission to read it")
    if verify and not digest_is_right(path):
        raise FileError(f"{path}: damaged: the digest at its end is missing or wrong")
    try:
        if not h5py.is_hdf5(path):
            raise FileError(f"{path}: no HDF5 file, or a damaged one")
        file = h5py.File(path, "r")
    except OSError:
        raise FileError(f"{path}: truncated or damaged, or open for writing in another program") from None
    found = text(file.attrs.get("viaduct_kind", ""))
    if found != kind:
        file.close()
        raise FileError(f"{path}: no {what} of Viaduct's" + (f", but a {found}" if found else ""))
    return file


def columns(group, names, path):
    """{name: array} of datasets in a group, all cut to the rows of the shortest."""
    import h5py
    for name in names:
        if not isinstance(group.get(name), h5py.Dataset):
            raise FileError(f"{path}: there is no dataset {group.name.rstrip('/')}/{name}")
    try:
        data = {name: group[name][()] for name in names}
    except (OSError, RuntimeError) as failure:
        raise FileError(f"{path}: damaged: {one_line(failure)}") from None
    rows = min(len(column) for column in data.values())
    return {name: column[:rows] for name, column in data.items()}


def open_trace(path, xarray=False, verify=False):
    """The trace of a run, finished or in progress: {"update": [update], "span": [update, layer, head] tokens, "train_bpc",
    "learning_rate", "grad_norm", "tokens_per_second" and, but in files of version 1, "wall" and "time": [update];
    "valid": {"update", "bpc"} or None; "deck": the resolved deck; "attributes": those of the file; "path"}. xarray: an xarray.Dataset instead, loaded, whose
    validations are /valid's variables valid_bpc over valid_update."""
    if os.path.isdir(path) or not path.endswith(".h5"):
        path = os.path.join(path, "trace.h5")
    with open_file(path, "trace", "; is this the directory of a run?", verify) as file:
        if xarray:
            return xarray_trace(path, "valid" in file)
        names = COLUMNS + tuple(name for name in ("wall", "time") if name in file)
        trace = columns(file, names, path)
        trace["valid"] = columns(file["valid"], ("update", "bpc"), path) if "valid" in file else None
        trace["attributes"] = {name: text(value) if isinstance(value, bytes) else value for name, value in file.attrs.items()}
        trace["deck"], trace["path"] = text(file.attrs.get("settings", "")), path
    if trace["span"].ndim != 3:
        raise FileError(f"{path}: /span has {trace['span'].ndim} dimensions instead of update, layer, head")
    return trace


def xarray_trace(path, validated):
    import xarray
    with xarray.open_dataset(path) as rows:
        trace = rows.load()
    if validated:
        with xarray.open_dataset(path, group="valid") as rows:
            trace = trace.assign(rows.load().rename(update="valid_update", bpc="valid_bpc"))
    return trace


def open_checkpoint(path, verify=False):
    """A checkpoint (a run's last.h5, where the path is a folder) as an open h5py.File: /model/TENSOR, /optimizer, /memory,
    ... The caller closes it, or uses `with`."""
    if os.path.isdir(path):
        path = os.path.join(path, "checkpoints", "last.h5")
    return open_file(path, "checkpoint", verify=verify)


def spans(source):
    """Spans in tokens: [update, layer, head] of what open_trace() returned, [layer, head] of an open checkpoint of the
    adaptive span (one column where layers have one span each)."""
    import h5py
    import numpy as np
    if not isinstance(source, h5py.File):
        return source["span"]
    found = {}
    for name, tensor in source["/model"].items():
        layer = re.fullmatch(r"layers\.(\d+)\.attn\.attn\.adaptive_span\._mask\.current_val", name)
        if layer:
            found[int(layer[1])] = tensor[()].ravel()
    length = setting(text(source.attrs.get("settings", "")), "span", "attn_span")
    if not found or not length:
        raise FileError(f"{source.filename}: the model has no adaptive spans")
    return np.stack([found[layer] for layer in sorted(found)]) * length


def nll(path):
    """([token] nats that each token of a split cost, NaN where it was not predicted; the attributes of the file)."""
    with open_file(path, "nll") as file:
        attributes = {name: text(value) if isinstance(value, bytes) else value for name, value in file.attrs.items()}
        try:
            return file["/nll"][()], attributes
        except (KeyError, OSError, RuntimeError) as failure:
            raise FileError(f"{path}: damaged: {one_line(failure)}") from None


def check_attention(found, path):
    """The shapes that doc/FILES.md promises, and ids that are those of symbols."""
    weight, each = found["distance_weight"], found["position_weight"]
    if weight.ndim != 3 or 0 in weight.shape:
        raise FileError(f"{path}: /distance_weight is not [layer, head, distance]")
    shapes = {"span": weight.shape[:2]}
    if each is not None:
        n = len(each) if each.ndim else 0
        shapes.update(position_weight=(n, *weight.shape), position=(n,), token=(n,), nll=(n,), context=(n, weight.shape[-1]))
    for name, shape in shapes.items():
        if found[name] is None or found[name].shape != shape:
            raise FileError(f"{path}: /{name} has not the shape that /distance_weight and /position_weight say")
    for name in ("token", "context") if each is not None else ():
        if found[name].size and not -1 <= found[name].min() <= found[name].max() < len(found["symbols"]):
            raise FileError(f"{path}: /{name} has ids that are no symbols")


def open_attention(path, xarray=False):
    """What eval%attention_file holds: {"distance_weight": [layer, head, distance], "span": [layer, head] tokens; of the
    positions, or None where there are none, "position": [position], "position_weight": [position, layer, head, distance],
    "context": [position, distance] token ids, -1: none, "token": [position], "nll": [position] nats; "symbols": the bytes of
    each token id; "deck": the settings of the model; "attributes": those of the file; "path"}. xarray: an xarray.Dataset
    instead, loaded."""
    names = ("position", "position_weight", "context", "token", "nll")
    with open_file(path, "attention") as file:
        if xarray:
            import xarray as xr
            with xr.open_dataset(path) as weights:
                return weights.load()
        try:
            found = {name: file[name][()] for name in ("distance_weight", "span")}
            found.update({name: file[name][()] if name in file else None for name in names})
            symbols = zip(file["vocabulary/symbol"][()], file["vocabulary/length"][()])
            found["symbols"] = [bytes(symbol[:length]) for symbol, length in symbols]
        except (KeyError, OSError, RuntimeError) as failure:
            raise FileError(f"{path}: damaged: {one_line(failure)}") from None
        found["attributes"] = {name: text(value) if isinstance(value, bytes) else value for name, value in file.attrs.items()}
    found["deck"], found["path"] = found["attributes"].get("model_settings", ""), path
    check_attention(found, path)
    return found


# ---- the log ----

def read_text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as failure:
        raise FileError(f"{path}: {failure.strerror}") from None


def log(path):
    """The rows of log.jsonl as dicts, null as NaN: training rows have "bpc", validations "valid_bpc". Lines that are no
    rows are skipped, such as one that was being written when the run was killed."""
    if not path.endswith(".jsonl"):
        path = os.path.join(path, "log.jsonl")
    rows = []
    for line in read_text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("num_updates"), int):
            rows.append({name: float("nan") if value is None else value for name, value in row.items()})
    return rows
