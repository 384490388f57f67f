"""Match this optimizer's parameter groups to the saved ones whose options they take."""

from __future__ import annotations


def match_groups(here: list[list[str]], there: list[list[str]]) -> list[int | None]:
    """Return for each group of ``here`` the index of the one of ``there`` that stands for it.

    A group with parameters takes the one that has all of them. A group without any has only its place: with as many groups on
    both sides it takes the group in the same place; with as many empty ones, the n-th empty takes the n-th empty. None means that
    there is no such group, and the options here stay.

    Example::

        >>> match_groups([["a"], []], [["a", "b"], []])
        [0, 1]
    """
    empty_here, empty_there = (
        [index for index, names in enumerate(names_of) if not names] for names_of in (here, there)
    )
    found: list[int | None] = []
    for index, names in enumerate(here):
        if names:
            found.append(
                next(
                    (other for other, theirs in enumerate(there) if set(names) <= set(theirs)), None
                )
            )
        elif len(here) == len(there):
            found.append(index)
        elif len(empty_here) == len(empty_there):
            found.append(empty_there[empty_here.index(index)])
        else:
            found.append(None)
    return found
