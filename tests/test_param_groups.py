"""Parameter groups of the optimizer, the learning rate of operators, and gradient norms by kind of parameter."""

import json

import pytest
import timm
import torch

import engine
from model_factory import freeze_all_but_attention
from param_groups import GradNorms, kind, optimizer_groups
from tests.kan_helpers import NAME, TRAIN
from tests.test_main import call, log


def test_groups_of_the_optimizer_and_kinds_of_parameters():
    model = timm.create_model("kat_micro_patch8_32_karat", num_classes=10, output_scale="learned")
    names = {id(p): name for name, p in model.named_parameters()}
    plain, decayed, of_operators, operators_decayed = optimizer_groups(model, 0.1, False, karat_lr_scale=0.5)
    assert [group["weight_decay"] for group in (plain, decayed, of_operators, operators_decayed)] == [0, 0.1, 0, 0.1]
    assert [group.get("lr_scale") for group in (plain, decayed, of_operators, operators_decayed)] == [
        None,
        None,
        0.5,
        0.5,
    ]
    assert {names[id(p)].split("operator.")[1] for p in of_operators["params"]} == {
        "output_scale",
        "layers.0.coefficients",
        "layers.0.scale_basis",
    }
    assert {names[id(p)].split("operator.")[1] for p in operators_decayed["params"]} == {"project_out"}
    assert not [
        names[id(p)]
        for p in decayed["params"]
        if kind(names[id(p)]) in ("karat", "kan", "embed_norm") and "proj.weight" not in names[id(p)]
    ]
    every = {
        names[id(p)] for group in optimizer_groups(model, 0.1, True) if group["weight_decay"] for p in group["params"]
    }
    assert {"blocks.0.attn.operator.layers.0.coefficients", "blocks.0.mlp.act1.weight_numerator"} <= every
    groups = {}
    for name, _ in model.named_parameters():
        groups.setdefault(kind(name), set()).add(name)
    assert list(groups) == ["embed_norm", "attention", "karat", "kan", "mlp", "head"]
    assert {name.split(".", 2)[-1] for name in groups["attention"]} == {
        f"attn.{layer}.{what}" for layer in ("qkv", "proj") for what in ("weight", "bias")
    }


def test_gradient_norms_against_their_statement():
    model = timm.create_model("kat_micro_patch8_32_karat", num_classes=10)
    norms = GradNorms(model)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        norms.update()
    expected = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            expected[kind(name)] = expected.get(kind(name), 0) + p.grad.double().square().sum().item()
    assert norms.last() == {key: pytest.approx(value**0.5, rel=1e-5) for key, value in expected.items()}
    mean = norms.mean()
    model.head.weight.grad.fill_(float("inf"))
    norms.update()
    assert norms.last()["head"] == float("inf") and norms.mean() == mean
    norms.reset()
    assert set(norms.mean().values()) == {0.0}


@pytest.mark.parametrize("universal", [False, True])
def test_attn_only_trains_operators(universal):
    model = timm.create_model(NAME, universal=universal)
    freeze_all_but_attention(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.endswith("scale_base") or name in trained for name, _ in model.named_parameters() if kind(name) == "karat"
    )
    assert (
        not any(name.endswith("scale_base") or ".mlp." in name for name in trained)
        and {"pos_embed", "head.weight"} <= trained
    )


def test_training_with_a_rate_of_the_operators_and_logged_norms_and_resumed_without_flags(tmp_path, capfd):
    flags = """--universal --grid 2 --basis-type SplineBasis --modular-attn --modular-mode w1_phi2 --base-fn nn.SiLU
        --attn-lr 1e-2 --lr 1e-3 --clip-grad 1e-3 --log-grad-norms""".split()
    assert call(*TRAIN, *flags, "--epochs", "1", "--output-dir", tmp_path) == 0
    out = capfd.readouterr().out
    assert "of the operators 0.000390625" in out and "grad norms karat" in out
    entry = log(tmp_path)[0]
    norms = {key: value for key, value in entry.items() if key.startswith("grad_norm_")}
    assert list(norms) == [f"grad_norm_{kind}" for kind in ("karat", "head", "attention", "mlp", "embed_norm")] and all(
        v > 1e-3 for v in norms.values()
    )
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert [name for name in state["model"] if "project_in" in name] == ["karat.project_in"]
    assert [group.get("lr_scale", 1.0) for group in state["optimizer"]["param_groups"]] == [
        1.0,
        1.0,
        pytest.approx(10),
        pytest.approx(10),
    ]
    assert {group["initial_lr"] for group in state["optimizer"]["param_groups"]} == {1e-3 * 20 / 512}
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--device", "cpu") == 0
    assert f"Acc@1 {entry['test_acc1']:.3f}" in capfd.readouterr().out
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "2", "--device", "cpu") == 0
    assert [set(e) for e in log(tmp_path)] == [set(entry)] * 2
    assert json.loads((tmp_path / "args.json").read_text())["args"]["model_options"]["universal"] is True
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "3", "--blockwise", "--device", "cpu") == 2
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--base-fn", "nn.ReLU", "--device", "cpu") == 2
    error = capfd.readouterr().err
    assert "the model of the checkpoint has universal=True, not False: drop that option" in error
    assert "the model of the checkpoint has base_fn=nn.SiLU, not nn.ReLU: drop that option" in error
    # The model of the file, with all its options.
    assert call("--finetune", tmp_path / "checkpoint.pth", "--epochs", "0", "--device", "cpu") == 0
    assert "keep their initial values" not in capfd.readouterr().out


@pytest.mark.parametrize("schedule, ratio", [("cosine", 0.0), ("cosine", 0.1), ("plateau", 3.0), ("none", 0.1)])
def test_rate_of_the_operators_keeps_its_proportion(schedule, ratio, tmp_path, monkeypatch):
    """Also where both reach --min-lr; at 0 they stay as they are."""
    seen, start, update = [], {}, engine._update

    def watched(run, args):
        named = [(name, p) for name, p in run.model.named_parameters() if kind(name) == "karat" and p.requires_grad]
        start.update({} if start else {name: (p, p.detach().clone()) for name, p in named})
        update(run, args)
        seen.append([group["lr"] for group in run.optimizer.param_groups])

    monkeypatch.setattr(engine, "_update", watched)
    run = f"""--epochs 4 --warmup-epochs 1 --sched {schedule} --lr 1e-2 --unscale-lr --min-lr 1e-3
        --attn-lr {0.01 * ratio}"""
    assert call(*TRAIN, *run.split(), "--output-dir", tmp_path) == 0
    assert len({rates[0] for rates in seen}) == {"cosine": 4, "plateau": 2, "none": 1}[schedule]
    for main_rate, _, *rates in seen:
        assert rates and rates == pytest.approx([main_rate * ratio] * len(rates))
    assert {torch.equal(p, before) for p, before in start.values()} == {ratio == 0}
