"""Memory budgets as users give them, and the default: a part of what is free, the same throughout a training step."""

import os
import re
from pathlib import Path

import torch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

_UNLIMITED = 2**62  # what an operator's integers hold
_defaults: dict[torch.device, int] = {}  # the default budget of each device as last read


def parse_budget(memory_budget: int | str | None, device: torch.device) -> int:
    """Bytes of a memory budget; None stands for a quarter of what is free on the device.

    Raises:
        ValueError: for anything but None, a non-negative integer or a string such as "512MB" or "1.5 GiB".
    """
    if memory_budget is None:
        return _default_budget(device)
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget >= 0:
        return min(memory_budget, _UNLIMITED)
    if isinstance(memory_budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", memory_budget.upper())
        if match and match[2] in _UNITS:
            return min(int(float(match[1]) * _UNITS[match[2]]), _UNLIMITED)
    raise ValueError(f'memory_budget must be bytes, a string like "512MB" or "1GiB", or None; got {memory_budget!r}')


def _default_budget(device: torch.device) -> int:
    """A quarter of the free memory, and that same number as long as it is between a sixteenth and a half of it.

    What activation checkpointing computes again in backward must be planned as it was in forward, when more or less
    memory was free: there, the budget stays whatever is free.
    """
    known = _defaults.get(device)
    if known is not None and torch._C._current_graph_task_id() != -1:  # within backward
        return known
    free = _free_bytes(device)
    if known is None or not 2 * known <= free <= 16 * known:
        known = _defaults[device] = free // 4
    return known


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        counted = torch.cuda.memory_stats_as_nested_dict(device)  # once: it takes as long as several launches
        names = ("reserved_bytes", "allocated_bytes") if counted else ()
        reserved, allocated = [counted[name]["all"]["current"] for name in names] or (0, 0)
        return torch.cuda.mem_get_info(device)[0] + reserved - allocated
    try:
        with open("/proc/meminfo") as meminfo:
            free = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(free, _container_bytes(Path("/sys/fs/cgroup"), free))


def _container_bytes(group: Path, unlimited: int) -> int:
    """What the container's limit (cgroup v2) leaves, file cache that it would give back included."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return unlimited
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return unlimited
    return max(0, int(limit) - used)
