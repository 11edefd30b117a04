"""hyperclip_fast: one image encoder, thousands of zero-shot tasks, one batch. See README.md.

The names below are imported when they are first used. `hyper_*` models are known to timm as soon as both are imported.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import after_import, lazy_names
from hyperclip_fast.version import __version__

if TYPE_CHECKING:
    from hyperclip_fast.hyper_encoder import HyperEncoder
    from hyperclip_fast.hyper_vit import HyperViT
    from hyperclip_fast.hyperclip import HyperCLIP, load_model
    from hyperclip_fast.hyperclip_config import HyperCLIPConfig
    from hyperclip_fast.hypernetwork import HyperNetwork
    from hyperclip_fast.kernels.dispatch import get_backend, set_backend
    from hyperclip_fast.norm_params import NormParams, NormSpec
    from hyperclip_fast.task_bank import TaskBank, ThreadSafeTaskBank

__all__ = [
    "HyperCLIP",
    "HyperCLIPConfig",
    "HyperEncoder",
    "HyperNetwork",
    "HyperViT",
    "NormParams",
    "NormSpec",
    "TaskBank",
    "ThreadSafeTaskBank",
    "__version__",
    "get_backend",
    "load_model",
    "set_backend",
]


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
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "hyper_encoder": ("HyperEncoder",),
        "hyper_vit": ("HyperViT",),
        "hyperclip": ("HyperCLIP", "load_model"),
        "hyperclip_config": ("HyperCLIPConfig",),
        "hypernetwork": ("HyperNetwork",),
        "kernels.dispatch": ("get_backend", "set_backend"),
        "norm_params": ("NormParams", "NormSpec"),
        "serving.graphs": ("graphed",),
        "task_bank": ("TaskBank", "ThreadSafeTaskBank"),
    },
)
# The hooks cost nothing before somebody imports timm or transformers, and little then.
after_import("timm.models", lambda: importlib.import_module(f"{__name__}.integrations.timm"))
after_import(
    "transformers.models.auto.configuration_auto",
    lambda: importlib.import_module(f"{__name__}.integrations.transformers"),
)
