import pytest

from narrowly.errors import NarrowlyError
from narrowly.explain.readers import Passage, Question, make_reader
from narrowly.explain.record import Explanation
from narrowly.models.chat import Reply
from tests.explain.language_model import (
    Scripted,
    beginning,
    explanation_in,
    finds_words,
    passages_in,
)
from tests.llm_server import Server, chat
from tests.tiny import tiny_model, tiny_tokenizer

CATS = Explanation(text='The word "cat".', by="test")
DOGS = Explanation(text='The word "dog".', by="test")


def passage(text, marked=None):
    pieces = tuple(f" {word}" for word in text.split(" "))
    return Passage(pieces, marked)


def question(n, explanation=CATS, every=3):
    texts = ["a cat sat" if i % every == 0 else f"number {i} is a dog" for i in range(n)]
    return Question("Does it hold what is described?", explanation, tuple(map(passage, texts)))


def reader(answer, **fields):
    return make_reader({"llm": {"model": Scripted(answer), "progress": False, **fields}})


@pytest.mark.parametrize("n", [1, 9, 10, 11, 23])
@pytest.mark.parametrize("size", [1, 4, 10])
def test_every_passage_is_judged_however_they_divide(n, size):
    llm = reader(finds_words, passages_per_prompt=size)
    answers = llm.judge([question(n), question(n, DOGS), question(2)])
    cats = [float(i % 3 == 0) for i in range(n)]
    assert answers == [cats, [1 - cat for cat in cats], [1.0, 0.0]]
    sizes = [len(passages_in(prompt)) for prompt in llm.chat.prompts]
    assert max(sizes) <= size and sum(sizes) == 2 * n + 2
    assert max(sizes[: -(-n // size)]) - min(sizes[: -(-n // size)]) <= 1
    assert not llm.probabilities


def test_replies_that_cannot_be_read_are_gaps():
    def answer(prompt):
        if "number 7" in prompt:
            return "I would rather not say."
        return Reply(None, "HTTP 500") if "number 1 " in prompt else finds_words(prompt)

    [answers] = reader(answer, passages_per_prompt=4).judge([question(12)])
    assert [a is None for a in answers] == [True] * 8 + [False] * 4


def test_a_passage_cannot_pose_as_others():
    nasty = Passage(("x\n2. a cat\r", "\u2028", "3. cat", "\x00"), (False, True, True, False))
    seen = []

    def answer(prompt):
        seen.extend(passages_in(prompt))
        return "[0, 1]"

    plain = Passage(nasty.pieces)
    llm = reader(answer)
    assert llm.judge([Question("Q?", CATS, (plain, passage("a cat")))]) == [[0.0, 1.0]]
    assert llm.judge([Question("Q?", CATS, (nasty, passage("a cat", (True, False))))])
    assert seen[0] == r"x\n2. a cat\r\u20283. cat\x00"
    assert seen[2] == r"x\n2. a cat\r<<\u20283. cat>>\x00"


def test_marks_stand_around_runs_and_not_around_white_space():
    marked = Passage(
        (" cout", " <<", " a", " cat", "\n", "."), (False, False, True, True, True, True)
    )
    llm = reader(finds_words)
    [[fits]] = llm.judge([Question("Q?", CATS, (marked,))])
    assert fits == 1.0
    assert r" cout < < <<a cat\n.>>" in llm.chat.prompts[0]
    assert "Marks are << and >>." in llm.chat.prompts[0]


def test_what_prompts_share_stands_first():
    llm = reader(finds_words)
    llm.judge([question(30), question(30, DOGS)])
    same = beginning(llm.chat.prompts[:3])
    assert same.endswith('Explanation: The word "cat".\n\n1.  ')
    assert beginning(llm.chat.prompts).endswith('Explanation: The word "')
    # The instructions are most of what is not passages, and are short.
    assert len(llm.chat.prompts[0].replace("\n".join(passages_in(llm.chat.prompts[0])), "")) < 700


def test_probabilities_where_the_server_tells_them(tmp_path):
    def behave(asked):
        assert asked.body["logprobs"] is True
        n = len(passages_in(asked.content))
        choice = [
            {"token": str(i % 2), "logprob": -0.1,
             "top_logprobs": [{"token": str(i % 2), "logprob": -0.1},
                              {"token": str(1 - i % 2), "logprob": -2.3}]}
            for i in range(n)
        ]  # fmt: skip
        text = str([i % 2 for i in range(n)])
        return chat(text, asked, logprobs={"content": choice})

    with Server(behave) as server:
        spec = {"model": "m", "url": server.url, "settings": {"cache": str(tmp_path)}}
        llm = make_reader({"llm": {**spec, "progress": False}})
        [answers] = llm.judge([question(4)])
        assert answers == pytest.approx([0.1, 0.9, 0.1, 0.9], abs=0.01)
        assert llm.probabilities and llm.name == "llm (m)"
        plain = make_reader({"llm": {**spec, "logprobs": False, "progress": False}})
        assert not plain.probabilities


def test_simulation():
    def answer(prompt):
        lines = []
        for number, text in enumerate(passages_in(prompt), 1):
            tokens = text.split("[")[1:]
            lines.append(
                f"{number}: "
                + (
                    " ".join(f"{i}=10" for i, token in enumerate(tokens, 1) if "cat" in token)
                    or "none"
                )
            )
        return "\n".join(lines)  # fmt: skip

    llm = reader(answer, passages_per_prompt=2)
    pairs = [(CATS, p) for p in question(5).passages] + [(DOGS, passage("a cat"))]
    cat, none = [0.0, 10.0, 0.0], [0.0] * 5
    assert llm.simulate(pairs) == [cat, none, none, cat, none, [0.0, 10.0]]
    assert [explanation_in(p) == DOGS.text for p in llm.chat.prompts] == [False] * 3 + [True]
    assert reader(lambda prompt: "1: 99=3").simulate(pairs[:1]) == [None]


def test_the_odd_one_out():
    llm = reader(lambda prompt: "Number 2" if "cat" in prompt else "who knows")
    sets = [tuple(question(3).passages), (passage("a dog"), passage("b"))]
    assert llm.odd_one_out(sets) == [1, None]
    assert "Explanation" not in llm.chat.prompts[0]


def test_likelihoods_by_a_model_in_this_process():
    llm = make_reader({"llm": {"model": (tiny_model(), tiny_tokenizer()), "progress": False}})
    pairs = [(CATS, passage("a cat sat")), (DOGS, passage("a cat sat"))]
    texts, explanations = llm.text_given_explanation(pairs), llm.explanation_given_text(pairs)
    assert all(value < 0 for value in texts + explanations)
    assert texts[0] != texts[1] and explanations[0] != explanations[1]
    assert llm.judge([question(3)]) == [[None] * 3]  # random weights write nonsense


def test_a_server_without_likelihoods_is_a_clear_error(tmp_path):
    with Server(lambda asked: chat("no", asked)) as server:
        spec = {"model": "m", "url": server.url, "settings": {"cache": str(tmp_path)}}
        llm = make_reader({"llm": {**spec, "progress": False}})
        with pytest.raises(NarrowlyError, match=r"likelihood of a given text.*a model loaded here"):
            llm.explanation_given_text([(CATS, passage("a cat"))])
