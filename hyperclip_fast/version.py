"""The version of this package, which setup.py reads here, and its name in files."""

__version__ = "0.1.0"
MODEL_TYPE = "hyperclip_fast"  # in a model's config.json; transformers knows it by that
