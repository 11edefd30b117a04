"""The model card of a HyperCLIP: README.md beside its weights, made from the model and from what its owner adds."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from hyperclip_fast.hyperclip import HyperCLIP

USE = """```python
from hyperclip_fast import HyperCLIP, TaskBank

model = HyperCLIP.from_pretrained("{repo}")
bank = TaskBank(model)
bank.add("pets", ["cat", "dog", "parrot"])
bank.classify(images, tasks=["pets"] * len(images))  # images (B, 3, {size}, {size}) in [-1, 1]
```"""
UNKNOWN = "Not stated by whoever saved this model."


def model_card(
    model: "HyperCLIP",
    data: str | None = None,
    tasks: Mapping[str, Sequence[str]] | None = None,
    numbers: Mapping[str, float] | None = None,
    license: str = "apache-2.0",
    repo: str = "a folder, or a hub id",
) -> ModelCard:
    """Describe a model: what it is made of, and its data, tasks and numbers where they are given.

    Args:
        model: the model.
        data: what it was trained on, with the data's licence.
        tasks: tasks it was tried on: names with their class names.
        numbers: what was measured, by name, such as {"accuracy, mean over 33 tasks": 0.30}.
        license: of the weights, as the hub abbreviates it.
        repo: the hub id under which it will be found.

    Raises:
        ValueError: for tasks that are no mapping to lists of class names, or numbers that are no numbers.
    """
    tasks, numbers = dict(tasks or {}), dict(numbers or {})
    if any(isinstance(names, str) or not all(isinstance(name, str) for name in names) for names in tasks.values()):
        raise ValueError(f"tasks must map names to lists of class names, got {tasks}")
    if not all(isinstance(number, (int, float)) for number in numbers.values()):
        raise ValueError(f"numbers must map names to numbers, got {numbers}")
    header = ModelCardData(
        library_name="hyperclip_fast",
        license=license,
        pipeline_tag="zero-shot-image-classification",
        tags=["hyperclip", "pytorch_model_hub_mixin"],
    )
    sections = {
        "Model": _model(model),
        "Use": USE.format(repo=repo, size=model.image_size),
        "Data": data or UNKNOWN,
        "Tasks": "\n".join(f"- {task}: {', '.join(names)}" for task, names in tasks.items()) or UNKNOWN,
        "Numbers": _table(numbers) if numbers else UNKNOWN,
        "Licence": f"{license}. The method: [HyperCLIP](https://arxiv.org/abs/2412.16777).",
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n# HyperCLIP, {model.config.image_tower}\n\n{text}\n")


def _model(model: "HyperCLIP") -> str:
    config, spec = model.config, model.image.norm_spec
    weights = sum(parameter.numel() for parameter in model.parameters())
    templates = f", templates {json.dumps(config.templates, ensure_ascii=False)}" if config.templates else ""
    return "\n".join(
        [
            f"- image tower: {config.image_tower}, images of {model.image_size} x {model.image_size} pixels",
            f"- generated for each task: {spec.num_params} weights of {len(spec.names)} norm layers",
            f"- text tower: {config.text_tower}, {'trained' if config.train_text else 'frozen, not in this file'}"
            + templates,
            f"- embeddings: {config.embed_dim} wide; {weights} parameters in this file",
        ]
    )


def _table(numbers: Mapping[str, float]) -> str:
    return "\n".join(
        ["| what | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in numbers.items())]
    )
