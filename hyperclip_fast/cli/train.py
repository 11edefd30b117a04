"""hyperclip train."""

import argparse
from pathlib import Path

from hyperclip_fast.cli.arguments import add_command, add_device
from hyperclip_fast.configs import shipped_configs

DESCRIPTION = """Train a model. The same command continues a run that was stopped. To train in several processes, start
the command with torchrun. It needs the extra train."""
EXAMPLE = """example:
  hyperclip train --config demo --out runs/demo
"""


def add_train(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "train", "train a model", DESCRIPTION, EXAMPLE)
    names = ", ".join(shipped_configs())
    text = f"a YAML file with sections model, train and data, or the name of a shipped one: {names}"
    parser.add_argument("--config", required=True, help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the log, the checkpoint and the model")
    text = "change a value of the config, as in train.lr=3e-4; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    parser.add_argument("--steps", type=int, metavar="N", help="the same as --set train.steps=N")
    parser.add_argument("--seed", type=int, metavar="N", help="the same as --set train.seed=N")
    text = "rehearse in seconds, with a small model, made-up data and 4 steps"
    parser.add_argument("--smoke", action="store_true", help=text)
    add_device(parser)
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
