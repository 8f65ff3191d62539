"""The test suite on each supported Python, with old and new neighbours: by hand, before a release.

    make matrix                          all environments, the whole suite but the browser: about 15 minutes each on two cores
    make matrix ONLY=3.14                the environments whose name contains this
    make matrix ARGS=tests/test_cells.py

A Python that isn't on the machine is left out, and the end says so; the status is 1 only where a test failed.
Where this is Debian and the user root, Python 3.14 comes from Debian's sid, by debootstrap, into a folder that the tests are
run in with chroot. Everything lies in `.matrix/`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".matrix"
SID = CACHE / "sid"


@dataclass(frozen=True)
class Environment:
    """A Python, and what is asked for beside the newest of everything."""

    python: str
    with_: tuple[str, ...]
    why: str

    @property
    def name(self) -> str:
        return "-".join([self.python, *(re.sub(r"[^a-z0-9.]+", "", asked) for asked in self.with_)])


ENVIRONMENTS = [
    Environment(
        "3.11",
        ("numpy<2", "pandas<3", "pyarrow<20", "ipykernel<7", "nest-asyncio<2", "openai<3", "anthropic<1"),
        "the oldest that is supported: numpy 1.26, pandas 2, a kernel that runs its cells on a patched loop, SDKs on httpx",
    ),
    Environment("3.12", ("pandas<3", "ipykernel<7.1"), "pandas 2 with numpy 2"),
    Environment("3.13", (), "a newer Python with the newest of everything"),
    Environment("3.14", (), "the newest Python: annotations as code, its own SQLite in WAL mode"),
]
"""Python 3.11 with the newest of everything is `make test`."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests on each supported Python.")
    parser.add_argument("--wheel", type=Path, required=True, help="what is tested")
    parser.add_argument("--only", default="", help="environments whose name contains this")
    parser.add_argument("--workers", default="2")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    options = parser.parse_args()
    told: list[str] = []
    failed = False
    CACHE.mkdir(exist_ok=True)
    for environment in ENVIRONMENTS:
        if options.only not in environment.name:
            continue
        print(f"== {environment.name}: {environment.why}", flush=True)
        python, missing = _python(environment.python)
        if python is None:
            told.append(f"{environment.name}: NOT RUN, {missing}")
            continue
        status = _run(environment, python, options.wheel.resolve(), options.workers, options.arguments)
        failed |= status != 0
        told.append(f"{environment.name}: {'passed' if status == 0 else f'FAILED (status {status})'}")
    print("\n".join(["", "make matrix:", *told]))
    return int(failed)


def _run(environment: Environment, python: list[str], wheel: Path, workers: str, arguments: list[str]) -> int:
    folder = CACHE / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run([*python, "-m", "venv", str(folder)], check=False)
    inside = [*python[:-1], str(folder / "bin" / "python")]
    wanted = [f"{wheel}[test]", *environment.with_]
    installed = made.returncode or subprocess.run([*inside, "-m", "pip", "install", "-qq", *wanted], check=False).returncode
    if installed:
        return installed
    subprocess.run([*inside, "-c", VERSIONS], check=False)
    tests = [str(folder / "bin" / "pytest"), "-n", workers, "--dist", "loadgroup", "--installed", "-m", "not browser"]
    return subprocess.run([*python[:-1], *tests, *arguments], cwd=ROOT, check=False).returncode


VERSIONS = """
import importlib.metadata, sqlite3, sys
shown = "numpy", "pandas", "pyarrow", "ipykernel", "ipython", "openai", "anthropic"
named = [f"{name} {importlib.metadata.version(name)}" for name in shown]
print("Python", sys.version.split()[0], *named, "SQLite", sqlite3.sqlite_version, flush=True)
"""


# ---- finding Pythons ----


def _python(version: str) -> tuple[list[str] | None, str]:
    """The command that starts it, a chroot's included; or None, and why it isn't there."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    for python in found:
        if python and _works(python, version):
            return [python], ""
    missing = f"there is no python{version} with venv and ensurepip on this machine"
    if version != "3.14":
        return None, missing
    if os.geteuid() != 0 or "ID=debian\n" not in _text("/etc/os-release"):
        return None, f"{missing} (as root on Debian it would be fetched)"
    if not (SID / "usr/bin/python3.14").exists() and not _fetched():
        return None, f"{missing}, and debootstrap could not fetch Debian's"
    return [*_chroot(), "/usr/bin/python3.14"], ""


def _works(python: str, version: str) -> bool:
    test = f"import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    return subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


# ---- Debian's sid in a folder ----


def _fetched() -> bool:
    print("fetching Python 3.14 from Debian's sid with debootstrap", flush=True)
    quiet = {"check": False, "stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    if shutil.which("debootstrap") is None:
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap"], **quiet)
    if shutil.which("debootstrap") is None:
        return False
    shutil.rmtree(SID, ignore_errors=True)
    packages = "--include=python3.14,python3.14-venv,ca-certificates,git,make,procps"
    done = subprocess.run(["debootstrap", "--variant=minbase", packages, "sid", str(SID), _mirror()], **quiet)
    if done.returncode:
        shutil.rmtree(SID, ignore_errors=True)
    return done.returncode == 0


def _mirror() -> str:
    """Where apt itself gets Debian from."""
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    found = re.findall(r"^(?:deb|URIs:)\s+(?:\[[^]]*\]\s*)?(\S+/debian)/?(?:\s|$)", text, re.MULTILINE)
    return found[0] if found else "http://deb.debian.org/debian"


def _chroot() -> list[str]:
    """A command that goes before one to run it in sid, where the checkout, and what pip's configuration names, are in place.

    The mounts are of a namespace of their own, which ends with the command.
    """
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    named = re.findall(r"/[^\s'\"]+", told)
    folders = {path.parent if path.name == "simple" else path for path in map(Path, named) if path.is_dir()}
    copied = ["/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", str(Path.home() / ".config/pip/pip.conf")]
    copied += ["/etc/ssl/certs/ca-certificates.crt"]
    lines = ["set -e"]
    for path in [Path("/proc"), Path("/sys"), Path("/dev"), ROOT, *sorted(folders)]:
        kind = "rbind" if path == Path("/dev") else "bind"
        lines.append(f'mkdir -p "{SID}{path}"; mount --{kind} "{path}" "{SID}{path}"')
    for source in copied:
        lines.append(f'[ ! -e "{source}" ] || {{ mkdir -p "{SID}{Path(source).parent}"; cp -L "{source}" "{SID}{source}"; }}')
    lines.append(f'export LANG=C.UTF-8; exec chroot "{SID}" sh -c \'cd "{ROOT}"; exec "$@"\' sh "$@"')
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh"]


if __name__ == "__main__":
    sys.exit(main())
