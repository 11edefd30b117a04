"""`hyperclip bench encoders`: every named encoder in one Markdown table, sizes, errors and throughput side by side."""

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hyperclip_fast.batch_norm_folding import fuse_batch_norms
from hyperclip_fast.bench.cases.models import model_cases, side_of, size_options
from hyperclip_fast.bench.harness.machine import default_device, describe
from hyperclip_fast.bench.harness.report import header
from hyperclip_fast.bench.harness.runner import Case, Provider, Run, relative_error, run_case
from hyperclip_fast.encoders import create_encoder
from hyperclip_fast.norm_params import NormParams

COLUMNS = ("encoder", "parameters", "norm parameters", "identity", "mixed", "stock's own")


def run_encoders(args: argparse.Namespace) -> int:
    """Print the table line by line; 1 if an encoder computed wrongly or raised."""
    device = torch.device(args.device or default_device())
    print(header(describe(device, torch.float32)), end="\n\n")
    if args.fused:
        return _run_fused(args, device)
    columns = [*COLUMNS, *(f"ratio, B {batch}" for batch in args.batches)]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    is_right = True
    for name in args.models:
        figures = encoder_figures(name, args.batches, args.tasks, args.seconds, args.img_size, device)
        print("| " + " | ".join(cells(figures)) + " |", flush=True)
        is_right &= figures["identity"] == 0 and not any("reason" in case for case in figures["cases"])
    return 0 if is_right else 1


def _run_fused(args: argparse.Namespace, device: torch.device) -> int:
    print("Time of the stock model with BatchNorms folded, over that of one task's: folded, and with its norms.\n")
    columns = ["encoder", *(f"{kind}, B {batch}" for batch in args.batches for kind in ("folded", "with norms"))]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    is_right = True
    for name in args.models:
        rows = [
            row for b in args.batches for row in run_case(fused_case(name, b, args.img_size, device), args.seconds)[1:]
        ]
        print("| " + " | ".join([name, *map(_ratio, rows)]) + " |", flush=True)
        is_right &= not any("reason" in row for row in rows)
    return 0 if is_right else 1


def fused_case(name: str, batch: int, side: int | None, device: torch.device) -> Case:
    """The stock model folded, and the stock model that holds one task's row, folded and with its norms."""
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=0, **size_options(name, side)).to(device).eval()
    encoder, task, side = create_encoder(stock), copy.deepcopy(stock), side_of(stock, side)
    row = encoder.base_params.table.detach()
    task.load_state_dict(NormParams(encoder.norm_spec, row + 0.1 * torch.randn_like(row)).state_dict(), strict=False)
    images = torch.randn(batch, 3, side, side, device=device)
    models = {"stock": fuse_batch_norms(stock, images[:1]), "ours": fuse_batch_norms(task, images[:1]), "norms": task}
    exact = {"stock": copy.deepcopy(stock).double(), "ours": copy.deepcopy(task).double()}

    def run(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(images)

    def check(provider: Provider, run: Run) -> float:
        with torch.inference_mode():
            return relative_error(run(), exact.get(provider.name, exact["ours"])(images.double()))

    providers = [Provider(key, "folded", lambda model=model: partial(run, model)) for key, model in models.items()]
    return Case({"model": name, "batch": batch}, providers, check, torch.float32, device)


def encoder_figures(
    name: str, batches: Sequence[int], tasks: int, seconds: float, side: int | None, device: torch.device
) -> dict[str, Any]:
    """One encoder's figures.

    Args:
        name: of a timm model.
        batches: B of each case.
        tasks: T.
        seconds: of timed rounds a case.
        side: of the images; None: as the model has it.
        device: where it runs, in float32.

    Returns:
        name, parameters, norm_parameters; identity: the largest difference from the stock model, without rows and with
        the base row; cases: for each B what `run_case` returned for ours, with stock's error as "stock_error".
    """
    figures = {"name": name, "cases": [], **_sizes_and_identity(name, side, device)}
    for case in model_cases(
        [name], batches, [tasks], ["distinct"], ["forward"], ["eager"], torch.float32, device, img_size=side
    ):
        case.providers = [provider for provider in case.providers if provider.name in ("stock", "ours")]
        stock, ours = run_case(case, seconds)
        figures["cases"].append({**ours, "stock_error": stock.get("error")})
    return figures


@torch.inference_mode()
def _sizes_and_identity(name: str, side: int | None, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=0, **size_options(name, side)).to(device).eval()
    encoder = create_encoder(stock)
    side = side_of(stock, side)
    images = torch.randn(2, 3, side, side, device=device)
    expected = stock(images)

    def difference(out: Tensor) -> float:
        return (out - expected).abs().max().item()

    return {
        "parameters": sum(parameter.numel() for parameter in stock.parameters()),
        "norm_parameters": encoder.norm_spec.num_params,
        "identity": max(difference(encoder(images)), difference(encoder(images, encoder.base_params))),
    }


def cells(figures: dict[str, Any]) -> list[str]:
    """A line of the table."""
    cases = figures["cases"]
    errors = [max((case.get(key) or 0.0 for case in cases), default=0.0) for key in ("error", "stock_error")]
    return [
        figures["name"],
        f"{figures['parameters'] / 1e6:.2f} M",
        f"{figures['norm_parameters']:,}",
        f"{figures['identity']:.0e}" if figures["identity"] else "0",
        *(f"{error:.0e}" for error in errors),
        *map(_ratio, cases),
    ]


def _ratio(case: dict[str, Any]) -> str:
    if "reason" in case:
        return case["reason"]
    return "{1:.3f} ({0:.2f} to {2:.2f})".format(*case["ratio"]) if case["ratio"] else "stock failed"
