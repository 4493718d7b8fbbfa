"""Groups to micro-batches by their number of tokens."""

from collections.abc import Sequence


def pack_by_tokens(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Partition groups into rows of at most `max_tokens` tokens: first fit, the largest group first.

    At most 11/9 of the fewest possible rows, and one more (Johnson 1973). A group above the limit gets a row of its
    own. Groups keep their order within a row, and rows are ordered by their first group.

    Args:
        sizes: tokens of each group.
        max_tokens: at least 1.

    Returns:
        The groups' indices, row by row.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    rows: list[list[int]] = []
    room: list[int] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        row = next((row for row, left in enumerate(room) if sizes[group] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(group)
        room[row] -= sizes[group]
    return sorted(sorted(row) for row in rows)
