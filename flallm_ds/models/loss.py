"""Cross entropy from the decoder's hidden states, without all logits of a large vocabulary.

N packed target tokens, K tokens of a chunk, E language width, V vocabulary entries.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from flallm_ds.errors import UserError

LossKind = Literal["auto", "logits", "chunks", "liger"]

# Model types for which a test shows that `Head` gives the logits of the model itself.
VERIFIED = {
    *("mbart", "m2m_100", "t5", "mt5"),
    *("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text"),
    *("mistral", "bloom", "xglm", "cohere", "cohere2", "granite"),
}

# The factor of the hidden states, by the attribute of the config that requires it.
SCALES: dict[str, Callable[[Any], float]] = {
    "scale_decoder_outputs": lambda config: config.d_model**-0.5,  # T5
    "logit_scale": lambda config: config.logit_scale,  # Cohere
    "logits_scaling": lambda config: 1 / config.logits_scaling,  # Granite
}
# An attribute of the configs of Gemma 2 and 3: logits = cap * tanh(logits / cap).
SOFTCAP = "final_logit_softcapping"
# A buffer (1, V) of mBART.
BIAS = "final_logits_bias"

# Largest fp32 logits that "auto" computes at once.
SMALL_BYTES = 256 * 2**20
# Largest fp32 logits of a chunk.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Head:
    """The output head of an LLM: logits from the hidden states of `llm.get_decoder()`.

    The parts are looked up in the model at each use, because engines and adapters replace
    buffers and modules.
    """

    llm: Any

    @classmethod
    def of(cls, llm: Any) -> "Head | None":
        """Return the head of a model of a verified type.

        None for another type: then use the logits of the model itself.
        """
        if llm.config.model_type not in VERIFIED or llm.get_output_embeddings() is None:
            return None
        return cls(llm)

    @property
    def embedding(self) -> nn.Module:
        """Return the output embedding.

        Under ZeRO-3 its weight is gathered only within a call of the module.
        """
        module: nn.Module = self.llm.get_output_embeddings()
        return module

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return int(self.embedding.out_features)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """Return the factor of the hidden states."""
        scale = 1.0
        for attribute, rule in SCALES.items():
            if getattr(self.llm.config, attribute, None):
                scale *= rule(self.llm.config)
        return scale

    @property
    def softcap(self) -> float | None:
        """Return the cap of the logits; None for a model without one."""
        return getattr(self.llm.config, SOFTCAP, None)

    @property
    def bias_V(self) -> torch.Tensor | None:
        """Return the bias of the logits; None for a model without one."""
        bias = getattr(self.llm, BIAS, None)
        return None if bias is None else bias.flatten()

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states times their factor."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., E) to logits (..., V)."""
        products: torch.Tensor = self.embedding(self.scaled(hidden))
        return self.finished(products)

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Add the bias to the output of the embedding, and apply the soft cap."""
        if self.bias_V is not None:
            logits = logits + self.bias_V
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_loss(
    head: Head,
    hidden_NE: torch.Tensor,
    targets_N: torch.Tensor,
    label_smoothing: float,
    how: LossKind = "auto",
) -> torch.Tensor:
    """Return the cross entropy with label smoothing, summed over tokens: a scalar in fp32.

    how: "logits" computes the logits of all tokens at once; "chunks" computes the logits
    and the gradients of a part of the tokens at a time; "liger" is the fused loss of
    liger-kernel on CUDA; "auto" takes liger if possible, else logits if they are small,
    else chunks. Each one calls the output embedding once, so that all ranks gather it
    equally often under ZeRO-3, whatever their numbers of tokens. Raises UserError if
    "liger" or "chunks" is not possible.
    """
    reasons = {
        "chunks": why_not_plain(head),
        "liger": why_not_liger(head, hidden_NE.device),
    }
    if how == "auto":
        # 4 bytes for each fp32 logit.
        are_small = 4 * len(targets_N) * head.vocab_size <= SMALL_BYTES
        if reasons["chunks"] is not None:
            how = "logits"
        elif reasons["liger"] is None:
            how = "liger"
        else:
            how = "logits" if are_small else "chunks"
    reason = reasons.get(how)
    if reason is not None:
        raise UserError(
            f"Cannot compute the loss with llm.loss={how}: {reason}. Give --llm.loss=auto."
        )
    # A rank without tokens calls the embedding as well, for the gather of ZeRO-3.
    if how == "logits" or len(targets_N) == 0:
        logits_NV = head.logits(hidden_NE).float()
        return F.cross_entropy(
            logits_NV, targets_N, reduction="sum", label_smoothing=label_smoothing
        )
    # Chunks and liger compute the matrix product with the weight themselves.
    loss = _liger if how == "liger" else _chunked
    embedding = head.embedding
    assert isinstance(embedding, nn.Linear)

    def forward(hidden_NE: torch.Tensor) -> torch.Tensor:
        return loss(head, embedding.weight, hidden_NE, targets_N, label_smoothing)

    # ZeRO-3 gathers the weight before the forward of the embedding and frees it afterwards,
    # so the loss is computed instead of that forward.
    embedding.forward = forward  # type: ignore[method-assign, assignment]
    try:
        summed: torch.Tensor = embedding(head.scaled(hidden_NE))
    finally:
        del embedding.forward
    return summed


def why_not_plain(head: Head) -> str | None:
    """Return why the head is more than a matrix product; None if it is just that."""
    embedding = head.embedding
    if type(embedding) is nn.Linear and embedding.bias is None:
        return None
    return f"the output embedding is not a Linear without bias ({embedding})"


def why_not_liger(head: Head, device: torch.device) -> str | None:
    """Return why the loss of liger-kernel is not possible; None if it is."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'flallm_ds[gpu]')"
    return why_not_plain(head)


def _operand_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the type in which a matrix product is computed here."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _liger(
    head: Head,
    weight_VE: torch.Tensor,
    hidden_NE: torch.Tensor,
    targets_N: torch.Tensor,
    label_smoothing: float,
) -> torch.Tensor:
    """Return the loss of liger-kernel, in fp32. hidden_NE: scaled."""
    # Not imported at the top: the package is optional.
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    fused = LigerFusedLinearCrossEntropyLoss(
        reduction="sum",
        label_smoothing=label_smoothing,
        softcap=head.softcap,
        accum_dtype=torch.float32,
    )
    dtype = _operand_dtype(hidden_NE)  # liger-kernel casts nothing itself
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    loss: torch.Tensor = fused(weight_VE.to(dtype), hidden_NE.to(dtype), targets_N, bias_V)
    return loss.float()


def _chunked(
    head: Head,
    weight_VE: torch.Tensor,
    hidden_NE: torch.Tensor,
    targets_N: torch.Tensor,
    label_smoothing: float,
) -> torch.Tensor:
    """Return the loss by chunks of tokens, in fp32. hidden_NE: scaled."""
    loss: torch.Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NE, weight_VE, targets_N, head, label_smoothing, torch.is_grad_enabled()
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Compute the loss and its gradients chunk by chunk in the forward pass.

    No logits are kept or computed twice. This is the idea of liger-kernel's fused loss (Hsu
    et al. 2024, arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: torch.Tensor,
        weight_VE: torch.Tensor,
        targets_N: torch.Tensor,
        head: Head,
        label_smoothing: float,
        with_gradients: bool,
    ) -> torch.Tensor:
        """Return the loss, a scalar in fp32, and keep the gradients for `backward`."""
        ctx.dtypes = hidden_NE.dtype, weight_VE.dtype
        dtype = _operand_dtype(hidden_NE)
        hidden_NE, weight_VE = hidden_NE.to(dtype), weight_VE.to(dtype)

        # Only the gradients that are needed are computed.
        gradient_NE = gradient_VE = None
        if with_gradients and ctx.needs_input_grad[0]:
            gradient_NE = torch.empty_like(hidden_NE)
        if with_gradients and ctx.needs_input_grad[1]:
            # Summed in fp32: a sum of many chunks in bf16 loses what the last ones add.
            gradient_VE = torch.zeros_like(weight_VE, dtype=torch.float32)

        # 4 bytes for each of V logits of a token.
        loss = hidden_NE.new_zeros((), dtype=torch.float32)
        length = max(1, CHUNK_BYTES // (4 * len(weight_VE)))
        with torch.autocast(hidden_NE.device.type, enabled=False):
            for begin in range(0, len(hidden_NE), length):
                part = slice(begin, begin + length)
                hidden_KE, targets_K = hidden_NE[part], targets_N[part]

                # The logits and the loss of this chunk. Autograd sees only the steps from
                # the matrix product to the loss.
                products_KV = (hidden_KE @ weight_VE.T).requires_grad_(with_gradients)
                with torch.set_grad_enabled(with_gradients):
                    logits_KV = head.finished(products_KV).float()
                    chunk_loss = F.cross_entropy(
                        logits_KV,
                        targets_K,
                        reduction="sum",
                        label_smoothing=label_smoothing,
                    )
                loss += chunk_loss.detach()
                if not with_gradients:
                    continue

                # The gradients of the chunk, by the chain rule through the matrix product.
                (gradient_KV,) = torch.autograd.grad(chunk_loss, products_KV)
                if gradient_NE is not None:
                    torch.mm(gradient_KV, weight_VE, out=gradient_NE[part])
                if gradient_VE is not None:
                    _add_product(gradient_VE, gradient_KV.T, hidden_KE)
        ctx.save_for_backward(gradient_NE, gradient_VE)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs. factor: the gradient of the loss."""
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            scaled = None if gradient is None else gradient.mul_(factor).to(dtype)
            gradients.append(scaled)
        return (*gradients, None, None, None, None)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `total`, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
