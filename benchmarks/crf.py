"""lib.crf against pytorch-crf, torch-struct and python-crfsuite, on ragged batches.

    python benchmarks/crf.py [--rounds 5] [--threads 2]

Loss is the mean negative log-likelihood with start and end scores. Beside the speed stands the
largest error of the gradient against log space in float64, relative to the largest entry.
python-crfsuite decodes items built beforehand, C real attributes a position.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pycrfsuite
import torch
import torch_struct
import torchcrf
from _timing import arguments, interleave, median_ms, print_table, ratio
from torch import Tensor

from lib.crf import CRF

# (B, T, C) -> least ratio to pytorch-crf of loss and backward, decoding and marginals
TARGETS = {
    (32, 50, 5): (None, 3, 4),
    (128, 100, 5): (6, 10, 4),
    (32, 128, 20): (9, 3, 4),
    (16, 512, 50): (10, 3, 4),
    (8, 2000, 10): (25, 3, 4),
}


class Case:
    """One batch, and the calls that every rival makes on it."""

    def __init__(self, batch: int, length: int, tags: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.peer = torchcrf.CRF(tags, batch_first=True).to(device)
        self.ours = CRF(tags).to(device)
        self.ours.load_state_dict(self.peer.state_dict())
        self.emissions = torch.randn(batch, length, tags, device=device).requires_grad_()
        lengths = torch.randint(length // 2, length + 1, (batch,), device=device)
        lengths[0] = length
        self.lengths = lengths
        self.mask = torch.arange(length, device=device) < lengths[:, None]
        self.tags = torch.randint(tags, (batch, length), device=device)

    def loss(self, crf: torch.nn.Module, emissions: Tensor) -> Tensor:
        if isinstance(crf, CRF):
            return crf.loss(emissions, self.tags, self.mask)
        return -crf(emissions, self.tags, self.mask, reduction="mean")

    def gradients(self, crf: torch.nn.Module, emissions: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(crf, emissions), (emissions, *crf.parameters()))

    def error(self, crf: torch.nn.Module) -> float:
        """Largest gradient error relative to the largest entry, of all gradients."""
        exact = self.gradients(copy.deepcopy(self.peer).double(), self.emissions.double())
        pairs = zip(self.gradients(crf, self.emissions), exact, strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def marginals(self, crf: torch.nn.Module) -> Tensor:
        """pytorch-crf has none; the gradient of its normaliser gives them."""
        if isinstance(crf, CRF):
            return crf(self.emissions.detach(), self.mask).marginals
        emissions = self.emissions.transpose(0, 1)
        log_z = crf._compute_normalizer(emissions, self.mask.T).sum()
        return torch.autograd.grad(log_z, emissions)[0]

    def forward(self, crf: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return self.loss(crf, self.emissions)

    def decode(self, crf: torch.nn.Module) -> object:
        with torch.no_grad():
            return crf.decode(self.emissions, self.mask)

    def struct(self) -> torch_struct.LinearChainCRF:
        edges = self.ours.transitions.T + self.emissions[:, 1:, :, None]
        return torch_struct.LinearChainCRF(edges, self.lengths)

    def crfsuite(self) -> Callable[[], object]:
        """A tagger with the same attributes and tags, on items built once."""
        tags = self.emissions.shape[2]
        names = [f"h{i}" for i in range(tags)]
        rows = [h[:n].tolist() for h, n in zip(self.emissions, self.lengths, strict=True)]
        items = [
            pycrfsuite.ItemSequence([dict(zip(names, h, strict=True)) for h in row]) for row in rows
        ]
        trainer = pycrfsuite.Trainer(
            verbose=False,
            params={
                "max_iterations": 1,
                "feature.possible_transitions": True,
                "feature.possible_states": True,
            },
        )
        every = pycrfsuite.ItemSequence([dict.fromkeys(names, 1.0)] * tags)
        trainer.append(every, [str(i) for i in range(tags)])
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            trainer.train(path)
            tagger = pycrfsuite.Tagger()
            tagger.open(path)
        return lambda: [tagger.tag(item) for item in items]


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = ["B,T,C", "what", "ours ms", "pytorch-crf", "ratio", "target", "other", "ratio"]
    rows: list[list[object]] = []
    for shape, (train_target, decode_target, marginal_target) in TARGETS.items():
        case = Case(*shape, device)
        ours, peer = case.ours, case.peer
        rivals: dict[str, tuple[dict[str, Callable[[], object]], float | None, str]] = {
            "loss + backward": (
                {
                    "ours": lambda: case.gradients(ours, case.emissions),
                    "peer": lambda: case.gradients(peer, case.emissions),
                },
                train_target,
                f"gradient error {case.error(ours):.0e}, theirs {case.error(peer):.0e}",
            ),
            "loss": (
                {"ours": lambda: case.forward(ours), "peer": lambda: case.forward(peer)},
                5,
                "",
            ),
            "marginals": (
                {"ours": lambda: case.marginals(ours), "peer": lambda: case.marginals(peer)},
                marginal_target,
                "torch-struct" if shape[2] <= 10 else "",
            ),
            "decode": (
                {
                    "ours": lambda: case.decode(ours),
                    "peer": lambda: case.decode(peer),
                    "other": case.crfsuite(),
                },
                decode_target,
                "crfsuite",
            ),
        }
        if shape[2] <= 10:
            rivals["marginals"][0]["other"] = lambda: case.struct().marginals
        for what, (calls, target, other) in rivals.items():
            times = interleave(calls, options.rounds, device=device)
            rows.append(
                [
                    ",".join(map(str, shape)),
                    what,
                    median_ms(times["ours"]),
                    median_ms(times["peer"]),
                    ratio(times, "peer", "ours"),
                    f"{target:g}" if target else None,
                    f"{other} {median_ms(times['other']):.3g}" if "other" in calls else other,
                    ratio(times, "other", "ours") if "other" in calls else None,
                ]
            )
    print_table(f"Linear-chain CRF on {device}, {torch.get_num_threads()} threads", header, rows)


if __name__ == "__main__":
    main()
