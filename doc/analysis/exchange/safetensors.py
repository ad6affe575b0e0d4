"""safetensors files: 8 bytes with the length of a JSON header, the header, the data. Parameters have the names of
Viaduct's /model; the optimiser's state is optimizer/STATE/TENSOR, memories are memory/layerN. What else a checkpoint holds
is text in `__metadata__`: settings (a deck), symbols (hexadecimal), counts, update, corpus_id, numbers."""
import json

import numpy as np

from .model import ConvertError, Model, deck_read, deck_write
from .torch_files import replace

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def decode(path, name, about, data):
    try:
        dtype, shape, (begin, end) = about["dtype"], [int(n) for n in about["shape"]], about["data_offsets"]
        flat = np.frombuffer(data[begin:end], DTYPES[dtype])
        if dtype == "BF16":
            flat = (flat.astype("<u4") << 16).view("<f4")
        if begin < 0 or end > len(data):
            raise ValueError
        return flat.reshape(shape).astype("<f4", copy=False)
    except (KeyError, TypeError, ValueError):
        raise ConvertError(f"{path}: the data of {name} do not fit its entry in the header") from None


def parse(path):
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:8 + length])
        if len(content) < 8 + length or not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise ConvertError(f"{path}: not a safetensors file") from None
    return header, memoryview(content)[8 + length:]


def read(path, _options):
    header, data = parse(path)
    about = header.pop("__metadata__", {})
    if "settings" not in about:
        raise ConvertError(f"{path}: its metadata have no settings: only files that convert.py wrote are read")
    try:
        settings = deck_read(about["settings"])
        symbols = json.loads(about.get("symbols", "null"))
        counts = json.loads(about.get("counts", "null"))
        numbers = json.loads(about.get("numbers", "{}"))
        update = int(about.get("update", "0"))
        symbols = None if symbols is None else [bytes.fromhex(x) for x in symbols]
    except (ValueError, TypeError):
        raise ConvertError(f"{path}: its metadata cannot be read") from None
    model = Model(settings=settings, tensors={}, deck=about["settings"], symbols=symbols, counts=counts, update=update,
                  numbers=numbers, corpus_id=about.get("corpus_id", ""))
    for name, entry in header.items():
        array = decode(path, name, entry, data)
        parts = name.split("/")
        if parts[0] == "optimizer" and len(parts) == 3:
            model.states.setdefault(parts[1], {})[parts[2]] = array
        elif parts[0] == "memory" and len(parts) == 2:
            model.memory[parts[1]] = array
        else:
            model.tensors[name] = array
    return model


def write(path, model):
    tensors = dict(model.tensors)
    for state, of in model.states.items():
        tensors.update({f"optimizer/{state}/{name}": array for name, array in of.items()})
    tensors.update({f"memory/{name}": array for name, array in model.memory.items()})
    about = {"format": "pt", "settings": model.deck or deck_write(model.settings), "update": str(model.update)}
    if model.symbols is not None:
        about["symbols"] = json.dumps([x.hex() for x in model.symbols])
        about["counts"] = json.dumps(model.counts)
    if model.corpus_id:
        about["corpus_id"] = model.corpus_id
    if model.numbers:
        about["numbers"] = json.dumps(model.numbers)
    header, end = {"__metadata__": about}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def fill(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, "<f4").tobytes())

    replace(path, fill)
