"""hyperclip_fast: one image encoder, thousands of zero-shot tasks, one batch. See README.md."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels" / "layer_norm.py").is_file():  # a source checkout
    __path__.append(str(_root))  # so that hyperclip_fast.kernels and .bench are the checkout's kernels/ and bench/

from hyperclip_fast.hyper_encoder import HyperEncoder  # noqa: E402
from hyperclip_fast.hyper_vit import HyperViT  # noqa: E402
from hyperclip_fast.hyperclip import HyperCLIP, HyperCLIPConfig  # noqa: E402
from hyperclip_fast.hypernetwork import HyperNetwork  # noqa: E402
from hyperclip_fast.kernels.dispatch import get_backend, set_backend  # noqa: E402
from hyperclip_fast.norm_params import NormParams, NormSpec  # noqa: E402
from hyperclip_fast.task_bank import TaskBank  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "HyperCLIP",
    "HyperCLIPConfig",
    "HyperEncoder",
    "HyperNetwork",
    "HyperViT",
    "NormParams",
    "NormSpec",
    "TaskBank",
    "get_backend",
    "set_backend",
]
