"""The run folder's log: one JSON object a logged step, cut back to the checkpoint when a run resumes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.batch import Losses
from difftrain.distributed import num_processes, process_index, sum_over_processes

BAND = 2.0  # width of a noise-level band, in units of log SNR
NUM_BANDS = 20  # bands from log SNR -20 to 20; what lies beyond counts in the outermost


class Window:
    """Sums over the micro-batches since the last logged step, kept on the device: nothing waits for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.micro_batches = 0
        self.terms: dict[str, Tensor] = {}
        self.measures: dict[str, Tensor] = {}  # (sum, count) of each
        self.errors = torch.zeros(NUM_BANDS, dtype=torch.float64)
        self.counts = torch.zeros(NUM_BANDS, dtype=torch.float64)

    def add(self, losses: Losses) -> None:
        self.micro_batches += 1
        for name, term in {"loss": losses.total.detach(), **losses.terms}.items():
            self.terms[name] = self.terms[name] + term.double() if name in self.terms else term.double()
        for name, value in losses.measures.items():
            counted = torch.stack([value.double(), torch.ones_like(value, dtype=torch.float64)]).to(self.device)
            self.measures[name] = self.measures[name] + counted if name in self.measures else counted
        band = ((losses.log_snr.cpu() / BAND).floor().long() + NUM_BANDS // 2).clamp(0, NUM_BANDS - 1)
        on_device = self.errors.to(losses.errors.device)
        self.errors = on_device.index_add(0, band.to(on_device.device), losses.errors.double())
        self.counts = self.counts.index_add(0, band, torch.ones(len(band), dtype=torch.float64))

    def means(self) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
        """Mean loss and terms over micro-batches and processes, mean of each measure where it was taken, mean error by band. Collective."""
        sums = self._split(sum_over_processes(self._flat()).cpu())
        terms = {name: (value / sums["micro_batches"]).item() for name, value in zip(sorted(self.terms), sums["terms"], strict=True)}
        measures = {name: (value / count).item() for name, (value, count) in zip(sorted(self.measures), sums["measures"], strict=True)}
        low = [BAND * (i - NUM_BANDS // 2) for i in range(NUM_BANDS)]
        bands = [
            {"log_snr": [low[i], low[i] + BAND], "error": (error / count).item(), "count": int(count)}
            for i, (error, count) in enumerate(zip(sums["errors"], sums["counts"], strict=True)) if count > 0
        ]
        return terms, measures, bands

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process, [processes, sums]. Collective."""
        own = self._flat()
        rows = own.new_zeros(num_processes(), len(own))
        rows[process_index()] = own
        return {"terms": sorted(self.terms), "measures": sorted(self.measures), "rows": sum_over_processes(rows).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """This process's own sums; on another number of processes the main one takes them all."""
        rows = state["rows"]
        if len(rows) != num_processes():
            rows = torch.stack([rows.sum(0), *[torch.zeros_like(rows[0])] * (num_processes() - 1)])
        self.terms, self.measures = dict.fromkeys(state["terms"]), dict.fromkeys(state["measures"])  # type: ignore[assignment]
        own = self._split(rows[process_index()].to(self.device))
        self.terms = dict(zip(self.terms, own["terms"], strict=True))
        self.measures = dict(zip(self.measures, own["measures"], strict=True))
        self.errors, self.counts = own["errors"].clone(), own["counts"].cpu().clone()
        self.micro_batches = int(own["micro_batches"])

    def _flat(self) -> Tensor:
        """All sums in one vector, by name."""
        device = self.errors.device
        terms = [self.terms[name].to(device).reshape(1) for name in sorted(self.terms)]
        measures = [self.measures[name].to(device) for name in sorted(self.measures)]
        return torch.cat([*terms, *measures, self.errors, self.counts.to(device), self.errors.new_tensor([self.micro_batches])])

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = {"terms": len(self.terms), "measures": 2 * len(self.measures), "errors": NUM_BANDS, "counts": NUM_BANDS, "micro_batches": 1}
        parts = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        return {**parts, "measures": parts["measures"].reshape(-1, 2)}


def append(file: Path, record: dict[str, Any]) -> None:
    """One line, written at once: a killed run leaves at most its last line broken."""
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def records(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that was cut off is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    whole = []
    for i, line in enumerate(lines):
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            if i < len(lines) - 1:
                raise
    return whole


def cut_after(file: Path, step: int) -> None:
    """Drop the lines after `step`: what the resumed run will log again."""
    kept = [record for record in records(file) if record["step"] <= step]
    if file.exists():
        write_atomically(file, "".join(json.dumps(record) + "\n" for record in kept))


def write_atomically(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
