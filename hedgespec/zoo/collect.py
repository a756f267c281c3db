"""`hedgespec zoo collect`: the target's own answers to the prompts of every domain, as shards of token ids.

Several workers may share a folder, on this machine (locked) or one after another on several machines. Each cycle of a worker
writes some prompts of every domain, in proportion to what is missing, and answers them: so an interrupted collection is
balanced. Every prompt and every answer is appended to the worker's journal when it is finished.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

import hedgespec
from hedgespec.errors import ZooError
from hedgespec.zoo import shards, sources
from hedgespec.zoo.generation import Job, Llama, generate
from hedgespec.zoo.shards import Journal, Row, as_entry
from hedgespec.zoo.sources import DOMAINS, GOALS, Prompt, Seen, Source

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END, START, NOTHING = 2, 1, 0
"""Ids of <|im_end|>, <|im_start|> and <|endoftext|>."""
ENDS = (END, START, NOTHING)
MAX_ANSWER, MAX_PROMPT = 256, 160
MAX_PROMPT_TOKENS = 1500
"""Longer prompts, chat template included, are left out."""
MAX_PROMPT_OF_TWO = 300
"""Chats with longer prompts get no second turn."""
PARTIAL_SECONDS = 20
SECOND_TURN_SHARE = 0.2
SHARD_TOKENS = 400_000
"""A worker's journal becomes a shard when it holds so many tokens."""


@dataclass(frozen=True)
class Settings:
    """What a collection does.

    Attributes:
        domains: of `sources.DOMAINS`.
        goals: continuation tokens by domain; collecting stops when all are reached.
        prompts: folder of prompt files, None to leave such sources out.
        already: folders with shards that count as collected; they are only read.
        cycle: prompts of a cycle, before filters.
        slots: texts decoded together.
        max_answer: tokens of an answer.
        seed: of the run; every worker and cycle draws from its own stream.
        minutes: the collection stops after the cycle that is running then; None never.
    """

    domains: tuple[str, ...] = DOMAINS
    goals: dict[str, int] = field(default_factory=lambda: dict(GOALS))
    prompts: Path | None = None
    already: tuple[Path, ...] = ()
    cycle: int = 640
    slots: int = 64
    max_answer: int = MAX_ANSWER
    seed: int = 0
    minutes: float | None = None


def description(settings: Settings, llama_dtype: str) -> dict:
    """What a manifest says besides counts."""
    import transformers

    from hedgespec.zoo.target import NAME, PACKAGE

    return {
        "target": NAME, "target_package": PACKAGE, "seed": settings.seed, "max_answer": settings.max_answer,
        "dtype": llama_dtype,
        "versions": {"hedgespec": hedgespec.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip


class Worker:
    """One process's share of a collection.

    Args:
        llama: the target.
        tokenizer: the target's.
        folder: of the collection.
        settings: see `Settings`.
        report: receives lines for the user.
        tick: called with the number of tokens of each forward.
    """

    def __init__(self, llama: Llama, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Settings,
                 report: Callable[[str], None] = print, tick: Callable[[int], None] = lambda tokens: None):  # fmt: skip
        sources.check_domains(settings.domains)
        self.llama, self.tokenizer, self.folder, self.settings = llama, tokenizer, folder, settings
        self.report, self.tick = report, tick
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.lock = self._take_name()
        self.journal = Journal(folder / f"{self.name}.journal")
        self.rows: dict[tuple[str, bool], Row] = {}
        self.pending: dict[str, Prompt] = {}
        self.seen = Seen()
        self.keys: set[str] = set()
        self.table = [source for source in sources.SOURCES if source.domain in settings.domains]
        self.makers: dict[str, Iterator] = {}
        self.lost: set[str] = set()
        """Sources that have nothing more to give here."""
        self.written = 0
        """Tokens of answers kept since the caller last set it to 0."""
        self.file_texts = self._file_texts()
        self.partial, self.saved = folder / f"{self.name}.partial", time.monotonic()
        self.refresh()
        own = [Row(**entry["row"]) for entry in Journal.read(self.journal.path) if "row" in entry]
        self.single = {row.id: row for row in own if self.rows[row.id].last_start == row.prompt_length}
        """Conversations of one turn that may get a second: those of the journal."""
        self.interrupted = self.read_partial()

    def _take_name(self) -> tuple[str, FileLock]:
        for number in itertools.count():
            lock = FileLock(self.folder / f"worker-{number:02d}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return f"worker-{number:02d}", lock
        raise AssertionError

    def close(self) -> None:
        self.journal.close()
        self.lock.release()

    def _file_texts(self) -> set[str]:
        """Normalised rows of all prompt files: no self-written prompt may copy one."""
        texts = set()
        for source in sources.SOURCES:
            if source.kind != "file":
                continue
            if self.settings.prompts is None or not (self.settings.prompts / source.origin).exists():
                self.lost.add(source.name)
                continue
            for row in sources.read_prompt_file(self.settings.prompts / source.origin, self.report):
                texts.add(sources.normalise(row["prompt"]))
        return texts

    def refresh(self) -> None:
        """Reads what all workers have collected so far."""
        self.rows = shards.read_folder(self.folder, *self.settings.already)
        answered = {row.key for row in self.rows.values()}
        for row in self.rows.values():
            if row.key not in self.keys:
                self.keys.add(row.key)
                self.seen.add(self.user_text(row.tokens), "held_out" if row.held_out else "train")
        for path in sorted(self.folder.glob("*.journal")):
            for entry in Journal.read(path):
                if "prompt" not in entry:
                    continue
                prompt = Prompt(**entry["prompt"])
                if prompt.key not in self.keys:
                    self.keys.add(prompt.key)
                    self.seen.add(prompt.text, prompt.side)
                domain = sources.by_name()[prompt.source].domain
                if path == self.journal.path and prompt.key not in answered and domain in self.settings.domains:
                    self.pending[prompt.key] = prompt
        self.pending = {key: prompt for key, prompt in self.pending.items() if key not in answered}

    def user_text(self, tokens: list[int]) -> str:
        """The first user message of a conversation."""
        text = self.tokenizer.decode(tokens)
        return text.split("<|im_start|>user\n", 1)[-1].split("<|im_end|>", 1)[0]

    def counts(self) -> dict[str, int]:
        """Continuation tokens collected by domain."""
        counts, table = dict.fromkeys(self.settings.domains, 0), sources.by_name()
        for row in self.rows.values():
            if (domain := table[row.source].domain) in counts:
                counts[domain] += row.written(END)
        return counts

    # --- prompts ----------------------------------------------------------------------------------------------------

    def plan(self, rng: random.Random) -> list[Source]:
        """The sources of a cycle's prompts: domains that are behind get more, a domain's sources by their shares."""
        counts = self.counts()
        goals = {domain: self.settings.goals[domain] for domain in self.settings.domains}
        done = {domain: counts[domain] / goals[domain] for domain in goals}
        open_domains = [domain for domain in goals if done[domain] < 1]
        level = max(min(done.values()) + 0.02, sum(done.values()) / len(done))
        missing = {domain: goals[domain] * max(0.02, level + 0.02 - done[domain]) for domain in open_domains}
        total = sum(missing.values())
        chosen = []
        for domain, weight in missing.items():
            table = [source for source in self.table if source.domain == domain and source.name not in self.lost]
            if not table:
                raise ZooError(f"domain {domain}: no source has prompts left; give --prompts or leave it out with --domains")
            count = max(1, round(self.settings.cycle * weight / total))
            chosen += rng.choices(table, [source.share / (2.5 if source.kind != "self" else 1) for source in table], k=count)
        return chosen

    def write_prompts(self, seed: int) -> None:
        """Adds a cycle's prompts to the pending ones, each journalled once it is accepted."""
        rng = random.Random(f"{self.settings.seed} {self.name} {seed}")
        jobs = []
        for source in self.plan(rng):
            if source.kind == "self":
                system, opening = rng.choice(source.systems), rng.choice(source.openings).rstrip()
                head = self.system_ids(system) + self.tokenizer(f"<|im_start|>user\n{opening}")["input_ids"]
                label = {"kind": "ask", "source": source.name, "opening": opening, "start": len(head)}
                jobs.append(Job(head, MAX_PROMPT, rng.choice((0.8, 1.0)), 0.95, label=label))
                continue
            found = self.existing(source, rng)
            if found is not None:
                self.offer(source, *found)
        self.ask(jobs, rng)

    def ask(self, jobs: list[Job], rng: random.Random) -> None:
        """Has the target finish prompts, and offers those that pass the filters."""
        table = sources.by_name()
        for job in self.run(jobs, rng):
            source = table[job.label["source"]]
            text = self.text_of(job, job.label["opening"])
            if text is not None and sources.fault(source, text) is None and sources.normalise(text) not in self.file_texts:
                self.offer(source, text, source.licence)

    def text_of(self, job: Job, opening: str = "") -> str | None:
        """What a job wrote since its start, or None if it did not come to an end."""
        if job.new[-1] != END:
            return None
        return (opening + self.tokenizer.decode([*job.tokens, *job.new][job.label["start"] : -1])).strip()

    def existing(self, source: Source, rng: random.Random) -> tuple[str, str, str | None] | None:
        """(text, licence, side or None to go by the text) of a prompt that need not be written; None if there is none now."""
        if source.kind == "passage":
            kind = {"python": "code", "legal": "law", "french": "story"}.get(source.domain, "prose")
            own = [row for row in self.rows.values() if row.source == "chat-self" and len(row.tokens) - row.last_start > 200]
            if kind == "prose" and own and rng.random() < 0.5:
                picked = rng.sample(own, min(len(own), rng.choice((1, 2, 3))))
                picked = [row for row in picked if row.held_out == picked[0].held_out]
                passage = "\n\n".join(
                    self.tokenizer.decode([t for t in row.tokens[row.last_start :] if t > 2]) for row in picked
                )
                side = "held_out" if picked[0].held_out else "train"
                return sources.passage_prompt(source, passage.strip(), rng), source.licence, side
            key = f"{source.name} {kind}"
            try:
                if key not in self.makers:
                    self.makers[key] = sources.passages(kind, rng.randrange(2**31), self.report)
                passage = next(self.makers[key])
            except ZooError as error:
                self.report(f"{source.name} is left out: {error}")
                self.lost.add(source.name)
                return None
            return sources.passage_prompt(source, passage, rng), source.licence, None
        if source.name not in self.makers:
            if source.kind == "file":
                assert self.settings.prompts is not None  # else the source is not in the table
                made = sources.file_prompts(source, self.settings.prompts, self.name, self.report)
            else:
                made = sources.template_prompts(source, self.name)
            self.makers[source.name] = made
        for text, licence in self.makers[source.name]:
            if replace(_BLANK, text=text).key not in self.keys:
                return text, licence, None
        self.report(f"{source.name} has no prompts left")
        self.lost.add(source.name)
        return None

    def offer(self, source: Source, text: str, licence: str, side: str | None = None) -> None:
        """Accepts a prompt unless it, or a near-duplicate, was accepted before."""
        prompt = Prompt(source.name, text, side or sources.side_of(text), licence)
        repeat = prompt.key in self.keys or self.seen.similar(text)
        self.seen.add(text, prompt.side, keep=not repeat)
        if not repeat:
            self.keys.add(prompt.key)
            self.pending[prompt.key] = prompt
            self.journal.append({"prompt": prompt.__dict__})

    def system_ids(self, system: str) -> list[int]:
        """The ids of a system message, the template's default for ""."""
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": ""}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self.tokenizer(text.split("<|im_start|>user\n")[0])["input_ids"]

    # --- answers ----------------------------------------------------------------------------------------------------

    def answer_jobs(self, rng: random.Random) -> list[Job]:
        """Jobs for the pending prompts: half of the training rows greedy, half at 0.7 to 1; held-out ones greedy and at 1."""
        jobs = []
        for prompt in self.pending.values():
            ids = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}], add_generation_prompt=True)
            ids = list(ids["input_ids"])
            if len(ids) > MAX_PROMPT_TOKENS:
                continue
            greedy = int(prompt.key[-1], 16) % 2 == 0
            temperatures = (0.0, 1.0) if prompt.side == "held_out" else (0.0 if greedy else round(rng.uniform(0.7, 1.0), 2),)
            row = {"key": prompt.key, "source": prompt.source, "licence": prompt.licence, "held_out": prompt.side == "held_out"}
            for temperature in temperatures:
                label = {"kind": "answer", "row": row, "prompt_length": len(ids), "start": len(ids)}
                jobs.append(Job(ids, self.settings.max_answer, temperature, label=label))
        return jobs

    def answer(self, seed: int) -> None:
        """Answers what is pending; a fifth of the chats is continued with a follow-up prompt and a second answer."""
        rng = random.Random(f"answers {self.settings.seed} {self.name} {seed}")
        begun = {
            kind: [job for job in self.interrupted if job.label["kind"] == kind] for kind in ("ask", "answer", "follow-up")
        }
        self.interrupted = []
        self.ask(begun["ask"], rng)
        known = {(job.label["row"]["key"], job.temperature > 0) for job in begun["answer"]} | set(self.rows)
        fresh = [job for job in self.answer_jobs(rng) if (job.label["row"]["key"], job.temperature > 0) not in known]
        for job in self.run(begun["answer"] + fresh, rng):
            self.keep(job)
        last: list[Job] = []
        for job in self.run(begun["follow-up"] + self.follow_ups({job.label["row"]["key"] for job in begun["follow-up"]}), rng):
            text = self.text_of(job)
            if text is not None and len(text.split()) >= 2 and "<|" not in text:
                tokens = [*job.tokens, *job.new, *self.tokenizer("\n<|im_start|>assistant\n")["input_ids"]]
                label = job.label | {"kind": "answer", "start": len(tokens)}
                last.append(Job(tokens, self.settings.max_answer, job.label["temperature"], label=label))
        for job in self.run(last, rng):
            self.keep(job)
        self.pending, self.single = {}, {}
        self.partial.unlink(missing_ok=True)

    def follow_ups(self, begun: set[str]) -> list[Job]:
        """Jobs that write the next user message of `SECOND_TURN_SHARE` of the short chats whose answer came to an end."""
        head, jobs = self.tokenizer("\n<|im_start|>user\n")["input_ids"], []
        for row in self.single.values():
            chat = sources.by_name()[row.source].domain == "chat"
            chosen = int(row.key[:4], 16) < SECOND_TURN_SHARE * 65536 and row.key not in begun
            if chat and chosen and row.tokens[-1] == END and row.prompt_length < MAX_PROMPT_OF_TWO:
                fields = {"key": row.key, "source": row.source, "licence": row.licence, "held_out": row.held_out}
                label = {"kind": "follow-up", "row": fields, "prompt_length": row.prompt_length, "temperature": row.temperature,
                         "start": len(row.tokens) + len(head)}  # fmt: skip
                jobs.append(Job([*row.tokens, *head], MAX_PROMPT, 0.9, 0.95, label=label))
        return jobs

    def run(self, jobs: list[Job], rng: random.Random) -> Iterator[Job]:
        """Generates for jobs, sorted by length; long ones in fewer slots, so that memory and attention stay bounded."""
        jobs = sorted(jobs, key=lambda job: len(job.tokens))
        for low, high, share in ((0, 300, 1), (300, 700, 2), (700, 10**9, 4)):
            part = [job for job in jobs if low <= len(job.tokens) < high]
            slots = max(1, self.settings.slots // share)
            yield from generate(
                self.llama, part, slots=slots, ends=ENDS, seed=rng.randrange(2**31), tick=self.tick, watch=self.save_partial
            )

    def save_partial(self, active: list[Job]) -> None:
        """Every `PARTIAL_SECONDS`: writes down the texts that have not ended, so that a kill loses no more than that."""
        if time.monotonic() - self.saved < PARTIAL_SECONDS:
            return
        self.saved = time.monotonic()
        entries = [
            {"tokens": [*job.tokens, *job.new], "max_new_tokens": job.max_new_tokens - len(job.new),
             "temperature": job.temperature, "top_p": job.top_p, "label": job.label}
            for job in active
        ]  # fmt: skip
        shards.write_atomically(self.partial, json.dumps(entries).encode())

    def read_partial(self) -> list[Job]:
        """The texts that had not ended when this worker was killed, as jobs that go on with them."""
        try:
            entries = json.loads(self.partial.read_bytes())
        except (OSError, ValueError):
            return []
        table, jobs = sources.by_name(), [Job(**entry) for entry in entries]
        found = []
        for job in jobs:
            name = job.label.get("source") or job.label["row"]["source"]
            if name not in table or table[name].domain not in self.settings.domains or job.max_new_tokens < 1:
                continue
            if job.label["kind"] == "answer":
                done = self.rows.get((job.label["row"]["key"], job.temperature > 0))
                if done is not None and len(done.tokens) >= len(job.tokens):
                    continue
            found.append(job)
        return found

    def keep(self, job: Job) -> None:
        """Journals a finished answer."""
        label = job.label
        row = Row(**label["row"], temperature=job.temperature, prompt_length=label["prompt_length"], last_start=label["start"],
                  tokens=[*job.tokens, *job.new])  # fmt: skip
        self.rows[row.id] = row
        if row.last_start == row.prompt_length:
            self.single[row.id] = row
        self.written += len(row.tokens) - row.last_start
        self.journal.append(as_entry(row))

    def seal(self, *, minimum: int = SHARD_TOKENS) -> None:
        """Turns the journal into a shard if it holds `minimum` tokens. Prompts without an answer stay in the journal."""
        rows = shards.merge(Row(**entry["row"]) for entry in Journal.read(self.journal.path) if "row" in entry)
        if not rows or sum(len(row.tokens) for row in rows.values()) < minimum:
            return
        shards.write_shard(self.folder, self.name, rows.values())
        self.journal.rewrite({"prompt": prompt.__dict__} for prompt in self.pending.values())

    def cycle(self, number: int) -> None:
        """Prompts, answers, and what follows from them."""
        if not self.pending and not self.interrupted:
            self.write_prompts(number)
        self.answer(number)
        self.seal()
        self.refresh()


_BLANK = Prompt("", "", "train", "")


def one_sided(rows: list[Row]) -> list[Row]:
    """The rows without those of the training side whose prompt is a near-duplicate of a held-out one.

    Prompts are compared by token n-grams, as the filters compare words. One worker never makes such rows; two at a time may.
    """

    def grams(row: Row) -> set[tuple[int, ...]]:
        prompt = row.tokens[: row.prompt_length]
        start = len(prompt) - 1 - prompt[::-1].index(START, 4) if START in prompt[::-1][4:] else 0
        words = prompt[start + 3 : -4]
        return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))}

    places: dict[tuple[int, ...], list[int]] = {}
    met: dict[tuple[int, ...], set[str]] = {}
    for number, row in enumerate(rows):
        for gram in grams(row):
            met.setdefault(gram, set()).add(row.key)
            if row.held_out:
                places.setdefault(gram, []).append(number)
    kept = []
    for row in rows:
        if not row.held_out:
            rare = [gram for gram in grams(row) if len(met[gram]) <= 12]
            shared: dict[str, int] = {}
            for gram in rare:
                for key in {rows[place].key for place in places.get(gram, ())}:
                    shared[key] = shared.get(key, 0) + 1
            if any(count > 0.6 * len(rare) for count in shared.values()):
                continue
        kept.append(row)
    return kept


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: Settings,
    *,
    console: Console | None = None,
    workers: int = 1,
    command: list[str] | None = None,
) -> dict[str, int]:
    """Collects until every domain has reached its goal, and returns the continuation tokens of each.

    Args:
        model: the zoo's target.
        tokenizer: the target's.
        folder: where journals, shards and manifest go; what is there already is gone on with.
        settings: see `Settings`.
        console: a rich console for the progress bar.
        workers: processes that collect, this one included, each with an equal share of the threads.
        command: of the other workers' processes. Their output goes to `NUMBER.log` in the folder.

    Raises: ZooError for an unknown domain, a prompt file without good lines, or a disk that is full. Nothing that was finished
    before is lost.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console()
    sources.check_domains(settings.domains)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    others = [_start(command, folder / f"{number}.log") for number in range(1, workers)] if command else []
    llama = Llama(model, rows=settings.slots)
    worker = Worker(llama, tokenizer, folder, settings, lambda line: console.print(line, highlight=False))
    began, generated, shown = time.time(), 0, 0.0
    counts = worker.counts()
    base, goal = sum(counts.values()), sum(settings.goals[domain] for domain in settings.domains)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, refresh_per_second=2) as progress:
            bar = progress.add_task(worker.name, total=goal, completed=base, state="")

            def tick(tokens: int) -> None:
                nonlocal generated, shown
                generated += tokens
                if (now := time.time()) - shown > 1:
                    shown = now
                    done = sum(counts.values()) + worker.written
                    state = f"{done / 1e6:.2f}M of {goal / 1e6:.1f}M tokens, {generated / (now - began):.0f} tokens/s"
                    if done > base:
                        state += f", {(goal - done) * (now - began) / (done - base) / 3600:.1f} h left"
                    progress.update(bar, completed=min(done, goal), state=state)

            worker.tick = tick
            for number in itertools.count(int(began)):
                counts = worker.counts()
                worker.written = 0
                late = settings.minutes is not None and time.time() - began > 60 * settings.minutes
                if late or all(counts[domain] >= settings.goals[domain] for domain in counts):
                    break
                before = generated, time.time()
                worker.cycle(number)
                rate = (generated - before[0]) / (time.time() - before[1])
                shares = ", ".join(f"{domain} {tokens / 1e3:.0f}k" for domain, tokens in worker.counts().items())
                worker.report(f"{time.strftime('%H:%M:%S')} {worker.name}: {rate:.0f} tokens/s; {shares}")
            worker.seal(minimum=1)
            with FileLock(folder / "manifest.lock"):
                shards.write_manifest(folder, worker.rows.values(), END, description(settings, str(llama.dtype)))
    finally:
        worker.close()
        for process in others:
            if sys.exc_info()[0] is not None:
                process.terminate()
            process.wait()
    return counts


def _start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts another worker with one thread, its output going to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def pack(folder: Path, destination: Path) -> Path | None:
    """Adds what `folder` has and `destination` has not as one new shard to `destination`, and returns its path or None.

    Raises: ZooError if nothing is collected in `folder`, or `destination` cannot be written.
    """
    if not shards.read_folder(folder):
        raise ZooError(f"{folder}: expected a collection, found no rows")
    return shards.pack(folder, destination, END, description(Settings(), "bfloat16 or float32, as each worker measured"))
