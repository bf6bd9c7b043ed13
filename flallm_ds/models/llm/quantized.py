"""Checkpoints with quantised weights: fp8 and mxfp4 become ordinary tensors, others are refused.

Their tensors come in parts: a weight of few bits and its scales. What loads one without
the other trains on garbage, so each method is known by its config and by the names of its
parts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flallm_ds.errors import UserError
from flallm_ds.models.llm.stored import StoredTensor

READ = ("fp8", "mxfp8", "mxfp4")
# Scales of inputs, which stay in full precision.
_UNUSED = re.compile(r"\.(activation_scale|input_scale)$")
_PARTS = {
    "fp8": re.compile(r"_scale_inv$"),
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "bitsandbytes": re.compile(
        r"\.(SCB|weight_format)$"
        r"|\.(absmax|nested_absmax|quant_map|quant_state\.)",
    ),
    "mxfp4": re.compile(r"_proj_(blocks|scales)$"),
    "compressed-tensors or ModelOpt": re.compile(
        r"\.(weight_(packed|scale(_2)?|shape|zero_point|global_scale)|input_scale)$"
    ),
}


def quantization_of(config: Any) -> dict[str, Any]:
    """The settings that a model's config holds of its quantisation; empty where there is none."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def method_of(settings: Mapping[str, Any]) -> str:
    """transformers' name of the method; empty for a model without one."""
    method = settings.get("quant_method")
    if method is None and settings:
        is_bitsandbytes = any(key.startswith("load_in_") for key in settings)
        method = "bitsandbytes" if is_bitsandbytes else "an unknown method"
    return str(getattr(method, "value", method) or "")


def must_be_readable(name: str, method: str) -> None:
    """Raise UserError for a method that cannot be undone here."""
    if method and method not in READ:
        raise UserError(
            f"the LLM {name} must have weights that can be trained, but is quantised with "
            f"{method}. Name the unquantised model that it was made from (--llm.bits=4 or "
            "8 quantises that one while it loads)."
        )


def must_be_plain(name: str, names: Iterable[str]) -> None:
    """Raise UserError for names of tensors that are parts of quantised weights."""
    for key in names:
        for method, part in _PARTS.items():
            if part.search(key):
                raise UserError(
                    f"the LLM {name} must have weights that can be trained, but its tensor "
                    f"{key} is a part of weights quantised with {method}, of which its "
                    "config.json says nothing that can be used. Name the unquantised model "
                    "that it was made from."
                )


class DequantizedTensor(StoredTensor):
    """A weight and its scales as one tensor, computed whenever its values are asked for."""

    weight: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor,
        block: tuple[int, int] | None,
        dtype: torch.dtype,
    ) -> "DequantizedTensor":
        """block: rows and columns that share a scale of fp8; None: as many as the shapes say.

        An mxfp4 weight is uint8: (experts, outputs, groups, 16) of two numbers a byte.
        """
        shape = weight.shape
        if weight.dtype == torch.uint8:
            shape = torch.Size((shape[0], shape[2] * shape[3] * 2, shape[1]))
        wrap: Any = torch.Tensor._make_wrapper_subclass
        tensor: DequantizedTensor = wrap(cls, shape, dtype=dtype)
        tensor.weight, tensor.scale, tensor.block = weight, scale, block
        return tensor

    def read(self) -> torch.Tensor:
        weight, scale = _values(self.weight), _values(self.scale)
        if weight.dtype == torch.uint8:
            whole: torch.Tensor = convert_moe_packed_tensors(
                weight, scale, dtype=self.dtype
            )
            return whole.contiguous().view(self.shape)
        scales = _spread(scale, weight.shape, self.block)
        return (weight.float() * scales).to(self.dtype)

    def blocks(self) -> Iterator[torch.Tensor]:
        yield from torch.split(self.read(), self.rows_at_once)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def _spread(
    scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None
) -> torch.Tensor:
    """fp32 scales that broadcast to a weight of this shape.

    Raises ValueError for the scales of another shape.
    """
    if scale.dtype == torch.uint8:  # an exponent
        scale = (scale.float() - 127).exp2()
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:  # one a row, or one an expert
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    # The scale of a block is repeated for each row and column; the last block may be cut
    # off.
    for dim, step in zip((-2, -1), block or (1, 1), strict=True):
        size = shape[dim]
        if scale.shape[dim] == -(-size // step):
            scale = scale.repeat_interleave(step, dim).narrow(dim, 0, size)
        elif scale.shape[dim] != 1:
            raise ValueError(f"{tuple(scale.shape)} is not of {tuple(shape)}")
    return scale


def _scales_must_fit(
    name: str,
    key: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] | None,
) -> None:
    try:
        _spread(torch.empty(scale.shape, device="meta"), weight.shape, block).expand(
            weight.shape
        )
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"the scales of the LLM {name} must fit their weights, but of {key} "
            f"{tuple(weight.shape)} they are {tuple(scale.shape)} where its config.json "
            f"says blocks of {block}. Fetch it again, or name the unquantised model that "
            "it was made from."
        ) from error


def dequantized(
    name: str,
    state: dict[str, torch.Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with each weight and its scales as one, computed when it is read.

    Raises UserError where a weight of few bits lacks its scales, or has others than its
    config says.
    """
    method = method_of(settings)
    must_be_readable(name, method)
    if not method:
        must_be_plain(name, state)
        return state
    size = settings.get("weight_block_size")
    block = (int(size[0]), int(size[1])) if size else None
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        whole = re.sub(r"(_scale_inv|_scales)$", "", key)
        if whole != key and (whole in state or f"{whole}_blocks" in state):
            continue  # goes with its weight
        if _UNUSED.search(key):
            continue
        # fp8 names the scales of W W_scale_inv; mxfp4 stores W as W_blocks and W_scales.
        scale = state.get(f"{key}_scale_inv")
        stem = key.removesuffix("_blocks")
        packed = state.get(f"{stem}_scales") if stem != key else None
        is_small = tensor.element_size() == 1 and tensor.dtype != torch.bool
        if packed is not None:
            found[stem] = DequantizedTensor.of(tensor, packed, None, dtype)
        elif scale is not None and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            _scales_must_fit(name, key, tensor, scale, block)
            found[key] = DequantizedTensor.of(tensor, scale, block, dtype)
        elif scale is not None or is_small:
            # Scales of a weight in full precision, or a weight of few bits without scales.
            raise UserError(
                f"the LLM {name} must have weights that can be trained, but its tensor "
                f"{key} is {tensor.dtype} {'without' if scale is None else 'with'} scales, "
                f"which is not how {method} stores one. Name the unquantised model that it "
                "was made from."
            )
        else:
            found[key] = tensor
    must_be_plain(name, found)
    return found
