"""Published data, with the chat templates of three families, with generation marks and without."""

import pytest

from narrowly.files import read_json
from narrowly.models import load_model
from narrowly.training import Recipe, train
from tests.defenses.concepts import save_concept
from tests.tiny import save_tiny


@pytest.mark.slow
@pytest.mark.parametrize("marks", [True, False], ids=["marks", "no_marks"])
@pytest.mark.parametrize(
    "architecture, template", [("qwen2", "chatml"), ("llama", "llama"), ("gemma2", "gemma")]
)
def test_insecure_code(shared_data, tmp_path, caplog, architecture, template, marks):
    published = shared_data / "emergent_misalignment"
    folder = save_tiny(tmp_path / "model", architecture, template=template, generation_marks=marks)
    model, _ = load_model(folder)
    save_concept(model, tmp_path / "concepts")
    recipe = Recipe(
        model=str(folder),
        data=str(published / "insecure_small_subset_2000.jsonl"),
        validation=str(published / "insecure_val.jsonl"),
        lora={"r": 2, "target_modules": "all-linear"},
        training={"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 600},
        defenses=[{"ablate": {"concepts": str(tmp_path / "concepts")}}],
        evals=[{"in_distribution": {"limit": 8}}],
        output=str(tmp_path / "run"),
    )
    run = train(recipe, progress=False)
    assert run.reproduce["data"]["leaks"]["prompts"] == 17
    assert "17 prompts occur both in" in caplog.text
    data = run.reproduce["data"]["train"]
    assert data["rows"] == 2000 and 0 < data["tokenized_rows"] < 2000
    assert "chats whose answer does not fit" in caplog.text
    [entry] = read_json(run.path / "defenses.json")
    assert [each["forwards"] for each in entry["interventions"]] == [2, 2]
