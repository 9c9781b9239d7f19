"""Whether what is installed is what requirements.txt pins, and in the package's ranges: `check_versions.py FILE`.

Run at the end of the image's build and by check.sh; exit code 1 names every difference.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

# Extras of the package that the image is for.
EXTRAS = ("gpu", "faults", "data", "vae")


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version of every line `name[extras]==version  # why`.

    Raises:
        ValueError: a line that pins no exact version.
    """
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        if specifier.operator != "==":
            raise ValueError(f"{path}: {text!r} pins no exact version")
        pins[requirement.name.lower()] = specifier.version
    return pins


def differences(pins: dict[str, str], ranges: Sequence[str]) -> Iterator[str]:
    """What is not as it is pinned, or out of the package's ranges."""
    for name, pinned in pins.items():
        found = _installed(name)
        if found != pinned:
            yield f"{name}: {found or 'missing'}, pinned is {pinned}"
    for line in ranges:
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        found = _installed(requirement.name)
        # NVIDIA's torch is a pre-release by its version.
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}: {found or 'missing'}, the package asks for {requirement.specifier}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str]) -> int:
    """Print the differences; 1 where there are any."""
    found = list(differences(read_pins(Path(argv[0])), importlib.metadata.requires("megatron-video") or []))
    print("\n".join(found) or "all versions are as they are pinned")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
