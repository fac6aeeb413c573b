"""Build what the first GPU machine lacks, on a machine without a GPU: writes `.gpu_kit/` at the repository's root.

    python benchmarks/gpu/build.py [--python PYTHON3.12] [--torch WHEEL] [--parts packages,triton,conv]

That machine has Python 3.12, torch 2.11.0 (CUDA 13.0), transformers and pytest, and no network. What it gets:

    packages   Megatron-core, NeMo and what they import, at the versions of constraints.txt: wheels, unpacked
    triton     mamba-ssm's Triton kernels; its own `__init__` imports compiled code, an empty one stands here
    conv       causal-conv1d for one architecture, pruned (compile_conv.py) and linked against the wheel of torch 2.11.0

From the package index and nvcc alone: nvcc 13.0 of the PATH, else of the package `nvidia-cuda-nvcc`. Without a
compiler or without Python 3.12's headers the kit has no compiled part, and `kit.json` and the last line say so.
Transformer Engine is no part yet: its extension wants cuBLAS's and cuDNN's headers and 10 minutes of compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

from compile_conv import compile_conv

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / ".gpu_kit"
PYTHON, TORCH, CUDA, ARCHITECTURE = "3.12", "2.11.0", "13.0", "90"
LIMIT_MB = 45
SOURCES = {"triton": "mamba-ssm==2.3.2.post1", "conv": "causal-conv1d==1.6.2.post1"}
TRITON_FILES = ("ops/__init__.py", "ops/triton/*.py", "utils/__init__.py", "utils/torch.py", "utils/determinism.py")
COPIED = ("antlr4-python3-runtime", "wget")  # no wheels on the index; pure, so this environment's files serve
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-nvvm")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "tests", "*.pyi", "*.cu", "*.cpp", "*.h")


class LeftOut(Exception):
    """A part cannot be built here, and why."""


def pins() -> dict[str, str]:
    """Normalized name -> `name==version` of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normalized(line.partition("==")[0]): line for line in lines if "==" in line}


def lacking() -> list[str]:
    """Names of packages.txt."""
    lines = (Path(__file__).parent / "packages.txt").read_text().splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(work: Path, *what: str) -> Path:
    """`pip download` without dependencies into a new folder. pip reads a source package's version by running its
    `setup.py`; the switches keep these two from compiling."""
    switches = {"CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(work), *what], env=os.environ | switches, capture_output=True, text=True
    )
    if done.returncode:
        raise LeftOut(f"pip download {' '.join(what)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return work


def wheels(work: Path, *what: str) -> list[Path]:
    """Wheels for the kit's Python."""
    folder = download(work, "--only-binary=:all:", "--python-version", PYTHON, *what)
    return sorted(folder.glob("*.whl"))


def source(work: Path, requirement: str) -> Path:
    """The unpacked source package."""
    folder = download(work, "--no-build-isolation", f"--no-binary={requirement.partition('==')[0]}", requirement)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def packages(out: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Megatron, NeMo and theirs, unpacked."""
    known = pins()
    for wheel in wheels(work / "wheels", *(known[normalized(name)] for name in lacking())):
        shutil.unpack_archive(wheel, work / "unpacked", "zip")
    shutil.copytree(work / "unpacked", out, ignore=SKIPPED, dirs_exist_ok=True)
    for name in COPIED:
        for file in files(name) or ():
            if file.suffix == ".py":
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), out / file)


def triton(out: Path, work: Path, arguments: argparse.Namespace) -> None:
    """mamba-ssm's Triton part."""
    unpacked = source(work, SOURCES["triton"])
    package = unpacked / "mamba_ssm"
    for file in (f for pattern in TRITON_FILES for f in package.glob(pattern)):
        target = out / "mamba_ssm" / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    version = SOURCES["triton"].partition("==")[2]
    (out / "mamba_ssm" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    shutil.copyfile(unpacked / "LICENSE", out / "mamba_ssm" / "LICENSE")


def conv(out: Path, work: Path, arguments: argparse.Namespace) -> None:
    """causal-conv1d, compiled."""
    compiler, headers = nvcc(work), python_headers(arguments.python)
    unpacked = source(work / "source", SOURCES["conv"])
    wheel = arguments.torch or wheels(work / "torch", f"torch=={TORCH}")[0]
    subprocess.run(["unzip", "-q", str(wheel), "torch/include/*", "torch/lib/*", "-d", str(work / "torch")], check=True)
    where = {"nvcc": compiler, "architecture": ARCHITECTURE, "torch": work / "torch" / "torch", "python": headers}
    try:
        library = compile_conv(unpacked, work / "compiled", **where)
    except subprocess.CalledProcessError as error:
        raise LeftOut(f"the compiler failed: {error.stderr.strip().splitlines()[-1]}") from error
    shutil.copytree(unpacked / "causal_conv1d", out / "causal_conv1d")
    shutil.copyfile(unpacked / "LICENSE", out / "causal_conv1d" / "LICENSE")
    shutil.copyfile(library, out / "causal_conv1d_cuda.so")


def nvcc(work: Path) -> str:
    """The compiler's path."""
    found = shutil.which("nvcc")
    if found and f"release {CUDA}" in subprocess.run([found, "--version"], capture_output=True, text=True).stdout:
        return found
    folder = work / "nvcc"
    for wheel in wheels(folder, *(f"{name}=={CUDA}.*" for name in COMPILER)):
        shutil.unpack_archive(wheel, folder, "zip")
    for file in folder.rglob("bin/*"):
        file.chmod(0o755)
    compilers = list(folder.rglob("bin/nvcc"))
    if not compilers:
        raise LeftOut(f"no nvcc {CUDA} on the PATH, and none in the package nvidia-cuda-nvcc")
    return str(compilers[0])


def python_headers(given: str | None) -> Path:
    """The folder of `Python.h` of the kit's Python."""
    for python in filter(None, (given, shutil.which(f"python{PYTHON}"))):
        asked = [
            python,
            "-c",
            "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('include'))",
        ]
        done = subprocess.run(asked, capture_output=True, text=True)
        version, _, folder = done.stdout.strip().partition(" ")
        if version == PYTHON and (Path(folder) / "Python.h").is_file():
            return Path(folder)
    if f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON:
        return Path(sysconfig.get_path("include"))
    raise LeftOut(f"no Python {PYTHON} with headers; name one with --python")


PARTS = {"packages": packages, "triton": triton, "conv": conv}


def build(names: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, object]]]:
    """(part, what became of it), as they are done."""
    for name in names:
        began, target = time.monotonic(), KIT / f"{name}.tar.xz"
        target.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / name
            out.mkdir()
            try:
                PARTS[name](out, Path(folder) / "work", arguments)
                with tarfile.open(target, "w:xz") as packed:
                    packed.add(out, arcname=name)
                about: dict[str, object] = {"megabytes": round(target.stat().st_size / 1e6, 2)}
            except LeftOut as error:
                about = {"left_out": str(error)}
        yield name, about | {"seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Build; 1 when a part is left out or the kit is too large to be brought along."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--python", help=f"a Python {PYTHON} whose headers to compile with; default: of the PATH")
    words.add_argument("--torch", type=Path, help=f"a wheel of torch {TORCH} that is there; default: downloaded")
    words.add_argument(
        "--parts", default=",".join(PARTS), help="default: all; those that are not named stay as they are"
    )
    arguments = words.parse_args()
    names = arguments.parts.split(",")
    if unknown := [n for n in names if n not in PARTS]:
        words.error(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    KIT.mkdir(exist_ok=True)
    note = KIT / "kit.json"
    parts = json.loads(note.read_text())["parts"] if note.is_file() else {}
    for name, about in build(names, arguments):
        parts[name] = about
        print(f"{name}: {about}", flush=True)
        made_for = {"python": PYTHON, "torch": TORCH, "cuda": CUDA, "architecture": f"sm_{ARCHITECTURE}"}
        note.write_text(json.dumps({**made_for, "parts": parts}, indent=1) + "\n")
    size = sum(file.stat().st_size for file in KIT.iterdir()) / 1e6
    missing = [name for name in PARTS if "megabytes" not in parts.get(name, {})]
    print(f"{KIT}: {size:.1f} MB of at most {LIMIT_MB}" + (f"; WITHOUT {', '.join(missing)}" if missing else ""))
    return int(bool(missing) or size > LIMIT_MB)


if __name__ == "__main__":
    raise SystemExit(main())
