"""Text towers behind one small interface: `encode(texts) -> (K, dim)`, frozen or trainable, with prompt templates.

minilm                                   all-MiniLM-L6-v2, installed by pip, offline
hf:<hub id or folder>                    any transformers or sentence-transformers encoder, mean pooling; of a CLIP
                                         or SigLIP its text half, as its `get_text_features`
open_clip:<model>[/<pretrained>]         the text tower of an open_clip model
transformer[:width=256,depth=4,...]      CLIP's text transformer, from scratch
"""

from hyperclip_fast.text.create import create_text_tower, load_text_tower
from hyperclip_fast.text.hf_tower import HFTextTower, minilm_folder
from hyperclip_fast.text.open_clip_tower import OpenCLIPTextTower
from hyperclip_fast.text.scratch_tower import ScratchTextTower, TextTransformerConfig
from hyperclip_fast.text.tower import TextTower, average_prompts, weights_sha256

__all__ = [
    "HFTextTower",
    "OpenCLIPTextTower",
    "ScratchTextTower",
    "TextTower",
    "TextTransformerConfig",
    "average_prompts",
    "create_text_tower",
    "load_text_tower",
    "minilm_folder",
    "weights_sha256",
]
