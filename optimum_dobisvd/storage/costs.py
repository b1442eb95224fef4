"""What a low-rank matrix weighs on disk, per storage: the cost curve that rank allocation spends a byte budget on."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

DENSE = "dense"
"""The storage name a plan writes for a matrix that is not factorised. It has no rank, so it is not in `STORAGES`."""


@dataclass(frozen=True)
class Storage:
    """The cost curve of one storage of the factors `second` (m×k) and `first` (k×n).

    Attributes:
        name: what plans and configs call it.
        bytes_at: `(m, n, k, element_size) -> bytes` of both factors on disk, scales included. `m` is out_features, `n`
            is in_features, `element_size` is the bytes of one element of the dense weight. Must not fall as k grows.
        largest_useful_rank: `(m, n) -> k`, the rank above which the dense matrix is not larger.
    """

    name: str
    bytes_at: Callable[[int, int, int, int], int]
    largest_useful_rank: Callable[[int, int], int]

    def largest_smaller_rank(self, out_features: int, in_features: int, element_size: int) -> int:
        """The largest rank whose factors are strictly smaller than the dense matrix, 0 where there is none.

        `largest_useful_rank` knows neither the element size nor the bytes of scales; this counts both.
        """
        dense = out_features * in_features * element_size
        ceiling = min(self.largest_useful_rank(out_features, in_features), out_features, in_features)

        def size(rank: int) -> int:
            return self.bytes_at(out_features, in_features, rank, element_size)

        return bisect.bisect_left(range(1, ceiling + 1), dense, key=size)


STORAGES: dict[str, Storage] = {}


def register_storage(storage: Storage) -> None:
    """Adds a storage to `STORAGES`.

    Raises:
        ValueError: the name is taken, empty, or "dense" (which plans write for a matrix without factors).
    """
    if not storage.name or storage.name == DENSE:
        raise ValueError(f"a storage cannot be called {storage.name!r}; choose another name")
    if storage.name in STORAGES:
        raise ValueError(f"storage {storage.name!r} is already registered; choose another name")
    STORAGES[storage.name] = storage


def storage_named(name: str) -> Storage:
    """The registered storage of that name.

    Raises:
        ValueError: there is none; the message lists the names there are.
    """
    # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
    if not isinstance(name, str) or name not in STORAGES:
        raise ValueError(f"unknown storage {name!r}; known storages: {', '.join(sorted(STORAGES))}")
    return STORAGES[name]


def _plain_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
    return rank * (out_features + in_features) * element_size


def _plain_largest_useful_rank(out_features: int, in_features: int) -> int:
    # Where k(m+n) == mn the dense matrix is as small and exact, hence the −1.
    return (out_features * in_features - 1) // (out_features + in_features)


register_storage(Storage("plain", _plain_bytes, _plain_largest_useful_rank))
