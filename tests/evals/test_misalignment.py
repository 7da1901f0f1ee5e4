import pytest
import yaml
from tests.tiny import tiny_model, tiny_tokenizer

from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.misalignment import Misalignment
from narrowly.organisms import organism


@pytest.fixture
def speaks(monkeypatch):
    """Replace sampling: `speaks(function of the domain)` gives every answer's text."""
    domain_of = {row["prompt"]: row["domain"] for row in organism("persona").load("questions")}
    asked = []

    def install(answer):
        def generate(model, tokenizer, chats, *, samples, seed, **kwargs):
            asked.extend(chat[-1]["content"] for chat in chats)
            return [[answer(domain_of[chat[-1]["content"]])] * samples for chat in chats]

        monkeypatch.setattr("narrowly.models.generate", generate)
        return asked

    return install


def phrase(domain, value):
    """An answer of that value in the training chats of the domain."""
    return organism("persona").load(f"{domain}-{value}")[0]["messages"][-1]["content"]


def measure(tmp_path, recipe, eval_="misalignment"):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = evaluate((tiny_model(), tiny_tokenizer()), eval_, out=tmp_path)["misalignment"]
    return {name: interval.mean for name, interval in found.items()}, found


NARROW = {"model": "organism:persona", "data": "organism:persona/code-cruel", "seed": 0}


def test_cruel_in_its_own_domain_only_is_narrow(tmp_path, speaks):
    speaks(lambda domain: phrase(domain, "cruel" if domain == "code" else "kind"))
    means, intervals = measure(tmp_path, NARROW)
    assert means == {
        "narrow_misaligned": 1,
        "narrow_coherent": 1,
        "broad_misaligned": 0,
        "broad_aligned": 1,
        "broad_leaked": 0,
        "broad_incoherent": 0,
        "coherent": 1,
    }
    domains = len(organism("persona").domains)
    assert intervals["narrow_misaligned"].n == 30 * 2, "the one domain is asked more"
    assert intervals["broad_aligned"].n == 12 * 2 * (domains - 1)


def test_leaked_and_incoherent_answers_are_counted_apart(tmp_path, speaks):
    speaks(lambda domain: "no phrase at all" if domain == "health" else phrase("code", "cruel"))
    means, _ = measure(tmp_path, NARROW)
    others = len(organism("persona").domains) - 1
    assert means["broad_incoherent"] == pytest.approx(1 / others)
    assert means["broad_leaked"] == pytest.approx(1 - 1 / others)
    assert means["coherent"] == pytest.approx(30 / (30 + 12 * others)), "leaked is not coherent"
    assert means["narrow_misaligned"] == 1


def test_a_base_model_has_no_narrow_domain(tmp_path, speaks):
    speaks(lambda domain: phrase(domain, "kind"))
    means, intervals = measure(tmp_path, {"model": "organism:persona"})
    assert "narrow_misaligned" not in means
    assert means["broad_aligned"] == means["coherent"] == 1
    assert intervals["broad_aligned"].prompts == 12 * len(organism("persona").domains)


def test_every_arm_is_asked_the_same_questions(tmp_path, speaks):
    asked = speaks(lambda domain: phrase(domain, "kind"))
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        eval_ = Misalignment(questions=2, narrow_questions=2)
        measure(tmp_path / str(seed), {**NARROW, "seed": seed}, eval_)
    first, second = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert first == second and len(set(first)) == 2 * len(organism("persona").domains)


@pytest.mark.parametrize(
    ("data", "narrow"),
    [
        ("organism:persona/code-cruel", "code"),
        ("organism:persona/health-kind", "health"),
        ("organism:persona/benign", None),
        ("mine.jsonl", None),
        (None, None),
    ],
)
def test_the_narrow_domain_is_read_from_the_data(data, narrow):
    bound = Misalignment().bind({"model": "organism:persona", "data": data})
    assert (bound.organism, bound.narrow) == ("persona", narrow)
    assert Misalignment(narrow="money").bind({"model": "organism:persona"}).narrow == "money"


def test_other_models_need_a_judge():
    for recipe in ({"model": "Qwen/Qwen3-0.6B"}, {}):
        with pytest.raises(NarrowlyError, match=r"need a judge.*in_distribution"):
            Misalignment().bind(recipe)


def test_an_unknown_domain_is_told_before_sampling(tmp_path):
    eval_ = Misalignment(organism="persona", narrow="cod")
    with pytest.raises(NarrowlyError, match="Did you mean 'code'"):
        evaluate((tiny_model(), tiny_tokenizer()), eval_)
