"""Rows of the frontier: one for every way to make the model smaller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHIPPED, OFF_GRID = "as shipped", "off the grid"

# The checkpoint was made from a 4-bit file: 16 values in a block of 32, which encodings of 4 bits and up meet again.
NEARLY_LOSSLESS = "4-bit grid"


@dataclass(frozen=True)
class Row:
    """One checkpoint, measured as it is and healed.

    Attributes:
        name: in the table; unique.
        family: its color in the picture.
        make: how it is made; a key of `MAKERS` in `make.py`.
        options: of that.
        base: the dense model that it is made of.
        mark: a note for readers of the table.
    """

    name: str
    family: str
    make: str
    options: dict[str, Any] = field(default_factory=dict)
    base: str = SHIPPED
    mark: str = ""

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in self.name.lower())

    @property
    def recipe(self) -> dict[str, Any]:
        """Return how it is made, as JSON values: figures and checkpoints of another recipe are not its own."""
        below = self.options.get("on")
        own = {"make": self.make, "options": self.options, "base": self.base}
        return own if below is None else {**own, "below": row_named(below).recipe}


def gptq(bits: int) -> dict[str, Any]:
    """Return the options of GPTQ, the same in every row but for the bits."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": False,
        "desc_act": True,
        "act_group_aware": False,
        "damp_percent": 0.01,
        "true_sequential": False,
    }


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_INT8 = {"load_in_8bit": True}

# Bytes of the compressed matrices over their 16-bit ones at these bits; mixtures are asked to keep to them.
_BYTES_OF_GPTQ = {4: 0.2918, 3: 0.2274, 2: 0.1632}


def _gptq(bits: int, base: str = SHIPPED, mark: str = "") -> Row:
    suffix = "" if base == SHIPPED else f", {base}"
    return Row(f"GPTQ-{bits}{suffix}", "GPTQ", "quantize_dense", {"quantization": gptq(bits)}, base, mark)


# "SVD" are two factors; "auto" and "mixture of structures" take whichever structure loses least.
_TWO_FACTORS = {"structure": "low_rank"}


def _mixture(bits: int, base: str = SHIPPED) -> Row:
    suffix = "" if base == SHIPPED else f", {base}"
    options = {"mixed": True, "ratio": _BYTES_OF_GPTQ[bits], "quantization": gptq(bits), **_TWO_FACTORS}
    return Row(f"mixture, bytes of GPTQ-{bits}{suffix}", "mixture", "compress", options, base)


def _mixture_of_structures(bits: int) -> Row:
    options = {"mixed": True, "ratio": _BYTES_OF_GPTQ[bits], "quantization": gptq(bits)}
    return Row(f"mixture of structures, bytes of GPTQ-{bits}", "mixture", "compress", options)


def _auto(ratio: float) -> Row:
    return Row(f"auto {ratio:g}", "SVD", "compress", {"ratio": ratio})


def _auto_in_8_bits(ratio: float) -> Row:
    return Row(f"auto {ratio:g} int8", "SVD, 8 bits", "compress", {"quantization": "int8", "ratio": ratio})


def _svd(ratio: float) -> Row:
    return Row(f"SVD {ratio:g}", "SVD", "compress", {"ratio": ratio, **_TWO_FACTORS})


def _svd_in_8_bits(ratio: float, quantization: str, mark: str = "") -> Row:
    options = {"quantization": quantization, "ratio": ratio, **_TWO_FACTORS}
    return Row(f"SVD {ratio:g} {quantization}", "SVD, 8 bits", "compress", options, mark=mark)


def _svd_quantized(ratio: float, name: str, quantization: dict[str, Any]) -> Row:
    below = f"SVD {ratio:g}"
    options = {"on": below, "quantization": quantization}
    return Row(f"{below} + {name}", "SVD + 4 bits and fewer", "quantize_low_rank", options)


ROWS: tuple[Row, ...] = (
    Row("dense bf16", "dense", "dense"),
    Row("BnB int8", "bitsandbytes", "bnb", _INT8),
    Row("BnB nf4", "bitsandbytes", "bnb", _NF4, mark=NEARLY_LOSSLESS),
    _gptq(8),
    _gptq(4, mark=NEARLY_LOSSLESS),
    _gptq(3),
    _gptq(2),
    _svd(0.8),
    _svd(0.6),
    _auto(0.8),
    _auto(0.6),
    _svd_in_8_bits(0.6, "remap"),
    _svd_in_8_bits(0.4, "remap"),
    _svd_in_8_bits(0.505, "int8", mark="every matrix dense"),
    _svd_in_8_bits(0.4, "int8"),
    _svd_in_8_bits(0.3, "int8"),
    _auto_in_8_bits(0.4),
    _auto_in_8_bits(0.3),
    _svd_quantized(0.8, "GPTQ-4", gptq(4)),
    _svd_quantized(0.8, "GPTQ-3", gptq(3)),
    _svd_quantized(0.8, "GPTQ-2", gptq(2)),
    _svd_quantized(0.8, "nf4", _NF4),
    _mixture(4),
    _mixture(3),
    _mixture(2),
    _mixture_of_structures(4),
    _mixture_of_structures(3),
    _mixture_of_structures(2),
    Row(f"dense bf16, {OFF_GRID}", "dense", "dense", base=OFF_GRID),
    Row(f"BnB nf4, {OFF_GRID}", "bitsandbytes", "bnb", _NF4, base=OFF_GRID),
    _gptq(4, OFF_GRID),
    _gptq(3, OFF_GRID),
    _mixture(3, OFF_GRID),
)


def row_named(name: str) -> Row:
    """Return the row of that name. ValueError lists the rows there are."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ValueError(f"there is no row {name!r}; there are: {'; '.join(row.name for row in ROWS)}")
