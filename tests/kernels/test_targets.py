"""Every configuration of the kernels' tables, compiled ahead of time for every supported GPU; none is needed.

Held to bars: no spilled register, at most 144 registers a thread in streaming kernels, the target's shared memory,
128-bit loads and stores of the activations, int64 offsets, tensor cores for products in 16 bits and TF32. Run as a
script, `python -m tests.kernels.test_targets sm_90`, it prints what it found as JSON, one line a target; targets may
also come on stdin.
"""

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
SHARED = dict(zip((*NVIDIA, *AMD), (163, 99, 99, 227, 227, 99, 64, 160)))  # KiB that one block may have
# {activations: widths}; mixed is autocast: float32 residual stream and rows, bfloat16 for what products read and write.
# bf16 has every line of the table; the others have widths with a mask, and with as many elements a thread as there are.
WIDTHS = {"bf16": (64, 128, 192, 384, 768, 2048, 4096, 8192), "fp32": (1024, 4096), "mixed": (192, 384)}
BYTES = {"*bf16": 2, "*fp32": 4}


def specs(width: int, dtype: str) -> dict[str, dict]:
    """{kernel: its function, argument types and constants, warps, the tiles that it loads, those that it stores}."""
    from hyperclip_fast.kernels.common import launch as common
    from hyperclip_fast.kernels.layer_norm import launch

    stream, inner = ("*fp32", "*bf16") if dtype == "mixed" else ("*" + dtype, "*" + dtype)
    block_d, (block_n, warps), (back_n, back_warps) = launch.layer_norm_tiles(width)
    block_i, block_b, reduce_d, reduce_warps = common.REDUCE_CONFIG
    shared = {"weight": stream, "task_ids": "*i64", "total": stream, "mean": "*fp32", "rstd": "*fp32"}
    shared |= {"N": "i32", "T": "i32", "weight_stride": "i32", "D": width, "BLOCK_D": block_d}
    forward = {"x": stream, "delta": inner, "bias": stream, "out": inner}
    forward |= {"tiles": "i32", "bias_stride": "i32", "eps": "fp32", "BLOCK_N": block_n}
    backward = {"grad_out": inner, "grad_total": stream, "grad_x": stream}
    backward |= {"grad_delta": inner if dtype == "mixed" else None}
    backward |= {"partial_weight": "*fp32", "partial_bias": "*fp32", "slices": "i32", "BLOCK_N": back_n}
    reduce = {"partials": "*fp32", "task_ids": "*i64", "grads": stream, "B": "i32", "T": "i32", "slices": "i32"}
    reduce |= {"D": width, "BLOCK_I": block_i, "BLOCK_B": block_b, "BLOCK_D": reduce_d}
    found = {
        "forward": (launch._fwd_kernel, {**shared, **forward}, warps, ("x", "delta"), ("total", "out")),
        "backward": (
            launch._bwd_kernel,
            {**shared, **backward},
            back_warps,
            ("grad_out", "grad_total", "total"),
            ("grad_x", "grad_delta"),
        ),
        "reduce": (common._reduce_kernel, reduce, reduce_warps, (), ()),
    }
    if width != 192:
        del found["reduce"]  # its tiles are the same for every width
    return {name: dict(zip(("fn", "arguments", "warps", "loads", "stores"), spec)) for name, spec in found.items()}


def kind(target: str) -> str:
    """The table's word for a target."""
    return "amd" if target in AMD else "small" if target in ("sm_86", "sm_89", "sm_120") else "large"


def product_specs(target: str) -> dict[str, dict]:
    """{kernel and tiles: as `specs`} of the products with epilogues, each with every tile of the target's table."""
    from hyperclip_fast.kernels.linear import launch
    from hyperclip_fast.kernels.tables import TILES

    table = TILES[kind(target)]
    kernels = {  # loads and stores beside the product's operands
        launch._linear_gelu_kernel: ((), ("out", "pre")),
        launch._linear_gelu_bwd_kernel: (("grad_out",), ("grad_pre",)),
        launch._linear_add_kernel: (("residual",), ("out", "y")),
    }
    found = {}
    for dtype, precision in (("*bf16", "ieee"), ("*fp32", "ieee"), ("*fp32", "tf32")):
        if precision == "tf32" and target in AMD:
            continue
        for tiles in dict.fromkeys(table[BYTES[dtype]][2 * (precision == "tf32") :]):
            for fn, (loads, stores) in kernels.items():
                if tiles.block_n == 64 and fn is not launch._linear_gelu_bwd_kernel:
                    continue  # in a narrow tile the epilogue that needs most registers stands for the others
                arguments = product_arguments(dtype, tiles) | {"PRECISION": precision}
                spec = {"fn": fn, "arguments": arguments, "warps": tiles.warps, "stages": tiles.stages}
                stores = () if target in AMD else stores  # MFMA's accumulators are stored as they lie, 64 bits a thread
                spec |= {"loads": loads, "stores": stores, "elements": tiles.block_m * tiles.block_n}
                spec["tensor_cores"] = dtype == "*bf16" or precision == "tf32"
                found[f"{fn.__name__} {dtype} {precision} {tuple(tiles)}"] = spec
    return found | pass_specs(launch) | norm_product_specs(target)


def product_arguments(dtype: str, tiles) -> dict:
    """Types and constants of every argument of the product kernels."""
    names = ("x", "weight", "bias", "out", "pre", "grad_out", "grad_pre", "residual", "scale", "y")
    arguments = dict.fromkeys(names, dtype) | {"partial_bias": "*fp32", "keep": "*fp32", "M": "i32", "N": "i32"}
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m}
    return arguments | {"F": "i32", "K": 192} | blocks


def norm_product_specs(target: str) -> dict[str, dict]:
    """As `specs`, of the norm and product in one: every width and tile of the target's table, the dearest epilogues.

    The narrowest width has the plain product too.
    """
    from hyperclip_fast.kernels.norm_linear import launch
    from hyperclip_fast.kernels.tables import NORM_TILES

    found = {}
    for width, tiles in NORM_TILES[kind(target)].items():
        other = ("*bf16", "*bf16", False) if width == min(NORM_TILES[kind(target)]) else ("*bf16", "*fp32", True)
        for stream, rows, gelu in (("*fp32", "*fp32", True), other):
            arguments = product_arguments("*bf16", tiles) | {"x": stream, "norm_weight": rows, "norm_bias": rows}
            arguments |= {"task_ids": "*i64", "T": "i32", "slices": "i32", "eps": "fp32", "GELU": gelu, "K": width}
            arguments |= {"norm_weight_stride": "i32", "norm_bias_stride": "i32"}
            spec = {"fn": launch._norm_linear_kernel, "arguments": arguments, "tensor_cores": True}
            spec |= {"warps": tiles.warps, "stages": tiles.stages, "elements": tiles.block_m * tiles.block_n}
            spec |= {"loads": ("x",), "stores": () if target in AMD else ("out",)}
            found[f"{spec['fn'].__name__} D{width} {stream} {rows}"] = spec
    return found


def batch_norm_specs() -> dict[str, dict]:
    """As `specs`, of the batch norm: every tile, both formats, the dearest activation, all that is optional."""
    from hyperclip_fast.kernels.batch_norm import launch

    pointers = dict.fromkeys(("mean", "var", "sums", "partial_mean", "partial_m2", "partials"), "*fp32")
    pointers |= {"partial_weight": "*fp32", "partial_bias": "*fp32", "task_ids": "*i64"}
    sizes = dict.fromkeys(("OUTER", "T", "S", "P", "C", "chunk", "slices"), "i32") | {"eps": "fp32", "count": "fp32"}
    strides = dict.fromkeys(("weight_stride", "bias_stride", "stats_stride"), "i32")
    streams = ("x", "residual", "out", "grad_out", "grad_x", "grad_residual")
    later = dict.fromkeys(("grad_residual", "partial_weight", "partial_bias"))  # absent from the second pass
    kernels = (
        (launch._fwd_kernel, ("x", "residual"), ("out",), {}),
        (launch._bwd_kernel, ("grad_out", "x", "residual"), ("grad_x", "grad_residual"), {"sums": None}),
        (launch._bwd_kernel, ("grad_out", "x", "residual"), ("grad_x",), later),
        (launch._stats_kernel, ("x",), (), {}),
    )
    found = {}
    for inner, last, stream, rows in ((16, 1, "*bf16", "*fp32"), (32, 1, "*fp32", "*fp32"), (64, 0, "*bf16", "*bf16"),
                                      (672, 1, "*bf16", "*fp32"), (784, 0, "*fp32", "*fp32")):  # fmt: skip
        block_o, block_i, warps = launch.batch_norm_tiles(inner)
        arguments = pointers | sizes | strides | dict.fromkeys(streams, stream) | {"weight": rows, "bias": rows}
        arguments |= {"INNER": inner, "CHANNELS_LAST": bool(last), "BLOCK_O": block_o, "BLOCK_I": block_i}
        arguments |= {"ACT": "gelu", "RESIDUAL_AFTER": False}
        for i, (fn, loads, stores, absent) in enumerate(kernels):
            if i == 1 or inner == 672:
                spec = {
                    "fn": fn,
                    "arguments": arguments | absent,
                    "warps": warps,
                    "elements": block_o * block_i,
                }
                found[f"batch norm {fn.__name__} {i} {inner} {stream}"] = {**spec, "loads": loads, "stores": stores}
    block_p, block_c, warps = launch.COMBINE_CONFIG
    for fn in (launch._combine_kernel, launch._sums_kernel):
        arguments = pointers | sizes | strides | {"weight": "*bf16", "BLOCK_P": block_p, "BLOCK_C": block_c}
        spec = {"fn": fn, "arguments": arguments, "warps": warps, "elements": block_p * block_c}
        found[fn.__name__] = {**spec, "loads": (), "stores": ()}
    return found


def pass_specs(launch) -> dict[str, dict]:
    """As `specs`, of the passes of the products' backward, with a bfloat16 stream and with a float32 one."""
    block_m, block_n, warps = launch.PASS_CONFIG
    shared = {"M": "i32", "N": "i32", "slices": "i32", "F": "i32", "BLOCK_M": block_m, "BLOCK_N": block_n}
    shared |= {"pre": "*bf16", "grad_pre": "*bf16", "y": "*bf16", "grad_y": "*bf16", "scale": "*fp32", "keep": "*fp32"}
    shared |= {"partial_bias": "*fp32", "partial_scale": "*fp32"}
    found = {}
    for fn, grad_out, inputs, outputs in (
        (launch._gelu_bwd_kernel, "*bf16", ("grad_out", "pre"), ("grad_pre",)),
        (launch._linear_add_bwd_kernel, "*bf16", ("grad_out", "y"), ("grad_y",)),
        (launch._linear_add_bwd_kernel, "*fp32", ("grad_out", "y"), ("grad_y",)),
    ):
        spec = {"fn": fn, "arguments": shared | {"grad_out": grad_out}, "warps": warps, "elements": block_m * block_n}
        found[f"{fn.__name__} {grad_out}"] = {**spec, "loads": inputs, "stores": outputs}
    return found


def compile_kernel(spec: dict, target: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec["fn"].arg_names
    arguments = {name: spec["arguments"][name] for name in names}
    constants = {
        name: value for name, value in arguments.items() if not isinstance(value, str) or name in ("PRECISION", "ACT")
    }
    signature = {name: "constexpr" if name in constants else value for name, value in arguments.items()}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n.endswith("_stride") or n == "F"]
    source = ASTSource(
        spec["fn"],
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    stages = {"num_stages": spec["stages"]} if "stages" in spec else {}
    return triton.compile(source, target=gpu, options={"num_warps": spec["warps"], **stages})


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
    elements = spec.get("elements") or arguments.get("BLOCK_N", 0) * arguments["BLOCK_D"]
    return sum(size * elements // threads for size in sizes)


def tensor_core_instructions(kernel, nvidia: bool) -> int:
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    return len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma", text))


def inspect(target: str) -> list[dict]:
    """What every kernel of every width, tile and dtype became on a target."""
    every = {
        f"{name} D{width} {dtype}": spec
        for dtype, widths in WIDTHS.items()
        for width in widths
        for name, spec in specs(width, dtype).items()
    }
    every |= product_specs(target) | batch_norm_specs()
    return [{"kernel": name, **inspect_kernel(spec, target)} for name, spec in every.items()]


def inspect_kernel(spec: dict, target: str) -> dict:
    nvidia = target.startswith("sm_")
    kernel = compile_kernel(spec, target)
    report = inspect_nvidia(kernel) if nvidia else inspect_amd(kernel)
    threads = spec["warps"] * (32 if nvidia else 64)
    product = "stages" in spec
    return {
        **report,
        "most_registers": 256 if product else 144,
        "shared": kernel.metadata.shared,
        "most_shared": SHARED[target] * 1024,
        "least_loads": tile_bytes(spec, spec["loads"], threads),
        "least_stores": tile_bytes(spec, spec["stores"], threads),
        "narrow_offsets": narrow_offsets(kernel),
        "lacks_tensor_cores": spec.get("tensor_cores", False) and not tensor_core_instructions(kernel, nvidia),
    }


@pytest.fixture(scope="module")
def inspector():
    """A process without the interpreter, which this one may run: it reads targets and answers with `inspect`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, root = [sys.executable, "-m", "tests.kernels.test_targets"], Path(__file__).resolve().parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=root, **pipes) as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("target", [*NVIDIA, *AMD])
def test_compiles_within_the_bars(target, inspector):
    pytest.importorskip("triton")
    print(target, file=inspector.stdin, flush=True)
    answer = inspector.stdout.readline()
    assert answer, "the process ended; it printed why"
    found = json.loads(answer)
    assert len(found) == 2 * sum(map(len, WIDTHS.values())) + 2 + (12 if target in AMD else 13) + 4 + 10
    for report in found:
        assert report["spilled"] == 0, report
        assert report["registers"] <= report["most_registers"], report
        assert report["shared"] <= report["most_shared"], report
        assert report["wide_loads"] >= report["least_loads"], report
        assert report["wide_stores"] >= report["least_stores"], report
        assert report["narrow_offsets"] == [], report
        assert not report["lacks_tensor_cores"], report


if __name__ == "__main__":
    for name in sys.argv[1:] or map(str.strip, sys.stdin):
        print(json.dumps(inspect(name)), flush=True)
