"""Pretrained models of other libraries, taken apart into what a HyperCLIP is made of.

`HyperCLIP.from_open_clip`, `from_timm` and `from_transformers` put the parts together.
"""
