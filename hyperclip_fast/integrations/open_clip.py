"""A HyperCLIP behind open_clip's model interface: specialised for a list of class names, then used as any CLIP.

open_clip's helpers hand class names to `encode_text` only, never to `encode_image`. So the task comes first: its names,
in its prompts, make the norm row that the image tower holds; after that nothing differs from a CLIP.

`encode_text` embeds each prompt by itself, as open_clip's users expect. With one template, or none, the classifier of
`open_clip.build_zero_shot_classifier` is TaskBank's. With several, open_clip averages after the projection and TaskBank
before it (as in training); the norm row is the same in both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.text import TextTower, average_prompts
from hyperclip_fast.utils.class_names import check_class_names
from hyperclip_fast.utils.extras import require

Template = str | Callable[[str], str]
Templates = Sequence[Template] | Mapping[str, Sequence[str]]
PADDING = -1  # no token's number: some tokenizers pad with the token that also ends a text, which must be read


class PromptTokenizer:
    """Texts to one integer tensor (k, L) of a fixed length on the CPU, as open_clip's tokenizers.

    Where the tower's own tokenizer fills up shorter texts, what fills them is PADDING.

    Args:
        tower: whose tokens.
    """

    def __init__(self, tower: TextTower):
        self.tower, self.context_length = tower, tower.context_length

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        tokens = self.tower.tokenize([texts] if isinstance(texts, str) else list(texts))
        ids = tokens["input_ids"].cpu()
        if self.tower.pad_id is None:
            return ids
        ids = ids.masked_fill(tokens["attention_mask"].cpu() == 0, PADDING)
        return F.pad(ids, (0, self.context_length - ids.shape[1]), value=PADDING)


class PromptEncoder(nn.Module):
    """Tokens (k, L) of `PromptTokenizer` to embeddings (k, E), not normalised.

    Args:
        tower: the text tower.
        projection: the text head.
    """

    def __init__(self, tower: TextTower, projection: nn.Module):
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, text: Tensor) -> Tensor:
        if self.tower.pad_id is None:
            features = self.tower(text)
        else:  # padding goes, but for one column: a text may be empty
            mask = text != PADDING
            length = max(1, int(mask.any(0).sum()))
            ids = text.where(mask, self.tower.pad_id)
            features = self.tower(ids[:, :length], mask[:, :length].long())
        return self.projection(features.to(next(self.projection.parameters(), features).dtype))


class OpenCLIPModel(nn.Module):
    """open_clip's CLIP interface over one norm row. `visual` is a plain timm model with open_clip's attributes.

    Args:
        model: the HyperCLIP; text tower and projection are shared with it.
        params: the row, T = 1.
    """

    def __init__(self, model: HyperCLIP, params: NormParams):
        super().__init__()
        visual: Any = model.stock_model(params)
        visual.image_size = (model.image_size, model.image_size)
        self.visual = visual
        self.text = PromptEncoder(model.text_tower, model.text_projection)
        self.logit_scale = nn.Parameter(model.logit_scale.detach().clone())  # the logarithm, as open_clip's
        self.logit_bias = nn.Parameter(model.logit_bias.detach().clone())
        self.context_length = model.text_tower.context_length
        self.output_dict = False

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images (B, 3, S, S) to embeddings (B, E)."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Tokens (k, L) to embeddings (k, E)."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, k) of images with texts, and (k, B) of texts with images."""
        scores = self.encode_image(image, normalize=True) @ self.encode_text(text, normalize=True).T
        logits = self.logit_scale.exp() * scores + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        """Normalised embeddings or None, the scale (not its logarithm) and the bias; a dict if `output_dict` is set."""
        out = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }
        return out if self.output_dict else tuple(out.values())


@torch.no_grad()
def to_open_clip(
    model: HyperCLIP, class_names: Sequence[str] | None, templates: Templates | None = None
) -> tuple[OpenCLIPModel, Callable, PromptTokenizer]:
    """A HyperCLIP as open_clip's (model, preprocess, tokenizer), adapted to one task.

    Args:
        model: in eval mode.
        class_names: the task; a name may come twice, as in ImageNet's; None: the base row, adapted to nothing.
        templates: prompts: strings with one "{}" or "{c}" or functions of a name, or a mapping of each name to its
            prompts; None: the model's own.

    Raises:
        ValueError: for no class names, a template without a place for the name, a name without prompts, or a model
            whose preprocessing open_clip does not have.
        ImportError: where open_clip is missing.
    """
    transform = require("open_clip.transform", "clip")
    params = model.image.base_params
    if class_names is not None:
        params = model.rows(prompt_features(model, class_names, templates)[None])
    adapter = OpenCLIPModel(model, params).eval()
    preprocess = transform.PreprocessCfg(**model.preprocessing.open_clip_config())
    require("open_clip.model", "clip").set_model_preprocess_cfg(adapter, asdict(preprocess))
    return adapter, transform.image_transform_v2(preprocess, is_train=False), PromptTokenizer(model.text_tower)


def prompt_features(model: HyperCLIP, class_names: Sequence[str], templates: Templates | None) -> Tensor:
    """What the hypernetwork reads (K, E_text): each class's prompts, averaged as the text tower averages its own."""
    check_class_names(class_names)
    if templates is None:
        return model.text_features(class_names)
    return average_prompt_lists(model, [_prompts(name, templates) for name in class_names])


def average_prompt_lists(model: HyperCLIP, prompts: Sequence[Sequence[str]]) -> Tensor:
    """The prompts of K classes to (K, E_text), averaged as the text tower averages its own."""
    embeddings = model.text_tower.encode_prompts([prompt for each in prompts for prompt in each])
    averaged = [average_prompts(part) for part in embeddings.split([len(each) for each in prompts])]
    return torch.stack(averaged).to(model.logit_scale.dtype)


def _prompts(name: str, templates: Templates) -> list[str]:
    """Every prompt of one class."""
    if isinstance(templates, Mapping):
        prompts = list(templates.get(name, ()))
    else:
        prompts = [_fill(template, name) for template in templates]
    if isinstance(templates, str) or not prompts:
        raise ValueError(f"templates must give {name!r} a list of prompts, got {templates!r}")
    return prompts


def _fill(template: Template, name: str) -> str:
    if callable(template):
        return template(name)
    if template.count("{}") + template.count("{c}") != 1:
        raise ValueError(f"templates must be strings with one {{}} or {{c}} each, got {template!r}")
    return template.replace("{c}", "{}").replace("{}", name)
