"""What the tests of HDF5 files share: their datasets, and files that are changed under a digest that is right."""
import contextlib

import h5py

from whole import seal, unseal


def datasets(f):
    """Paths of all datasets of an open file."""
    found = []
    f.visititems(lambda name, o: found.append("/" + name) if isinstance(o, h5py.Dataset) else None)
    return found


def is_scale(d):
    return h5py.h5ds.is_scale(d.id)


@contextlib.contextmanager
def changed(path, sealed=True):
    """Opens a file of Viaduct's for changes. Its digest is taken off before, and a right one put on after, where
    `sealed`."""
    unseal(path)
    with h5py.File(path, "r+", libver="latest") as f:
        yield f
    if sealed:
        seal(path)
