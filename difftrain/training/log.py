"""What a log line says: means of losses and measures over the steps since the line before."""

from typing import Any

import torch
from torch import Tensor

from difftrain.core.processes import num_processes, process_index, sum_over_processes
from difftrain.objective.types import Losses

BAND = 2.0  # width of a noise-level band, in units of log SNR
NUM_BANDS = 20  # bands from log SNR -20 to 20; levels beyond count in the outermost bands


class Window:
    """Sums over the micro-batches since the last log line.

    The sums stay on the device, so that no step waits for them.

    Args:
        device: The device of the losses.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget all micro-batches."""
        self.micro_batches = 0
        self.terms: dict[str, Tensor] = {}
        self.measures: dict[str, Tensor] = {}  # (sum, count) of each
        self.errors = torch.zeros(NUM_BANDS, dtype=torch.float64)
        self.counts = torch.zeros(NUM_BANDS, dtype=torch.float64)

    def add(self, losses: Losses) -> None:
        """Add the losses of one micro-batch."""
        self.micro_batches += 1
        # Terms and measures by name
        for name, term in {"loss": losses.total.detach(), **losses.terms}.items():
            add_to(self.terms, name, term.double())
        for name, value in losses.measures.items():
            one = torch.ones_like(value, dtype=torch.float64)
            counted = torch.stack([value.double(), one])
            add_to(self.measures, name, counted.to(self.device))
        # Errors by band of log SNR
        band = band_of(losses.log_snr.cpu())
        errors = losses.errors.double()
        self.errors = self.errors.to(errors.device).index_add(0, band.to(errors.device), errors)
        self.counts = self.counts.index_add(0, band, torch.ones(len(band), dtype=torch.float64))

    def means(self) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
        """Average over the micro-batches of all processes. Collective.

        Returns:
            The mean of the loss and of each term over all micro-batches, the mean of each measure
            over the micro-batches that took it, and the mean error by band of log SNR.
        """
        sums = self._split(sum_over_processes(self._flat()).cpu())
        terms = {}
        for name, value in zip(sorted(self.terms), sums["terms"], strict=True):
            terms[name] = (value / sums["micro_batches"]).item()
        measures = {}
        for name, (value, count) in zip(sorted(self.measures), sums["measures"], strict=True):
            measures[name] = (value / count).item()
        bands = []
        for i, (error, count) in enumerate(zip(sums["errors"], sums["counts"], strict=True)):
            low = BAND * (i - NUM_BANDS // 2)
            if count > 0:
                mean = (error / count).item()
                bands.append({"log_snr": [low, low + BAND], "error": mean, "count": int(count)})
        return terms, measures, bands

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of every process, one row a process. Collective."""
        own = self._flat()
        rows = own.new_zeros(num_processes(), len(own))
        rows[process_index()] = own
        return {
            "terms": sorted(self.terms),
            "measures": sorted(self.measures),
            "rows": sum_over_processes(rows).cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's own sums.

        If the number of processes has changed, the main process takes the sums of all.

        Args:
            state: What `state_dict` returned.
        """
        rows = state["rows"]
        if len(rows) != num_processes():
            zeros = [torch.zeros_like(rows[0])] * (num_processes() - 1)
            rows = torch.stack([rows.sum(0), *zeros])
        # The names say how long the parts of a row are.
        self.terms = dict.fromkeys(state["terms"], torch.empty(0))
        self.measures = dict.fromkeys(state["measures"], torch.empty(0))
        own = self._split(rows[process_index()].to(self.device))
        self.terms = dict(zip(self.terms, own["terms"], strict=True))
        self.measures = dict(zip(self.measures, own["measures"], strict=True))
        self.errors = own["errors"].clone()
        self.counts = own["counts"].cpu().clone()
        self.micro_batches = int(own["micro_batches"])

    def _flat(self) -> Tensor:
        """Return all sums in one vector, each kind in the order of names."""
        device = self.errors.device
        terms = [self.terms[name].to(device).reshape(1) for name in sorted(self.terms)]
        measures = [self.measures[name].to(device) for name in sorted(self.measures)]
        micro_batches = self.errors.new_tensor([self.micro_batches])
        bands = [self.errors, self.counts.to(device)]
        return torch.cat([*terms, *measures, *bands, micro_batches])

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of such a vector; measures as (sum, count) [num, 2]."""
        sizes = {
            "terms": len(self.terms),
            "measures": 2 * len(self.measures),
            "errors": NUM_BANDS,
            "counts": NUM_BANDS,
            "micro_batches": 1,
        }
        parts = dict(zip(sizes, torch.split(flat, list(sizes.values())), strict=True))
        return {**parts, "measures": parts["measures"].reshape(-1, 2)}


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a value to the sum under a name; the first value begins the sum."""
    sums[name] = sums[name] + value if name in sums else value


def band_of(log_snr: Tensor) -> Tensor:
    """Return the index [B] of the band in which each log SNR [B] lies."""
    band = (log_snr / BAND).floor().long() + NUM_BANDS // 2
    return band.clamp(0, NUM_BANDS - 1)
