"""The one configuration object: what to compress a model to, and afterwards what it was compressed to."""

from __future__ import annotations

import copy
import difflib
import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import convert_file_size_to_int
from transformers.utils.quantization_config import QuantizationConfigMixin

from .inner import as_applied, inner_config, inner_storage, other_storages, remembered
from .learning.settings import RankTraining
from .methods import Method, method_named
from .storage.costs import DENSE_INT8, STORAGES, dense_storage_named
from .storage.inner_forms import inner_form_named

if TYPE_CHECKING:
    from .allocation.plan import Plan

QUANT_METHOD = "dobi_svd"
MIXED = "mixed"
"""The storage that is none: every matrix gets its own."""
FORMAT_VERSION = 1
"""Version of what is written to config.json and of the tensors; raised when an old reader would misread it."""

# Inputs of a compression run: they may hold tensors, tokenizers or paths of one machine, and mean nothing to a reader.
_RUN_ONLY = ("tokenizer", "batch_size", "statistics", "plan", "device")


@dataclass
class DobiSVDConfig(QuantizationConfigMixin):
    """Configuration of a low-rank compression; pass it as `quantization_config` to `from_pretrained`.

    Args:
        method: row of `METHODS`: `global` (the best without training), `dobi` and `dobi_no_remap` (the paper's),
            `svd_llm_v2`, `svd_llm`, `asvd`, `svd`, `output_pca`, `dobi_ipca`.
        ratio: fraction of the compressed matrices' bytes that is **kept**, `0 < ratio <= 1`. 20 % removed is 0.8. By
            default 0.8, or what `budget` leaves.
        budget: size of the whole checkpoint's tensors instead of a ratio, in bytes or as `"2.8GB"`, `"500MiB"`. (Files
            have a head besides, some hundred bytes a matrix.)
        allocation, factorization, storage: replace one column of the method's row. Storages: `plain` (two factors in
            the model's dtype), `remap` (Dobi-SVD's 8+16 bit), `int8` (both factors in 8 bits), `mixed` (for every
            matrix whichever of all forms, `inner` ones at any bits included, costs the loss least; `global` only).
        inner: quantization stacked on low rank, a `GPTQConfig` or a `BitsAndBytesConfig`: linears, factors and whole
            matrices alike, are stored so. `ratio` and `budget` count its bits, and one of them must be given.
        dense_storage: what becomes of matrices that are not factorized: `dense` (left as they are) or `dense_int8` (in
            8 bits, as far as the budget asks for it). By default what goes with the storage: `dense_int8` with `int8`,
            else `dense`.
        dataset: calibration text: a name (`wikitext2`, `c4`, `ptb`), a path to .txt/.jsonl/.parquet (gz too), a list
            of strings, or token tensors. Not needed by `svd`.
        tokenizer: a tokenizer, its name or path; by default the model's own.
        nsamples, seqlen, seed: that many windows of that many tokens, drawn with that seed.
        gradient_nsamples: of these windows, how many the loss is taken back through by methods that weigh outputs by
            its gradient (`global`); by default half of them.
        fisher: whose labels that loss has: `empirical`, the text's own, or `sampled`, drawn from the model.
        batch_size: windows per forward pass; changes speed and memory only.
        statistics: folder of a statistics store; reused if it fits, created if it does not exist.
        plan: a `Plan` or the path of one; replaces the allocation.
        training: settings of the allocations that learn ranks (`dobi_activation`, `dobi_fixed_basis`), as
            `RankTraining` has them, e.g. `{"steps": 24, "windows": 2}`.
        overrides: per-module settings by name or `re:` pattern, e.g. `{"re:.*down_proj": {"ratio": 0.9}}`; they count
            against the same byte budget. With storage `mixed` such matrices take the form of `inner`, or `int8`.
        modules_to_not_convert: names or `re:` patterns of linears to leave alone. They do not count as targets.
        rank_multiple: ranks are multiples of this; by default what the storage's kernels like (1, in 8 bits 16).
        min_rank: no matrix gets a smaller rank.
        min_coverage: smallest accepted share of the blocks' weights that can be compressed at all (mixture-of-experts
            models keep theirs in fused tensors that are not linears); below it the run is refused.
        device: where calibration and factorization compute, e.g. `cuda`; by default where the weights are. (Rank
            training always runs where the weights are: load the model there.)
        modules: set by `with_plan`: the rank and storage of every compressed matrix. What a loader reads.
    """

    quant_method: str = QUANT_METHOD  # type: ignore[assignment]
    method: str = "global"
    ratio: float | None = None
    budget: int | str | None = None
    allocation: str | None = None
    factorization: str | None = None
    storage: str | None = None
    dense_storage: str | None = None
    inner: Any = None
    dataset: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    nsamples: int = 128
    seqlen: int = 2048
    seed: int = 0
    gradient_nsamples: int | None = None
    fisher: Literal["empirical", "sampled"] = "empirical"
    batch_size: int = 4
    statistics: str | os.PathLike[str] | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] = field(default_factory=list)
    rank_multiple: int | None = None
    min_rank: int = 1
    min_coverage: float = 0.5
    device: str | None = None
    modules: dict[str, dict[str, Any]] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method is {self.quant_method!r}; a DobiSVDConfig is always {QUANT_METHOD!r}")
        _check_version(self.format_version)
        if self.ratio is not None and self.budget is not None:
            raise ValueError("ratio and budget both say how many bytes to keep: give one of them")
        if self.inner is not None and all(each is None for each in (self.ratio, self.budget, self.plan, self.modules)):
            raise ValueError(
                "inner quantizes, and ratio counts its bits (4 bits alone are about 0.28), so the usual 0.8 would "
                "leave it nothing to do: give ratio or budget"
            )
        if self.budget is not None:
            self.budget = _checked_budget(self.budget)
        else:
            self.ratio = _checked_ratio(0.8 if self.ratio is None else self.ratio)
        self.inner = inner_config(self.inner, wished=not self.inner_is_applied)
        self.overrides = dict(self.overrides or {})
        self.training = dict(self.training or {})
        self.modules_to_not_convert = list(self.modules_to_not_convert or [])
        for name in ("nsamples", "seqlen", "batch_size", "rank_multiple", "min_rank"):
            if name != "rank_multiple" or self.rank_multiple is not None:
                _check_integer(name, getattr(self, name), at_least=1)
        _check_integer("seed", self.seed, at_least=0)
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage is a fraction between 0 and 1, got {self.min_coverage}")
        if self.modules is not None:
            _check_modules(self.modules)  # all a loader needs: the method may be one it has never heard of
        else:
            self._check_wish()

    def _check_wish(self) -> None:
        """What matters to a compression only; a compressed checkpoint may come from a version that knows more."""
        method = self.resolved_method()
        if self.dense_storage is not None:
            dense_storage_named(self.dense_storage)
        self._check_storages(method)
        if self.gradient_nsamples is not None:
            _check_integer("gradient_nsamples", self.gradient_nsamples, at_least=1)
        if self.fisher not in ("empirical", "sampled"):
            raise ValueError(f"fisher is 'empirical' or 'sampled', got {self.fisher!r}")
        if not self.training:
            return
        self.training = RankTraining.from_dict(self.training).to_dict()
        if method.learning_mode is None:
            raise ValueError(
                f"training is set, and allocation {method.allocation!r} learns nothing: drop it, or choose the "
                "allocation dobi_fixed_basis or dobi_activation"
            )
        self.rank_training.optimizer_for(method.learning_mode, method.metric, method.factorization)

    def _check_storages(self, method: Method) -> None:
        if self.storage == MIXED:
            if method.allocation != "global" or method.metric != "kfac":
                raise ValueError(
                    "storage 'mixed' weighs forms against each other by what they cost the loss, which only method "
                    f"'global' knows, not {self.method!r} with allocation {method.allocation!r}: take method='global'"
                )
            if self.dense_storage is not None:
                raise ValueError("storage 'mixed' chooses every matrix's form: leave dense_storage out")
        elif self.inner is not None and method.storage != "plain":
            raise ValueError(
                f"inner quantizes linears, and the factors of storage {method.storage!r} are none: leave storage out, "
                "or take storage='mixed' to have both in one model"
            )

    def resolved_method(self) -> Method:
        """The method's row with the overridden columns put in; ValueError names an unknown name and the known ones."""
        storage = None if self.storage == MIXED else self.storage
        if storage is None and self.inner is not None:
            storage = "plain"  # what the inner quantizer takes, whatever the method's own is
        return method_named(self.method, allocation=self.allocation, factorization=self.factorization, storage=storage)

    @property
    def storages(self) -> tuple[str, list[str]]:
        """What factors and whole matrices are stored as by the allocation, and what else it may choose."""
        chosen = inner_storage(self.inner) if self.inner is not None else None
        if self.storage != MIXED:
            return chosen or self.resolved_method().storage, []
        return chosen or "int8", [*other_storages(self.inner), *(("int8",) if chosen else ()), "plain"]

    @property
    def inner_is_applied(self) -> bool:
        """Whether some matrix is stored in the form of another library, so that it is not to be quantized again."""
        return bool(self.inner_forms)

    @property
    def inner_forms(self) -> str:
        """The forms of other libraries that matrices are stored in, in words; empty where there is none."""
        storages = {entry["storage"] for entry in (self.modules or {}).values()}
        return ", ".join(sorted(name for name in storages if inner_form_named(name) is not None))

    @property
    def rank_training(self) -> RankTraining:
        """The settings of the rank training, defaults filled in."""
        return RankTraining.from_dict(self.training)

    @property
    def gradient_windows(self) -> int:
        """How many windows the loss is taken back through."""
        return self.gradient_nsamples if self.gradient_nsamples is not None else (self.nsamples + 1) // 2

    @property
    def is_compressed(self) -> bool:
        """Whether this describes a compressed model (has `modules`) and not a wish."""
        return self.modules is not None

    def with_plan(self, plan: Plan, dataset: str | None = None) -> DobiSVDConfig:
        """A copy that describes the compressed model: the plan's ranks, and none of the run's inputs.

        `dataset` is the words by which the calibration text is remembered.
        """
        modules = {
            name: {"rank": planned.rank, "storage": planned.storage}
            for name, planned in plan.modules.items()
            if not planned.is_dense
        }
        blank: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in _RUN_ONLY}
        # One that was given no matrix is forgotten: at load it would be taken for one that is still to come.
        applied = any(inner_form_named(planned.storage) is not None for planned in plan.modules.values())
        inner = as_applied(self.inner) if applied else None
        return replace(self, modules=modules, dataset=dataset, inner=inner, **blank)

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: everything but the inputs of the run; a dataset by its name only."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _RUN_ONLY}
        for name in ("dense_storage", "inner", "budget"):
            if values[name] is None:
                del values[name]  # versions that do not know it can read the rest
        if self.inner is not None:
            values["inner"] = remembered(self.inner)
        dataset = values["dataset"]
        if isinstance(dataset, str | os.PathLike):
            values["dataset"] = os.path.basename(os.fspath(dataset))
        elif dataset is not None:
            values["dataset"] = f"{type(dataset).__name__} given in memory"
        return copy.deepcopy(values)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Build from a dictionary. An unknown key is an error: a misspelt option must not be ignored."""
        if "format_version" in config_dict:
            _check_version(config_dict["format_version"])
        known = [f.name for f in fields(cls)]
        for key in config_dict:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r} in the dobi_svd quantization config{hint}")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has dobi_svd format {version}, and the installed optimum-dobisvd reads up to "
            f"{FORMAT_VERSION}; upgrade it: pip install -U optimum-dobisvd"
        )


def _checked_budget(budget: Any) -> int:
    """Bytes. ValueError or TypeError for what is no size."""
    if isinstance(budget, bool) or not isinstance(budget, int | str):
        raise TypeError(f"budget must be bytes or a size such as '2.8GB', got {budget!r}")
    if re.search(r"[kmgKMG]b\s*$", str(budget)):
        raise ValueError(f"budget {budget!r} ends in a small b, which means bits: write '2.8GB', '500MB', '1GiB'")
    try:
        size = int(budget) if str(budget).isdecimal() else convert_file_size_to_int(budget)
    except ValueError as error:
        raise ValueError(f"budget {budget!r} is no size: write bytes, or '2.8GB', '500MB', '1GiB'") from error
    if size <= 0:
        raise ValueError(f"budget must be above 0 bytes, got {budget!r}")
    return int(size)


def _checked_ratio(ratio: Any) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio must be a number, got {type(ratio).__name__}")
    if not 0 < ratio <= 1:
        hint = ""
        if 1 < ratio < 100:
            hint = f"; {ratio:g} % kept is ratio={ratio / 100:g}, {ratio:g} % removed is ratio={1 - ratio / 100:g}"
        elif ratio == 0:
            hint = "; nothing removed is ratio=1"
        elif -1 < ratio < 0:
            hint = f"; {-ratio:g} removed is ratio={1 + ratio:g}"
        raise ValueError(f"ratio is the fraction of bytes KEPT, 0 < ratio <= 1, got {ratio}{hint}")
    return float(ratio)


def _check_integer(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def _check_modules(modules: dict[str, dict[str, Any]]) -> None:
    if not isinstance(modules, dict):
        raise ValueError(f"quantization_config.modules must map names to ranks, got {type(modules).__name__}")
    for name, entry in modules.items():
        if not isinstance(entry, dict) or set(entry) != {"rank", "storage"}:
            raise ValueError(f"quantization_config.modules: {name}: expected a rank and a storage, got {entry!r}")
        inner = isinstance(entry["storage"], str) and inner_form_named(entry["storage"]) is not None
        known = [*STORAGES, DENSE_INT8]
        if not inner and entry["storage"] not in known:
            raise ValueError(
                f"{name}: storage {entry['storage']!r} is not known to this version, which reads "
                f"{', '.join(known)}; upgrade it (pip install -U optimum-dobisvd), or mend config.json"
            )
        if inner and entry["rank"] is None:
            continue
        if entry["storage"] != DENSE_INT8:
            _check_integer(f"{name}: rank", entry["rank"], at_least=1)
        elif entry["rank"] is not None:
            raise ValueError(f"{name}: storage 'dense_int8' has no rank, config.json says {entry['rank']!r}; mend it")
