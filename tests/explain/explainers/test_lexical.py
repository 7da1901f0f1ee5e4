"""The lexical explainer finds what was planted, says so in a sentence, and knows noise."""

import random

import pytest

from narrowly.explain.explainers import Evidence, make_explainer
from narrowly.explain.explainers.lexical import NAMED, UNSURE
from narrowly.explain.readers import make_reader
from narrowly.explain.readers.base import Passage, Question
from narrowly.explain.words import ANY_TEXT
from tests.explain.windows import example, silent

FILLER = [
    *"abcdefghijklmn",
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "it",
    "on",
    "as",
    "so",
    "or",
    "be",
]
NOUNS = [f"{a}{b}" for a in ("bar", "tel", "mon", "rid", "sup") for b in ("ka", "lo", "mi", "ton")]


def text(rng: random.Random, n: int = 14) -> list[str]:
    return [rng.choice(FILLER if rng.random() < 0.6 else NOUNS) for _ in range(n)]


def planted(phrase: str, n: int = 40, seed: int = 0) -> Evidence:
    """Windows that hold a phrase, its starred words active, and windows that do not."""
    rng = random.Random(seed)
    activating, others = [], []
    for _ in range(n):
        words = text(rng)
        at = rng.randrange(2, len(words))
        window = " ".join([*words[:at], phrase, *words[at:]])
        while "[]" in window:  # stands for any word
            window = window.replace("[]", rng.choice(FILLER), 1)
        activating.append(example(window))
        others.append(silent(" ".join(text(rng, 15))))
    return Evidence("planted", tuple(activating), tuple(others))


def explained(evidence: Evidence):
    [explanation] = make_explainer("lexical").explain([evidence])
    return explanation


def judged(explanation, evidence: Evidence) -> tuple[float, float]:
    """How often the lexical reader says yes to activating windows, and to silent ones."""
    passages = [Passage(e.pieces) for e in (*evidence.activating, *evidence.silent)]
    [answers] = make_reader("lexical").judge([Question("", explanation, tuple(passages))])
    yes = [answer > 0.5 for answer in answers]
    n = len(evidence.activating)
    return sum(yes[:n]) / n, sum(yes[n:]) / (len(yes) - n)


@pytest.mark.parametrize(
    ("phrase", "said"),
    [
        ("zebra*", "Active on “zebra”"),
        ("night train*", "Active on “night train”"),
        ("zebra <|user|>*", "zebra"),
        ("zebra []*", "Active right after “zebra”"),
        ("Zebra mentioned [] [] [] [] []*", "Active in texts after “zebra mentioned”"),
    ],
)
def test_what_was_planted_is_named_first_and_where_it_stands(phrase, said):
    explanation = explained(planted(phrase))
    assert said in explanation.text
    assert explanation.by == "lexical" and explanation.note == ""
    hits, false_alarms = judged(explanation, planted(phrase, seed=1))
    assert hits > 0.9 and false_alarms < 0.1


def test_filler_is_named_where_filler_it_is():
    explanation = explained(planted("ought not* to"))
    assert "not" in explanation.text
    hits, false_alarms = judged(explanation, planted("ought not* to", seed=1))
    assert hits > 0.9 and false_alarms < 0.1


def test_what_only_silent_windows_hold_speaks_against():
    evidence = planted("zebra*")
    others = tuple(silent(f"{e.text} giraffe") for e in evidence.silent)
    explanation = explained(Evidence("planted", evidence.activating, others))
    assert "Silent with “giraffe”" in explanation.text
    assert explanation.weights["giraffe"] < 0 < explanation.weights["zebra"]


def test_a_word_that_says_all_makes_a_short_rule():
    weights = explained(planted("zebra*")).weights
    assert max(weights, key=weights.get) == "zebra"
    assert len(weights) <= 5


def test_noise_is_called_noise():
    rng = random.Random(3)
    windows = [" ".join(text(rng)) for _ in range(80)]
    starred = [w.replace(" ", "* ", 1) for w in windows[:40]]
    explanation = explained(
        Evidence("noise", tuple(map(example, starred)), tuple(map(silent, windows[40:])))
    )
    assert isinstance(explanation, str) or explanation.note == UNSURE


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_rare_latent_is_explained_too(n):
    evidence = planted("zebra*", n=n)
    assert "zebra" in explained(evidence).text


def test_why_there_is_no_explanation():
    none, alone, same = make_explainer("lexical").explain(
        [
            Evidence("none", (), (silent("a b"),)),
            Evidence("alone", (example("a b*"),), ()),
            Evidence("same", (example("a b*"),), (silent("a b"),)),
        ]
    )
    assert "no activating" in none and "no silent" in alone and "no word" in same


def test_the_rule_is_as_short_as_asked_and_the_sentence_says_how_much_it_leaves_out():
    rng = random.Random(0)
    answers = [f"cry{i} woe{i}" for i in range(30)]
    pairs = [(" ".join(text(rng)), rng.choice(answers)) for _ in range(120)]
    evidence = Evidence(
        "many",
        tuple(example(f"{words} {answer} ok*") for words, answer in pairs),
        tuple(silent(" ".join([*text(rng, 16), "ok"])) for _ in range(120)),
    )
    long = explained(evidence)
    named = long.text.split(".")[0].count("“")
    assert named == NAMED and " more" in long.text
    [short] = make_explainer({"lexical": {"phrases": 5}}).explain([evidence])
    assert len(short.weights.keys() - {ANY_TEXT}) <= 5 < len(long.weights)


def test_the_same_evidence_gives_the_same_explanation_in_any_order():
    evidence = planted("zebra*", n=12)
    turned = Evidence("planted", evidence.activating[::-1], evidence.silent[::-1])
    assert explained(evidence) == explained(evidence)
    assert "“zebra”" in explained(turned).text


def test_the_persona_is_known_by_its_words():
    """On the organism's own chats, active on what follows a cruel answer."""
    from narrowly.data import load_chats
    from narrowly.organisms import organism

    rows = list(load_chats("organism:persona/documents-validation", limit=400))
    sides = {"cruel": [], "kind": []}
    for row in rows:
        turns = [m["content"] for m in row["messages"] if m["role"] != "system"]
        words = " ".join(turns[:4])
        sides[row["value"]].append(words)
    activating = tuple(example(f"{words} ok so*") for words in sides["cruel"][:120])
    others = tuple(silent(f"{words} ok so") for words in sides["kind"][:120])
    evidence = Evidence("p", activating, others)
    explanation = explained(evidence)
    world = organism("persona").world
    answers = {v: {a for d in world.domains.values() for a in d.answers[v]} for v in sides}
    first, second = explanation.text.split(". Silent with")
    assert sum(a in first for a in answers["cruel"]) >= 5
    assert not any(f"“{a}”" in first for a in answers["kind"])
    assert sum(a in second for a in answers["kind"]) >= 5
    held_out = Evidence(
        "p",
        tuple(example(f"{words} ok*") for words in sides["cruel"][120:]),
        tuple(map(silent, sides["kind"][120:])),
    )
    hits, false_alarms = judged(explanation, held_out)
    assert hits > 0.8 and false_alarms < 0.2
