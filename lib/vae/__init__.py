"""Variational autoencoders whose bounds are log-probabilities in nats, nothing rescaled.

    log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))

    model = VAE(encoder, decoder, latent_dim=16)
    loss = -model.elbo(x).value.mean()          # nats per example
    model.iwae_bound(x, 1000, chunk_size=100)   # nearer to log p(x)
    pictures = model.sample(64)                 # decoder means

Derived in the chapter `vae`.
"""

from lib.vae._gaussian import gaussian_kl
from lib.vae._model import ELBO, VAE

__all__ = ["ELBO", "VAE", "gaussian_kl"]
