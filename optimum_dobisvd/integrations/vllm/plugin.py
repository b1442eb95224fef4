"""What vLLM calls in every process, whatever model it serves: it registers the method, and touches nothing else."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know checkpoints whose config.json has `quant_method: dobi_svd`. May be called again; never raises.

    Whether this vLLM is supported is asked when such a checkpoint is loaded, so that no other model is disturbed.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from ...encodings.base import QUANT_METHOD
        from .checkpoint_config import CheckpointConfig
    except ImportError as error:
        logger.warning("optimum-dobisvd cannot register with the installed vLLM: %s", error)
        return
    register_quantization_config(QUANT_METHOD)(CheckpointConfig)
