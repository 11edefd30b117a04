"""Images/s of a mixed batch against stock timm on this CPU: forward and training step, medians of interleaved runs.

    python bench/model_cpu.py [--name vit_tiny_patch16_224] [--batch 1 16 64] [--tasks 16]

Ratios are stock's median over ours in one run: above 1 we are faster.
"""

import argparse
import json
import platform
from pathlib import Path

import timm
import torch

from hyperclip_fast import HyperViT, NormParams
from hyperclip_fast.timing import interleaved, medians


def candidates(name: str, batch: int, tasks: int, train: bool):
    """Functions to time: stock timm, HyperViT without params, and a mixed batch of `tasks` tasks."""
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=0).train(train)
    hyper = HyperViT.from_timm(stock).train(train)
    images = torch.randn(batch, *stock.pretrained_cfg["input_size"])
    base = hyper.base_params.table.detach()
    table = (base + 0.1 * torch.randn(tasks, base.shape[1])).requires_grad_(train)
    params = NormParams(hyper.norm_spec, table, torch.randint(0, tasks, (batch,)))
    return {
        "stock": _run(stock, train, lambda: stock(images)),
        "hyper": _run(hyper, train, lambda: hyper(images)),
        "mixed": _run(hyper, train, lambda: hyper(images, params)),
    }


def _run(model, train, forward):
    def step():
        model.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    def infer():
        with torch.inference_mode():
            forward()

    return step if train else infer


def spread(times: list[float]) -> str:
    """Quartiles relative to the median, in per cent."""
    ordered, middle = sorted(times), sorted(times)[len(times) // 2]
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    return f"{100 * (low / middle - 1):+.0f}/{100 * (high / middle - 1):+.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=40, help="about how long each line may take")
    parser.add_argument("--json", help="also write the medians there")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"{args.name}, {args.tasks} tasks, torch {torch.__version__}, {threads}")
    print(f"{'step':<9}{'B':>4}{'stock images/s':>16}{'spread':>14}{'no params':>11}{'mixed':>8}   (ratio to stock)")
    rows = []
    for train in (False, True):
        for batch in args.batch:
            functions = candidates(args.name, batch, args.tasks, train)
            once = sum(sum(values) for values in interleaved(functions, 1, 1).values())
            repeats = max(5, min(200, int(args.seconds / once)))
            times = interleaved(functions, repeats, 0)
            middle = medians(times)
            ratios = {key: middle["stock"] / middle[key] for key in ("hyper", "mixed")}
            kind = "training" if train else "forward"
            print(
                f"{kind:<9}{batch:>4}{batch / middle['stock']:>16.1f}{spread(times['stock']):>14}"
                f"{ratios['hyper']:>11.3f}{ratios['mixed']:>8.3f}"
            )
            rows.append({"step": kind, "batch": batch, "repeats": repeats, "seconds": middle, "ratios": ratios})
    if args.json:
        report = {"name": args.name, "tasks": args.tasks, "torch": torch.__version__, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
