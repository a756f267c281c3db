"""A target whose distribution is known, and the test of emitted texts against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from hedgespec.config import DecodeConfig
from hedgespec.decoder import Decoder
from hedgespec.drafters.causal_lm import CausalLMDrafter
from hedgespec.drafters.ngram import NGramDrafter

V = 7
ROWS = 128
LONGEST_PROMPT = 4
SMALLEST_P_VALUE = 1e-4


def chain(seed: int, layers: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=1024, initializer_range=0.5, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def table_of(model) -> torch.Tensor:
    """Logits [V, V] of the next token after each."""
    return model(torch.arange(V)[:, None]).logits[:, 0].clone()


@dataclass
class TableDrafter:
    """A Markov chain as a drafter, for next to no time."""

    name: str
    table: torch.Tensor
    draft_to_target: torch.Tensor | None = None
    vocab_size = V
    aux_layers = ()

    def session(self):
        return TableSession(self.table)


class TableSession:
    def __init__(self, table):
        self.table, self.verified = table, 0

    def consume(self, tokens, features, logits_to_keep):
        self.verified += len(tokens)
        return self.table[tokens[-logits_to_keep:]]

    def step(self, token):
        return self.table[token[0]]


def pool(target, *names: str):
    random, table = torch.Generator().manual_seed(1), table_of(target)
    close = table + 0.7 * torch.randn(V, V, generator=random)
    known = torch.tensor([5, 0, 3, 6])
    drafters = {
        "good": TableDrafter("good", close),
        "bad": TableDrafter("bad", 2 * torch.randn(V, V, generator=random)),
        "reduced": TableDrafter("reduced", close[:, known] + torch.randn(V, 4, generator=random), known),
        "ngram": NGramDrafter(V),
        "lm": CausalLMDrafter(chain(seed=3), target, name="lm"),
    }
    return [drafters[name] for name in names]


MIXED = ("good", "bad", "reduced", "ngram")


def warped(logits, temperature: float = 1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """Probabilities [V] of logits [V] as `generate` means these options, in its order."""
    logits = np.asarray(logits, dtype=np.float64) / temperature
    probs = np.exp(logits - logits.max())
    kept = np.argsort(-probs)[:top_k]
    if top_p is not None:
        mass = np.cumsum(probs[kept]) / probs[kept].sum()
        kept = kept[: np.searchsorted(mass, top_p) + 1]
    if min_p is not None:
        kept = kept[probs[kept] >= min_p * probs.max()]
    law = np.zeros(V)
    law[kept] = probs[kept] / probs[kept].sum()
    return law


def law_of(table, **sampling) -> np.ndarray:
    """[2, V, V]: of the next token, by the parity of its place and the token before it."""
    return np.array([[warped(row, **sampling) for row in rows] for rows in np.broadcast_to(table, (2, V, V))])


def p_values(sequences: torch.Tensor, emitted_by_round: list[list[int]], law: np.ndarray) -> tuple[float, float]:
    """Of the chi-squares above; 0 where a token is none that the target ever says."""
    tokens = sequences[:, LONGEST_PROMPT - 1 :].numpy()
    offsets = np.array([[0, *(offset for count in rounds for offset in range(count))] for rounds in emitted_by_round])
    parity = np.broadcast_to((LONGEST_PROMPT + np.arange(offsets.shape[1])) % 2, offsets.shape)
    before, now = tokens[:, :-1], tokens[:, 1:]
    if (law[parity, before, now] == 0).any():
        return 0.0, 0.0
    by_offset = np.zeros((offsets.max() + 1, 2, V, V))
    np.add.at(by_offset, (offsets, parity, before, now), 1)
    by_pair = np.zeros((V, 2, V, V))
    np.add.at(by_pair, (before[:, :-1], parity[:, 1:], before[:, 1:], now[:, 1:]), 1)
    return _p_value(by_offset, law), _p_value(by_pair, law)


def _p_value(counts: np.ndarray, law: np.ndarray) -> float:
    statistic, degrees = 0.0, 0
    for observed, probs in zip(counts.reshape(-1, V), np.broadcast_to(law, counts.shape).reshape(-1, V)):
        expected = observed.sum() * probs
        common = expected >= 5  # the rest as one cell, if that is enough
        cells = [*zip(observed[common], expected[common]), (observed[~common].sum(), expected[~common].sum())]
        if cells[-1][1] < 5:
            # The few draws of it would break the approximation; what is left is compared as a law of its own.
            cells.pop()
            if len(cells) > 1:
                scale = sum(seen for seen, _ in cells) / sum(wanted for _, wanted in cells)
                cells = [(seen, wanted * scale) for seen, wanted in cells]
        if len(cells) > 1:
            statistic += sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
            degrees += len(cells) - 1
    return float(stats.chi2.sf(statistic, degrees))


def prompts(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(V, (rows, LONGEST_PROMPT), generator=torch.Generator().manual_seed(2))
    padding = torch.arange(rows)[:, None] % LONGEST_PROMPT
    return {"input_ids": ids, "attention_mask": (torch.arange(LONGEST_PROMPT) >= padding).long()}


def direct(target, drafters, config: DecodeConfig, count: int, rows: int = ROWS, **sampling) -> tuple[float, float]:
    out = Decoder(target, drafters, config).generate(**prompts(rows), max_new_tokens=count, seed=0, **sampling)
    assert not any(one.failures for one in out.stats)
    return p_values(out.sequences, [one.emitted_by_round for one in out.stats], law_of(table_of(target), **sampling))


class Bias(LogitsProcessor):
    """Adds to the logits what depends on the parity of the token's place and on the token before it."""

    table = torch.randn(2, V, V, generator=torch.Generator().manual_seed(4))

    def __init__(self, stateless: bool):
        self.stateless = stateless

    def __call__(self, input_ids, scores):
        return scores + self.table[input_ids.shape[1] % 2, input_ids[:, -1]]


BAD_WORDS = [[3], [1, 2]]


def processed(target) -> np.ndarray:
    """The law's logits [2, V, V] under the bias and the bad words."""
    logits = (table_of(target) + Bias.table).numpy()
    logits[:, :, 3] = -np.inf
    logits[:, 1, 2] = -np.inf
    return logits


def through_generate(target, drafters, config: DecodeConfig, count: int, rows: int = ROWS, *, stateless: bool = True,
                     scores: bool = False, **sampling) -> tuple[float, float]:  # fmt: skip
    inputs = prompts(rows)
    inputs["input_ids"].remainder_(3)  # no prompt holds the word that nobody may say
    torch.manual_seed(0)
    out = target.generate(
        **inputs, do_sample=True, max_new_tokens=count, bad_words_ids=BAD_WORDS, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([Bias(stateless)]), output_scores=scores,
        custom_generate=Decoder(target, drafters, config), **{"top_k": 0} | sampling,
    )  # fmt: skip
    assert not any(one.failures for one in out.hedgespec)
    rounds = [one.emitted_by_round for one in out.hedgespec]
    return p_values(out.sequences, rounds, law_of(processed(target), **sampling))
