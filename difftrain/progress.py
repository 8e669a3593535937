"""How far a long piece of work is: a bar on a terminal; elsewhere a line every ten seconds."""

import time

INTERVAL = 10.0  # seconds between lines


class ProgressBar:
    """`total` units of work, of which `done` were there before. shown: on one process alone."""

    def __init__(self, total: int, done: int, shown: bool, unit: str, what: str = ""):
        from tqdm import tqdm

        self.total, self.shown, self.unit, self.what = total, shown, unit, what
        self.bar = tqdm(total=total, initial=done, disable=None if shown else True, unit=unit, desc=what or None, dynamic_ncols=True)
        self.last_line, self.started, self.first = time.monotonic(), time.monotonic(), done

    def show(self, done: int, text: str = "", at_end: bool = True) -> None:
        """text: what else to say, such as a loss. at_end: with a line at the last unit, however soon it comes."""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.shown and self.bar.disable and (now - self.last_line > INTERVAL or (at_end and done == self.total)):
            self.last_line = now
            left = (now - self.started) / max(1, done - self.first) * (self.total - done)
            parts = [f"{self.what + ': ' if self.what else ''}{self.unit} {done}/{self.total}", text, f"{left:.0f} s left"]
            print("  ".join(part for part in parts if part), flush=True)

    def close(self) -> None:
        self.bar.close()
