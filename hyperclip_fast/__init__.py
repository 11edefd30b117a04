"""hyperclip_fast: one image encoder, thousands of zero-shot tasks, one batch. See README.md."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def _find_checkout_parts() -> None:
    """In a source checkout, hyperclip_fast.kernels and .bench are the folders kernels/ and bench/ beside this one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file() or not (root / "kernels" / "dispatch.py").is_file():
        return
    for part in ("kernels", "bench"):
        spec = importlib.machinery.ModuleSpec(f"{__name__}.{part}", None, is_package=True)
        spec.submodule_search_locations = [str(root / part)]
        sys.modules[spec.name] = globals()[part] = importlib.util.module_from_spec(spec)


_find_checkout_parts()

from hyperclip_fast.hyper_encoder import HyperEncoder  # noqa: E402
from hyperclip_fast.hyper_vit import HyperViT  # noqa: E402
from hyperclip_fast.hyperclip import HyperCLIP, HyperCLIPConfig  # noqa: E402
from hyperclip_fast.hypernetwork import HyperNetwork  # noqa: E402
from hyperclip_fast.kernels.dispatch import get_backend, set_backend  # noqa: E402
from hyperclip_fast.norm_params import NormParams, NormSpec  # noqa: E402
from hyperclip_fast.task_bank import TaskBank  # noqa: E402
from hyperclip_fast.version import __version__  # noqa: E402

__all__ = [
    "HyperCLIP",
    "HyperCLIPConfig",
    "HyperEncoder",
    "HyperNetwork",
    "HyperViT",
    "NormParams",
    "NormSpec",
    "TaskBank",
    "__version__",
    "get_backend",
    "set_backend",
]
