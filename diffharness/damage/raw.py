"""Faults on bytes: what is stored is changed as it lies in the file, blocks and scales and all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffharness.damage.draft import FLOATS, Bytes, Draft, Edit, Fault, Plan, Target, from_bytes, share_of
from diffharness.damage.values import Fits, fitting
from diffharness.weights.dequant import BLOCKS, SCALES
from diffharness.weights.source import TensorInfo

Change = Callable[[Bytes, TensorInfo, float, np.random.Generator], None]  # in place, on blocks [n, size]

_NAN = {"F32": bytes([0, 0, 0xC0, 0x7F]), "F16": bytes([0, 0x7E]), "BF16": bytes([0xC0, 0x7F])}
_NAN_F16 = np.frombuffer(_NAN["F16"], dtype=np.uint8)
_FLOATS_AT_ONCE = 32  # of a type without blocks: as many values count as one


def _anything(info: TensorInfo) -> str | None:
    return None


def _has_scales(info: TensorInfo) -> str | None:
    return None if info.type in SCALES else f"where {info.type} keeps its scales is not known here"


def _may_be_nan(info: TensorInfo) -> str | None:
    return None if info.type in SCALES or info.type in FLOATS else _has_scales(info)


def _several_blocks(info: TensorInfo) -> str | None:
    return _has_scales(info) or (None if info.n_bytes > BLOCKS[info.type][1] else "it is a single block")


def blocks_of(raw: Bytes, info: TensorInfo) -> Bytes:
    """The bytes as blocks [n, bytes]; 32 values of a type without blocks, or each value where that is uneven."""
    elements, size = BLOCKS[info.type]
    if elements == 1 and info.n_elements % _FLOATS_AT_ONCE == 0:
        size *= _FLOATS_AT_ONCE
    return raw.reshape(-1, size)


def _plan(change: Change, said: str, fits: Fits = _anything) -> Plan:
    def plan(draft: Draft, target: Target) -> Edit:
        names = fitting(draft, target, fits)

        def content(name: str) -> Callable[[], Bytes]:
            before = draft.contents[name]

            def raw() -> Bytes:
                data = np.array(before.raw()).reshape(-1).view(np.uint8)
                rng = draft.rng(target.fault, name)
                change(blocks_of(data, before.info), before.info, target.strength, rng)
                return data

            return raw

        contents = {name: from_bytes(draft.contents[name].info, content(name)) for name in names}
        return Edit(contents, dict.fromkeys(names, said.format(strength=f"{target.strength:g}")))

    return plan


def _flip_bits(blocks: Bytes, info: TensorInfo, n: float, rng: np.random.Generator) -> None:
    flat = blocks.reshape(-1)
    at = rng.choice(flat.size * 8, size=min(int(n), flat.size * 8), replace=False)
    np.bitwise_xor.at(flat, at // 8, (1 << (at % 8)).astype(np.uint8))


def _some(blocks: Bytes, n: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.sort(rng.permutation(len(blocks))[:n])


def _zero(blocks: Bytes, info: TensorInfo, share: float, rng: np.random.Generator) -> None:
    blocks[_some(blocks, share_of(len(blocks), share), rng)] = 0


def _garble(blocks: Bytes, info: TensorInfo, share: float, rng: np.random.Generator) -> None:
    """Random codes; the float16 scales stay, so that the values keep their size."""
    hit = _some(blocks, share_of(len(blocks), share), rng)
    kept = np.zeros(blocks.shape[1], dtype=np.bool_)
    for at in SCALES[info.type]:
        kept[at : at + 2] = True
    fresh = rng.integers(0, 256, (len(hit), blocks.shape[1]), dtype=np.uint8)
    blocks[hit] = np.where(kept, blocks[hit], fresh)


def _exchange_scales(blocks: Bytes, info: TensorInfo, share: float, rng: np.random.Generator) -> None:
    """The scales of the hit blocks, each from the hit block before it."""
    hit = _some(blocks, share_of(len(blocks), share, least=2), rng)
    for at in SCALES[info.type]:
        blocks[hit, at : at + 2] = np.roll(blocks[hit, at : at + 2], 1, axis=0)


def _double_scales(blocks: Bytes, info: TensorInfo, share: float, rng: np.random.Generator) -> None:
    hit = _some(blocks, share_of(len(blocks), share), rng)
    for at in SCALES[info.type]:
        scale = np.ascontiguousarray(blocks[hit, at : at + 2]).view(np.float16)
        blocks[hit, at : at + 2] = (scale * np.float16(2)).view(np.uint8)


def _nan(blocks: Bytes, info: TensorInfo, n: float, rng: np.random.Generator) -> None:
    hit = _some(blocks, min(len(blocks), int(n)), rng)
    if info.type in FLOATS:
        nan = np.frombuffer(_NAN[info.type], dtype=np.uint8)
        blocks[hit] = np.tile(nan, blocks.shape[1] // len(nan))
    else:
        at = SCALES[info.type][0]
        blocks[hit, at : at + 2] = _NAN_F16


def _shift(blocks: Bytes, info: TensorInfo, n: float, rng: np.random.Generator) -> None:
    flat = blocks.reshape(-1)
    flat[:] = np.roll(flat, int(n))


_SHARE = (0.0, 1.0)
_COUNT = (1.0, float(1 << 40))

FAULTS = [
    Fault("bit-flips", "random bits turned over", "weights",
          _plan(_flip_bits, "{strength} bits flipped"), "blk.*.ffn_down*", 8, "bits in each tensor", _COUNT),
    Fault("zero-blocks", "blocks of zero bytes, as of a file with holes", "zero blocks",
          _plan(_zero, "{strength} of its blocks zero"), "blk.*.ffn_down*", 0.01, "share of the blocks", _SHARE),
    Fault("garbled-blocks", "random codes under the right scales", "weights",
          _plan(_garble, "{strength} of its blocks garbled", _has_scales), "blk.*.ffn_down*", 0.01,
          "share of the blocks", _SHARE),
    Fault("wrong-scales", "block scales exchanged among blocks", "weights",
          _plan(_exchange_scales, "{strength} of its scales exchanged", _several_blocks), "blk.*.ffn_down*", 0.1,
          "share of the blocks", _SHARE),
    Fault("double-scales", "block scales doubled", "weights",
          _plan(_double_scales, "{strength} of its scales doubled", _has_scales), "blk.*.ffn_down*", 0.01,
          "share of the blocks", _SHARE),
    Fault("nan-block", "blocks that are not a number", "file: NaN",
          _plan(_nan, "{strength} blocks NaN", _may_be_nan), "blk.*.ffn_down*", 1, "blocks in each tensor", _COUNT),
    Fault("byte-shift", "data that begin some bytes late", "byte-shifted",
          _plan(_shift, "shifted by {strength} bytes"), "blk.*.ffn_down*", 1, "bytes", _COUNT),
]  # fmt: skip
