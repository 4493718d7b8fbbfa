"""Description of the machine that results come from."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)
_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
# Vector units of a CPU, the best first: flag in /proc/cpuinfo ("bf16" and "asimd" are ARM's) and name.
_UNITS = {
    "amx_bf16": "amx_bf16",
    "avx512_bf16": "avx512_bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
    "bf16": "neon_bf16",
    "asimd": "neon",
}


def describe_machine(device: str) -> dict[str, Any]:
    """Device, its units or driver, versions of everything that is compared, commit and date."""
    on_gpu = device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_field("model name") or platform.machine(),
        "units": None if on_gpu else cpu_units(),
        "device_memory": torch.cuda.mem_get_info()[1] if on_gpu else _total_memory(),
        "driver": _output(*_DRIVER_QUERY) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"rpo-kernels": __version__, **{name: v for name in _PACKAGES if (v := _version(name))}},
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=7"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def cpu_units() -> str:
    """The CPU's best vector units, such as "avx512_bf16"."""
    flags = (_cpu_field("flags") or _cpu_field("Features") or "").split()
    return next((name for flag, name in _UNITS.items() if flag in flags), platform.machine())


def has_bfloat16_units() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32."""
    return cpu_units().endswith("bf16")


def device_slug(machine: dict[str, Any]) -> str:
    """A folder name for the device, a CPU's units included."""
    cpu = "" if machine["driver"] else f" {machine['units']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9._]+", "-", (machine["device"] + cpu).lower()).strip("-")


def device_line(machine: dict[str, Any]) -> str:
    """The device in a few words."""
    if machine["driver"]:
        return f"{machine['device']}, driver {machine['driver']}"
    return f"{machine['device']} ({machine['units']}), {machine['threads']} threads"


def versions_line(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


def same_setup(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether results of both machines may be in one file."""
    return not differences(a, b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The differences, in words, that keep results of the two out of one file."""
    names = ("device", "units", "driver", "threads", "versions")
    return [f"{name} {a.get(name)!r}, now {b.get(name)!r}" for name in names if a.get(name) != b.get(name)]


def _cpu_field(name: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None


def _total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
