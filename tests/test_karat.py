import copy
import io
import itertools

import pytest
import timm
import torch
from karat_oracle import BASES, STAGES, Largest, basis, literal_sigma, operator
from timm.models.vision_transformer import Attention
from torch import nn

import models  # noqa: F401
from kan_basis import edges
from kan_basis import layer as kan
from kan_basis.simplex import project_l1
from models.karat import KArAtAttention, attention_scores, base_function, parse_blocks
from models.operator import KArAtOperator

NAME = "vit_micro_patch8_32_karat"
stages = pytest.mark.parametrize("options", STAGES, ids=lambda o: "-".join(map(str, o.values())))


def micro(**kwargs):
    return timm.create_model(NAME, **{"num_classes": 10, **kwargs})


def attention(op, heads=2, head_dim=4, **kwargs):
    attn = KArAtAttention(heads * head_dim, heads, qkv_bias=True, **kwargs).double()
    attn.set_operator(op, op.num_heads)
    return attn


@stages
@pytest.mark.parametrize("name", BASES)
def test_operator_is_the_literal_formula(name, options):
    op, scores = operator(name, **options), torch.randn(1, 2, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.tensor(
            [[[literal_sigma(op, h, scores[0, h, m]) for m in range(2)] for h in range(2)]], dtype=torch.float64
        )
        torch.testing.assert_close(op(scores), expected, rtol=1e-10, atol=1e-10)


@stages
def test_attention_is_sigma_of_the_scores_times_v(options, monkeypatch):
    monkeypatch.setattr(kan, "MAX_FEATURES", 100)  # one image in each chunk
    op = operator(**options)
    attn, x = attention(op), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = attn.qkv(x).reshape(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = op(q @ k.mT / 4**0.5) @ v
    torch.testing.assert_close(attn(x), attn.proj(expected.transpose(1, 2).reshape(3, 5, 8)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output_scale, l1", [*itertools.product(("1", "sqrt", "learned"), (False, True))])
def test_output_scale_and_projection(output_scale, l1):
    op = operator(output_scale=output_scale, project_l1=l1)
    scores, v = torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    sigma = op.functions(scores) @ op.project_out.mT
    sigma = sigma * {"1": 1, "sqrt": 5**-0.5, "learned": op.output_scale}[output_scale]
    sigma = project_l1(sigma) if l1 else sigma
    torch.testing.assert_close(op(scores), sigma, rtol=1e-6, atol=0)
    torch.testing.assert_close(op.attend(scores, v), sigma @ v, rtol=1e-6, atol=1e-10)
    fresh = KArAtOperator(5, 2, basis("fourier"), output_scale="learned")
    assert isinstance(fresh.output_scale, nn.Parameter) and fresh.output_scale.eq(1).all()


@pytest.mark.parametrize("name", ["fourier", "rational"])
@stages
def test_gradients_of_the_core(name, options, monkeypatch):
    monkeypatch.setattr(kan, "MAX_FEATURES", 40)
    monkeypatch.setattr(edges, "MAX_EDGES", 20)
    op = operator(name, N=3, h=1, r=2, output_scale="learned", **options)
    attn = attention(op, heads=1, head_dim=2)
    qkv = [torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parameters = [p for p in op.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda q, k, v, *_: attn.apply_operator(op, q, k, v), (*qkv, *parameters))


def test_only_q_k_v_are_kept_and_nothing_large_is_built(monkeypatch):
    B, N, h, r = 4, 48, 2, 12
    monkeypatch.setattr(kan, "MAX_FEATURES", 20_000)
    monkeypatch.setattr(edges, "MAX_EDGES", 10_000)
    for name, options in itertools.product(("fourier", "rational"), STAGES):
        attn = KArAtAttention(h * 8, h)
        attn.set_operator(KArAtOperator(N, h, basis(name), r, **options))
        x, kept = torch.randn(B, N, h * 8, requires_grad=True), []
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(t.untyped_storage().nbytes() // 4) or t, lambda t: t
            ):
                out = attn(x)
            out.square().sum().backward()
        assert max(kept) < B * h * N * N, (name, options)
        widest = max(layer.out_features * layer.in_features for layer in attn.operator.layers)
        assert (
            largest.elements
            <= max(20_000, attn.qkv.weight.numel() * B, B * h * N * r, 2 * widest * 6)
            < B * h * N * widest
        ), (name, options)


def test_attention_dropout_and_its_recomputation():
    attn = attention(operator(), attn_drop=0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert not torch.equal(attn(x), attn(x)) and torch.equal(attn.eval()(x), attn(x))
    attn.train()
    gradients = []
    for keep in (True, False):  # the same random numbers, with recomputation and without
        torch.manual_seed(5)
        if keep:
            gradients.append(torch.autograd.grad(attn(x).square().sum(), x)[0])
        else:
            q, k, v = attn.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            out = attn.operator.attend(attention_scores(q, k, attn.scale), v, 0.5)
            gradients.append(torch.autograd.grad(attn.proj(out.transpose(1, 2).reshape(2, 5, 8)).square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_scores_stay_float32_under_autocast(monkeypatch):
    seen = []
    cls = type(basis("fourier"))
    features = cls.features
    monkeypatch.setattr(cls, "features", lambda self, x, *dim: seen.append(x) or features(self, x, *dim))
    model = micro(karat_blocks=[0]).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32)).dtype == torch.bfloat16
    assert [s.dtype for s in seen] == [torch.float32] and not torch.equal(seen[0], seen[0].bfloat16().float())
    q, k = torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = attention_scores(q, k, 0.5)
    torch.testing.assert_close(scores.double(), q.double() @ k.double().mT / 2, rtol=1e-6, atol=1e-6)
    for options in STAGES:  # hidden stages too
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            KArAtOperator(5, 2, basis("fourier"), 3, **options)(torch.randn(2, 2, 5, 5))
        assert all(s.dtype == torch.float32 for s in seen) and len(seen) == max(
            1, options["depth"] - options.get("modular", False)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_and_gradients_on_a_gpu(dtype):
    q, k = (torch.randn(2, 3, 37, 64, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cuda", dtype):
        scores = attention_scores(q, k, 0.125)
    exact = q.double() @ k.double().mT * 0.125
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(scores)
    own, expected = (torch.autograd.grad((s * weights).sum(), (q, k)) for s in (scores, exact))
    for g, e in zip(own, expected):
        torch.testing.assert_close(g, e, rtol=0.02, atol=0.05)


@pytest.mark.gpu
def test_training_memory_is_near_that_of_softmax():
    peaks = []
    for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_224_karat"):
        model, images = timm.create_model(name).cuda(), torch.randn(32, 3, 224, 224, device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(images).float().square().mean()
            loss.backward()
            model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
        del model, loss
    assert peaks[1] <= 1.6 * peaks[0]


@pytest.mark.parametrize(
    "name, options, classes, millions",
    [
        ("vit_tiny", {}, 10, 6.2923),
        ("vit_tiny", dict(universal=True), 10, 5.5902),
        ("vit_small", {}, 1000, 23.5825),
        ("vit_small", dict(universal=True), 1000, 22.1783),
        ("vit_base", dict(grid=1), 10, 87.5084),
        ("vit_base", dict(grid=1, universal=True), 10, 85.9482),
    ],
)
def test_published_parameter_counts(name, options, classes, millions):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_patch16_224_karat", num_classes=classes, **options)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 4) == millions


@pytest.mark.parametrize("family", ["vit", "kat"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(universal=True),
        dict(mixed_head=True, basis_type="RationalBasis", base_fn="nn.PReLU"),
        dict(basis_type="WaveletBasis", wavelet_type="morlet", karat_blocks="1,3"),
        dict(basis_type="SplineBasis", modular_mode="w1_phi2", base_fn="nn.SiLU", karat_init="scaled"),
        dict(karat_depth=1, project_l1=True),
        dict(modular_attn=False, qk_norm=True, attn_drop_rate=0.1),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(family, options):
    model = timm.create_model(f"{family}_micro_patch8_32_karat", num_classes=10, **options)
    out = model(torch.randn(4, 3, 32, 32))
    out.square().sum().backward()
    assert out.shape == (4, 10) and out.isfinite().all()
    assert isinstance(model.blocks[1].attn, Attention)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0 or "qkv.bias" in name or options.get("project_l1"), name
        else:
            assert name.endswith("scale_base")


def test_universal_operator_is_one():
    model = micro(universal=True)
    for m in (model, copy.deepcopy(model)):
        assert all(block.attn.shared[0] is m.karat for block in m.blocks)
        keys = [key for key in m.state_dict() if "coefficients" in key]
        assert (
            keys
            == ["karat.layers.0.coefficients"]
            == [n for n, _ in m.named_parameters(remove_duplicate=False) if "coefficients" in n]
        )
    assert m.karat is not model.karat
    with torch.no_grad():
        m.karat.project_out.zero_()
    assert model.karat.project_out.abs().sum() > 0
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False).eval()
    assert all(block.attn.shared[0] is loaded.karat for block in loaded.blocks)
    fresh, images = micro(universal=True).eval(), torch.randn(2, 3, 32, 32)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model.eval()(images)) and torch.equal(loaded(images), fresh(images))


def test_mixed_heads():
    model = micro(mixed_head=True)
    attn, x = model.blocks[0].attn, torch.randn(2, 17, 64)
    assert attn.operator.num_heads == 1
    q, k, v = attn.qkv(x).reshape(2, 17, 3, 2, 32).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 32**0.5
    heads = torch.cat([attn.operator(scores[:, :1]) @ v[:, :1], scores[:, 1:].softmax(-1) @ v[:, 1:]], 1)
    torch.testing.assert_close(attn(x), attn.proj(heads.transpose(1, 2).reshape(2, 17, 64)), rtol=1e-4, atol=1e-4)
    assert micro(mixed_head=True, num_attention=2).blocks[0].attn.operator.num_heads == 2
    with torch.device("meta"):
        for size, heads in (("tiny", 1), ("small", 3), ("base", 6)):
            assert (
                timm.create_model(f"vit_{size}_patch16_224_karat", mixed_head=True).blocks[0].attn.operator.num_heads
                == heads
            )


def test_choice_of_blocks_and_values_for_each():
    model = micro(karat_blocks="0,2-3", grid=[1, 2, 3], hidden_dim=[4, 5, 6])
    shapes = [tuple(b.attn.operator.layers[0].coefficients.shape) if b.attn.operator else None for b in model.blocks]
    assert shapes == [(2, 4, 17, 2), None, (2, 5, 17, 4), (2, 6, 17, 6)]
    plain, x = Attention(64, 2, qkv_bias=True), torch.randn(2, 17, 64)
    plain.load_state_dict(model.blocks[1].attn.state_dict())
    assert torch.equal(plain(x), model.blocks[1].attn(x))
    assert (
        parse_blocks("0-3,11", 12) == [0, 1, 2, 3, 11]
        and parse_blocks([2, 0], 3) == [0, 2]
        and parse_blocks(None, 2) == [0, 1]
    )


def test_kat_starts_without_mimetic_attention():
    stds = [
        timm.create_model("kat_micro_patch8_32_karat", **options).blocks[0].attn.qkv.weight[:128].std().item()
        for options in ({}, dict(weight_init="released"))
    ]
    assert stds[0] == pytest.approx(0.02, rel=0.1) and stds[1] > 0.05


def test_base_functions_are_looked_up():
    assert (
        base_function("ZeroModule") is None
        and isinstance(base_function("nn.SiLU"), nn.SiLU)
        and isinstance(base_function("ReLU"), nn.ReLU)
    )
    for name in (
        "os.system",
        "nn.Module.__init__",
        "__import__('os')",
        "Softmax",
        "Linear",
        "nn.nn.ReLU",
        "Tensor",
        "",
    ):
        with pytest.raises(ValueError, match="unknown base_fn.*SiLU"):
            base_function(name)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(basis_type="Legendre"), "unknown basis 'Legendre'"),
        (dict(basis_type="wavelet", wavelet_type="haar"), "unknown wavelet 'haar'"),
        (dict(base_fn="os.system"), "unknown base_fn"),
        (dict(hidden_dim=0), "hidden_dim must be at least 1"),
        (dict(grid=0), "grid must be at least 1"),
        (dict(karat_depth=0), "depth must be at least 1"),
        (dict(karat_blocks="0-4"), "from 0 to 3"),
        (dict(karat_blocks="0-2-3"), "like '0-3,11'"),
        (dict(karat_blocks="3-1"), "backwards"),
        (dict(grid=2.5), "grid must be an integer"),
        (dict(patch_drop_rate=0.5), "tied to its number of tokens"),
        (dict(karat_blocks="first"), "like '0-3,11'"),
        (dict(karat_blocks=""), "like '0-3,11'"),
        (dict(karat_blocks=[]), "from 0 to 3"),
        (dict(universal=True, grid=[1, 2, 3, 4]), "one value for a universal"),
        (dict(hidden_dim=[4, 5]), "each of the 4"),
        (dict(num_attention=1), "needs mixed_head"),
        (dict(mixed_head=True, num_attention=3), "from 1 to 2"),
        (dict(modular_mode="w2"), "unknown mode 'w2'"),
        (dict(output_scale="2"), "unknown output_scale"),
        (dict(karat_init="x"), "unknown init 'x'"),
        (dict(karat_init_scale=0.0), "init_scale must be positive"),
        (dict(order=2), "order is an option of ChebyshevBasis or SplineBasis, not of FourierBasis"),
        (dict(basis_type="spline", grid_range=[(0, 1)] * 4), "grid_range must be 2 numbers"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        micro(**options)


def test_inputs_that_do_not_fit():
    model = micro()
    with pytest.raises(ValueError, match="built for 17 tokens, not 26"):
        model.blocks[0].attn(torch.randn(1, 26, 64))
    with pytest.raises(ValueError, match="build the model with img_size"):
        model.set_input_size(40)
    with pytest.raises(ValueError, match="no mask"):
        model.blocks[0].attn(torch.randn(1, 17, 64), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="operator of 1 heads"):
        attention(operator(h=1)).set_operator(operator(h=1))


@pytest.mark.parametrize("base_fn", [None, torch.nn.ReLU()], ids=str)
@pytest.mark.parametrize("name", BASES)
@stages
def test_scaled_init_keeps_the_variance(name, base_fn, options):
    N, scores = 65, torch.randn(8, 4, 65, 65)
    op = KArAtOperator(N, 4, basis(name), base_fn=base_fn, init="scaled", **options)
    out = op.attend(scores, torch.randn(8, 4, N, 32))
    assert 0.2 < out.square().mean().item() < 5


@pytest.mark.parametrize(
    "options",
    [{}, dict(basis_type="WaveletBasis", base_fn="nn.PReLU"), dict(project_l1=True, modular_attn=False)],
    ids=str,
)
def test_exported_for_any_batch_and_empty_batches(options):
    model, images = micro(**options).eval(), torch.randn(5, 3, 32, 32)
    for batch in (torch.export.Dim("batch"), torch.export.Dim("batch", min=2, max=512)):
        exported = torch.export.export(model, (images[:3],), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(exported.module()(images), model(images))
    assert model(images[:0]).shape == (0, *model(images).shape[1:])


def test_compile_and_gradient_checkpointing():
    model, images = micro(mixed_head=True), torch.randn(2, 3, 32, 32)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager"), model):
        model.zero_grad()
        model.set_grad_checkpointing(len(gradients) == 2)
        run(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-4, msg=name)
