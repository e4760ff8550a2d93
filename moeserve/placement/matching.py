"""A choice of its own for each of several, where they want the same."""

from __future__ import annotations

from collections.abc import Sequence


def matched(options: Sequence[Sequence[int]]) -> list[int] | None:
    """One of its options for each, all different; None where that cannot be (Kuhn 1955, The Hungarian method, on a bipartite graph)."""
    owner: dict[int, int] = {}

    def finds(one: int, tried: set[int]) -> bool:
        for option in options[one]:
            if option not in tried:
                tried.add(option)
                if option not in owner or finds(owner[option], tried):
                    owner[option] = one
                    return True
        return False

    if not all(finds(one, set()) for one in range(len(options))):
        return None
    return sorted(owner, key=owner.__getitem__)
