"""The report's CNN: five convolutions, four batch norms, one linear layer; 95,882 parameters.

    conv1-bn1-ReLU, conv2-bn2-ReLU-pool, conv3-bn3-ReLU-pool, conv4-bn4-ReLU-pool, conv5, average, fc

    python model.py        prints the layers and the number of parameters
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


class Dropout(nn.Dropout):
    """nn.Dropout for [N,C,H,W], with a faster mask on the CPU, where its `bernoulli_` takes a tenth of a training step.

    One 64-bit draw decides four values by 16 bits each, so p is exact to 1/65536.
    """

    def forward(self, x):
        if not (self.training and x.device.type == "cpu" and 1e-5 < self.p < 0.999):
            return super().forward(x)
        n, c, h, w = x.shape
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = round(self.p * 2**16) - 2**15  # from this value on, of -2**15 to 2**15 - 1
        keep = bits[:x.numel()].clamp_(kept - 1, kept).sub_(kept - 1)  # 0 or 1; a comparison is slower
        return x * keep.view(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype).div_(1 - self.p)


class CNN(nn.Module):
    """[N,3,H,W] float images, H and W at least 8 (the composites are 40x40), to [N,10] logits.

    `dropout_last` (0 to 5) puts dropout with probability `dropout_p` after the last N convolutional blocks:
    after the ReLU, before the pool; for block 5 after conv5 (report, section 1.5). Raises ValueError outside
    these ranges. The layer names are the course handout's, so a plain state dict of its network loads.
    """

    def __init__(self, dropout_last=3, dropout_p=0.1):
        super().__init__()
        if dropout_last not in range(6):
            raise ValueError(f"dropout_last must be 0 to 5, not {dropout_last}")
        self.conv1 = nn.Conv2d(3, 16, 7, padding=3)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(48)
        self.conv4 = nn.Conv2d(48, 64, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(64)
        self.conv5 = nn.Conv2d(64, 80, 3, padding=1)
        self.fc = nn.Linear(80, 10)
        self.drop1, self.drop2, self.drop3, self.drop4, self.drop5 = (
            Dropout(dropout_p) if block > 5 - dropout_last else nn.Identity() for block in range(1, 6))

        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # fan-in
                nn.init.zeros_(layer.bias)
        # Batch norm takes any constant away, so the gradient of a bias before it is 0: no need to train it. A layer
        # that loses its batch norm needs its bias, and leaves this list.
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            layer.bias.requires_grad_(False)

    def forward(self, x, return_maps=False):
        """Logits; with `return_maps` also the five convolutional outputs that section 2.2 takes norms of:
        [N,16,H,W], [N,32,H,W], [N,48,H/2,W/2], [N,64,H/4,W/4] after ReLU, and conv5's raw [N,80,H/8,W/8]."""
        # Dropout and pool commute with the ReLU, which has a quarter left to do after the pool.
        map1 = F.relu(self.bn1(self.conv1(x)), inplace=True)
        z2 = self.bn2(self.conv2(self.drop1(map1)))
        z3 = self.bn3(self.conv3(F.relu(F.max_pool2d(self.drop2(z2), 2), inplace=True)))
        z4 = self.bn4(self.conv4(F.relu(F.max_pool2d(self.drop3(z3), 2), inplace=True)))
        map5 = self.conv5(F.relu(F.max_pool2d(self.drop4(z4), 2), inplace=True))
        logits = self.fc(self.drop5(map5).mean((2, 3)))
        return (logits, [map1, F.relu(z2), F.relu(z3), F.relu(z4), map5]) if return_maps else logits


class Branched(nn.Module):
    """A convolution and its batch norm in training, with a 1x1 convolution and a batch norm of its own beside them; their two
    outputs are added. [N,in,H,W] to [N,out,H,W]. Structural re-parameterization (X. Ding et al., *RepVGG*, CVPR 2021): in
    evaluation all this is linear, so `folded` makes one convolution of it."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.conv1x1 = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        self.norm1x1 = nn.BatchNorm2d(conv.out_channels)
        nn.init.kaiming_normal_(self.conv1x1.weight, nonlinearity="relu")

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm1x1(self.conv1x1(x))

    @torch.no_grad()
    def folded(self):
        """The convolution, and a batch norm that changes nothing, that do the same in evaluation mode."""
        conv, norm = copy.deepcopy(self.conv), copy.deepcopy(self.norm)
        scale, scale1x1 = (n.weight / (n.running_var + n.eps).sqrt() for n in (self.norm, self.norm1x1))
        middle = conv.kernel_size[0] // 2
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.weight[:, :, middle, middle] += self.conv1x1.weight[:, :, 0, 0] * scale1x1[:, None]
        conv.bias.copy_(norm.bias + (conv.bias - norm.running_mean) * scale
                        + self.norm1x1.bias - self.norm1x1.running_mean * scale1x1)
        norm.reset_parameters()  # mean 0, variance 1, scale 1, shift 0
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        return conv, norm


def add_branches(model):
    """Make each convolution that a batch norm follows `Branched`, in place, for training. Returns the model."""
    for name, norm in list(model.named_children()):
        if isinstance(norm, nn.BatchNorm2d):
            conv = name.replace("bn", "conv")
            setattr(model, conv, Branched(getattr(model, conv), norm))
            setattr(model, name, nn.Identity())
    return model


def fold(model):
    """The plain CNN that does in evaluation mode what `model` does, which `add_branches` changed; else `model` itself."""
    branched = [name for name, layer in model.named_children() if isinstance(layer, Branched)]
    plain = copy.deepcopy(model) if branched else model
    for conv in branched:
        folded, norm = getattr(model, conv).folded()
        setattr(plain, conv, folded)
        setattr(plain, conv.replace("conv", "bn"), norm)
    return plain


if __name__ == "__main__":
    net = CNN()
    print(net)
    print("parameters", sum(p.numel() for p in net.parameters()))
