"""Words that belong together: groups as the user names them, and where they stand in the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from ..attach.prompts import Prompts, Target, check_targets

Group: TypeAlias = Sequence[Target]
Groups: TypeAlias = Sequence[Group] | Sequence[Sequence[Group]]
# Positions in the context of every word of every group of every prompt.
Places: TypeAlias = list[list[list[list[int]]]]


def check_groups(groups: Any, name: str, *, least_groups: int, least_words: int) -> Groups:
    """Return groups in hashable form.

    That is a tuple of groups (tuples of words, phrases and token ids) for every prompt, or one such tuple per prompt.

    Raises:
        ValueError: too few groups or words, anything but words and ids, or the same word twice in a group.
    """
    remedy = "pass a list of groups such as [('red', 'bag'), ('green', 'apple')], or one such list per prompt"
    if not _is_list(groups) or not groups or not all(map(_is_list, groups)):
        raise ValueError(f"{name} is {groups!r}; {remedy}")
    nested = [_is_list(item) for group in groups for item in group]
    if any(nested) and not all(nested):
        raise ValueError(f"{name} is {groups!r}, a mix of both; {remedy}")
    rows = groups if any(nested) else [groups]
    checked = []
    for row in rows:
        if len(row) < least_groups:
            raise ValueError(f"{name} has {len(row)} groups in {row!r}; name at least {least_groups}")
        for group in row:
            if len(group) < least_words:
                raise ValueError(f"{name} has the group {group!r}; name at least {least_words} words in each")
        checked.append(tuple(check_targets(tuple(group), name) for group in row))
    result: Any = tuple(checked)
    return result if any(nested) else result[0]


def _is_list(item: Any) -> bool:
    return isinstance(item, (list, tuple))


def places(groups: Groups, prompts: Prompts, name: str) -> Places:
    """Return where the words of checked groups stand.

    Of a word that the prompt repeats, a group's last word stands for the first occurrence that no earlier group ended
    with, its other words for the occurrence nearest to that one.

    Raises:
        ValueError: a word that is not in the prompt, a token twice in a group, or another number of prompts.
    """
    rows: Any = groups if _is_list(groups[0][0]) else (groups,) * prompts.count
    if len(rows) != prompts.count:
        raise ValueError(
            f"{name} holds {len(rows)} lists of groups, but there are {prompts.count} prompts; pass one per prompt"
        )
    found: Places = []
    for index, row in enumerate(rows):
        ends: list[list[int]] = []
        found.append([])
        for group in row:
            found[-1].append(_group(group, prompts, index, name, ends))
            ends.append(found[-1][-1][-1])
    return found


def members(groups: Groups, prompts: Prompts, name: str) -> list[list[tuple[int, int]]]:
    """Return (position, index of its group) of every token of checked groups, one list per prompt.

    Raises:
        ValueError: as `places`, or a token in two groups of a prompt.
    """
    rows = [
        [(position, index) for index, group in enumerate(row) for word in group for position in word]
        for row in places(groups, prompts, name)
    ]
    for row in rows:
        named = [position for position, _ in row]
        double = next((position for position in named if named.count(position) > 1), None)
        if double is not None:
            raise ValueError(
                f"{name} names token {double} in two groups of a prompt, and cannot both attract and repel it; "
                "leave it out of one, or pass the token id of another occurrence"
            )
    return rows


def _group(group: Group, prompts: Prompts, index: int, name: str, taken: list[list[int]]) -> list[list[int]]:
    *others, last = (prompts.occurrences(word, index, name) for word in group)
    end = next((place for place in last if place not in taken), last[0])
    words = [min(places, key=lambda place: abs(place[0] - end[0])) for places in others] + [end]
    flat = [position for word in words for position in word]
    double = next((position for position in flat if flat.count(position) > 1), None)
    if double is not None:
        raise ValueError(f"the group {group!r} of {name} names token {double} more than once; name it once")
    return words
