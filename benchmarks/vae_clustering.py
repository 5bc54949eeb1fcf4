"""A training step of the essay's clustering VAE against a plain port of the author's script.

    python benchmarks/vae_clustering.py [--rounds N] [--threads N]

The network is that of `vae_keras_cluster.py` (four convolutions, their mirror image, 20 latent
units, 10 clusters), batches of 100 pictures of 28x28, Adam, float32. The port does what the
script does, line by line. Ours is the library's loss, its checks included, in the layout
`channels_last`, as the chapter runs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor

from lib.reproduce.clustering import essay_model
from lib.vae_clustering import ClusterVAE

BATCH = 100


def plain(model: ClusterVAE, x: Tensor) -> Tensor:
    """The script's loss from the same layers: weighted error, alignment, entropy of the classes."""
    mean, log_var = model.encoder(x)
    z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
    x_hat, y = model.decoder(z), torch.softmax(model.classifier(z), 1)
    difference = z[:, None] - model.means[None]
    error = 0.5 * ((x - x_hat) ** 2).mean(0).sum()
    divergence = -0.5 * (log_var[:, None] - difference**2)
    alignment = torch.bmm(y[:, None], divergence).mean(0).sum()
    return 2.5 * error + alignment + (y * torch.log(y + 1e-7)).mean(0).sum()


def ours(model: ClusterVAE, x: Tensor) -> Tensor:
    """The library's loss."""
    return -model.elbo(x).value.mean()


def step(
    loss: Callable[[ClusterVAE, Tensor], Tensor],
    *,
    channels_last: bool = False,
    fused: bool = False,
) -> Callable[[], None]:
    """One step of Adam on a fixed batch."""
    torch.manual_seed(0)
    model, x = essay_model(), torch.rand(BATCH, 1, 28, 28)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    # A tiny rate: the same work at every step, and nothing that could diverge
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=fused)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, x).backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    options = arguments(__doc__.splitlines()[0])
    rivals = {
        "plain port": step(plain),
        "plain port, channels_last": step(plain, channels_last=True),
        "lib.vae_clustering": step(ours),
        "lib.vae_clustering, channels_last": step(ours, channels_last=True),
        "lib.vae_clustering, channels_last, fused Adam": step(ours, channels_last=True, fused=True),
    }
    times = interleave(rivals, options.rounds, seconds=0.4)
    rows = []
    for name, seconds in times.items():
        ms = median_ms(seconds)
        rows.append([name, ms, round(1e3 * BATCH / ms), ratio(times, "plain port", name)])
    print_table(
        f"A training step, batch {BATCH}, {options.threads} threads - target: channels_last at "
        "least 1.15 x the plain port",
        ["code", "ms", "images/s", "x plain port"],
        rows,
    )
