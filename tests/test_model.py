"""The report's network against the handout, and where dropout acts in whatever network model.py has."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CNN, Dropout


def handout(state, x, factors):
    """The handout's forward pass in evaluation mode, from a state dict; each block's map is multiplied by a
    factor, as dropout does. The logits, and the maps before that."""
    maps = []
    for n, factor in zip(range(1, 6), factors):
        x = F.conv2d(x, state[f"conv{n}.weight"], state[f"conv{n}.bias"], padding="same")
        if n < 5:
            norm = (state[f"bn{n}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
            x = F.batch_norm(x, *norm).clamp(min=0)
        maps.append(x)
        x = x * factor
        if n in (2, 3, 4):
            x = F.max_pool2d(x, 2)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"], maps


@pytest.mark.parametrize("height, width", [(40, 40), (24, 36), (8, 8)])
def test_the_reports_network_has_95882_parameters_and_is_the_handouts(height, width):
    """Layers, kernels, channels, forward pass, and each block's dropout after ReLU and before pool."""
    net = CNN(5, 0.5)
    assert sum(p.numel() for p in net.parameters()) == 95_882
    shapes = {f"conv{n}": (c, before, k, k) for n, c, before, k in (
        (1, 16, 3, 7), (2, 32, 16, 3), (3, 48, 32, 3), (4, 64, 48, 3), (5, 80, 64, 3))} | {"fc": (10, 80)}
    layers = dict(net.named_children())
    assert {name: layers[name].weight.shape for name in layers if name[:2] in ("co", "fc")} == shapes
    net.train()(torch.randn(16, 3, height, width))  # running statistics other than 0 and 1
    factors = [torch.rand(4, 1, 1, 1) + 0.5 for _ in range(5)]
    for n, factor in enumerate(factors, start=1):
        layers[f"drop{n}"].register_forward_hook(lambda _, inputs, output, factor=factor: inputs[0] * factor)
    x = torch.randn(4, 3, height, width)
    logits, maps = net.eval()(x, return_maps=True)
    expected, expected_maps = handout(net.state_dict(), x, factors)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init, axis", [("fan_in", 0), ("fan_out", 1)])
def test_weights_start_kaiming_normal_and_biases_zero(init, axis):
    for layer in CNN(init=init).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert layer.bias is None or (layer.bias == 0).all()
            fan = layer.weight.select(axis, 0).numel()  # values that one output sums, or one input goes to
            error = (2 * layer.weight.numel()) ** -0.5  # relative standard error of a standard deviation
            assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=4 * error)


@pytest.mark.parametrize("n", range(6))
def test_dropout_acts_after_the_last_n_blocks_only(n):
    """In training mode, by what comes out of each dropout: what went in, or zeros and doubled values."""
    net, acted, sizes = CNN(n, 0.5).train(), [], []

    def look(_, inputs, output):
        if inputs[0].ndim < 4:
            return  # a dropout that somebody put before fc
        before, after = inputs[0][inputs[0] != 0], output[inputs[0] != 0]
        acted.append(not torch.equal(before, after))
        assert inputs[0].shape == sizes[-1]  # of the block's convolution: the pool comes later
        if acted[-1]:
            torch.testing.assert_close(after, 2 * before * (after != 0))
            assert abs((after == 0).double().mean().item() - 0.5) < 0.05
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape))
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(look)
    net(torch.randn(4, 3, 40, 40))
    assert acted == [False] * (len(acted) - n) + [True] * n and len(acted) >= 5


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.37, 1.0])
def test_dropout_is_torchs(p):
    """Share, scale, gradient and independence of nn.Dropout, whose mask only is drawn in another way."""
    x = torch.randn(40, 12, 13, 11).to(memory_format=torch.channels_last).requires_grad_()
    ours, scale = Dropout(p)(x), 1 / (1 - p) if p < 1 else 1
    kept = ours != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    torch.testing.assert_close(ours, x * kept * scale)
    assert Dropout(p)(x.bfloat16()).dtype == torch.bfloat16  # as autocast hands it on
    ours.sum().backward()
    torch.testing.assert_close(x.grad, kept * torch.full_like(x, scale))
    if 0.01 < p < 1:
        flat = kept.permute(0, 2, 3, 1).reshape(40, -1).double()
        correlations = torch.corrcoef(flat) - torch.eye(40)
        assert correlations.abs().max() < 5 / flat.shape[1] ** 0.5  # each image its own
        for lag in (1, 2, 3, 4):  # the values of one draw are independent
            a, b = flat[:, :-lag].flatten() - (1 - p), flat[:, lag:].flatten() - (1 - p)
            assert abs((a * b).mean().item()) / (p * (1 - p)) < 5 / a.numel() ** 0.5
    assert Dropout(p).eval()(x) is x
