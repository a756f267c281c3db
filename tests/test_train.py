"""The zoo's training, on a tiny target: what it learns from, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.zoo import train
from hedgespec.zoo.continuations import aux_layers, continue_prompts

RECIPE = train.Recipe(draft_vocab_size=20, intermediate_size=16, batch_size=3, warmup_steps=2, checkpoint_every=4)


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.25, eos_token_id=3, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shard(target):
    prompts = torch.randint(40, (10, 5), generator=torch.Generator().manual_seed(1))
    return continue_prompts(target, prompts, 12, seed=0)


@pytest.fixture(scope="module")
def rows(shard):
    return [{key: value[row] for key, value in shard.items()} | {"prompt_length": torch.tensor(5)} for row in range(10)]


def test_continuations_are_the_targets_own_with_its_own_states(target, shard):
    tokens = shard["tokens"].long()
    out = target(tokens[:, :-1], output_hidden_states=True)
    greedy = out.logits.argmax(-1)
    for row in range(10):
        if row % 5 < 3:
            assert tokens[row, 5:].tolist() == greedy[row, 4:].tolist()
    torch.testing.assert_close(out.logits.logsumexp(-1), shard["log_normalizer"], atol=1e-4, rtol=1e-4)
    assert (greedy == shard["best"]).float().mean() > 0.98  # a tie may fall the other way in another order of sums
    states = torch.cat([out.hidden_states[layer] for layer in aux_layers(6)], -1)
    torch.testing.assert_close(states, shard["aux"].float(), atol=0.05, rtol=0.02)
    torch.testing.assert_close(out.hidden_states[-1], shard["last"].float(), atol=0.01, rtol=0.01)
    for row, length in enumerate(shard["length"].tolist()):
        ends = [place for place in range(5, 17) if tokens[row, place] in (0, 3)]
        assert length == (ends[0] + 1 if ends else 17)


def test_the_vocabulary_is_what_is_most_frequent(shard):
    vocabulary = train.draft_vocabulary([shard], 20, 40)
    ids = torch.cat([shard["tokens"].flatten(), shard["best"].flatten()]).long()
    counts = ids.bincount(minlength=40)
    assert vocabulary.tolist() == sorted(vocabulary.tolist())
    assert counts[vocabulary].min() >= max(count for token, count in enumerate(counts.tolist()) if token not in vocabulary)


def test_training_learns_and_goes_on_where_it_stopped(target, rows, tmp_path):
    vocabulary = train.draft_vocabulary(rows, 20, 40)
    plan = 30, 5e-3, (1, 3)

    def fresh():
        torch.manual_seed(0)
        return train.initial_head(target, RECIPE, vocabulary)

    def loss(head):
        batch = train.collate(rows)
        return train.batch_loss(head, batch, torch.ones(48), RECIPE, 3)[0].item()

    straight = train.train_head(fresh(), rows, *plan, RECIPE, tmp_path / "a.checkpoint", lambda line: None)
    assert loss(straight) < 0.8 * loss(fresh())

    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    with pytest.raises(Stop):  # the first report comes at step 20, with a checkpoint behind it
        train.train_head(fresh(), rows, *plan, RECIPE, path := tmp_path / "b.checkpoint", stop)
    resumed = train.train_head(fresh(), rows, *plan, RECIPE, path, lambda line: None)
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, msg=name)


def test_padding_and_what_follows_the_end_do_not_count(target, rows):
    """A sequence alone and beside a longer one gives the same loss; tokens after its end change nothing."""
    torch.manual_seed(0)
    head = train.initial_head(target, RECIPE, train.draft_vocabulary(rows, 20, 40)).requires_grad_(False)
    row = dict(rows[0]) | {"length": torch.tensor(9, dtype=torch.int32)}
    alone = train.batch_loss(head, train.collate([row]), torch.ones(48), RECIPE, 2)[0]
    other = dict(row) | {"tokens": row["tokens"].clone()}
    other["tokens"][9:] = 7
    assert train.batch_loss(head, train.collate([other]), torch.ones(48), RECIPE, 2)[0] == alone
    longer = {key: value if value.ndim == 0 else torch.cat([value, value]) for key, value in row.items()}
    longer["length"] = torch.tensor(0, dtype=torch.int32)
    beside = train.batch_loss(head, train.collate([row, longer]), torch.ones(48), RECIPE, 2)[0]
    torch.testing.assert_close(beside, alone)


def test_weights_of_the_label_add_up(target, rows):
    """With a full vocabulary the label is a distribution, so the loss is at least its entropy."""
    recipe = replace(RECIPE, hard_label=0.0, draft_vocab_size=40)
    torch.manual_seed(0)
    head = train.initial_head(target, recipe, torch.arange(40)).requires_grad_(False)
    loss = train.batch_loss(head, train.collate(rows), torch.ones(48), recipe, 1)[0]
    assert torch.isfinite(loss)
    assert loss > 0
