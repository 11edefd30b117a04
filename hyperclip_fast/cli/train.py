"""hyperclip train."""

import argparse
from pathlib import Path

from hyperclip_fast.configs import shipped_configs


def add_train(commands) -> None:
    """Add the command to the others."""
    text = "train a model; a run that was stopped goes on where it was; start it by torchrun for several processes"
    parser = commands.add_parser("train", help=text, description=text)
    names = ", ".join(shipped_configs())
    text = f"YAML with the sections model, train and data; or a shipped one: {names}"
    parser.add_argument("--config", required=True, metavar="FILE", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's folder: log, checkpoint, model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in place of the config's, as train.lr=3e-4"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="--set train.steps=N")
    parser.add_argument("--seed", type=int, metavar="N", help="--set train.seed=N")
    parser.add_argument(
        "--smoke", action="store_true", help="a rehearsal in seconds: small model, made-up data, 4 steps"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from hyperclip_fast.training import distributed
    from hyperclip_fast.training.config import load_config
    from hyperclip_fast.training.smoke import smoke
    from hyperclip_fast.training.trainer import Trainer

    short = {"steps": args.steps, "seed": args.seed}
    changes = [*args.set, *(f"train.{name}={value}" for name, value in short.items() if value is not None)]
    run = load_config(args.config, changes)
    with distributed.processes(args.device) as device:
        if args.smoke:
            run = smoke(run, args.out, args.steps or 4, distributed.share())
            distributed.barrier(distributed.share().world)
        trainer = Trainer(run, args.out, device)
        trainer.train()
    if trainer.stopped is not None:
        print(f"Stopped at step {trainer.step}; the same command goes on from there.")
        return 128 + trainer.stopped
    if trainer.share.rank == 0:
        print(f"The model: {Path(args.out) / 'model'}")
    return 0
