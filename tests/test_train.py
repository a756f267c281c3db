"""The zoo's training, on a tiny target: what it learns from, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hedgespec.errors import ZooError
from hedgespec.zoo import matrix, replay, storage, train
from hedgespec.zoo.features import Features, aux_layers
from hedgespec.zoo.generation import Job, Llama, generate
from hedgespec.zoo.shards import Row

RECIPE = train.Recipe(
    draft_vocab_size=30, intermediate_size=16, batch_tokens=60, passes=8, expert_passes=3, learning_rate=5e-3, depths=(1, 3),
    expert_depths=(3,), curve_points=3, checkpoint_seconds=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.25, eos_token_id=2, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama(target):
    return Llama(target, torch.float32)


@pytest.fixture(scope="module")
def rows(llama):
    """Conversations of chat and sql, some of two turns, a quarter of them held out."""
    generator, made = torch.Generator().manual_seed(1), []
    for number in range(32):
        prompt = torch.randint(3, 40, (5 + number % 3,), generator=generator).tolist()
        temperature = float(number // 8 % 2)
        [job] = generate(llama, [Job(prompt, 14, temperature)], slots=1, ends=(2,), seed=number)
        tokens, last = [*prompt, *job.new], len(prompt)
        if number % 5 == 0:
            more = [*tokens[:-1], 2, 7, 8, 9]
            [job] = generate(llama, [Job(more, 9, temperature)], slots=1, ends=(2,), seed=number)
            tokens, last = [*more, *job.new], len(more)
        source = ("chat-self", "sql-self")[number % 2]
        made.append(Row(f"{number:016x}", source, "own", number % 8 > 5, temperature, len(prompt), last, tokens))
    return made


@pytest.fixture(scope="module")
def features(llama, rows):
    return Features(llama, rows)


def test_features_are_the_targets_states(target, features, rows, tmp_path):
    kept = Features(features.llama, rows, tmp_path)
    again = Features(features.llama, rows[3:] + rows[:3], tmp_path)
    places = [4, 0, 17]
    for place, computed, first, second in zip(places, features.get(places), kept.get(places), kept.get(places), strict=True):
        tokens = torch.tensor([rows[place].tokens])
        out = target(tokens, output_hidden_states=True)
        states = torch.cat([*(out.hidden_states[layer] for layer in aux_layers(6)), out.hidden_states[-1]], -1)[0]
        for found in (computed, first, second):
            torch.testing.assert_close(found["states"].float(), states, atol=0.05, rtol=0.02)
            torch.testing.assert_close(found["log_normalizer"], out.logits[0].logsumexp(-1), atol=1e-4, rtol=1e-4)
            assert (found["best"] == out.logits[0].argmax(-1)).float().mean() > 0.95
        assert torch.equal(first["states"], second["states"])
    done = again.files["done"].sum()
    assert done == 3  # found by their tokens, though the order of the rows is another
    assert torch.equal(again.get([1])[0]["states"], kept.get([4])[0]["states"])
    assert again.files["done"].sum() == done


def test_the_vocabulary_is_what_is_most_frequent_in_the_answers(rows):
    vocabulary = train.draft_vocabulary(rows, 20, 40)
    ids = torch.tensor([token for row in rows for start, stop in row.answers(2) for token in row.tokens[start:stop]])
    counts = ids.bincount(minlength=40)
    assert vocabulary.tolist() == sorted(vocabulary.tolist())
    assert counts[vocabulary].min() >= max(count for token, count in enumerate(counts.tolist()) if token not in vocabulary)


def test_batches_hold_every_row_once(rows):
    places = list(range(3, 32))
    made = train.batches(rows, places, 60, seed=0)
    assert sorted(place for batch in made for place in batch) == places
    assert made != train.batches(rows, places, 60, seed=1)
    widths = [max(train.span(rows[place])[1] - train.span(rows[place])[0] for place in batch) for batch in made]
    assert all(len(batch) == 1 or len(batch) * width <= 60 for batch, width in zip(made, widths, strict=True))


def test_the_loss_is_that_of_the_plain_formula(target, features, rows):
    """Against log_softmax over every position of one row at a time, with the label spelt out."""
    torch.manual_seed(0)
    head = train.initial_head(target, RECIPE, train.draft_vocabulary(rows, 30, 40))
    chosen, depth = [0, 3, 5, 10], 3
    loss, agreement = train.batch_loss(
        head, train.collate([rows[place] for place in chosen], features.get(chosen)), torch.ones(48), RECIPE, depth
    )
    total, hits, counted = [0.0] * depth, [0] * depth, [0] * depth
    for place in chosen:
        row, [state] = rows[place], features.get([place])
        tokens = torch.tensor(row.tokens)
        feature = head.fc(state["states"][:, :48].float())[None]
        logits = target(tokens[None]).logits[0]
        drafts = list(train.unrolled(head, tokens[None, 1:], feature[:, :-1], depth))
        first = train.span(row)[0]
        for start, stop in row.answers(2):
            for token in range(start + 1, stop):
                position = token - 2
                if position < first:
                    continue
                label = (1 - RECIPE.hard_label) * logits[token - 1].softmax(-1)[head.draft_to_target]
                label = label + RECIPE.hard_label * (head.draft_to_target == logits[token - 1].argmax()).float()
                for step in range(depth):
                    if position - first >= step:
                        draft = drafts[step][0, position]
                        total[step] -= (label * draft.log_softmax(-1)).sum().item()
                        hits[step] += int(head.draft_to_target[draft.argmax()] == logits[token - 1].argmax())
                        counted[step] += 1
    decays = [RECIPE.depth_decay**step for step in range(depth)]
    expected = sum(d * t / c for d, t, c in zip(decays, total, counted, strict=True)) / sum(decays)
    assert float(loss) == pytest.approx(expected, rel=0.01)
    assert agreement.tolist() == pytest.approx([hit / count for hit, count in zip(hits, counted, strict=True)], abs=0.03)


def test_gradients_of_the_fused_loss(monkeypatch):
    monkeypatch.setattr(train.SoftCrossEntropy, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, dtype=torch.float64).float().requires_grad_()
    output, weight = torch.randn(15, 6, generator=generator), torch.rand(10, generator=generator)
    label = torch.rand(10, 15, generator=generator)
    loss, best = train.SoftCrossEntropy.apply(hidden, output, label, weight)
    (3 * loss).backward()
    found, hidden.grad = hidden.grad, None
    logits = hidden @ output.T
    plain = -(weight * (label * logits.log_softmax(-1)).sum(-1)).sum()
    (3 * plain).backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, hidden.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(best, logits.argmax(-1))


def test_training_learns_and_goes_on_where_it_stopped(target, features, rows, tmp_path):
    plan = train.plan_of("chat", rows, RECIPE)
    assert all(train.domain_of(rows[place]) == "chat" and not rows[place].held_out for place in plan.places)
    vocabulary = train.draft_vocabulary(rows, 30, 40)

    def fresh():
        torch.manual_seed(0)
        return train.initial_head(target, RECIPE, vocabulary)

    def loss(head):
        batch = train.collate([rows[place] for place in plan.places], features.get(plan.places))
        return train.batch_loss(head, batch, torch.ones(48), RECIPE, 3)[0].item()

    def measure(head):
        return {"loss": loss(head)}

    straight, curve = train.train_head(fresh(), features, plan, RECIPE, tmp_path / "a.checkpoint", measure=measure)
    steps = len(train.steps_of(rows, plan, RECIPE))
    assert loss(straight) < 0.9 * loss(fresh())
    assert [point["step"] for point in curve] == train.curve_steps(steps, 3)
    assert curve[-1]["loss"] == pytest.approx(loss(straight))
    assert curve[0]["loss"] > curve[-1]["loss"]

    class Stop(Exception):
        pass

    def stop(step, steps, line):
        raise Stop

    with pytest.raises(Stop):  # the first report comes at step 5, with a checkpoint of step 4 behind it
        train.train_head(fresh(), features, plan, RECIPE, path := tmp_path / "b.checkpoint", measure=measure, progress=stop)
    assert torch.load(path, weights_only=True)["step"] == 4
    resumed, again = train.train_head(fresh(), features, plan, RECIPE, path, measure=measure)
    assert [point["step"] for point in again] == [point["step"] for point in curve]
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, msg=name)
    with pytest.raises(ZooError, match="expected a checkpoint of the same data and recipe"):
        train.train_head(fresh(), features, replace(plan, passes=3), RECIPE, path)


def test_bfloat16_products_change_little(target, features, rows):
    torch.manual_seed(0)
    head = train.initial_head(target, RECIPE, train.draft_vocabulary(rows, 30, 40))
    batch = train.collate(rows[:6], features.get(range(6)))
    exact, half = (
        train.batch_loss(head, batch, torch.ones(48), RECIPE, 3, dtype)[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    half.backward()
    assert all(weight.grad.dtype is torch.float32 for weight in head.parameters() if weight.requires_grad)


def test_padding_does_not_count(target, features, rows):
    """A row gives the same sums alone and beside longer ones."""
    torch.manual_seed(0)
    head = train.initial_head(target, RECIPE, train.draft_vocabulary(rows, 30, 40)).requires_grad_(False)
    order = sorted((place for place in range(32) if rows[place].temperature == 0), key=lambda place: len(rows[place].tokens))
    short, long = order[0], order[-1]
    alone = matrix.acceptance(head, features, [short], 4, sampled=False)[0]
    beside = matrix.acceptance(head, features, [short, long], 4, sampled=False)[0]
    assert torch.equal(alone, beside)


def test_the_chain_of_heads(target, features, rows, tmp_path):
    """chat, then an expert from it, then the joint head; a second call has nothing to do."""
    recipe, said = replace(RECIPE, passes=2, expert_passes=2), []
    with pytest.raises(ZooError, match="sql: an expert starts from the head chat, which is not in"):
        train.train(target, features, ["sql"], recipe, tmp_path)
    with pytest.raises(ZooError, match="domain math: no training rows among the 32 collected"):
        train.train(target, features, ["math"], recipe, tmp_path)
    train.train(
        target, features, ("chat", "sql", "joint"), recipe, tmp_path, licence={"commit": "c"},
        measure=lambda name, head: {"name": name}, progress=lambda name, step, steps, line: said.append((name, step, steps)),
    )  # fmt: skip
    assert [name for name, step, steps in said if step == steps] == ["chat", "sql", "joint"]
    for name in ("chat", "sql", "joint"):
        head = storage.load_head(tmp_path / f"{name}.safetensors", target)
        about = json.loads((tmp_path / f"{name}.json").read_text())
        assert about["head"] == head.name == name
        assert about["recipe"]["draft_vocab_size"] == head.config.draft_vocab_size == 30
        assert [point["name"] for point in about["curve"]] == [name] * len(about["curve"])
        assert about["commit"] == "c"
    chat, sql = (train.plan_of(name, rows, recipe) for name in ("chat", "sql"))
    mixed = [place for place in sql.places if train.domain_of(rows[place]) == "chat"]
    assert 0 < len(mixed) < 0.25 * len(sql.places)
    joint = train.plan_of("joint", rows, recipe)
    assert set(joint.places) == {*chat.places, *sql.places}
    total = [len(train.steps_of(rows, plan, recipe)) for plan in (chat, sql, joint)]
    assert abs(total[2] - total[0] - total[1]) <= 2
    before = (tmp_path / "chat.safetensors").read_bytes()
    train.train(target, features, ["chat"], recipe, tmp_path)
    assert (tmp_path / "chat.safetensors").read_bytes() == before


# --- the matrix -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(target, features, rows, tmp_path_factory):
    torch.manual_seed(0)
    head = train.initial_head(target, RECIPE, train.draft_vocabulary(rows, 30, 40))
    plan = replace(train.plan_of("chat", rows, RECIPE), places=list(range(32)), passes=30)
    trained, _ = train.train_head(head, features, plan, RECIPE, tmp_path_factory.mktemp("head") / "a.checkpoint")
    return trained.requires_grad_(False).eval()


def test_rounds_at_temperature_0_are_those_of_drafting(target, head, features, rows):
    """The unrolled pass and the recursion against `replay`, which drafts with a session."""
    places = [place for place, row in enumerate(rows) if row.temperature == 0 and row.last_start == row.prompt_length]
    emitted = 0
    for place in places:
        row = rows[place]
        if len(row.tokens) - row.prompt_length < 2:
            continue
        text = replay.read(target, torch.tensor(row.tokens), row.prompt_length, [head])
        expected = replay.fixed_rounds(head, text, 3)
        found = matrix.tokens_per_round(head, features, [place], 3, sampled=False)
        assert found["by_row"] == [[sum(expected), len(expected)]]
        emitted += sum(expected) - len(expected)
    assert emitted > 10  # drafts were accepted, or this shows nothing


def test_rounds_at_temperature_1_are_expected_rounds():
    """The recursion against rounds drawn at random."""
    accept = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)).numpy()
    expected, by_depth = matrix.rounds(accept, first=3, start=4, stop=16)
    generator = torch.Generator().manual_seed(1)
    counts, depths = [], torch.zeros(3)
    for _ in range(4000):
        known, count = 5, 0
        while known < 16:
            reached = 0
            while (
                reached < min(3, 16 - known - 1) and torch.rand((), generator=generator) < accept[reached, known - 5 + reached]
            ):
                depths[reached] += 1
                reached += 1
            known += reached + 1
            count += 1
        counts.append(count)
    assert expected == pytest.approx(sum(counts) / 4000, rel=0.02)
    assert by_depth.tolist() == pytest.approx((depths / 4000).tolist(), rel=0.06)


def test_acceptance_at_temperature_1_is_the_ratio_of_the_probabilities(target, head, features, rows):
    place = next(place for place, row in enumerate(rows) if row.temperature == 1 and len(row.tokens) - row.prompt_length > 4)
    row = rows[place]
    [found] = matrix.acceptance(head, features, [place], 1, sampled=True)
    text = replay.read(target, torch.tensor(row.tokens), row.prompt_length, [head])
    logits = head.session().consume(
        text.tokens[:-1], text.features[head.aux_layers][:-1], len(row.tokens) - row.prompt_length - 1
    )
    for number, token in enumerate(row.tokens[row.prompt_length + 1 :]):
        target_prob = text.logits[number + 1].softmax(-1)[token]
        index = (head.draft_to_target == token).nonzero()
        draft_prob = logits[number].softmax(-1)[index[0, 0]] if len(index) else torch.tensor(0.0)
        assert float(found[0, number]) == pytest.approx(min(1, float(draft_prob / target_prob)), abs=0.03)


def test_the_matrix_is_written(head, features, tmp_path):
    result = matrix.measure([head], features, per_domain=3, draft_length=2)
    assert set(result["tokens_per_round"]) == {"greedy", "sampled"}
    for kind, domains in result["tokens_per_round"].items():
        assert set(domains) == {"chat", "sql"}
        for domain, figures in domains.items():
            assert 1 <= figures["eagle"] <= 3
            assert all(0 <= share <= 1 for share in result["acceptance_by_depth"][kind][domain]["eagle"])
            assert 1 <= result["rows"][kind][domain] <= 3
    pytest.importorskip("matplotlib")
    matrix.write(result, tmp_path)
    assert json.loads((tmp_path / "matrix.json").read_text()) == json.loads(json.dumps(result))
    assert "| chat (" in (tmp_path / "matrix.md").read_text()
    assert (tmp_path / "matrix.svg").stat().st_size > 1000
