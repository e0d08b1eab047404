"""Learning-rate schedules of the report's section 1.4, stepped once an epoch, and one more, built from torch's own.

    python schedules.py        prints the learning rate of each schedule at each of 60 epochs
"""
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR, StepLR

SCHEDULES = ("constant", "step", "cosine", "warmup_cosine", "onecycle")
EVERY_BATCH = ("onecycle",)  # these are stepped after each batch, the others after each epoch


def make_schedule(name, optimizer, epochs, lr_min=1e-5, warmup_epochs=10, start_factor=0.1, step_size=20, gamma=0.1,
                  batches=1):
    """A torch scheduler for `optimizer`; call `.step()` after each epoch, or after each of the `batches` of an epoch for
    those in EVERY_BATCH. ValueError for a name that is not known.

    constant       lr
    step           lr * gamma ** (epoch // step_size); the report gives neither number, 20 and 0.1 are ours
    cosine         from lr to lr_min over the run
    warmup_cosine  linear from start_factor * lr to lr over warmup_epochs (fewer than `epochs`), then cosine to lr_min
    onecycle       a triangle over all batches: linear from start_factor * lr to lr in a quarter, then down to lr_min
                   (of four batches or fewer only down)
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
    if name == "onecycle":
        lr, steps = float(optimizer.param_groups[0]["lr"]), epochs * batches
        rise = 0.25 if steps > 4 else 0.0  # of four batches torch would give the rise none, and divide by that
        return OneCycleLR(optimizer, lr, steps, pct_start=rise, anneal_strategy="linear", cycle_momentum=False,
                          div_factor=1 / start_factor, final_div_factor=start_factor * lr / max(lr_min, 1e-12))
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
