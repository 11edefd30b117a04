"""Embeddings of many images under many tasks, in files."""

from hyperclip_fast.embed.embedder import EmbedConfig, Embedder, part_path
from hyperclip_fast.embed.run import embed, read_manifest

__all__ = ["EmbedConfig", "Embedder", "embed", "part_path", "read_manifest"]
