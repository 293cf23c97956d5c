"""Compiles the Triton kernels for GPUs, without one, and prints the matrix instructions that came out.

python tests/quant/execution/compiled_kernels.py
"""

import os
import re
import subprocess
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from viditq.quant.execution.backends.triton import float8, ops
from viditq.quant.execution.backends.triton.tiles import FEW, FLOAT8_MANY, MANY, Tile

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 89, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("hip", "gfx942", 64),
)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WIDEST = 16_384  # in-features of FP8 that a row may have without spilling
FLOAT8 = {89: (E4M3,), 90: (E4M3, E5M2), "gfx942": (E4M3,)}  # sm_80 has none
INSTRUCTIONS = re.compile(r"(?:wgmma\.mma_async|mma\.sync|v_mfma)[\w.]*|div\.rn\.f32|div\.full\.f32")
COPIES = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)")
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}  # fmt: skip


class Launch:
    """Stands for a kernel: compiles for `target` what it is launched with, and keeps the assembly."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.kernel, self.target, self.assembly = kernel, target, ""

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int, num_stages: int = 3, enable_fp_fusion: bool, **constants: Any) -> None:
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        constants |= {name: value for name, value in given.items() if value is None}
        signature = {name: "constexpr" if name in constants else kind(value) for name, value in given.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, value) in enumerate(given.items())
            if name not in constants
            and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0))
        }
        options = {"num_warps": num_warps, "num_stages": num_stages if self.target.backend == "cuda" else 2}
        source = ASTSource(self.kernel, signature, constants, aligned)
        made = triton.compile(source, target=self.target, options=options | {"enable_fp_fusion": enable_fp_fusion})
        self.assembly = made.asm["ptx" if self.target.backend == "cuda" else "amdgcn"]


def kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launched_float8(
    target: GPUTarget, tile: Tile, rows: int, number: torch.dtype, width: int = 1152
) -> tuple[str, str]:
    """The same of FP8; number: of the rows, beside a weight of e4m3."""
    kernels = float8.load()
    names = ("quantize_float8_rows", "multiply_float8")
    originals = [getattr(kernels, name) for name in names]
    quantizer, product = (Launch(kernel, target) for kernel in originals)
    outs = 4608
    try:
        for name, launch in zip(names, (quantizer, product), strict=True):
            setattr(kernels, name, launch)
        x, vector = torch.zeros(rows, width, dtype=torch.bfloat16), torch.ones(1, width)
        codes, scale = float8._quantize(x, width, number, 1e-6, vector, vector, vector[0], None)
        weight, residual = torch.zeros(outs, width).to(E4M3), torch.zeros(rows, outs, dtype=x.dtype)
        behind = (None, 1, torch.ones(1, outs), residual, x.dtype, tile)
        float8._multiply(codes, scale, weight, torch.ones(outs, 1), outs, torch.zeros(outs), *behind)
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(kernels, name, original)
    return quantizer.assembly, product.assembly


def launched(target: GPUTarget, tile: Tile, rows: int, packed: bool, segments: int) -> tuple[str, str]:
    """Assembly of the quantizer and the product, by the operators' own launches, on tensors of a CPU."""
    kernels = ops.load()
    quantizer, product = Launch(kernels.quantize_rows, target), Launch(kernels.multiply, target)
    width, outs = 1152, 4608
    try:
        originals = kernels.quantize_rows, kernels.multiply
        kernels.quantize_rows, kernels.multiply = quantizer, product
        size = width // segments
        x, vector = torch.zeros(rows, width, dtype=torch.bfloat16), torch.ones(1, width)
        quantized = ops._quantize(x, segments, size, 1, 8, False, 1e-6, vector, vector, vector[0], None, None)
        weight = torch.zeros(segments, outs, size // (2 if packed else 1), dtype=torch.uint8 if packed else torch.int8)
        scale, zero = torch.ones(segments, outs), torch.zeros(segments, outs, dtype=torch.int8)
        colsum = zero.short() if segments > 1 else zero.int()
        residual = torch.zeros(rows, outs, dtype=torch.bfloat16)
        ops._multiply(
            *quantized, False, weight, scale, zero, colsum, size, torch.zeros(outs),
            None, 1, torch.ones(1, outs), residual, torch.bfloat16, tile,
        )  # fmt: skip
    finally:
        kernels.quantize_rows, kernels.multiply = originals
    return quantizer.assembly, product.assembly


def main() -> None:
    ops.launched_on = lambda tensor: torch.no_grad()  # type: ignore[assignment]
    for target in TARGETS:
        name = f"{target.backend} {target.arch}"
        for title, tile, rows, packed, segments in (
            ("W8", MANY[0], 4096, False, 1),
            ("W4", MANY[0], 4096, True, 1),
            ("W4 in groups of 64", MANY[0], 4096, True, 18),
            ("W8, few rows", FEW, 8, False, 1),
        ):
            tell(f"{name}: {title}", *launched(target, tile, rows, packed, segments))
        for number in FLOAT8.get(target.arch, ()):
            title = str(number).removeprefix("torch.float8_")
            tell(f"FP8 on {name}: {title}", *launched_float8(target, MANY[0], 4096, number))
        for tile in FLOAT8_MANY if target.arch == 90 else ():
            spilled = [spilled_bytes(ptx) for ptx in launched_float8(target, tile, 4096, E4M3, WIDEST)]
            print(f"bytes spilled on {name} by {tile.rows} x {tile.outs}: {spilled[1]}; quantizer: {spilled[0]}")


def spilled_bytes(ptx: str) -> int:
    """Of registers to memory on sm_90, as NVIDIA's assembler says, the one of those triton brings that it takes."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def tell(title: str, quantizer: str, product: str) -> None:
    found, of_quantizer = (sorted({*INSTRUCTIONS.findall(assembly)}) for assembly in (product, quantizer))
    widths = sorted({int(size, 0) for size in COPIES.findall(product)})
    copies = f"; bytes a copy: {' '.join(map(str, widths))}" if widths else ""
    print(f"{title}: {' '.join(found)}{copies}; quantizer: {' '.join(of_quantizer)}")


if __name__ == "__main__":
    main()
