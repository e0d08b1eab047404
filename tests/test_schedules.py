"""Every epoch's learning rate against torch's schedulers chained by hand, and against the closed forms."""
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, StepLR

from schedules import SCHEDULES, make_schedule


def sgd(lr=1e-3):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(optimizer, schedule, epochs):
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def ours(name, epochs, **settings):
    optimizer = sgd()
    return rates(optimizer, make_schedule(name, optimizer, epochs, **settings), epochs)


@pytest.mark.parametrize("epochs, warmup", [(60, 10), (50, 10), (6, 1), (4, 0)])
def test_warmup_cosine_is_linear_then_cosine(epochs, warmup):
    seen = ours("warmup_cosine", epochs, warmup_epochs=warmup, start_factor=0.1, lr_min=1e-5)
    linear, cosine = sgd(), sgd()
    by_hand = rates(linear, LinearLR(linear, 0.1, total_iters=max(warmup, 1)), warmup)
    by_hand += rates(cosine, CosineAnnealingLR(cosine, epochs - warmup, 1e-5), epochs - warmup)
    assert seen == pytest.approx(by_hand, rel=1e-9)
    for epoch, lr in enumerate(seen):
        t = (epoch - warmup) / (epochs - warmup)
        closed = (1e-3 * (0.1 + 0.9 * epoch / warmup) if epoch < warmup else
                  1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * t)) / 2)
        assert lr == pytest.approx(closed, rel=1e-6)
    assert max(seen) == seen[warmup] == pytest.approx(1e-3)


def test_cosine_step_and_constant():
    assert ours("cosine", 40, lr_min=1e-6) == pytest.approx(
        [1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * t / 40)) / 2 for t in range(40)])
    assert ours("step", 40, step_size=7, gamma=0.3) == pytest.approx([1e-3 * 0.3 ** (t // 7) for t in range(40)])
    optimizer = sgd()
    assert ours("step", 40, step_size=7, gamma=0.3) == rates(optimizer, StepLR(optimizer, 7, 0.3), 40)
    assert ours("constant", 40) == [1e-3] * 40


@pytest.mark.parametrize("epochs, batches", [(5, 40), (60, 10)])
def test_onecycle_is_a_triangle_over_all_batches(epochs, batches):
    steps = epochs * batches
    optimizer = sgd()
    schedule = make_schedule("onecycle", optimizer, epochs, lr_min=1e-5, start_factor=0.1, batches=batches)
    top = steps / 4 - 1
    for step, lr in enumerate(rates(optimizer, schedule, steps)):
        t = step / top if step <= top else (step - top) / (steps - 1 - top)
        low = 1e-4 if step <= top else 1e-5
        assert lr == pytest.approx(low + (1e-3 - low) * (t if step <= top else 1 - t), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_onecycle_of_a_few_batches_goes_down_evenly(steps):
    optimizer = sgd()
    seen = rates(optimizer, make_schedule("onecycle", optimizer, 1, lr_min=1e-5, batches=steps), steps)
    assert seen == pytest.approx([1e-3 - (1e-3 - 1e-5) * (step + 1) / steps for step in range(steps)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_restored_schedule_goes_on_exactly(name):
    whole = ours(name, 20, warmup_epochs=5)
    optimizer = sgd()
    schedule = make_schedule(name, optimizer, 20, warmup_epochs=5)
    first = rates(optimizer, schedule, 8)
    saved = optimizer.state_dict(), schedule.state_dict()
    optimizer = sgd()
    schedule = make_schedule(name, optimizer, 20, warmup_epochs=5)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert first + rates(optimizer, schedule, 12) == whole


def test_an_unknown_name():
    with pytest.raises(ValueError, match="warmup_cosine"):
        make_schedule("none such", sgd(), 10)
