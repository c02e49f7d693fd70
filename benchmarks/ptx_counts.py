"""How many instructions the warps of a launch execute, counted by following its PTX on the CPU.

Where our kernels go depends on sizes, on block and thread, and on who arrives last; never on activations. So only
integers are computed here, of all threads side by side, and whatever comes from memory or from floats is unknown; a
branch on that (is every value finite?) is taken, which skips what it can, so that counts are lower bounds; a loop
that ends on it is an error. Machine code differs from PTX by some 10 % in instructions. Nothing was measured on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
#: Of a register: None where it is not known.
Value = NDArray[Any] | None

_JUMPS = ("bra", "ret", "exit")
#: Threads that are followed at a time; of larger launches, evenly spread blocks.
_MOST_THREADS = 1 << 16
_MOST_STEPS = 10**6


class UnknownWay(RuntimeError):
    """A branch depends on what is not known here."""


@dataclass(frozen=True)
class _Instruction:
    text: str
    predicate: str
    negated: bool
    name: tuple[str, ...]  # the opcode's parts
    operands: tuple[str, ...]

    @property
    def bits(self) -> int:
        """Of its type, the last that is named; 0 where none is."""
        found = [re.fullmatch(r"[usb](8|16|32|64)", part) for part in self.name]
        return next((int(match[1]) for match in reversed(found) if match), 0)

    @property
    def signed(self) -> bool:
        return any(re.fullmatch(r"s\d+", part) for part in self.name)

    @property
    def floating(self) -> bool:
        return any(re.search(r"^(b?f\d+|tf32|e\dm\d)", part) for part in self.name)


@dataclass(frozen=True)
class Kernel:
    """The instructions of an entry, its parameters' names in order, where labels point, and which branches end loops."""

    instructions: Sequence[_Instruction]
    parameters: Sequence[str]
    labels: Mapping[str, int]
    loops: frozenset[int]

    @staticmethod
    def parse(ptx: str, entry: str) -> Kernel:
        """``entry`` of a module.

        Raises:
            ValueError: there is no such entry.
        """
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.DOTALL)
        text = re.sub(r"^\s*\.(loc|file|pragma)\b.*$", "", text, flags=re.MULTILINE)
        head = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)[^{{]*\{{", text, re.DOTALL)
        if head is None:
            raise ValueError(f"the PTX has no entry {entry}")
        parameters = [one.split()[-1].split("[")[0] for one in head[1].split(",") if one.strip()]
        instructions: list[_Instruction] = []
        labels: dict[str, int] = {}
        depth, statement = 1, ""
        for character in text[head.end() :]:
            if character in "{}" and not statement.strip():  # a scope, not a vector of operands
                depth += 1 if character == "{" else -1
                if depth == 0:
                    break
            elif character == ":" and re.fullmatch(r"\s*[\w$]+", statement):
                labels[statement.strip()] = len(instructions)
                statement = ""
            elif character == ";":
                if statement.strip() and not statement.strip().startswith("."):
                    instructions.append(_instruction(" ".join(statement.split())))
                statement = ""
            else:
                statement += character
        return Kernel(instructions, parameters, labels, _loops(instructions, labels))


def _loops(instructions: Sequence[_Instruction], labels: Mapping[str, int]) -> frozenset[int]:
    """The branches that end a loop: whose target is on every way to them."""
    count = len(instructions)
    starts = {0, *labels.values()}
    starts |= {i + 1 for i, one in enumerate(instructions) if one.name[0] in _JUMPS}
    order = sorted(starts - {count})
    block = {start: number for number, start in enumerate(order)}
    before: dict[int, set[int]] = {start: set() for start in order}
    branches: dict[int, tuple[int, int]] = {}  # its block and its target
    for start, end in zip(order, [*order[1:], count]):
        last = instructions[end - 1]
        if last.name[0] == "bra":
            target = labels[last.operands[0]]
            branches[end - 1] = (start, target)
            if target < count:
                before[target].add(start)
        if end < count and (last.name[0] not in _JUMPS or last.predicate):
            before[end].add(start)
    every = (1 << len(order)) - 1
    over = {
        start: every if start else 1 for start in order
    }  # the blocks on every way to it, as bits
    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            common = every
            for each in before[start]:
                common &= over[each]
            common |= 1 << block[start]
            changed |= common != over[start]
            over[start] = common
    return frozenset(
        at
        for at, (start, target) in branches.items()
        if target in block and over[start] >> block[target] & 1
    )


def _instruction(text: str) -> _Instruction:
    match = re.fullmatch(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", text)
    if match is None:
        raise ValueError(f"not an instruction: {text}")
    negated, predicate, name, rest = match.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    return _Instruction(
        text, predicate or "", negated == "!", tuple(name.split(".")), tuple(operands)
    )


def _wrapped(value: NDArray[Any], bits: int, signed: bool) -> Integers:
    """As a register of ``bits`` holds it; 64-bit ones are signed here."""
    value = value.astype(np.int64)
    if bits in (0, 64):
        return value
    value = value & ((1 << bits) - 1)
    return value - ((value >> (bits - 1)) << bits) if signed else value


def _quotient(a: Integers, b: Integers) -> Integers:
    """Rounded towards zero."""
    b = np.where(b == 0, 1, b)
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


_ARITHMETIC: dict[str, Callable[..., NDArray[Any]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": lambda a, n: np.where(n > 63, 0, a << np.minimum(n, 63)),
    "shr": lambda a, n: a >> np.minimum(n, 63),
    "bfe": lambda a, at, n: (a >> at) & ((1 << n) - 1),
    "bfi": lambda a, b, at, n: (b & ~(((1 << n) - 1) << at)) | ((a & ((1 << n) - 1)) << at),
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "cvt": lambda a: a,
}
_COMPARISONS: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "lo": np.less,
    "le": np.less_equal,
    "ls": np.less_equal,
    "gt": np.greater,
    "hi": np.greater,
    "ge": np.greater_equal,
    "hs": np.greater_equal,
}


class _Run:
    """Threads side by side; those with the lowest address go first, so that ways meet again."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[int],
        grid: tuple[int, int, int],
        threads: int,
        blocks: Integers,
    ) -> None:
        self._kernel, self._threads = kernel, threads
        self._given = dict(zip(kernel.parameters, arguments, strict=True))
        n = len(blocks) * threads
        thread, block = np.tile(np.arange(threads), len(blocks)), np.repeat(blocks, threads)
        x, y, z = grid
        self._special: dict[str, Any] = {
            "%tid.x": thread,
            "%ntid.x": threads,
            "%laneid": thread % 32,
            "%ctaid.x": block % x,
            "%ctaid.y": block // x % y,
            "%ctaid.z": block // x // y,
            "%nctaid.x": x,
            "%nctaid.y": y,
            "%nctaid.z": z,
            **dict.fromkeys(("%tid.y", "%tid.z"), 0),
            **dict.fromkeys(("%ntid.y", "%ntid.z"), 1),
        }
        self._all = np.arange(n)
        self._block = self._all // threads
        self._registers: dict[str, Value] = {}
        self._shared: dict[tuple[int, int], int] = {}  # (block, address): known words
        self._counters: dict[int, int] = {}  # what integer atomics count, by address
        self.warp_instructions = 0

    def run(self) -> None:
        end = len(self._kernel.instructions)
        at = np.zeros(len(self._all), np.int64)
        for _ in range(_MOST_STEPS):
            now = int(at.min())
            if now >= end:
                return
            lanes = np.flatnonzero(at == now)
            together = len(lanes) == len(at)
            self.warp_instructions += len(at) // 32 if together else len(np.unique(lanes // 32))
            at[lanes] = now + 1
            one = self._kernel.instructions[now]
            active = lanes
            if one.predicate:
                holds = self._predicate(one.predicate, one.negated)
                if holds is None:
                    if now in self._kernel.loops or one.name[0] in ("ret", "exit"):
                        raise UnknownWay(f"a loop that ends on what is not known: {one.text}")
                    holds = np.asarray(one.name[0] == "bra")
                    for name in self._written(one):
                        self._registers[name] = None
                active = lanes[np.broadcast_to(holds, at.shape)[lanes]]
            if one.name[0] == "bra":
                at[active] = self._kernel.labels[one.operands[0]]
            elif one.name[0] in ("ret", "exit"):
                at[active] = end
            elif len(active):
                self._step(one, active)
        raise RuntimeError(f"no end after {_MOST_STEPS} steps")

    def _predicate(self, name: str, negated: bool) -> Value:
        value = self._registers.get(name)
        return None if value is None else np.logical_xor(value, negated)

    @staticmethod
    def _written(one: _Instruction) -> list[str]:
        if (
            one.name[0] in ("bra", "red", "bar", "barrier", "cp", "fence", "membar")
            or not one.operands
        ):
            return []
        return re.findall(r"[\w%$.]+", one.operands[0].replace("|", " "))

    def _read(self, operand: str, bits: int = 64, signed: bool = True) -> Value:
        """Of all threads, or one value for them."""
        if operand in self._special:
            return np.asarray(self._special[operand])
        if re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)U?", operand):
            return _wrapped(np.asarray(int(operand.rstrip("U"), 0)), bits, signed)
        if operand.startswith(("!", "%")) or operand in self._registers:
            if operand.startswith("!"):
                return self._predicate(operand[1:], True)
            value = self._registers.get(operand)
            return value if value is None or value.dtype == bool else _wrapped(value, bits, signed)
        if re.fullmatch(r"[A-Za-z_$][\w$]*", operand):  # a symbol: all shared memory begins at 0
            return np.asarray(0)
        return None

    def _write(self, name: str, value: Value, active: Integers) -> None:
        if value is None or len(active) == len(self._all):
            value = None if value is None else np.broadcast_to(value, self._all.shape).copy()
            self._registers[name] = value
            return
        old = self._registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros(len(self._all), value.dtype)
        old[active] = np.broadcast_to(value, self._all.shape)[active]
        self._registers[name] = old

    def _step(self, one: _Instruction, active: Integers) -> None:
        base, operands = one.name[0], one.operands
        if base in ("ld", "st"):
            (self._ld if base == "ld" else self._st)(one, active)
            return
        written = self._written(one)
        if base in ("atom", "shfl", "setp", "selp", "bar", "barrier"):
            value = getattr(self, f"_{'bar' if base == 'barrier' else base}")(one, active)
            if "red" in one.name and base in ("bar", "barrier"):
                written = [operands[0]]
        elif base in ("mul", "mad") and "wide" in one.name:
            value = self._computed(one, half=True)
        elif base == "mov" and "{" in one.text:
            self._packed(one, active)
            return
        elif "s16x2" in one.name or "u16x2" in one.name:
            value = self._pairs(one)
        elif base == "mbarrier" and "try_wait" in one.name:
            value = np.ones(
                len(self._all), bool
            )  # what it waits for is there: counts are lower bounds
        elif base in _ARITHMETIC and not one.floating and "hi" not in one.name:
            value = self._computed(one)
        elif base == "mul" and "hi" in one.name and one.bits == 32:
            a, b = (self._read(x, 32, one.signed) for x in operands[1:])
            value = None if a is None or b is None else a * b >> 32
        else:
            value = None
        if base == "setp" and len(written) == 2:
            self._write(written[1], None if value is None else ~value, active)
            written = written[:1]
        for name in written:
            self._write(name, value if len(written) == 1 else None, active)

    def _computed(self, one: _Instruction, half: bool = False) -> Value:
        """``half``: a product twice as wide as its factors."""
        base, bits, signed = one.name[0], one.bits, one.signed
        if "pred" in one.name:
            found = [self._read(x) for x in one.operands[1:]]
            known = [x for x in found if x is not None]
            if len(known) < len(found):
                return None
            return np.invert(known[0]) if base == "not" else _ARITHMETIC[base](*known)
        count = len(one.operands) - 1
        kinds = [(bits, signed)] * count
        if base in ("shl", "shr"):
            kinds[1] = (32, False)
        if base in ("bfe", "bfi"):
            kinds[-2:] = [(32, False)] * 2
        if half and base == "mad":
            kinds[2] = (2 * bits, signed)
        values = [self._read(x, *kind) for x, kind in zip(one.operands[1:], kinds)]
        if any(value is None for value in values):
            return None
        if any(value is not None and value.dtype == bool for value in values):
            return values[0]  # a predicate that is moved
        result = _ARITHMETIC[base](*values)
        if base == "cvt":
            to = re.fullmatch(
                r"[usb](\d+)", next(p for p in one.name if re.fullmatch(r"[usb]\d+", p))
            )
            assert to is not None
            return _wrapped(result, int(to[1]), to[0][0] == "s")
        return result if half else _wrapped(result, bits, signed)

    def _packed(self, one: _Instruction, active: Integers) -> None:
        """A register from its parts, lowest first, or parts of a register; a part that is not known counts as 0."""
        to, source = ([x.strip() for x in side.strip("{}").split(",")] for side in one.operands)
        part = one.bits // max(len(to), len(source))
        if len(to) == 1:
            values = [self._read(x, part, False) for x in source]
            known = [0 if v is None else v << i * part for i, v in enumerate(values)]
            whole = None if all(v is None for v in values) else np.asarray(sum(known))
            self._write(to[0], whole, active)
            return
        value = self._read(source[0], one.bits, False)
        for index, name in enumerate(to):
            if name != "_":
                self._write(name, None if value is None else value >> index * part, active)

    def _pairs(self, one: _Instruction) -> Value:
        """Both halves of 32 bits by themselves."""
        halves = []
        for shift in (0, 16):
            values = [self._read(x, 32, False) for x in one.operands[1:]]
            known = [_wrapped(v >> shift, 16, "s16x2" in one.name) for v in values if v is not None]
            if len(known) < len(values) or one.name[0] not in _ARITHMETIC:
                return None
            halves.append(_wrapped(_ARITHMETIC[one.name[0]](*known), 16, False) << shift)
        return halves[0] | halves[1]

    def _setp(self, one: _Instruction, active: Integers) -> Value:
        if one.floating:
            return None
        a, b = (self._read(x, one.bits, one.signed) for x in one.operands[1:3])
        if a is None or b is None:
            return None
        value: NDArray[Any] = _COMPARISONS[one.name[1]](a, b)
        if len(one.operands) > 3:
            other = self._read(one.operands[3])
            if other is None:
                return None
            value = _ARITHMETIC[one.name[2]](value, other)
        return value

    def _selp(self, one: _Instruction, active: Integers) -> Value:
        chosen = self._read(one.operands[3])
        a, b = (self._read(x, one.bits, one.signed) for x in one.operands[1:3])
        if one.floating or chosen is None or a is None or b is None:
            return None
        return np.where(chosen, a, b)

    def _shfl(self, one: _Instruction, active: Integers) -> Value:
        value, lane = self._read(one.operands[1]), self._read(one.operands[2])
        if "idx" not in one.name or value is None or lane is None or "|" in one.operands[0]:
            return None
        return np.broadcast_to(value, self._all.shape)[self._all // 32 * 32 + lane % 32]

    def _bar(self, one: _Instruction, active: Integers) -> Value:
        if "red" not in one.name or "or" not in one.name:
            return None
        value = self._read(one.operands[-1])
        if value is None:
            return None
        by_block = np.broadcast_to(value, self._all.shape).reshape(-1, self._threads)
        return np.repeat(by_block.any(1), self._threads)

    def _address(self, operand: str) -> Value:
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            return None
        base = self._read(match[1])
        return None if base is None else base + int(match[2] or "0", 0)

    def _ld(self, one: _Instruction, active: Integers) -> None:
        written = self._written(one)
        values: list[Value] = [None] * len(written)
        if "param" in one.name:
            given = self._given.get(one.operands[1].strip("[]"))
            values = [None if given is None or one.floating else np.asarray(given)]
        elif "shared" in one.name and self._shared and not one.floating:
            places = self._places(one.operands[1], active)
            for index in range(len(written) if places is not None else 0):
                step = index * one.bits // 8
                words = [self._shared.get((block, at + step)) for block, at in places or ()]
                known = [word for word in words if word is not None]
                if len(known) == len(words):
                    found = np.zeros(len(self._all), np.int64)
                    found[active] = known
                    values[index] = found
        for name, value in zip(written, values, strict=True):
            self._write(name, value, active)

    def _places(self, operand: str, active: Integers) -> list[tuple[int, int]] | None:
        """Block and address of each thread's access."""
        address = self._address(operand)
        if address is None:
            return None
        addresses = np.broadcast_to(address, self._all.shape)[active]
        return list(zip(self._block[active].tolist(), addresses.tolist()))

    def _st(self, one: _Instruction, active: Integers) -> None:
        """Known words in shared memory are kept: a block tells its threads so that it was the last."""
        if "shared" not in one.name:
            return
        given = one.operands[1].strip("{}").split(",")
        values = [None if one.floating else self._read(x.strip(), one.bits) for x in given]
        if not self._shared and all(value is None for value in values):
            return
        places = self._places(one.operands[0], active)
        for index, value in enumerate(values if places is not None else ()):
            step = index * one.bits // 8
            words = None if value is None else np.broadcast_to(value, self._all.shape)[active]
            for number, (block, at) in enumerate(places or ()):
                if words is None:
                    self._shared.pop((block, at + step), None)
                else:
                    self._shared[block, at + step] = int(words[number])

    def _atom(self, one: _Instruction, active: Integers) -> Value:
        address, value = self._address(one.operands[1]), self._read(one.operands[2], one.bits)
        if address is None or value is None or one.floating:
            return None
        before = np.zeros(len(self._all), np.int64)
        for lane in active:
            place = int(np.broadcast_to(address, self._all.shape)[lane])
            by = int(np.broadcast_to(value, self._all.shape)[lane])
            old = before[lane] = self._counters.get(place, 0)
            if "add" in one.name:
                self._counters[place] = old + by
            elif "inc" in one.name:
                self._counters[place] = 0 if old >= by else old + 1
            else:
                raise UnknownWay(f"an atomic that is not followed: {one.text}")
        return before


def instructions(ptx: str, about: Mapping[str, Any]) -> float:
    """Warp instructions that a block executes on average.

    Args:
        ptx: a launch's code.
        about: its description, as ``fastscnn_fast dump`` writes it (:mod:`fastscnn_fast.backends.gpu.dump`).

    Raises:
        UnknownWay: where it goes depends on what it reads.
    """
    kernel = Kernel.parse(ptx, about["entry"])
    x, y, z = about["grid"]
    threads, programs = about["block"][0], prod(about["grid"])
    arguments = list(_arguments(about["parameters"]))
    followed = min(programs, max(1, _MOST_THREADS // threads))
    blocks = np.unique(np.linspace(0, programs - 1, followed).astype(np.int64))
    run = _Run(kernel, arguments, (x, y, z), threads, blocks)
    run.run()
    return run.warp_instructions / len(blocks)


def _arguments(parameters: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Memories lie far apart; of floats nothing is known."""
    for index, one in enumerate(parameters):
        if one["kind"] == "pointer":
            yield (index + 1) << 40
        else:
            yield int(one["value"]) if one["dtype"].startswith(("int", "i")) else 0
