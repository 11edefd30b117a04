"""The undocumented interfaces of PyTorch that the kernels use, in one place: why each is needed, what replaces it."""

import torch

# Whether torch.func (vmap, grad, jvp) looks on: it refuses writes into tensors that it wraps, and autograd.Functions
# without a rule for it. No public function tells; one in torch.func would replace this.
is_functorch_active = torch._C._are_functorch_transforms_active

# F.layer_norm that also returns mean and rstd, and its gradient from them. F.layer_norm keeps them for itself; without
# these the mixed layer norm computes both again in its backward.
native_layer_norm = torch.native_layer_norm
native_layer_norm_backward = torch.ops.aten.native_layer_norm_backward

# The gradient of F.batch_norm: the only vectorised pass of a CPU that sums grad and grad * xhat by channel at once.
# torch.autograd.grad of F.batch_norm replaces it, with another read of x and d x that nobody wants.
native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward

# Mean and biased variance by channel in one pass, vectorised where channels are innermost. torch.var_mean replaces it,
# in two passes over a copy.
batch_norm_update_stats = torch.batch_norm_update_stats

# A view that autograd does not know for one, so that the next step may write over it. Tensor.view replaces it where
# nobody does.
unsafe_view = torch.ops.aten._unsafe_view

# GELU that overwrites its input. F.gelu replaces it at the price of another tensor: it has no `inplace`.
gelu_ = torch.ops.aten.gelu_
