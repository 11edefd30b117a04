"""The Triton kernels as a Hugging Face `kernels` repository: `python -m hyperclip_fast.export.hub_kernel --out DIR`.

    DIR/build/torch-universal/__init__.py, the modules of kernels/, metadata.json;  DIR/README.md

`kernels.get_kernel` loads such a folder from the hub, and `get_local_kernel` from a disk. The variant is pure Python,
so it is universal: any PyTorch on any device, Triton on GPUs and the PyTorch reference elsewhere. The operators are
registered in a namespace of their own, made of the sources' hash, so that the kernel lives beside an installed
hyperclip_fast and beside other versions of itself.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hyperclip_fast.kernels import dispatch
from hyperclip_fast.utils.files import written_folder
from hyperclip_fast.version import __version__

NAME = "hyperclip-fast"
VERSION = 1  # of the interface: the hub's branch v1
PUBLIC = {
    "batch_norm": (
        "batch_norm_act",
        "batch_norm_act_train",
        "batch_norm_act_reference",
        "batch_norm_act_train_reference",
    ),
    "layer_norm": ("layer_norm", "add_layer_norm", "layer_norm_reference", "add_layer_norm_reference"),
    "linear": ("linear_gelu", "linear_add", "linear_gelu_reference", "linear_add_reference"),
    "norm_linear": ("norm_linear", "norm_linear_gelu", "norm_linear_reference", "norm_linear_gelu_reference"),
    "dispatch": ("set_backend", "get_backend"),
}
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, triton]
---

# hyperclip-fast {version}

Layer norm with each sample's own weight and bias (row `task_ids[b]` of a table), fused with the residual add, and the
products around it; batch norm likewise, fused with activation and residual add. Triton, forward and backward; plain
PyTorch where there is no GPU.

```python
from kernels import get_kernel

kernel = get_kernel("<owner>/{name}", version={interface}, trust_remote_code=True)
out, total = kernel.add_layer_norm(x, delta, weight, bias, task_ids, eps)  # x (B, N, D); weight, bias (T, D)
```
"""


def write_hub_kernel(out: str | Path) -> Path:
    """Write the kernels as a repository with one universal build variant.

    Args:
        out: a folder that does not exist or is empty; written beside, then renamed.

    Raises:
        ValueError: for a folder with files in it.
    """
    out = Path(out)
    sources = {
        path.relative_to(_folder()).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(_folder().rglob("*.py"))
    }
    namespace = f"_hyperclip_fast_{hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:7]}"
    with written_folder(out) as beside:
        variant = beside / "build" / "torch-universal"
        variant.mkdir(parents=True)
        for name, text in sources.items():
            text = text.replace('NAMESPACE = "hyperclip_fast"', f'NAMESPACE = "{namespace}"')
            text = text.replace("hyperclip_fast::", f"{namespace}::")  # docstrings name operators, too
            (variant / name).parent.mkdir(exist_ok=True)
            (variant / name).write_text(text, encoding="utf-8")
        (variant / "__init__.py").write_text(_init(), encoding="utf-8")
        (variant / "metadata.json").write_text(json.dumps(_metadata(namespace), indent=2), encoding="utf-8")
        card = CARD.format(version=__version__, name=NAME, interface=VERSION)
        (beside / "README.md").write_text(card, encoding="utf-8")
    return out


def _folder() -> Path:
    return Path(dispatch.__file__).parent


def _init() -> str:
    imports = [f"from .{module} import {', '.join(names)}" for module, names in sorted(PUBLIC.items())]
    names = sorted(name for names in PUBLIC.values() for name in names)
    listed = "".join(f'    "{name}",\n' for name in names)
    return '"""hyperclip_fast\'s kernels."""\n\n' + "\n".join(imports) + f"\n\n__all__ = [\n{listed}]\n"


def _metadata(namespace: str) -> dict[str, object]:
    """What `kernels` asks of a variant; a backend must be named, though a universal variant is chosen for all."""
    return {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 2 with a message."""
    parser = argparse.ArgumentParser(description="Write the kernels as a repository for Hugging Face kernels.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    try:
        print(write_hub_kernel(parser.parse_args(argv).out))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
