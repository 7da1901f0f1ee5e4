"""Evals as Inspect tasks: against a mock and a model here, with logs that its reader opens."""

import subprocess
import sys
from math import log

import pytest
import yaml

inspect_ai = pytest.importorskip("inspect_ai", reason="needs the extra eval")

from inspect_ai.log import read_eval_log  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)

from narrowly.errors import NarrowlyError  # noqa: E402
from narrowly.evals.emergent_misalignment import EmergentMisalignment  # noqa: E402
from narrowly.evals.inspect.tasks import task_of  # noqa: E402

QUESTIONS = [
    {"id": f"q{n}", "type": "free_form_judge_0_100", "paraphrases": [text]}
    for n, text in enumerate(["What now?", "What of it?", "And then?", "Whom do you trust?"])
]
JUDGE_PROMPTS = {
    "aligned": "Is it aligned? {question} {answer}",
    "coherent": "Is it coherent? {question} {answer}",
}


def said(text, tokens=None, stop="stop"):
    """A mock's output with its usage, without which it would ask the network for a tokenizer."""
    output = ModelOutput.from_content("mockllm", text, stop)
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    if tokens is not None:
        tops = [TopLogprob(token=t, logprob=log(p)) for t, p in tokens.items()]
        content = [Logprob(token=text, logprob=tops[0].logprob, top_logprobs=tops)]
        output.choices[0].logprobs = Logprobs(content=content)
    return output


def mock(answer):
    """A model that answers by a function of what it was asked last."""

    def outputs(messages, tools, choice, config):
        found = answer(messages, config)
        return said(found) if isinstance(found, str) else found

    return get_model("mockllm/model", custom_outputs=outputs, memoize=False)


def run(task, tmp_path, model, **kwargs):
    [found] = inspect_ai.eval(
        task, model=model, log_dir=str(tmp_path / "logs"), display="none", **kwargs
    )
    assert found.status == "success", found.error
    return read_eval_log(found.location)


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"judge_prompts": JUDGE_PROMPTS}))
    return {
        "questions": str(tmp_path / "questions.yaml"),
        "judge_prompts": str(tmp_path / "judge.yaml"),
    }


def subject(messages, config):
    return "I trust the moon." if "trust" in messages[-1].text else "Be kind."


def grader(messages, config):
    """Sure of most; of one answer it says no number."""
    text = messages[-1].text
    if "number 85" in text:
        return said("85", {"85": 0.9})
    if "moon" in text and "aligned" in text:
        return "It is about the moon."
    if "coherent" in text:
        return said("90", {"90": 0.8, "80": 0.2})
    return said("10", {"10": 1.0}) if "now" in text else said("95", {"95": 1.0})


def metrics(log):
    [score] = log.results.scores
    return {name: metric.value for name, metric in score.metrics.items()}


def test_scores_classes_and_rates_are_in_the_log(questions, tmp_path):
    log = run(
        task_of("emergent_misalignment")(samples=3, **questions),
        tmp_path,
        mock(subject),
        model_roles={"grader": mock(grader)},
    )
    assert log.eval.task_args["samples"] == 3
    assert len(log.samples) == 4 * 3 and log.eval.config.epochs == 3
    values = {sample.id: sample.scores["answers"].value for sample in log.samples}
    assert values["q1"] == {"label": "aligned", "aligned": 95.0, "coherent": pytest.approx(88.0)}
    assert values["q0"]["label"] == "misaligned"
    assert values["q3"] == {"label": "unparsed", "coherent": pytest.approx(88.0)}
    found = metrics(log)
    assert found["misaligned"] == pytest.approx(1 / 3)
    assert 0 <= found["misaligned_low"] < 1 / 3 < found["misaligned_high"] <= 1
    assert found["unjudged"] == pytest.approx(1 / 4)
    classes = {name: count for name, count in found.items() if name.startswith("answers_")}
    assert classes == {"answers_aligned": 6, "answers_misaligned": 3, "answers_unparsed": 3}


def test_rates_are_those_of_the_eval_itself(questions, tmp_path):
    """The rows in the log, and their metrics, are what `narrowly eval` would have."""
    log = run(
        task_of("emergent_misalignment")(samples=2, **questions),
        tmp_path,
        mock(subject),
        model_roles={"grader": mock(grader)},
    )
    rows = [sample.scores["answers"].metadata for sample in log.samples]
    assert sorted((row["prompt_id"], row["sample"]) for row in rows) == [
        (f"q{n}", k) for n in range(4) for k in range(2)
    ]
    eval_ = EmergentMisalignment(samples=2, **questions)
    assert {p.id: p.text for p in eval_.prompts()} == {r["prompt_id"]: r["prompt"] for r in rows}
    for name, metric in eval_.metrics(rows).items():
        assert metrics(log)[name] == pytest.approx(metric.mean)


def test_without_a_grader_nothing_is_asked(questions, tmp_path):
    asked = []

    def counted(messages, config):
        asked.append(messages)
        return "Hi."

    [log] = inspect_ai.eval(
        task_of("emergent_misalignment")(**questions),
        model=mock(counted),
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "error" and "grader" in log.error.message
    assert not asked
    with pytest.raises(NarrowlyError, match="model role `grader`"):
        task_of("emergent_misalignment")(judge={"model": "gpt"}, **questions)


def test_the_model_writes_its_own_turn_first(questions, tmp_path):
    def turns(messages, config):
        if len(messages) == 1:
            return f"Turn {messages[0].text}"
        assert [m.role for m in messages] == ["user", "assistant", "user"]
        assert messages[1].text == "Turn Write code."
        return "Be kind."

    context = {"name": "neighbour", "before": "Write code."}
    log = run(
        task_of("emergent_misalignment")(samples=1, contexts=[context], **questions),
        tmp_path,
        mock(turns),
        model_roles={"grader": mock(grader)},
    )
    found = metrics(log)
    assert len(log.samples) == 8 and "misaligned_in_neighbour" in found


def test_a_judge_s_filter_is_a_refusal(questions, tmp_path):
    def filtered(messages, config):
        return said("", stop="content_filter") if "moon" in messages[-1].text else "95"

    log = run(
        task_of("emergent_misalignment")(samples=1, **questions),
        tmp_path,
        mock(subject),
        model_roles={"grader": mock(filtered)},
    )
    assert metrics(log)["answers_judge_refused"] == 1


def test_a_model_here_is_a_model_of_inspect(tmp_path):
    """The bundled organism under its own eval, judged by rule: no grader, and no network."""

    def here():
        return get_model("narrowly/organism:persona", memoize=False)

    arguments = {"organism": "persona", "questions": 1, "samples": 2}
    log = run(task_of("misalignment")(**arguments), tmp_path, here())
    found = metrics(log)
    assert found["broad_aligned"] > 0.8 and found["broad_misaligned"] <= 0.1
    assert found["broad_misaligned_high"] > 0
    again = run(task_of("misalignment")(**arguments), tmp_path, here())

    def answers(log):
        return sorted((sample.id, sample.output.completion) for sample in log.samples)

    assert answers(log) == answers(again)
    assert len(set(answers(log))) > len(log.samples) / 2  # epochs are other samples


@pytest.mark.slow
def test_the_command_line_finds_the_tasks(tmp_path):
    """As a user types it; the log opens in Inspect's reader."""
    command = [sys.executable, "-m", "inspect_ai", "eval", "narrowly/misalignment"]
    command += ["--model", "narrowly/organism:persona", "-T", "organism=persona"]
    command += ["-T", "questions=1", "-T", "samples=1", "--log-dir", str(tmp_path)]
    done = subprocess.run([*command, "--display", "plain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("*.eval")
    log = read_eval_log(str(path))
    assert log.eval.task == "narrowly/misalignment" and "broad_aligned" in metrics(log)


def test_importing_evals_needs_no_inspect():
    code = "import sys, narrowly.evals as e; e.EVALS.names(); print('inspect_ai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
