"""hyperclip specialize and export: a task, or a part of a model, for other runtimes."""

import argparse

from hyperclip_fast.cli.arguments import add_command, add_model, add_model_path, read_labels

SPECIALIZE = "Write one task as a plain timm model. The model needs neither the hypernetwork nor the text tower."
SPECIALIZE_EXAMPLE = """example:
  hyperclip specialize --labels "cat,dog" --out cat_or_dog/
"""
EXPORT = """Write a part of a model as one file for another runtime, and compare the file's outputs with PyTorch's. The
command needs the extra export, and for ExecuTorch the extra executorch, too."""
EXPORT_ENDING = """parts:
  specialized  takes images, gives the logits of one task
  mixed        takes images, a table of rows and task ids, gives embeddings; one file serves every task
  text         takes tokens of class names, gives a task's row and class embeddings
The file fixes neither the batch size nor the numbers of tasks and classes.

example:
  hyperclip export mixed --out mixed.onnx
"""


def add_specialize(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "specialize", "write one task as a plain timm model", SPECIALIZE, SPECIALIZE_EXAMPLE)
    parser.add_argument("--labels", required=True, metavar="A,B,C", help="class names of the task")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    add_model(parser)
    parser.set_defaults(run=_specialize)


def add_export(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "export", "write a file for ONNX Runtime or ExecuTorch", EXPORT, EXPORT_ENDING)
    parser.add_argument("what", choices=("specialized", "mixed", "text"), help="part of the model, see below")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write: .onnx, .pt2 or .pte")
    text = "torch is torch.export's, aoti is compiled by AOTInductor; default: %(default)s"
    parser.add_argument("--format", choices=("onnx", "torch", "aoti", "executorch"), default="onnx", help=text)
    parser.add_argument("--labels", metavar="A,B,C", help="class names of the task, for specialized")
    add_model_path(parser)
    parser.set_defaults(run=_export, device="cpu")


def _specialize(args: argparse.Namespace) -> None:
    from hyperclip_fast.export.specialized import save_specialized
    from hyperclip_fast.hyperclip import load_model

    labels = read_labels(args.labels)
    save_specialized(load_model(args.model, args.device), labels, args.out)
    print(f"A plain timm model for {len(labels)} classes: {args.out}")
    print(f'  load it with timm.create_model("local-dir:{args.out}", pretrained=True); classes.safetensors scores it')


def _export(args: argparse.Namespace) -> None:
    from hyperclip_fast.export.formats import export
    from hyperclip_fast.export.graphs import mixed_graph, specialized_graph, text_graph
    from hyperclip_fast.hyperclip import load_model

    if (args.what == "specialized") != (args.labels is not None):
        raise ValueError(f"--labels must be given for specialized, and only there, got {args.labels!r} for {args.what}")
    labels = read_labels(args.labels) if args.labels is not None else None
    model = load_model(args.model)
    if labels is not None:
        graph = specialized_graph(model, labels)
    else:
        graph = mixed_graph(model) if args.what == "mixed" else text_graph(model)
    error = export(graph, args.out, args.format)
    print(f"{args.out}: {', '.join(graph.axes)} to {', '.join(graph.outputs)}; within {error:.0e} of PyTorch")
