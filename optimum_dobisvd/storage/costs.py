"""What a matrix weighs on disk, per storage: the cost curve that rank allocation spends a byte budget on."""

from collections.abc import Callable
from dataclasses import dataclass

DENSE = "dense"
"""The storage name a plan writes for a matrix that is left as it is."""
DENSE_INT8 = "dense_int8"
"""And for one that is left whole, in 8 bits."""


@dataclass(frozen=True)
class Storage:
    """The cost curve of one storage of the factors `second` (m×k) and `first` (k×n).

    Attributes:
        name: what plans and configs call it.
        bytes_per_rank: `(m, n, element_size) -> bytes` of one rank of both factors on disk, its scale included. `m` is
            out_features, `n` is in_features, `element_size` is the bytes of one element of the dense weight.
        bytes_per_matrix: `(m, n, element_size) -> bytes` that every matrix takes beside its ranks: scales of rows.
        rank_multiple: what ranks are multiples of unless the user says otherwise: what its kernels take without
            copying.
        dense_storage: what a matrix that is not factorised is stored as, unless the user says otherwise.
    """

    name: str
    bytes_per_rank: Callable[[int, int, int], int]
    bytes_per_matrix: Callable[[int, int, int], int] = lambda m, n, element_size: 0
    rank_multiple: int = 1
    dense_storage: str = DENSE

    def bytes_at(self, out_features: int, in_features: int, rank: int, element_size: int) -> int:
        """Bytes of both factors on disk, scales included."""
        shape = (out_features, in_features, element_size)
        return self.bytes_per_matrix(*shape) + rank * self.bytes_per_rank(*shape)

    def largest_rank_below(self, size: int, out_features: int, in_features: int, element_size: int) -> int:
        """The largest rank whose factors take less than `size` bytes (those of the dense matrix: the break-even rank).

        0 where there is none.
        """
        shape = (out_features, in_features, element_size)
        left = size - 1 - self.bytes_per_matrix(*shape)
        return max(0, min(left // self.bytes_per_rank(*shape), out_features, in_features))


@dataclass(frozen=True)
class DenseStorage:
    """How a whole matrix is stored.

    Attributes:
        name: what plans and configs call it.
        bytes_of: `(m, n, element_size) -> bytes` on disk, scales included.
        lost_share: the share of a matrix's energy that rounding it takes, for allocators that weigh it against ranks.
    """

    name: str
    bytes_of: Callable[[int, int, int], int]
    lost_share: float


STORAGES: dict[str, Storage] = {}
DENSE_STORAGES = {
    DENSE: DenseStorage(DENSE, lambda m, n, element_size: m * n * element_size, lost_share=0.0),
    # Uniform rounding of rows whose largest value is about four times their root mean square: (4 / 127)^2 / 12.
    DENSE_INT8: DenseStorage(DENSE_INT8, lambda m, n, element_size: m * n + m * element_size, lost_share=8e-5),
}


def register_storage(storage: Storage) -> None:
    """Adds a storage to `STORAGES`.

    Raises:
        ValueError: the name is taken, empty, or that of a dense storage.
    """
    if not storage.name or storage.name in DENSE_STORAGES:
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


def dense_storage_named(name: str) -> DenseStorage:
    """The storage of whole matrices of that name.

    Raises:
        ValueError: there is none; the message lists the names there are.
    """
    if not isinstance(name, str) or name not in DENSE_STORAGES:
        raise ValueError(f"unknown dense storage {name!r}; known: {', '.join(DENSE_STORAGES)}")
    return DENSE_STORAGES[name]


def dense_levels(name: str, out_features: int, in_features: int, element_size: int) -> tuple[DenseStorage, ...]:
    """The whole forms a matrix can take, smallest first: the named one, and the matrix as it is if that is larger."""
    form = dense_storage_named(name)
    plain = DENSE_STORAGES[DENSE]
    shape = (out_features, in_features, element_size)
    return (form, plain) if form.bytes_of(*shape) < plain.bytes_of(*shape) else (plain,)


def _plain_bytes(out_features: int, in_features: int, element_size: int) -> int:
    return (out_features + in_features) * element_size


def _int8_bytes(out_features: int, in_features: int, element_size: int) -> int:
    return out_features + in_features + element_size  # and a scale


def _remap_bytes(out_features: int, in_features: int, element_size: int) -> int:
    small, large = sorted((out_features, in_features))
    return 2 * small + element_size * (large - small + 1)  # and a scale


def _remap_fixed(out_features: int, in_features: int, element_size: int) -> int:
    return min(out_features, in_features) * element_size


def _int8_fixed(out_features: int, in_features: int, element_size: int) -> int:
    return out_features * element_size


register_storage(Storage("plain", _plain_bytes))
# 16: what PyTorch's CPU kernel and the GPU's matrix units take without padding.
register_storage(Storage("remap", _remap_bytes, _remap_fixed, rank_multiple=16))
register_storage(Storage("int8", _int8_bytes, _int8_fixed, rank_multiple=16, dense_storage=DENSE_INT8))
