"""HyperViT: timm's VisionTransformer in which every sample brings its own normalisation weights.

Modules, their names and the state dict are timm's own: a timm model becomes a HyperViT by a change of class. Rows
travel as arguments through every block (hyper_block.py), never as state of the model.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from einops import rearrange
from timm.models import VisionTransformer, checkpoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyperclip_fast.block_parts import MODULATED_NORMS
from hyperclip_fast.hyper_block import HyperBlock, add_norm, is_autocast
from hyperclip_fast.kernels.common.rows import Rows
from hyperclip_fast.kernels.dispatch import use_triton
from hyperclip_fast.norm_params import DEFAULT_MODULATE, NormParams, NormSpec, check_params
from hyperclip_fast.utils.private_api import FeatureGetterNet, add_positions, feature_take_indices, has_hooks
from hyperclip_fast.utils.timm_models import create_timm_model

NO_ROWS = (None, None, None)  # in the place of Rows: the module's own weight and bias


class HyperViT(VisionTransformer):
    """timm's VisionTransformer whose forward also takes NormParams: a row of norm weights for each sample.

    Takes timm's arguments (block_fn defaults to HyperBlock); `from_timm` takes a timm name or model. `modulate`, the
    name patterns of the generated layers, is set by `from_timm` or `set_modulate`.
    """

    def __init__(self, *args: Any, block_fn: type[nn.Module] = HyperBlock, **kwargs: Any):
        super().__init__(*args, **{"block_fn": block_fn, **kwargs})
        to_hyper_vit(self, DEFAULT_MODULATE)

    @classmethod
    def from_timm(
        cls,
        model: str | VisionTransformer,
        pretrained: bool = False,
        modulate: Iterable[str] = DEFAULT_MODULATE,
        **kwargs: Any,
    ) -> "HyperViT":
        """A HyperViT with the modules and weights of a timm VisionTransformer.

        Args:
            model: a timm model name (with a pretrained tag, if wished) or a VisionTransformer, which is copied.
            pretrained: load timm's pretrained weights (for a name).
            modulate: fnmatch patterns: which norm layers are generated.
            **kwargs: passed to timm.create_model, such as num_classes, img_size, drop_path_rate.

        Raises:
            ValueError: for a name that timm does not know, a model that is no VisionTransformer, blocks other than
                timm's Block, or norms other than LayerNorm among the modulated.
        """
        return to_hyper_vit(create_timm_model(model, pretrained, kwargs), modulate)

    def set_modulate(self, modulate: Iterable[str]) -> None:
        """Choose the generated layers by name pattern: any of norm_pre, blocks.*.norm1, blocks.*.norm2, norm, fc_norm.

        Raises:
            ValueError: if a pattern matches a layer that cannot be modulated, or none matches.
        """
        spec = NormSpec.from_model(self, modulate)
        able = {"norm_pre", "norm", "fc_norm"}
        able |= {f"blocks.{i}.{norm}" for i in range(len(self.blocks)) for norm in ("norm1", "norm2")}
        for name in spec.names:
            if name not in able or type(self.get_submodule(name)) not in MODULATED_NORMS:
                kind = type(self.get_submodule(name)).__name__
                raise ValueError(f"modulate: {name} ({kind}) is not a LayerNorm that HyperViT can modulate")
        self._spec, self._is_pruned = spec, False

    @property
    def norm_spec(self) -> NormSpec:
        """The generated layers: names, widths, offsets; `norm_spec.num_params` is P."""
        return self._spec

    @property
    def base_params(self) -> NormParams:
        """The encoder's own weights and biases as one row; gradients flow into them."""
        row = torch.cat([attrgetter(key)(self) for key in self.norm_spec.keys])  # functional_call puts tensors there
        return NormParams(self.norm_spec, row.unsqueeze(0))

    def _rows(self, x: Tensor, params: NormParams | None) -> dict[str, Rows]:
        """Rows by layer name; the reference path gathers each sample's row here, once."""
        if params is None:
            return {}
        check_params(params, self._spec, x.shape[0], self._fits)
        if self._spec == params.spec:
            params = NormParams(self._spec, params.table, params.task_ids)
        if not use_triton(x):
            params = params.gather()
        elif params.table.dtype != x.dtype or is_autocast(x):
            params = params.to(dtype=torch.float32)  # the kernels take rows of the stream's dtype, or float32
        layers = zip(params.spec.names, params.layers())
        return {name: Rows(weight, bias, params.task_ids) for name, (weight, bias) in layers if bias is not None}

    def _fits(self, spec: NormSpec) -> bool:
        """Whether rows of another spec serve this encoder: once pruned, those of the encoder it came from."""
        return self._is_pruned and set(zip(self._spec.names, self._spec.widths)) <= set(zip(spec.names, spec.widths))

    def _embed(self, x: Tensor, rows: dict[str, Rows]) -> Tensor:
        x = self.patch_drop(add_positions(self, self.patch_embed(x)))
        return add_norm(self.norm_pre, x, None, rows.get("norm_pre"))[0]

    def _run_block(
        self, i, x, delta, rows, attn_mask=None, is_causal=False, tokens=None
    ) -> tuple[Tensor, Tensor | None]:
        weight1, bias1, ids1 = rows.get(f"blocks.{i}.norm1", NO_ROWS)
        weight2, bias2, ids2 = rows.get(f"blocks.{i}.norm2", NO_ROWS)
        pieces = (weight1, bias1, weight2, bias2, ids2 if ids1 is None else ids1)  # why flat: see HyperBlock.forward
        if self.grad_checkpointing and attn_mask is None and not is_causal:
            return checkpoint(self.blocks[i], x, delta, *pieces, tokens)
        return self.blocks[i](x, delta, *pieces, tokens, attn_mask=attn_mask, is_causal=is_causal)

    def _final_norm(self, x, delta, rows) -> Tensor:
        return add_norm(self.norm, x, delta, rows.get("norm"))[0]

    def forward_features(  # type: ignore[override]  # params stand where timm has a mask
        self,
        x: Tensor,
        params: NormParams | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, D), final norm included; `params` gives each sample's norm rows."""
        rows = self._rows(x, params)
        return self._forward_features(x, rows, attn_mask, is_causal)

    def _forward_features(self, x, rows, attn_mask, is_causal, tokens=None) -> Tensor:
        x, delta = self._embed(x, rows), None
        for i in range(len(self.blocks)):
            needed = tokens if i == len(self.blocks) - 1 else None
            x, delta = self._run_block(i, x, delta, rows, attn_mask, is_causal, needed)
        return self._final_norm(x, delta, rows)

    def forward_head(self, x: Tensor, pre_logits: bool = False, params: NormParams | None = None) -> Tensor:
        """Tokens (B, N, D) to pooled features or logits (B, num_classes); `params` matters where fc_norm is used."""
        rows = self._rows(x, params) if "fc_norm" in self.norm_spec.names else {}
        return self._forward_head(x, pre_logits, rows)

    def _forward_head(self, x, pre_logits, rows) -> Tensor:
        x = self.pool(x)
        pooled = x.dim() == 2
        x = x.unsqueeze(1) if pooled else x
        x = add_norm(self.fc_norm, x, None, rows.get("fc_norm"))[0]
        x = self.head_drop(x.squeeze(1) if pooled else x)
        return x if pre_logits else self.head(x)

    def forward(  # type: ignore[override]  # params stand where timm has a mask
        self,
        x: Tensor,
        params: NormParams | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Images (B, C, H, W) to the head's output (B, num_classes), or (B, D) features with num_classes=0.

        Args:
            x: images.
            params: rows for this batch, see NormParams; None: the encoder's own norms, which is the stock model.
            attn_mask: mask of scaled_dot_product_attention.
            is_causal: causal attention.

        Raises:
            ValueError: if `params` belongs to another encoder or another batch size.
        """
        if isinstance(x, torch.fx.Proxy):  # torch.fx makes proxies of all arguments, and follows timm's own model
            return super().forward_head(self._forward_features(x, {}, attn_mask, is_causal))
        rows = self._rows(x, params)
        is_mixed = params is not None and params.num_tasks > 1
        tokens = 1 if is_mixed and attn_mask is None and not is_causal and self._needs_one_token() else None
        x = self._forward_features(x, rows, attn_mask, is_causal, tokens)
        return self._forward_head(x, False, rows)

    def _needs_one_token(self) -> bool:
        """Whether the class token is all that the head reads: the last block may then leave out the others.

        Products of one token round otherwise than those of all, so that only a mixed batch, which no stock model
        computes, is run this way.
        """
        if self.global_pool != "token" or self.attn_pool is not None or not len(self.blocks):
            return False
        is_token_wise = type(self.norm) in (*MODULATED_NORMS, nn.Identity) and not has_hooks(self.norm)
        return is_token_wise and self.blocks[-1].can_narrow()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        params: NormParams | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """timm's `forward_intermediates`, with `params`: features after the chosen blocks, and the final ones.

        Args:
            x: images (B, C, H, W).
            indices: last n blocks if an int, all if None, else these.
            return_prefix_tokens: also return class and register tokens.
            norm: apply the final norm, with each sample's row, to the intermediates.
            stop_early: run no block after the last one chosen.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return only the intermediates.
            output_dict: return a dictionary, with timm's keys.
            attn_mask: mask of scaled_dot_product_attention.
            is_causal: causal attention.
            params: rows for this batch.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}')
        rows = self._rows(x, params)
        take, last = feature_take_indices(len(self.blocks), list(indices) if isinstance(indices, tuple) else indices)
        height, width = x.shape[-2:]
        x, delta, taken = self._embed(x, rows), None, []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x, delta = self._run_block(i, x, delta, rows, attn_mask, is_causal)
            if i in take:
                x, delta = x if delta is None else x + delta, None
                taken.append(self._final_norm(x, None, rows) if norm else x)
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in taken] if self.num_prefix_tokens else None
        taken = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            taken = [rearrange(tokens, "b (h w) d -> b d h w", h=grid[0]).contiguous() for tokens in taken]
        final = None if intermediates_only else self._final_norm(x, delta, rows)
        return _pack(taken, prefix if return_prefix_tokens else None, final, output_dict)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
        params: NormParams | None = None,
    ) -> list[Tensor]:
        """timm's DINO-style interface to `forward_intermediates`, with `params`."""
        return self.forward_intermediates(  # type: ignore[return-value]  # intermediates_only
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
            params=params,
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's pruning of unused layers; rows made for the whole encoder stay valid, their extra layers unused."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.set_modulate(self._spec.modulate)
        self._is_pruned = True
        return take


class HyperFeatures(FeatureGetterNet):
    """timm's features_only wrapper, whose forward passes `params` on."""

    def forward(self, x: Tensor, params: NormParams | None = None) -> list[Tensor]:
        """Images (B, C, H, W) to the list of feature maps, by default (B, D, H', W')."""
        model: Any = self.model
        return model.forward_intermediates(
            x,
            indices=self.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
            params=params,
        )


def _pack(taken, prefix, final, output_dict):
    """timm's return forms of forward_intermediates."""
    if output_dict:
        out = {"image_intermediates": taken}
        if prefix is not None:
            out["image_intermediates_prefix"] = prefix
        if final is not None:
            out["image_features"] = final
        return out
    if prefix is not None:
        taken = list(zip(taken, prefix))
    return taken if final is None else (final, taken)


def to_hyper_vit(model: nn.Module, modulate: Iterable[str]) -> Any:
    """Change the classes of a timm VisionTransformer's parts, in place: modules, names and weights stay.

    Returns:
        The model, now a HyperViT, or HyperFeatures where it is timm's wrapper for `features_only`.
    """
    if isinstance(model, FeatureGetterNet) and isinstance(model.model, VisionTransformer):
        to_hyper_vit(model.model, modulate)._is_pruned = True  # timm has pruned it: rows of the whole encoder fit
        model.__class__ = HyperFeatures
        return model
    if type(model) is not VisionTransformer and not isinstance(model, HyperViT):
        raise ValueError(f"model must be a timm VisionTransformer, got {type(model).__name__}")
    blocks: Any = model.blocks
    for block in blocks:
        if type(block) not in (Block, HyperBlock):
            raise ValueError(
                f"block_fn must be timm's pre-norm Block, got {type(block).__name__}: parallel and post-norm blocks "
                "have no residual add before a norm to fuse"
            )
    for block in blocks:
        block.__class__ = HyperBlock
    if not isinstance(model, HyperViT):
        model.__class__ = HyperViT
    assert isinstance(model, HyperViT)
    model.set_modulate(modulate)
    return model
