"""Write your own router: `logits`, and what moves after a step, and a mixture sends tokens by it.

    python examples/write_your_own_router.py

or from the command line, in this directory:

    archzoo check write_your_own_router.CappedRouter
    archzoo fit --import write_your_own_router --model.preset transformer_micro \\
        --model.feed_forward MixtureOfExperts --model.feed_forward.balance none \\
        --model.feed_forward.router write_your_own_router.CappedRouter --data Addition

The router below changes two things of the zoo's linear one. Its logits are capped, so that no
expert is ever out of reach, and its bias moves in proportion to how uneven the load was:

    z   = cap tanh(W x / cap)
    b_j = b_j + rate (1 - n c_j / sum(c))       c_j: tokens sent to expert j of n in the last step

All that follows the logits is shared by the routers of the zoo: the choice, the weights, and that
the bias has a say in the choice alone. A router that shares nothing derives from `archzoo.Router`
and writes `forward`.
"""

import argparse

import torch
from torch.nn import functional as F

import archzoo


class CappedRouter(archzoo.TopKRouter):
    """Capped logits, and a bias that follows the load.

    Args:
        dim: Width of x.
        experts: To choose from.
        top_k: Experts a token is sent to.
        cap: The largest logit.
        bias_rate: How far the bias moves for a load that is uneven by one whole share.
        **options: Those of every router, such as score.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int = 2,
        *,
        cap: float = 5.0,
        bias_rate: float = 0.05,
        **options,
    ) -> None:
        super().__init__(dim, experts, top_k, bias_rate=bias_rate, **options)
        self.cap = cap

    def logits(self, projected):
        return self.cap * torch.tanh(projected / self.cap)

    def after_step(self, sums):
        share = sums["assignments"] / sums["assignments"].sum().clamp(min=1)
        self.expert_bias += self.bias_rate * (1 - self.experts * share)


def train(router, steps: int = 150) -> tuple[float, float]:
    """Learn which letter comes next: the last steps' loss, and the busiest expert's share."""
    torch.manual_seed(0)
    mixture = {"experts": 8, "top_k": 2, "balance": "none", "router": router}
    model = archzoo.create_model(
        "transformer_micro",
        feed_forward={"class_path": "MixtureOfExperts", "init_args": mixture},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    load, losses = torch.zeros(8), []
    for step in range(steps):
        tokens = torch.randint(8, (32, 2)).repeat(1, 5)  # few letters: few experts would do
        output = model(tokens[:, :-1])
        loss = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step([aux.sums for aux in output.aux])  # under `archzoo fit` this is done
        if step >= steps - 20:
            load += output.aux[0].sums["assignments"]
            losses.append(loss.item())
    return sum(losses) / 20, (load.max() / load.sum()).item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    archzoo.check(CappedRouter)  # raises if a rule of the interface is broken

    print(f"\n{'router':<14}{'loss':>8}{'busiest of 8 experts':>24}")
    for router in (archzoo.LinearRouter, CappedRouter):
        loss, share = train(router)
        print(f"{router.__name__:<14}{loss:>8.2f}{share:>23.0%}")


if __name__ == "__main__":
    main()
