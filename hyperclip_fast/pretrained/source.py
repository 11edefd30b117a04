"""Pretrained models by one name, with the library before it."""

from hyperclip_fast.pretrained.open_clip import open_clip_parts
from hyperclip_fast.pretrained.parts import Parts
from hyperclip_fast.pretrained.timm import timm_parts
from hyperclip_fast.pretrained.transformers import transformers_parts

FORMS = "open_clip:<model>[/<tag or file>], timm:<model> or transformers:<hub id or folder>"


def parts_of(source: str, text: str = "minilm", weights: str | bool = True, embed_dim: int = 256) -> Parts:
    """What a HyperCLIP takes over of a model; `HyperCLIP.from_parts` puts it together.

    Args:
        source: one of FORMS.
        text: the text tower beside a timm model.
        weights: of a timm model, see `timm_parts`.
        embed_dim: E, beside a timm model.

    Raises:
        ValueError: for another source, or what the library refuses.
    """
    library, _, name = source.partition(":")
    if library == "open_clip" and name:
        model, _, tag = (name, "", "") if ":" in name else name.partition("/")
        return open_clip_parts(model, tag or None)
    if library == "timm" and name:
        return timm_parts(name, text, weights, embed_dim)
    if library == "transformers" and name:
        return transformers_parts(name)
    raise ValueError(f"source must be {FORMS}, got {source!r}")
