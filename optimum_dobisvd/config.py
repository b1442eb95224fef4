"""The one configuration object: what to compress a model to, and afterwards what it was compressed to."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from .allocation.rank_training import RankTraining
from .config_values import check_integer, check_modules, checked_ratio, size_in_bytes
from .encodings.base import QUANT_METHOD, Encoding
from .encodings.registry import beside, encoding_named, encoding_of, rounded
from .methods import Method, method_named
from .structures.format import Format
from .structures.registry import AUTO, STRUCTURE_SETTINGS

if TYPE_CHECKING:
    from .allocation.plan import Plan

FORMAT_VERSION = 2
"""Version of what is written to config.json and of the tensors; raised when an old reader would misread it."""

RENAMED = {
    "storage": "quantization ('int8', 'remap'), or mixed=True for every matrix its own",
    "inner": "quantization",
    "dense_storage": "quantization: 'int8' stores matrices that are not factorized in 8 bits, too",
}
"""Options of earlier versions, and what says the same now."""

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
        allocation, factorization: replace one column of the method's row.
        structure: how matrices are written: `low_rank`, two factors; `pivoted`, rows of the matrix and the others in
            terms of them; `dense`; or `auto`, whichever of these loses least at its bytes (`global` only, and its
            default; the other methods' is `low_rank`). Matrices that no structure makes smaller stay as they are.
        quantization: how factors and whole matrices are stored: None (the model's dtype; what the method says),
            `"int8"`, `"remap"` (Dobi-SVD's 8+16 bit), a `GPTQConfig`, an `AutoRoundConfig` (GPTQ's tensors, codes
            learned) or a `BitsAndBytesConfig`, or the names of these (`"gptq4_g32"`, `"autoround3_g32"`, `"nf4"`,
            `"llm_int8"`). `ratio` and `budget` count its bits.
        rounding: how codes are chosen, whatever they are stored in: `"nearest"`, each value on its own; `"feedback"`,
            GPTQ's, on the inputs of each linear; `"learned"`, on the outputs of whole blocks (SignRound). By default
            what `quantization` means: `feedback` for GPTQ and 4 bits of bitsandbytes, `learned` for an
            `AutoRoundConfig`, `nearest` for 8 bits.
        rounding_settings: of `"learned"`, as `LearnedRoundingSettings` has them, e.g. `{"steps": 50, "nsamples": 64}`;
            they go before those of an `AutoRoundConfig`.
        mixed: every matrix takes whichever encoding costs the loss least: that of `quantization`, with GPTQ at any
            bits, `int8` or 16 bits (`global` only).
        dataset: calibration text: a name (`wikitext2`, `c4`, `ptb`), a path to .txt/.jsonl/.parquet (gz too), a list
            of strings, or token tensors. Not needed by `svd`.
        tokenizer: a tokenizer, its name or path; by default the model's own.
        nsamples, seqlen, seed: that many windows of that many tokens, drawn with that seed; by default 2048 tokens, or
            as many positions as the model has.
        gradient_nsamples: of these windows, how many the loss is taken back through by methods that weigh outputs by
            its gradient (`global`); by default half of them.
        fisher: whose labels that loss has: `empirical`, the text's own, or `sampled`, drawn from the model.
        batch_size: windows per forward pass; changes speed and memory only.
        statistics: folder of a statistics store; reused if it fits, created if it does not exist.
        plan: a `Plan` or the path of one; replaces the allocation.
        training: settings of the allocations that learn ranks (`dobi_activation`, `dobi_fixed_basis`), as
            `RankTraining` has them, e.g. `{"steps": 24, "windows": 2}`.
        overrides: per-module settings by name or `re:` pattern, e.g. `{"re:.*down_proj": {"ratio": 0.9}}`; they count
            against the same byte budget. With `mixed` such matrices take the encoding of `quantization`, or `int8`.
        modules_to_not_convert: names or `re:` patterns of linears to leave alone. They do not count as targets. What
            is none anyway may be named, too (`lm_head`).
        nontext_modules: compress what text does not pass through, too (the vision tower of a multimodal model, its
            projector); methods that read data then need batches of a processor as `dataset`.
        rank_multiple: ranks are multiples of this; by default what the encoding's kernels like (1, in 8 bits 16).
        min_rank: no matrix gets a smaller rank.
        min_coverage: smallest accepted share of the linears' weights that can be compressed at all; below it the run
            is refused. What is left dense on purpose (routers, `modules_to_not_convert`) counts neither way.
        device: where calibration and factorization compute, e.g. `cuda`; by default where the weights are. (Rank
            training always runs where the weights are: load the model there.)
        modules: set by `with_plan`: structure, rank and encoding of every compressed matrix. What a loader reads.
    """

    quant_method: str = QUANT_METHOD  # type: ignore[assignment]
    method: str = "global"
    ratio: float | None = None
    budget: int | str | None = None
    allocation: str | None = None
    factorization: str | None = None
    structure: str | None = None
    quantization: Any = None
    rounding: str | None = None
    rounding_settings: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    dataset: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    gradient_nsamples: int | None = None
    fisher: Literal["empirical", "sampled"] = "empirical"
    batch_size: int = 4
    statistics: str | os.PathLike[str] | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: list[str] = field(default_factory=list)
    nontext_modules: bool = False
    rank_multiple: int | None = None
    min_rank: int = 1
    min_coverage: float = 0.9
    device: str | None = None
    modules: dict[str, dict[str, Any]] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method is {self.quant_method!r}; a DobiSVDConfig is always {QUANT_METHOD!r}")
        _check_version(self.format_version)
        if self.ratio is not None and self.budget is not None:
            raise ValueError("ratio and budget both say how many bytes to keep: give one of them")
        self.quantization = self._quantization()
        if self.budget is not None:
            self.budget = size_in_bytes(self.budget, "budget")
        else:
            self.ratio = checked_ratio(0.8 if self.ratio is None else self.ratio)
        self.rounding_settings = dict(self.rounding_settings or {})
        if self.rounding is not None or self.rounding_settings:
            _ = self.encoding  # raises for a rounding that it does not go with
        self.overrides = dict(self.overrides or {})
        self.training = dict(self.training or {})
        left = self.modules_to_not_convert or []
        self.modules_to_not_convert = [left] if isinstance(left, str) else list(left)
        optional = [name for name in ("seqlen", "rank_multiple") if getattr(self, name) is not None]
        for name in ("nsamples", "batch_size", *optional, "min_rank"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("seed", self.seed, at_least=0)
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"min_coverage is a fraction between 0 and 1, got {self.min_coverage}")
        if self.modules is not None:
            check_modules(self.modules)  # all a loader needs: the method may be one it has never heard of
        else:
            self._check_request()

    def _quantization(self) -> Any:
        """What was given, as a name or one of transformers' own configurations."""
        if self.quantization is None:
            return None
        encoding = encoding_of(self.quantization, strict=False)
        if not self._has_encoding_of(encoding):
            encoding = encoding_of(self.quantization)  # still to be made: a misspelt option would be dropped silently
        asked = (self.ratio, self.budget, self.plan, self.modules)
        if encoding.settings is not None and all(each is None for each in asked):
            raise ValueError(
                f"ratio counts the bits of quantization ({encoding.name} alone may be about 0.28), so the usual 0.8 "
                "would leave it nothing to do: give ratio or budget"
            )
        return encoding.settings if encoding.settings is not None else encoding.name

    def _check_request(self) -> None:
        """Check what matters to a compression only; a checkpoint may come from a version that knows more."""
        method = self.resolved_method()
        if self.mixed and not method.weighs_loss:
            raise ValueError(
                "mixed weighs encodings against each other by what they cost the loss, which only method 'global' "
                f"knows, not {self.method!r} with allocation {method.allocation!r}: take method='global'"
            )
        if method.structure == AUTO and not method.weighs_loss:
            raise ValueError(
                "structure 'auto' weighs structures against each other by what they cost the loss, which allocation "
                f"{method.allocation!r} with the scores of {method.metric!r} does not: name one, such as 'low_rank'"
            )
        if not self.formats:
            conflict = Format(STRUCTURE_SETTINGS.get(method.structure)[0], self.encoding).conflict
            raise ValueError(f"{conflict}: take structure 'low_rank', or another quantization")
        if self.gradient_nsamples is not None:
            check_integer("gradient_nsamples", self.gradient_nsamples, at_least=1)
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

    def resolved_method(self) -> Method:
        """Return the method's row with overridden columns put in; ValueError names an unknown name and the known."""
        return method_named(
            self.method, allocation=self.allocation, factorization=self.factorization, structure=self.structure
        )

    @property
    def encoding(self) -> Encoding:
        """How factors, and matrices that are not factorized, are stored."""
        if self.quantization is not None:
            found = encoding_of(self.quantization, strict=False)
        else:
            found = encoding_named("int8" if self.mixed else self.resolved_method().encoding)
        return rounded(found, self.rounding, self.rounding_settings)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The format of factors, and others that the allocation may choose for a matrix."""
        encoding, structures = self.encoding, STRUCTURE_SETTINGS.get(self.resolved_method().structure)
        names = dict.fromkeys([encoding.name, *((*encoding.alternatives, "int8", "float") if self.mixed else ())])
        encodings = [beside(encoding, name) for name in names]
        made = [Format(structure, each) for each in encodings for structure in structures]
        return tuple(format for format in made if format.conflict is None)

    @property
    def is_quantized(self) -> bool:
        """Whether some matrix is stored as `quantization` says, so that it is not to be quantized again."""
        return self.quantization is not None and self._has_encoding_of(self.encoding)

    def _has_encoding_of(self, encoding: Encoding) -> bool:
        kinds = {encoding.name, *encoding.alternatives}
        return any(entry["encoding"] in kinds for entry in (self.modules or {}).values())

    @property
    def foreign_encodings(self) -> tuple[str, ...]:
        """Encodings of other libraries that matrices are stored in."""
        names = sorted({entry["encoding"] for entry in (self.modules or {}).values()})
        return tuple(name for name in names if encoding_named(name).quant_method != QUANT_METHOD)

    @property
    def rank_training(self) -> RankTraining:
        """The settings of the rank training, defaults filled in."""
        return RankTraining.from_dict(self.training)

    @property
    def draw(self) -> dict[str, Any]:
        """How windows are drawn from a text: how many, how long (once that is settled), with which seed."""
        return {"nsamples": self.nsamples, "seqlen": self.seqlen, "seed": self.seed}

    @property
    def window_length(self) -> int:
        """Tokens in a window, which `pipeline.windows.with_seqlen` settles. ValueError before that."""
        if self.seqlen is None:
            raise ValueError("seqlen follows the model, and none was looked at yet: give one")
        return self.seqlen

    @property
    def gradient_windows(self) -> int:
        """How many windows the loss is taken back through."""
        return self.gradient_nsamples if self.gradient_nsamples is not None else (self.nsamples + 1) // 2

    @property
    def is_compressed(self) -> bool:
        """Whether this describes a compressed model (has `modules`) and not a request."""
        return self.modules is not None

    def with_plan(self, plan: Plan, dataset: str | None = None) -> DobiSVDConfig:
        """A copy that describes the compressed model: the plan's ranks, and none of the run's inputs.

        `dataset` is the words by which the calibration text is remembered.
        """
        modules = {name: module.to_dict() for name, module in plan.modules.items() if not module.leaves_as_is}
        blank: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in _RUN_ONLY}
        described = replace(self, modules=modules, dataset=dataset, **blank)
        # One that was given no matrix is forgotten: at load it would be taken for one that is still to come.
        quantization = described.encoding.as_applied() if described.is_quantized else None
        return replace(described, quantization=quantization, rounding=None, rounding_settings={})

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into config.json: everything but the inputs of the run; a dataset by its name only."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _RUN_ONLY}
        if self.quantization is not None:
            values["quantization"] = self.encoding.remembered()
        if self.modules is None and self.encoding.learned is not None:  # which a GPTQConfig does not say
            values |= {"rounding": "learned", "rounding_settings": asdict(self.encoding.learned)}
        dataset = values["dataset"]
        if isinstance(dataset, str | os.PathLike):
            values["dataset"] = os.path.basename(os.fspath(dataset))
        elif dataset is not None:
            values["dataset"] = f"{type(dataset).__name__} given in memory"
        return copy.deepcopy(values)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __new__(cls, *_: Any, **given: Any) -> DobiSVDConfig:
        _check_names(given)  # in words, where a dataclass would only say "unexpected keyword argument"
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Build from a dictionary. An unknown key is an error: a misspelt option must not be ignored."""
        if "format_version" in config_dict:
            _check_version(config_dict["format_version"])
        _check_names(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


def default_of(name: str) -> Any:
    """Return the default of a field."""
    found = next(field for field in fields(DobiSVDConfig) if field.name == name)
    return found.default if found.default_factory is MISSING else found.default_factory()


def _check_names(given: Iterable[str]) -> None:
    known = [field.name for field in fields(DobiSVDConfig)]
    for key in given:
        if key in RENAMED:
            raise ValueError(f"the dobi_svd quantization config has no {key!r} any more; write {RENAMED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in the dobi_svd quantization config{hint}")


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"format_version must be a positive integer, got {version!r}")
    if version < FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has dobi_svd format {version}, of a version that was never released: it named 'storage' "
            "and 'inner' where there are 'structure', 'encoding' and 'quantization' now; compress the model again"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has dobi_svd format {version}, and the installed optimum-dobisvd reads up to "
            f"{FORMAT_VERSION}; upgrade it: pip install -U optimum-dobisvd"
        )
