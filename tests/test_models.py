import pytest
import timm
import torch
from oracle import rational_oracle
from timm.models.vision_transformer import Attention

import models  # noqa: F401
from kan_basis import GroupRational, rational
from models.kat import GRKANMlp, variance_gain

OURS = sorted(n for n in timm.list_models("*kat_*") + timm.list_models("vit_micro*"))
PARAMETERS = {
    "kat_tiny_patch16_224": 5_718_328,
    "kat_small_patch16_224": 22_051_576,
    "kat_base_patch16_224": 86_568_568,
    "flash_kat_tiny_swish_patch16_224": 5_718_328,
    "kat_tiny_gelu_patch16_224": 5_718_328,
    "kat_micro_patch4_32": 272_728,
    "vit_tiny_patch16_224": 5_717_416,
}


def micro(name="kat_micro_patch8_32", **kwargs):
    return timm.create_model(name, **{"num_classes": 10, **kwargs})


def test_every_documented_name_exists():
    for size in ("tiny", "small", "base"):
        for act in ("", "_gelu", "_swish"):
            for family in ("kat", "flash_kat"):
                assert f"{family}_{size}{act}_patch16_224" in OURS
    assert {
        "kat_micro_patch4_32",
        "kat_micro_patch8_32",
        "vit_micro_patch4_32",
        "kat_tiny_distilled_patch16_224",
    } <= set(OURS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def published_names():
    """The 200 tensors of the published KAT-T: timm's ViT and four rational tensors a block."""
    block = {
        "norm1.weight": (192,),
        "norm1.bias": (192,),
        "attn.qkv.weight": (576, 192),
        "attn.qkv.bias": (576,),
        "attn.proj.weight": (192, 192),
        "attn.proj.bias": (192,),
        "norm2.weight": (192,),
        "norm2.bias": (192,),
        "mlp.fc1.weight": (768, 192),
        "mlp.fc1.bias": (768,),
        "mlp.fc2.weight": (192, 768),
        "mlp.fc2.bias": (192,),
        "mlp.act1.weight_numerator": (1, 6),
        "mlp.act1.weight_denominator": (8, 4),
        "mlp.act2.weight_numerator": (1, 6),
        "mlp.act2.weight_denominator": (8, 4),
    }
    rest = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "norm.weight": (192,),
        "norm.bias": (192,),
        "head.weight": (1000, 192),
        "head.bias": (1000,),
    }
    return rest | {f"blocks.{i}.{k}": v for i in range(12) for k, v in block.items()}


def test_kat_tiny_has_the_published_tensors():
    with torch.device("meta"):
        own = {k: tuple(v.shape) for k, v in timm.create_model("kat_tiny_patch16_224").state_dict().items()}
    assert len(own) == 200 and own == published_names()


@pytest.mark.parametrize("name", [n for n in OURS if "micro" in n])
def test_forward_backward_every_parameter(name):
    model = micro(name)
    outputs = model(torch.randn(4, 3, 32, 32))
    outputs.square().sum().backward()
    assert outputs.shape == (4, 10) and outputs.isfinite().all()
    for parameter_name, p in model.named_parameters():
        if not p.requires_grad and parameter_name.endswith("scale_base"):
            continue  # of the base function 0 in Kolmogorov-Arnold attention: its gradient is 0
        assert p.grad is not None and p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().sum() > 0 or "qkv.bias" in parameter_name, parameter_name
    for parameter_name, p in model.named_parameters():
        if parameter_name.endswith("weight_denominator"):  # b = 0 in act1: each denominator still gets a gradient
            assert (p.grad.abs().sum(1) > 0).all(), parameter_name


def test_model_is_the_formula_on_timm_s_vit():
    """kat_tiny against timm's own ViT whose MLPs are replaced by an independent statement of the formula, to 1e-5."""
    torch.manual_seed(3)
    kat = timm.create_model("kat_tiny_patch16_224", num_classes=7).eval()
    with torch.no_grad():
        for p in kat.parameters():
            p.add_(0.02 * torch.randn_like(p))
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    vit.load_state_dict(kat.state_dict(), strict=False)

    class Literal(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            for act, fc in ((self.mlp.act1, self.mlp.fc1), (self.mlp.act2, self.mlp.fc2)):
                x = fc(
                    rational_oracle(x.double(), act.weight_numerator.double(), act.weight_denominator.double()).float()
                )
            return x

    for own, reference in zip(kat.blocks, vit.blocks):
        reference.mlp = Literal(own.mlp)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(kat(images), vit(images), rtol=1e-5, atol=1e-5)


def test_flash_kat_options_and_weights_of_kat():
    kat = micro()
    flash = timm.create_model(
        "flash_kat_micro_swish_patch8_32", num_classes=10, m=6, n=4, num_groups=1, den_groups=8
    ).eval()
    flash.load_state_dict(kat.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(flash(images), kat.eval()(images))
    odd = timm.create_model("flash_kat_micro_patch8_32", m=4, n=3, num_groups=4, den_groups=-1)
    act = odd.blocks[0].mlp.act2
    assert act.weight_numerator.shape == (4, 4) and act.weight_denominator.shape == (256, 3)


def test_timm_features_keep_working():
    images = torch.randn(2, 3, 32, 32)
    model = micro()
    features = timm.create_model("kat_micro_patch8_32", features_only=True)(images)
    assert [f.shape for f in features] == [(2, 64, 4, 4)] * 3
    final, intermediates = model.forward_intermediates(images)
    assert final.shape == (2, 17, 64) and len(intermediates) == 4
    model.set_grad_checkpointing(True)
    model(images).sum().backward()
    grad = model.blocks[0].mlp.act1.weight_denominator.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(False)
    model(images).sum().backward()
    torch.testing.assert_close(grad, model.blocks[0].mlp.act1.weight_denominator.grad)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    dynamic = micro(dynamic_img_size=True)
    assert dynamic(torch.randn(2, 3, 48, 32)).shape == (2, 10)
    assert micro(img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    cfg = timm.create_model("kat_tiny_patch16_224", pretrained=False).pretrained_cfg
    assert cfg["hf_hub_id"] == "adamdad/kat_tiny_patch16_224" and cfg["crop_pct"] == 0.875
    assert timm.get_pretrained_cfg("kat_tiny_patch16_224.vitft").hf_hub_id == "adamdad/kat_tiny_patch16_224.vitft"


def test_pretrained_loads_a_file_through_timm(tmp_path):
    source = micro(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model(
        "kat_micro_patch8_32", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")}
    )
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_distilled_model_has_two_heads_in_training():
    model = micro("kat_micro_distilled_patch8_32")
    model.set_distilled_training(True)
    outputs = model.train()(torch.randn(2, 3, 32, 32))
    assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, 10)] * 2
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "preset, gain",
    [("identity", 1.0), ("swish", 2.8178), ("relu", 2.0), ("gelu", 2.3568), ("geglu", 0.7112), ("swishglu", 0.8434)],
)
def test_variance_gain(preset, gain):
    assert variance_gain(GroupRational(mode=preset)) == pytest.approx(gain, rel=0.03 if preset == "relu" else 0.01)


def test_initialisations():
    released = timm.create_model("kat_tiny_patch16_224")
    paper = timm.create_model("kat_tiny_patch16_224", weight_init="variance_preserving")
    for model, std1, std2 in ((released, 0.02, 0.02), (paper, 0.0722, 0.0606)):
        mlp = model.blocks[5].mlp
        assert mlp.fc1.weight.std().item() == pytest.approx(
            std1, rel=0.02
        ) and mlp.fc2.weight.std().item() == pytest.approx(std2, rel=0.02)
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    attn = paper.blocks[3].attn
    value_proj = attn.proj.weight @ attn.qkv.weight[384:]
    assert value_proj.diagonal().mean().item() == pytest.approx(-0.4, abs=0.02)
    assert (value_proj - value_proj.diagonal().diag()).std().item() == pytest.approx(0.4 / 192**0.5, rel=0.05)
    query, key = attn.qkv.weight[:64], attn.qkv.weight[192:256]
    assert (query.T @ key).diagonal().mean() > 0.2  # the best rank-64 part of 0.7 Z + 0.7 I
    with pytest.raises(ValueError, match="unknown weight_init 'kaiming'.*released"):
        micro(weight_init="kaiming")


def test_nothing_of_torch_is_replaced():
    assert torch.nn.init.calculate_gain("relu") == 2**0.5
    with pytest.raises(ValueError):
        torch.nn.init.calculate_gain("swish")


def test_variance_is_preserved_through_the_mlp():
    mlp = GRKANMlp(192, 768)
    mlp.init_variance_preserving()
    assert mlp(torch.randn(4096, 192)).var().item() == pytest.approx(1.0, rel=0.1)
    assert rational(torch.ones(1, 8), mlp.act1.weight_numerator, mlp.act1.weight_denominator).tolist() == [[1.0] * 8]


def test_slots_are_timm_s():
    model = micro()
    assert isinstance(model.blocks[0].attn, Attention) and isinstance(model.blocks[0].mlp, GRKANMlp)
    assert list(model.blocks[0].mlp.state_dict())[:2] == ["act1.weight_numerator", "act1.weight_denominator"]
