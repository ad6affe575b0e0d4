"""Reads PyTorch's files (.pt), zip or older, without PyTorch and without running anything of them.

A pickle is a program that may call any function it names. This reader knows the few that tensors and containers need, and
keeps every other class as plain data (`Record`): nothing is imported, and a call of any other function is an error.
"""
import collections
import io
import pickle
import zipfile

import numpy as np

from .model import ConvertError

DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "bfloat16",
          "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
          "BoolStorage": "?"}
MAGIC = 0x1950a86a20f9469cfc6c  # the first pickle of PyTorch's older files
# Classes of these packages may be called: enumerations in the settings of fairseq, sizes and devices of tensors.
DATA_PACKAGES = ("fairseq", "omegaconf", "torch.device", "torch.Size", "torch.serialization._get_layout")


class StorageType:
    def __init__(self, dtype):
        self.dtype = dtype


class Storage:
    def __init__(self, dtype, size):
        self.dtype, self.size, self.data = dtype, size, None

    def array(self):
        if self.data is None:
            raise ConvertError("the data of a tensor are missing")
        width = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        if len(self.data) < self.size * width:
            raise ConvertError("the data of a tensor end early: the file is not whole")
        if self.dtype == "bfloat16":
            halves = np.frombuffer(self.data, "<u2", self.size).astype("<u4")
            return (halves << 16).view("<f4")
        return np.frombuffer(self.data, self.dtype, self.size)


class Tensor:
    """A tensor of a file, whose data may be read after it."""

    def __init__(self, storage, offset, shape, stride):
        self.storage, self.offset, self.shape, self.stride = storage, offset, tuple(shape), tuple(stride)

    def array(self):
        flat = self.storage.array()
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride))
        if min(self.shape, default=1) <= 0:
            return np.zeros(self.shape, flat.dtype)
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= len(flat):
            raise ConvertError("a tensor reaches beyond its data")
        steps = tuple(s * flat.itemsize for s in self.stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat[self.offset:], self.shape, steps))


class RecordClass(type):
    """The class of classes that only hold data. Making an instance (as pickles of objects do) is harmless; a call is what
    pickles of functions do."""

    def __call__(cls, *args):
        if not cls.path.startswith(DATA_PACKAGES):
            raise ConvertError(f"it wants to call {cls.path}, which this reader does not do")
        made = cls.__new__(cls)
        made.args = args
        return made


class Record(metaclass=RecordClass):
    path = ""

    def __new__(cls, *args):
        made = object.__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = {**state[0], **(state[1] or {})}
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def append(self, item):
        self.__dict__.setdefault("items", []).append(item)

    def extend(self, items):
        self.__dict__.setdefault("items", []).extend(items)

    def __setitem__(self, key, value):
        self.__dict__.setdefault("entries", {})[key] = value


def rebuild_tensor(storage, offset, shape, stride, *_):
    if not isinstance(storage, Storage):
        raise ConvertError("a tensor has no data")
    return Tensor(storage, offset, shape, stride)


def rebuild_parameter(tensor, *_):
    return tensor


def type_with_parameters(kind, *_):
    """typing.List[int], as omegaconf notes beside a list."""
    if not isinstance(kind, RecordClass) or not kind.path.startswith("typing."):
        raise ConvertError("it wants to call operator.getitem, which this reader does not do")
    return kind


KNOWN = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    "builtins.set": set, "__builtin__.set": set,
    "builtins.dict": dict, "builtins.list": list, "__builtin__.dict": dict, "__builtin__.list": list,
    "_operator.getitem": type_with_parameters,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch.nn.parameter.Parameter": rebuild_parameter,
    "copyreg._reconstructor": lambda cls, *_: cls.__new__(cls), "copy_reg._reconstructor": lambda cls, *_: cls.__new__(cls),
}


class Reader(pickle.Unpickler):
    def __init__(self, file, storages):
        super().__init__(file, encoding="latin-1")
        self.storages = storages
        self.classes = {}

    def find_class(self, module, name):
        path = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return StorageType(DTYPES[name])
        if path in KNOWN:
            return KNOWN[path]
        if path == "collections.defaultdict":
            return lambda *_: {}
        if path not in self.classes:
            self.classes[path] = RecordClass(name, (Record,), {"path": path})
        return self.classes[path]

    def persistent_load(self, pid):
        if pid[0] == "module":  # older files of whole modules carry their class with its source
            return pid[1]
        if pid[0] != "storage" or not isinstance(pid[1], StorageType):
            raise ConvertError(f"it refers to {pid[0]!r}, which this reader does not know")
        key, size = pid[2], int(pid[4])
        if key not in self.storages:
            self.storages[key] = Storage(pid[1].dtype, size)
        if len(pid) > 5 and pid[5] is not None:  # a view of a storage, in old files: (its key, offset, size)
            raise ConvertError("it holds a view of a storage, which this reader does not know")
        return self.storages[key]


def read_zip(file):
    storages = {}
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        root = next((x[:-len("data.pkl")] for x in names if x.endswith("/data.pkl")), None)
        if root is None:
            raise ConvertError("a zip file, but not one of PyTorch's")
        if root + "byteorder" in names and archive.read(root + "byteorder").strip() != b"little":
            raise ConvertError("its numbers are big-endian")
        content = Reader(io.BytesIO(archive.read(root + "data.pkl")), storages).load()
        for key, storage in storages.items():
            storage.data = archive.read(f"{root}data/{key}")
    return content


def read_old(file):
    storages = {}
    if Reader(file, {}).load() != MAGIC:
        raise ConvertError("not a file of PyTorch's")
    version, system = Reader(file, {}).load(), Reader(file, {}).load()
    if version != 1001 or not system.get("little_endian", True):
        raise ConvertError(f"a file of PyTorch's protocol {version}, which this reader does not know")
    content = Reader(file, storages).load()
    for key in Reader(file, {}).load():
        size = int.from_bytes(file.read(8), "little")
        storage = storages.get(key) or Storage("u1", size)
        width = 2 if storage.dtype == "bfloat16" else np.dtype(storage.dtype).itemsize
        storage.data = file.read(size * width)
    return content


def read(path):
    """The content of a file of PyTorch's: dictionaries, lists, `Tensor`s, `Record`s."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return read_zip(file) if is_zip else read_old(file)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from None
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, IndexError, ValueError, TypeError,
            AttributeError, UnicodeDecodeError, OverflowError, MemoryError, NotImplementedError) as error:
        raise ConvertError(f"{path}: not a whole file of PyTorch's ({type(error).__name__}: {error})") from None


def floats(tensor):
    """float32 of a tensor in the file, or of an array."""
    if isinstance(tensor, np.ndarray):
        return tensor.astype("<f4", copy=False)
    if not isinstance(tensor, Tensor):
        raise ConvertError(f"a {type(tensor).__name__} stands where a tensor belongs")
    return tensor.array().astype("<f4", copy=False)


def is_module(record):
    return isinstance(record, Record) and hasattr(record, "_parameters") and hasattr(record, "_modules")


def state_dict(module, prefix=""):
    """{name: Tensor} of a whole module in the order of its parameters, submodules after its own; buffers likewise."""
    tensors = {prefix + n: t for group in (module._parameters, getattr(module, "_buffers", {}))
               for n, t in group.items() if isinstance(t, Tensor)}
    for name, part in module._modules.items():
        if is_module(part):
            tensors.update(state_dict(part, f"{prefix}{name}."))
    return tensors
