"""Install the carried wheels beside what the host has; needs nothing but the standard library."""

import site
import subprocess
import sys
import venv
from pathlib import Path


class InstallError(RuntimeError):
    """The environment could not be made; the message says why."""


def install(carried: Path, folder: Path) -> int:
    """Make a virtual environment that sees this interpreter's packages, the carried ones first.

    An environment with `--system-site-packages` would not do where this interpreter belongs to an
    environment itself: it would see those of the system below both.

    Args:
        carried: has wheels/, as scripts/pack_gpu_host.sh makes it, or the wheels themselves.
        folder: made anew.

    Returns:
        The number of wheels.

    Raises:
        InstallError: there are no wheels, or they do not fit this interpreter.
    """
    wheels = sorted((carried / "wheels").glob("*.whl")) or sorted(carried.glob("*.whl"))
    if not wheels:
        raise InstallError(f"--carried {carried} holds no wheels: run scripts/pack_gpu_host.sh")
    venv.create(folder, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command += ["install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*command, *map(str, wheels)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise InstallError(f"pip could not install {carried}:\n{done.stdout.strip()}")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    # Only now, so that pip does not take the host's packages for installed ones.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "host.pth").write_text("".join(lines))
    return len(wheels)
