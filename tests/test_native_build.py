"""The native library as it is built and installed: with and without a compiler, missing, or of another version."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from rpo_kernels.kernels import native

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def test_without_the_library_the_torch_backend_serves(tmp_path):
    shutil.copytree(ROOT / "rpo_kernels", tmp_path / "rpo_kernels", ignore=shutil.ignore_patterns("*.so", "train"))
    code = (
        "import torch, rpo_kernels; print(rpo_kernels.__file__); print(rpo_kernels.backend_info()['native'])\n"
        "print(rpo_kernels.token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[1, 2]])).tolist())\n"
        "rpo_kernels.token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), backend='native')"
    )
    result = run(sys.executable, "-c", code, env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    place, info, logps = result.stdout.splitlines()
    assert place.startswith(str(tmp_path))
    assert "'available': False" in info and "_native.so is not built" in info
    assert logps == str([[torch.tensor(0.25).log().item()] * 2])
    assert "ValueError" in result.stderr and "_native.so is not built" in result.stderr


@pytest.mark.parametrize("kind", ["broken", "another"])
def test_a_library_that_does_not_fit_is_reported(tmp_path, monkeypatch, kind):
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    if kind == "broken":
        library = tmp_path / "_native.so"
        library.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY", library)
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    assert native.reason.__wrapped__().startswith(f"{library.name} cannot be used, install the package again: ")


@pytest.mark.slow
@pytest.mark.parametrize("has_compiler", [True, False])
def test_sdist_builds_a_wheel_with_and_without_a_compiler(tmp_path, has_compiler):
    """As pip would, in isolation from this environment's torch; then look at what is in the wheel."""
    if has_compiler and shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.so", "*.egg-info", "build", "dist", "outputs")
    shutil.copytree(ROOT, source, ignore=ignored)
    made = run(sys.executable, "-c", "from setuptools import setup; setup()", "-q", "sdist", "-d", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("rpo_kernels-*.tar.gz")
    assert archive.exists(), made.stderr
    environment = dict(os.environ)
    if not has_compiler:
        environment |= {"PATH": str(Path(sys.executable).parent), "CC": "missing-cc", "CXX": "missing-c++"}
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path), str(archive)]
    built = run(*pip, env=environment)
    if "No matching distribution found for setuptools" in built.stdout + built.stderr:
        pytest.skip("the build backend cannot be fetched here")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("rpo_kernels-*.whl")
    assert "-py3-none-" in wheel.name
    has_library = "rpo_kernels/_native.so" in zipfile.ZipFile(wheel).namelist()
    said = (built.stdout + built.stderr).count("native CPU backend not built")
    assert (has_library, said) == ((True, 0) if has_compiler else (False, 1))


def test_a_library_older_than_its_sources_is_not_used(tmp_path, monkeypatch):
    """Its functions may take other arguments than Python passes."""
    library, source = tmp_path / "rpo_kernels" / "_native.so", tmp_path / "csrc" / "rows.h"
    for path in (library, source):
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(native, "LIBRARY", library)
    os.utime(library, (1000, 1000))
    os.utime(source, (2000, 2000))
    with pytest.warns(UserWarning, match="rows.h changed after _native.so was built"):
        assert "setup.py build_ext --inplace" in native.reason.__wrapped__()
    os.utime(library, (3000, 3000))
    assert native._changed_since_build() is None
