"""hyperclip init: a pretrained model of another library under a new hypernetwork."""

import argparse
from typing import Any

from hyperclip_fast.cli.arguments import add_command

DESCRIPTION = """Take over a pretrained model, put a new hypernetwork on top, and write a folder that every command
takes with --model. Before training it gives what the pretrained model gives; the command checks that."""
ENDING = """sources:
  open_clip:MODEL/TAG   any of open_clip's models; a checkpoint file may stand for the tag
  transformers:MODEL    a CLIP or SigLIP, by its hub id or its folder
  timm:MODEL            an image tower; the projections of images and class names are new and must be trained

example:
  hyperclip init --from open_clip:ViT-B-16-SigLIP/webli --out start/
"""
LARGEST = 1e-5  # difference of image embeddings, of numbers up to 1


def add_init(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "init", "start from a pretrained model", DESCRIPTION, ENDING)
    parser.add_argument("--from", required=True, metavar="SOURCE", dest="source", help="the model, see below")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    text = "text tower beside a timm model; default: minilm"
    parser.add_argument("--text", metavar="NAME", help=text)
    text = "weights of a timm model: a file, pip:PACKAGE or random; default: timm's"
    parser.add_argument("--weights", metavar="SOURCE", help=text)
    text = "width of the space that images and class names share, beside a timm model; default: 256"
    parser.add_argument("--embed-dim", type=int, metavar="E", help=text)
    text = "also keep the frozen text tower in the folder, so that it works offline"
    parser.add_argument("--include-text", action="store_true", help=text)
    parser.set_defaults(run=_init, device="cpu")


def _init(args: argparse.Namespace) -> None:
    from hyperclip_fast.hyperclip import HyperCLIP
    from hyperclip_fast.pretrained.source import parts_of

    given: dict[str, Any] = {"text": args.text, "weights": args.weights, "embed_dim": args.embed_dim}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.source.startswith("timm:"):
        wanted = "--text, --weights and --embed-dim must be left out but beside a timm model"
        raise ValueError(f"{wanted}, got {args.source} and {given}")
    if args.weights == "random":
        given["weights"] = False
    parts = parts_of(args.source, **given)
    model = HyperCLIP.from_parts(parts)
    difference = _difference(model, parts)
    if not difference <= LARGEST:
        raise ValueError(f"--from must be a model that timm computes alike, {args.source} differs by {difference:.0e}")
    model.save_pretrained(args.out, include_text=args.include_text or None)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in _modules(model).items()}
    print(f"{args.out}: {args.source} under a new hypernetwork")
    print(f"  image tower    {model.config.image_tower}, {type(model.image).__name__}, {counts['image']:,} parameters")
    print(f"  text tower     {model.config.text_tower}, {counts['text']:,} parameters, frozen")
    print(
        f"  hypernetwork   {counts['hypernetwork']:,} parameters; a task's row has {model.image.norm_spec.num_params:,}"
    )
    print(f"  new            {', '.join(parts.new)}")
    print(f"  check          image embeddings within {difference:.0e} of the pretrained model's")


def _modules(model) -> dict:
    return {"image": model.image, "text": model.text_tower, "hypernetwork": model.hypernetwork}


def _difference(model, parts) -> float:
    """The largest difference of image embeddings of length 1, over two images of noise."""
    import torch

    images = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(parts.image.source(images), dim=-1)
        return (model.encode_image(images) - theirs).abs().max().item()
