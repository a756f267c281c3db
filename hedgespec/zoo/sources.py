"""Where the zoo's prompts come from: one table of sources, and the filters that every prompt must pass.

A source belongs to one domain and is of one kind:

- `self`: the target writes the prompt itself, behind a system message, an open user turn and the first words of a request
  (Xu et al., "Magpie", arXiv 2406.08464).
- `file`: rows of a JSON Lines file in a folder given with `--prompts`, each with `prompt` and `licence`. Optional.
- `passage`: a request about a passage of 200 to 1,100 tokens from a package's texts or from the target's own answers.
- `template`: prompts made from templates written for this project.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hedgespec.errors import ZooError
from hedgespec.zoo import corpora, templates

DOMAINS = ("chat", "python", "sql", "math", "medicine", "legal", "french")
GOALS = {"chat": 1_500_000, **dict.fromkeys(DOMAINS[1:], 500_000)}
"""Continuation tokens to collect for each domain."""
HELD_OUT_SHARE = 0.05
OWN = "Apache-2.0 (written by the target)"
MINE = "Apache-2.0 (written for this project)"


@dataclass(frozen=True)
class Source:
    """One row of the table.

    Attributes:
        name: unique.
        domain: one of `DOMAINS`.
        kind: "self", "file", "passage" or "template".
        origin: where the prompts or passages come from.
        licence: of the prompts. For files it is a default: each row may name its own.
        share: of the domain's prompts. Shares of sources that are not available go to the domain's others.
        systems: system messages behind which prompts are written; "" is the chat template's default.
        openings: first words of the user's turn, "" for none.
        wrap: how a prompt becomes the user's message.
        contains: a regular expression that a self-written prompt must match, case ignored.
    """

    name: str
    domain: str
    kind: str
    origin: str
    licence: str
    share: float
    systems: tuple[str, ...] = ("",)
    openings: tuple[str, ...] = ("",)
    wrap: tuple[str, ...] = ("{}",)
    contains: str = ""


def _lines(text: str) -> tuple[str, ...]:
    """Openings, a line each; they end with a space where a word must follow."""
    return tuple(f"{line.strip()} " if line.strip() else "" for line in text.strip("\n").split("\n"))


PYTHON_SYSTEM = (
    "You are an AI assistant that writes Python code. The user asks for Python functions, classes and scripts, or help."
)
SQL_SYSTEM = "You are a database expert. The user describes tables of a database and asks how to write a query in SQL."
MATH_SYSTEM = "You are a mathematics tutor. The user gives a word problem with numbers, and you solve it step by step."
MEDICINE_SYSTEM = "You are a medical assistant. The user asks about a disease, its symptoms, its diagnosis or its treatment."
LEGAL_SYSTEM = "You are a legal assistant. The user asks about contracts, rights, courts or law."
TOPICS_FR = """la cuisine française|le jardinage|la ville de Paris|les volcans|le système solaire|la Révolution française|
le chocolat|les chats|les chiens|le football|le vélo|la musique classique|l'intelligence artificielle|les océans|la forêt|
le changement climatique|les dinosaures|la peinture|le cinéma|la lecture|l'économie|la santé|le sommeil|le pain|le fromage|
le vin|la montagne|la mer|les oiseaux|les abeilles|l'eau potable|l'énergie solaire|les trains|les avions|la voiture électrique|
l'école|l'université|l'apprentissage des langues|la grammaire|les mathématiques|la physique|la chimie|la biologie|l'histoire|
la géographie|la politique|la démocratie|les droits de l'homme|Napoléon|Victor Hugo|Marie Curie|Molière|Jeanne d'Arc|
le Moyen Âge|l'Égypte ancienne|Rome|la Grèce|le Canada|le Maroc|l'Afrique|l'Asie|les Alpes|la Bretagne|la Provence|
les fêtes de Noël|les vacances|l'amitié|la famille|le travail|le stress|la méditation|le sport|la course à pied|la natation|
la danse|le théâtre|la photographie|les ordinateurs|Internet|les téléphones|les jeux vidéo|les robots|la lune|les étoiles|
les insectes|les arbres|les fleurs|le café|le thé|la soupe|les crêpes|les pommes|la pluie|la neige|le vent|les saisons"""
REQUESTS_FR = (
    "Explique-moi {} en quelques phrases.", "Écris un court texte en français sur {}.", "Peux-tu me présenter {} en français ?",
    "Donne-moi cinq conseils en français sur {}.", "Écris une histoire courte en français sur {}.",
    "Écris un poème en français sur {}.", "Quels sont les avantages et les inconvénients concernant {} ? Réponds en français.",
    "Rédige une lettre en français à un ami sur {}.", "Écris un dialogue en français entre deux personnes sur ce sujet : {}.",
    "Fais une liste de dix mots français liés au sujet suivant : {}.",
    "Pourquoi le sujet suivant est-il important : {} ? Réponds en français.",
    "Rédige un paragraphe en français pour présenter {} à des enfants.", "Résume en français l'histoire du sujet suivant : {}.",
    "Write a short text in French about this topic: {}.", "Explain this topic in French: {}.",
)  # fmt: skip

SOURCES: tuple[Source, ...] = (
    Source("chat-self", "chat", "self", "the target, default system message", OWN, 0.62),
    Source("chat-opened", "chat", "self", "the target, default system message and first words of a request", OWN, 0.18,
        openings=_lines("""
            What is the
            What are the
            How do I
            How can I
            Why do
            Can you explain
            Can you help me
            Give me
            Write a
            Write an email to
            Tell me about
            I want to
            I need
            Make a list of
            Suggest
            Compare
            Describe
            Who
            Is it
            Create a
            Summarize
            Rewrite this sentence:
            Translate
            Should I
            My
            When
        """)),
    Source("chat-passage", "chat", "passage", "King James Version (Debian bible-kjv-text), SPDX licence texts (npm "
        "spdx-license-list), CPython's module documentation, the target's own answers",
        "public domain; CC0-1.0; PSF-2.0; Apache-2.0", 0.2),
    Source("python-self", "python", "self", "the target", OWN, 0.75, (PYTHON_SYSTEM,), _lines("""
            Write a Python function that
            Write a Python function to
            Write a Python program that
            Write a Python script that
            Write a Python class
            Create a Python function
            Implement a Python function
            Implement a Python class
            Develop a Python function
            How do I
            How can I use Python to
            In Python, how
            Write a function that takes a list of
            Write a function that takes a string
            Write a function that
            Write a function to check
            Write a function to find
            Write a recursive function
            Explain what this Python code does:
            What does this Python function return?
            I have a Python list
            I have a dictionary
            Fix this Python code:
            Using pandas,
            Using only the standard library, write
        """), contains=r"python|function|code|list|class|script|string|pandas|dict|program"),
    Source("mbpp", "python", "file", "python.jsonl", "CC-BY-4.0", 0.1),
    Source("python-passage", "python", "passage", "CPython's standard library", "PSF-2.0", 0.15),
    Source("sql-self", "sql", "self", "the target", OWN, 0.7, (SQL_SYSTEM,), _lines("""
            Write a SQL query that
            Write a SQL query to
            Write an SQL query to find
            Write an SQL statement
            Create a SQL table
            Given a table named
            Given the table
            I have a table called
            I have two tables,
            How do I write a SQL query
            How do I join
            What SQL query
            In SQL, how
            Explain this SQL query: SELECT
            Fix this SQL query: SELECT
            Write a query that returns
            Write a query to select
            Using SQL, find
            Design a database schema for
            Write a SQL query that joins
            Write a SQL query that groups
            What is the difference between
        """), contains=r"sql|query|table|select|database|column|join|index"),
    Source("advising", "sql", "file", "sql.jsonl", "CC-BY-4.0", 0.2, wrap=(
        "Write a SQL query that answers this question: {}", "Write a SQL query for a university database. Question: {}",
        "Translate this question into SQL.\n\n{}", "{}\n\nAnswer with a SQL query.")),
    Source("sql-template", "sql", "template", "SQL scripts from templates", MINE, 0.1),
    Source("math-self", "math", "self", "the target", OWN, 0.45, (MATH_SYSTEM,), _lines("""
            A train travels
            A farmer has
            A store sells
            A company
            A school has
            A baker
            A car
            A rectangle has
            A bag contains
            If a
            If it takes
            If the
            In a class of
            John has
            Maria buys
            Tom and Jerry
            Sarah earns
            Emily reads
            James wants to buy
            There are
            The sum of
            The price of
            What is the
            Solve
            Find the
            Calculate the
            How many
            How much
        """), contains=r"\d"),
    Source("gsm8k", "math", "file", "math.jsonl", "MIT", 0.4),
    Source("math-template", "math", "template", "arithmetic word problems from templates", MINE, 0.15),
    Source("medicine-self", "medicine", "self", "the target", OWN, 0.9, (MEDICINE_SYSTEM,), _lines("""
            What are the symptoms of
            What are the causes of
            What are the side effects of
            What is the treatment for
            What is the best treatment for
            What is the difference between
            What are the risk factors for
            How is
            How can I prevent
            How does
            How do doctors diagnose
            Can you explain
            Can I take
            My doctor
            My patient
            My child has
            I have been diagnosed with
            I have a headache
            I am a nurse
            A patient
            A 45-year-old man
            A 60-year-old woman
            Is it safe
            Explain how the vaccine
            Describe the symptoms
            What medication
            Should I see a doctor
        """), contains=r"symptom|treat|disease|patient|doctor|pain|cancer|diabet|drug|medic|blood|health|diagnos|infect|"
        r"syndrome|heart|surg|therap|virus|vaccin|chronic|skin|lung|brain|kidney|liver|pregnan|fever|headache|allerg|asthma|sleep|diet|dose"),
    Source("pubmedqa", "medicine", "file", "medicine.jsonl", "MIT", 0.1),
    Source("legal-self", "legal", "self", "the target", OWN, 0.8, (LEGAL_SYSTEM,), _lines("""
            What is the legal definition of
            What are my rights
            What are the legal requirements
            What is the difference between
            What happens if
            Can my landlord
            Can my employer
            Can I sue
            Draft a contract
            Draft a clause
            Write a contract between
            Write a non-disclosure agreement
            Write a lease agreement
            Write a letter to my landlord
            Explain the law
            Explain the concept of
            Explain the Supreme Court
            In a contract, what
            How do I file
            How does copyright
            How does the court
            Is it legal to
            I signed a contract
            I want to write a will
            Under the law,
            Does a
        """), contains=r"law|legal|contract|court|right|sue|agreement|landlord|employ|clause|licen[cs]e|copyright|liab|patent|"
        r"trademark|tax|will|property|divorce|custody|tenant|lease|crime|criminal|constitution|statut|attorney|judge|jury|evidence"),
    Source("legal-passage", "legal", "passage", "SPDX licence texts, npm spdx-license-list", "CC0-1.0", 0.2),
    Source("french-translate", "french", "self", "the target, a request for a translation", OWN, 0.5, (
        "You are a translator. The user gives an English sentence and you translate it into French.",), _lines("""
            Translate this sentence into French: "The
            Translate this sentence into French: "I
            Translate into French: "My
            Translate into French: "We
            Translate to French: "She
            Translate to French: "He
            Translate the following text to French: "In
            Translate the following text into French: "This
            How do you say in French: "Where
            How do you say in French: "Can
            How do you say in French: "It
            Translate into French: "When
            Translate this paragraph into French: "A
            Translate this paragraph into French: "There
        """)),
    Source("french-template", "french", "template", "requests in French from templates", MINE, 0.35),
    Source("french-passage", "french", "passage", "King James Version (Debian bible-kjv-text), CPython's module documentation",
        "public domain; PSF-2.0", 0.15),
)  # fmt: skip

SUMMARIES = (
    "Summarize the following text.\n\n{}", "{}\n\nSummarize the text above in two or three sentences.",
    "Please give me a short summary of this passage:\n\n{}", "What are the main points of this text?\n\n{}",
    "Here is a text:\n\n{}\n\nWrite a summary of it in one paragraph.", "TL;DR of the following:\n\n{}",
    "List the key facts in this passage as bullet points.\n\n{}",
)  # fmt: skip
QUESTIONS = (
    "Read this passage and answer the question.\n\n{}\n\nQuestion: What is this passage mainly about?",
    "{}\n\nBased on the text above, what is the most important statement, and why?",
    "Use only the following text to answer.\n\n{}\n\nQuestion: Who or what is mentioned here, and what is said about it?",
    "Context:\n{}\n\nQuestion: What happens at the end of this text?\nAnswer:",
    "Here is some context.\n\n{}\n\nWrite three questions about it, and answer each from the text.",
    "{}\n\nQuestion: What does the author want the reader to know or do?",
)
REWRITES = (
    "Rewrite the following text in simpler words.\n\n{}", "Make this text shorter and clearer:\n\n{}",
    "Rewrite this passage for a ten-year-old child.\n\n{}", "{}\n\nRewrite the text above in a formal tone.",
    "Correct any mistakes in the following text and return the corrected text.\n\n{}", "Rewrite this as an email:\n\n{}",
    "Turn the following text into a list of steps or points.\n\n{}",
)  # fmt: skip
TRANSLATIONS = (
    "Translate the following text into French.\n\n{}", "Translate this text to Spanish:\n\n{}",
    "Translate the following passage into German.\n\n{}", "{}\n\nTranslate the text above into Italian.",
)  # fmt: skip
TO_FRENCH = ("Translate the following text into French.\n\n{}", "{}\n\nTranslate the text above into French.",
             "Traduis ce texte en français.\n\n{}", "Résume ce texte en français.\n\n{}")  # fmt: skip
ABOUT_TEXT = {"summary": SUMMARIES, "question": QUESTIONS, "rewriting": REWRITES, "translation": TRANSLATIONS}
ABOUT_CODE = (
    "Explain what this Python code does.\n\n```python\n{}\n```",
    "Write a docstring for every function here:\n\n```python\n{}\n```",
    "```python\n{}\n```\n\nRewrite this code so that it is easier to read.",
    "Find possible bugs in this code:\n\n```python\n{}\n```",
    "Write unit tests for the following Python code.\n\n```python\n{}\n```",
    "Add type hints to this code:\n\n```python\n{}\n```",
    "What would you call this module, and what are its main functions?\n\n```python\n{}\n```",
)  # fmt: skip
ABOUT_LAW = (
    "Summarize the following legal text.\n\n{}", "Explain this clause in plain English:\n\n{}",
    "What obligations does this text put on the user?\n\n{}", "{}\n\nWhat rights are granted by the text above?",
    "Is the licensor liable for damages under this text? Quote the relevant sentence.\n\n{}",
    "Rewrite this legal text in simpler language.\n\n{}", "List the conditions in this licence as bullet points.\n\n{}",
)  # fmt: skip


def by_name() -> dict[str, Source]:
    """All sources by name."""
    return {source.name: source for source in SOURCES}


def check_domains(domains: tuple[str, ...]) -> None:
    """Raises: ZooError naming the first domain that is not in `DOMAINS`."""
    for domain in domains:
        if domain not in DOMAINS:
            raise ZooError(f"domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")


# --- prompts and the two sides --------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, words and numbers only, single spaces: what two prompts are compared by."""
    return " ".join(re.findall(r"\w+", text.lower()))


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        source: a name in the table.
        text: the message.
        side: "train" or "held_out". Decided before anything is generated.
        licence: of the text.
    """

    source: str
    text: str
    side: str
    licence: str

    @property
    def key(self) -> str:
        """Hash of the normalised text."""
        return hashlib.sha256(normalise(self.text).encode()).hexdigest()[:16]


def side_of(text: str) -> str:
    """The side of a prompt: `HELD_OUT_SHARE` of all hashes of normalised texts are held out."""
    digest = hashlib.sha256(normalise(text).encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


class Seen:
    """Prompts met so far, to find near-duplicates by shared word n-grams.

    An n-gram that many prompts share ("what are the symptoms") says nothing about repetition and is not counted.

    Args:
        n: words in an n-gram.
        limit: a prompt is a repeat if more than this share of its rare n-grams occurs in one other prompt.
        common: an n-gram is common once it was met more often than this.
    """

    def __init__(self, n: int = 4, limit: float = 0.6, common: int = 12):
        self.n, self.limit, self.common = n, limit, common
        self.met: dict[int, int] = {}
        self.places: dict[int, list[int]] = {}
        self.sides: list[str] = []

    def grams(self, text: str) -> set[int]:
        """Hashes of the text's n-grams; of long texts every eighth."""
        words = normalise(text).split()
        if len(words) <= self.n:
            return {_hash(" ".join(words))}
        found = {_hash(" ".join(words[i : i + self.n])) for i in range(len(words) - self.n + 1)}
        if len(words) > 150:
            found = {gram for gram in found if gram % 8 == 0} or found
        return found

    def similar(self, text: str, side: str | None = None) -> bool:
        """Whether a near-duplicate of `text` was added, to the given side if there is one."""
        rare = [gram for gram in self.grams(text) if self.met.get(gram, 0) <= self.common]
        shared: dict[int, int] = {}
        for gram in rare:
            for place in self.places.get(gram, ()):
                shared[place] = shared.get(place, 0) + 1
        return any(count > self.limit * len(rare) for place, count in shared.items() if side in (None, self.sides[place]))

    def add(self, text: str, side: str = "train", *, keep: bool = True) -> None:
        """Counts the n-grams of `text` and, unless `keep` is false, compares later prompts with it."""
        for gram in self.grams(text):
            self.met[gram] = self.met.get(gram, 0) + 1
            if keep:
                self.places.setdefault(gram, []).append(len(self.sides))
        if keep:
            self.sides.append(side)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def fault(source: Source, text: str) -> str | None:
    """Why a self-written prompt is not used, or None.

    Args:
        text: the prompt with its opening, stripped.
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) < 4 or len(text) > 1200:
        return "length"
    if "<|" in text or "�" in text:
        return "special tokens"
    if source.contains and not re.search(source.contains, text, re.IGNORECASE):
        return "off its domain"
    if len(words) >= 20 and len(set(words)) < 0.4 * len(words):
        return "repeats itself"
    if sum(ord(letter) > 127 for letter in text) > 0.05 * len(text):
        return "language"
    return None


# --- prompts that exist already -------------------------------------------------------------------------------------


def read_prompt_file(path: Path, report: Callable[[str], None]) -> list[dict]:
    """Rows of a prompt file. A bad line is reported by number and skipped.

    Raises: ZooError if the file cannot be read or holds no good line.
    """
    rows, bad = [], []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ZooError(f"{path}: expected a readable prompt file ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["prompt"], str) or not row["prompt"].strip():
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            bad.append(number)
    if bad:
        report(f"{path.name}: {len(bad)} lines skipped, no JSON object with a prompt: line {', '.join(map(str, bad[:5]))}")
    if not rows:
        raise ZooError(f"{path}: expected JSON objects with a prompt, a line each, got none")
    return rows


def file_prompts(
    source: Source, folder: Path, seed: str = "", report: Callable[[str], None] = print
) -> Iterator[tuple[str, str]]:
    """(text, licence) of the source's file, in an order that `seed` decides."""
    rows = read_prompt_file(folder / source.origin, report)
    random.Random(f"{source.name} {seed}").shuffle(rows)
    for row in rows:
        text = source.wrap[_hash(row["prompt"]) % len(source.wrap)].format(row["prompt"].strip())
        yield text, str(row.get("licence", source.licence))


def template_prompts(source: Source, seed: str = "") -> Iterator[tuple[str, str]]:
    """(text, licence) of prompts from this project's templates, in an order that `seed` decides."""
    rng = random.Random(f"{source.name} {seed}")
    texts: list[str] = []
    if source.domain == "math":
        for _, problems in templates.math():
            for part in problems.split("Question:" if "Question:" in problems else "\n\n"):
                question = re.split(r"\n?(?:Answer|Solution|A):", part)[0].strip()
                if question.endswith("?") and re.search(r"\d", question):
                    texts.append(question.removeprefix("Q:").removeprefix("Problem:").strip())
    elif source.domain == "sql":
        requests = ("Explain what this SQL does.\n\n{}", "Rewrite this SQL so that it is easier to read.\n\n{}",
                    "What result does this query return?\n\n{}", "Add comments to this SQL script.\n\n{}",
                    "Write one more query for this schema.\n\n{}")  # fmt: skip
        for _, script in templates.sql():
            texts.append(rng.choice(requests).format(script[: rng.randrange(250, 900)].rsplit("\n", 1)[0]))
    elif source.domain == "french":
        topics = [topic.strip() for topic in TOPICS_FR.replace("\n", "").split("|")]
        texts = [request.format(topic) for topic in topics for request in REQUESTS_FR]
    rng.shuffle(texts)
    for text in dict.fromkeys(texts):
        yield text, source.licence


def passages(kind: str, seed: int, report: Callable[[str], None] = print) -> Iterator[str]:
    """Endless passages of 900 to 4,500 characters: kind "code", "law", "prose" or "story".

    Raises: ZooError if no package has texts of the kind.
    """
    makers = {"code": (corpora.python,), "law": (corpora.legal,), "prose": (corpora.scripture, _module_docs, corpora.legal),
              "story": (corpora.scripture, _module_docs)}[kind]  # fmt: skip
    documents: list[list[str]] = []
    for maker in makers:
        try:
            documents.append([text for _, text in maker() if len(text) > 900])
        except (ZooError, OSError) as error:
            report(f"passages from {maker.__name__} are left out: {error}")
    documents = [each for each in documents if each]
    if not documents:
        raise ZooError(f"passages of kind {kind}: no package's texts are there")
    rng = random.Random(f"{kind} {seed}")
    while True:
        text = rng.choice(rng.choices(documents, [2, 2, 1][: len(documents)])[0])
        size = int(900 * 5 ** rng.random())
        start = rng.randrange(max(1, len(text) - size))
        if start:
            start = text.find("\n", start) + 1 or start
        cut = text[start : start + size].strip()
        if len(cut) == size or "\n" in cut[size // 2 :]:
            cut = cut[: cut.rfind("\n")] if "\n" in cut[size // 2 :] else cut[: cut.rfind(" ")]
        if len(cut) > 600:
            yield cut


def _module_docs() -> Iterator[corpora.Document]:
    """Docstrings of the standard library's modules and classes, those longer than 700 characters."""
    for name, code in corpora.python():
        for match in re.finditer(r'"""(.{700,}?)"""', code, re.DOTALL):
            text = re.sub(r"\n[ \t]+", "\n", match[1]).strip()
            if ">>>" not in text and text.count("\n") < len(text) / 30:
                yield f"{name}-{match.start()}", text


def passage_prompt(source: Source, passage: str, rng: random.Random) -> str:
    """A request about the passage, of the source's kind."""
    if source.domain == "python":
        return rng.choice(ABOUT_CODE).format(passage)
    if source.domain == "legal":
        return rng.choice(ABOUT_LAW).format(passage)
    if source.domain == "french":
        return rng.choice(TO_FRENCH).format(passage)
    return rng.choice(ABOUT_TEXT[rng.choice(list(ABOUT_TEXT))]).format(passage)
