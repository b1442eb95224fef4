"""Options that several commands have in common. Defaults are those of `DobiSVDConfig`; a test holds them together."""

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

INNER = Option(
    "inner",
    "quantization on top: gptq4 (2, 3, 4, 8 bits; gptq4_g32 for groups of 32), nf4, fp4 (nf4_dq: double "
    "quantization), llm_int8, or a GPTQConfig or BitsAndBytesConfig as JSON",
    metavar="FORM",
)

METHOD = (
    Option(
        "method",
        "global, dobi, dobi_no_remap, svd, asvd, svd_llm, svd_llm_v2, output_pca or dobi_ipca",
        default="global",
    ),
    Option(
        "ratio",
        "fraction of the bytes of the compressed matrices to KEEP (default: 0.8, or what --budget leaves; with "
        "--inner one of both must be given)",
        kind=float,
    ),
    Option("budget", "size of the whole checkpoint instead of a ratio, such as 2.8GB", metavar="SIZE"),
    Option(
        "allocation",
        "who shares out the ranks: uniform, svd_llm_v2, global, dobi_fixed_basis or dobi_activation (default: the "
        "method's own)",
    ),
    Option("factorization", "another method's factors (default: the method's own)"),
    Option(
        "storage",
        "form of the factors on disk and in memory: plain, remap (Dobi-SVD's 8+16 bit), int8, or mixed, whichever "
        "form costs the loss least for every matrix (default: the method's own)",
    ),
    INNER,
    Option("dense_storage", "form of matrices that are not factorized: dense or dense_int8 (default: the storage's)"),
    Option(
        "training",
        'settings of allocations that learn ranks, such as {"steps": 24, "windows": 2}',
        kind=dict,
        default={},
    ),
    Option("plan", "take ranks from this plan instead of allocating them", metavar="FILE"),
    Option(
        "overrides",
        'settings of modules by name or re: pattern, {"PATTERN": {"ratio": R} or {"rank": K} or {"dense": true}}',
        kind=dict,
        default={},
        item_flag="--override",
        metavar="PATTERN:JSON",
    ),
    Option(
        "modules_to_not_convert",
        "names or re: patterns of linears to leave alone; they do not count as targets",
        many=True,
        default=[],
        metavar="PATTERN",
    ),
    Option(
        "rank_multiple", "ranks are multiples of this (default: 1; 16 in 8 bits)", kind=int, default=None, metavar="N"
    ),
    Option("min_rank", "smallest rank of any matrix", kind=int, default=1, metavar="N"),
    Option("min_coverage", "smallest accepted share of the weights that can be compressed", kind=float, default=0.5),
)

CALIBRATION = (
    Option(
        "dataset",
        "text: wikitext2, c4, ptb, a .txt/.jsonl/.parquet file (gz too), a glob, or package:NAME/FILES",
        metavar="TEXT",
    ),
    Option("nsamples", "windows of text", kind=int, default=128, metavar="N"),
    Option("seqlen", "tokens in a window", kind=int, default=2048, metavar="N"),
    Option("seed", "of the draw of the windows", kind=int, default=0, metavar="N"),
    Option(
        "gradient_nsamples",
        "windows that the loss is taken back through, by methods that need its gradient (default: half of them)",
        kind=int,
        metavar="N",
    ),
    Option(
        "fisher",
        "labels of that loss: the text's own, or drawn from the model",
        default="empirical",
        choices=("empirical", "sampled"),
    ),
    Option("batch_size", "windows per forward pass", kind=int, default=4, metavar="N"),
    Option(
        "statistics", "folder of calibration statistics: reused where it fits, filled where it is new", metavar="DIR"
    ),
    Option("device", "where to compute, e.g. cuda (default: where the weights are)"),
    Option("device_map", "where to put the weights: cpu, cuda, auto, ... (default: cpu)", metavar="MAP"),
)

# Fields of `DobiSVDConfig`, by the same names; the text is read before it gets there, the map is for loading.
_CONFIG_KEYS = [option.key for option in METHOD + CALIBRATION if option.key not in ("dataset", "device_map")]


def compression_config(options: dict[str, Any], dataset: Any) -> DobiSVDConfig:
    """The configuration these options ask for. Raises ValueError for an impossible value."""
    from ..config import DobiSVDConfig
    from ..inner import inner_from_name

    fields = {key: options[key] for key in _CONFIG_KEYS}
    if fields["inner"] is not None:
        fields["inner"] = inner_from_name(fields["inner"])
    return DobiSVDConfig(dataset=dataset, **fields)


def with_method_resolved(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the method's own columns written out where nothing else was asked for.

    Raises ValueError for an unknown name.
    """
    from ..config import MIXED
    from ..methods import method_named

    chosen = {column: options[column] for column in ("allocation", "factorization", "storage")}
    if chosen["storage"] == MIXED:
        chosen["storage"] = None
    method = method_named(options["method"], **chosen)
    resolved = {**options, "allocation": method.allocation}
    if options["inner"] is None and options["storage"] != MIXED:
        resolved["storage"] = method.storage
    if method.metric == method.factorization:  # naming a factorization changes the metric too
        resolved["factorization"] = method.factorization
    return resolved
