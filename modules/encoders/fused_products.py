"""Parts of a Llama layer as single functions with explicit backward passes, for products in bfloat16 on a CPU.

    read_norm:       q, k and v of h, from one product
    rotate:          rotary embedding of q and k
    add_product:     x + a W'
    add_swiglu:      x + (silu(h G') * h U') D'
    with h = rmsnorm(x) = x / sqrt(mean(x^2) + eps) * g

With AMX and AVX512-BF16 bfloat16 products are four to eight times as fast as float32 products. Under autocast most of a
layer's time is then spent in casts, norms, rotations and the accumulation of gradients. These functions reduce that
time: a value is cast once, when it is computed; the gains g are multiplied into the weights, which have fewer rows than
x; and the backward passes add to the residual stream's gradient in the same pass that computes it. The residual stream
x and its gradient remain in float32.

Between the products, passes over memory remain. `compiled_elementwise()` compiles each function that consists of
several such passes (`Elementwise`) into one pass, by torch.compile, which needs a C++ compiler.

Legend: S rows, D width, O outputs, F width of the feed-forward block, H heads of width d; dtype: of the products.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu


class Elementwise(NamedTuple):
    """Elementwise functions between the products, eager or compiled; the names are those of this module."""

    normalized: Callable[[Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    norm_gradient: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    swiglu_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@cache
def compiled_elementwise() -> Elementwise:
    """Return the functions compiled for all shapes, at their first call."""
    return Elementwise._make(torch.compile(function, dynamic=True) for function in EAGER)


def read_norm(
    x: Tensor, gain: Tensor, eps: float, weights: list[Tensor], dtype: torch.dtype, functions: Elementwise
) -> Tensor:
    """Product rmsnorm(x) W' of x [S, D] and the concatenated weights W [O, D]: [S, O] in `dtype`."""
    product: Tensor = _ReadNorm.apply(x, gain, eps, dtype, functions, *weights)
    return product


def rotate(x_SHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [S, H, d] by cos and sin [S, d], whose halves are equal."""
    rotated: Tensor = _Rotate.apply(x_SHd, cos[:, None].to(x_SHd.dtype), sin[:, None].to(x_SHd.dtype))
    return rotated


def add_product(x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """x + a W' for x [S, D], a [S, O] and W [D, O]; the product has a's dtype."""
    added: Tensor = _AddProduct.apply(x, a, weight)
    return added


def add_swiglu(
    x: Tensor,
    gain: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    dtype: torch.dtype,
    functions: Elementwise,
) -> Tensor:
    """x + (silu(h G') * h U') D' for x [S, D], h = rmsnorm(x), G and U [F, D] and D [D, F]: [S, D] in x's dtype."""
    added: Tensor = _AddSwiGLU.apply(x, gain, eps, gate, up, down, dtype, functions)
    return added


def normalized(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / rms(x) [S, D] in `dtype` and 1 / rms(x) [S, 1] in x's dtype, without the gain."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).to(dtype), scale


def norm_gradient(of_h: Tensor, h: Tensor, scale: Tensor, received: Tensor | None) -> Tensor:
    """Gradient of x [S, D] in scale's dtype, added to `received` if that is given; scale [S, 1].

    of_h: gradient of h = x * scale, without the gain.
    """
    along = (of_h * h).sum(-1, keepdim=True, dtype=scale.dtype).div_(h.shape[-1])
    of_scaled = torch.addcmul(of_h, h, along.to(h.dtype), value=-1)
    return of_scaled * scale if received is None else torch.addcmul(received, of_scaled, scale)


def swiglu(opened: Tensor, raised: Tensor) -> Tensor:
    """silu(opened) * raised, all [S, F]."""
    return silu(opened) * raised  # not in place: in bfloat16 `mul_` takes almost twice as long


def swiglu_gradients(of_hidden: Tensor, opened: Tensor, raised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `opened` and `raised`, and the output of `swiglu`, all [S, F]."""
    lit = silu(opened)
    of_opened: Tensor = torch.ops.aten.silu_backward(of_hidden * raised, opened)
    return of_opened, of_hidden * lit, lit * raised


EAGER = Elementwise(normalized, norm_gradient, swiglu, swiglu_gradients)


def _gained(weight: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(weight, gain).to(dtype)


def _weight_gradients(of_gained: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of W [O, D] and of g [D], from the gradient of W * g."""
    of_gained = of_gained.to(weight.dtype)
    return of_gained * gain, torch.linalg.vecdot(of_gained, weight, dim=0)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a' b [A, B] of a [S, A] and b [S, B]; oneDNN transposes its first operand, so the narrower one is given first."""
    return a.t() @ b if a.shape[1] <= b.shape[1] else (b.t() @ a).t()


class _ReadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        eps: float,
        dtype: torch.dtype,
        functions: Elementwise,
        *weights: Tensor,
    ) -> Tensor:
        h, scale = functions.normalized(x, eps, dtype)
        packed = torch.cat([_gained(weight, gain, dtype) for weight in weights])
        ctx.save_for_backward(h, scale, packed, gain, *weights)
        ctx.functions = functions
        return h @ packed.t()

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        h, scale, packed, gain, *weights = ctx.saved_tensors
        of_x = ctx.functions.norm_gradient(received @ packed, h, scale, None) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return of_x, None, None, None, None, *(None for _ in weights)
        parts = _transposed_product(received, h).split([len(weight) for weight in weights])
        of_weights, of_gains = zip(*(_weight_gradients(p, w, gain) for p, w in zip(parts, weights)), strict=True)
        return of_x, sum(of_gains), None, None, None, *of_weights


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(received, cos, sin, -1), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """x [S, H, d] rotated by the angles of cos and sin [S, 1, d]; direction: 1, or -1 for the inverse rotation."""
    half = x.shape[-1] // 2
    out, sin = torch.mul(x, cos), sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return out


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        cast = weight.to(a.dtype)
        ctx.save_for_backward(a, cast)
        ctx.weight_dtype = weight.dtype
        return x + a @ cast.t()

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        a, cast = ctx.saved_tensors
        narrow = received.to(a.dtype)
        of_weight = (narrow.t() @ a).to(ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        return received, narrow @ cast, of_weight


class _AddSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        eps: float,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        dtype: torch.dtype,
        functions: Elementwise,
    ) -> Tensor:
        h, scale = functions.normalized(x, eps, dtype)
        gained = _gained(gate, gain, dtype), _gained(up, gain, dtype)
        # Two products instead of one: elementwise operations on halves of rows would take twice as long.
        opened, raised = (h @ weight.t() for weight in gained)
        cast = down.to(dtype)
        ctx.save_for_backward(h, scale, opened, raised, gain, *gained, cast, gate, up)
        ctx.weight_dtype, ctx.functions = down.dtype, functions
        return x + functions.swiglu(opened, raised) @ cast.t()

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        h, scale, opened, raised, gain, gained_gate, gained_up, cast, gate, up = ctx.saved_tensors
        narrow = received.to(h.dtype)
        of_opened, of_raised, hidden = ctx.functions.swiglu_gradients(narrow @ cast, opened, raised)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_h = torch.addmm(of_opened @ gained_gate, of_raised, gained_up)
            of_x = ctx.functions.norm_gradient(of_h, h, scale, received)
        if not any(ctx.needs_input_grad[1:]):
            return of_x, None, None, None, None, None, None, None
        of_down = (narrow.t() @ hidden).to(ctx.weight_dtype)
        of_gate, gate_gain = _weight_gradients(_transposed_product(of_opened, h), gate, gain)
        of_up, up_gain = _weight_gradients(_transposed_product(of_raised, h), up, gain)
        return of_x, gate_gain + up_gain, None, of_gate, of_up, of_down, None, None
