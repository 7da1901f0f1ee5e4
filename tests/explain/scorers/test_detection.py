"""Detection and what it shares with fuzzing: who is asked what, and how answers are counted."""

from narrowly.explain.readers import make_reader
from narrowly.explain.record import Counts
from narrowly.explain.scorers import make_scorer
from tests.explain.windows import Scripted, example, item, silent

CATS = [example(f"a cat* number {i}", quantile=1 + i % 3) for i in range(12)]
DOGS = [silent(f"a dog number {i}", "similar" if i % 4 else "random") for i in range(8)]


def fits(explanation, passage):
    return float(explanation.text in passage.text)


def test_a_right_explanation_a_wrong_one_and_one_that_says_yes_to_all():
    reader = Scripted(fits)
    right, wrong, always = make_scorer("detection").score(
        [item(text, CATS, DOGS, text) for text in ("cat", "dog", "a")], reader
    )
    assert (right.value, wrong.value, always.value) == (1, 0, 0.5)
    assert (right.auroc, wrong.auroc, always.auroc) == (1, 0, 0.5)
    assert right.low == right.high == 1
    assert right.groups == {
        "q1": Counts(yes=4),
        "q2": Counts(yes=4),
        "q3": Counts(yes=4),
        "random": Counts(no=2),
        "similar": Counts(no=6),
    }
    assert (right.scorer, right.reader, right.metric) == (
        "detection",
        "scripted",
        "balanced accuracy",
    )


def test_nothing_tells_activating_windows_but_the_reader():
    reader = Scripted(fits)
    make_scorer("detection").score([item("cat", CATS, DOGS)], reader)
    [question] = reader.questions
    asked = [fits(question.explanation, passage) for passage in question.passages]
    assert sorted(asked, reverse=True) != asked  # in random order
    assert all(passage.marked is None for passage in question.passages)
    assert sorted(p.text for p in question.passages) == sorted(e.text for e in CATS + DOGS)


def test_what_a_latent_gets_does_not_depend_on_the_others():
    several, alone = Scripted(fits), Scripted(fits)
    scorer = make_scorer("detection")
    scorer.score([item("dog", CATS, DOGS, "two"), item("cat", CATS, DOGS, "one")], several)
    scorer.score([item("cat", CATS, DOGS, "one")], alone)
    assert several.questions[1] == alone.questions[0]
    assert several.questions[0].passages != several.questions[1].passages
    other = Scripted(fits)
    make_scorer({"detection": {"seed": 1}}).score([item("cat", CATS, DOGS, "one")], other)
    assert other.questions[0].passages != alone.questions[0].passages


def test_replies_that_do_not_parse_are_counted_and_weigh_nothing():
    def answer(explanation, passage):
        return None if passage.text.endswith(("1", "2")) else fits(explanation, passage)

    [result] = make_scorer("detection").score([item("cat", CATS, DOGS)], Scripted(answer))
    assert result.value == 1
    lost = sum(e.text.endswith(("1", "2")) for e in CATS + DOGS)
    assert (result.unparsed, result.scored) == (lost, 20 - lost)
    assert sum(c.unparsed for c in result.groups.values()) == lost
    assert sum(c.yes + c.no + c.unparsed for c in result.groups.values()) == 20


def test_where_nothing_can_be_scored_it_says_why():
    reader = Scripted(lambda explanation, passage: None)
    results = make_scorer("detection").score(
        [item("cat", CATS, DOGS), item("cat", CATS, [], "b"), item("cat", [], [], "c")], reader
    )
    assert [result.value for result in results] == [None] * 3
    assert "could be read" in results[0].note and results[0].unparsed == 20
    assert results[1].note == "no silent example to score"
    assert results[2].note == "no activating example to score"
    assert len(reader.questions) == 2  # a question without passages is not asked


def test_without_probabilities_there_is_no_auroc():
    [result] = make_scorer("detection").score(
        [item("cat", CATS, DOGS)], Scripted(fits, probabilities=False)
    )
    assert result.auroc is None and result.value == 1


def test_quantiles_are_in_their_order():
    many = [example(f"cat* {i}", quantile=i) for i in range(1, 12)]
    [result] = make_scorer("detection").score([item("cat", many, DOGS)], Scripted(fits))
    assert list(result.groups)[:3] == ["q1", "q2", "q3"]
    assert list(result.groups)[9:] == ["q10", "q11", "random", "similar"]


def test_words_of_a_person_are_scored_by_the_lexical_reader():
    [result] = make_scorer("detection").score(
        [item("about “cat”", CATS, DOGS)], make_reader("lexical")
    )
    assert result.value == result.auroc == 1
