"""Text written for this project: SQL scripts, arithmetic word problems, French prose, chat requests. Seeded, reproducible."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = "Anna Ben Carla David Elena Farid Grace Hugo Ines Jack Kira Liam Maya Noah Olga Peter Quinn Rosa Sam Tara".split()


def _documents(kind: str, count: int) -> Iterator[tuple[str, random.Random]]:
    for number in range(count):
        identifier = f"{kind}-{number:04d}"
        yield identifier, random.Random(identifier)


# --- SQL ------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "name": "VARCHAR(100) NOT NULL",
    "email": "VARCHAR(255) UNIQUE",
    "price": "DECIMAL(10, 2)",
    "quantity": "INTEGER",
    "created_at": "TIMESTAMP DEFAULT CURRENT_TIMESTAMP",
    "status": "VARCHAR(20)",
    "description": "TEXT",
    "age": "INTEGER",
    "salary": "DECIMAL(10, 2)",
    "city": "VARCHAR(50)",
    "country": "VARCHAR(50)",
    "phone": "VARCHAR(20)",
    "address": "TEXT",
    "title": "VARCHAR(200)",
    "rating": "FLOAT",
    "birth_date": "DATE",
    "is_active": "BOOLEAN",
    "amount": "DECIMAL(12, 2)",
    "weight": "FLOAT",
    "updated_at": "TIMESTAMP",
    "category": "VARCHAR(50)",
    "score": "INTEGER",
}
TABLES = """customers orders products employees departments suppliers invoices payments students courses teachers books
authors loans members flights airports bookings hotels rooms patients doctors appointments vehicles drivers shipments
warehouses projects tasks users sessions articles comments tags teams players matches accounts transactions branches
sensors measurements recipes ingredients albums tracks artists playlists tickets events venues""".split()
NUMERIC = [name for name, kind in COLUMNS.items() if kind.startswith(("DEC", "INT", "FLO"))]
CITIES = "London Paris Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Athens Warsaw".split()


def _sql_statement(rng: random.Random, table: str, columns: list[str], other: str) -> str:
    numeric = [name for name in columns if name in NUMERIC] or ["id"]
    key, number, text = f"{table.rstrip('s')}_id", rng.choice(numeric), rng.choice(columns)
    few = ", ".join(rng.sample(columns, min(3, len(columns))))
    return rng.choice(
        (
            f"SELECT {few}\nFROM {table}\nWHERE {number} > {rng.randrange(10, 500)}\nORDER BY {number} DESC;",
            f"SELECT {text}, COUNT(*) AS total\nFROM {table}\nGROUP BY {text}\nHAVING COUNT(*) > {rng.randrange(2, 20)};",
            f"SELECT a.{text}, b.id\nFROM {table} AS a\nINNER JOIN {other} AS b ON a.id = b.{key}\n"
            f"WHERE a.{number} < {rng.randrange(10, 900)};",
            f"UPDATE {table}\nSET {number} = {number} + {rng.randrange(1, 50)}\nWHERE id = {rng.randrange(1, 999)};",
            f"DELETE FROM {table}\nWHERE {number} < {rng.randrange(1, 30)};",
            f"CREATE INDEX idx_{table}_{text} ON {table} ({text});",
            f"ALTER TABLE {other}\nADD COLUMN {key} INTEGER REFERENCES {table} (id);",
            f"SELECT AVG({number}) AS average_{number}, MAX({number}) AS highest_{number}\nFROM {table};",
            f"INSERT INTO {table} (id, city, {number})\nVALUES "
            + ",\n       ".join(f"({i}, '{rng.choice(CITIES)}', {rng.randrange(1, 999)})" for i in range(1, 4))
            + ";",
        )
    )


def sql() -> Iterator[tuple[str, str]]:
    for identifier, rng in _documents("sql", 600):
        parts = []
        first, second, third = rng.sample(TABLES, 3)
        for table, other in ((first, second), (second, third), (third, first)):
            columns = rng.sample(list(COLUMNS), rng.randrange(3, 7))
            body = ",\n".join(["    id INTEGER PRIMARY KEY", *(f"    {name} {COLUMNS[name]}" for name in columns)])
            parts.append(f"CREATE TABLE {table} (\n{body}\n);")
            parts += [_sql_statement(rng, table, columns, other) for _ in range(rng.randrange(2, 5))]
        yield identifier, "-- schema and queries\n" + "\n\n".join(parts)


# --- arithmetic -----------------------------------------------------------------------------------------------------

THINGS = """apples pencils marbles stamps cookies books coins shells stickers oranges eggs cards balloons roses candles
bottles tickets plates chairs lamps pears buttons toys cups boxes""".split()


def _problem(rng: random.Random) -> str:
    who, friend = rng.sample(NAMES, 2)
    thing, other = rng.sample(THINGS, 2)
    a, b, c = rng.randrange(12, 90), rng.randrange(2, 12), rng.randrange(2, 10)
    question, steps, answer = rng.choice(
        (
            (
                f"{who} has {a} {thing}. {friend} gives {who} {b} more {thing}. How many {thing} does {who} have now?",
                f"{who} has {a} {thing} and gets {b} more. {a} + {b} = {a + b}.",
                a + b,
            ),
            (
                f"{who} has {a} {thing} and loses {b} of them. How many {thing} are left?",
                f"{who} had {a} {thing} and lost {b}. {a} - {b} = {a - b}.",
                a - b,
            ),
            (
                f"There are {b} boxes with {c} {thing} in each box. How many {thing} are there in all?",
                f"There are {b} boxes and each has {c} {thing}. {b} * {c} = {b * c}.",
                b * c,
            ),
            (
                f"{who} shares {b * c} {thing} equally among {b} friends. How many {thing} does each friend get?",
                f"{b * c} {thing} are shared among {b} friends. {b * c} / {b} = {c}.",
                c,
            ),
            (
                f"{who} buys {b} {thing} at {c} dollars each and pays with {b * c + a} dollars. "
                f"How much change does {who} get?",
                f"The {thing} cost {b} * {c} = {b * c} dollars. {b * c + a} - {b * c} = {a}.",
                a,
            ),
            (
                f"{who} has {a} {thing} and {b} {other}. {friend} has {c} {thing}. How many {thing} do they have together?",
                f"{who} has {a} {thing} and {friend} has {c} {thing}. {a} + {c} = {a + c}.",
                a + c,
            ),
        )
    )
    return f"Question: {question}\nAnswer: {steps} The answer is {answer}.\n"


def math() -> Iterator[tuple[str, str]]:
    for identifier, rng in _documents("math", 900):
        yield identifier, "Solve each problem step by step.\n\n" + "\n".join(_problem(rng) for _ in range(6))


# --- French ---------------------------------------------------------------------------------------------------------

FRENCH = {
    "qui": """ma grand-mère|le vieux pêcheur|la jeune institutrice|mon voisin|le boulanger du village|la directrice de
l'école|un étudiant italien|la petite fille|le médecin|notre guide|une voyageuse|le jardinier|la libraire|mon frère|le
maire de la ville|une amie d'enfance|le professeur de musique|la cuisinière|le facteur|un jeune peintre""",
    "quand": """Le matin|Chaque dimanche|En hiver|Au printemps|Hier soir|Depuis longtemps|Après le déjeuner|Pendant les
vacances|Le soir|Tous les jours|En automne|Il y a dix ans|Ce jour-là|Avant la fête|Un samedi de juin""",
    "fait": """se promène le long de la rivière|prépare une soupe de légumes|écrit une longue lettre à sa famille|va au
marché pour acheter des fruits|lit le journal devant la fenêtre|raconte des histoires aux enfants|prend le train pour
Paris|travaille dans le jardin|regarde la mer en silence|visite le musée de la ville|apprend à jouer du piano|cherche un
cadeau pour son ami|dessine les maisons du port|parle avec les gens du quartier|ouvre la boutique de bonne heure""",
    "ensuite": """puis rentre à la maison avant la nuit|et ne pense plus à ses soucis|parce que le temps est très beau|mais
personne ne le remarque|avec beaucoup de patience|et boit un café avec ses amis|car c'est une vieille habitude|même quand il
pleut|et reste là jusqu'au soir|sans oublier les plus petits|et cela lui donne du courage|pour la première fois de sa vie""",
    "phrase": """La ville est calme et les rues sont presque vides.|On entend au loin la cloche de l'église.|Il y a toujours
beaucoup de monde sur la place.|Les enfants jouent près de la fontaine.|La maison est petite mais très agréable.|C'est un
endroit que tout le monde connaît.|Le vent souffle et les feuilles tombent des arbres.|Personne ne sait pourquoi.|La cuisine
sent le pain chaud et la confiture.|Le chemin traverse une forêt de chênes.|Il faut du temps pour bien faire les choses.|Nous
avons parlé pendant des heures.|La bibliothèque ferme à six heures.|Le train arrive avec un peu de retard.|Cette année, la
récolte a été excellente.|Il fait froid, mais le soleil brille.|La France est un pays connu pour sa cuisine.|Les élèves
étudient l'histoire et la géographie.|Dans le ciel, les premières étoiles apparaissent.|Elle répond avec un sourire.""",
}


def french() -> Iterator[tuple[str, str]]:
    words = {slot: " ".join(text.split()).split("|") for slot, text in FRENCH.items()}
    for identifier, rng in _documents("french", 900):
        paragraphs = []
        for _ in range(5):
            sentences = []
            for _ in range(rng.randrange(3, 5)):
                quand, qui, fait, ensuite = (rng.choice(words[slot]) for slot in ("quand", "qui", "fait", "ensuite"))
                sentences.append(f"{quand}, {qui} {fait}, {ensuite}.")
                if rng.random() < 0.7:
                    sentences.append(rng.choice(words["phrase"]))
            paragraphs.append(" ".join(sentences))
        yield identifier, "Lisez le texte suivant.\n" + "\n".join(paragraphs)


# --- chat -----------------------------------------------------------------------------------------------------------

TOPICS = """rainbows|the water cycle|photosynthesis|black holes|the French Revolution|chess|vaccines|inflation|volcanoes|jazz
music|the human heart|electric cars|recycling|the internet|whales|the Roman Empire|coffee|gravity|democracy|bees|the moon|solar
power|dinosaurs|meditation|bread baking|computer memory|the Amazon rainforest|tea ceremonies|bridges|the stock market|sleep|ant
colonies|antibiotics|the Great Wall of China|online privacy|soccer|painting|earthquakes|mountain climbing|money saving|time
management|learning a language|public speaking|gardening|job interviews|healthy breakfasts|dog training|long-distance running|
camping|photography|wine|glaciers|the printing press|robots|trains|libraries|honey|deserts|clouds|the nervous system""".replace(
    "\n", " "
).split("|")
REQUESTS = (
    "What is the most important thing to know about {}?",
    "Explain {} to a ten year old child.",
    "Write a short poem about {}.",
    "Give me five tips about {}.",
    "Write a short story in which {} plays a role.",
    "What are the pros and cons of {}?",
    "Summarize the history of {} in one paragraph.",
    "Write an email to a friend about {}.",
    "Why do people care about {}?",
    "List three common mistakes people make with {}.",
    "How would you teach a class about {}?",
    "Tell me a fun fact about {}.",
)


def chat() -> Iterator[tuple[str, str]]:
    for topic in TOPICS:
        for number, request in enumerate(REQUESTS):
            yield f"chat-{topic.strip()}-{number}", request.format(topic.strip())
