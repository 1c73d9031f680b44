"""The arithmetic of a forward, as pure functions of torch tensors: any float dtype, any device, differentiable.

Shapes: B batch, T tokens, H heads, D head size, E width of the residual stream. Angles of RoPE are made in
float64 and then cast; where ggml's CPU arithmetic is coarser by design, `Arithmetic` asks for its convention.
Dropout, KV caches and padding do not exist here: every chunk starts at an empty context.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference.model import DEFINITION, Arithmetic, Tap, Watch, Weights
from diffharness.reference.rounding import round_to, through_cache

_QUERY_BLOCK = 64  # queries whose scores are held at once: little memory, and little work above the diagonal
_FUSED_FROM = 1024  # tokens from which torch's fused kernel is faster: at 2048 by a quarter
# oneDNN's product: not on every platform, nor promised to stay, and coarser where the environment tells it so.
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and not (
    {"ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"} & os.environ.keys()
)
_ONEDNN_FROM = 64  # tokens
_HEAD_BYTES = 4 << 20  # rows of the output head held at once; more costs memory and gains little speed


# -- norms, projections, activations ---------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis, times `weight` where there is one (no offset added)."""
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last axis, times `weight`, plus `bias`, where there are any."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x[..., in] times w[out, in] transposed, plus b[out]."""
    if _suits_onednn(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, w, b)


def _suits_onednn(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN is to make a product: in float32, and faster than the MKL that torch takes by itself.

    By a tenth to a fifth, measured with many rows. Each number of rows costs it a compilation, as long as a product.
    """
    return (
        _ONEDNN
        and not torch.is_grad_enabled()
        and type(x) is type(w) is Tensor
        and x.dtype == w.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() == 3
        and x.shape[1] >= _ONEDNN_FROM
        and w.is_contiguous()
    )


def project(w: Weights, name: str, x: Tensor) -> Tensor:
    """x[..., in] times the matrix `name`.weight, times its `.scale` and plus its `.bias` where there are such."""
    weight, scale, bias = w.get(name + ".weight"), w.find(name + ".scale"), w.find(name + ".bias")
    if scale is None:
        return linear(x, weight, bias)
    y = linear(x, weight) * scale
    return y if bias is None else y + bias


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return F.silu(x)


def gelu_tanh(x: Tensor, arithmetic: Arithmetic = DEFINITION) -> Tensor:
    """GELU in its tanh form: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).

    With `gelu_f16_table`, what ggml's CPU backend gives (`ggml_vec_gelu_f32` in ggml-cpu/vec.h): the argument is
    rounded to float16, the result too; at or below -10 it is 0, at or above 10 it is x itself, unrounded.
    """
    if not arithmetic.gelu_f16_table:
        return F.gelu(x, approximate="tanh")
    entry = F.gelu(x.to(torch.float16).float(), approximate="tanh").to(torch.float16).to(x.dtype)
    return torch.where(x <= -10.0, torch.zeros_like(x), torch.where(x >= 10.0, x, entry))


def gelu_quick(x: Tensor, arithmetic: Arithmetic = DEFINITION) -> Tensor:
    """x · sigmoid(1.702 x); with `gelu_f16_table` from ggml's table: argument and result rounded to float16."""
    if not arithmetic.gelu_f16_table:
        return x * torch.sigmoid(1.702 * x)
    entry = x.to(torch.float16).float()
    return (entry * torch.sigmoid(1.702 * entry)).to(torch.float16).to(x.dtype)


def gelu_erf(x: Tensor, arithmetic: Arithmetic = DEFINITION) -> Tensor:
    """x/2 · (1 + erf(x / √2)); with `gelu_erf_as_tanh` the tanh form, which llama.cpp's graphs have for every GELU."""
    return gelu_tanh(x, arithmetic) if arithmetic.gelu_erf_as_tanh else F.gelu(x)


ACTIVATIONS: Mapping[str, Callable[[Tensor, Arithmetic], Tensor]] = {
    "silu": lambda x, _: F.silu(x),
    "gelu": gelu_tanh,
    "gelu_erf": gelu_erf,
    "gelu_quick": gelu_quick,
    "relu": lambda x, _: F.relu(x),
    "relu_sqr": lambda x, _: F.relu(x).square(),
}
"""The activations of feed-forwards, by ggml's names."""

BY_TABLE = frozenset({"gelu", "gelu_quick"})
"""Activations that ggml's CPU backend looks up in a float16 table."""


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), or x where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


# -- rotary position embedding -----------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its rotary embedding to longer contexts.

    Linear: `freq_scale` = 1/factor, the rest as it stands. YaRN (Peng et al., 2023): dimensions that turn more
    than `beta_fast` times within `n_ctx_orig` positions keep their frequency, those that turn less than
    `beta_slow` times are interpolated, those between are mixed; `ext_factor` (1) weighs the former against plain
    interpolation. `magnitude` multiplies sine and cosine: for YaRN 0.1 ln(factor) + 1 unless the model says.
    `truncate`: where the mixing begins and ends is rounded outward to whole dimensions.
    Llama 3's scaling is not here: GGUF keeps it as a tensor of frequency divisors (`freq_factors`).
    """

    freq_scale: float = 1.0
    ext_factor: float = 0.0
    magnitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0
    truncate: bool = True


NO_SCALING = RopeScaling()


@dataclass(frozen=True)
class Rotary:
    """How one layer turns its queries and keys."""

    n_rot: int  # components of a head that turn
    base: float
    interleaved: bool  # pairs (2i, 2i + 1); otherwise (i, i + n_rot/2)
    scaling: RopeScaling = NO_SCALING


def rope_tables(
    positions: Tensor,
    n_rot: int,
    base: float,
    *,
    freq_factors: Tensor | None = None,
    scaling: RopeScaling = NO_SCALING,
    arithmetic: Arithmetic = DEFINITION,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, n_rot / 2], for `positions` [T].

    Pair i turns by position · base^(-2i/n_rot) / freq_factors[i], then `scaling`. With `rope_f32_angles` the
    angles are made as ggml's CPU backend makes them (`ggml_rope_cache_init`, `rope_yarn` in ggml-cpu/ops.cpp):
    in float32, each pair's from the one before by a multiplication.
    """
    work = torch.float32 if arithmetic.rope_f32_angles else torch.float64
    device = positions.device
    if arithmetic.rope_f32_angles:
        step = torch.tensor(base, dtype=torch.float32).double().pow(-2.0 / n_rot).float().to(device)
        theta = positions.to(work)
        columns = []
        for _ in range(n_rot // 2):
            columns.append(theta)
            theta = theta * step
        angles = torch.stack(columns, dim=-1)
    else:
        exponents = torch.arange(0, n_rot, 2, dtype=work, device=device) / n_rot
        angles = positions.to(work)[:, None] * torch.pow(torch.tensor(base, dtype=work, device=device), -exponents)
    if freq_factors is not None:
        angles = angles / freq_factors.to(device=device, dtype=work)
    stretched = angles * scaling.freq_scale
    if scaling.ext_factor != 0.0:
        keep = _yarn_ramp(n_rot, base, scaling).to(device=device, dtype=work) * scaling.ext_factor
        stretched = stretched * (1 - keep) + angles * keep
    cos, sin = stretched.cos(), stretched.sin()
    if scaling.magnitude != 1.0:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    return cos.to(dtype), sin.to(dtype)


def _yarn_ramp(n_rot: int, base: float, scaling: RopeScaling) -> Tensor:
    """[n_rot / 2]: 1 where a pair keeps its own frequency, 0 where it is interpolated."""

    def pair_that_turns(times: float) -> float:
        return n_rot * math.log(scaling.n_ctx_orig / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    pairs = torch.arange(n_rot // 2, dtype=torch.float64)
    return 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn x [B, T, H, D] by tables [T, n_rot / 2]; head components from n_rot on pass through.

    `interleaved` pairs components (2i, 2i + 1), ggml's NORM order, in which GGUF keeps llama's Q and K; otherwise
    (i, i + n_rot/2), its NEOX order and Hugging Face's.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:  # neighbours are the parts of a complex number, and turning it is a product
        pairs = torch.view_as_complex(turned.reshape(*turned.shape[:-1], half, 2))
        out = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return out if rest.shape[-1] == 0 else torch.cat((out, rest), dim=-1)


# -- attention ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How one layer makes attention scores of queries and keys."""

    scale: float
    window: int | None = None  # keys in sight, the query's own included; None for all
    softcap: float | None = None
    chunk: int | None = None  # keys of the query's own chunk of so many positions are in sight, no others
    max_alibi_bias: float = 0.0  # ALiBi: the steepest slope is 2^(-max_alibi_bias / number of slopes)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    watch: Watch | None = None,
    arithmetic: Arithmetic = DEFINITION,
) -> Tensor:
    """Causal attention of q [B, T, H, D] on k [B, T, Hkv, D] and v [B, T, Hkv, Dv]; [B, T, H · Dv].

    Query head h reads KV head h // (H / Hkv). Query i sees keys j ≤ i, with a `window` only those with i - j <
    window, with a `chunk` only those of its own chunk. `softcap` caps the scaled scores before the mask; `slopes` [H]
    times (j - i) is added to them (ALiBi); `sinks` [H] is a score in each head that takes its share of the softmax and
    has no value. `watch` is shown the weights, block by block. Keys and values pass through the cache that
    `arithmetic` has, if any.
    """
    cache = arithmetic.kv_cache
    if cache is not None:
        q, k, v = through_cache(q, k, v, cache)
    plain = all(x is None for x in (window, softcap, chunk, slopes, sinks, watch, cache))
    if plain and q.shape[1] >= _FUSED_FROM:
        return _fused_attention(q, k, v, scale)
    n_batch, n_tokens, n_head, head_dim = q.shape
    n_kv = k.shape[2]
    group = n_head // n_kv
    qh = (q * scale).transpose(1, 2).reshape(n_batch, n_kv, group, n_tokens, head_dim)
    kh, vh = (x.transpose(1, 2).contiguous() for x in (k, v))  # [B, Hkv, T, D]
    by_head = (1, n_kv, group, 1, 1)
    blocks = []
    for start in range(0, n_tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        if chunk is not None:
            first = max(first, start // chunk * chunk)
        # The heads of a group read one KV head: their queries are rows of one product.
        queries = qh[:, :, :, start:stop].reshape(n_batch, n_kv, group * (stop - start), head_dim)
        scores = queries @ kh[:, :, first:stop].transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(n_batch, n_kv, group, stop - start, stop - first)
        positions = torch.arange(first, stop, device=q.device)
        if slopes is not None:
            scores = scores - slopes.view(by_head) * (positions[start - first :, None] - positions)
        hidden = _hidden(positions[start - first :, None], positions, window, chunk)
        if window is None and chunk is None:  # of the keys before the block's own all are in sight
            scores[..., start - first :].masked_fill_(hidden[:, start - first :], -math.inf)
        else:
            scores.masked_fill_(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.view(by_head).expand(n_batch, -1, -1, stop - start, 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        if watch is not None:
            watch(weights, hidden, start, first)
        if cache is not None and not cache.flash:
            weights = round_to(weights, cache.type_v)
        values = weights.reshape(n_batch, n_kv, group * (stop - start), stop - first) @ vh[:, :, first:stop]
        blocks.append(values.view(n_batch, n_kv, group, stop - start, -1))
    out = torch.cat(blocks, dim=-2)  # [B, Hkv, G, T, Dv]
    return out.permute(0, 3, 1, 2, 4).reshape(n_batch, n_tokens, -1)


def _hidden(queries: Tensor, keys: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Which of the keys at these positions [keys] each query [queries, 1] does not see; [queries, keys]."""
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (keys <= queries - window)
    if chunk is not None:
        hidden = hidden | (keys < queries // chunk * chunk)
    return hidden


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention by torch's fused kernel: as exact as scores in memory, and faster on long texts."""
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2).flatten(-2)


def alibi_slopes(n_head: int, max_bias: float) -> Tensor | None:
    """What each head subtracts from a score per position of distance, float32 [n_head]; None for a bias of 0.

    With n the largest power of two up to the number of heads, head h < n has 2^(-max_bias (h + 1) / n), and head n + i
    has 2^(-max_bias (2i + 1) / 2n) (Press et al., 2022; the second line by the authors' code).
    """
    if max_bias <= 0.0:
        return None
    n = 1 << (n_head.bit_length() - 1)
    exponents = [(h + 1) / n if h < n else (2 * (h - n) + 1) / (2 * n) for h in range(n_head)]
    return torch.tensor([2.0 ** (-max_bias * e) for e in exponents], dtype=torch.float32)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """[B, T, H · D] to [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], n_head, -1)


def join_heads(x: Tensor) -> Tensor:
    """[B, T, H, D] to [B, T, H · D]."""
    return x.flatten(-2)


# -- both ends ---------------------------------------------------------------------------------------


def embed(w: Weights, tokens: Tensor, name: str = "token_embd.weight") -> Tensor:
    """Rows of the embedding for token ids [B, T]; [B, T, E]. Each distinct token's row is read once."""
    ids, where = torch.unique(tokens, return_inverse=True)
    return w.rows(name, ids)[where]


def logits(w: Weights, x: Tensor, tap: Tap, *, cap: float | None = None, scale: float = 1.0) -> Tensor:
    """Output projection (the embedding's rows where the head is tied) of the normed x; [B, T, vocab].

    Plus `output.bias` where there is one, times `scale`, then capped. The head's rows are read in chunks; without
    autograd the chunks fill one tensor.
    """
    name = "output.weight" if w.has("output.weight") else "token_embd.weight"
    n_vocab = w.n_rows(name)
    step = max(1, _HEAD_BYTES // (x.shape[-1] * x.element_size()))
    chunks = [slice(start, min(start + step, n_vocab)) for start in range(0, n_vocab, step)]
    bias = w.find("output.bias")

    def of_rows(chunk: slice) -> Tensor:
        y = linear(x, w.rows(name, chunk), None if bias is None else bias[chunk])
        return softcap(y if scale == 1.0 else y * scale, cap)

    if len(chunks) == 1:
        out = of_rows(chunks[0])
    elif torch.is_grad_enabled():
        out = torch.cat([of_rows(chunk) for chunk in chunks], dim=-1)
    else:
        out = x.new_empty(*x.shape[:-1], n_vocab)
        for chunk in chunks:
            out[..., chunk] = of_rows(chunk)
    tap("logits", out)
    return out
