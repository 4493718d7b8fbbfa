"""Builds `rpo_kernels/_native.so` from csrc/: a plain shared library, opened with ctypes, tied to no Python or torch.

Metadata is in pyproject.toml. Without a C++ compiler the package installs all the same and runs on its torch backend.
"""

import os
import platform
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

# The row kernels are compiled once for each instruction set; the library picks one at run time (csrc/native.cpp).
X86_LEVELS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
# The LM head's kernels, for CPUs with bfloat16 products, and with these emulated for tests (csrc/head.h).
X86_HEADS = {"avx512bf16": ["-mavx512bf16"], "emulated": ["-DRPO_EMULATED"]}
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
# GCC 12 warns of its own AVX-512 header, Clang of a warning that it does not know.
COMMON_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]


def instruction_sets() -> dict[str, list[str]]:
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return {**X86_LEVELS, "baseline": []}
    return {"neon" if machine in ("aarch64", "arm64") else "baseline": []}


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_levels(ext)
        except (CompileError, LinkError, PlatformError, OSError) as error:
            self.warn(f"native CPU backend not built, the torch backend serves instead ({str(error)[:160]})")

    def compile_levels(self, ext: Extension) -> None:
        sets, objects = instruction_sets(), []
        for isa, flags in sets.items():
            objects += self.compile("rows.cpp", isa, [("RPO_ISA", isa)], flags, ext)
        have = list(sets)
        if "avx512" in sets:
            try:
                for name, flags in X86_HEADS.items():
                    objects += self.compile("head.cpp", name, [("RPO_HEAD", name)], sets["avx512"] + flags, ext)
                have.append("avx512bf16")
            except CompileError as error:  # a compiler older than the instruction
                self.warn(f"built without bfloat16 products ({str(error)[:160]})")
        objects += self.compile("native.cpp", "", [(f"RPO_HAVE_{isa.upper()}", "1") for isa in have], [], ext)
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        threads = ["-pthread"] if sys.platform != "darwin" else []
        self.compiler.link_shared_object(objects, path, extra_postargs=threads, target_lang="c++")

    def compile(
        self, source: str, folder: str, macros: list[tuple[str, str]], flags: list[str], ext: Extension
    ) -> list[str]:
        common = COMMON_FLAGS + os.environ.get("CFLAGS", "").split()  # the user's come last and win
        return self.compiler.compile(
            [f"csrc/{source}"],
            os.path.join(self.build_temp, folder),
            macros,
            extra_postargs=flags + common,
            depends=ext.depends,
        )


class PlatformWheel(bdist_wheel):
    """One wheel for every Python version of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = Extension(
    "rpo_kernels._native",
    ["csrc/native.cpp", "csrc/rows.cpp", "csrc/head.cpp"],
    depends=sorted(glob("csrc/*.h")),
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
