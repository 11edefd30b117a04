"""Configurations of training runs, shipped with the package: `hyperclip train --config demo`."""

from pathlib import Path


def shipped_configs() -> dict[str, Path]:
    """Their files by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
