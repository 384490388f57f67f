"""An emulator of PTX, the assembly that Triton emits for NVIDIA GPUs, on this process's memory.

Terms:

* program: one CTA. Its threads run together. Programs run one after another, in a shuffled order.
* warp: 32 threads of consecutive numbers. Diverged threads of a program reconverge when their
  program counters are equal: the threads with the lowest counter run first. ``by_warp`` runs each
  warp alone until it waits at a barrier, and detects races (see ``ptx_races.py``). So it finds
  missing barriers within a program and missing synchronization between programs.
* lane: the index of a thread in a numpy array. A register is such an array, of unsigned integers.
* mask: the lanes that execute an instruction; None for all.
* guard: the predicate ``@%p`` of an instruction.
* memory: the tensors of this process, at their own addresses. A program may access only allowed
  tensors, within their bounds.

Only the instructions of this package's kernels are implemented (see ``ptx_instructions.py``). Any
other raises NotImplementedError when a kernel is parsed, even if it would not be executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ptx_instructions import OPERATIONS, TYPES, Array
from .ptx_memory import Memory, Shared
from .ptx_races import ATOMIC, READ, WRITE, AccessLog

Mask = Any  # numpy.ndarray of bool, or None for all lanes

WARP = 32
# The value of lanes that were never written: negative as an integer, a tiny number as a float.
JUNK = 0xA5A5A5A5A5A5A5A5
SYMBOL = "global_smem"  # the one shared array, at address 0 of shared memory
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x")
# .cg only selects caches
ACCESS = re.compile(
    r"(ld|st)\.(global|shared|param)(?:::cta)?(?:\.cg)?(?:\.v([24]))?\.(b16|b32|b64)"
)
ADD = "atom.global.gpu.acq_rel.add.u32"
SHUFFLE = "shfl.sync.bfly.b32"
KINDS = {"ld": READ, "st": WRITE}


class LaunchError(RuntimeError):
    """A launch that on a GPU would fail, deadlock, or access memory that is not its own."""


# ---------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True)
class Instruction:
    """One line of a kernel. ``run`` is None for branches, barriers and returns."""

    text: str  # with the line of the Triton source that it comes from
    opcode: str
    guard: str  # a predicate, or empty
    negated: bool
    operands: tuple[str, ...]
    run: Callable[[Program, Mask], None] | None


class Kernel:
    """A parsed kernel.

    Args:
        ptx: assembly of one kernel.
        shared: bytes of shared memory.
    """

    def __init__(self, ptx: str, shared: int) -> None:
        header, _, rest = ptx.partition(".entry")[2].partition("\n{")
        body = rest.partition("\n}")[0]
        threads = re.search(r"\.reqntid (\d+)", header)
        assert threads
        self.threads = int(threads[1])
        self.shared = shared
        self.parameters = [
            (name, int(bits))
            for bits, name in re.findall(r"\.param \.[a-z](\d+)[^,)]*?(\w+)\s*[,)]", header)
        ]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._registers: dict[str, Any] = {}
        source = ""
        for line in body.splitlines():
            statement, _, comment = line.partition("//")
            statement = statement.strip()
            if statement.startswith(".loc"):
                source = comment.strip()
            elif declared := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)<\d+>;", statement):
                self._registers[declared[2]] = _unsigned(TYPES[declared[1]])
            elif label := re.fullmatch(r"([$\w]+):", statement):
                self.labels[label[1]] = len(self.code)
            elif statement:
                self.code.append(self._instruction(statement, source))

    def _instruction(self, statement: str, source: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);", statement)
        if not match:
            raise NotImplementedError(statement)
        negation, guard, opcode, rest = match.groups()
        operands = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))
        text = f"{statement} ({source})"
        run = None
        if opcode in OPERATIONS:
            run = self._elementwise(opcode, operands)
        elif opcode.startswith("mov."):
            run = self._move(TYPES[opcode[4:]], *operands)
        elif access := ACCESS.fullmatch(opcode):
            run = self._access(text, access, *operands)
        elif opcode == ADD:
            run = self._atomic_add(text, *operands)
        elif opcode == SHUFFLE and operands[3:] == ("31", "-1"):
            run = self._shuffle(text, *operands[:3])
        elif opcode not in ("bra", "bra.uni", "ret") and (opcode, operands, guard) != (
            "bar.sync",
            ("0",),
            None,
        ):
            raise NotImplementedError(text)
        return Instruction(text, opcode, guard or "", bool(negation), operands, run)

    def _source(self, operand: str, dtype: Any) -> tuple[str, Any] | Array:
        """Return a register and the type that it is read as, or a constant."""
        if operand.startswith("%"):
            if operand not in SPECIAL:
                self._target(operand, dtype)
            return operand, dtype
        if operand == SYMBOL:
            value = 0
        elif operand.startswith(("0f", "0d")):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0)
        bits = _unsigned(dtype)
        return np.full(self.threads, value & np.iinfo(bits).max, dtype=bits).view(dtype)

    def _target(self, operand: str, dtype: Any) -> str:
        """Check that a register has the type's width, and return it."""
        declared = self._registers.get(operand.rstrip("0123456789"))
        if declared is not _unsigned(dtype):
            raise NotImplementedError(f"{operand} as {np.dtype(dtype)}")
        return operand

    def _vector(self, operand: str, dtype: Any) -> list[str]:
        return [x if x == "_" else self._target(x, dtype) for x in re.findall(r"%\w+|_", operand)]

    def _address(self, operand: str) -> tuple[Any, int]:
        """Parse ``[register + offset]`` or ``[symbol]``."""
        match = re.fullmatch(r"\[\s*(%rd?\d+|\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        assert match, operand
        return self._source(match[1], np.int64 if match[1].startswith("%rd") else np.int32), int(
            match[2] or 0
        )

    def _elementwise(self, opcode: str, operands: tuple[str, ...]) -> Any:
        result, types, function = OPERATIONS[opcode]
        sources = [self._source(x, TYPES[t]) for x, t in zip(operands[1:], types, strict=True)]
        target = self._target(operands[0], TYPES[result])
        return lambda program, mask: program.write(
            target, function(*[program.read(x, mask) for x in sources]), mask
        )

    def _move(self, dtype: Any, to: str, source: str) -> Any:
        if to.startswith("{"):  # the low half comes first
            halves, half = self._vector(to, _HALF[dtype]), _HALF[dtype]
            whole = self._source(source, dtype)

            def unpack(program: Program, mask: Mask) -> None:
                parts = program.read(whole, mask).view(half).reshape(-1, 2)
                for i, register in enumerate(halves):
                    if register != "_":
                        program.write(register, np.ascontiguousarray(parts[:, i]), mask)

            return unpack
        target = self._target(to, dtype)
        if source.startswith("{"):
            parts = [self._source(x, _HALF[dtype]) for x in self._vector(source, _HALF[dtype])]

            def pack(program: Program, mask: Mask) -> None:
                program.write(
                    target,
                    np.stack([program.read(x, mask) for x in parts], axis=1).view(dtype).ravel(),
                    mask,
                )

            return pack
        value = self._source(source, dtype)
        return lambda program, mask: program.write(target, program.read(value, mask), mask)

    def _access(self, text: str, access: re.Match[str], *operands: str) -> Any:
        kind, space, width, type_ = access.groups()
        dtype = TYPES[type_]
        if space == "param":
            names = [name for name, _ in self.parameters]
            index, target = names.index(operands[1].strip("[]")), self._target(operands[0], dtype)
            bits = self.parameters[index][1]
            assert bits == 8 * np.dtype(dtype).itemsize
            return lambda program, mask: program.write(
                target, np.full(self.threads, program.arguments[index] % (1 << bits), dtype), None
            )
        (base, offset), data = (self._address(operands[kind == "ld"]), operands[kind == "st"])
        registers = self._vector(data, dtype)
        if len(registers) != int(width or 1):
            raise NotImplementedError(text)
        size = len(registers) * np.dtype(dtype).itemsize

        def run(program: Program, mask: Mask) -> None:
            cells, first = program.locate(
                text, space, program.read(base, mask) + offset, size, mask, dtype, KINDS[kind]
            )
            for i, register in enumerate(registers):
                if kind == "st":
                    cells[first + i] = stored = program.read((register, dtype), mask)
                    if (cells[first + i] != stored).any():
                        raise LaunchError(f"{text}: threads store different values at one address")
                else:
                    program.write(register, cells[first + i], mask)

        return run

    def _atomic_add(self, text: str, to: str, address: str, value: str) -> Any:
        target, (base, offset), added = (
            self._target(to, np.uint32),
            self._address(address),
            self._source(value, np.uint32),
        )

        def run(program: Program, mask: Mask) -> None:
            cells, where = program.locate(
                text, "global", program.read(base, mask) + offset, 4, mask, np.uint32, ATOMIC
            )
            old = np.zeros(len(where), np.uint32)
            for i, (cell, more) in enumerate(zip(where, program.read(added, mask), strict=True)):
                old[i] = cells[cell]
                cells[cell] += more
            program.write(target, old, mask)

        return run

    def _shuffle(self, text: str, to: str, value: str, lanes: str) -> Any:
        """Take the value of the thread whose number in the warp differs in the bits ``lanes``."""
        target, source, partner = (
            self._target(to, np.uint32),
            self._source(value, np.uint32),
            np.arange(self.threads) ^ int(lanes),
        )

        def run(program: Program, mask: Mask) -> None:
            if (
                mask is not None
                and not np.isin(mask.reshape(-1, WARP).sum(axis=1), (0, WARP)).all()
            ):
                raise LaunchError(f"{text}: only a part of a warp takes part")
            values = program.read(source, None)[partner]
            program.write(target, values if mask is None else values[mask], mask)

        return run


def _unsigned(dtype: Any) -> Any:
    return np.bool_ if dtype is np.bool_ else np.dtype(f"uint{8 * np.dtype(dtype).itemsize}").type


_HALF = {np.uint32: np.uint16, np.uint64: np.uint32}


# -------------------------------------------------------------------------------------- execution


class Program:
    """One program, from its first instruction to its last.

    Args:
        kernel: its code.
        number: its index.
        programs: the number of programs of the launch.
        arguments: one integer for each parameter.
        memory: the global memory.
        warp_order: the order of warps that run one by one; None: they run together.
        log: records all accesses.
    """

    def __init__(
        self,
        kernel: Kernel,
        number: int,
        programs: int,
        arguments: Sequence[int],
        memory: Memory,
        warp_order: Sequence[int] | None = None,
        log: AccessLog | None = None,
    ) -> None:
        lanes = np.arange(kernel.threads)
        self.arguments = arguments
        self._kernel = kernel
        self._number = number
        self._log = log
        self._epoch = 0
        self._spaces: dict[str, Memory | Shared] = {
            "global": memory,
            "shared": Shared(kernel.shared),
        }
        values = zip(SPECIAL, (lanes, number, programs), strict=True)
        self._values: dict[str, Array] = {
            name: np.full(len(lanes), value, np.uint32) for name, value in values
        }
        self._order = (
            [np.ones(len(lanes), np.bool_)]
            if warp_order is None
            else [lanes // WARP == warp for warp in warp_order]
        )
        self._next = np.zeros(
            len(lanes), np.int64
        )  # for each thread the index of its next instruction
        self._running = np.ones(len(lanes), np.bool_)
        self._waiting = np.zeros(len(lanes), np.bool_)

    def read(self, source: tuple[str, Any] | Array, mask: Mask) -> Array:
        """Return the values of the active lanes.

        Lanes whose results are never used may read lanes that were never written.
        """
        values = source
        if isinstance(source, tuple):
            written = self._values.get(source[0])
            values = (self._junk(_unsigned(source[1])) if written is None else written).view(
                source[1]
            )
        return values if mask is None else values[mask]

    def write(self, register: str, values: Array, mask: Mask) -> None:
        """Set the register in the active lanes: the inverse of ``read``."""
        values = values.view(_unsigned(values.dtype.type))
        if mask is not None:
            old, active = self._values.get(register), values
            values = self._junk(active.dtype) if old is None else old.copy()
            values[mask] = active
        self._values[register] = values

    def _junk(self, dtype: Any) -> Array:
        return np.full(self._kernel.threads, JUNK % (1 << 8 * np.dtype(dtype).itemsize), dtype)

    def locate(
        self, text: str, space: str, addresses: Array, size: int, mask: Mask, dtype: Any, kind: int
    ) -> tuple[Array, Array]:
        """Check an access to memory.

        Returns:
            An array, and the indices of the first elements at the addresses in it.
        """
        memory = self._spaces[space]
        if objection := memory.objection(addresses, size, kind != READ):
            raise LaunchError(f"{text}: {objection}")
        if self._log:
            threads = np.arange(self._kernel.threads) if mask is None else np.flatnonzero(mask)
            place = 0 if space == "global" else -(self._number + 1) << 20
            self._log.add(
                text,
                kind,
                self._number,
                self._epoch,
                threads,
                addresses.astype(np.int64) + place,
                size,
            )
        return memory.cells(dtype), (addresses - memory.base) // np.dtype(dtype).itemsize

    def run(self) -> None:
        while self._running.any():
            ready = self._running & ~self._waiting
            if not ready.any():
                self._open_barrier()
                continue
            ready &= next(warps for warps in self._order if (warps & ready).any())
            first = self._next[ready].min()
            threads = ready & (self._next == first)
            others = self._next[ready & ~threads]
            self._run_some(threads, first, others.min() if others.size else len(self._kernel.code))

    def _run_some(self, threads: Array, at: int, end: int) -> None:
        """Run some threads until they diverge, wait, return or reconverge with others."""
        everybody = None if threads.all() else threads
        while at < end:
            instruction = self._kernel.code[at]
            at += 1
            mask = everybody
            if instruction.guard:
                mask = threads & (self._values[instruction.guard] != instruction.negated)
                if instruction.run and not mask.any():
                    continue
                mask = None if mask.all() else mask
            if instruction.run:
                instruction.run(self, mask)
                continue
            self._next[threads] = at
            affected = slice(None) if mask is None else mask
            if instruction.opcode == "ret":
                self._running[affected] = False
            elif instruction.opcode == "bar.sync":
                self._waiting[affected] = True
            else:
                self._next[affected] = self._kernel.labels[instruction.operands[0]]
            return
        assert end < len(self._kernel.code), "a kernel ends by returning"
        self._next[threads] = at

    def _open_barrier(self) -> None:
        if not self._waiting.all() or len(set(self._next.tolist())) > 1:
            raise LaunchError(
                "threads wait at different barriers, or for threads that have returned"
            )
        self._waiting[:] = False
        self._epoch += 1


def launch(
    kernel: Kernel,
    programs: int,
    arguments: Sequence[int],
    memory: Memory,
    *,
    by_warp: bool,
    generator: np.random.Generator,
) -> None:
    """Run all programs of a launch.

    Running by warp is slow, so of many programs only the last 40 run by warp.
    """
    assert len(arguments) == len(kernel.parameters)
    log = AccessLog()
    with np.errstate(all="ignore"):
        for left, number in zip(
            range(programs, 0, -1), generator.permutation(programs).tolist(), strict=True
        ):
            if by_warp and left <= 40:
                Program(
                    kernel,
                    number,
                    programs,
                    arguments,
                    memory,
                    generator.permutation(kernel.threads // WARP),
                    log,
                ).run()
            else:
                Program(kernel, number, programs, arguments, memory).run()
    if by_warp and (races := log.races()):
        raise LaunchError("; ".join(races))
