"""Chooses the PyTorch kernels of a step. On CUDA PyTorch's own choice is kept; on a CPU others are often faster.

Measured on two cores of a CPU with AVX-512 (`python bench/step.py`), against PyTorch's own choice:

    matrix products in fp32    oneDNN 300 to 390 GFLOP/s, MKL 120 to 180 GFLOP/s, forward and backward
    attention in bf16          explicit 32 ms, fused kernel 84 ms, forward and backward together (197 tokens)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers.attention import Attention
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from maekit.mae.cross_decoder import CrossAttention

# Multiplications. A smaller product takes less time than the dispatch to another kernel.
_WORTH_ONEDNN = 1 << 24


def choose_kernels(
    model: torch.nn.Module, device: torch.device, precision: str
) -> Callable[[], AbstractContextManager[Any]]:
    """Configure a model's attention; return a factory of contexts, a fresh one for each forward pass.

    Args:
        model: a model of timm's blocks; parameters stay fp32.
        device: device of the model.
        precision: `fp32`, or `bf16` through autocast.
    """
    on_cpu = device.type == "cpu"
    for module in model.modules():
        if isinstance(module, (Attention, CrossAttention)):
            # timm marks it Final only for TorchScript.
            module.fused_attn = not (on_cpu and precision == "bf16")  # type: ignore[misc]
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    # MKL uses its AVX-512 kernels on Intel processors only.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return OneDnnLinear if on_cpu and has_avx512 and torch.backends.mkldnn.is_available() else nullcontext


class OneDnnLinear(TorchFunctionMode):
    """Context in which oneDNN computes `torch.nn.functional.linear` on fp32 tensors, and its gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Route linear layers to oneDNN; call every other function unchanged."""
        if func is functional.linear and not kwargs and len(args) == 3:
            x, weight, bias = args
            if bias is not None and x.dtype == torch.float32 and x.numel() * weight.shape[0] >= _WORTH_ONEDNN:
                return _Linear.apply(x, weight, bias)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x · Wᵀ + b: `[..., in]`, `[out, in]`, `[out]` -> `[..., out]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)  # [..., out] -> [n, out]
        of_x = _product(g, weight.t(), None).view_as(x) if ctx.needs_input_grad[0] else None
        return of_x, _product(g.t(), x.flatten(0, -2).t(), None), g.sum(0)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # PyTorch's compiler emits this operator; it has no public name.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
