"""A HyperCLIP behind transformers' CLIP interface: labels and images in, logits of each image with each label out.

The labels of a call are its task: the model adapts to them. A text tower has a tokenizer of its own, so labels come to
the model as the bytes that ByT5Tokenizer makes of them, and a model's folder need hold no vocabulary. A label of
several lines is so many prompts of one class, averaged: with the template "a photo of a {0}.\\na drawing of a {0}." the
pipeline fills in each label twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    ByT5Tokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import ModelOutput

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.integrations.open_clip import average_prompt_lists
from hyperclip_fast.integrations.transformers import HyperCLIPModelConfig
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.tasks import AdaptedTask, class_logits
from hyperclip_fast.utils.class_names import check_class_names
from hyperclip_fast.utils.typed_config import from_dict
from hyperclip_fast.version import MODEL_TYPE

PAD, END, OFFSET = 0, 1, 3  # ByT5Tokenizer's: byte b is number b + OFFSET
HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
OWN = ("trust_remote_code", "code_revision", "adapter_kwargs")  # what the Auto classes pass on, and nothing here needs


@dataclass
class HyperCLIPOutput(ModelOutput):
    """What the model returns.

    Args:
        logits_per_image: (B, K) scaled similarities.
        logits_per_text: (K, B).
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None


class HyperCLIPModel(PreTrainedModel):
    """A HyperCLIP that takes a task's labels with the images. Made by `from_pretrained`.

    In evaluation, without gradients, it keeps what it made of the last labels for the images that come next. Whoever
    changes weights by hand calls `eval()` afterwards, which forgets it; so do `train()` and `load_state_dict`.

    Args:
        config: as AutoConfig reads it.
        clip: the HyperCLIP.
    """

    config_class = HyperCLIPModelConfig
    main_input_name = "pixel_values"

    def __init__(self, config: HyperCLIPModelConfig, clip: HyperCLIP):
        super().__init__(config)
        self.clip = clip
        self._kept: AdaptedTask | None = None

    def train(self, mode: bool = True) -> "HyperCLIPModel":
        """As nn.Module, and forgets the last labels."""
        self._kept = None
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module, and forgets the last labels."""
        self._kept = None
        return super().load_state_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: HyperCLIPModelConfig | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "HyperCLIPModel":
        """A saved HyperCLIP, in eval mode.

        Args:
            pretrained_model_name_or_path: as `HyperCLIP.from_pretrained` takes it.
            config: as AutoConfig reads it; None: read here.
            dtype: of the weights, as a string or torch's; None or "auto": float32, as HyperCLIP has them.
            **options: revision, token, cache_dir, force_download, local_files_only.

        Raises:
            ValueError: as `HyperCLIP.from_pretrained`, and for another option.
        """
        hub = {name: value for name, value in options.items() if name in HUB and value is not None}
        for name, value in options.items():
            if name not in (*HUB, *OWN) and not name.startswith("_") and value is not None:
                raise ValueError(f"{name} must be None for a HyperCLIP, got {value!r}")
        if config is None:
            config = HyperCLIPModelConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        model = cls(config, HyperCLIP.from_pretrained(pretrained_model_name_or_path, **hub)).eval()
        if dtype in (None, "auto"):
            return model
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the HyperCLIP's own folder."""
        self.clip.save_pretrained(save_directory)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> HyperCLIPOutput:
        """Adapt to K labels, one pass of text tower and hypernetwork, and score B images against them.

        Args:
            input_ids: (K, L) int64, what the tokenizer makes of the labels.
            pixel_values: (B, 3, S, S).
            attention_mask: unused: what fills up shorter labels is no byte.

        Raises:
            ValueError: for other numbers than the tokenizer's, or images of another kind or shape.
        """
        task = self._adapted(tuple(_labels(input_ids)))
        params = NormParams(self.clip.image.norm_spec, task.row[None])
        places = torch.zeros(len(pixel_values), dtype=torch.int64, device=pixel_values.device)
        self.clip.check_images(pixel_values)
        logits = class_logits(self.clip, pixel_values, params, [task.embeddings], places)
        return HyperCLIPOutput(logits_per_image=logits, logits_per_text=logits.T)

    def _adapted(self, labels: tuple[str, ...]) -> AdaptedTask:
        """What the model makes of labels, if it is not what it kept."""
        keeps, kept = not (self.training or torch.is_grad_enabled()), self._kept
        place = (self.dtype, self.device)
        if keeps and kept and kept.classes == labels and place == (kept.embeddings.dtype, kept.embeddings.device):
            return kept
        features = _text_features(self.clip, labels)
        task = AdaptedTask(labels, self.clip.project_text(features), self.clip.rows(features[None]).table[0])
        self._kept = task if keeps else None
        return task


def _labels(input_ids: Tensor) -> list[str]:
    """The texts that the tokenizer made numbers of."""
    try:
        return [_label(row) for row in input_ids.tolist()]
    except ValueError as error:
        wanted = "what the model's own tokenizer makes of labels: UTF-8 bytes, an end, and padding"
        raise ValueError(f"input_ids must be {wanted}, got a row that is not ({error})") from error


def _label(row: list[int]) -> str:
    *text, end = [number for number in row if number != PAD] or [PAD]
    if end != END:
        raise ValueError(f"its end is {end}")
    return bytes(number - OFFSET for number in text).decode()


def _text_features(clip: HyperCLIP, labels: Sequence[str]) -> Tensor:
    """What the hypernetwork reads (K, E_text): bare labels as the tower gives them, several prompts averaged."""
    prompts = [label.split("\n") for label in labels]
    for each in prompts:
        check_class_names(each)
    if not clip.config.templates and all(len(each) == 1 for each in prompts):
        return clip.text_features(labels)
    return average_prompt_lists(clip, prompts)


class HyperCLIPImageProcessor(BaseImageProcessor):
    """Pictures to images as `HyperCLIP.preprocess` makes them.

    Args:
        preprocessing: fields of Preprocessing, as preprocessor_config.json holds them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers' attribute

    def __init__(self, preprocessing: dict[str, Any], **options: Any):
        super().__init__(**options)
        self.preprocessing = preprocessing

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds; no class, so that AutoImageProcessor asks config.json for it."""
        return {"preprocessing": self.preprocessing}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """One picture, or a list of them, to pixel_values (B, 3, S, S) float32.

        Args:
            images: Pillow images, or what else `HyperCLIP.preprocess` takes.
            return_tensors: "pt", or None for the same.

        Raises:
            ValueError: for what is no whole picture, or another kind of tensor.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.preprocessing.items()}
        preprocessing = from_dict(Preprocessing, values, "preprocessing")
        pictures = images if isinstance(images, (list, tuple)) else [images]
        return BatchFeature({"pixel_values": torch.stack([load_image(each, preprocessing) for each in pictures])})


class HyperCLIPProcessor(ProcessorMixin):
    """Image processor and tokenizer in one: `processor(text=labels, images=pictures, padding=True)`."""

    def __init__(self, image_processor: HyperCLIPImageProcessor, tokenizer: ByT5Tokenizer):
        super().__init__(image_processor, tokenizer)


@cache
def register() -> None:
    """Tell transformers' Auto classes, in this process."""
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        auto.register(HyperCLIPModelConfig, HyperCLIPModel)
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = HyperCLIPModel.__name__  # pipelines look here
    AutoTokenizer.register(HyperCLIPModelConfig, ByT5Tokenizer)
    backends = dict.fromkeys(("torchvision", "pil"), HyperCLIPImageProcessor)
    AutoImageProcessor.register(HyperCLIPModelConfig, image_processor_classes=backends)
    AutoProcessor.register(HyperCLIPModelConfig, HyperCLIPProcessor)
