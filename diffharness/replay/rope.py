"""Rotary position embedding in all of ggml's modes, forward and back.

By ggml.h (`ggml_rope_ext`, `ggml_rope_multi`) and ggml-cpu/ops.cpp. The angles are made as there, in float32 and each
pair's from the one before by a multiplication, because what that loses grows with the position and is no fault of a
graph. Sections (mrope, imrope, vision) give each pair one of four positions: time, height, width and one more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.errors import EngineError
from diffharness.replay.call import Call, Kernel

_NORMAL, _NEOX, _MROPE, _VISION, _IMROPE = 0, 2, 8, 24, 40  # GGML_ROPE_TYPE_*

_F32 = np.float32


@dataclass(frozen=True)
class Parameters:
    """What op_params say; `n_dims` components from `offset` on are turned, the rest passes through."""

    n_dims: int
    mode: int
    n_ctx_orig: int
    base: float
    freq_scale: float
    ext_factor: float
    magnitude: float
    beta_fast: float
    beta_slow: float
    sections: tuple[int, int, int, int]
    offset: int

    @classmethod
    def of(cls, call: Call) -> Parameters:
        i, f = call.i, call.f
        sections = (i(11), i(12), i(13), i(14))
        return cls(i(1), i(2), i(4), f(5), f(6), f(7), f(8), f(9), f(10), sections, i(15))

    @property
    def multi(self) -> bool:
        return bool(self.mode & _MROPE)


def _turn(call: Call, direction: float) -> Tensor:
    x, positions, p = call.x(0), call.ints(1).reshape(-1).numpy(), Parameters.of(call)
    if p.mode not in (_NORMAL, _NEOX, _MROPE, _VISION, _IMROPE):
        raise EngineError(f"node {call.node.name} has a rope mode {p.mode}, which ggml does not know")
    width = x.shape[-1] if p.mode == _VISION else p.n_dims  # of vision, n_dims is half of the head and all of it turns
    if p.n_dims % 2 or not 0 < p.n_dims <= width or p.offset + width > x.shape[-1]:
        raise EngineError(f"node {call.node.name} turns {width} components from {p.offset} on of {x.shape[-1]}")
    divisors = call.x(2).reshape(-1).numpy() if call.has(2) else None
    cos, sin = _stretched(_angles(p, positions, width // 2), p, divisors)
    first, last = p.offset, p.offset + width
    turned = _rotated(x[..., first:last], cos, sin * _F32(direction), p.mode)
    return torch.cat((x[..., :first], turned, x[..., last:]), dim=-1)


def _rotated(x: Tensor, cosines: NDArray[np.float32], sines: NDArray[np.float32], mode: int) -> Tensor:
    """Pairs (2i, 2i + 1) of the normal mode, (i, i + half) of the others; x [ne3, ne2, ne1, width], tables [ne2, i]."""
    cos, sin = torch.from_numpy(cosines)[:, None], torch.from_numpy(sines)[:, None]
    if mode == _NORMAL:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _angles(p: Parameters, positions: NDArray[np.int64], n_pairs: int) -> NDArray[np.float32]:
    """Position times base^(-2i / n_dims) of pair i: [positions, n_pairs]."""
    step = _F32(float(_F32(p.base)) ** float(_F32(-2.0) / _F32(p.n_dims)))
    if not p.multi:
        theta = positions.astype(_F32)
        return np.stack(_falling(theta, step, n_pairs), axis=-1)
    if not any(p.sections[:3]):
        raise EngineError("a rope of several positions has no sections")
    axes = positions.astype(_F32).reshape(4, -1)
    columns = []
    powers: list[list[NDArray[np.float32]]] = [_falling(theta, step, n_pairs) for theta in axes]
    begun = [0, 0, 0, 0]  # the pair at which each axis' angle was at its position itself
    for pair in range(n_pairs):
        sector = pair % sum(p.sections)
        if p.mode == _VISION and sector in (starts := _starts(p.sections)):
            begun[starts.index(sector)] = pair  # each section turns from the fastest angle again
        axis = _interleaved(sector, p.sections) if p.mode == _IMROPE else _blocked(sector, p.sections)
        columns.append(powers[axis][pair - begun[axis]])
    return np.stack(columns, axis=-1)


def _falling(theta: NDArray[np.float32], step: np.float32, n: int) -> list[NDArray[np.float32]]:
    out = []
    for _ in range(n):
        out.append(theta)
        theta = theta * step
    return out


def _starts(sections: tuple[int, int, int, int]) -> list[int]:
    return [sum(sections[:i]) for i in range(4)]


def _blocked(sector: int, sections: tuple[int, int, int, int]) -> int:
    """Sections one after the other."""
    return max(axis for axis, start in enumerate(_starts(sections)) if sector >= start)


def _interleaved(sector: int, sections: tuple[int, int, int, int]) -> int:
    """Time, height, width in turn, each until its section is used up; what is left takes the fourth position."""
    axis = sector % 3
    return axis if sector < 3 * sections[axis] else 3


def _stretched(
    angles: NDArray[np.float32], p: Parameters, divisors: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines after the frequency factors, linear scaling and YaRN."""
    n_pairs = angles.shape[-1]
    if divisors is not None:
        if divisors.size < n_pairs:
            raise EngineError(f"a rope of {n_pairs} pairs has {divisors.size} frequency factors")
        angles = angles / divisors[:n_pairs]
    theta, magnitude = angles * _F32(p.freq_scale), _F32(p.magnitude)
    if p.ext_factor != 0.0:
        kept = _ramp(p, n_pairs) * _F32(p.ext_factor)
        theta = theta * (_F32(1.0) - kept) + angles * kept
        magnitude = magnitude * (_F32(1.0) + _F32(0.1) * np.log(_F32(1.0) / _F32(p.freq_scale)))
    wide = theta.astype(np.float64)
    return np.cos(wide).astype(_F32) * magnitude, np.sin(wide).astype(_F32) * magnitude


def _ramp(p: Parameters, n_pairs: int) -> NDArray[np.float32]:
    """[n_pairs]: 1 where a pair keeps its own frequency, 0 where it is interpolated, falling between."""

    def pair_that_turns(times: float) -> float:
        with np.errstate(divide="ignore"):  # a context of no length: nothing is kept
            return float(p.n_dims * np.log(p.n_ctx_orig / (times * 2 * math.pi)) / (2 * math.log(p.base)))

    low = _F32(max(0.0, np.floor(pair_that_turns(p.beta_fast))))
    high = _F32(min(p.n_dims - 1.0, np.ceil(pair_that_turns(p.beta_slow))))
    falling = (np.arange(n_pairs, dtype=_F32) - low) / max(_F32(0.001), high - low)
    kept: NDArray[np.float32] = _F32(1.0) - np.clip(falling, _F32(0.0), _F32(1.0))
    return kept


def _rope(call: Call) -> Tensor:
    return _turn(call, 1.0)


def _rope_back(call: Call) -> Tensor:
    return _turn(call, -1.0)


KERNELS: dict[str, Kernel] = {"ROPE": _rope, "ROPE_BACK": _rope_back}
