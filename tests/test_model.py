"""The network against the handout's description, and where dropout acts."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CNN, Dropout, add_branches, fold


def handout(state, x):
    """The handout's forward pass in evaluation mode, layer by layer from the state dict; the maps and the logits."""
    maps = []
    for n in range(1, 6):
        x = F.conv2d(x, state[f"conv{n}.weight"], state[f"conv{n}.bias"], padding="same")
        if n < 5:
            mean, var = state[f"bn{n}.running_mean"], state[f"bn{n}.running_var"]
            x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
            x = x * state[f"bn{n}.weight"].view(-1, 1, 1) + state[f"bn{n}.bias"].view(-1, 1, 1)
            x = x.clamp(min=0)
        maps.append(x)
        if n in (2, 3, 4):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    return x.flatten(2).mean(2) @ state["fc.weight"].T + state["fc.bias"], maps


def test_parameters_names_and_initial_weights():
    net = CNN()
    assert sum(p.numel() for p in net.parameters()) == 95_882
    assert [name for name, _ in net.named_children() if not name.startswith("drop")] == [
        "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv4", "bn4", "conv5", "fc"]
    assert net.conv1.kernel_size == (7, 7) and net.conv5.kernel_size == (3, 3)
    for layer in (net.conv1, net.conv2, net.conv3, net.conv4, net.conv5, net.fc):
        assert (layer.bias == 0).all()
        fan_in = layer.weight[0].numel()
        assert abs(layer.weight.std().item() / (2 / fan_in) ** 0.5 - 1) < 0.12


@pytest.mark.parametrize("size", [(40, 40), (24, 32), (8, 8)])
def test_forward_is_the_handouts(size):
    net = CNN().train()
    net(torch.randn(16, 3, *size))  # running statistics other than 0 and 1
    net.eval()
    x = torch.randn(4, 3, *size)
    logits, maps = net(x, return_maps=True)
    expected_logits, expected_maps = handout(net.state_dict(), x)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(x), logits)
    for ours, expected in zip(maps, expected_maps):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all((m >= 0).all() for m in maps[:4]) and (maps[4] < 0).any()


def test_a_plain_state_dict_loads_whatever_the_dropout():
    state = CNN(0).state_dict()
    assert not any("drop" in key for key in state)
    CNN(5, 0.2).load_state_dict(state)


@pytest.mark.parametrize("dropout_last", range(6))
def test_dropout_acts_after_the_last_n_blocks(dropout_last):
    """What enters each next layer: the ReLU's map with zeros at the chosen places only, survivors scaled by 1/(1-p),
    then the pool."""
    net = CNN(dropout_last, 0.5).train()
    x, seen, entered = torch.randn(4, 3, 40, 40), {}, {}
    for n in range(1, 6):
        getattr(net, f"drop{n}").register_forward_hook(lambda _, inputs, output, n=n: seen.update({n: (inputs[0], output)}))
        getattr(net, f"conv{n}").register_forward_pre_hook(lambda _, inputs, n=n: entered.update({n: inputs[0].clone()}))
    logits, maps = net(x, return_maps=True)
    for n in range(1, 6):
        before, after = seen[n]
        assert torch.equal(before.relu() if n < 5 else before, maps[n - 1])  # at full size: before the pool
        factor = torch.where(before == 0, 1, after / before)
        if n > 5 - dropout_last:
            factors = factor[before != 0]
            torch.testing.assert_close(factors, 2.0 * (factors != 0))
            assert abs((factors == 0).double().mean().item() - 0.5) < 0.03
        else:
            assert torch.equal(before, after)
        dropped = maps[n - 1] * factor  # after the ReLU (or conv5)
        if n < 5:
            torch.testing.assert_close(entered[n + 1], dropped if n == 1 else F.max_pool2d(dropped, 2))
        else:
            torch.testing.assert_close(logits, net.fc(dropped.mean((2, 3))))
    assert sum(isinstance(layer, nn.Dropout) for layer in net.modules()) == dropout_last


def test_the_biases_that_are_not_trained_have_no_gradient():
    net = CNN(0).double().train()
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    for p in net.parameters():
        p.requires_grad_(True)
    F.cross_entropy(net(torch.randn(8, 3, 40, 40).double()), torch.arange(8)).backward()
    assert frozen == {name for name, p in net.named_parameters() if p.grad.abs().max() < 1e-12}
    assert frozen == {"conv1.bias", "conv2.bias", "conv3.bias", "conv4.bias"}


def test_autocast_stays_in_bfloat16_through_dropout():
    net, seen = CNN(5, 0.1).train(), []
    for n in range(1, 6):
        getattr(net, f"drop{n}").register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 3, 40, 40))
    assert seen == 5 * [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.37, 1.0])
def test_dropout_is_torchs(p):
    """Share, scale, gradient and independence of nn.Dropout, whose mask only is drawn in another way."""
    x = torch.randn(40, 12, 13, 11).to(memory_format=torch.channels_last).requires_grad_()
    ours = Dropout(p)(x)
    kept = ours != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    torch.testing.assert_close(ours, F.dropout(x, p) * 0 + x * kept / (1 - p if p < 1 else 1))
    ours.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p if p < 1 else 1) * torch.ones_like(x))
    if 0.01 < p < 1:
        flat = kept.permute(0, 2, 3, 1).reshape(40, -1).double()
        assert torch.corrcoef(flat).sub(torch.eye(40)).abs().max() < 5 / flat.shape[1] ** 0.5  # each image its own
        for lag in (1, 2, 3, 4):  # the values of one draw are independent
            a, b = flat[:, :-lag].flatten() - (1 - p), flat[:, lag:].flatten() - (1 - p)
            assert abs((a * b).mean().item()) / (p * (1 - p)) < 5 / a.numel() ** 0.5
    assert Dropout(p)(x).dtype == torch.float32 and Dropout(p).eval()(x) is x


def test_evaluation_mode_has_no_dropout():
    net, x = CNN(5, 0.5).eval(), torch.randn(2, 3, 40, 40)
    assert torch.equal(net(x), net(x))


def normed(x, norm):
    """Batch norm in training mode, by hand."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def test_branches_train_beside_their_convolutions_and_fold_into_the_plain_network():
    net = add_branches(CNN(0)).train()
    for _ in range(2):  # weights of the batch norms, and running statistics, other than 1 and 0
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.normal_(layer.bias)
        net(torch.randn(16, 3, 40, 40))
    inputs = {}
    for n in range(1, 5):
        getattr(net, f"conv{n}").register_forward_hook(lambda _, x, z, n=n: inputs.update({n: (x[0].clone(), z.clone())}))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net(torch.randn(8, 3, 40, 40))
    for n, (x, z) in inputs.items():
        block = getattr(net, f"conv{n}")
        wide = F.conv2d(x, block.conv.weight, padding="same")
        point = torch.einsum("oi,nihw->nohw", block.conv1x1.weight[:, :, 0, 0], x)
        torch.testing.assert_close(z, normed(wide, block.norm) + normed(point, block.norm1x1), rtol=1e-3, atol=1e-3)

    net.load_state_dict(before)
    net.eval()
    plain, x = fold(net).eval(), torch.randn(4, 3, 40, 40)
    assert {key: value.shape for key, value in plain.state_dict().items()} == {
        key: value.shape for key, value in CNN().state_dict().items()}
    logits, maps = net(x, return_maps=True)
    expected_logits, expected_maps = handout(plain.state_dict(), x)
    for ours, expected in zip([logits, *maps], [expected_logits, *expected_maps]):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert fold(plain) is plain


@pytest.mark.parametrize("arguments", [(6, 0.1), (-1, 0.1), (3, 1.5)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        CNN(*arguments)
