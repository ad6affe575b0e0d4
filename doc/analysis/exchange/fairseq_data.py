"""A corpus of Viaduct as fairseq's binary data: FOLDER/dict.txt, and train.bin, train.idx and so on in the format `mmap`, as
fairseq-preprocess writes them."""
import io
import itertools
import os
import struct

import h5py
import numpy as np

from .fairseq import dictionary_text, rows_of
from .model import ConvertError
from .torch_files import replace
from .viaduct import sealed, symbols_of, text

SPLITS = ("train", "valid", "test")
LONGEST = 1 << 30  # tokens of an item; fairseq counts them in int32
UINT16, INT32 = (8, "<u2"), (4, "<i4")


class Corpus:
    """NAME.h5 of `viaduct prepare` and the shards beside it."""

    def __init__(self, path):
        self.path = path
        with h5py.File(io.BytesIO(sealed(path)), "r") as file:
            self.id, self.prefix = text(file.attrs["corpus_id"]), text(file.attrs["shard_prefix"])
            self.symbols, self.counts = symbols_of(file)
            self.length = {split: len(file[split]) for split in SPLITS}

    def tokens(self, split):
        """Arrays of ids, a shard each."""
        done = 0
        for index in itertools.count():
            if done >= self.length[split]:
                return
            path = os.path.join(os.path.dirname(self.path), f"{self.prefix}-{split}-{index:04d}.h5")
            try:
                with h5py.File(path, "r") as file:
                    if text(file.attrs["corpus_id"]) != self.id or int(file.attrs["first_token"]) != done:
                        raise ConvertError(f"{path}: not this shard of {self.path}")
                    ids = file["tokens"][()]
            except (OSError, KeyError) as error:
                raise ConvertError(f"{path}: no shard that can be read ({error})") from None
            if len(ids) and ids.max() >= len(self.symbols):
                raise ConvertError(f"{path}: holds id {ids.max()}, but the vocabulary has {len(self.symbols)} symbols")
            done += len(ids)
            yield ids


def is_corpus(path):
    """Whether it is a corpus, of which no model can be read."""
    try:
        with h5py.File(path, "r") as file:
            return text(file.attrs.get("viaduct_kind", "")) == "corpus"
    except OSError:
        return False


def write_tokens(path, parts, new_id, line_end, kind):
    """The .bin file; returns where in it items end. An item is a line, as of fairseq-preprocess."""
    ends, n = [], 0

    def fill(file):
        nonlocal n
        for part in parts:
            ids = new_id[part]
            ends.append(np.flatnonzero(ids == line_end) + 1 + n)
            n += len(ids)
            file.write(ids.astype(kind[1]).tobytes())

    replace(path, fill)
    return np.unique(np.concatenate([*ends, np.arange(LONGEST, n, LONGEST), [n] if n else []])).astype("<i8")


def write_index(path, ends, kind):
    places = np.concatenate([[0], ends[:-1]]).astype("<i8")[:len(ends)]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, kind[0], len(ends))
    replace(path, lambda file: [file.write(x) for x in (
        header, (ends - places).astype("<i4").tobytes(), (places * np.dtype(kind[1]).itemsize).tobytes())])


def write(folder, corpus):
    names, rows = rows_of(corpus)
    if os.path.exists(os.path.join(folder, "dict.txt")):
        raise ConvertError(f"{folder}: there is a dict.txt already, and the data of that dictionary")
    new_id = np.zeros(len(corpus.symbols), "<i8")
    for new, row in enumerate(rows):
        if row >= 0:
            new_id[row] = new
    kind = UINT16 if len(names) < 65500 else INT32
    os.makedirs(folder, exist_ok=True)
    for split in SPLITS:
        ends = write_tokens(os.path.join(folder, f"{split}.bin"), corpus.tokens(split), new_id, names.index("</s>"), kind)
        write_index(os.path.join(folder, f"{split}.idx"), ends, kind)
        print(f"wrote {os.path.join(folder, split)}.bin and .idx: {corpus.length[split]} tokens in {len(ends)} lines")
    content = dictionary_text(names, rows, corpus.counts).encode("utf-8", "surrogateescape")
    replace(os.path.join(folder, "dict.txt"), lambda file: file.write(content))
    print(f"wrote {os.path.join(folder, 'dict.txt')}: {len(names)} symbols")
