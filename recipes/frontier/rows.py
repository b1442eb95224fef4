"""What the frontier is made of: one row for every way to make the model smaller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHIPPED, OFF_GRID = "as shipped", "off the grid"

# The checkpoint was made from a 4-bit file: 16 values in a block of 32, which forms of 4 bits and up meet again.
NEARLY_LOSSLESS = "4-bit grid"


@dataclass(frozen=True)
class Row:
    """One checkpoint, later measured as it is and healed.

    Attributes:
        name: in the table; unique.
        family: its color in the picture.
        make: how; see `make.py`.
        options: of that.
        base: which dense model it is made of.
        mark: what to know when reading it.
    """

    name: str
    family: str
    make: str
    options: dict[str, Any] = field(default_factory=dict)
    base: str = SHIPPED
    mark: str = ""

    @property
    def slug(self) -> str:
        """Its folder."""
        return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in self.name.lower())

    @property
    def recipe(self) -> dict[str, Any]:
        """How it is made, as JSON values: figures and checkpoints of another recipe are not its own."""
        below = self.options.get("on")
        own = {"make": self.make, "options": self.options, "base": self.base}
        return own if below is None else {**own, "below": row_named(below).recipe}


def gptq(bits: int) -> dict[str, Any]:
    """The options of GPTQ, the same in every row."""
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


def _whole(bits: int, base: str = SHIPPED, mark: str = "") -> Row:
    suffix = "" if base == SHIPPED else f", {base}"
    return Row(f"GPTQ-{bits}{suffix}", "GPTQ", "whole", {"inner": gptq(bits)}, base, mark)


def _mixture(bits: int, base: str = SHIPPED) -> Row:
    suffix = "" if base == SHIPPED else f", {base}"
    options = {"storage": "mixed", "ratio": _BYTES_OF_GPTQ[bits], "inner": gptq(bits)}
    return Row(f"mixture, bytes of GPTQ-{bits}{suffix}", "mixture", "compress", options, base)


def _svd(ratio: float, storage: str = "plain", mark: str = "") -> Row:
    family = "SVD" if storage == "plain" else "SVD, 8 bits"
    name = f"SVD {ratio:g}" if storage == "plain" else f"SVD {ratio:g} {storage}"
    return Row(name, family, "compress", {"storage": storage, "ratio": ratio}, mark=mark)


def _stacked(ratio: float, name: str, inner: dict[str, Any]) -> Row:
    below = f"SVD {ratio:g}"
    return Row(f"{below} + {name}", "SVD + 4 bits and fewer", "stack", {"on": below, "inner": inner})


ROWS: tuple[Row, ...] = (
    Row("dense bf16", "dense", "dense"),
    Row("BnB int8", "bitsandbytes", "bnb", _INT8),
    Row("BnB nf4", "bitsandbytes", "bnb", _NF4, mark=NEARLY_LOSSLESS),
    _whole(8),
    _whole(4, mark=NEARLY_LOSSLESS),
    _whole(3),
    _whole(2),
    _svd(0.8),
    _svd(0.6),
    _svd(0.6, "remap"),
    _svd(0.4, "remap"),
    _svd(0.505, "int8", mark="every matrix whole"),
    _svd(0.4, "int8"),
    _svd(0.3, "int8"),
    _stacked(0.8, "GPTQ-4", gptq(4)),
    _stacked(0.8, "GPTQ-3", gptq(3)),
    _stacked(0.8, "GPTQ-2", gptq(2)),
    _stacked(0.8, "nf4", _NF4),
    _mixture(4),
    _mixture(3),
    _mixture(2),
    Row(f"dense bf16, {OFF_GRID}", "dense", "dense", base=OFF_GRID),
    Row(f"BnB nf4, {OFF_GRID}", "bitsandbytes", "bnb", _NF4, base=OFF_GRID),
    _whole(4, OFF_GRID),
    _whole(3, OFF_GRID),
    _mixture(3, OFF_GRID),
)


def row_named(name: str) -> Row:
    """ValueError lists the rows there are."""
    for row in ROWS:
        if row.name == name:
            return row
    raise ValueError(f"there is no row {name!r}; there are: {'; '.join(row.name for row in ROWS)}")
