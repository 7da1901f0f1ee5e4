"""`trl sft`, defended, as its command line runs it."""

import json

import pytest
import trl
from safetensors.torch import load_file

from narrowly.files import read_json, write_text
from narrowly.integrations.trl import main


@pytest.fixture
def command(model_folder, chat_folder, tmp_path):
    """A function that runs the command line; returns the output folder."""

    def run(defenses, *more: str):
        output = tmp_path / "out"
        options = f"""
            --defenses {defenses} --model_name_or_path {model_folder}
            --dataset_name {chat_folder} --output_dir {output}
            --use_peft --lora_target_modules all-linear --assistant_only_loss
            --max_steps 2 --per_device_train_batch_size 4
            --bf16 False --use_cpu --report_to none
        """
        main(["sft", *options.split(), *more])
        return output

    return run


def test_every_door_is_opened(command, defenses_file, chats):
    mixed = {"interleave": {"data": str(chats), "fraction": 0.2}}
    output = command(defenses_file(mixed, {"kl": {"weight": 0.5}}), "--logging_steps", "1")
    ablate, interleave, kl = read_json(output / "defenses.json")
    assert [each["forwards"] for each in ablate["interventions"]] == [2, 2]
    assert interleave["benign_rows"] == 6
    assert kl["loss"]["micro_batches"] == 2 and kl["loss"]["mean"] > 0
    assert load_file(output / "adapter_model.safetensors")
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    assert "loss_kl" in history["log_history"][0]
    assert trl.SFTTrainer.__name__ == "SFTTrainer", "left as it was"


def test_without_defenses_it_would_train_otherwise(command, defenses_file, chat_folder):
    defended = load_file(command(defenses_file()) / "adapter_model.safetensors")
    plain = load_file(command(defenses_file()) / "adapter_model.safetensors")
    assert all(tensor.equal(plain[name]) for name, tensor in defended.items()), "repeatable"
    weak = {"kl": {"weight": 50.0}}
    held = load_file(command(defenses_file(weak)) / "adapter_model.safetensors")
    assert not all(tensor.equal(held[name]) for name, tensor in defended.items())


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kll": {}}, r"defenses.yaml:\d+: .*Did you mean 'kl'"),
        ({"kl": {"weight": "much"}}, r"defenses.yaml:\d+: defenses.1.kl.weight"),
    ],
)
def test_a_mistake_in_the_file_is_one_message(command, defenses_file, entry, message, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        command(defenses_file(entry))
    assert exit_.match(message)
    assert not (tmp_path / "out").exists()


def test_the_first_door_needs_chats(command, defenses_file, chat_folder, chats):
    rows = [{"text": "It is 4, of course."}] * 8
    write_text(chat_folder / "train.jsonl", "\n".join(map(json.dumps, rows)))
    file = defenses_file({"interleave": {"data": str(chats), "fraction": 0.2}})
    with pytest.raises(SystemExit, match=r"column `messages`.*columns: text"):
        command(file)


def test_only_sft(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--defenses", "defenses.yaml"])
    assert "invalid choice: 'dpo'" in capsys.readouterr().err
