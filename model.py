"""The CNN of the course handout: five convolutions, four batch norms, one linear layer; 95,882 parameters.

    conv1-bn1-ReLU, conv2-bn2-ReLU-pool, conv3-bn3-ReLU-pool, conv4-bn4-ReLU-pool, conv5, average, fc

    python model.py        print the layers and the number of parameters
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class CNN(nn.Module):
    """Images, float [N,3,H,W] with H and W of at least 8, to logits, float [N,10].

    The last `dropout_last` of the five blocks have dropout with probability `dropout_p`, after the ReLU and
    before the pool; the fifth, which has neither, after its convolution (report, section 1.5). Weights start
    Kaiming normal, with the variance 2 / fan-in, or 2 / fan-out where `init` is "fan_out"; biases 0."""

    def __init__(self, dropout_last=0, dropout_p=0.1, init="fan_in"):
        super().__init__()
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
            Dropout(dropout_p if block > 5 - dropout_last else 0.0) for block in (1, 2, 3, 4, 5))

        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, mode=init, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x, return_maps=False):
        """With `return_maps`, also the list of the maps whose norms analyze.py takes (report, section 2.2):
        [N,16,H,W], [N,32,H,W], [N,48,H/2,W/2], [N,64,H/4,W/4] after ReLU, and conv5's [N,80,H/8,W/8]."""
        map1 = F.relu(self.bn1(self.conv1(x)))
        x = self.drop1(map1)
        map2 = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(self.drop2(map2), 2)
        map3 = F.relu(self.bn3(self.conv3(x)))
        x = F.max_pool2d(self.drop3(map3), 2)
        map4 = F.relu(self.bn4(self.conv4(x)))
        x = F.max_pool2d(self.drop4(map4), 2)
        map5 = self.conv5(x)
        x = self.drop5(map5).mean((2, 3))
        logits = self.fc(x)
        return (logits, [map1, map2, map3, map4, map5]) if return_maps else logits


class Dropout(nn.Dropout):
    """A faster nn.Dropout for [N,C,H,W] on a CPU: one random 64-bit number decides four values, so p is exact
    to 1/65536."""

    def forward(self, x):
        if not (self.training and x.device.type == "cpu" and x.ndim == 4 and 1e-5 < self.p < 0.999):
            return super().forward(x) if self.p else x
        n, c, h, w = x.shape
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        least = round(self.p * 2**16) - 2**15  # a value stays if its random 16-bit number is at least this
        keep = bits[:x.numel()].clamp_(least - 1, least).sub_(least - 1)  # 0 or 1; a comparison is slower
        return x * keep.view(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype).div_(1 - self.p)


if __name__ == "__main__":
    net = CNN()
    print(net)
    print("parameters", sum(p.numel() for p in net.parameters()))
