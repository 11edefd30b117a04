"""Embeddings of many images under many tasks, in files."""

from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import lazy_names

if TYPE_CHECKING:
    from hyperclip_fast.embed.embedder import EmbedConfig, Embedder, part_path
    from hyperclip_fast.embed.run import embed, read_manifest

__all__ = ["EmbedConfig", "Embedder", "embed", "part_path", "read_manifest"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "embedder": (
            "EmbedConfig",
            "Embedder",
            "part_path",
        ),
        "run": (
            "embed",
            "read_manifest",
        ),
    },
)
