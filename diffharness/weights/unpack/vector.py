"""A little language of vectors in which the layout of a quantized block is written down, compiled by LLVM.

A layout is a function of a `Block`. It reads fields at fixed bytes, computes on `Vector`s, and puts the values
where they belong; running it writes LLVM's intermediate code for one block, without a loop or a branch. Widths
are those of the block; LLVM cuts them into whatever vectors the machine has.

Every float operation is one rounding of float32 in the order in which it is written: LLVM fuses and reorders
none of them unless it is told to, so that the results are the same to the bit on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from diffharness.weights.room import LINE

I8, I32, I64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()

Operand: TypeAlias = "Vector | int | float | Sequence[int]"


class Vector:
    """Integers or float32, several or one: one of them meets several as if it were repeated."""

    def __init__(self, builder: Any, value: Any) -> None:
        self._ir = builder
        self.value = value

    @property
    def _type(self) -> Any:
        return self.value.type

    @property
    def _item(self) -> Any:
        return self._type.element if self._is_wide else self._type

    @property
    def _is_wide(self) -> bool:
        return isinstance(self._type, ir.VectorType)

    def __len__(self) -> int:
        return int(self._type.count) if self._is_wide else 1

    def like(self, item: Any) -> Any:
        """LLVM's type of as many items."""
        return ir.VectorType(item, len(self)) if self._is_wide else item

    def _with(self, value: Any) -> Vector:
        return Vector(self._ir, value)

    def _pair(self, other: Operand) -> tuple[Any, Any]:
        if not isinstance(other, Vector):
            parts = list(other) if isinstance(other, Sequence) else [other] * len(self)
            return self.value, ir.Constant(self._type, parts if self._is_wide else parts[0])
        if self._is_wide and not other._is_wide:
            return self.value, other.repeated(len(self)).value
        if other._is_wide and not self._is_wide:
            return self.repeated(len(other)).value, other.value
        return self.value, other.value

    # ── integers ─────────────────────────────────────────────────────────────────────────────────

    def __and__(self, other: Operand) -> Vector:
        return self._with(self._ir.and_(*self._pair(other)))

    def __or__(self, other: Operand) -> Vector:
        return self._with(self._ir.or_(*self._pair(other)))

    def __lshift__(self, other: Operand) -> Vector:
        return self._with(self._ir.shl(*self._pair(other)))

    def __rshift__(self, other: Operand) -> Vector:
        """Zeros come in from above."""
        return self._with(self._ir.lshr(*self._pair(other)))

    def widened(self, bits: int) -> Vector:
        """As unsigned integers of so many more bits."""
        return self._with(self._ir.zext(self.value, self.like(ir.IntType(bits))))

    def equals(self, number: int) -> Vector:
        return self._with(self._ir.icmp_unsigned("==", *self._pair(number)))

    def floats(self) -> Vector:
        """As float32; the integers are signed."""
        return self._with(self._ir.sitofp(self.value, self.like(FLOAT)))

    def coded(self, values: Sequence[int]) -> Vector:
        """The one of 16 `values` that each 4-bit integer stands for, chosen bit by bit: no memory is read."""
        choices: list[Any] = [ir.Constant(self._type, [value] * len(self)) for value in values]
        for bit in (1, 2, 4, 8):
            unset = (self & bit).equals(0).value
            choices = [self._ir.select(unset, a, b) for a, b in zip(choices[::2], choices[1::2], strict=True)]
        return self._with(choices[0])

    # ── integers or floats ───────────────────────────────────────────────────────────────────────

    def __add__(self, other: Operand) -> Vector:
        return self._with((self._ir.fadd if self._item == FLOAT else self._ir.add)(*self._pair(other)))

    def __sub__(self, other: Operand) -> Vector:
        return self._with((self._ir.fsub if self._item == FLOAT else self._ir.sub)(*self._pair(other)))

    def __mul__(self, other: Operand) -> Vector:
        return self._with((self._ir.fmul if self._item == FLOAT else self._ir.mul)(*self._pair(other)))

    def where(self, flags: Vector, other: Operand) -> Vector:
        """These where `flags` (of `equals`, or `Block.flags`) holds, `other` elsewhere."""
        return self._with(self._ir.select(flags.value, *self._pair(other)))

    def negated(self) -> Vector:
        """Floats with the other sign."""
        return self._with(self._ir.fneg(self.value))

    # ── places ───────────────────────────────────────────────────────────────────────────────────

    def __getitem__(self, i: int) -> Vector:
        return self._with(self._ir.extract_element(self.value, I32(i)))

    def pick(self, places: Sequence[int]) -> Vector:
        return self._with(self._shuffled(self, places))

    def spread(self, each: int, *places: int) -> Vector:
        """The entries at `places`, `each` times every one of them."""
        return self.pick([place for place in places for _ in range(each)])

    def join(self, other: Vector) -> Vector:
        """These, then as many others."""
        return self._with(self._shuffled(other, range(2 * len(self))))

    def repeated(self, count: int) -> Vector:
        wide = ir.VectorType(self._type, count)
        first = self._ir.insert_element(ir.Constant(wide, ir.Undefined), self.value, I32(0))
        return Vector(self._ir, first).pick([0] * count)

    def _shuffled(self, other: Vector, places: Sequence[int]) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return self._ir.shuffle_vector(self.value, other.value, mask)


class Block:
    """One block: its stored bytes to read, and the place of its values to write.

    `streamed` values go past the caches straight to memory; their place must then begin with a cache line.
    """

    def __init__(self, builder: Any, stored: Any, values: Any, *, streamed: bool = False) -> None:
        self._ir = builder
        self._stored, self._values, self._streamed = stored, values, streamed
        self._tables: dict[int, Any] = {}  # by the identity of arrays, which the caller keeps

    def _load(self, item: Any, at: int) -> Any:
        return self._ir.load(self._ir.gep(self._stored, [I64(at)], source_etype=I8), typ=item, align=1)

    def bytes(self, at: int, count: int) -> Vector:
        """`count` bytes from byte `at` on."""
        return Vector(self._ir, self._load(ir.VectorType(I8, count), at))

    def words(self, at: int, count: int) -> Vector:
        """`count` integers of 16 bits from byte `at` on."""
        return Vector(self._ir, self._load(ir.VectorType(ir.IntType(16), count), at))

    def word(self, at: int, bits: int = 8) -> Vector:
        """One integer of so many bits, the low byte first."""
        return Vector(self._ir, self._load(ir.IntType(bits), at))

    def flags(self, word: Vector) -> Vector:
        """The bits of an integer, the lowest first, each by itself."""
        bits = ir.VectorType(ir.IntType(1), word.value.type.width)
        return Vector(self._ir, self._ir.bitcast(word.value, bits))

    def bits(self, at: int, count: int) -> Vector:
        """`count` bits from byte `at` on, the lowest of each byte first, as bytes of 0 and 1."""
        return self.flags(self.word(at, count)).widened(8)

    def half(self, at: int) -> Vector:
        """One float16 as float32."""
        return self.from_half(self.word(at, 16))

    def from_half(self, words: Vector) -> Vector:
        """The bits of float16 as float32, by integers: not every processor has an instruction for it."""
        h = words.widened(32)
        exponent = h & 0x7C00
        shifted = ((h & 0x7FFF) << 13) + ((127 - 15) << 23)
        large = (shifted | 0x7F800000).where(exponent.equals(0x7C00), shifted)  # infinities and NaN
        denormal = (h & 0x3FF).floats() * 2.0**-24
        magnitude = denormal.where(exponent.equals(0), self._cast(large, FLOAT))
        return self._cast(self._cast(magnitude, I32) | ((h & 0x8000) << 16), FLOAT)

    def from_bfloat(self, words: Vector) -> Vector:
        """The bits of bfloat16 as float32."""
        return self._cast(words.widened(32) << 16, FLOAT)

    def _cast(self, vector: Vector, item: Any) -> Vector:
        """The same bits as another type of as many."""
        return Vector(self._ir, self._ir.bitcast(vector.value, vector.like(item)))

    def entry(self, table: NDArray[Any], index: Vector) -> Vector:
        """Row `index` of a constant table: float32 [n] gives one number, int8 or uint8 [n, width] `width` bytes."""
        data = np.ascontiguousarray(table).reshape(len(table), -1).view(np.uint8)
        place = (index.widened(64) * data.shape[1]).value
        start = self._ir.gep(self._constant(table, data), [place], source_etype=I8)
        item = FLOAT if table.dtype == np.float32 else ir.VectorType(I8, data.shape[1])
        return Vector(self._ir, self._ir.load(start, typ=item, align=1))

    def _constant(self, table: NDArray[Any], data: NDArray[np.uint8]) -> Any:
        if id(table) not in self._tables:
            content = ir.Constant(ir.ArrayType(I8, data.size), bytearray(data.tobytes()))
            constant = ir.GlobalVariable(self._ir.module, content.type, f"table{len(self._tables)}")
            constant.linkage, constant.global_constant, constant.initializer = "internal", True, content
            self._tables[id(table)] = constant
        return self._tables[id(table)]

    def put(self, at: int, values: Vector) -> None:
        """Floats become the block's values from `at` on."""
        place = self._ir.gep(self._values, [I64(4 * at)], source_etype=I8)
        if not self._streamed:
            self._ir.store(values.value, place, align=4)
            return
        # The largest power of two that divides the place: an instruction that streams takes no other places.
        store = self._ir.store(values.value, place, align=math.gcd(4 * at, LINE))
        store.set_metadata("nontemporal", self._ir.module.add_metadata([I32(1)]))
