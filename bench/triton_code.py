"""What Triton makes of the kernels, without a GPU: registers, spills, shared memory, and the main loop's instructions.

    python bench/triton_code.py [--target sm_90 ...] [--json]

Compiles ahead of time for the vocabularies in VOCABULARIES and prints one line for each distinct build.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rpo_kernels.fused import kernel as fused_kernel
from rpo_kernels.fused.kernel import SequenceReduction, Tokens
from rpo_kernels.kernels.interface import OUTPUT_FIELDS, RowStats
from rpo_kernels.kernels.triton import grad, product, stats
from rpo_kernels.kernels.triton import softmax as tile_softmax
from rpo_kernels.kernels.triton import tiling as tilings

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ALL = tuple(OUTPUT_FIELDS)
ABSENT = "constexpr"  # an argument that is None is a constant to Triton
INTEGERS = dict.fromkeys(tilings.INTEGERS, "i32")
STRIDES = ("i32", "i32")


class Build(NamedTuple):
    """One specialisation of a kernel: what Triton would see at its launch."""

    name: str
    kernel: Any
    signature: dict[str, Any]  # argument types
    constants: dict[str, Any]
    absent: Sequence[tuple[int, ...]]  # paths of the arguments that are None
    num_warps: int
    columns_a_thread: int = 0  # in one iteration of the main loop
    vocabularies: tuple[int, ...] = ()  # that this build serves
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16
    num_stages: int = 3

    def compile(self, target: GPUTarget) -> Any:
        signature = {name: self.signature.get(name, "constexpr") for name in self.kernel.arg_names}
        constants: dict[tuple[int, ...], Any] = {
            (self.kernel.arg_names.index(name),): value for name, value in self.constants.items()
        }
        constants |= dict.fromkeys(self.absent)
        attributes = {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=target, options=self._options())

    def _options(self) -> dict[str, Any]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


def builds(target: GPUTarget) -> list[Build]:
    return row_builds(target) + tile_builds() + product_builds(target) + sequence_builds()


def row_builds(target: GPUTarget) -> list[Build]:
    """The row kernels' builds in the forms that matter, each once, with the vocabularies that it serves."""
    builds: dict[str, Build] = {}
    for columns in VOCABULARIES:
        at = dict(columns=columns, target=target)
        for build in (
            *(row_stats(dtype, **at) for dtype in BYTES),
            row_stats("bf16", softcap=True, **at),
            row_stats("bf16", outputs=ALL, running=True, **at),
            row_stats("bf16", outputs=ALL, softcap=True, **at),
            *(row_stats("bf16", outputs=(name,), **at) for name in ALL),
            row_stats("bf16", split=True, **at),
            *(row_grad(dtype, **at) for dtype in BYTES),
            row_grad("bf16", softcap=True, **at),
            row_grad("bf16", active=True, **at),
            row_grad("bf16", entropy=True, **at),
            row_grad("bf16", entropy=True, softcap=True, **at),
            row_grad("bf16", vector=1, **at),
            row_grad("fp32", out="bf16", **at),
        ):
            served = builds[build.name].vocabularies if build.name in builds else ()
            builds[build.name] = build._replace(vocabularies=(*served, columns))
    return [*builds.values(), combine()]


def row_stats(dtype, columns, target, softcap=False, outputs=(), running=False, split=False) -> Build:
    tiling, shape, num_warps = _tiling(columns, 16 // BYTES[dtype], target)
    signature = dict(logits="*" + dtype, **_stats_arguments(outputs))
    if split:
        signature["partial"] = "*fp32"
    flags = dict(SOFTCAP=softcap, SHIFT=False, RUNNING=running)
    asked = "all outputs" if outputs == ALL else " ".join(outputs) or "none"
    name = _name("row_stats", dtype, shape, softcap=softcap, running=running, split=split, **{asked: bool(outputs)})
    absent = ([] if split else [(3,)]) + _absent_fields(stats.row_stats_kernel, signature)
    per_thread = tiling.vector * tiling.steps
    return Build(name, stats.row_stats_kernel, signature, flags | shape, absent, num_warps, per_thread)


def combine() -> Build:
    signature = dict(logits="*bf16", partial="*fp32", **_stats_arguments(ALL))
    flags = dict(SOFTCAP=False, SHIFT=False, RUNNING=True, SPLITS=16)
    return Build("combine splits=16", stats.combine_kernel, signature, flags, [], 1)


def row_grad(dtype, columns, target, out=None, softcap=False, active=False, entropy=False, vector=None) -> Build:
    out = out or dtype
    tiling, shape, num_warps = _tiling(columns, vector or 16 // min(BYTES[dtype], BYTES[out]), target)
    signature = dict(logits="*" + dtype, out="*" + out, labels="*i64")
    signature |= dict.fromkeys(("inner", "outer", "threshold"), "fp32")
    if active:
        signature["active"] = "*u8"
    signature |= dict.fromkeys(("logps", "tops", "sumexps", "grad_logps"), "*fp32") | INTEGERS
    signature |= dict.fromkeys(("entropies", "grad_entropies"), "*fp32") if entropy else {}
    strides = ("logits_strides", "out_strides", "labels_strides", "grad_strides", "entropy_strides")
    signature |= dict.fromkeys(strides, STRIDES)
    flags = dict(SOFTCAP=softcap, SHIFT=False)
    dtypes = dtype if out == dtype else f"{dtype}->{out}"
    name = _name("row_grad", dtypes, shape, softcap=softcap, active=active, entropy=entropy)
    names = grad.row_grad_kernel.arg_names
    absent = [(names.index(x),) for x in ("active", "entropies", "grad_entropies") if x not in signature]
    per_thread = tiling.vector * tiling.steps
    return Build(name, grad.row_grad_kernel, signature, flags | shape, absent, num_warps, per_thread)


def tile_builds() -> list[Build]:
    """The head's tile kernels, for tiles of 8,192 and 2,048 columns of float32 logits and a head of width 4,096."""
    found = [
        tile_step(8192),
        tile_step(8192, softcap=True),
        tile_step(8192, full=False),
        tile_step(2048),
        tile_step(8192, marks=True),
    ]
    vectors = dict.fromkeys(("tops", "sumexps", "label_logits", "logps", "references", "sums"), "*fp32")
    signature = dict(
        labels="*i64", weight="*bf16", kept="*bf16", grad_weight="*bf16", weight_strides=STRIDES, **vectors
    )
    integers = ("reference_stride", "rows", "row_start", "vocab", "tile_columns", "tiles", "shared_tiles")
    signature |= dict.fromkeys(integers, "i32") | {"shared_first": "i64"}
    signature |= dict.fromkeys(("inner", "outer"), "fp32")
    flags = dict(SOFTCAP=True, KEEPS=True, WIDTH=4096, TILES=16, BLOCK_H=1024)
    found.append(Build("finish", tile_softmax.finish_kernel, signature, flags, [], 4))
    signature = dict(hidden="*bf16", out="*bf16", factors="*fp32", before="*fp32")
    flags = dict(WIDTH=4096, BLOCK_H=1024)
    found.append(Build("scale_rows", tile_softmax.scale_rows_kernel, signature, flags, [], 4))
    return found


def tile_step(columns, softcap=False, full=True, marks=False) -> Build:
    kernel = tile_softmax.tile_kernel
    signature = dict(logits="*fp32", labels="*i64")
    signature |= dict.fromkeys(("tops", "sumexps", "label_logits"), "*fp32")
    signature |= dict.fromkeys(("logits_stride", "out_stride", "columns", "first_column"), "i32")
    signature |= dict.fromkeys(("inner", "outer", "threshold"), "fp32")
    if marks:
        signature |= dict(early_logits="*fp32", active="*u8", dropped="*fp32")
    else:
        signature |= dict(out="*bf16", references="*fp32", sums="*fp32")
    vectors = ("logits", "out", "references", "sums", "early_logits", "active", "dropped")
    absent = [(kernel.arg_names.index(name),) for name in vectors if name not in signature]
    width = 1 if marks else 4096
    flags = dict(SOFTCAP=softcap, FULL=full, PADDED=True, WIDTH=width, BLOCK=columns, BLOCK_H=min(1024, width))
    name = _name("tile", str(columns), {}, softcap=softcap, masked=not full, marks=marks)
    aligned = [name for name in ("logits", "out", "sums", "logits_stride", "out_stride") if name in signature]
    return Build(name, kernel, signature, flags, absent, max(1, columns // 1024), aligned=tuple(aligned))


def product_builds(target: GPUTarget) -> list[Build]:
    """The head's product with the softmax in its epilogue, for a head of width 640, and the merging of its blocks."""
    every = [product_step(target), product_step(target, dtype="fp16"), product_step(target, softcap=True, bias=True)]
    signature = dict(partial="*fp32", of_labels="*fp32", **_stats_fields(()), labels="*i64", outer="fp32")
    signature |= dict.fromkeys(("rows", "vocab", "blocks"), "i32")
    flags = dict(ROWS=product.MERGED_ROWS, BLOCKS=product.MERGED_BLOCKS)
    absent = _absent_fields(product.merge_kernel, signature)
    return [*every, Build("merge", product.merge_kernel, signature, flags, absent, 4)]


def product_step(target: GPUTarget, dtype="bf16", softcap=False, bias=False) -> Build:
    kernel = product.product_kernel
    blocks = product.AMD if target.backend == "hip" else product.HOPPER if target.arch == 90 else product.NVIDIA
    signature = dict(hidden=f"tensordesc<{dtype}[{blocks.rows}, {blocks.inner}]>")
    signature |= dict(weight=f"tensordesc<{dtype}[{blocks.columns}, {blocks.inner}]>", labels="*i64")
    signature |= dict(partial="*fp32", of_labels="*fp32") | (dict(bias="*" + dtype) if bias else {})
    signature |= dict(rows="i32", vocab="i32", inner="fp32", outer="fp32")
    flags = dict(SOFTCAP=softcap, WIDTH=640, ROWS=blocks.rows, COLUMNS=blocks.columns, INNER=blocks.inner, UPCAST=False)
    absent = [] if bias else [(kernel.arg_names.index("bias"),)]
    name = _name("product", dtype, blocks._asdict(), softcap=softcap, bias=bias)
    aligned = ("labels", "partial", "of_labels")
    return Build(name, kernel, signature, flags, absent, blocks.warps, aligned=aligned, num_stages=blocks.stages)


def sequence_builds() -> list[Build]:
    """The reduction for 16 groups of 4, in its widest forms: everything given and everything in use."""
    return [
        sequence_reduce("bwd_kl", "rewards", 64, 2048, 4),
        sequence_reduce("bwd_kl", "one_hot", 64, 2048, 4, packed=True),
        sequence_reduce("fwd_kl", "margin", 64, 100, 4, ragged=True),
        sequence_reduce("sq", "rewards", 4096, 2048, 64, packed=True, ragged=True),
    ]


def sequence_reduce(distance, target, num_sequences, length, size, packed=False, ragged=False) -> Build:
    shape = fused_kernel.choose_blocks(num_sequences, length, num_sequences // size, size)
    tokens: Any = Tokens("*fp32", "*i64", "*fp32", "*fp32")  # type: ignore[arg-type]
    out: Any = SequenceReduction(*["*fp32"] * 8)  # type: ignore[arg-type]
    signature: dict[str, Any] = dict(tokens=tokens, strides=("i32",) * 4, rewards="*fp32", lengths="*fp32", out=out)
    signature |= dict(cu_seqlens="*i32") if packed else {}
    signature |= dict(index="*i64") if ragged else {}
    signature |= dict.fromkeys(fused_kernel.INTEGERS, "i32")
    signature |= dict.fromkeys(("beta", "eta", "gamma", "target_margin"), "fp32")
    flags = dict(DISTANCE=distance, TARGET=target, SHIFT=True)
    names = fused_kernel.sequence_reduce_kernel.arg_names
    absent = [(names.index(name),) for name in ("ref_sums", "cu_seqlens", "index") if name not in signature]
    name = _name("sequence_reduce", f"{distance} {target}", shape, packed=packed, ragged=ragged)
    kernel = fused_kernel.sequence_reduce_kernel
    return Build(name, kernel, signature, flags | shape, absent, fused_kernel.NUM_WARPS)


def facts(build: Build, target_name: str) -> dict[str, Any]:
    """Compile and read off what matters."""
    target = TARGETS[target_name]
    code = build.compile(target)
    found = dict(name=build.name, target=target_name, vocabularies=build.vocabularies, shared=code.metadata.shared)
    if target.backend == "hip":
        return found | _amd_resources(code.asm["amdgcn"])
    sass = code.asm["sass"]
    found |= _nvidia_resources(code.asm["cubin"])
    found["local_accesses"] = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    found["wide_accesses"] = len(re.findall(r"\b(?:LDG|STG)\.\S*(?:128|256)\b", sass))
    return found | (_main_loop(sass, build.columns_a_thread) if build.columns_a_thread else {})


def _main_loop(sass: str, columns: int) -> dict[str, Any]:
    """Count the loop over the logits: the backward branch around the most exponentials."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if re.fullmatch(r"LBB\d+:", line):
            labels[line[:-1]] = len(instructions)
        elif "\t" in line:
            instructions.append(line.split("\t")[1])
    loops = []
    for i, text in enumerate(instructions):
        branch = re.search(r"\bBRA\S* (?:!?U?P\w+, )?(LBB\d+|0x[0-9a-f]+);", text)
        if branch:
            # A branch on a uniform predicate is printed with its address; an instruction takes 16 bytes.
            start = labels[branch[1]] if branch[1] in labels else int(branch[1], 16) // 16
            loops += [instructions[start : i + 1]] if start < i else []
    body = max(loops, key=lambda loop: sum("MUFU.EX2" in text for text in loop) - len(loop) / 10_000)
    kinds = Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].rstrip(";") for text in body)
    return dict(
        instructions=sum(count for kind, count in kinds.items() if kind != "NOP") / columns,
        exponentials=kinds["MUFU.EX2"] / columns,
        loads=sorted(kind for kind in kinds if kind.startswith("LDG")),
        stores=sorted(kind for kind in kinds if kind.startswith("STG")),
        barriers=sum(kinds[kind] for kind in kinds if kind.startswith(("BAR", "SHFL"))),
        kinds=dict(kinds.most_common()),
    )


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return dict(registers=numbers["REG"], spills=numbers["STACK"] + numbers["LOCAL"])


def _amd_resources(assembly: str) -> dict[str, int]:
    def read(key):
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])

    # Scalar registers spill to lanes of vector registers, not to memory: only the others count.
    spills = read("vgpr_spill_count") + read("private_segment_fixed_size")
    return dict(registers=read("vgpr_count"), spills=spills)


def _tiling(columns, vector, target):
    lanes = tilings.NUM_WARPS * target.warp_size
    tiling = tilings.choose_tiling(8192, columns, vector, 132)._replace(lanes=lanes)
    return tiling, dict(VECTOR=tiling.vector, LANES=lanes, STEPS=tiling.steps), tilings.NUM_WARPS


def _stats_arguments(outputs: tuple[str, ...]) -> dict[str, Any]:
    strides = dict(logits_strides=STRIDES, labels_strides=STRIDES)
    return dict(labels="*i64", inner="fp32", outer="fp32", **_stats_fields(outputs), **strides, **INTEGERS)


def _absent_fields(kernel: Any, signature: dict[str, Any]) -> list[tuple[int, ...]]:
    at = kernel.arg_names.index("stats")
    return [(at, i) for i, x in enumerate(signature["stats"]) if x == ABSENT]


def _stats_fields(outputs: tuple[str, ...]) -> dict[str, Any]:
    wanted = {*RowStats._fields[:4], *(OUTPUT_FIELDS[name] for name in outputs)}
    return dict(stats=RowStats(*("*fp32" if name in wanted else ABSENT for name in RowStats._fields)))  # type: ignore


def _name(kernel: str, dtype: str, shape: dict[str, int], **flags: bool) -> str:
    return " ".join([kernel, dtype, "x".join(map(str, shape.values())), *(flag for flag, on in flags.items() if on)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [facts(build, name) for name in arguments.target for build in builds(TARGETS[name])]
    if arguments.json:
        print(json.dumps(found))
        return
    for fact in found:
        loop = ""
        if "instructions" in fact:
            loop = f"{fact['instructions']:6.2f} instructions, {fact['exponentials']:.2f} exp2 a column; "
            loop += " ".join(fact["loads"] + fact["stores"])
        print(
            f"{fact['target']:7} {fact['name']:45} {fact['registers']:4} registers {fact['spills']:3} B spilled "
            f"{fact['shared']:6} B shared {loop}"
        )


if __name__ == "__main__":
    main()
