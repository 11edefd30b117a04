"""Every configuration of the layer norm's kernels, compiled ahead of time for every supported GPU; none is needed.

Held to bars: no spilled register, at most 144 registers a thread, 128-bit loads and stores of the activations, int64
offsets. Run as a script, `python -m tests.test_kernel_targets sm_90`, it prints what it found as JSON.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx950")
# {activations: widths}; mixed is autocast: float32 residual stream and rows, bfloat16 for what products read and write
WIDTHS = {"bf16": (64, 128, 192, 384, 768, 2048, 4096, 8192), "fp32": (192, 1024, 4096), "mixed": (192, 384, 768)}
BYTES = {"*bf16": 2, "*fp32": 4}


def specs(width: int, dtype: str) -> dict[str, dict]:
    """{kernel: its function, argument types and constants, warps, the tiles that it loads, those that it stores}."""
    from hyperclip_fast.kernels import layer_norm_launch as launch

    stream, inner = ("*fp32", "*bf16") if dtype == "mixed" else ("*" + dtype, "*" + dtype)
    block_d, (block_n, warps), (back_n, back_warps) = launch.tile_config(width)
    block_b, reduce_d, reduce_warps = launch.REDUCE_CONFIG
    shared = {"weight": stream, "task_ids": "*i64", "total": stream, "mean": "*fp32", "rstd": "*fp32"}
    shared |= {"N": "i32", "T": "i32", "weight_stride": "i32", "D": width, "BLOCK_D": block_d}
    forward = {"x": stream, "delta": inner, "bias": stream, "out": inner}
    forward |= {"tiles": "i32", "bias_stride": "i32", "eps": "fp32", "BLOCK_N": block_n}
    backward = {"grad_out": inner, "grad_total": stream, "grad_x": stream}
    backward |= {"grad_delta": inner if dtype == "mixed" else None}
    backward |= {"partial_weight": "*fp32", "partial_bias": "*fp32", "slices": "i32", "BLOCK_N": back_n}
    reduce = {"partials": "*fp32", "task_ids": "*i64", "grads": stream, "B": "i32", "T": "i32", "slices": "i32"}
    reduce |= {"D": width, "BLOCK_B": block_b, "BLOCK_D": reduce_d}
    found = {
        "forward": (launch._fwd_kernel, {**shared, **forward}, warps, ("x", "delta"), ("total", "out")),
        "backward": (
            launch._bwd_kernel,
            {**shared, **backward},
            back_warps,
            ("grad_out", "grad_total", "total"),
            ("grad_x", "grad_delta"),
        ),
        "reduce": (launch._reduce_kernel, reduce, reduce_warps, (), ()),
    }
    if width not in (64, 192):
        del found["reduce"]  # its tiles are the same for every width
    return {name: dict(zip(("fn", "arguments", "warps", "loads", "stores"), spec)) for name, spec in found.items()}


def compile_kernel(spec: dict, target: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec["fn"].arg_names
    arguments = {name: spec["arguments"][name] for name in names}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else value for name, value in arguments.items()}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        spec["fn"],
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(source, target=gpu, options={"num_warps": spec["warps"]})


def inspect_nvidia(kernel) -> dict:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    regs, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    wide = {}
    for kind in ("ld", "st"):
        accesses = re.findall(rf"\b{kind}\.global[\w.:]*\.v(\d)\.b(\d+)", kernel.asm["ptx"])
        wide[kind] = sum(int(n) * int(bits) // 8 for n, bits in accesses if int(n) * int(bits) >= 128)
    return {"registers": regs, "spilled": stack + local, "wide_loads": wide["ld"], "wide_stores": wide["st"]}


def inspect_amd(kernel) -> dict:
    text = kernel.asm["amdgcn"]
    keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    registers, *spilled = (int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in keys)
    wide = {kind: 16 * len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4\b", text)) for kind in ("load", "store")}
    return {
        "registers": registers,
        "spilled": sum(spilled),
        "wide_loads": wide["load"],
        "wide_stores": wide["store"],
    }


def narrow_offsets(kernel) -> list[str]:
    """Scalar pointer offsets of 32 bits in the kernel: one may overflow beyond 2^31 elements."""
    return re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, i32.*", kernel.asm["ttir"])


def tile_bytes(spec: dict, names: tuple[str, ...], threads: int) -> int:
    """Bytes of the named tensors' tiles that one thread moves."""
    arguments = spec["arguments"]
    sizes = (BYTES[arguments[name]] for name in names if arguments[name] is not None)
    return sum(size * arguments["BLOCK_N"] * arguments["BLOCK_D"] // threads for size in sizes)


def inspect(target: str) -> list[dict]:
    """What every kernel of every width and dtype became on a target."""
    found = []
    nvidia = target.startswith("sm_")
    for dtype, width in ((dtype, width) for dtype, widths in WIDTHS.items() for width in widths):
        for name, spec in specs(width, dtype).items():
            kernel = compile_kernel(spec, target)
            report = inspect_nvidia(kernel) if nvidia else inspect_amd(kernel)
            threads = spec["warps"] * (32 if nvidia else 64)
            report["least_loads"] = tile_bytes(spec, spec["loads"], threads)
            report["least_stores"] = tile_bytes(spec, spec["stores"], threads)
            report["narrow_offsets"] = narrow_offsets(kernel)
            found.append({"kernel": f"{name} D{width} {dtype}", **report})
    return found


@functools.cache
def reports(target: str) -> list[dict]:
    """`inspect` in a process without the interpreter, which this one may run."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.test_kernel_targets", target]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_compiles_within_the_bars(target):
    pytest.importorskip("triton")
    found = reports(target)
    assert len(found) == 2 * sum(map(len, WIDTHS.values())) + 4
    for report in found:
        assert report["spilled"] == 0, report
        assert report["registers"] <= 144, report
        assert report["wide_loads"] >= report["least_loads"], report
        assert report["wide_stores"] >= report["least_stores"], report
        assert report["narrow_offsets"] == [], report


if __name__ == "__main__":
    print(json.dumps(inspect(sys.argv[1])))
