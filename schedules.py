"""The learning rate as a function of the epoch (report, section 1.4), and the optimizers (section 1.3).

    python schedules.py        print the learning rate of each schedule at each of 60 epochs
"""
import inspect
import math

import torch

SCHEDULES = ("constant", "step", "cosine", "warmup_cosine", "onecycle")
EVERY_BATCH = ("onecycle",)  # their rate changes with every batch; all others change once an epoch


def learning_rate(schedule, epoch, epochs, lr, lr_min=1e-5, warmup_epochs=10):
    """The learning rate after `epoch` of `epochs` epochs.

    `epoch` is 0 in the first epoch; the schedules of EVERY_BATCH get fractions. `lr` is the highest rate,
    `lr_min` the lowest of cosine, warmup_cosine and onecycle. Each formula is that of a class in
    torch.optim.lr_scheduler (onecycle: to within one batch). ValueError for an unknown name."""
    if schedule == "constant":  # ConstantLR with factor 1
        return lr
    if schedule == "step":  # StepLR; the report gives neither step nor factor: 20 epochs and 0.1 are ours
        return lr * 0.1 ** (epoch // 20)
    if schedule == "cosine":  # CosineAnnealingLR
        return cosine(epoch / epochs, lr, lr_min)
    if schedule == "warmup_cosine":  # SequentialLR: LinearLR from a tenth of lr, then CosineAnnealingLR
        if epoch < warmup_epochs:
            return line(epoch / warmup_epochs, 0.1 * lr, lr)
        return cosine((epoch - warmup_epochs) / (epochs - warmup_epochs), lr, lr_min)
    if schedule == "onecycle":  # OneCycleLR, linear: a quarter of the epochs up from a tenth of lr, then down
        top = epochs / 4
        if epoch < top:
            return line(epoch / top, 0.1 * lr, lr)
        return line((epoch - top) / (epochs - top), lr, lr_min)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule}")


def line(t, start, end):
    """From `start` to `end` in a straight line, while t goes from 0 to 1."""
    return start + (end - start) * t


def cosine(t, start, end):
    """From `start` to `end` along half a cosine, while t goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


# ---------------------------------------------------------------- optimizers
class Muon(torch.optim.AdamW):
    """AdamW, except for convolution kernels. Their momentum (0.95, Nesterov) is made orthogonal as a matrix
    [out, in*h*w], then scaled to the size of AdamW's steps, so that lr and weight_decay mean the same.

    K. Jordan, *Muon: an optimizer for hidden layers in neural networks*, 2024; J. Liu et al., *Muon is
    scalable for LLM training*, 2025. torch.optim.Muon takes matrices only and computes in bfloat16, which is
    slow on most CPUs."""

    @torch.no_grad()
    def step(self):
        kernels = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.ndim == 4]
        for p, _, _ in kernels:
            p.grad = None  # AdamW passes over what has no gradient
        super().step()
        for p, grad, group in kernels:
            if grad is None:
                continue
            if not self.state[p]:  # "step" is not used here, but AdamW.load_state_dict needs it
                self.state[p] = {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"].lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(momentum, 0.95).flatten(1))
            update *= 0.2 * max(update.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] * update.view_as(p))


def orthogonal(matrix):
    """The matrix [n,m], its singular values brought near 1 (0.7 to 1.2) by five Newton-Schulz iterations."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x if len(x) <= len(x.T) else x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if x.shape == matrix.shape else x.T


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


def make_optimizer(name, model, lr, weight_decay=0.0):
    """One of OPTIMIZERS for the model's parameters, with torch's fused step where it has one. On a GPU its
    learning rate is a tensor, since a recorded step (utils.GraphedStep) reads the rate from memory."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    fast = {"fused": True, "capturable": on_gpu}
    known = inspect.signature(OPTIMIZERS[name]).parameters
    return OPTIMIZERS[name](model.parameters(), lr=torch.tensor(lr, device=device) if on_gpu else lr,
                            weight_decay=weight_decay, **{key: fast[key] for key in fast if key in known})


def set_learning_rate(optimizer, lr):
    """Give every parameter group the rate `lr`, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


if __name__ == "__main__":
    print("epoch", *SCHEDULES, sep="\t")
    for passed in range(60):
        print(passed + 1, *(f"{learning_rate(name, passed, 60, 1e-3):.3e}" for name in SCHEDULES), sep="\t")
