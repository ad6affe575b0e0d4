"""Writes PyTorch's zip files (.pt) without PyTorch: a pickle of dictionaries, lists and tensors, and the data beside it."""
import collections
import os
import struct
import zipfile

import numpy as np

STORAGES = {"<f4": "FloatStorage", "<i8": "LongStorage"}


class Global:
    """A name that the reading program imports."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """What a function of the reading program returns: function(*args), with `state` given to it where there is one. The
    same Call twice in a file is one object."""

    def __init__(self, function, args, state=None):
        self.function, self.args, self.state = function, args, state


class Object:
    """An instance of a class of the reading program with these attributes. The same Object twice is one object."""

    def __init__(self, cls, state):
        self.cls, self.state = cls, state


class Pickler:
    """Protocol 2, as PyTorch writes it."""

    def __init__(self):
        self.out = bytearray(b"\x80\x02")
        self.storages = []
        self.memo = {}
        self.held = []

    def remember(self, item):
        self.memo[id(item)] = len(self.memo)
        self.held.append(item)  # so that no other object gets its id
        self.out += b"r" + struct.pack("<I", self.memo[id(item)])

    def name(self, module, name):
        self.out += b"c" + f"{module}\n{name}\n".encode()

    def text(self, text):
        data = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(data)) + data

    def tuple(self, items):
        self.out += b"("
        for item in items:
            self.put(item)
        self.out += b"t"

    def pairs(self, items):
        self.out += b"("
        for key, value in items:
            self.put(key)
            self.put(value)
        self.out += b"u"

    def number(self, value):
        if isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data
        else:
            self.out += b"G" + struct.pack(">d", value)

    def tensor(self, array):
        array = np.ascontiguousarray(array)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        strides = tuple(s // array.itemsize for s in array.strides)
        key = str(len(self.storages))
        self.storages.append(array.tobytes())
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.text("storage")
        self.name("torch", STORAGES[array.dtype.str])
        for item in (key, "cpu", array.size):
            self.put(item)
        self.out += b"tQ"
        for item in (0, tuple(array.shape), strides, False, collections.OrderedDict()):
            self.put(item)
        self.out += b"tR"

    def put(self, item):
        if id(item) in self.memo:
            self.out += b"j" + struct.pack("<I", self.memo[id(item)])
        elif item is None:
            self.out += b"N"
        elif isinstance(item, (bool, int, float)):
            self.number(item)
        elif isinstance(item, str):
            self.text(item)
        elif isinstance(item, Global):
            self.name(item.module, item.name)
        elif isinstance(item, tuple):
            self.tuple(item)
        elif isinstance(item, list):
            self.out += b"]("
            for part in item:
                self.put(part)
            self.out += b"e"
        elif isinstance(item, collections.OrderedDict):
            self.name("collections", "OrderedDict")
            self.out += b")R"
            self.pairs(item.items())
        elif isinstance(item, dict):
            self.out += b"}"
            self.pairs(item.items())
        elif isinstance(item, np.ndarray):
            self.tensor(item)
            self.remember(item)
        elif isinstance(item, Call):
            self.put(item.function)
            self.tuple(item.args)
            self.out += b"R"
            self.remember(item)
            if item.state is not None:
                self.put(item.state)
                self.out += b"b"
        elif isinstance(item, Object):
            self.put(item.cls)
            self.out += b")\x81"
            self.remember(item)
            self.put(item.state)
            self.out += b"b"
        else:
            raise TypeError(f"no way to write a {type(item).__name__}")


def replace(path, write):
    """write(file) into a new file that takes the place of `path` when it is whole."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write(path, content):
    pickler = Pickler()
    pickler.put(content)
    pickler.out += b"."

    def fill(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            def add(name, data):
                archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), data)

            add("data.pkl", bytes(pickler.out))
            for key, data in enumerate(pickler.storages):
                add(f"data/{key}", data)
            add("version", b"3\n")

    replace(path, fill)
