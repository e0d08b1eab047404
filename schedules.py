"""Learning-rate schedules of the report's section 1.4, stepped once an epoch, built from torch's own.

    python schedules.py        prints the learning rate of each schedule at each of 60 epochs
"""
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR, StepLR

SCHEDULES = ("constant", "step", "cosine", "warmup_cosine")


def make_schedule(name, optimizer, epochs, lr_min=1e-5, warmup_epochs=10, start_factor=0.1, step_size=20, gamma=0.1):
    """A torch scheduler for `optimizer`; call `.step()` after each epoch. ValueError for a name that is not known.

    constant       lr
    step           lr * gamma ** (epoch // step_size); the report gives neither number, 20 and 0.1 are ours
    cosine         from lr to lr_min over the run
    warmup_cosine  linear from start_factor * lr to lr over warmup_epochs (fewer than `epochs`), then cosine to lr_min
    """
    if name == "constant":
        return ConstantLR(optimizer, factor=1.0)
    if name == "step":
        return StepLR(optimizer, step_size, gamma)
    if name == "cosine" or (name == "warmup_cosine" and warmup_epochs == 0):
        return CosineAnnealingLR(optimizer, epochs, lr_min)
    if name == "warmup_cosine":
        warmup = LinearLR(optimizer, start_factor, total_iters=warmup_epochs)
        cosine = CosineAnnealingLR(optimizer, epochs - warmup_epochs, lr_min)
        return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_epochs])
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {name}")


if __name__ == "__main__":
    print("epoch", *SCHEDULES, sep="\t")
    optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3) for _ in SCHEDULES]
    schedules = [make_schedule(name, optimizer, epochs=60) for name, optimizer in zip(SCHEDULES, optimizers)]
    for epoch in range(1, 61):
        print(epoch, *(f"{optimizer.param_groups[0]['lr']:.3e}" for optimizer in optimizers), sep="\t")
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
