"""Factors on disk: what each form costs. Tensors and numbers only, no methods and no modules."""

from .costs import DENSE, STORAGES, Storage, register_storage, storage_named

__all__ = ["DENSE", "STORAGES", "Storage", "register_storage", "storage_named"]
