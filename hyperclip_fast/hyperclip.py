"""HyperCLIP: text tower + hypernetwork + image encoder, trained end to end with SigLIP's loss (arXiv 2412.16777).

    class names -> text features (T, K, E_text) -> hypernetwork -> rows -> encoder(images, rows) -> (B, E)
                                    '-> projection -> class embeddings (T, K, E) -> similarity within each task

The hypernetwork reads the text features before projection. The base row is the encoder's own norm weights, live: they
train through the rows, and there is one copy of them.
"""

import contextlib
import inspect
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import (
    ModelCard,
    PyTorchModelHubMixin,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, http_backoff
from safetensors import SafetensorError
from torch import Tensor, nn

from hyperclip_fast.batch_norm_folding import fuse_batch_norms
from hyperclip_fast.data.image_files import check_images, load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.encoders import create_encoder
from hyperclip_fast.hyper_encoder import HyperEncoder
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.hyperclip_config import HyperCLIPConfig, config_from_dict
from hyperclip_fast.hypernetwork import HyperNetwork, pad_classes
from hyperclip_fast.model_card import ModelFacts, model_card
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.pretrained.class_texts import ClassTexts
from hyperclip_fast.pretrained.classifier import classifier_parts
from hyperclip_fast.pretrained.open_clip import open_clip_parts
from hyperclip_fast.pretrained.parts import Parts
from hyperclip_fast.pretrained.timm import timm_parts
from hyperclip_fast.pretrained.transformers import transformers_parts
from hyperclip_fast.text import TextTower, create_text_tower, load_text_tower, weights_sha256
from hyperclip_fast.text.head import create_text_head
from hyperclip_fast.utils.class_names import check_class_lists, check_task
from hyperclip_fast.utils.files import save_safetensors, write_file, written_folder

DEMO = "demo"  # the name of the checkpoint that this package ships
TEXT_FOLDER = "text"  # in a model's folder
DEMO_MODEL = Path(__file__).with_name("assets") / "demo"
MODEL_SUFFIXES = (".bin", ".ckpt", ".json", ".pt", ".pth", ".safetensors", ".yaml")  # of files; no hub id ends so
WANTED = f'a folder with config.json and model.safetensors, a hub id "owner/name", or "{DEMO}"'


class HyperCLIP(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="hyperclip_fast",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2412.16777",
    tags=["zero-shot-image-classification", "hyperclip"],
):
    """A small image encoder that adapts to a task given only the task's class names.

    `from_pretrained`, `save_pretrained` and `push_to_hub` write and read safetensors and config.json.

    Args:
        config: see HyperCLIPConfig; a mapping of its fields will do. The model keeps a copy.
        own_text: a text tower in place of the one that the config names.
    """

    def __init__(self, config: HyperCLIPConfig | dict[str, Any], own_text: TextTower | None = None):
        super().__init__()
        config = config_from_dict(config) if isinstance(config, dict) else replace(config)
        self.config = config
        self.image = create_encoder(config.image_tower, False, config.modulate, **config.timm_kwargs())
        if config.freeze_statistics and isinstance(self.image, HyperEncoder):
            self.image.freeze_statistics()
        self._include_text: bool | None = None
        self._frozen_text: list[TextTower] = []  # a list, so that it is no submodule: neither saved nor trained
        self._text_folder: Path | None = None  # where a frozen one was saved
        self._own_text = own_text is not None  # and its name does not lead to it
        if own_text is not None:
            own_text.set_templates(config.templates)
            own_text.freeze(not config.train_text)
        self.text = (own_text or self._create_text_tower()) if config.train_text else None
        if own_text is not None and not config.train_text:
            self._frozen_text.append(own_text)
        if self.text is None and config.text_sha256 is None and (own_text is not None or config.text_dim is None):
            config.text_sha256 = weights_sha256(self.text_tower)  # of a new model; older ones on disk have none
        if config.text_dim is None:
            config.text_dim = self.text_tower.dim
        self.text_projection = create_text_head(
            config.text_head, config.text_dim, config.embed_dim, config.text_anchors, config.text_gamma
        )
        self.hypernetwork = self._create_hypernetwork(config.text_dim) if config.conditioned else None
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))

    @classmethod
    def from_open_clip(
        cls,
        model: str | nn.Module,
        pretrained: str | None = None,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> "HyperCLIP":
        """An open_clip model under a new hypernetwork, in eval mode.

        The new hypernetwork writes the base row, so embeddings and logits are open_clip's until it is trained.

        Args:
            model: one of `open_clip.list_models()`, or hf-hub:<hub id>, or local-dir:<folder>; or such a model.
            pretrained: tag, or a checkpoint file; None: random weights.
            name: which of `open_clip.list_models()` a model is; None: found by its text tower.
            config: fields of HyperCLIPConfig that shall differ, such as hyper_width, modulate or train_text.

        Raises:
            ValueError: for an unknown model or tag, an image tower that timm does not have, or a config that does not
                go with the weights.
        """
        return cls.from_parts(open_clip_parts(model, pretrained, name), config)

    @classmethod
    def from_timm(
        cls,
        image: str,
        text: str = "minilm",
        *,
        weights: str | bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> "HyperCLIP":
        """A timm model with its weights, beside any text tower, in eval mode; the projections of both are new.

        Args:
            image: timm's name, such as efficientnet_b0.ra_in1k.
            text: a text tower's name, see `text.create_text_tower`.
            weights: True: what timm has under the name; a file or "pip:<package>": those; False: random ones.
            config: fields of HyperCLIPConfig that shall differ, such as embed_dim.

        Raises:
            ValueError: for an unknown name, or weights or a config that do not fit.
        """
        sizes = {"embed_dim": config["embed_dim"]} if config and "embed_dim" in config else {}
        return cls.from_parts(timm_parts(image, text, weights, **sizes), config)

    @classmethod
    def from_transformers(cls, source: str | Path, *, config: Mapping[str, Any] | None = None) -> "HyperCLIP":
        """A CLIP or SigLIP of transformers under a new hypernetwork, in eval mode; see `from_open_clip`.

        Args:
            source: hub id, or a folder with the model, its tokenizer and its image processor.
            config: fields of HyperCLIPConfig that shall differ.

        Raises:
            ValueError: for another model, or a config that does not go with the weights.
        """
        return cls.from_parts(transformers_parts(source), config)

    @classmethod
    def from_classifier(
        cls,
        classifier: str,
        text: str = "minilm",
        *,
        weights: str | bool = True,
        texts: Sequence[ClassTexts] | None = None,
        wordnet: str | Path | None = None,
        ridge: float = 1.0,
        config: Mapping[str, Any] | None = None,
    ) -> "HyperCLIP":
        """A zero-shot model from a timm classifier and the names of its classes, in closed form; see `fit_classifier`.

        Its hypernetwork is new: every task has the base row until it is trained.

        Args:
            classifier: a timm name, with a pretrained tag if wished.
            text: a text tower's name, see `text.create_text_tower`.
            weights: as `from_timm`.
            texts: what its classes are called; None: ImageNet's lemmas and definitions, which timm has.
            wordnet: folder of WordNet 3.0, whose hypernyms are added to ImageNet's classes.
            ridge: of the regression.
            config: fields of HyperCLIPConfig that shall differ, such as embed_dim, text_gamma or templates.

        Raises:
            ValueError: for weights that do not fit, classes without texts, or a classifier that is not one Linear.
        """
        config = config or {}
        tower = create_text_tower(text, trainable=False, templates=config.get("templates", ()))
        names = {"embed_dim": "embed_dim", "text_gamma": "gamma"}
        sizes = {name: config[key] for key, name in names.items() if key in config}
        parts = classifier_parts(classifier, tower, weights, texts, wordnet, ridge, **sizes)
        return cls.from_parts(replace(parts, fields={"text_tower": text, **parts.fields}), config)

    @classmethod
    def from_parts(cls, parts: Parts, config: Mapping[str, Any] | None = None) -> "HyperCLIP":
        """The parts of pretrained models, see `hyperclip_fast.pretrained`, under a new hypernetwork, in eval mode."""
        changes, named = dict(config or {}), parts.fields["text_tower"]
        if parts.text is not None and changes.get("text_tower", named) != named:
            raise ValueError(f"config's text_tower must be {named}, which was taken over, got {changes['text_tower']}")
        start = {"freeze_statistics": True, **parts.image.fields, **parts.fields}
        if "image_kwargs" in changes:
            changes["image_kwargs"] = {**start.get("image_kwargs", {}), **changes["image_kwargs"]}
        for key, value in (("init_logit_scale", parts.logit_scale), ("init_logit_bias", parts.logit_bias)):
            if value is not None:
                start[key] = value
        made = cls(config_from_dict({**start, **changes}), parts.text)
        made._own_text = not parts.text_is_named
        try:
            made.image.load_state_dict(parts.image.state)
            if parts.text_head:
                made.text_projection.load_state_dict(parts.text_head)
        except RuntimeError as error:
            raise ValueError(f"config must go with the pretrained weights, got {changes}: {error}") from error
        return made.eval()

    def _create_text_tower(self) -> TextTower:
        config = self.config
        options: dict[str, Any] = {"trainable": config.train_text, "templates": config.templates}
        if self._text_folder is not None:
            tower = load_text_tower(config.text_tower, self._text_folder, **options)
        else:
            tower = create_text_tower(config.text_tower, **options)
        sha256 = None if config.train_text else config.text_sha256
        if sha256 is not None and (got := weights_sha256(tower)) != sha256:
            wanted = f"the weights that the model was made with, of SHA-256 {sha256}"
            kept = "save_pretrained(..., include_text=True) keeps them with the model"
            raise ValueError(f"text_tower must have {wanted}, got {got} from {config.text_tower}; {kept}")
        if config.text_dim not in (None, tower.dim):
            raise ValueError(f"text_dim must be {tower.dim}, as {config.text_tower} has it, got {config.text_dim}")
        return tower

    def take_text_from(self, other: "HyperCLIP") -> None:
        """Have the frozen text tower of another model, wherever that comes from; where both name the same."""
        if self.text is None and self.config.text_tower == other.config.text_tower:
            self._text_folder, self._own_text = other._text_folder, other._own_text
            self._frozen_text = other._frozen_text

    def _create_hypernetwork(self, text_dim: int) -> HyperNetwork:
        config = self.config
        return HyperNetwork(
            self.image.norm_spec,
            text_dim=text_dim,
            width=config.hyper_width,
            depth=config.hyper_depth,
            num_heads=config.hyper_heads,
            pool=config.hyper_pool,
            bottleneck=config.hyper_bottleneck,
            learned_tokens=config.learned_tokens,
        )

    def save_pretrained(self, save_directory: str | Path, *, include_text: bool | None = None, **options: Any) -> Any:
        """Write config.json, model.safetensors and README.md into a folder.

        Args:
            save_directory: the folder.
            include_text: also keep the frozen text tower and its tokenizer, in text/, so that the folder works offline;
                None: where the tower's name does not lead to its weights.
            **options: as huggingface_hub's mixin takes them: repo_id, push_to_hub, model_card_kwargs, ...
        """
        self._include_text = include_text
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        is_kept = self._own_text if self._include_text is None else self._include_text
        if is_kept:
            with written_folder(save_directory / TEXT_FOLDER, replace=True) as folder:
                self.text_tower.save(folder)
        save_safetensors(self.state_dict(), save_directory / "model.safetensors", {"format": "pt"})
        write_file(save_directory / "config.json", replace(self.config, text_included=is_kept).to_json())
        write_file(save_directory / "preprocessor_config.json", self.preprocessing.to_json())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "HyperCLIP":
        """A saved model.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, a hub id "owner/name", or "demo", the
                checkpoint that this package ships ("./demo" is a folder of that name).
            **options: as huggingface_hub's mixin takes them: revision, token, cache_dir, local_files_only, ...

        Raises:
            ValueError: for a folder that is not there, or not whole, or a hub that cannot be reached.
        """
        place = _find_model(pretrained_model_name_or_path)
        if not Path(place).is_dir() and not options.get("local_files_only"):
            options["local_files_only"] = not _hub_answers(str(place), options)
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints there, where JSON may follow
            try:
                return super().from_pretrained(place, **options)
            except FileNotFoundError as error:
                lacking = "which is no folder nor in the hub's cache, and the hub was not asked or did not answer"
                raise ValueError(f"model must be {WANTED}, got {place}, {lacking}") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **options: Any) -> "HyperCLIP":
        if "config" not in options:
            raise ValueError(f"model must be a folder with config.json, or a hub id, got {model_id}")
        config = config_from_dict(options["config"])
        folder = _text_folder(model_id, options) if config.text_included else None
        if folder is not None and config.train_text:
            options["own_text"] = load_text_tower(config.text_tower, folder)
        model = super()._from_pretrained(model_id=model_id, strict=strict, **options)
        model._text_folder, model._own_text = folder, folder is not None
        return model

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        try:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        except (FileNotFoundError, RuntimeError, SafetensorError) as error:
            folder = Path(model_file).parent
            raise ValueError(f"model must hold the weights that its config.json asks for, {folder}: {error}") from error

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ValueError(f"model must hold model.safetensors, got {model_file}, which is not loaded")

    def generate_model_card(self, **about: Any) -> ModelCard:
        """README.md of `save_pretrained` and `push_to_hub`, whose `model_card_kwargs` come here: see `model_card`."""
        config, spec = self.config, self.image.norm_spec
        facts = ModelFacts(
            image_tower=config.image_tower,
            image_size=self.image_size,
            row_size=spec.num_params,
            norm_layers=len(spec.names),
            text_tower=config.text_tower,
            text_is_trained=config.train_text,
            templates=config.templates,
            embed_dim=config.embed_dim,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
        )
        return model_card(facts, **about)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.image.parameters()).device

    @property
    def image_size(self) -> int:
        """S: the side of the images it takes, in pixels."""
        cfg: Any = self.image.pretrained_cfg
        return self.config.img_size or cfg["input_size"][-1]

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the images that it takes."""
        return self.config.preprocessing(self.image_size)

    @property
    def text_tower(self) -> TextTower:
        """The text tower; a frozen one is built here, at its first use, and follows the model to its device."""
        if self.text is not None:
            return self.text
        with torch.inference_mode(False):  # what is built in inference mode could not be moved outside it
            if not self._frozen_text:
                self._frozen_text.append(self._create_text_tower())
            return self._frozen_text[0].to(self.device)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts to features (K, E_text) in the model's dtype, before projection: what the hypernetwork reads."""
        return self.text_tower.encode(texts).to(self.logit_scale.dtype)

    def project_text(self, text_features: Tensor) -> Tensor:
        """Text features (..., E_text) to class embeddings (..., E) of length 1."""
        projected = self.text_projection(text_features)
        eps = max(1e-12, torch.finfo(projected.dtype).tiny)  # padding is 0, and the default is 0 in float16
        return F.normalize(projected, dim=-1, eps=eps)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Class names to class embeddings (K, E) of length 1: the classifier's weights."""
        return self.project_text(self.text_features(texts))

    def encode_image(self, images: Tensor, params: NormParams | None = None) -> Tensor:
        """Images (B, 3, S, S) to embeddings (B, E) of length 1; each with its own row where `params` is given."""
        return F.normalize(self.image(images, params), dim=-1)

    def preprocess(self, images: Any) -> Tensor:
        """A picture as the model takes it: (3, S, S) on its device, in its dtype; or a list of them, (B, 3, S, S).

        Args:
            images: a file's path, its content as bytes, or a Pillow image; or a list of such.

        Raises:
            ValueError: for what is no whole picture, or an empty list.
        """
        if isinstance(images, (list, tuple)):
            if not images:
                raise ValueError("images must hold at least one picture, got none")
            return torch.stack([self.preprocess(image) for image in images])
        return load_image(images, self.preprocessing).to(self.device, self.logit_scale.dtype)

    def check_images(self, images: object) -> None:
        """Raise ValueError unless these are images (B, 3, S, S) as `preprocess` makes them."""
        check_images(images, self.preprocessing, fixed_size=isinstance(self.image, HyperViT))

    def predict(self, images: Any, labels: Sequence[str] | Sequence[Sequence[str]]) -> list[str]:
        """The best class name of each picture; arguments as `predict_proba`."""
        tasks, _ = _tasks_of(labels)
        best = self.predict_proba(images, labels).argmax(-1).tolist()
        return [names[place] for names, place in zip(tasks if len(tasks) == len(best) else tasks * len(best), best)]

    @torch.no_grad()
    def predict_proba(self, images: Any, labels: Sequence[str] | Sequence[Sequence[str]]) -> Tensor:
        """Classify pictures by class names alone, in one forward pass; the model must be in eval mode.

        `TaskBank` keeps what this makes of the names, and is the faster way to ask again.

        Args:
            images: B of them, as `preprocess` takes or makes them.
            labels: class names for all, or a list of class names for each picture.

        Returns:
            (B, K) probabilities, column k that of a picture's label k; 0 beyond the labels of one that has fewer.

        Raises:
            ValueError: for bad pictures, or labels that `check_task` refuses, or of another number.
        """
        tasks, is_one = _tasks_of(labels)
        if not isinstance(images, Tensor):
            images = self.preprocess(images if isinstance(images, (list, tuple)) else [images])
        self.check_images(images)
        if not is_one and len(tasks) != len(images):
            raise ValueError(f"labels must be lists for each of {len(images)} images, got {len(tasks)}")
        unique = {task: place for place, task in enumerate(dict.fromkeys(tasks))}
        ids = torch.tensor([unique[task] for task in tasks], device=self.device).expand(len(images))
        out = self(images, list(unique), ids)
        scores = torch.einsum("be,bke->bk", out["image_features"], out["text_features"][ids])
        logits = out["logit_scale"] * scores + out["logit_bias"]
        return logits.masked_fill(~out["mask"][ids], -torch.inf).softmax(-1)

    def stack_tasks(self, tasks: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Class names of T tasks to text features (T, K, E_text) and mask (T, K); every text is encoded once.

        Raises:
            ValueError: if there is no task, or class names that `check_class_lists` refuses; one may come twice.
        """
        check_class_lists(tasks)
        unique = {text: i for i, text in enumerate(dict.fromkeys(chain.from_iterable(tasks)))}
        features = self.text_features(list(unique))
        return pad_classes([features[[unique[text] for text in task]] for task in tasks])

    def rows(self, text_features: Tensor, mask: Tensor | None = None) -> NormParams:
        """Text features (T, K, E_text) and mask (T, K) to one row a task; the base row for all where unconditioned."""
        base = self.image.base_params
        if self.hypernetwork is None:
            return NormParams(base.spec, base.table.expand(len(text_features), -1))
        return self.hypernetwork(text_features, mask, base)

    def adapt(self, tasks: Sequence[Sequence[str]]) -> NormParams:
        """One row for each list of class names: one pass of text tower and hypernetwork, no training.

        Raises:
            ValueError: as `stack_tasks`.
        """
        return self.rows(*self.stack_tasks(tasks))

    @torch.no_grad()
    def specialize(self, class_names: Sequence[str], fuse: bool = False, images: Tensor | None = None) -> nn.Module:
        """A plain timm model, in eval mode, that holds this task's row; its output is the (B, E) image embedding.

        Score it against `encode_text(class_names)`.

        Args:
            class_names: the task.
            fuse: fold each BatchNorm into the convolution before it; the state dict is no longer timm's.
            images: (B, 3, S, S) unlabelled images of the task whose statistics its BatchNorms shall use.

        Raises:
            ValueError: for class names that `check_task` refuses, or images for an encoder without BatchNorm.
        """
        check_task(class_names)
        params = self.adapt([class_names])
        if images is not None:
            params = self._encoder_with_statistics().reestimate(images, params)
        model = self.stock_model(params)
        image = next(model.parameters()).new_zeros(1, 3, self.image_size, self.image_size)
        return fuse_batch_norms(model, image) if fuse else model

    def _encoder_with_statistics(self) -> HyperEncoder:
        if not isinstance(self.image, HyperEncoder):
            raise ValueError(f"images must be None: {self.config.image_tower} has no BatchNorm to re-estimate")
        return self.image

    @torch.no_grad()
    def stock_model(self, params: NormParams, task: int = 0) -> nn.Module:
        """A plain timm model, in eval mode, that holds row `task` of `params`, wherever that comes from."""
        model = timm.create_model(self.config.image_tower.removeprefix("hyper_"), **self.config.timm_kwargs())
        model = model.to(self.device, self.logit_scale.dtype).eval()
        model.load_state_dict({**self.image.state_dict(), **params.state_dict(task)})
        return model

    def forward(
        self,
        images: Tensor,
        classes: Sequence[Sequence[str]] | Tensor,
        task_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embed a mixed batch and the classes of its tasks.

        Args:
            images: (B, 3, S, S).
            classes: class names of T tasks, or their text features (T, K, E_text).
            task_ids: (B,) task of each image; None: one task for all, or image b in task b.
            mask: (T, K) bool, for text features with padding.

        Returns:
            image_features (B, E) and text_features (T, K, E) of length 1, mask (T, K), logit_scale (the factor, not its
            logarithm) and logit_bias.
        """
        if not isinstance(classes, Tensor):
            classes, mask = self.stack_tasks(classes)
        params = self.rows(classes, mask)
        if task_ids is not None:
            params = params[task_ids]
        return {
            "image_features": self.encode_image(images, params),
            "text_features": self.project_text(classes),
            "mask": torch.ones(classes.shape[:2], dtype=torch.bool, device=classes.device) if mask is None else mask,
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def _tasks_of(labels: Sequence[str] | Sequence[Sequence[str]]) -> tuple[list[tuple[str, ...]], bool]:
    """Tasks, and whether it is one for all pictures."""
    is_one = not isinstance(labels, str) and any(isinstance(label, str) for label in labels)
    tasks: Sequence[Any] = [labels] if is_one or isinstance(labels, str) or not len(labels) else labels
    for task in tasks:
        check_task(task)
    return [tuple(task) for task in tasks], is_one


def load_model(path: str | Path | None = None, device: str | torch.device = "cpu") -> HyperCLIP:
    """A HyperCLIP in eval mode; None: the demo checkpoint of this package.

    Args:
        path: as `HyperCLIP.from_pretrained` takes it.
        device: where to run.

    Raises:
        ValueError: for a folder without a whole model, or an id that the hub does not have.
    """
    try:
        return HyperCLIP.from_pretrained(DEMO if path is None else path).to(device).eval()
    except (OSError, HFValidationError) as error:
        raise ValueError(f"model must be {WANTED}, got {path}: {error}") from error


def load_model_config(path: str | Path) -> HyperCLIPConfig:
    """The configuration of a saved model alone; arguments and errors as `load_model`."""
    place = _find_model(path)
    try:
        file = Path(place) / "config.json" if Path(place).is_dir() else hf_hub_download(str(place), "config.json")
        return config_from_dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"model must be {WANTED}, got {path}: {error}") from error


def _find_model(place: str | Path) -> str | Path:
    """The shipped model's folder for its name, an existing folder as it is, and otherwise only what may be a hub id.

    The hub would be asked again and again for a folder's name that was mistyped.
    """
    if str(place) == DEMO:
        return DEMO_MODEL
    owner, *rest = str(place).split("/")
    is_hub_id = isinstance(place, str) and len(rest) == 1 and re.fullmatch(r"[\w-][\w.-]*", owner) and rest[0]
    if is_hub_id and (Path(owner).is_dir() or Path(place).suffix in MODEL_SUFFIXES):
        is_hub_id = False
    if not str(place) or not (Path(place).is_dir() or is_hub_id):
        raise ValueError(f"model must be {WANTED}, got {str(place) or 'nothing'}, which is no folder")
    return place


def _text_folder(model_id: str, options: dict[str, Any]) -> Path:
    """Where a model's own text tower lies, from the hub if need be."""
    if Path(model_id).is_dir():
        return Path(model_id) / TEXT_FOLDER
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    taken = {name: options[name] for name in names if options.get(name) is not None}
    return Path(snapshot_download(model_id, allow_patterns=f"{TEXT_FOLDER}/*", **taken)) / TEXT_FOLDER


def _hub_answers(repo: str, options: dict[str, Any]) -> bool:
    """Whether the hub answers, whatever it says; asked once, for the hub's own loader tries for 23 seconds."""
    unreachable = inspect.signature(http_backoff).parameters["retry_on_exceptions"].default  # as its HTTP client has it
    url = hf_hub_url(repo, "config.json", revision=options.get("revision"))
    try:
        get_hf_file_metadata(url, token=options.get("token"))
    except (OfflineModeIsEnabled, *unreachable):
        return False
    except HfHubHTTPError:
        return True
    return True
