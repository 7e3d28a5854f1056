"""The language model's loss without all its logits: head and cross-entropy for a few tokens at a time.

With GPT-2's 50,257 tokens, the logits and their gradients are the peak of a training step's memory. Here each chunk is
kept only until its part of the loss and of the gradients has been computed; nothing is computed twice.

Shapes: N tokens of all sequences together, E emb_dim, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from .decoding import onednn_linear, onednn_may_run, suits_onednn

CHUNK = 256  # tokens whose logits are in memory at once: 51 MB at V = 50257 in float32
CHUNK_ON_GPU = 2048  # on GPUs, products of few rows leave most of the device idle
COMPILED_CHUNK = 1024  # in compiled graphs on the CPU, where a step was faster with it than with fewer
PART = 8192  # rows of the weight whose gradients are in memory at once if their dtype is not the weight's


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes with the tensor: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `x @ weight.T` (N, V) and the targets, ÷ `num_items`.

    The gradients are computed with the loss, while a chunk's logits are in memory; backward scales them.

    Args:
        x: (N, E).
        weight: (V, E).
        targets: (N,), the right tokens; `ignore_index` where there is none.
        num_items: the divisor of the sum, a number or a tensor of one.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, num_items, ignore_index):
        dtype = product_dtype(x)
        chunk = CHUNK if x.device.type == "cpu" else CHUNK_ON_GPU
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(x.device.type, enabled=False):
            x, head = x.to(dtype), weight.to(dtype)
            linear = onednn_linear if suits_onednn(x, head) and onednn_may_run() else F.linear
            for start in range(0, len(x), chunk):
                rows = slice(start, start + chunk)
                logits = linear(x[rows], head).float()  # (chunk, V)
                counted = targets[rows] != ignore_index  # (chunk,)
                target_ids = targets[rows].where(counted, 0)[:, None]  # (chunk, 1)
                log_sums = logits.logsumexp(-1, keepdim=True)  # (chunk, 1)
                losses = (log_sums - logits.gather(1, target_ids))[:, 0]
                loss += losses.where(counted, 0).sum()
                # d loss / d logits = (softmax(logits) - one_hot(target)) / num_items, in the logits' own memory
                grad_logits = logits.sub_(log_sums).exp_()
                grad_logits.scatter_add_(1, target_ids, torch.full_like(log_sums, -1))
                grad_logits = grad_logits.mul_((counted / num_items)[:, None]).to(dtype)
                if grad_x is not None:
                    grad_x[rows] = grad_logits @ head
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.T, x[rows])
                elif grad_weight is not None:  # in parts, since a product in this dtype needs memory of its own
                    for grad, part in zip(grad_weight.split(PART), grad_logits.split(PART, dim=1), strict=True):
                        grad += part.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight)
        return loss / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = ctx.saved_tensors
        # Reading the value would break a compiled graph, and would wait for a GPU.
        if torch.compiler.is_compiling() or grad_loss.device.type != "cpu" or grad_loss != 1:
            grads = [None if grad is None else grad * grad_loss for grad in grads]
        return *grads, None, None, None


def shifted(labels, ignore_index):
    """The target of each token: the next label, and `ignore_index` for the last token."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def head_loss(x, weight, labels, *, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    """`ForCausalLMLoss` of the logits `x @ weight.T`, exact except for the order of summation.

    Args:
        x: (B, T, E).
        weight: (V, E).
        labels: (B, T); or `shift_labels` (B, T), which are already shifted.
        num_items_in_batch: the divisor of the sum; default: the number of labels that are not ignored.
    """
    targets = (shifted(labels, ignore_index) if shift_labels is None else shift_labels).reshape(-1).to(x.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(x.device)
    x = x.flatten(0, -2)
    if torch_has_it_faster(x):
        options = nn.LinearCrossEntropyOptions(
            chunking_method=None, batch_chunk_size=COMPILED_CHUNK, allow_retain_graph=True
        )
        total = F.linear_cross_entropy(x, weight, targets, reduction="sum", ignore_index=ignore_index, options=options)
        return total / num_items_in_batch
    return HeadLoss.apply(x, weight, targets, num_items_in_batch, ignore_index)


def torch_has_it_faster(x) -> bool:
    """Whether torch's own `linear_cross_entropy` (2.13 and newer) takes the place of `HeadLoss`.

    In a compiled graph it stays one operation, where HeadLoss's sums into the weight's gradient become copies. Not in
    half precision, where it is coarser, nor outside of compiled graphs, where it takes more memory.
    """
    return (
        torch.compiler.is_compiling()
        and hasattr(F, "linear_cross_entropy")
        and x.device.type == "cpu"
        and product_dtype(x) == torch.float32
    )


def can_skip_logits(model: nn.Module) -> bool:
    """Whether `head_loss` computes the same as the model's own head and loss function, with all hooks and wrappers."""
    head: Any = model.out_head
    weight = head.weight
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) is nn.Parameter
        and weight.shape == (head.out_features, head.in_features)  # not sharded
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"))
        and not (head._backward_hooks or head._backward_pre_hooks or torch.nn.modules.module._has_any_global_hook())
        and torch.float16 not in (weight.dtype, product_dtype(weight))  # its gradients need loss scaling
        and model.loss_function is ForCausalLMLoss
        and not torch._C._are_functorch_transforms_active()
    )


class LazyLogitsOutput(CausalLMOutputWithCrossAttentions):
    """An output that computes its `logits` when they are first read, in whatever way; gradients flow through them.

    Raises:
        RuntimeError: the head's weights have changed since the forward pass, so its logits cannot be computed any more.
    """

    @property
    def logits(self):
        logits = self.__dict__.get("logits")
        if not callable(logits):
            return logits
        computed = logits()
        if torch.is_grad_enabled():
            self["logits"] = computed
        return computed

    @logits.setter
    def logits(self, value):
        self.__dict__["logits"] = value

    def __reduce__(self):  # pickled, it becomes transformers' output
        return CausalLMOutputWithCrossAttentions(**{name: self[name] for name in self}).__reduce__()

    def __getitem__(self, k):
        if k == 0:
            return self.loss
        return self.logits if k == "logits" else super().__getitem__(k)


def output_without_logits(head, x, labels, options, further) -> LazyLogitsOutput:
    """The loss of a forward pass, and logits that are computed when they are read.

    Args:
        x: (B, T, E), what the head is given.
        options: the keywords of the forward pass, of which those of `head_loss` are taken.
        further: other outputs.
    """
    names = ("num_items_in_batch", "ignore_index", "shift_labels")
    loss = head_loss(x, head.weight, labels, **{name: options[name] for name in names if name in options})
    output = LazyLogitsOutput(loss=loss, logits=x, **further)
    version = head.weight._version

    def lazy_logits():
        if head.weight._version != version:
            raise RuntimeError(
                "the weights have changed since the forward pass, so its logits cannot be computed any more; "
                "read outputs.logits before optimizer.step(), or set model.chunked_loss = False"
            )
        return head(x)

    output["logits"] = lazy_logits
    return output
