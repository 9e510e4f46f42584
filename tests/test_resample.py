import pytest
import timm
import torch
from karat_oracle import BASES, STAGES, basis, operator
from torch.nn import functional as F

import models  # noqa: F401
from models.operator import KArAtOperator
from models.resample import resample_operator_state


def micro(**kwargs):
    return timm.create_model("vit_micro_patch4_32_karat", num_classes=10, **kwargs)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("options", STAGES, ids=lambda o: "-".join(map(str, o.values())))
def test_resampling_keeps_the_sums_of_a_constant_operator(name, options):
    """Functions and W that are the same for all tokens, constant scores and values: both token sums stay."""

    def constant(p, axis):
        return p.narrow(axis, 0, 1).expand(p.shape).clone()

    for mode, output_scale in (("bicubic", "1"), ("nearest", "sqrt")):
        old = operator(name, N=1 + 4 * 4, output_scale=output_scale, **options)
        with torch.no_grad():
            for p in old.parameters():
                for axis in (axis for axis in range(1, 3) if p.shape[axis] == 17):
                    p.copy_(constant(p, axis))
        for grid in ((6, 6), (3, 5)):
            N = 1 + grid[0] * grid[1]
            new = operator(name, N=N, output_scale=output_scale, **options)
            new.load_state_dict(resample_operator_state(old.state_dict(), 4, grid, 1, mode))
            score, value = torch.randn(1, 2, 1, 1, dtype=torch.float64), torch.randn(1, 2, 1, 3, dtype=torch.float64)
            with torch.no_grad():
                outputs = [
                    op.attend(score.expand(1, 2, n, n), value.expand(1, 2, n, 3))[:, :, 0]
                    for op, n in ((old, 17), (new, N))
                ]
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("options", STAGES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_patch_split_in_four_gives_the_same(name, options):
    parent = torch.cat(
        [
            torch.zeros(1, dtype=torch.long),
            1 + torch.arange(9).view(3, 3).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(),
        ]
    )
    old, new = operator(name, N=10, **options), operator(name, N=37, **options)
    new.load_state_dict(resample_operator_state(old.state_dict(), 3, 6, 1, "nearest"))
    scores, value = torch.randn(1, 2, 10, 10, dtype=torch.float64), torch.randn(1, 2, 10, 3, dtype=torch.float64)
    with torch.no_grad():
        want = old.attend(scores, value)[:, :, parent]
        torch.testing.assert_close(
            new.attend(scores[:, :, parent][..., parent], value[:, :, parent]), want, rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("universal", [False, True])
def test_resampled_model(universal):
    model = micro(universal=universal)
    state = model.state_dict()
    same = resample_operator_state(state, 8, (8, 8))
    assert same is not state and all(torch.equal(same[key], state[key]) for key in state)
    for size in (24, 48):
        grid = size // 4
        new = resample_operator_state(state, 8, grid)
        new["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], [grid, grid], [8, 8])
        other = micro(universal=universal, img_size=size)
        other.load_state_dict(new)
        assert other(torch.randn(2, 3, size, size)).isfinite().all()
    key = next(key for key in state if key.endswith("scale_basis"))
    assert torch.equal(new[key][..., 0], state[key][..., 0])  # the class token is neither interpolated nor scaled
    assert torch.equal(new["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])


def test_resampling_of_a_smooth_operator_and_smooth_scores():
    """Parameters, scores and values that vary slowly over the image: another grid samples the same integrals."""

    def field(grid, seed, *shape):  # a plane wave of low frequency at the patch centres, after one class token
        g = torch.Generator().manual_seed(seed)
        u = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        a, b, c = (torch.randn(*shape, 1, 1, generator=g, dtype=torch.float64) for _ in range(3))
        patches = (1 + a * torch.sin(2 * u[:, None] + b) * torch.cos(2 * u + c)).flatten(-2)
        return torch.cat([patches.mean(-1, keepdim=True), patches], -1)

    outputs = []
    for grid in (8, 12):
        new = KArAtOperator(1 + grid**2, 2, basis("fourier"), 3).double()
        if grid == 8:
            with torch.no_grad():
                new.project_out.copy_(field(8, 0, 2, 3).mT)
                new.layers[0].coefficients.copy_(field(8, 1, 2, 3, 4).mT)
            state = new.state_dict()
        new.load_state_dict(resample_operator_state(state, 8, grid))
        outputs.append(new.attend(field(grid, 2, 1, 2, 1), field(grid, 3, 1, 2, 5).mT))
    assert F.cosine_similarity(*(o.flatten() for o in outputs), 0) > 0.999
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05 * outputs[0].abs().max().item())


def test_resampling_errors():
    state = operator(N=17).state_dict()
    with pytest.raises(ValueError, match=r"project_out: expected 1 \+ 5 x 5 tokens, not 17"):
        resample_operator_state(state, 5, 6)
    with pytest.raises(ValueError, match="unknown mode 'area'"):
        resample_operator_state(state, 4, 6, mode="area")
