"""Read checkpoints with quantised weights: fp8 and mxfp4 as ordinary tensors, no others.

A quantised weight is stored in parts: values of few bits, and their scales. Values without
their scales would be meaningless, so a method is recognised by the config and also by the
names of the parts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flallm_ds.errors import UserError
from flallm_ds.models.llm.stored import StoredTensor

# The methods that can be read, as transformers names them.
READABLE = ("fp8", "mxfp8", "mxfp4")
# Scales of layer inputs. Here the inputs stay in full precision.
_UNUSED = re.compile(r"\.(activation_scale|input_scale)$")
# The names of the parts of quantised weights, by method.
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
    """Return the quantisation settings of a config; an empty dict without quantisation."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the method's name in transformers; an empty string without quantisation."""
    method = settings.get("quant_method")
    # Old configs of bitsandbytes do not name their method.
    if method is None and settings:
        is_bitsandbytes = any(key.startswith("load_in_") for key in settings)
        method = "bitsandbytes" if is_bitsandbytes else "an unknown method"
    return str(getattr(method, "value", method) or "")


def check_method(name: str, method: str) -> None:
    """Raise UserError for a method that cannot be read."""
    if method and method not in READABLE:
        raise UserError(
            f"llm.name must be an LLM with weights that can be trained, got {name}, which is "
            f"quantised with {method}. Name the unquantised model that it was made from "
            "(--llm.bits=4 or 8 quantises that model while it is loaded)."
        )


def check_not_quantized(name: str, names: Iterable[str]) -> None:
    """Raise UserError if a tensor has the name of a part of a quantised weight."""
    for key in names:
        for method, part in _PARTS.items():
            if part.search(key):
                raise UserError(
                    f"llm.name must be an LLM with weights that can be trained, got {name}: "
                    f"the tensor {key} is a part of weights quantised with {method}, and "
                    "config.json does not say how. Name the unquantised model that it was "
                    "made from."
                )


class DequantizedTensor(StoredTensor):
    """A weight and its scales as one tensor. Its values are computed when they are read."""

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
        """Combine a weight and its scales.

        weight: fp8; or mxfp4 as uint8 of the shape (experts, outputs, groups, 16), with two
        numbers in a byte. block: rows and columns that share a scale of fp8; None: the
        shapes say how many. dtype: of the values that are read.
        """
        shape = weight.shape
        if weight.dtype == torch.uint8:
            # `read` returns (experts, inputs, outputs).
            shape = torch.Size((shape[0], shape[2] * shape[3] * 2, shape[1]))
        wrap: Any = torch.Tensor._make_wrapper_subclass
        tensor: DequantizedTensor = wrap(cls, shape, dtype=dtype)
        tensor.weight, tensor.scale, tensor.block = weight, scale, block
        return tensor

    def read(self) -> torch.Tensor:
        """Return the values in full precision, cast to the tensor's type."""
        weight, scale = _values(self.weight), _values(self.scale)
        if weight.dtype == torch.uint8:
            whole: torch.Tensor = convert_moe_packed_tensors(
                weight, scale, dtype=self.dtype
            )
            return whole.contiguous().view(self.shape)
        # Multiply in fp32, then round once.
        scales = _spread(scale, weight.shape, self.block)
        return (weight.float() * scales).to(self.dtype)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the rows in order, a few at a time. All of them are computed first."""
        yield from torch.split(self.read(), self.rows_at_once)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in memory; a stored one is read."""
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def _spread(
    scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None
) -> torch.Tensor:
    """Return the scales in fp32, broadcastable to a weight of this shape.

    Raises ValueError for scales that do not fit the shape.
    """
    if scale.dtype == torch.uint8:  # mxfp8: an exponent with a bias of 127
        scale = (scale.float() - 127).exp2()
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:  # one for each row or expert
        scale = scale.reshape(-1, *[1] * (len(shape) - 1))
    # Repeat the scale of a block for each row and column; the last block may be smaller.
    for dim, step in zip((-2, -1), block or (1, 1), strict=True):
        size = shape[dim]
        # The number of blocks, rounded up.
        if scale.shape[dim] == -(-size // step):
            scale = scale.repeat_interleave(step, dim).narrow(dim, 0, size)
        elif scale.shape[dim] != 1:
            got = tuple(scale.shape)
            raise ValueError(f"scales must fit the shape {tuple(shape)}, got {got}")
    return scale


def _check_scales(
    name: str,
    key: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int] | None,
) -> None:
    """Raise UserError if the scales do not fit the weight and the blocks."""
    try:
        # On the meta device only shapes are computed.
        scales = _spread(torch.empty(scale.shape, device="meta"), weight.shape, block)
        scales.expand(weight.shape)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"Cannot read {key} of the LLM {name}: scales of the shape {tuple(scale.shape)} "
            f"do not fit a weight of the shape {tuple(weight.shape)} in blocks of {block}, "
            "which config.json names. Fetch the model again, or name the unquantised model "
            "that it was made from."
        ) from error


def dequantized(
    name: str,
    state: dict[str, torch.Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint with each weight and its scales as one tensor.

    Raises UserError if a weight of few bits has no scales, or others than the config says.
    """
    method = method_of(settings)
    check_method(name, method)
    if not method:
        check_not_quantized(name, state)
        return state
    # fp8 has one scale for each block of rows and columns, or one for the weight.
    size = settings.get("weight_block_size")
    block = (int(size[0]), int(size[1])) if size else None
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        # The name of the weight that scales belong to.
        whole = re.sub(r"(_scale_inv|_scales)$", "", key)
        if whole != key and (whole in state or f"{whole}_blocks" in state):
            continue  # scales are combined with their weight below
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
            _check_scales(name, key, tensor, scale, block)
            found[key] = DequantizedTensor.of(tensor, scale, block, dtype)
        elif scale is not None or is_small:
            # A weight in full precision with scales, or a weight of few bits without.
            raise UserError(
                f"Cannot read {key} of the LLM {name}: it is {tensor.dtype} "
                f"{'without' if scale is None else 'with'} scales, and {method} does not store "
                "weights in this way. Name the unquantised model that it was made from."
            )
        else:
            found[key] = tensor
    # Parts of weights that the settings do not mention must not remain.
    check_not_quantized(name, found)
    return found
