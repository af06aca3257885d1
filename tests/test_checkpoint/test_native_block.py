"""Blocks of a checkpoint in two native calls: the stock block's numbers, and when they run."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quad_kernels import choose_backend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quad_modifiers.nn.native_block import NativeBlock, NativeHead

pytestmark = pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")

PROMPTS = [[5, 17, 40, 8, 21, 30], [90, 12, 77]]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Recorder(TorchDispatchMode):
    """Counts the native operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "quad_native":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def blocks(model: PreTrainedModel) -> list[NativeBlock]:
    return [module for module in model.modules() if isinstance(module, NativeBlock)]


def step(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Logits of two tokens behind a prompt, and the native operators of that step."""
    with torch.no_grad():
        past = model(prompt[:, :-2], use_cache=True).past_key_values
        with Recorder() as recorder:
            logits = model(prompt[:, -2:], past_key_values=past, use_cache=True).logits
    return logits, recorder.names


def stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its stock blocks, part by part: somebody listens inside each of them."""
    for block in blocks(model):
        block.self_attn.register_forward_hook(lambda module, args, output: None)
    return model


def loud_attention(*args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


TWO_LEVELS = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {strategy: group, group_size: 8, sub_scale_bits: 4}
    OutlierSplitGPTQ: {group_size: 8, sub_scale_bits: 4}
"""

NVFP4 = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 16, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {number_format: nvfp4, four_over_six: true}
    OutlierSplitGPTQ: {number_format: nvfp4}
"""

BRANCHES = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    LowRankBranch: {rank: 6, rounds: 1, ignore: [lm_head, k_proj]}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {method: rtn}
"""


@pytest.fixture(params=["llama", "ministral", "mistral", "qwen2", "qwen3", "two levels", "NVFP4", "branches"])
def folder(request: pytest.FixtureRequest, compress_toy: Callable[..., Any]) -> Any:
    grouped = {"two levels": TWO_LEVELS, "NVFP4": NVFP4}.get(request.param)
    if grouped is not None:
        return compress_toy(grouped, "llama", size="even").folder
    if request.param == "branches":
        return compress_toy(BRANCHES, "llama").folder
    return compress_toy(model_type=request.param).folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_gives_the_hidden_states_of_the_stock_one(folder: Any, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    for batch, positions in ((1, 1), (3, 1), (2, 5)):
        past = DynamicCache(config=model.config)
        prompt = torch.randint(3, 300, (batch, 7), generator=generator)
        with torch.no_grad():
            model(prompt, past_key_values=past, use_cache=True)
            x = torch.randn(batch, positions, width, generator=generator).to(dtype)
            angles = model.model.rotary_emb(x, torch.arange(7, 7 + positions)[None])
            for block in blocks(model):
                arguments = {"position_embeddings": angles, "use_cache": True}
                with Recorder() as recorder:
                    own = block(x, past_key_values=copy.deepcopy(past), **arguments)
                assert [name for name in recorder.names if name != "attend_prompt"] == ["block_in", "block_out"]
                hook = block.mlp.register_forward_hook(lambda module, args, output: None)
                with Recorder() as recorder:
                    wanted = block(x, past_key_values=copy.deepcopy(past), **arguments)
                hook.remove()
                assert "block_in" not in recorder.names
                assert own.dtype == wanted.dtype
                assert float((own - wanted).float().norm() / wanted.float().norm()) < (
                    1e-5 if dtype.itemsize == 4 else 1e-2
                )


def test_decoding_and_prompts_take_it_and_training_does_not(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([PROMPTS[0]])
    _, names = step(model, prompt)
    assert names.count("block_in") == names.count("block_out") == len(blocks(model)) == 2
    with torch.no_grad(), Recorder() as recorder:
        model(prompt, use_cache=False)
    assert recorder.names.count("block_out") == 2
    with Recorder() as recorder:  # the embedding can be trained
        model(prompt)
    assert "block_in" not in recorder.names


NATIVELY = ["plain", "static cache", "mask", "behind a cache", "modules", "no cache"]
NOT_NATIVELY = ["float mask", "own attention", "dropout", "eager", "sdpa", "not causal", "gradients"]


@pytest.mark.parametrize("how", NATIVELY + NOT_NATIVELY)
def test_the_attention_of_a_prompt_is_native_in_inference(compressed, monkeypatch, how: str) -> None:
    monkeypatch.setenv("QUAD_KERNELS_PROMPTS", "1")
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    monkeypatch.setenv("QUAD_KERNELS_PROMPTS", "0")
    other = AutoModelForCausalLM.from_pretrained(compressed.folder)
    assert (model.config._attn_implementation, other.config._attn_implementation) == ("quad_sdpa", "sdpa")
    prompt = torch.tensor([PROMPTS[0] * 3])

    def logits(model: PreTrainedModel) -> torch.Tensor:
        arguments: dict[str, Any] = {"use_cache": how != "no cache"}
        if how == "static cache":
            arguments["past_key_values"] = StaticCache(model.config, prompt.shape[1] + 5)
        elif how == "mask":
            arguments["attention_mask"] = torch.ones_like(prompt)
            arguments["attention_mask"][0, 0] = 0
        elif how == "float mask":
            mask = torch.ones(18, 18).triu(1) * torch.finfo(torch.float32).min
            arguments["attention_mask"] = mask[None, None]
        elif how == "behind a cache":
            with torch.no_grad():
                arguments["past_key_values"] = model(prompt[:, :4]).past_key_values
        elif how == "modules":
            stock(model)
        elif how in ("eager", "sdpa"):
            model.set_attn_implementation(how)
        elif how == "own attention":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", loud_attention)
        elif how == "not causal":
            for block in blocks(model):
                block.self_attn.is_causal = False
        elif how == "dropout":
            for block in blocks(model):
                block.self_attn.attention_dropout = 1e-9
            model.train()
        with torch.set_grad_enabled(how == "gradients"):
            return model(prompt, **arguments).logits.detach()

    with Recorder() as recorder:
        own = logits(model)
    natively = how in NATIVELY
    assert recorder.names.count("attend_prompt") == (0 if not natively else 4 if how == "behind a cache" else 2)
    with Recorder() as recorder:
        wanted = logits(other)
    assert "attend_prompt" not in recorder.names
    assert float((own - wanted).norm() / wanted.norm()) < 1e-5
    if not natively:
        assert torch.equal(own, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_have_the_same_bits_with_a_mask_and_without_one(compressed, monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setenv("QUAD_KERNELS_PROMPTS", "1")
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, dtype=dtype)
    prompt = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt[:1, :61]], dim=1)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        wanted = model(prompt).logits
        both = model(torch.cat([prompt[:1], padded]), attention_mask=mask).logits
        assert torch.equal(both[0], wanted[0])
        if dtype == torch.float32:  # in bfloat16 parts of a block and of a graph round more often than a whole block
            compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
            assert torch.equal(compiled(prompt).logits, wanted)
            assert torch.equal(stock(model)(prompt).logits, wanted)


def test_a_model_that_was_dequantized_or_copied_finds_its_attention(compressed, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("QUAD_KERNELS_PROMPTS", "1")
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    assert copy.deepcopy(model).config._attn_implementation == "quad_sdpa"
    model.save_pretrained(tmp_path)
    assert "quad_sdpa" not in (tmp_path / "config.json").read_text()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb'));"
        "print(model(torch.tensor([[5, 6, 7]])).logits.shape[1], model.config._attn_implementation)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.pickle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "quad_sdpa"], done.stderr
    assert model.dequantize().config._attn_implementation == "sdpa"


def test_generation_is_that_of_stock_blocks(compressed) -> None:
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    wanted = stock(copy.deepcopy(model)).generate(padded, attention_mask=mask, **NEW)
    assert torch.equal(model.generate(padded, attention_mask=mask, **NEW), wanted)
    static = model.generate(padded, attention_mask=mask, cache_implementation="static", disable_compile=True, **NEW)
    assert torch.equal(static, wanted)
    assert torch.equal(model.generate(padded, attention_mask=mask, num_beams=2, **NEW)[:, :longest], padded)


def changed(model: PreTrainedModel, how: str) -> PreTrainedModel:
    attention = blocks(model)[0].self_attn
    if how == "hook":
        attention.q_proj.register_forward_pre_hook(lambda module, args: None)
    elif how == "hook of the activation":
        blocks(model)[0].mlp.act_fn.register_forward_hook(lambda module, args, output: None)
    elif how == "gradients":
        attention.q_proj.outlier.weight.requires_grad_(True)
    elif how == "stock linear":
        attention.k_proj = torch.nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features)
    elif how == "activation":
        blocks(model)[0].mlp.act_fn = torch.nn.GELU()
    return model


@pytest.mark.parametrize("how", ["hook", "hook of the activation", "gradients", "stock linear", "activation"])
def test_what_it_cannot_do_runs_as_before(compressed, how: str) -> None:
    model = changed(AutoModelForCausalLM.from_pretrained(compressed.folder), how)
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        past = model(prompt[:, :-2], use_cache=True).past_key_values
    with torch.set_grad_enabled(how == "gradients"), Recorder() as recorder:
        own = model(prompt[:, -2:], past_key_values=copy.deepcopy(past), use_cache=True).logits
        wanted = stock(model)(prompt[:, -2:], past_key_values=past, use_cache=True).logits
    assert recorder.names.count("block_in") == (0 if how == "gradients" else len(blocks(model)) - 1)
    assert own.requires_grad == (how == "gradients")
    torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3)


def test_a_changed_weight_is_seen_at_once(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([PROMPTS[0]])
    before, _ = step(model, prompt)
    linear = blocks(model)[1].mlp.down_proj
    with torch.no_grad():
        linear.residual.weight_scale.mul_(2)
        linear.outlier.weight.add_(0.5)
    after, names = step(model, prompt)
    assert "block_in" in names
    assert not torch.equal(after, before)
    wanted, _ = step(stock(model), prompt)
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-3)


def test_a_weight_that_was_repacked_does_not_stay_in_memory(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([PROMPTS[0]])
    step(model, prompt)
    residual = blocks(model)[0].mlp.down_proj.residual
    old = weakref.ref(residual.prepared_weight())
    model.state_dict()  # brings the checkpoint's words back
    gc.collect()
    assert old() is None


def test_the_norms_of_the_heads_are_heard(compress_toy) -> None:
    model = AutoModelForCausalLM.from_pretrained(compress_toy(model_type="qwen3").folder)
    heard: list[str] = []
    blocks(model)[0].self_attn.q_norm.register_forward_hook(lambda module, args, output: heard.append("q_norm"))
    step(model, torch.tensor([PROMPTS[0]]))
    assert heard == ["q_norm", "q_norm"]


def test_copies_pickles_and_saved_models_stay_native(compressed, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([PROMPTS[0]])
    wanted, _ = step(model, prompt)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        logits, names = step(other, prompt)
        assert torch.equal(logits, wanted)
        assert "block_in" in names
    model.save_pretrained(tmp_path / "again")
    logits, names = step(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), prompt)
    assert torch.equal(logits, wanted)
    assert "block_in" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_and_activation_are_those_of_pytorch_but_for_last_bits(compressed, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, dtype=dtype)
    block = blocks(model)[0]
    x = torch.randn(5, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    x[0, 0, 0], x[0, 1, :2] = float("nan"), torch.tensor([100.0, -100.0])
    norm, activation = block.input_layernorm, block.mlp.act_fn
    with torch.no_grad(), Recorder() as recorder:
        own = norm(x), activation(x)
    assert recorder.names == ["norm", "silu"]
    factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    wanted = norm.weight * (x.float() * factor).to(dtype), torch.nn.functional.silu(x.float()).to(dtype)
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
    x.requires_grad_()
    assert activation(x).requires_grad
    assert torch.equal(activation(x)[1:], torch.nn.functional.silu(x)[1:])


def test_a_dequantized_model_is_a_stock_one(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder).dequantize()
    assert not [name for name, module in model.named_modules() if "native" in type(module).__module__]
    assert type(model.lm_head) is torch.nn.Linear


def test_a_pickle_opens_in_a_new_process(compressed, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    file = tmp_path / "block.pickle"
    file.write_bytes(pickle.dumps(blocks(model)[0]))
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__mro__[1].__name__)"
    command = [sys.executable, "-W", "ignore", "-c", code, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["NativeBlock"], done.stderr


def test_dropout_of_the_attention_stays(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, attention_dropout=0.5)
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, model(prompt).logits)
        model.train()
        assert not torch.equal(model(prompt).logits, model(prompt).logits)


def test_the_head_of_bfloat16_rows(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, dtype=torch.bfloat16)
    head = model.lm_head
    assert isinstance(head, NativeHead)
    x = torch.randn(2, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        truth = x.double() @ head.weight.double().T
        torch.testing.assert_close(head(x).double(), truth, rtol=2**-8, atol=1e-4)
        assert torch.equal(head(x), torch.cat([head(x[:1]), head(x[1:])]))
        assert torch.equal(head(x.expand(2, 3, -1)), torch.nn.functional.linear(x.expand(2, 3, -1), head.weight))
    assert head(x.clone().requires_grad_()).requires_grad


def test_a_compiled_graph_holds_the_blocks_as_operators_and_gives_the_same_bits(compressed, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
        monkeypatch.setenv("QUAD_KERNELS_PROMPTS", "1")  # a graph takes PyTorch's attention all the same
        logits = compiled(prompt, use_cache=False).logits
        monkeypatch.delenv("QUAD_KERNELS_PROMPTS")
        assert torch.equal(logits, model(prompt, use_cache=False).logits)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("quad_native.block_in") == names.count("quad_native.block_out") == len(blocks(model))
