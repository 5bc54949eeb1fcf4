"""lib.crf against pytorch-crf, torch-struct and python-crfsuite, on ragged batches.

    python benchmarks/crf.py [--rounds 5] [--threads 2]

Loss is the mean negative log-likelihood, start and end scores included. pytorch-crf has no
marginals: it is timed on the gradient of its normaliser. torch-struct has no start and end scores.
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

# (B, T, C) -> least ratio to pytorch-crf
TARGETS = {
    (32, 50, 5): {"loss": 5, "marginals": 4, "decode": 3},
    (128, 100, 5): {"loss + backward": 6, "loss": 5, "marginals": 4, "decode": 10},
    (32, 128, 20): {"loss + backward": 9, "loss": 5, "marginals": 4, "decode": 3},
    (16, 512, 50): {"loss + backward": 10, "loss": 5, "marginals": 4, "decode": 3},
    (8, 2000, 10): {"loss + backward": 25, "loss": 5, "marginals": 4, "decode": 3},
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

    def struct(self) -> Tensor:
        edges = self.ours.transitions.T + self.emissions[:, 1:, :, None]
        return torch_struct.LinearChainCRF(edges, self.lengths).marginals

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

    def rivals(self) -> dict[str, dict[str, Callable[[], object]]]:
        """What is timed -> who -> a call."""

        def both(method: Callable[[torch.nn.Module], object]) -> dict[str, Callable[[], object]]:
            return {"ours": lambda: method(self.ours), "peer": lambda: method(self.peer)}

        table = {
            "loss + backward": both(lambda crf: self.gradients(crf, self.emissions)),
            "loss": both(self.forward),
            "marginals": both(self.marginals),
            "decode": both(self.decode) | {"python-crfsuite": self.crfsuite()},
        }
        if self.emissions.shape[2] <= 10:  # it holds (B, T, C, C) at every level of a tree
            table["marginals"]["torch-struct"] = self.struct
        return table


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = [
        "(B, T, C)",
        "",
        "ours ms",
        "pytorch-crf ms",
        "ratio",
        "target",
        "other",
        "ms",
        "ratio",
    ]
    rows, errors = [], []
    for shape, targets in TARGETS.items():
        case = Case(*shape, device)
        errors.append([str(shape), f"{case.error(case.ours):.0e}", f"{case.error(case.peer):.0e}"])
        for what, calls in case.rivals().items():
            times = interleave(calls, options.rounds, device=device)
            other = next((name for name in calls if name not in ("ours", "peer")), None)
            rows.append(
                [
                    str(shape),
                    what,
                    median_ms(times["ours"]),
                    median_ms(times["peer"]),
                    ratio(times, "peer", "ours"),
                    targets.get(what),
                    other,
                    median_ms(times[other]) if other else None,
                    ratio(times, other, "ours") if other else None,
                ]
            )
    print_table(f"Linear-chain CRF on {device}, {torch.get_num_threads()} threads", header, rows)
    print_table(
        "Largest gradient error against float64 in log space, relative to the largest entry",
        ["(B, T, C)", "ours", "pytorch-crf"],
        errors,
    )


if __name__ == "__main__":
    main()
