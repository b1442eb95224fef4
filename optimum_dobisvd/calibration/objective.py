"""Whether a model is one of the next token, found by what it computes: the loss that matrices are weighed by is that.

A second objective (the loss of an encoder-decoder, say) would be chosen here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.trial import token_embeddings
from .loss import NextTokenLoss, forward_pass
from .model_inputs import NO_LABEL, own_labels
from .temporarily import differentiable, evaluating, frozen, weights_device, without_cache
from .tokens import token_places

_TOKENS = 32
"""Of one window, which the model is tried on."""

_ROUNDING = 1e-7
"""What a gradient may be that is zero, as a share of the others."""

_ROUGH = 2e-2
"""By how much of itself two computations of a loss may differ in 16 bits."""

AS_CAUSAL_MODEL = "load it as a causal language model"
WITHOUT_GRADIENTS = f"{AS_CAUSAL_MODEL}, or choose a method that reads no gradients and learns nothing (svd_llm_v2)"


@torch.no_grad()
def require_own_loss(model: Any, ids: Tensor, mask: Tensor, *, why: str, remedy: str) -> None:
    """Raise ValueError unless the loss of the tokens that a model predicts is its own, where it gives one for labels.

    For encoder-decoders, and models that read a processor's batch. Arguments as `require_next_token_model`; the ids
    are one window, or one row of such a batch (`SampleIds`).
    """
    ours = NextTokenLoss()
    with evaluating(model), without_cache(model):
        try:
            ours.of(model, ids, mask)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model says that wants more
            text = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{type(model).__name__} has no loss on the calibration data ({type(error).__name__}: {text}), and "
                f"{why}: {remedy}"
            ) from error
        own = _own_loss(model, **own_labels(model, ids, mask))
    found = ours.total / max(ours.tokens, 1)
    if own is not None and ours.tokens and abs(own - found) > _ROUGH * max(1.0, found):
        raise ValueError(
            f"the loss of {type(model).__name__} on the calibration data is {own:.4g}, that of its tokens would be "
            f"{found:.4g}, and {why}: {remedy}"
        )


def require_next_token_model(model: Any, ids: Tensor, mask: Tensor, *, why: str, remedy: str) -> None:
    """Raise ValueError unless the next-token loss is the loss of this model, tried on a few tokens of one window.

    Its logits must not depend on later tokens, and where it gives a loss of its own for labels, that must be the same.

    Args:
        model: with its head.
        ids, mask: windows of text, `N x seqlen`; the mask (bool) is False for padding.
        why, remedy: what needs the next-token loss, and what to do where it is another; for the message.
    """
    texts = (window[keep] for window, keep in zip(ids, mask, strict=True))
    text = next((each for each in texts if len(each) > 1), None)
    if text is None:
        return  # nothing to predict: whoever reads the text says so
    problem = _problem(model, text[None, :_TOKENS])
    if problem is not None:
        raise ValueError(f"{type(model).__name__} is no next-token model ({problem}), and {why}: {remedy}")


@torch.no_grad()
def _problem(model: Any, ids: Tensor) -> str | None:
    """Return why the next-token loss is not this model's; None if it is. `ids` are `1 x tokens`, at least two."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    with evaluating(model), without_cache(model):
        try:
            logits = _logits(model, ids)
            reads_ahead = logits is not None and _reads_ahead(model, ids, logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model says that wants more than a text
            return f"on a text alone it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if logits is None:
            return "it gives no logits for every token"
        loss = float(NextTokenLoss()(logits, ids, mask)) / (ids.shape[1] - 1)
        tolerance = _tolerance(logits)
        own = _own_loss(model, input_ids=ids, labels=ids)
        same = own is None or abs(own - loss) <= tolerance * max(1.0, loss)
        if not same and not reads_ahead:
            # Some (the decoders of BART and its kin) want the labels where they are predicted, one place earlier.
            earlier = _own_loss(
                model, input_ids=ids, labels=torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NO_LABEL)
            )
            same = earlier is not None and abs(earlier - loss) <= tolerance * max(1.0, loss)
    if same and not reads_ahead:
        return None
    losses = f"the next-token loss of a text would be {loss:.4g}" + ("" if own is None else f", its own is {own:.4g}")
    return f"its logits depend on later tokens; {losses}" if reads_ahead else losses


def _logits(model: Any, ids: Tensor) -> Tensor | None:
    """Return a model's logits for every token, None if it gives none."""
    logits = getattr(forward_pass(model, ids, torch.ones_like(ids, dtype=torch.bool), head=True), "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape else None


def _reads_ahead(model: Any, ids: Tensor, logits: Tensor) -> bool:
    """Return whether a model's logits (`1 x tokens x vocabulary`) for the first half depend on the second half.

    By the gradient at the embeddings, which is zero or not in any precision; where there is none, by what other tokens
    change. (Experts that get other tokens beside the same ones may round as much as a weak attention changes.)
    """
    half = ids.shape[1] // 2
    try:
        energies = _gradient_energies(model, ids, half)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no embeddings that say which they are, kernels without a backward pass
        energies = None
    if energies is not None and bool(energies[:half].any()):
        return float(energies[half:].sum()) > _ROUNDING**2 * float(energies.sum())
    changed = _logits(model, _with_another_end(ids, half, logits.shape[-1]))
    if changed is None:
        return False
    before, after = (each[:, :half].double().nan_to_num() for each in (logits, changed))
    return float((after - before).norm()) > _tolerance(logits) * float(before.norm())


def _gradient_energies(model: Any, ids: Tensor, half: int) -> Tensor | None:
    """Return by token how much the logits of the first half depend on its embedding; None where that is not known."""
    leaf: Tensor | None = None
    embeddings = token_embeddings(model)
    if embeddings is None:
        return None

    def add_leaf(_module: Any, _args: Any, output: Tensor) -> Tensor:
        nonlocal leaf
        leaf = torch.zeros_like(output, requires_grad=True)
        return output + leaf

    hook = embeddings.register_forward_hook(add_leaf)
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        try:
            found = differentiable(model, lambda: _logits(model, ids))
        finally:
            hook.remove()
        if found is not None:
            found[:, :half].float().square().mean().backward()
    if leaf is None or leaf.grad is None:
        return None
    places = token_places(leaf.shape[:-1], torch.ones_like(ids))
    energies = leaf.grad.double().square().sum(-1).flatten().cpu()
    return None if places is None else energies[places].sum(1)


def _tolerance(logits: Tensor) -> float:
    return 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2


def _own_loss(model: Any, **inputs: Tensor) -> float | None:
    """Return the mean loss that a model gives itself with these labels; None if it gives none that compares."""
    device = weights_device(model)
    try:
        output = model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it takes no labels, or others
        return None
    loss = getattr(output, "loss", None)
    # With a router's loss in it, it is another number for a model that is one of the next token all the same.
    if not isinstance(loss, Tensor) or loss.numel() != 1 or getattr(output, "aux_loss", None) is not None:
        return None
    return float(loss)


def _with_another_end(ids: Tensor, half: int, vocabulary: int) -> Tensor:
    """Return ids that are others somewhere from place `half` on: those of the text in another order, if it can be."""
    end = ids[:, half:]
    other = end.flip(1)
    return torch.cat([ids[:, :half], (end + 1) % vocabulary if torch.equal(other, end) else other], 1)
