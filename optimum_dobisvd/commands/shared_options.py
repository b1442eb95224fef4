"""Options that several commands have in common. Defaults are those of `DobiSVDConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import Option

if TYPE_CHECKING:
    from ..config import DobiSVDConfig

DTYPE = Option(
    "dtype",
    "dtype to load weights in; auto is the checkpoint's own",
    default="auto",
    choices=("auto", "float32", "bfloat16", "float16"),
)
TRUST_REMOTE_CODE = Option(
    "trust_remote_code", "run model code that comes with the checkpoint", kind=bool, default=False
)

MODEL = (
    Option("model", "hub id, folder, .gguf file, or package:NAME/FILE", required=True, metavar="ID_OR_DIR"),
    Option("gguf_file", "name of a GGUF file in that repository or folder", metavar="FILE"),
    DTYPE,
    TRUST_REMOTE_CODE,
)

QUANTIZATION_HELP = (
    "how factors and dense matrices are stored: int8, remap (Dobi-SVD's 8+16 bit), gptq4 (2, 3, 4, 8 bits; gptq4_g32 "
    "for groups of 32), autoround4 (the same, codes learned), nf4, fp4 (nf4_dq: double quantization), llm_int8, or a "
    "GPTQConfig, AutoRoundConfig or BitsAndBytesConfig as JSON"
)

ROUNDING = (
    Option(
        "rounding",
        "how codes are chosen: nearest, feedback (GPTQ's) or learned on the outputs of whole blocks (default: what "
        "the quantization means: feedback for GPTQ and nf4, learned for autoround, nearest in 8 bits)",
        choices=("nearest", "feedback", "learned"),
    ),
    Option(
        "rounding_settings",
        'of --rounding learned, such as {"steps": 50, "nsamples": 64}; of feedback, {"target": "dense"} '
        "to aim at the dense model's outputs",
        kind=dict,
        from_config=True,
        metavar="JSON",
    ),
)

METHOD = (
    Option(
        "method",
        "global, dobi, dobi_no_remap, svd, asvd, svd_llm, svd_llm_v2, output_pca or dobi_ipca",
        from_config=True,
    ),
    Option(
        "ratio",
        "fraction of the bytes of the compressed matrices to KEEP (default: 0.8, or what --budget leaves; with "
        "GPTQ or bitsandbytes one of both must be given)",
        kind=float,
    ),
    Option("budget", "size of the whole checkpoint instead of a ratio, such as 2.8GB", metavar="SIZE"),
    Option(
        "allocation",
        "who shares out the ranks: uniform, svd_llm_v2, global, dobi_fixed_basis or dobi_activation (default: the "
        "method's own)",
    ),
    Option("factorization", "another method's factors (default: the method's own)"),
    Option("structure", "how matrices are written: auto, low_rank, pivoted or dense (default: the method's own)"),
    Option(
        "quantization",
        f"{QUANTIZATION_HELP} (default: the model's dtype, or what the method says)",
        metavar="ENCODING",
    ),
    *ROUNDING,
    Option(
        "mixed",
        "every matrix takes whichever encoding costs the loss least: that of --quantization (GPTQ at any bits), int8 "
        "or 16 bits",
        kind=bool,
        default=False,
    ),
    Option(
        "training",
        'settings of allocations that learn ranks, such as {"steps": 24, "windows": 2}',
        kind=dict,
        from_config=True,
    ),
    Option("plan", "take ranks from this plan instead of allocating them", metavar="FILE"),
    Option(
        "overrides",
        'settings of modules by name or re: pattern, {"PATTERN": {"ratio": R} or {"rank": K} or {"dense": true}}',
        kind=dict,
        from_config=True,
        item_flag="--override",
        metavar="PATTERN:JSON",
    ),
    Option(
        "modules_to_not_convert",
        "names or re: patterns of linears to leave alone; they do not count as targets",
        many=True,
        from_config=True,
        metavar="PATTERN",
    ),
    Option(
        "nontext_modules",
        "compress what text does not pass through, too, such as a vision tower (by methods that read no data: here "
        "data is text)",
        kind=bool,
        default=False,
    ),
    Option(
        "rank_multiple",
        "ranks are multiples of this (default: 1; 16 in 8 bits)",
        kind=int,
        from_config=True,
        metavar="N",
    ),
    Option("min_rank", "smallest rank of any matrix", kind=int, from_config=True, metavar="N"),
    Option(
        "min_coverage", "smallest accepted share of the weights that can be compressed", kind=float, from_config=True
    ),
)

CALIBRATION = (
    Option(
        "dataset",
        "text: wikitext2, c4, ptb, a .txt/.jsonl/.parquet file (gz too), a glob, or package:NAME/FILES",
        metavar="TEXT",
    ),
    Option("nsamples", "windows of text", kind=int, from_config=True, metavar="N"),
    Option(
        "seqlen", "tokens in a window (default: 2048, or as many positions as the model has)", kind=int, metavar="N"
    ),
    Option("seed", "of the draw of the windows", kind=int, from_config=True, metavar="N"),
    Option(
        "gradient_nsamples",
        "windows that the loss is taken back through, by methods that need its gradient (default: half of them)",
        kind=int,
        metavar="N",
    ),
    Option(
        "fisher",
        "labels of that loss: the text's own, or drawn from the model",
        from_config=True,
        choices=("empirical", "sampled"),
    ),
    Option("batch_size", "windows per forward pass", kind=int, from_config=True, metavar="N"),
    Option(
        "statistics", "folder of calibration statistics: reused where it fits, filled where it is new", metavar="DIR"
    ),
    Option("device", "where to compute, e.g. cuda (default: where the weights are)"),
    Option("device_map", "where to put the weights: cpu, cuda, auto, ... (default: cpu)", metavar="MAP"),
)

# Fields of `DobiSVDConfig`, by the same names; the text is read before it gets there, the map is for loading.
_CONFIG_KEYS = [option.key for option in METHOD + CALIBRATION if option.key not in ("dataset", "device_map")]


def compression_config(options: dict[str, Any], dataset: Any) -> DobiSVDConfig:
    """Return the configuration these options ask for. Raises ValueError for an impossible value."""
    from ..config import DobiSVDConfig

    return DobiSVDConfig(dataset=dataset, **{key: options[key] for key in _CONFIG_KEYS})


def with_method_resolved(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with defaults and the method's own columns written out where nothing else was asked for.

    Raises ValueError for an unknown name.
    """
    from ..config import default_of
    from ..methods import method_named

    options = {
        key: default_of(key) if value is None and key in _CONFIG_KEYS else value for key, value in options.items()
    }
    columns = ("allocation", "factorization", "structure")
    method = method_named(options["method"], **{column: options[column] for column in columns})
    resolved = {**options, "allocation": method.allocation, "structure": method.structure}
    if options["quantization"] is None and not options["mixed"] and method.encoding != "float":
        resolved["quantization"] = method.encoding
    if method.metric == method.factorization:  # naming a factorization changes the metric too
        resolved["factorization"] = method.factorization
    return resolved
