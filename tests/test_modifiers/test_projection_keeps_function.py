"""SVDOutlierProjection changes the basis, not the function."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.nn.quad_linear import QuadLinear

pytest.importorskip("llmcompressor")
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
RANKS = {"even": 8, "mha": 1, "odd": 12, "odder": 7}


@pytest.mark.parametrize("basis", ["extended", "square"])
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_shapes(model_type, size, basis, make_toy, compress, logits_of, assert_same_function) -> None:
    tied = (ARCHITECTURES.index(model_type) + list(RANKS).index(size)) % 2 == (basis == "square")
    model = make_toy(model_type, size, tie_word_embeddings=tied)
    wanted, hidden, rank = logits_of(model), model.config.hidden_size, RANKS[size]
    compress(model, SVDOutlierProjection(rank=rank, basis=basis))
    assert_same_function(logits_of(model), wanted)
    width = hidden + rank if basis == "extended" else hidden
    assert model.config.hidden_size == width
    assert model.model.embed_tokens.weight.shape == (320, width)
    assert model.model.layers[0].self_attn.q_proj.outlier.weight.shape[1] == rank
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("basis", ["extended", "square"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_shared_table_as_asked_for(keep, basis, make_toy, compress, logits_of, assert_same_function) -> None:
    model = make_toy("qwen3", "odd", tie_word_embeddings=True)
    model.model.norm.weight.data = torch.linspace(-2, 3, 84)  # what the two ends do not share
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=6, basis=basis, keep_tied=keep))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == keep
    assert model.config.tie_word_embeddings == keep
    assert hasattr(model.model.norm, "head_transform") == keep
    assert_same_function(logits_of(model), wanted)


def test_two_tables_cannot_be_kept_as_one(make_toy, compress, caplog) -> None:
    model = compress(make_toy(), SVDOutlierProjection(rank=8, keep_tied=True))
    assert "keep_tied has no effect" in caplog.text
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rotation", ["none", "random", "hadamard"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("basis", ["extended", "square"])
def test_rotations_and_rank_zero(
    basis, rank, rotation, tied, make_toy, compress, logits_of, assert_same_function
) -> None:
    model = make_toy("qwen2", "even", tie_word_embeddings=tied, num_hidden_layers=1)
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=rank, basis=basis, rotation=rotation, online_rotation=[]))
    assert_same_function(logits_of(model), wanted)


@pytest.mark.parametrize("online", [[], ["o_proj"], ["down_proj"], ["o_proj", "down_proj"]], ids="+".join)
@pytest.mark.parametrize(("model_type", "size"), [("llama", "odder"), ("qwen2", "odd"), ("qwen3", "even")])
def test_outliers_of_d_type_inputs(
    model_type, size, online, make_toy, compress, logits_of, assert_same_function
) -> None:
    model = make_toy(model_type, size)
    wanted = logits_of(model)
    head_dim = model.model.layers[0].self_attn.head_dim
    compress(
        model,
        SVDOutlierProjection(rank=4, online_rotation=online, o_proj_rank_per_head=3, down_proj_rank=9),
    )
    assert_same_function(logits_of(model), wanted)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert attention.o_proj.outlier.weight.shape[1] == 3 * attention.o_proj.in_features // head_dim
    assert mlp.down_proj.outlier.weight.shape[1] == 9
    assert attention.o_proj.split.hadamard == ("o_proj" in online)
    assert mlp.down_proj.split.hadamard == ("down_proj" in online)


@pytest.mark.parametrize("ranks", [{}, {"o_proj_rank_per_head": 3, "down_proj_rank": 9}], ids=["no ranks", "ranks"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "arcee", "apertus", "granite"])
def test_a_balanced_scale(model_type, ranks, make_toy, compress, logits_of, assert_same_function) -> None:
    """Fused linears, biases, heads that share values, an MLP without a gate; and what is balanced, and what is not."""
    model, plain = make_toy(model_type), make_toy(model_type)
    wanted = logits_of(model)
    settings = {"rank": 4, "online_rotation": [], "rotation": "none", **ranks}
    compress(model, SVDOutlierProjection(balanced=True, **settings))
    assert_same_function(logits_of(model), wanted)
    compress(plain, SVDOutlierProjection(**settings))
    for gated, name in ((True, "o_proj"), (model_type not in ("arcee", "apertus"), "down_proj")):
        ours, theirs = (_spread_of_products(each, name) for each in (model, plain))
        assert ours < 0.999 * theirs if gated else ours == pytest.approx(theirs), name


def _spread_of_products(model, name: str) -> float:
    """Energy of the input of a linear times that of its weight: what the errors of both grow with."""
    total = 0.0
    for layer in model.model.layers:
        linear = getattr(layer.self_attn if name == "o_proj" else layer.mlp, name)
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5)))
        handle.remove()
        weights = [linear.residual.weight, *([] if linear.outlier is None else [linear.outlier.weight])]
        total += float(seen[0].square().sum() * sum(weight.square().sum() for weight in weights))
    return total


@pytest.mark.parametrize("basis", ["extended", "square"])
def test_embeddings_with_a_large_mean(basis, make_toy, compress, logits_of, assert_same_function) -> None:
    """Centring the embeddings, which is right for LayerNorm only, would change this model altogether."""
    model = make_toy("llama", "even")
    with torch.no_grad():
        model.model.embed_tokens.weight += 3.0
    wanted = logits_of(model)
    centred = make_toy("llama", "even")  # its mean is smaller, but the sensitivity of the check shows here already
    centred.model.embed_tokens.weight.data = model.model.embed_tokens.weight - model.model.embed_tokens.weight.mean(
        1, keepdim=True
    )
    changed = float((logits_of(centred) - wanted).abs().max() / wanted.abs().max())
    assert changed > 0.1, "the case would not notice centring"
    compress(model, SVDOutlierProjection(rank=8, basis=basis))
    assert_same_function(logits_of(model), wanted)


@pytest.mark.parametrize("basis", ["extended", "square"])
def test_large_eps(basis, make_toy, compress, logits_of, assert_same_function) -> None:
    """With eps as large as the mean square, a norm over d + r coordinates needs the right scale, not only direction."""
    model = make_toy("mistral", "even", rms_norm_eps=2.0)
    small = make_toy("mistral", "even", rms_norm_eps=1e-6)
    wanted = logits_of(model)
    assert float((logits_of(small) - wanted).abs().max() / wanted.abs().max()) > 0.05
    compress(model, SVDOutlierProjection(rank=16, basis=basis))
    assert_same_function(logits_of(model), wanted)


def test_biases_everywhere(make_toy, compress, logits_of, assert_same_function) -> None:
    """Also the biases of writers, which go into the new basis."""
    model = make_toy("llama", "even", attention_bias=True, mlp_bias=True)
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0.1
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4))
    assert_same_function(logits_of(model), wanted)


def test_bfloat16_stays_bfloat16(make_toy, compress, logits_of, assert_same_function) -> None:
    model = make_toy("qwen2", "even", dtype=torch.bfloat16)
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=8))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same_function(logits_of(model), wanted, bound=6e-2)


def test_outlier_coordinates_hold_the_energy(make_toy, compress, token_ids) -> None:
    model = make_toy("llama", "even")
    compress(model, SVDOutlierProjection(rank=8))
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(token_ids(3, 20, seed=99))
    hook.remove()
    energy = seen[0].square().flatten(0, 1).sum(0)
    share = float(energy[:8].sum() / energy.sum())
    residual = seen[0].flatten(0, 1)[:, 8:]
    print(f"8 of 64 directions hold {share:.0%} of the energy of unseen text; bound 50 %")
    assert share > 0.5
    # The Hadamard spreads the rest: no residual coordinate stands out.
    assert float(residual.square().mean(0).max()) < 8 * float(residual.square().mean())


def test_same_seed_same_model(make_toy, compress) -> None:
    states = []
    for seed in (1, 1, 2):
        model = make_toy("llama", "odd", num_hidden_layers=1)
        torch.manual_seed(len(states))  # the global generator must not matter
        states.append(compress(model, SVDOutlierProjection(rank=4, seed=seed)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "model.layers.0.self_attn.q_proj.residual.weight"
    assert not torch.equal(states[0][name], states[2][name])


def test_containers(make_toy, compress) -> None:
    model = compress(make_toy("qwen2", "even"), SVDOutlierProjection(rank=8))
    containers = {name: module for name, module in model.named_modules() if isinstance(module, QuadLinear)}
    assert len(containers) == 2 * 7
    for module in containers.values():
        assert type(module.residual) is torch.nn.Linear, "a subclass is not quantized by compressed-tensors"
        assert module.residual.bias is None
        assert module.residual.weight.shape == (module.residual.out_features, module.residual.in_features)
        assert module.split.residual_width == module.residual.in_features
    assert containers["model.layers.0.self_attn.q_proj"].bias is not None
    assert containers["model.layers.0.self_attn.o_proj"].bias is None


def test_generation_still_works(make_toy, compress, token_ids) -> None:
    model = make_toy("llama", "even")
    prompt = token_ids(1, 8)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **arguments)
    compress(model, SVDOutlierProjection(rank=8))
    assert torch.equal(model.generate(prompt, **arguments), wanted)
