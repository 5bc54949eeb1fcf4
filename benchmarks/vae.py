"""A training step of the VAE against a plain port of the essay author's two scripts.

    python benchmarks/vae.py [--rounds N] [--threads N]

The networks are those of `vae_keras.py` (784-256-2-256-784) and `vae_keras_cnn.py` (convolutions
of 32 and 64 with stride 2, 16 hidden units, 2 latent ones), batches of 100, float32. The port does
what the scripts do: a sigmoid at the end, cross-entropy of probabilities, KL, one draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from lib.vae import VAE

BATCH, LATENT = 100, 2


class Halves(nn.Sequential):
    """Networks whose output is split into mean and log-variance."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = super().forward(x).chunk(2, -1)
        return mean, log_var


def dense() -> tuple[nn.Module, nn.Module, Tensor]:
    """Encoder, decoder to logits, and a batch, of the fully connected script."""
    encoder = Halves(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 784))
    return encoder, decoder, torch.rand(BATCH, 784)


def convolutional() -> tuple[nn.Module, nn.Module, Tensor]:
    """The same of the convolutional script."""
    down = {"kernel_size": 3, "stride": 2, "padding": 1}
    up: dict[str, Any] = {**down, "output_padding": 1}
    encoder = Halves(
        *(nn.Conv2d(1, 32, **down), nn.ReLU(), nn.Conv2d(32, 64, **down), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 49, 16), nn.ReLU(), nn.Linear(16, 2 * LATENT)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(LATENT, 16), nn.ReLU(), nn.Linear(16, 64 * 49), nn.ReLU()),
        *(nn.Unflatten(1, (64, 7, 7)), nn.ConvTranspose2d(64, 64, **up), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, **up), nn.ReLU()),
        nn.ConvTranspose2d(32, 1, kernel_size=3, padding=1),
    )
    return encoder, decoder, torch.rand(BATCH, 1, 28, 28)


Loss = Callable[[Tensor], Tensor]


def plain(encoder: nn.Module, decoder: nn.Module) -> Loss:
    """The scripts' loss, line by line."""

    def loss(x: Tensor) -> Tensor:
        mean, log_var = encoder(x)
        z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
        x_hat = torch.sigmoid(decoder(z))
        cross = F.binary_cross_entropy(x_hat, x, reduction="none").flatten(1).sum(1)
        kl = -0.5 * (1 + log_var - mean.square() - torch.exp(log_var)).sum(1)
        return (cross + kl).mean()

    return loss


def ours(encoder: nn.Module, decoder: nn.Module) -> Loss:
    """The library's, as shipped: its checks of values included."""
    vae = VAE(encoder, decoder, LATENT)
    return lambda x: -vae.elbo(x).value.mean()


def step(
    make: Callable[[], tuple[nn.Module, nn.Module, Tensor]],
    loss_of: Callable[[nn.Module, nn.Module], Loss],
    *,
    channels_last: bool = False,
    fused: bool = False,
) -> Callable[[], None]:
    """One step of Adam on a fixed batch."""
    torch.manual_seed(0)
    encoder, decoder, x = make()
    networks = nn.ModuleList([encoder, decoder])
    if channels_last:
        networks.to(memory_format=torch.channels_last)
    loss = loss_of(encoder, decoder)
    # A tiny rate: the same work at every step, and nothing that could diverge
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-6, fused=fused)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x).backward()
        optimizer.step()

    return run


def disagreement(make: Callable[[], tuple[nn.Module, nn.Module, Tensor]]) -> float:
    """Relative difference of the gradients of the two losses, for the same draws."""
    encoder, decoder, x = make()
    parameters = [*encoder.parameters(), *decoder.parameters()]
    gradients = []
    for loss_of in (plain, ours):
        torch.manual_seed(0)
        slopes = torch.autograd.grad(loss_of(encoder, decoder)(x), parameters)
        gradients.append(torch.cat([slope.flatten() for slope in slopes]))
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()


if __name__ == "__main__":
    options = arguments(__doc__.splitlines()[0], rounds=11)
    rows = []
    for name, make in (("dense", dense), ("convolutional", convolutional)):
        rivals = {
            "plain port": step(make, plain),
            "lib.vae": step(make, ours),
            "lib.vae, fused Adam": step(make, ours, fused=True),
        }
        if make is convolutional:
            rivals["plain port, channels_last"] = step(make, plain, channels_last=True)
            rivals["lib.vae, channels_last"] = step(make, ours, channels_last=True)
            rivals["lib.vae, channels_last, fused Adam"] = step(
                make, ours, channels_last=True, fused=True
            )
        apart = disagreement(make)
        times = interleave(rivals, options.rounds, seconds=0.15)
        for rival, seconds in times.items():
            ms, gain = median_ms(seconds), ratio(times, "plain port", rival)
            same = None if rival.startswith("plain") else f"{apart:.0e}"
            rows.append([name, rival, ms, round(1e3 * BATCH / ms), gain, same])
    print_table(
        "A training step, batch 100 - target: no slower than the port as shipped, "
        ">= 1.15 x with channels_last where there are convolutions",
        ["networks", "code", "ms", "images/s", "x plain port", "gradient apart"],
        rows,
    )
