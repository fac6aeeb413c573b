"""causal-conv1d, pruned to what this project runs, compiled for one GPU architecture without a GPU.

The stock source instantiates 9 pairs of dtypes and 3 widths: the backward alone takes 11 minutes. Here the dtypes of
input and weight are equal, fp32 or bf16, the width is 4 (Mamba-2's), and code is made for one architecture. What is
pruned is refused by the extension with a message, never computed otherwise. The kernels need c10's headers alone and
the binding torch's, so no CUDA library but the compiler's own is needed.
"""

import re
import subprocess
from pathlib import Path

DTYPES = ("float", "at::BFloat16")
WIDTH = 4
DISPATCH = """
#define DISPATCH_ITYPE_FLOAT_AND_HALF_AND_BF16(ITYPE, NAME, ...) \\
    if (ITYPE == at::ScalarType::BFloat16) { using input_t = at::BFloat16; __VA_ARGS__(); } \\
    else if (ITYPE == at::ScalarType::Float) { using input_t = float; __VA_ARGS__(); } \\
    else { TORCH_CHECK(false, #NAME " of this build takes float32 and bfloat16, not ", toString(ITYPE)); }
#define DISPATCH_WTYPE_FLOAT_AND_HALF_AND_BF16(WTYPE, NAME, ...) \\
    { TORCH_CHECK(WTYPE == c10::CppTypeToScalarType<input_t>::value, \\
        #NAME " of this build takes weights of the input's dtype, not ", toString(WTYPE)); \\
      using weight_t = input_t; __VA_ARGS__(); }
"""


def pruned_kernel(text: str) -> str:
    """A `.cu` file with one width and two instantiations per function.

    Raises:
        ValueError: the source is not built as expected, so nothing would be pruned.
    """
    ladder = re.compile(
        r"if \(params\.width == 2\) \{[^}]*\} else if \(params\.width == 3\) \{[^}]*\} else if \(params\.width == 4\)"
    )
    text, ladders = ladder.subn(f"if (params.width == {WIDTH})", text)
    found = re.findall(r"^template void (\w+)<([\w:]+), ([\w:]+)>\(.*\);$", text, flags=re.MULTILINE)
    if not ladders or not found:
        raise ValueError("causal-conv1d's sources have changed: no ladder of widths or no instantiations found")

    def keep(match: re.Match) -> str:
        return match.group(0) if match.group(1) == match.group(2) and match.group(1) in DTYPES else ""

    return re.sub(r"^template void \w+<([\w:]+), ([\w:]+)>\(.*\);$", keep, text, flags=re.MULTILINE)


def pruned_binding(text: str) -> str:
    """The `.cpp` file: dispatch to what there is, other widths refused.

    Raises:
        ValueError: as `pruned_kernel`.
    """
    text, macros = re.subn(r"#define DISPATCH_[IW]TYPE_\w+\((?:.*\\\n)+.*\n", "", text)
    head, include, rest = text.partition('#include "causal_conv1d.h"\n')
    rest, checks = re.subn(r"width >= 2 && width <= 4", f"width == {WIDTH}", rest)
    if macros != 2 or not include or not checks:
        raise ValueError("causal-conv1d's binding has changed: its dispatch or its check of the width was not found")
    return head + include + DISPATCH + rest


def commands(source: Path, out: Path, *, nvcc: str, architecture: str, torch: Path, python: Path) -> list[list[str]]:
    """The compiler's calls, in order; `torch` is the folder of the package, `python` that of Python's headers."""
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-I{python}", f"-I{source}"]
    common = ["-O3", "-std=c++20", "-DTORCH_EXTENSION_NAME=causal_conv1d_cuda", *includes]
    gpu = ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-Xcompiler", "-fPIC"]
    gpu += ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__"]
    gpu += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    objects, calls = [], []
    for file in sorted(source.glob("causal_conv1d*.c*")):
        target = out / f"{file.name}.o"
        objects.append(str(target))
        calls.append([nvcc, *common, *gpu, "-c", str(file), "-o", str(target)])
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_python"]
    library = out / "causal_conv1d_cuda.so"
    calls.append([nvcc, "-shared", "-Xlinker", "-s", *objects, *libraries, "-o", str(library)])
    return calls


def compile_conv(unpacked: Path, work: Path, **where: object) -> Path:
    """The extension's library from causal-conv1d's unpacked sources.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its words are in `stderr`.
        ValueError: the sources are not the expected ones.
    """
    source, out = work / "csrc", work / "objects"
    source.mkdir(parents=True)
    out.mkdir()
    for file in (unpacked / "csrc").iterdir():
        text = file.read_text()
        if file.suffix == ".cu":
            text = pruned_kernel(text)
        elif file.suffix == ".cpp":
            text = pruned_binding(text)
        (source / file.name).write_text(text)
    for call in commands(source, out, **where):
        subprocess.run(call, check=True, capture_output=True, text=True)
    return out / "causal_conv1d_cuda.so"
