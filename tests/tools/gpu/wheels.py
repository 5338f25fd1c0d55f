"""Packages for a machine without network: ``python -m tests.tools.gpu.wheels FOLDER [--python 3.12]``.

The machine has torch, lightning, transformers, peft and what they need, and the large packages that ``ON_THE_MACHINE``
names. All else that the check imports is downloaded here, at fixed versions, as wheels for Linux on x86-64. There:

    pip install --no-index --no-deps --target SITE FOLDER/*.whl && PYTHONPATH=SITE python -m tests.tools.gpu
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = (
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "jsonargparse==4.53.0",
    "docstring-parser==0.18.0",
    "typeshed-client==2.15.0",
    "rich==15.0.0",
    "markdown-it-py==4.2.0",
    "mdurl==0.1.2",
    "pygments==2.20.0",
    "httpx2==2.16.2",
    "httpcore2==2.16.2",
    "truststore==0.10.5",
    "trl==1.16.0",
)
ON_THE_MACHINE = {  # what torch, lightning, transformers and peft bring, and five large packages of their own
    *("torch", "lightning", "pytorch-lightning", "torchmetrics", "transformers", "peft", "accelerate"),
    *("huggingface-hub", "tokenizers", "safetensors", "numpy", "packaging", "pyyaml", "tqdm", "filelock", "fsspec"),
    *("jinja2", "psutil", "typing-extensions", "regex", "httpx", "anyio", "idna", "h11"),
    *("pandas", "pyarrow", "xxhash", "scipy", "matplotlib", "tensorboard"),
}
LARGEST = 20 * 2**20  # bytes, all wheels together
PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]


def main() -> int:
    """Downloads, and checks that nothing is missing and that it is not too large."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.gpu.wheels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for old in given.folder.glob("*.whl"):  # two versions of a package would stop the installation
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--python-version", given.python, "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, "--dest", str(given.folder), *WHEELS], check=True)
    wheels = sorted(given.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 2**20:.1f} MiB, in {given.folder}")
    problems = missing(wheels)
    if size > LARGEST:
        problems.append(f"all together are larger than {LARGEST / 2**20:.0f} MiB")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def missing(wheels: list[Path]) -> list[str]:
    """What a wheel needs that is neither here nor on the machine."""
    known = ON_THE_MACHINE | {normal(wheel.name.split("-")[0]) for wheel in wheels}
    return [
        f"{wheel.name} needs {name}"
        for wheel in wheels
        for name in needs(metadata(wheel), extras=("signatures",) if wheel.name.startswith("jsonargparse") else ())
        if name not in known
    ]


def metadata(wheel: Path) -> str:
    """Its METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def needs(metadata: str, extras: tuple[str, ...] = ()) -> list[str]:
    r"""Normalised names of what it requires on Linux, with these extras and no others.

    >>> needs("Requires-Dist: A_b>=1\nRequires-Dist: c; extra == 'x'\nRequires-Dist: d; sys_platform == 'emscripten'")
    ['a-b']
    """
    found = []
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata, flags=re.MULTILINE):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if (extra is None or extra[1] in extras) and "== 'emscripten'" not in marker:
            name = re.match(r"[\w.-]+", requirement.strip())
            assert name is not None
            found.append(normal(name[0]))
    return found


def normal(name: str) -> str:
    """As packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
