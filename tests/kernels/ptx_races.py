"""Finds accesses of emulated programs that nothing orders: a GPU may execute them in any order, and the emulator has tried only one.

Vocabulary:

* cell: two bytes of memory, the least that an instruction accesses.
* epoch: how many barriers a program has passed. Between threads of a program, a barrier orders what lies in different epochs.
* ticket: a program's one atomic operation (acquire and release). What comes before it, in its own thread or in an earlier epoch, is
  *released*; what comes after it, likewise, has *acquired*. Between programs, only what is released before one's ticket is ordered
  before what has acquired by a later ticket.
"""

from __future__ import annotations

from typing import Any

import numpy as np

READ, WRITE, ATOMIC = 0, 1, 2
CELL, TIME, PROGRAM, THREAD, EPOCH, KIND, TEXT = range(7)  # columns of the log


class AccessLog:
    """The accesses of a launch, in the order of their execution."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._texts: dict[str, int] = {}
        self._tickets: dict[int, Any] = {}  # of each program

    def add(
        self,
        text: str,
        kind: int,
        program: int,
        epoch: int,
        threads: Any,
        addresses: Any,
        size: int,
    ) -> None:
        """Note one instruction. Of shared memory the addresses are below zero, and each program has its own."""
        cells = (addresses[:, None] // 2 + np.arange(size // 2)).ravel()
        rows = np.empty((len(cells), 7), np.int64)
        text_number = self._texts.setdefault(text, len(self._texts))
        columns = (
            cells,
            len(self._rows),
            program,
            np.repeat(threads, size // 2),
            epoch,
            kind,
            text_number,
        )
        for i, values in enumerate(columns):
            rows[:, i] = values
        self._rows.append(rows)
        if kind == ATOMIC:
            if program in self._tickets or len(set(threads)) > 1:
                raise NotImplementedError(f"{text}: a program's second atomic operation")
            self._tickets[program] = rows[0]

    def races(self) -> list[str]:
        """A sentence for each pair of instructions that met in a cell unordered, one of them writing."""
        rows = np.concatenate(self._rows)
        rows = rows[np.lexsort((rows[:, TIME], rows[:, CELL]))]
        firsts = np.flatnonzero(np.diff(rows[:, CELL], prepend=rows[0, CELL] - 1))
        ends = np.append(firsts[1:], len(rows))
        thread = rows[:, PROGRAM] << 32 | rows[:, THREAD]
        met = np.minimum.reduceat(thread, firsts) != np.maximum.reduceat(thread, firsts)
        met &= np.maximum.reduceat(rows[:, KIND], firsts) > READ
        names = list(self._texts)
        found = set()
        for first, end in zip(firsts[met], ends[met], strict=True):
            cell = rows[first:end]
            sides = self._sides(cell)
            for access, side in zip(cell, sides, strict=True):
                if access[KIND] > READ:
                    both_atomic = (access[KIND] == ATOMIC) & (cell[:, KIND] == ATOMIC)
                    for other in cell[self._unordered(cell, sides, access, side) & ~both_atomic]:
                        found.add(
                            tuple(
                                names[x[TEXT]]
                                for x in sorted((access, other), key=lambda x: x[TIME])
                            )
                        )
        return [f"nothing orders {a} and {b}" for a, b in sorted(found)]

    @staticmethod
    def _unordered(cell: Any, sides: Any, access: Any, side: float) -> Any:
        """Which of the accesses of a cell are ordered neither before nor after one of them. Threads may store the same value at once."""
        by_program = (cell[:, THREAD] == access[THREAD]) | (cell[:, EPOCH] != access[EPOCH])
        by_tickets = np.where(
            cell[:, TIME] < access[TIME], (sides <= 0) & (side >= 0), (sides >= 0) & (side <= 0)
        )
        return ~np.where(cell[:, PROGRAM] == access[PROGRAM], by_program, by_tickets) & (
            cell[:, TIME] != access[TIME]
        )

    def _sides(self, rows: Any) -> Any:
        """-1 for what a program's ticket releases, 1 for what has acquired by it, 0 for the ticket; NaN for what is neither."""
        none = np.full(rows.shape[1], -1)
        tickets = np.array(
            [self._tickets.get(program, none) for program in rows[:, PROGRAM].tolist()]
        )
        by_thread = np.sign(rows[:, TIME] - tickets[:, TIME]).astype(float)
        by_epoch = np.sign(rows[:, EPOCH] - tickets[:, EPOCH]).astype(float)
        by_epoch[by_epoch == 0] = np.nan
        sides = np.where(rows[:, THREAD] == tickets[:, THREAD], by_thread, by_epoch)
        return np.where(tickets[:, THREAD] < 0, np.nan, sides)
