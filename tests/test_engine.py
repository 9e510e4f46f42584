import copy
import re
import types

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from engine import NonFiniteLoss, Training, _accumulation_window, evaluate, train_one_epoch
from losses import DistillationLoss
from samplers import ExactEvalBatchSampler
from utils import World

ALONE = World(0, 1, torch.device("cpu"))
ARGS = types.SimpleNamespace(
    train_mode=True, bce_loss=False, cosub=False, grad_accum_steps=1, print_freq=2, clip_grad=None, clip_mode="norm"
)


def args(**changes):
    return types.SimpleNamespace(**{**vars(ARGS), **changes})


def training(model, criterion=None, lr=0.1, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Training(
        model,
        model,
        criterion or nn.CrossEntropyLoss(),
        optimizer,
        None,
        torch.amp.GradScaler("cpu", enabled=False),
        num_classes=3,
        amp="off",
        **kwargs,
    )


def batches(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=g), torch.randint(3, (size,), generator=g)) for _ in range(n)]


def test_accumulated_batches_are_one_large_batch():
    small, large = nn.Linear(4, 3), nn.Linear(4, 3)
    large.load_state_dict(small.state_dict())
    parts = batches(4, 2)
    whole = [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))]
    run, reference = training(small), training(large)
    stats, _ = train_one_epoch(run, parts, 0, 1, args(grad_accum_steps=4), ALONE)
    want, _ = train_one_epoch(reference, whole, 0, 1, args(), ALONE)
    torch.testing.assert_close(small.weight, large.weight)
    assert run.updates == 1 and stats["train_loss"] == pytest.approx(want["train_loss"], rel=1e-6)


def test_last_accumulation_window_is_shorter():
    assert [_accumulation_window(s, 5, 2) for s in range(5)] == [2, 2, 2, 2, 1]
    run = training(nn.Linear(4, 3))
    train_one_epoch(run, batches(5, 2), 0, 1, args(grad_accum_steps=2), ALONE)
    assert run.updates == 3


def test_loss_is_averaged_over_images_not_batches():
    model = nn.Linear(4, 3)
    uneven = batches(2, 6) + batches(1, 1, seed=1)
    stats, _ = train_one_epoch(training(model, lr=0.0), uneven, 0, 1, args(), ALONE)
    x, y = torch.cat([x for x, _ in uneven]), torch.cat([y for _, y in uneven])
    assert stats["train_loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-6)


def test_log_lines_show_the_loss_since_the_last_one_and_of_the_epoch(capsys):
    class Criterion(nn.Module):
        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return outputs.mean() * 0 + self.calls

    train_one_epoch(training(nn.Linear(4, 3), Criterion()), batches(4, 2) + batches(1, 6), 0, 1, args(), ALONE)
    assert re.findall(r"loss [^ ]+ \(mean [^ ]+\)", capsys.readouterr().out) == [
        "loss 1.5000 (mean 1.5000)",
        "loss 3.5000 (mean 2.5000)",
        "loss 5.0000 (mean 3.5714)",
    ]


@pytest.mark.parametrize("bad_step", [0, 3, 6])
def test_nan_is_reported_with_its_step(bad_step):
    class Criterion(nn.Module):
        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return outputs.mean() * (float("nan") if self.calls == bad_step + 1 else 1.0)

    with pytest.raises(NonFiniteLoss, match=rf"epoch 3: rank 0 at step {bad_step + 1}$"):
        train_one_epoch(training(nn.Linear(4, 3), Criterion()), batches(7, 2), 2, 5, args(print_freq=4), ALONE)


def test_schedule_on_updates_is_a_function_of_the_update():
    model = nn.Linear(4, 3)
    run = training(model)
    run.scheduler, _ = create_scheduler_v2(
        run.optimizer, "cosine", num_epochs=2, warmup_epochs=1, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=4
    )
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for epoch in range(2):
        train_one_epoch(run, batches(4, 2), epoch, 2, args(), ALONE)
    assert (
        seen[:4] == pytest.approx([0, 0.025, 0.05, 0.075])
        and seen[4] == pytest.approx(0.05)
        and seen[7] < seen[6] < seen[5]
    )


def test_evaluate_counts_every_image_once():
    class Table(nn.Module):
        def forward(self, x):
            return x

    logits = torch.eye(7)[:, :7] * 5
    targets = torch.tensor([0, 1, 2, 3, 4, 6, 5])
    loader = [(logits[:4], targets[:4]), (logits[4:5], targets[4:5]), (logits[5:], targets[5:])]
    result = evaluate({"raw": Table()}, loader, "off", ALONE)["raw"]
    assert result["images"] == 7 and result["acc1"] == pytest.approx(500 / 7)
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    two = evaluate({"raw": Table()}, [(logits[:2, :2], targets[:2])], "off", ALONE)["raw"]
    assert two["acc5"] == 100


def test_models_evaluated_together_get_the_figures_they_get_alone():
    models = {name: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5)) for name in ("raw", "EMA", "third")}
    data = batches(3, 8) + batches(1, 5, seed=1)
    together = evaluate(models, iter(data), "off", ALONE)  # one pass: an iterator has no second
    assert together == {name: evaluate({name: model}, data, "off", ALONE)[name] for name, model in models.items()}
    assert list(together) == list(models) and len({result["loss"] for result in together.values()}) == 3
    assert not any(model.training for model in models.values())


def test_compiled_models_share_one_graph_for_every_batch_and_evaluation():
    models = {name: nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Dropout(0.5)) for name in ("raw", "EMA")}
    data = [(torch.randn(4), i % 9) for i in range(22)]
    loader = DataLoader(data, batch_sampler=ExactEvalBatchSampler(22, 8))  # 8, 8 and 6 images
    torch.compiler.reset()
    counters.clear()
    for _ in range(2):
        got = evaluate(models, loader, "off", ALONE, compiled=True)
        for name, want in evaluate(models, loader, "off", ALONE).items():
            assert got[name] == pytest.approx(want, rel=1e-6)
        models["EMA"] = copy.deepcopy(models["EMA"])  # as with --model-ema-force-cpu
        models["raw"][0].weight.data += 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind):
    teacher = nn.Linear(4, 3)
    base = nn.CrossEntropyLoss()
    criterion = DistillationLoss(base, teacher, kind, alpha=0.3, tau=2.0)
    images, y = batches(1, 5)[0]
    student = torch.randn(5, 3, requires_grad=True)
    t = teacher(images)
    if kind == "hard":
        distance = base(student, t.argmax(1))
    else:
        p, q = (t / 2).softmax(1), (student / 2).softmax(1)
        distance = 4 * (p * (p.log() - q.log())).sum() / 5
    assert criterion(images, student, y).item() == pytest.approx(
        (0.7 * base(student, y) + 0.3 * distance).item(), rel=1e-5
    )
    heads = (torch.randn(5, 3), student)
    assert criterion(images, heads, y).item() == pytest.approx(
        (0.7 * base(heads[0], y) + 0.3 * distance).item(), rel=1e-5
    )
    criterion.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
