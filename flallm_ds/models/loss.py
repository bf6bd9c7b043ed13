"""From the decoder's hidden states to the loss, without all logits of a large vocabulary at once.

N packed target tokens, E language width, V vocabulary.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flallm_ds.errors import UserError

LossKind = Literal["auto", "logits", "chunks", "liger"]

# Model types whose `Head` is known to give the model's own logits, each by a test.
VERIFIED = {
    *("mbart", "m2m_100", "t5", "mt5"),
    *("qwen2", "qwen3", "llama", "gemma", "gemma2", "gemma3_text"),
    *("mistral", "bloom", "xglm", "cohere", "cohere2", "granite"),
}

# By the attribute of a config that asks for it: what the hidden states are multiplied by.
SCALES: dict[str, Callable[[Any], float]] = {
    "scale_decoder_outputs": lambda config: config.d_model**-0.5,  # T5
    "logit_scale": lambda config: config.logit_scale,  # Cohere
    "logits_scaling": lambda config: 1 / config.logits_scaling,  # Granite
}
SOFTCAP = "final_logit_softcapping"  # Gemma 2 and 3, in the config: logits = cap * tanh(logits / cap)
BIAS = "final_logits_bias"  # mBART, a buffer (1, V) of the model

SMALL_BYTES = 256 * 2**20  # of fp32 logits that "auto" computes in one piece
CHUNK_BYTES = 64 * 2**20  # of fp32 logits of one chunk, at most


@dataclass(frozen=True)
class Head:
    """How hidden states of `llm.get_decoder()` become logits.

    Parts are looked up in the model at each use: engines and adapters replace buffers and modules.
    """

    llm: Any

    @classmethod
    def of(cls, llm: Any) -> "Head | None":
        """The head of a model of a verified type; None for another, whose own logits must then be used."""
        if llm.config.model_type not in VERIFIED or llm.get_output_embeddings() is None:
            return None
        return cls(llm)

    @property
    def embedding(self) -> nn.Module:
        """The output embedding; to be called, never read: ZeRO-3 gathers its weight around the call."""
        module: nn.Module = self.llm.get_output_embeddings()
        return module

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.out_features)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        scale = 1.0
        for attribute, rule in SCALES.items():
            if getattr(self.llm.config, attribute, None):
                scale *= rule(self.llm.config)
        return scale

    @property
    def softcap(self) -> float | None:
        return getattr(self.llm.config, SOFTCAP, None)

    @property
    def bias_V(self) -> torch.Tensor | None:
        bias = getattr(self.llm, BIAS, None)
        return None if bias is None else bias.flatten()

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO-3 has the weight in parts, so that each call is a collective of all ranks."""
        return any(hasattr(p, "ds_id") for p in self.embedding.parameters())

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., V)."""
        logits: torch.Tensor = self.embedding(self.scaled(hidden))
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
    """Cross entropy with label smoothing, summed over tokens, as a scalar in fp32.

    how: "logits" of all tokens in one piece; "chunks" of them, each computed again in the backward pass;
    "liger", liger-kernel's fused loss on CUDA; "auto": liger where it can, else logits while they are small.
    Under ZeRO-3 every rank must call this, with as many tokens as it has, if none.
    Raises UserError where "liger" is asked for and cannot be.
    """
    if how == "liger" or (how == "auto" and why_not_liger(head, hidden_NE.device) is None):
        return _liger_loss(head, hidden_NE, targets_N, label_smoothing)
    if how == "logits":
        return _loss(head, hidden_NE, targets_N, label_smoothing)
    most_tokens = _most_tokens(len(targets_N), head, hidden_NE.device)
    logits_bytes = most_tokens * head.vocab_size * 4
    if how == "auto" and logits_bytes <= SMALL_BYTES:
        return _loss(head, hidden_NE, targets_N, label_smoothing)
    return _chunked_loss(head, hidden_NE, targets_N, label_smoothing, num_chunks(logits_bytes))


def num_chunks(logits_bytes: int) -> int:
    """The least power of two of chunks of at most CHUNK_BYTES.

    A power of two, so that batches of other lengths seldom change it: ZeRO-3 records the order in which
    modules are called and must forget it, and what it would have fetched ahead, when that changes.
    """
    return int(2 ** max(0, (-(-logits_bytes // CHUNK_BYTES) - 1).bit_length()))


def _most_tokens(num_tokens: int, head: Head, device: torch.device) -> int:
    """The largest number of tokens of any rank, where ranks must call the head equally often."""
    if not (head.is_partitioned and torch.distributed.get_world_size() > 1):
        return num_tokens
    most = torch.tensor(num_tokens, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most.item())


def _loss(
    head: Head, hidden_NE: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    logits_NV = head.logits(hidden_NE).float()
    return F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=label_smoothing)


def _chunked_loss(
    head: Head, hidden_NE: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float, chunks: int
) -> torch.Tensor:
    """A rank with fewer tokens than chunks has empty ones, so that all call the head equally often."""
    parts = zip(hidden_NE.tensor_split(chunks), targets_N.tensor_split(chunks), strict=True)
    losses = [
        checkpoint(_loss, head, hidden, targets, label_smoothing, use_reentrant=False)
        for hidden, targets in parts
    ]
    return torch.stack(losses).sum()


def why_not_liger(head: Head, device: torch.device) -> str | None:
    """What stands against liger-kernel's loss, as the end of a sentence; None where nothing does."""
    if device.type != "cuda":
        return "this machine computes without a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install flallm_ds[gpu])"
    if type(head.embedding) is not nn.Linear or head.embedding.bias is not None:
        return f"the output embedding is a {type(head.embedding).__name__} with more than a weight"
    return None


def _liger_loss(
    head: Head, hidden_NE: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    reason = why_not_liger(head, hidden_NE.device)
    if reason is not None:
        raise UserError(
            f"llm.loss=liger must have a CUDA device, liger-kernel and a plain output embedding, but "
            f"{reason}. Use --llm.loss=auto."
        )
    if len(targets_N) == 0:  # its chunk length would be 0
        return _loss(head, hidden_NE, targets_N, label_smoothing)
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(
        reduction="sum", label_smoothing=label_smoothing, softcap=head.softcap, accum_dtype=torch.float32
    )
    embedding = head.embedding

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        # The fused loss casts no operand itself.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias = None if head.bias_V is None else head.bias_V.to(dtype)
        loss: torch.Tensor = fused(embedding.weight.to(dtype), hidden.to(dtype), targets_N, bias)
        return loss

    # Inside a call of the embedding, where ZeRO-3 has gathered its weight.
    embedding.forward = forward
    try:
        loss: torch.Tensor = embedding(head.scaled(hidden_NE))
    finally:
        del embedding.forward
    return loss
