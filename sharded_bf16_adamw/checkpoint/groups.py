"""Match an optimizer's parameter groups with saved ones."""

from __future__ import annotations


def match_groups(current: list[list[str]], saved: list[list[str]]) -> list[int | None]:
    """Return the index of the saved group whose options each current group takes, or None.

    A group with parameters takes the saved group that has all of them. A group without parameters
    takes the saved group at the same index if both sides have equally many groups. Otherwise, if
    both sides have equally many empty groups, the n-th empty group takes the n-th empty saved one.

    Examples:
        >>> match_groups([["a"], []], [["a", "b"], []])
        [0, 1]
    """
    empty_current = [index for index, names in enumerate(current) if not names]
    empty_saved = [index for index, names in enumerate(saved) if not names]
    matches: list[int | None] = []
    for index, names in enumerate(current):
        if names:
            fitting = (i for i, saved_names in enumerate(saved) if set(names) <= set(saved_names))
            matches.append(next(fitting, None))
        elif len(current) == len(saved):
            matches.append(index)
        elif len(empty_current) == len(empty_saved):
            matches.append(empty_saved[empty_current.index(index)])
        else:
            matches.append(None)
    return matches
