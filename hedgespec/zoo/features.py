"""What heads learn from, computed from token ids: the target's hidden states, kept in memory-mapped files.

A row's states take four times the target's width in bfloat16 a token (4.6 KB for the zoo's target), so a million tokens take
4.6 GB. They are computed when a row is needed first, and read afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from hedgespec.errors import ZooError
from hedgespec.zoo.generation import Llama
from hedgespec.zoo.shards import Row


def aux_layers(num_hidden_layers: int) -> tuple[int, int, int]:
    """The three layers whose *input* an EAGLE-3 head reads by default: `(2, n // 2, n - 3)`."""
    return 2, num_hidden_layers // 2, num_hidden_layers - 3


class Features:
    """The target's states over rows.

    Args:
        llama: the target.
        rows: conversations.
        folder: where states are kept; None computes them every time. If the folder holds states of other rows too, they stay.
        reading: tokens read in one forward.

    Raises: ZooError if the files cannot be made.
    """

    def __init__(self, llama: Llama, rows: Sequence[Row], folder: Path | None = None, *, reading: int = 4096):
        self.llama, self.rows, self.reading = llama, rows, reading
        self.layers = aux_layers(llama.config.num_hidden_layers)
        self.width = 4 * llama.config.hidden_size
        self.files: dict[str, np.memmap] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):  # another process may add rows of its own
                self._open(folder)

    def _open(self, folder: Path) -> None:
        """Maps the files, longer by the rows that they do not know yet."""
        index = folder / "index.txt"
        places, end = {}, 0
        if index.exists():
            for line in index.read_text().splitlines():
                name, length = line.split()
                places[name] = end
                end += int(length)
        self.start, added = [], []
        for row in self.rows:
            name = hashlib.sha256(np.array(row.tokens, dtype=np.uint16).tobytes()).hexdigest()[:24]
            if name not in places:
                places[name] = end
                end += len(row.tokens)
                added.append(f"{name} {len(row.tokens)}\n")
            self.start.append(places[name])
        kinds = {
            "states": (np.uint16, self.width),
            "log_normalizer": (np.float32, 1),
            "best": (np.uint16, 1),
            "done": (np.uint8, 1),
        }
        self.files = {}
        try:
            for name, (dtype, width) in kinds.items():
                path = folder / f"{name}.bin"
                path.touch()
                with path.open("r+b") as file:
                    file.truncate(max(1, end) * width * np.dtype(dtype).itemsize)
                self.files[name] = np.memmap(path, dtype, "r+", shape=(max(1, end), width))
            with index.open("a") as file:
                file.writelines(added)
        except OSError as error:
            raise ZooError(f"{folder}: features could not be kept ({error.strerror}); give another folder or none") from error

    @torch.inference_mode()
    def compute(self, places: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Reads rows with the target; for each, `states` bfloat16 [L, 4H] (three aux layers and the normed final state),
        `log_normalizer` float32 [L] and `best` int64 [L], the logsumexp and argmax of the target's logits."""
        llama, made = self.llama, []
        lengths = torch.tensor([len(self.rows[place].tokens) for place in places], device=llama.device)
        tokens = torch.zeros(len(places), int(lengths.max()), dtype=torch.long, device=llama.device)
        for index, place in enumerate(places):
            tokens[index, : lengths[index]] = torch.tensor(self.rows[place].tokens)
        final, kept = llama.read(tokens, lengths, states_of=self.layers)
        states = torch.cat([*(kept[layer] for layer in self.layers), final], -1).bfloat16()
        for index, length in enumerate(lengths.tolist()):
            normalizer, best = [], []
            for part in final[index, :length].split(512):
                logits = llama.head(part).float()
                normalizer.append(logits.logsumexp(-1))
                best.append(logits.argmax(-1))
            made.append({"states": states[index, :length], "log_normalizer": torch.cat(normalizer), "best": torch.cat(best)})
        return made

    def fill(self, places: Sequence[int]) -> None:
        """Computes the rows of these indices that are not kept yet."""
        files = self.files
        assert files is not None  # only called if features are kept
        missing = sorted((place for place in dict.fromkeys(places) if not files["done"][self.start[place], 0]),
                         key=lambda place: len(self.rows[place].tokens))  # fmt: skip
        while missing:
            count = max(1, self.reading // len(self.rows[missing[min(len(missing), 32) - 1]].tokens))
            group, missing = missing[:count], missing[count:]
            for place, made in zip(group, self.compute(group), strict=True):
                span = slice(self.start[place], self.start[place] + len(self.rows[place].tokens))
                files["states"][span] = made["states"].cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
                files["log_normalizer"][span, 0] = made["log_normalizer"].cpu().numpy()
                files["best"][span, 0] = made["best"].cpu().numpy()
                files["done"][self.start[place]] = 1  # last: a row that was cut short is computed again

    def get(self, places: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The states of rows, as `compute` returns them."""
        if self.files is None:
            return self.compute(places)
        self.fill(places)
        found = []
        for place in places:
            span = slice(self.start[place], self.start[place] + len(self.rows[place].tokens))
            states = torch.from_numpy(self.files["states"][span].view(np.int16)).view(torch.bfloat16)
            found.append(
                {"states": states, "log_normalizer": torch.from_numpy(self.files["log_normalizer"][span, 0]),
                 "best": torch.from_numpy(self.files["best"][span, 0].astype(np.int64))}
            )  # fmt: skip
        return found
