"""What a matrix weighs on disk, per storage: the cost curve that rank allocation spends a byte budget on."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from .inner_forms import InnerForm, inner_form_named

DENSE = "dense"
"""The storage name a plan writes for a matrix that is left as it is."""
DENSE_INT8 = "dense_int8"
"""And for one that is left whole, in 8 bits."""


@dataclass(frozen=True)
class Storage:
    """The cost curve of one storage of the factors `second` (m×k) and `first` (k×n).

    Attributes:
        name: what plans and configs call it.
        factor_bytes: `(m, n, k, element_size) -> bytes` of both factors on disk, scales included; grows with `k`. `m`
            is out_features, `n` is in_features, `element_size` is the bytes of one element of the dense weight.
        rank_multiple: what ranks are multiples of unless the user says otherwise: what its kernels take without
            copying.
        dense_storage: what a matrix that is not factorized is stored as, unless the user says otherwise.
        lost_share: the share of the kept energy that rounding the factors takes, for allocators that know no better.
        form: the other library's form that both factors have, None for our own.
    """

    name: str
    factor_bytes: Callable[[int, int, int, int], int]
    rank_multiple: int = 1
    dense_storage: str = DENSE
    lost_share: float = 0.0
    form: InnerForm | None = None

    def bytes_at(self, out_features: int, in_features: int, rank: int, element_size: int) -> int:
        """Bytes of both factors on disk, scales included."""
        return self.factor_bytes(out_features, in_features, rank, element_size)

    def largest_rank_below(self, size: int, out_features: int, in_features: int, element_size: int) -> int:
        """The largest rank whose factors take less than `size` bytes (those of the dense matrix: the break-even rank).

        0 where there is none.
        """
        ranks = range(1, min(out_features, in_features) + 1)
        return bisect.bisect_left(
            ranks, size, key=lambda rank: self.factor_bytes(out_features, in_features, rank, element_size)
        )

    def obstacle(self, out_features: int, in_features: int, rank: int | None = None) -> str | None:
        """Why factors of such a matrix (of that rank) cannot be stored so; None if they can."""
        return None if self.form is None else self.form.obstacle(out_features, in_features, rank)


@dataclass(frozen=True)
class DenseStorage:
    """How a whole matrix is stored.

    Attributes:
        name: what plans and configs call it.
        bytes_of: `(m, n, element_size) -> bytes` on disk, scales included.
        lost_share: the share of a matrix's energy that rounding it takes, for allocators that weigh it against ranks.
        form: the other library's form, None for our own.
    """

    name: str
    bytes_of: Callable[[int, int, int], int]
    lost_share: float
    form: InnerForm | None = None


STORAGES: dict[str, Storage] = {}
DENSE_STORAGES = {
    DENSE: DenseStorage(DENSE, lambda m, n, element_size: m * n * element_size, lost_share=0.0),
    # Uniform rounding of rows whose largest value is about four times their root mean square: (4 / 127)^2 / 12.
    DENSE_INT8: DenseStorage(DENSE_INT8, lambda m, n, element_size: m * n + m * element_size, lost_share=8e-5),
}


def register_storage(storage: Storage) -> None:
    """Adds a storage to `STORAGES`.

    Raises:
        ValueError: the name is taken, empty, or that of a dense storage or of another library's form.
    """
    if not storage.name or storage.name in DENSE_STORAGES or inner_form_named(storage.name) is not None:
        raise ValueError(f"a storage cannot be called {storage.name!r}; choose another name")
    if storage.name in STORAGES:
        raise ValueError(f"storage {storage.name!r} is already registered; choose another name")
    STORAGES[storage.name] = storage


def storage_named(name: str) -> Storage:
    """The registered storage of that name, or that of factors in another library's form.

    Raises:
        ValueError: there is none; the message lists the names there are.
    """
    # A name may come straight from a hand-edited JSON file, so it need not be a string (nor hashable).
    if isinstance(name, str):
        if name in STORAGES:
            return STORAGES[name]
        form = inner_form_named(name)
        if form is not None:
            return _inner_storage(form)
    raise ValueError(f"unknown storage {name!r}; known storages: {', '.join(sorted(STORAGES))}, {_INNER_EXAMPLES}")


def dense_storage_named(name: str) -> DenseStorage:
    """The storage of whole matrices of that name.

    Raises:
        ValueError: there is none; the message lists the names there are.
    """
    if isinstance(name, str):
        if name in DENSE_STORAGES:
            return DENSE_STORAGES[name]
        form = inner_form_named(name)
        if form is not None:
            return DenseStorage(name, form.bytes_of, form.lost_share, form)
    raise ValueError(f"unknown dense storage {name!r}; known: {', '.join(DENSE_STORAGES)}, {_INNER_EXAMPLES}")


_INNER_EXAMPLES = "and with inner quantization such as gptq4_g32, nf4 or llm_int8"


def dense_levels(name: str, out_features: int, in_features: int, element_size: int) -> tuple[DenseStorage, ...]:
    """The whole forms a matrix can take, smallest first: the named one, and the larger ones of our own.

    Beside another library's form, `dense_int8` is always a choice.
    """
    shape = (out_features, in_features, element_size)
    named = dense_storage_named(name)
    forms = [named] if named.form is None or named.form.obstacle(out_features, in_features) is None else []
    if named.form is not None:
        forms.append(DENSE_STORAGES[DENSE_INT8])
    plain = DENSE_STORAGES[DENSE]
    smaller = [form for form in forms if form.bytes_of(*shape) < plain.bytes_of(*shape)]
    return (*sorted(smaller, key=lambda form: form.bytes_of(*shape)), plain)


def _inner_storage(form: InnerForm) -> Storage:
    def factor_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
        first, second = (rank, in_features, element_size), (out_features, rank, element_size)
        return form.bytes_of(*first) + form.bytes_of(*second)

    return Storage(form.name, factor_bytes, form.rank_multiple, form.name, lost_share=2 * form.lost_share, form=form)


def _plain_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
    return rank * (out_features + in_features) * element_size


def _int8_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
    scales = out_features + rank
    return rank * (out_features + in_features) + scales * element_size


def _remap_bytes(out_features: int, in_features: int, rank: int, element_size: int) -> int:
    small, large = sorted((out_features, in_features))
    return rank * (2 * small + element_size * (large - small)) + element_size * (small + rank)


register_storage(Storage("plain", _plain_bytes))
# 16: what PyTorch's CPU kernel and the GPU's matrix units take without padding.
register_storage(Storage("remap", _remap_bytes, rank_multiple=16))
register_storage(Storage("int8", _int8_bytes, rank_multiple=16, dense_storage=DENSE_INT8))
