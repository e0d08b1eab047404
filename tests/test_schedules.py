"""The learning rates against torch's schedulers, the optimizers against torch's and a decomposition."""
import functools

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR, StepLR

import schedules
from schedules import Muon, learning_rate, make_optimizer, orthogonal, set_learning_rate


# ---------------------------------------------------------------- schedules
def sgd(lr=1e-3):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def stepped(optimizer, scheduler, steps):
    """The rates of `steps` steps under a scheduler of torch."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def ours(schedule, epochs, **settings):
    return [learning_rate(schedule, epoch, epochs, 1e-3, **settings) for epoch in range(epochs)]


def test_step_is_a_tenth_every_twenty_epochs_and_constant_is_constant():
    optimizer = sgd()
    assert ours("constant", 40) == [1e-3] * 40
    assert ours("step", 70) == pytest.approx(stepped(optimizer, StepLR(optimizer, 20, 0.1), 70))


@pytest.mark.parametrize("epochs", [1, 25, 60])
def test_cosine_is_torchs(epochs):
    optimizer = sgd()
    expected = stepped(optimizer, CosineAnnealingLR(optimizer, epochs, 1e-5), epochs)
    assert ours("cosine", epochs, lr_min=1e-5) == pytest.approx(expected)


@pytest.mark.parametrize("epochs, warmup", [(60, 10), (50, 5), (6, 1), (4, 3)])
def test_warmup_cosine_is_torchs_linear_then_cosine(epochs, warmup):
    optimizer = sgd()
    linear = LinearLR(optimizer, 0.1, total_iters=warmup)
    cosine = CosineAnnealingLR(optimizer, epochs - warmup, 1e-5)
    expected = stepped(optimizer, SequentialLR(optimizer, [linear, cosine], [warmup]), epochs)
    assert ours("warmup_cosine", epochs, lr_min=1e-5, warmup_epochs=warmup) == pytest.approx(expected)


def test_no_warmup_leaves_the_cosine():
    assert ours("warmup_cosine", 20, warmup_epochs=0) == ours("cosine", 20)


@pytest.mark.parametrize("epochs, batches", [(5, 40), (60, 10)])
def test_onecycle_is_torchs_to_within_a_batch(epochs, batches):
    """torch reaches the top and the end with the last batch before them, learning_rate right after it."""
    steps, optimizer = epochs * batches, sgd()
    scheduler = OneCycleLR(optimizer, 1e-3, total_steps=steps + 1, pct_start=0.25, anneal_strategy="linear",
                           div_factor=10, final_div_factor=10, cycle_momentum=False)
    expected = stepped(optimizer, scheduler, steps)
    up, down = 9e-4 / (steps / 4), 9.9e-4 / (steps * 3 / 4)  # a batch's change
    for step in range(steps):
        rate = learning_rate("onecycle", step / batches, epochs, 1e-3, 1e-5)
        assert abs(rate - expected[step]) <= (up if step <= steps / 4 else down) * 1.001
    assert learning_rate("onecycle", 0, epochs, 1e-3, 1e-5) == pytest.approx(1e-4)
    assert learning_rate("onecycle", epochs / 4, epochs, 1e-3, 1e-5) == pytest.approx(1e-3)
    assert learning_rate("onecycle", epochs, epochs, 1e-3, 1e-5) == pytest.approx(1e-5)


def test_an_unknown_schedule_is_told_the_known_ones():
    with pytest.raises(ValueError, match="warmup_cosine"):
        learning_rate("none such", 0, 10, 1e-3)


# ---------------------------------------------------------------- optimizers
@pytest.mark.parametrize("shape", [(4, 7), (16, 147), (80, 576), (10, 3)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonal(matrix) @ vt.T
    torch.testing.assert_close(values, values.diag().diag(), rtol=0, atol=2e-4)
    assert 0.6 < values.diag().min() and values.diag().max() < 1.25
    assert not orthogonal(torch.zeros(shape)).any()  # a filter that gets no gradient stays where it is


def test_muon_is_torchs_on_the_kernels_and_adamw_on_the_rest():
    """Three steps beside torch.optim.Muon (which rounds to bfloat16) on the flattened kernels, and AdamW."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 7), torch.nn.BatchNorm2d(16), torch.nn.Conv2d(16, 24, 3),
                              torch.nn.Linear(24, 10)).to(memory_format=torch.channels_last)
    settings = {"lr": 1e-2, "weight_decay": 0.5}
    start = [p.detach().clone().flatten(1) if p.ndim == 4 else p.detach().clone() for p in net.parameters()]
    flat = [p.clone() for p in start]
    kernels = [f for f, p in zip(flat, net.parameters()) if p.ndim == 4]
    others = [f for f, p in zip(flat, net.parameters()) if p.ndim != 4]
    expected = (torch.optim.Muon(kernels, adjust_lr_fn="match_rms_adamw", **settings),
                torch.optim.AdamW(others, **settings))
    muon = Muon(net.parameters(), fused=True, **settings)
    for _ in range(3):
        for p, f in zip(net.parameters(), flat):
            p.grad = torch.randn_like(p)
            f.grad = p.grad.reshape(f.shape).clone()
        for optimizer in (muon, *expected):
            optimizer.step()
    for p, f, s in zip(net.parameters(), flat, start):
        assert (p.detach().reshape(f.shape) - f).norm() / (f - s).norm() < (0.02 if p.ndim == 4 else 1e-5)


@pytest.mark.parametrize("kind, first, second", [
    (torch.optim.SGD, 0.75, 0.5125), (functools.partial(torch.optim.SGD, momentum=0.9), 0.75, 0.2875),
    (torch.optim.RMSprop, 0.0, None), (torch.optim.Adam, 0.9, None)])
def test_another_of_torchs_optimizers_is_one_entry_more(monkeypatch, kind, first, second):
    """From 1 with the gradient 2, lr 0.1 and a weight decay of 0.5. SGD: down by 0.1 * 2.5, then by
    0.1 * 2.375, with momentum by 0.9 * 0.25 more. RMSprop: by 0.1 * 2.5 over the root mean square, 0.1 * 2.5.
    Adam: by 0.1."""
    monkeypatch.setitem(schedules.OPTIMIZERS, "other", kind)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1)
    optimizer = make_optimizer("other", model, 0.1, weight_decay=0.5)
    for expected in (first, second):
        model.weight.grad = torch.full((1, 1), 2.0)
        optimizer.step()
        assert expected is None or model.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_set_learning_rate_decides_the_step_of_every_group(lr):
    """In place where the rate is a tensor, which a recorded step on a GPU reads from memory."""
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b]}], lr=lr, capturable=False, foreach=False)
    before = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()  # Adam's first step is lr long
    assert a.item() == pytest.approx(0.75) and b.item() == pytest.approx(0.75)
    assert not torch.is_tensor(lr) or optimizer.param_groups[0]["lr"] is before
