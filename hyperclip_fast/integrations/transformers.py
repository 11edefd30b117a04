"""transformers knows a HyperCLIP's folder by the model_type in its config.json, so that its pipeline takes the folder.

    pipeline("zero-shot-image-classification", model=folder)

This module is imported with transformers' AutoConfig, and light. Whoever reads a HyperCLIP's config.json by AutoConfig,
as all of transformers' Auto classes do first, has the model, tokenizer and image processor registered
(transformers_model.py), which import transformers' heavy parts.
"""

import importlib
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig  # so called in transformers 4, too

from hyperclip_fast.version import MODEL_TYPE


class HyperCLIPModelConfig(PretrainedConfig):
    """config.json as transformers reads it: the fields of HyperCLIPConfig as attributes."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, which AutoConfig calls.

        Raises:
            ImportError: for transformers before 5.
        """
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"transformers must be 5 or newer to read a HyperCLIP, got {transformers.__version__}")
        importlib.import_module("hyperclip_fast.integrations.transformers_model").register()
        return super().from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, HyperCLIPModelConfig, exist_ok=True)
