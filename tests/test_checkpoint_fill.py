"""Weights brought into models: all of them, or those that fit."""

import pytest
import timm
import torch

import models  # noqa: F401
from checkpoint import CheckpointError, read
from checkpoint.fill import load_all, load_matching
from tests.data_helpers import random_weights


def micro(name: str = "kat_micro_patch8_32", **kwargs):
    return timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()


def test_everything_that_does_not_fit_is_named():
    source = random_weights("vit_micro_patch8_32", num_classes=4, depth=3)
    model = micro(img_size=48, patch_size=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = load_matching(
        model, {**source, "extra.0.w": torch.zeros(2), "extra.1.w": torch.zeros(2), "extra.3.w": torch.zeros(1)}, "file"
    )
    assert lines[0] == "42 of 72 tensors taken from file"
    assert (
        lines[1]
        == "  resampled: pos_embed (1, 17, 64) -> (1, 145, 64), patch_embed.proj.weight (64, 3, 8, 8) -> (64, 3, 4, 4)"
    )
    assert lines[2] == "  of another shape, not loaded: head.weight (4, 64) -> (10, 64), head.bias (4,) -> (10,)"
    assert "blocks.{0-3}.mlp.act1.weight_numerator" in lines[3] and "blocks.3.attn.qkv.weight" in lines[3]
    assert lines[4] == "  not in the model, left out: extra.{0-1,3}.w"
    after = model.state_dict()
    for name, value in after.items():  # taken, or exactly as before
        expected = source[name] if name in source and source[name].shape == value.shape else before[name]
        assert torch.equal(value, expected) or name in ("pos_embed", "patch_embed.proj.weight"), name
    assert not torch.equal(after["pos_embed"], before["pos_embed"])


def test_weights_of_another_model_are_refused_by_finetuning():
    """The rationals and the classifier's bias of KAT-S fit KAT-T; that is not fine-tuning."""
    with pytest.raises(
        CheckpointError,
        match="file does not fit the model kat_micro_patch8_32: nothing was loaded, because the tensors that fit are "
        "314 of",
    ):
        load_matching(micro(), random_weights("kat_micro_patch8_32", embed_dim=96, num_classes=10), "file")


def test_weights_of_another_model_are_refused_whole():
    model, before = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    model.load_state_dict(before.state_dict())
    for found, sentence in (
        ({"weight": torch.ones(3, 2)}, "bias is missing"),
        ({**model.state_dict(), "x": torch.ones(1)}, "x is unknown"),
        ({"weight": torch.ones(4, 2), "bias": torch.ones(3)}, r"weight has shape \(4, 2\) instead of \(3, 2\)"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_all(model, found, "file")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize(
    "source, target",
    [
        ("kat_micro_distilled_patch8_32", "kat_micro_patch8_32"),
        ("kat_micro_patch8_32", "kat_micro_distilled_patch8_32"),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_distillation_tokens_come_and_go(source, target, size):
    state = random_weights(source, num_classes=10)
    model = micro(target, img_size=size)
    own = model.state_dict()["pos_embed"].clone()
    load_matching(model, state, "file")
    loaded, tokens = model.state_dict()["pos_embed"], model.num_prefix_tokens
    assert torch.equal(loaded[:, 0], state["pos_embed"][:, 0])
    if tokens == 2:
        assert torch.equal(loaded[:, 1], own[:, 1])
    if size == 32:
        assert torch.equal(loaded[:, tokens:], state["pos_embed"][:, 3 - tokens :])


def test_a_resampled_constant_stays_constant():
    state = random_weights("kat_micro_patch8_32", num_classes=10)
    state["pos_embed"][:, 1:] = torch.arange(64.0)
    model = micro(img_size=72)
    load_all(model, state, "file", resample=True)
    torch.testing.assert_close(model.pos_embed[:, 1:], torch.arange(64.0).expand(1, 81, 64))
    with pytest.raises(CheckpointError, match="pos_embed has shape"):
        load_all(micro(img_size=72), state, "file")


@pytest.mark.parametrize("size", [160, 224, 288])
def test_a_vit_becomes_a_kat_with_the_same_outputs(size):
    """fc, attention, norms and embeddings are taken, rational1 is the identity, rational2 a fit of GELU."""
    state = random_weights("vit_tiny_patch16_224")
    vit, kat = (
        timm.create_model(name, img_size=size).eval() for name in ("vit_tiny_patch16_224", "kat_tiny_gelu_patch16_224")
    )
    for model in (vit, kat):
        lines = load_matching(model, state, "vit")
    assert (
        lines[-1].startswith("  not in the file, keep their initial values: blocks.{0-11}.mlp.act1.weight_numerator, ")
        and "152 of 200" in lines[0]
    )
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours, theirs = kat(images), vit(images)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


VITS = {
    "plain": {},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "counted registers": {"reg_tokens": 4},
    "average": {"class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("source", VITS)
@pytest.mark.parametrize("target", VITS)
@pytest.mark.parametrize("size", [32, 48])
def test_positions_of_patches_find_their_place_whatever_stands_before_them(source, target, size):
    state = random_weights("vit_micro_patch8_32", num_classes=10, **VITS[source])
    model = micro("vit_micro_patch8_32", img_size=size, **VITS[target])
    before = model.pos_embed.detach().clone()
    if source == target:
        load_all(model, state, "file", resample=True)
    else:
        load_matching(model, state, "file")
    patches = (size // 8) ** 2
    first, theirs = model.pos_embed.shape[1] - patches, state["pos_embed"].shape[1] - 16
    assert torch.equal(model.pos_embed[:, : min(first, theirs)], state["pos_embed"][:, : min(first, theirs)])
    assert torch.equal(model.pos_embed[:, theirs:first], before[:, theirs:first])
    if size == 32:
        assert torch.equal(model.pos_embed[:, first:], state["pos_embed"][:, theirs:])
    else:
        torch.testing.assert_close(
            model.pos_embed[:, first:].mean(1), state["pos_embed"][:, theirs:].mean(1), atol=0.1, rtol=0
        )


def test_position_embeddings_that_make_no_sense_are_listed(tmp_path):
    for wrong in (torch.zeros(()), torch.zeros(5), torch.zeros(1, 12, 64)):
        state = {**random_weights("vit_micro_patch8_32", num_classes=10), "pos_embed": wrong}
        with pytest.raises(CheckpointError):
            load_all(micro("vit_micro_patch8_32"), state, "file", resample=True)
        assert any(
            "another shape, not loaded: pos_embed" in line
            for line in load_matching(micro("vit_micro_patch8_32"), state, "file")
        )
        torch.save(state, tmp_path / "file.pth")
        read(tmp_path / "file.pth")
