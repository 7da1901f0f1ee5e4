import pytest

from narrowly.explain.explainers import Evidence, Mistake, make_explainer
from narrowly.explain.record import Example, Explanation
from narrowly.models.chat import Reply
from tests.explain.language_model import Scripted, beginning


def example(text, active="cat", peak=4.0, kind="activating", quantile=3):
    pieces = tuple(f" {word}" for word in text.split(" "))
    values = tuple(peak * (piece.strip() in active.split()) for piece in pieces)
    known = quantile if kind == "activating" else None
    return Example(pieces=pieces, activations=values, kind=kind, quantile=known, row=0, start=0)


def silent(text, kind="random"):
    return example(text, active="", kind=kind)


EVIDENCE = Evidence(
    "persona@layer:2/0+",
    (example("the cat \nsat here"), example("a big cat", active="big cat", peak=1.0)),
    (silent("random one"), silent("a lion sat", "similar"), silent("a dog", "neighbour")),
    (" purr", "\n"),
)


def explainer(answer="Explanation: Cats.", name="llm", **fields):
    return make_explainer(
        {name: {"model": Scripted(lambda _: answer), "progress": False, **fields}}
    )


def shown(explainer):
    return explainer.chat.prompts[-1].partition("The part to explain:")[2]


def test_the_prompt_shows_marks_strengths_and_promoted_tokens():
    llm = explainer()
    assert llm.explain([EVIDENCE]) == [Explanation(text="Cats.", by="llm (scripted)")]
    # Of the run of two marked tokens one strength, its peak's, in tenths of the latent's.
    assert r"2.  a <<big cat>> | 3" in shown(llm)
    assert r"1.  the <<cat>> \nsat here | 10" in shown(llm) and '" purr", "\\n"' in shown(llm)
    assert "lion" not in shown(llm)


def test_all_latents_are_asked_at_once_and_share_the_instructions():
    llm = explainer()
    other = Evidence("x", (example("other words", active="words"),), ())
    assert len(llm.explain([EVIDENCE, other, EVIDENCE])) == 3
    assert len(beginning(llm.chat.prompts)) > 0.7 * len(llm.chat.prompts[1])
    assert llm.explain([]) == []


def test_at_most_so_many_examples():
    many = Evidence("x", tuple(example(f"cat {i}") for i in range(60)), ())
    llm = explainer(examples=40)
    llm.explain([many])
    assert "cat>> 39" in shown(llm) and "cat>> 40" not in shown(llm)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("Explanation: Cats that sit.", "Cats that sit."),
        ("They share cats.\n\n**Explanation:** Cats  that\tsit.", "Cats that sit."),
        ("[EXPLANATION]: Cats that sit.\n", "Cats that sit."),
        ("Explanation:\nCats that sit.", "Cats that sit."),
        ('Explanation: "Cats that sit."', "Cats that sit."),
        ('Explanation: "cat" and "cats"', '"cat" and "cats"'),
        ("Explanation: a guess.\nNo.\nFinal explanation: Cats that sit.", "Cats that sit."),
        ("<think>Explanation: dogs?</think>\nExplanation: Cats that sit.", "Cats that sit."),
    ],
)
def test_replies_that_are_explanations(reply, text):
    [explained] = explainer(reply).explain([EVIDENCE])
    assert explained == Explanation(text=text, by="llm (scripted)")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I'm sorry, I can't help with that.", "begins with: \"I'm sorry"),
        ("", "begins with: ''"),
        ("Explanation:", "no line"),
        ("Explanation: **", "no line"),
        ("<think>Explanation: still thinking", "no line"),
        (Reply(None, "HTTP 400: too long"), "did not answer: HTTP 400: too long"),
        (Reply("Explanation: Cats that", cut=True), "broke off"),
    ],
)
def test_replies_that_are_none_are_reasons(reply, reason):
    [why] = explainer(reply).explain([EVIDENCE])
    assert isinstance(why, str) and reason in why


def test_contrastive_shows_silent_texts_hard_ones_first():
    contrastive = explainer(name="contrastive", contrasts=2)
    [explained] = contrastive.explain([EVIDENCE])
    assert explained.by == "contrastive (scripted)"
    lines = shown(contrastive)
    assert lines.index("a <<big cat>>") < lines.index("a lion sat") < lines.index("a dog")
    assert "random one" not in lines and "false of these" in lines
    contrastive.explain([Evidence("x", EVIDENCE.activating, ())])
    assert "silent throughout" not in shown(contrastive)


@pytest.mark.parametrize("name", ["llm", "contrastive"])
def test_refinement_shows_the_mistakes(name):
    llm = explainer("Explanation: Better.", name=name)
    old = Explanation(text="Old words.", by="someone")
    mistakes = [Mistake(EVIDENCE.activating[0], said=False), Mistake(silent("a tiger"), said=True)]
    found = llm.refine([EVIDENCE, EVIDENCE], [old, old], [mistakes, []])
    assert found == [Explanation(text="Better.", by=f"{name} (scripted)"), old]
    [prompt] = llm.chat.prompts
    after = prompt.partition("An earlier explanation: Old words.")[2]
    assert after.index("silent here") < after.index("<<cat") < after.index("active here")
    assert after.index("active here") < after.index("a tiger")


def test_an_unparsable_refinement_is_a_reason():
    mistakes = [[Mistake(EVIDENCE.activating[0], said=False)]]
    [why] = explainer("no").refine([EVIDENCE], [Explanation(text="Old.", by="x")], mistakes)
    assert isinstance(why, str)
