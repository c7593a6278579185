"""Gather what a GPU host without a network must be given: wheels and this checkout.

    scripts/pack_gpu_host.sh --out DIR

The host: Linux x86-64, Python 3.12, torch 2.11 for CUDA 13.0, triton 3.6, transformers 5.17, nvcc,
one Hopper GPU. DIR then holds

    wheels/          SGLang and sglang-kernel without what such a host cannot use, the small
                     packages of scripts/gpu_host/carried.txt, and this package
    checkout.tar.gz  this checkout as committed: scripts, tests, benchmarks and the tiny pair
    manifest.json    names, sizes, versions, commit

and is refused if it is larger than 60 MB. Everything comes from the package index that pip is set
up for. Copy DIR to the host, unpack checkout.tar.gz there, and in it run

    bash scripts/gpu_check.sh --carried DIR

What is left out of SGLang: its Rust extensions, which are built for another torch, and
multimodal_gen. What is left out of sglang-kernel: the kernels of other GPUs and those of the `fa3`
attention backend, which are 1.1 GB. Wheels are cut rather than unpacked into one folder, because
pip then does on the host what it does anywhere: it checks names and versions and writes the
commands.
"""

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_MB = 60.0
PYTHON_VERSION = "3.12"
# The newest glibc that is assumed; pip takes each tag by itself.
GLIBC_MINOR = 39
# Built for torch 2.11; the release that SGLang asks for is not.
KERNEL = "sglang-kernel==0.4.5"
MEGABYTE = 1e6


class PackError(RuntimeError):
    """The folder could not be made; the message says why."""


def keeps_of_sglang(name: str) -> bool:
    """Return whether the host can use this file of SGLang's wheel."""
    is_rust = name.endswith(".so") and ("/rust_extensions/" in name or "/rust_tree_core/" in name)
    return not (is_rust or name.startswith("sglang/multimodal_gen/"))


def keeps_of_kernel(name: str) -> bool:
    """Return whether the host can use this file of sglang-kernel's wheel."""
    if name.endswith(".so"):
        return name.startswith("sgl_kernel/sm90/") or name.startswith("sgl_kernel/spatial_ops")
    return not name.startswith("triton_kernels/")


STRIPPED = {"sglang": keeps_of_sglang, "sglang_kernel": keeps_of_kernel}


def strip_wheel(source: Path, target: Path, keeps: Callable[[str], bool]) -> None:
    """Copy a wheel without some of its files, packed tighter; its RECORD lists what is left.

    Args:
        keeps: whether to keep the file of this name in the archive.

    Raises:
        PackError: nothing would be left of the package, or the file is no wheel.
    """
    with zipfile.ZipFile(source) as wheel:
        kept = [info for info in wheel.infolist() if keeps(info.filename)]
        records = [info for info in kept if info.filename.endswith(".dist-info/RECORD")]
        if len(records) != 1:
            raise PackError(f"{source.name} is no wheel: it has {len(records)} RECORD files")
        if all(".dist-info/" in info.filename for info in kept):
            raise PackError(f"{source.name}: none of its files would be kept")
        names = {info.filename for info in kept}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as stripped:
            for info in kept:
                content = wheel.read(info)
                if info is records[0]:
                    content = _record_of(content.decode(), names).encode()
                info.compress_type = zipfile.ZIP_DEFLATED
                stripped.writestr(info, content, compresslevel=9)


def _record_of(record: str, names: set[str]) -> str:
    """Return the rows of a RECORD that name files of the archive."""
    written = io.StringIO()
    rows = [row for row in csv.reader(io.StringIO(record)) if row and row[0] in names]
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


def download(folder: Path, *arguments: str) -> None:
    """Download wheels for the host, without what they depend on."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    command = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    for platform in platforms:
        command += ["--platform", platform]
    run_pip(*command, *arguments)


def run_pip(*arguments: str) -> None:
    """Run pip quietly.

    Raises:
        PackError: with what it printed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise PackError(f"pip {arguments[0]} failed:\n{done.stdout.strip()}")


def pack(out: Path) -> dict[str, object]:
    """Fill the folder and return its manifest.

    Raises:
        PackError: a package is not to be had, or the folder is too large.
    """
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for stale in wheels.glob("*.whl"):
        stale.unlink()
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        downloads = Path(scratch)
        carried = ("--requirement", str(ROOT / "scripts" / "gpu_host" / "carried.txt"))
        download(downloads, *constraints, *carried, "sglang")
        download(downloads, KERNEL)
        for wheel in sorted(downloads.glob("*.whl")):
            keeps = STRIPPED.get(wheel.name.split("-")[0])
            if keeps is None:
                shutil.move(wheel, wheels)
            else:
                strip_wheel(wheel, wheels / wheel.name, keeps)
    run_pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    with open(out / "checkout.tar.gz", "wb") as archive:
        command = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", "-9", "HEAD"]
        if subprocess.run(command, stdout=archive).returncode:
            raise PackError(f"{ROOT} is no git checkout with a commit")
    return write_manifest(out)


def write_manifest(out: Path) -> dict[str, object]:
    """Write what the folder holds.

    Raises:
        PackError: it is too large.
    """
    files = sorted([*(out / "wheels").glob("*.whl"), out / "checkout.tar.gz"])
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in files}
    total = sum(sizes.values()) / MEGABYTE
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    manifest = {"total_mb": round(total, 1), "git_commit": commit, "bytes": sizes}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if total > LIMIT_MB:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        raise PackError(
            f"{out} holds {total:.1f} MB, more than {LIMIT_MB:g} MB; the largest files are "
            + ", ".join(f"{name} ({sizes[name] / MEGABYTE:.1f})" for name in largest)
        )
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="pack_gpu_host.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "gpu-host",
        metavar="DIR",
        help="gets what is to be carried (default: out/gpu-host)",
    )
    out = parser.parse_args(argv).out.resolve()
    began = time.monotonic()
    try:
        manifest = pack(out)
    except (PackError, OSError) as error:
        print(f"pack_gpu_host.sh: error: {error}", file=sys.stderr)
        return 1
    sizes = manifest["bytes"]
    assert isinstance(sizes, dict)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / MEGABYTE:7.2f} MB  {name}")
    print(f"{manifest['total_mb']:7.1f} MB in {out}, made in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
