"""Factors on disk: what each form costs. Tensors and numbers only, no methods and no modules."""

from .costs import (
    DENSE,
    DENSE_INT8,
    DENSE_STORAGES,
    STORAGES,
    DenseStorage,
    Storage,
    dense_storage_named,
    register_storage,
    storage_named,
)
from .packing import pack, pack_dense, unpack

__all__ = [
    "DENSE",
    "DENSE_INT8",
    "DENSE_STORAGES",
    "STORAGES",
    "DenseStorage",
    "Storage",
    "dense_storage_named",
    "pack",
    "pack_dense",
    "register_storage",
    "storage_named",
    "unpack",
]
