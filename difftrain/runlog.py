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
        self.errors = torch.zeros(NUM_BANDS, dtype=torch.float64)
        self.counts = torch.zeros(NUM_BANDS, dtype=torch.float64)

    def add(self, losses: Losses) -> None:
        self.micro_batches += 1
        for name, term in {"loss": losses.total.detach(), **losses.terms}.items():
            self.terms[name] = self.terms[name] + term.double() if name in self.terms else term.double()
        band = ((losses.log_snr.cpu() / BAND).floor().long() + NUM_BANDS // 2).clamp(0, NUM_BANDS - 1)
        on_device = self.errors.to(losses.errors.device)
        self.errors = on_device.index_add(0, band.to(on_device.device), losses.errors.double())
        self.counts = self.counts.index_add(0, band, torch.ones(len(band), dtype=torch.float64))

    def means(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean loss and terms over micro-batches and processes, and the mean error by band. Collective."""
        names = sorted(self.terms)
        total = sum_over_processes(self._flat(names)).cpu()
        terms = {name: value.item() for name, value in zip(names, total[: len(names)] / total[-1], strict=True)}
        errors, counts = total[len(names) : -1].reshape(2, NUM_BANDS)
        low = [BAND * (i - NUM_BANDS // 2) for i in range(NUM_BANDS)]
        bands = [
            {"log_snr": [low[i], low[i] + BAND], "error": (errors[i] / counts[i]).item(), "count": int(counts[i])}
            for i in range(NUM_BANDS) if counts[i] > 0
        ]
        return terms, bands

    def state_dict(self) -> dict[str, Any]:
        """The sums of every process, [processes, sums]. Collective."""
        names = sorted(self.terms)
        own = self._flat(names)
        rows = own.new_zeros(num_processes(), len(own))
        rows[process_index()] = own
        return {"names": names, "rows": sum_over_processes(rows).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """This process's own sums; on another number of processes the main one takes them all."""
        names, rows = state["names"], state["rows"]
        if len(rows) != num_processes():
            rows = torch.stack([rows.sum(0), *[torch.zeros_like(rows[0])] * (num_processes() - 1)])
        own = rows[process_index()]
        self.terms = {name: value.to(self.device) for name, value in zip(names, own[: len(names)], strict=True)}
        self.errors, self.counts = own[len(names) : -1].reshape(2, NUM_BANDS).clone()
        self.errors = self.errors.to(self.device)
        self.micro_batches = int(own[-1])

    def _flat(self, names: list[str]) -> Tensor:
        device = self.errors.device
        terms = [self.terms[name].to(device).reshape(1) for name in names]
        return torch.cat([*terms, self.errors, self.counts.to(device), self.errors.new_tensor([self.micro_batches])])


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
