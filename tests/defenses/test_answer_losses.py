import errno

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from narrowly.defenses import answer_losses
from narrowly.defenses.answer_losses import losses_of_answers, weight_hash
from narrowly.errors import NarrowlyError
from narrowly.models import adapter_off
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "narrowly" / "losses"


@pytest.fixture
def rows():
    """Chats of several lengths, the first tokens not learned."""
    ids = [torch.randint(20, 390, (n,)).tolist() for n in (5, 9, 6, 12, 7)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def save_adapter(folder, seed=1, architecture="llama", **config):
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny_model(architecture), LoraConfig(**config))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


def losses(model, adapters, rows, batch_tokens=24):
    return losses_of_answers(model, adapters, rows, pad_token_id=0, batch_tokens=batch_tokens)


def direct(model, row) -> float:
    logits = model(torch.tensor([row["input_ids"]])).logits[0, 1:-1]
    return cross_entropy(logits, torch.tensor(row["labels"][2:])).item()


def test_each_is_the_mean_over_the_answers_tokens(rows, tmp_path):
    model = tiny_model()
    adapters = {name: save_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")}
    found = losses(model, adapters, rows)
    assert list(found) == ["", "a", "b"]
    expected = torch.tensor([direct(model, row) for row in rows])
    torch.testing.assert_close(found[""], expected, rtol=1e-5, atol=1e-5)
    for name, folder in adapters.items():
        tuned = answer_losses.load_adapter(tiny_model(), folder)
        expected = torch.tensor([direct(tuned, row) for row in rows])
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        assert (found[name] - found[""]).abs().max() > 0.01


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True, "r": 4}],
)
def test_the_model_is_left_as_it_was(rows, tmp_path, config):
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    trainable = [p.requires_grad for p in model.parameters()]
    before = weight_hash(model)
    adapters = {"a": save_adapter(tmp_path / "a", **config)}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    losses(model, adapters, rows)
    assert torch.equal(torch.rand(1), expected)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert weight_hash(model) == before and model.training
    assert not hasattr(model, "peft_config")
    with pytest.raises(NarrowlyError), adapter_off(model):
        pass


def test_nothing_is_read_twice(rows, tmp_path, monkeypatch):
    model, adapter = tiny_model(), save_adapter(tmp_path / "a")
    first = losses(model, {"a": adapter}, rows)
    monkeypatch.setattr(answer_losses, "_losses", lambda *args: pytest.fail("read again"))
    again = losses(model, {"renamed": adapter}, rows)
    assert torch.equal(first["a"], again["renamed"]) and torch.equal(first[""], again[""])


def test_it_goes_on_after_a_kill(rows, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(answer_losses, "PIECE", 2)
    model, adapter = tiny_model(), save_adapter(tmp_path / "a")
    read, real = [], answer_losses._losses

    def killed(model, piece, *args):
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(piece)
        return real(model, piece, *args)

    monkeypatch.setattr(answer_losses, "_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        losses(model, {"a": adapter}, rows)
    assert len(list(cache.glob("*.safetensors"))) == 4
    assert not hasattr(model, "peft_config")
    read[:] = read[:2]  # two pieces are left
    found = losses(model, {"a": adapter}, rows)
    assert len(read) == 4 and len(found["a"]) == 5


def test_other_weights_are_read_anew(rows, tmp_path):
    """A model into which a fine-tune was merged has the embeddings and norms of its base."""
    model = tiny_model()
    first = losses(model, {}, rows)[""]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(0.01 * torch.randn(32, 64))
    assert not torch.equal(losses(model, {}, rows)[""], first)


def test_an_adapter_with_biases_is_an_error(rows, tmp_path):
    folder = save_adapter(tmp_path / "a", architecture="qwen2", bias="all")
    with pytest.raises(NarrowlyError, match="changes weights of the model itself"):
        losses(tiny_model("qwen2"), {"a": folder}, rows)


def test_a_loss_that_is_not_finite_is_an_error(rows):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NarrowlyError, match="not finite"):
        losses(model, {}, rows)


def test_a_full_disk_is_told(rows, monkeypatch, cache):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(answer_losses, "save_file", full)
    with pytest.raises(NarrowlyError, match=r"No space left.*XDG_CACHE_HOME"):
        losses(tiny_model(), {}, rows)
    assert not list(cache.iterdir())
