"""Pretrained models of other libraries, taken apart into what a HyperCLIP is made of.

`HyperCLIP.from_open_clip`, `from_timm`, `from_transformers` and `from_classifier` put the parts together.
"""
