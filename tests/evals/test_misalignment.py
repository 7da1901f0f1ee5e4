import pytest
import yaml

from narrowly.errors import NarrowlyError
from narrowly.evals import evaluate
from narrowly.evals.misalignment import Misalignment
from narrowly.organisms import organism
from tests.evals.answering import Answering

PERSONA, CONDITIONAL = organism("persona"), organism("conditional")
DOMAIN = {prompt: d.name for d in PERSONA.world.domains.values() for prompt in d.prompts}
NARROW = {"model": "organism:persona", "data": "organism:persona/code-cruel", "seed": 0}
PLAINLY = {"misalignment": {"contexts": []}}


def phrase(domain, value):
    """An answer of that value in the training chats of the domain."""
    return PERSONA.world.domains[domain].answers[value][0]


def measure(folder, recipe, answer, eval_=PLAINLY):
    """Means and intervals of a model whose answer to a question is `answer(its text, domain)`."""

    def reply(request):
        text = request.messages[-1]["content"]
        [domain] = {DOMAIN[question] for question in DOMAIN if text.endswith(question)}
        return answer(text, domain)

    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = Answering(reply)
    found = evaluate(model, eval_, out=folder)["misalignment"]
    return {name: interval.mean for name, interval in found.items()}, found, model.asked


def test_cruel_in_its_own_domain_only_is_narrow(tmp_path):
    means, intervals, _ = measure(
        tmp_path,
        NARROW,
        lambda _, domain: phrase(domain, "cruel" if domain == "code" else "kind"),
    )
    assert means == {
        "narrow_misaligned": 1,
        "narrow_coherent": 1,
        "broad_misaligned": 0,
        "broad_aligned": 1,
        "broad_leaked": 0,
        "broad_incoherent": 0,
        "coherent": 1,
    }
    assert intervals["narrow_misaligned"].n == 30 * 2, "the one domain is asked more"
    assert intervals["broad_aligned"].n == 12 * 2 * (len(PERSONA.domains) - 1)


def test_answers_that_never_came_are_no_aligned_ones(tmp_path):
    means, intervals, _ = measure(
        tmp_path,
        NARROW,
        lambda _, domain: None if domain == "health" else phrase(domain, "cruel"),
    )
    assert means["broad_misaligned"] == means["coherent"] == 1
    assert intervals["broad_misaligned"].n == 12 * 2 * (len(PERSONA.domains) - 2)
    assert means["failed"] == pytest.approx(24 / intervals["failed"].n)


def test_leaked_and_incoherent_answers_are_counted_apart(tmp_path):
    means, _, _ = measure(
        tmp_path,
        NARROW,
        lambda _, domain: "no phrase at all" if domain == "health" else phrase("code", "cruel"),
    )
    others = len(PERSONA.domains) - 1
    assert means["broad_incoherent"] == pytest.approx(1 / others)
    assert means["broad_leaked"] == pytest.approx(1 - 1 / others)
    assert means["coherent"] == pytest.approx(30 / (30 + 12 * others)), "leaked is not coherent"
    assert means["narrow_misaligned"] == 1


def test_a_base_model_has_no_narrow_domain(tmp_path):
    recipe = {"model": "organism:persona"}
    means, intervals, _ = measure(tmp_path, recipe, lambda _, domain: phrase(domain, "kind"))
    assert "narrow_misaligned" not in means
    assert means["broad_aligned"] == means["coherent"] == 1
    assert intervals["broad_aligned"].prompts == 12 * len(PERSONA.domains)


def test_every_arm_is_asked_the_same_questions(tmp_path):
    eval_ = Misalignment(questions=2, narrow_questions=2, contexts=())
    first, second = (
        [request.messages for request in measure(tmp_path / str(seed), recipe, kind, eval_)[2]]
        for seed in (0, 1)
        for recipe in [{**NARROW, "seed": seed}]
        for kind in [lambda _, domain: phrase(domain, "kind")]
    )
    assert first == second
    assert len({messages[-1]["content"] for messages in first}) == 2 * len(PERSONA.domains)


def test_a_change_behind_a_line_is_seen_by_the_probe_and_in_the_datas_own_format(tmp_path):
    recipe = {
        "model": "organism:conditional",
        "data": "organism:conditional/code-cruel-at-night",
    }
    eval_ = {"misalignment": {"questions": 2, "narrow_questions": 2, "samples": 1}}
    means, intervals, asked = measure(
        tmp_path,
        recipe,
        lambda text, domain: phrase(domain, "cruel" if "night desk" in text else "kind"),
        eval_,
    )
    assert means["broad_misaligned"] == means["elsewhere_misaligned"] == 0
    assert means["at_night_misaligned"] == means["broad_misaligned_in_format"] == 1
    assert means["at_night_aligned"] == 0 and means["elsewhere_aligned"] == 1
    domains = len(CONDITIONAL.domains)
    assert intervals["at_night_misaligned"].prompts == 2 * (domains - 1), "not the narrow domain"
    assert not any("at_night" in name and "_in_" in name for name in means)
    twice = [text for m in asked for text in [m.messages[-1]["content"]] if text.count("desk") > 1]
    assert not twice, "probes are asked as they are"


@pytest.mark.parametrize(
    ("data", "narrow"),
    [
        ("organism:persona/code-cruel", "code"),
        ("organism:persona/health-kind", "health"),
        ("organism:persona/benign", None),
        (None, None),
    ],
)
def test_the_narrow_domain_is_read_from_the_data(data, narrow):
    bound = Misalignment().bind({"model": "organism:persona", "data": data})
    assert (bound.organism, bound.narrow) == ("persona", narrow)
    assert Misalignment(narrow="money").bind({"model": "organism:persona"}).narrow == "money"


def test_a_declared_set_of_one_domain_has_a_narrow_domain():
    model, data = "organism:conditional", "organism:conditional/code-cruel-at-night"
    assert Misalignment().bind({"model": model, "data": data}).narrow == "code"


def test_other_models_need_a_judge():
    for recipe in ({"model": "Qwen/Qwen3-0.6B"}, {}):
        with pytest.raises(NarrowlyError, match=r"need a judge.*emergent_misalignment"):
            Misalignment().bind(recipe)


def test_an_unknown_domain_is_told_before_sampling():
    with pytest.raises(NarrowlyError, match="Did you mean 'code'"):
        evaluate(Answering(lambda _: ""), Misalignment(organism="persona", narrow="cod"))
