"""A decoder block that runs on the native CPU kernels in two calls.

transformers spends most of a decode step of a small model on Python, and much of a long prompt on passes over memory
between the linears. A block of a checkpoint therefore gets a class of its own, a child of its stock one: norm, q, k, v
and rotary embedding are one call, everything behind the attention another. Cache and attention stay transformers', so
every cache and every attention implementation works; one of these is native (`native_attention.py`).

It runs so where nothing can see the difference: without gradients, hooks, adapters, terms or offloading inside the
block, and in graphs of torch.compile too. Everywhere else the stock forward runs. Norms and activations get native
classes too: with them the stock forward computes the same bits, compiled or not, unless gradients are wanted, which
take PyTorch's.

On a GPU the same class can run a block in few launches (`quad_kernels.block`), if that is asked for.
"""

import importlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from quad_kernels import QuantizedWeight, RMSNorm, block, choose_backend
from quad_kernels.native import block as native
from quad_kernels.native.block import BlockLinear
from torch import nn
from torch.nn.modules import module as torch_module

from quad_modifiers.nn import head_product
from quad_modifiers.nn.cache_argument import cache_argument
from quad_modifiers.nn.class_change import become
from quad_modifiers.nn.head_product import runs_natively
from quad_modifiers.nn.native_attention import install_native_attention, register, remove_native_attention
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.nn.transformed_norm import TransformedNorm, norm_class, transformed_class

logger = logging.getLogger(__name__)

_FAMILIES = ("Llama", "Ministral", "Mistral", "Qwen2", "Qwen3")
STOCK_BLOCKS = tuple(f"{family}DecoderLayer" for family in _FAMILIES)
STOCK_NORMS = tuple(f"{family}RMSNorm" for family in _FAMILIES)
STOCK_ACTIVATIONS = ("SiLU", "SiLUActivation")
_EAGER = "eager_attention_forward"  # what a module of transformers that calls attention functions defines
_Takes = Callable[[list[list[BlockLinear]], torch.dtype], bool]
_GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)))
_MLP_GROUPS = (("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))
# The weights that fit, by block. Weak on both sides: a weight that was repacked must not stay in memory.
_checked: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[torch.dtype, _Takes], list[Any]]]" = (
    weakref.WeakKeyDictionary()
)


class NativeBlock(nn.Module):
    """The forward of a stock decoder layer, with a shorter way; the first of two base classes.

    Attributes:
        cache_argument: name by which the stock layer takes its cache.
    """

    cache_argument = "past_key_values"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns hidden states `[batch, positions, width]`; the arguments are those of transformers' layers.

        `past_key_values` and `cache` are the same thing, by its older and its newer name.
        """
        past = cache if past_key_values is None else past_key_values
        groups = native_groups(self, hidden_states)
        kernels: ModuleType = native
        if groups is None:
            groups, kernels = launched_groups(self, hidden_states), block
        if groups is None or position_embeddings is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{self.cache_argument: past},
                **kwargs,
            )
        modules = self._modules
        qkv, (o_proj,), gate_up, (down,) = groups
        attention: Any = modules["self_attn"]
        inner = attention._modules
        head_norms = [inner[name].weight for name in ("q_norm", "k_norm") if name in inner]
        cosine, sine = position_embeddings
        states = kernels.block_in(hidden_states, _norm(modules["input_layernorm"]), qkv, cosine, sine, head_norms)
        batch, positions = hidden_states.shape[:2]
        query, key, value = (s.view(batch, positions, -1, attention.head_dim).transpose(1, 2) for s in states)
        if past is not None:
            key, value = past.update(key, value, attention.layer_idx)
        if hasattr(attention, "sliding_window"):
            kwargs["sliding_window"] = attention.sliding_window
        output, _ = attention_function(attention)(
            attention,
            query,
            key,
            value,
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        output = output.reshape(batch, positions, -1)
        return kernels.block_out(
            output, hidden_states, _norm(modules["post_attention_layernorm"]), o_proj, gate_up, down
        )


class NativeNorm(nn.Module):
    """A root mean square norm that adds up its squares as the native block does; the first of two base classes.

    Attributes:
        product: with the matrix of a `TransformedNorm`.
    """

    product = staticmethod(head_product.linear)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the normalised `[..., width]`."""
        norm: Any = self
        weight = norm.weight
        if not runs_natively(hidden_states, weight) or weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        return torch.ops.quad_native.norm(hidden_states, weight, norm.variance_epsilon)


class NativeSiLU(nn.Module):
    """x / (1 + exp(-x)) with the exponential of the native block; the first of two base classes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns a tensor like `input`."""
        return torch.ops.quad_native.silu(input) if runs_natively(input) else super().forward(input)


class NativeHead(nn.Linear):
    """A head that reads its bfloat16 rows natively for the last position."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `[..., vocabulary]` for `[..., width]`."""
        return super().forward(input) if self.bias is not None else head_product.linear(input, self.weight)


def install_native_blocks(layers: list[nn.Module], head: nn.Module, final_norm: nn.Module) -> None:
    """Gives blocks of known classes, their norms and activations, and a head of floating-point rows native classes.

    Where the native kernels do not run it does nothing, or gives blocks alone theirs if few launches are asked for;
    calling it again changes nothing.
    """
    known = [layer for layer in layers if type(layer).__name__ in STOCK_BLOCKS or isinstance(layer, NativeBlock)]
    natively = choose_backend("cpu").name == "native"
    if not known or not (natively or block.is_wanted()):
        return
    for layer in known:
        become(layer, type(layer) if isinstance(layer, NativeBlock) else _native_class(NativeBlock, type(layer)))
    if not natively:
        return
    for layer in known:
        attention: Any = layer.self_attn
        if calls_attention_function(attention):
            install_native_attention(attention)
    for module in (*(module for layer in known for module in layer.modules()), final_norm, head):
        name = type(module).__name__
        if isinstance(module, NativeNorm | NativeSiLU | NativeHead):
            become(module, type(module))
        elif name in STOCK_NORMS:
            become(module, _native_class(NativeNorm, type(module)))
        elif isinstance(module, TransformedNorm) and norm_class(module).__name__ in STOCK_NORMS:
            become(module, transformed_class(_native_class(NativeNorm, norm_class(module))))
        elif name in STOCK_ACTIVATIONS:
            become(module, _native_class(NativeSiLU, type(module)))
        elif module is head and type(module) is nn.Linear:
            become(module, NativeHead)
    logger.info("%d of %d decoder blocks run on the CPU in two native calls each", len(known), len(layers))


def remove_native_blocks(model: nn.Module) -> None:
    """Gives every module its stock class back, and PyTorch's attention."""
    remove_native_attention(model)
    for module in model.modules():
        if type(module) is NativeHead:
            become(module, nn.Linear)
        elif isinstance(module, NativeNorm) and isinstance(module, TransformedNorm):
            become(module, transformed_class(norm_class(module).__bases__[1]))
        elif isinstance(module, NativeBlock | NativeNorm | NativeSiLU):
            become(module, type(module).__bases__[1])


def __getattr__(name: str) -> type[nn.Module]:
    """Makes a native class when a pickle asks for it in a process that has not loaded such a model yet."""
    for module, kind, names in _stock_classes():
        for stock in names:
            if name == f"Native{stock}":
                return _native_class(kind, getattr(importlib.import_module(module), stock))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stock_classes() -> Iterator[tuple[str, type[nn.Module], tuple[str, ...]]]:
    """Yields modules, the native base class, and names of their stock classes."""
    for family in _FAMILIES:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        yield module, NativeBlock, (f"{family}DecoderLayer",)
        yield module, NativeNorm, (f"{family}RMSNorm",)
    yield "transformers.activations", NativeSiLU, ("SiLUActivation",)
    yield "torch.nn", NativeSiLU, ("SiLU",)


def _native_class(kind: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """Returns the native child of a stock class; it can be found by name in this module, for pickles."""
    name = f"Native{stock.__name__}"
    found = globals().get(name)
    if found is None or found.__bases__[1] is not stock:
        members = {"__doc__": f"{stock.__name__} on native kernels.", "__module__": __name__}
        if kind is NativeBlock:
            members["cache_argument"] = cache_argument(stock.forward)
            register()  # what a pickled configuration may name
        found = globals()[name] = type(name, (kind, stock), members)
    return found


def native_groups(layer: nn.Module, x: torch.Tensor) -> list[list[BlockLinear]] | None:
    """Returns the block's linears in groups that share an input, None where the native kernels cannot run it."""
    return _groups(layer, x, native.takes) if x.is_cpu else None


def launched_groups(layer: nn.Module, x: torch.Tensor) -> list[list[BlockLinear]] | None:
    """Returns the same for a block in few launches."""
    return _groups(layer, x, block.takes) if block.in_few_launches(x.device) else None


def _groups(layer: nn.Module, x: torch.Tensor, takes: _Takes) -> list[list[BlockLinear]] | None:
    if torch.is_grad_enabled() and _needs_gradients(x, layer):
        return None
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    groups = []
    for parent_name, names in _GROUPS + _MLP_GROUPS:
        parent = layer._modules[parent_name]
        if parent is None or _has_hooks(parent):
            return None
        linears = [_block_linear(parent._modules.get(name)) for name in names]
        if any(linear is None for linear in linears):
            return None
        groups.append([linear for linear in linears if linear is not None])
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    assert attention is not None
    assert mlp is not None
    heads = [attention._modules[name] for name in ("q_norm", "k_norm") if name in attention._modules]
    norms = [layer._modules[name] for name in ("input_layernorm", "post_attention_layernorm")]
    activation = mlp._modules["act_fn"]
    if not _is_of(activation, NativeSiLU, STOCK_ACTIVATIONS):
        return None
    if not all(_is_of(norm, NativeNorm, STOCK_NORMS) for norm in (*norms, *heads)):
        return None
    if any(_has_hooks(module) for module in (activation, *norms, *heads) if module is not None):
        return None
    return groups if _fit(layer, groups, x.dtype, takes) else None


def _fit(layer: nn.Module, groups: list[list[BlockLinear]], dtype: torch.dtype, takes: _Takes) -> bool:
    """Checks formats once for these weights: it would take longer than some of the products."""
    if torch.compiler.is_compiling():
        return takes(groups, dtype)  # once, while the graph is made
    weights = [linear.weight for group in groups for linear in group]
    known = _checked.get(layer)
    if (
        known is not None
        and known[0] == (dtype, takes)
        and all(a is b() for a, b in zip(weights, known[1], strict=True))
    ):
        return True
    fits = takes(groups, dtype)
    if fits:
        _checked[layer] = (dtype, takes), [weakref.ref(weight) for weight in weights]
    return fits


def _is_of(module: nn.Module | None, kind: type[nn.Module], stock: tuple[str, ...]) -> bool:
    """True for a module of a native class or of a stock class that computes the same."""
    return isinstance(module, kind) or type(module).__name__ in stock


def _needs_gradients(x: torch.Tensor, layer: nn.Module) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())


def _block_linear(linear: Any) -> BlockLinear | None:
    """The linear as the kernels take it, None if it is something else, or somebody listens to it."""
    if type(linear) is not QuadLinear or _has_hooks(linear):
        return None
    residual = linear._modules["residual"]
    outlier = linear._modules.get("outlier")
    if type(residual) is not PackedLinear or _has_hooks(residual) or (outlier is not None and _has_hooks(outlier)):
        return None
    parts = linear.parts()
    if parts.terms or parts.input_quantization is None or not isinstance(parts.residual, QuantizedWeight):
        return None
    if isinstance(parts.outlier_weight, QuantizedWeight):  # its product is a call of its own
        return None
    rest = parts.outlier_weight, parts.bias, parts.branch
    return BlockLinear(parts.residual, parts.split, parts.input_quantization, *rest)


def _has_hooks(module: nn.Module) -> bool:
    """True if somebody listens, or accelerate brings and takes away its tensors."""
    return bool(module._forward_pre_hooks) or has_listeners(module._forward_hooks) or "_hf_hook" in module.__dict__


def has_listeners(hooks: dict[int, Any]) -> bool:
    """True if one of a module's forward hooks does something now.

    Those with which transformers once captured outputs stay, and sleep until somebody asks for such outputs again.
    """
    if not hooks:
        return False
    from transformers.utils import output_capturing

    capturing = all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks.values())
    return not capturing or bool(output_capturing._active_collector.get())


def _norm(norm: Any) -> RMSNorm:
    return RMSNorm(norm.weight, norm.variance_epsilon)


def calls_attention_function(attention: nn.Module) -> bool:
    """Returns whether a layer calls one of transformers' attention functions, rather than compute attention itself."""
    return hasattr(attention, "config") and _EAGER in sys.modules[_stock_module(attention)].__dict__


def attention_function(attention: nn.Module) -> Any:
    """Returns the attention that transformers would call for a layer; `calls_attention_function` must hold."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[_stock_module(attention)].__dict__[_EAGER]
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)


def _stock_module(module: nn.Module) -> str:
    return type(module).__module__
