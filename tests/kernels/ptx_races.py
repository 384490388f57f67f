"""A race detector: accesses of emulated programs that nothing orders.

A GPU may execute them in any order, and the emulator has tried only one.

Terms:

* cell: two bytes of memory, the smallest access.
* epoch: the number of barriers that a program has passed. A barrier orders accesses of a program's
  threads in different epochs.
* ticket: a program's only atomic operation (acquire and release). Accesses before it, in its own
  thread or in an earlier epoch, are *released*. Accesses after it, in its own thread or in a later
  epoch, have *acquired*. Between programs, a released access is ordered before an access that has
  acquired by a later ticket, and nothing else is ordered.
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
        """Record one instruction.

        Addresses of shared memory are negative and distinct for each program.
        """
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
        """Return a sentence for each unordered pair of accesses to a cell, one of them writing."""
        rows = np.concatenate(self._rows)
        rows = rows[np.lexsort((rows[:, TIME], rows[:, CELL]))]
        firsts = np.flatnonzero(np.diff(rows[:, CELL], prepend=rows[0, CELL] - 1))
        ends = np.append(firsts[1:], len(rows))
        thread = rows[:, PROGRAM] << 32 | rows[:, THREAD]
        contested = np.minimum.reduceat(thread, firsts) != np.maximum.reduceat(thread, firsts)
        contested &= np.maximum.reduceat(rows[:, KIND], firsts) > READ  # one of them writes
        names = list(self._texts)
        found = set()
        for first, end in zip(firsts[contested], ends[contested], strict=True):
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
        """Return a mask of a cell's accesses that are ordered neither before nor after ``access``.

        Accesses of one instruction are no race: the emulator refuses different values.
        """
        by_program = (cell[:, THREAD] == access[THREAD]) | (cell[:, EPOCH] != access[EPOCH])
        by_tickets = np.where(
            cell[:, TIME] < access[TIME], (sides <= 0) & (side >= 0), (sides >= 0) & (side <= 0)
        )
        return ~np.where(cell[:, PROGRAM] == access[PROGRAM], by_program, by_tickets) & (
            cell[:, TIME] != access[TIME]
        )

    def _sides(self, rows: Any) -> Any:
        """Return -1 for released accesses, 1 for acquired, 0 for the ticket itself, else NaN."""
        none = np.full(rows.shape[1], -1)
        tickets = np.array(
            [self._tickets.get(program, none) for program in rows[:, PROGRAM].tolist()]
        )
        by_thread = np.sign(rows[:, TIME] - tickets[:, TIME]).astype(float)
        by_epoch = np.sign(rows[:, EPOCH] - tickets[:, EPOCH]).astype(float)
        by_epoch[by_epoch == 0] = np.nan
        sides = np.where(rows[:, THREAD] == tickets[:, THREAD], by_thread, by_epoch)
        return np.where(tickets[:, THREAD] < 0, np.nan, sides)
