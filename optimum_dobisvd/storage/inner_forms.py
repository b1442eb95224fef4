"""What one linear weighs in the forms of the quantizers stacked on low rank: GPTQ's and bitsandbytes'.

A form is named by all that decides its bytes: `gptq4_g32` (4 bits, a scale for 32 inputs), `nf4`, `fp4`, `nf4_dq`
(scales quantized once more), `llm_int8`. In a plan such a storage means both factors of a matrix that has a rank, and
the whole matrix where it has none. Bundled with every checkpoint: nothing but the standard library.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_NAME = re.compile(r"gptq([2348])_(?:g(\d+)|rows)")
_WORD = 32
"""GPTQ packs 32 inputs and 32 outputs at a time."""
_BNB_BLOCK = 64
_BNB_NESTED_BLOCK = 256


@dataclass(frozen=True)
class InnerForm:
    """How one linear of `m` outputs and `n` inputs is stored by another library.

    Attributes:
        name: what plans and config.json call it.
        bytes_of: `(m, n, element_size) -> bytes` on disk without the bias, scales and bookkeeping included.
        lost_share: the share of a matrix's energy that rounding takes, for allocators that know no better.
        out_multiple, in_multiple: what outputs and inputs must be multiples of.
    """

    name: str
    bytes_of: Callable[[int, int, int], int]
    lost_share: float
    out_multiple: int = 1
    in_multiple: int = 1

    @property
    def rank_multiple(self) -> int:
        """A rank is the outputs of one factor and the inputs of the other."""
        return math.lcm(self.out_multiple, self.in_multiple)

    def obstacle(self, out_features: int, in_features: int, rank: int | None = None) -> str | None:
        """Why a matrix (or, with a rank, its factors) cannot be stored so; None if it can."""
        if out_features % self.out_multiple:
            return f"{self.name} takes outputs in multiples of {self.out_multiple}, and it has {out_features}"
        if in_features % self.in_multiple:
            return f"{self.name} takes inputs in multiples of {self.in_multiple}, and it has {in_features}"
        if rank is not None and rank % self.rank_multiple:
            return f"{self.name} takes ranks in multiples of {self.rank_multiple}, and it is to have {rank}"
        return None


def gptq_form(bits: int, group_size: int) -> InnerForm:
    """GPTQ's form; a `group_size` of -1 means one scale for all inputs of an output."""

    def size(out_features: int, in_features: int, element_size: int) -> int:
        groups = 1 if group_size == -1 else in_features // group_size
        packed = out_features * in_features * bits // 8
        zeros, scales, group_of_input = out_features * groups * bits // 8, 2 * out_features * groups, 4 * in_features
        return packed + zeros + scales + group_of_input

    return InnerForm(
        f"gptq{bits}_rows" if group_size == -1 else f"gptq{bits}_g{group_size}",
        size,
        # Rounding to a grid whose ends are about 2.4 times the root mean square; GPTQ takes half of that error away.
        lost_share=0.5 * (2.4 * 2 / (2**bits - 1)) ** 2 / 12,
        out_multiple=_WORD,
        in_multiple=_WORD if group_size == -1 else math.lcm(_WORD, group_size),
    )


def four_bit_form(kind: str, nested: bool) -> InnerForm:
    """bitsandbytes' 4 bits, `nf4` or `fp4`; `nested` quantizes the scales, too."""

    def size(out_features: int, in_features: int, element_size: int) -> int:
        count = out_features * in_features
        blocks = -(-count // _BNB_BLOCK)
        state: dict[str, object] = {
            "quant_type": kind,
            "blocksize": _BNB_BLOCK,
            "dtype": "bfloat16" if element_size == 2 else "float32",
            "shape": [out_features, in_features],
        }
        scales = 4 * blocks
        if nested:
            state |= {"nested_blocksize": _BNB_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
            # Its own scales and map; and the offset is written with up to 24 characters.
            scales = blocks + 4 * -(-blocks // _BNB_NESTED_BLOCK) + 4 * 256 + 24 - len("0.0")
        return -(-count // 2) + scales + 4 * 16 + len(json.dumps(state))

    # Blocks that run on into the next row are legal, and bitsandbytes 0.50 unpacks them wrongly on CPUs: errors of
    # half a matrix wherever inputs are a multiple of 16 and not of 64.
    return InnerForm(
        f"{kind}_dq" if nested else kind, size, lost_share=0.008 if kind == "nf4" else 0.02, in_multiple=_BNB_BLOCK
    )


def _llm_int8_bytes(out_features: int, in_features: int, element_size: int) -> int:
    return out_features * in_features + 4 * out_features + 1


_BNB_FORMS = {
    form.name: form
    for form in (
        *(four_bit_form(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)),
        InnerForm("llm_int8", _llm_int8_bytes, lost_share=1e-4),
    )
}


@functools.cache
def inner_form_named(name: str) -> InnerForm | None:
    """The form of that name, None if it is not one."""
    found = _GPTQ_NAME.fullmatch(name)
    if found is None:
        return _BNB_FORMS.get(name)
    group_size = -1 if found[2] is None else int(found[2])
    return gptq_form(int(found[1]), group_size) if group_size else None


def gptq_bits_of(name: str) -> tuple[int, int] | None:
    """Bits and group size of a GPTQ form, None if the name is of another one."""
    found = _GPTQ_NAME.fullmatch(name)
    return None if found is None else (int(found[1]), -1 if found[2] is None else int(found[2]))
