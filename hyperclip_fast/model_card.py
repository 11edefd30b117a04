"""The model card of a HyperCLIP: README.md beside its weights, made from the model and from what its owner adds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

USE = """```python
from hyperclip_fast import HyperCLIP, TaskBank

model = HyperCLIP.from_pretrained("{repo}")
bank = TaskBank(model)
bank.add("pets", ["cat", "dog", "parrot"])
bank.classify(images, tasks=["pets"] * len(images))  # images (B, 3, {size}, {size}) by model.preprocessing
```"""
UNKNOWN = "Not stated by whoever saved this model."


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of a model by itself.

    Args:
        image_tower: its name.
        image_size: S in pixels.
        row_size: P, the generated weights of a task.
        norm_layers: how many layers they belong to.
        text_tower: its name.
        text_is_trained: whether the text tower's weights are in the file.
        templates: prompt templates.
        embed_dim: E.
        parameters: in the file.
    """

    image_tower: str
    image_size: int
    row_size: int
    norm_layers: int
    text_tower: str
    text_is_trained: bool
    templates: tuple[str, ...]
    embed_dim: int
    parameters: int


def model_card(
    facts: ModelFacts,
    data: str | None = None,
    tasks: Mapping[str, Sequence[str]] | None = None,
    numbers: Mapping[str, float] | None = None,
    license: str = "apache-2.0",
    repo: str = "a folder, or a hub id",
) -> ModelCard:
    """Describe a model: what it is made of, and its data, tasks and numbers where they are given.

    Args:
        facts: of the model.
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
        "Model": _model(facts),
        "Use": USE.format(repo=repo, size=facts.image_size),
        "Data": data or UNKNOWN,
        "Tasks": "\n".join(f"- {task}: {', '.join(names)}" for task, names in tasks.items()) or UNKNOWN,
        "Numbers": _table(numbers) if numbers else UNKNOWN,
        "Licence": f"{license}. The method: [HyperCLIP](https://arxiv.org/abs/2412.16777).",
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n# HyperCLIP, {facts.image_tower}\n\n{text}\n")


def _model(facts: ModelFacts) -> str:
    templates = f", templates {json.dumps(facts.templates, ensure_ascii=False)}" if facts.templates else ""
    trained = "trained" if facts.text_is_trained else "frozen, not in this file"
    return "\n".join(
        [
            f"- image tower: {facts.image_tower}, images of {facts.image_size} x {facts.image_size} pixels",
            f"- generated for each task: {facts.row_size} weights of {facts.norm_layers} norm layers",
            f"- text tower: {facts.text_tower}, {trained}{templates}",
            f"- embeddings: {facts.embed_dim} wide; {facts.parameters} parameters in this file",
        ]
    )


def _table(numbers: Mapping[str, float]) -> str:
    return "\n".join(
        ["| what | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in numbers.items())]
    )
