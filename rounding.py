"""AdamW whose steps are not lost in bfloat16: `train.py --rounding stochastic`. docs/precision.md has the figures."""
import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW


class StochasticAdamW(AdamW):
    """AdamW for bfloat16 weights that rounds up or down at random, so that the mean is exact: a step of a tenth of a
    weight's last bit, which rounding to nearest loses, moves one weight in ten. The moments, too: beta2 = .999 moves
    the second by .1 %, less than half its last bit. Where generators are alike, so is the rounding."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in [p for p in self.param_groups[0]["params"] if p.grad is not None]:         # float32 for one at a time
            weight, grad = (t.to_local() if isinstance(t, DTensor) else t for t in (p, p.grad))         # FSDP: a shard
            exact = torch.nn.Parameter(weight.float())
            exact.grad = grad.float()
            settings = {name: self.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")}
            adam = AdamW([exact], **settings, fused=True)
            adam.state[exact] = {name: value.float() for name, value in self.state[p].items()}
            adam.step()
            self.state[p] = {name: value if name == "step" else rounded(value, self.generator)
                             for name, value in adam.state[exact].items()}
            weight.copy_(rounded(exact, self.generator))


def rounded(x, generator):
    """float32 -> bfloat16, its upper 16 bits; adding random ones to the lower carries in proportion to them."""
    noise = torch.randint(2 ** 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32) + noise & -2 ** 16).view(torch.float32).bfloat16()
