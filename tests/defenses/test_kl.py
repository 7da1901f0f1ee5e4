import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from narrowly.defenses.head import Head
from narrowly.defenses.kl import KL, rows, summed_kl
from narrowly.errors import NarrowlyError
from narrowly.files import read_json, write_text
from narrowly.training import train
from tests.defenses.steps import BATCH, assert_same_gradients, step_of, tuned
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer
from tests.training.conftest import chat

ANSWERS = BATCH["labels"][:, 1:] != -100


def plain_kl(model, reference=None, batch=BATCH, reverse=False) -> torch.Tensor:
    """Mean KL over the answers' tokens, from whole logits in the plainest way."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    log_p = model(**inputs).logits.log_softmax(-1)
    with torch.no_grad():
        if reference is None:
            with model.disable_adapter():
                log_q = model(**inputs).logits.log_softmax(-1)
        else:
            log_q = reference(**inputs).logits.log_softmax(-1)
    one, other = (log_q, log_p) if reverse else (log_p, log_q)
    answers = batch["labels"][:, 1:] != -100
    return (one.exp() * (one - other)).sum(-1)[:, :-1][answers].mean()


class TestLoss:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral", "cohere", "granite"])
    def test_value_and_gradient_are_those_of_plain_torch(self, architecture, reverse):
        model, defense = tuned(architecture), KL(weight=0.3, reverse=reverse)
        loss = defense.loss(step_of(model, defense))
        expected = 0.3 * plain_kl(model, reverse=reverse)
        assert float(expected.detach()) > 1e-4
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        assert_same_gradients(model, loss, expected)

    def test_soft_capped_logits(self):
        model, defense = tuned("gemma2", final_logit_softcapping=2.0), KL(weight=1)
        loss, expected = defense.loss(step_of(model, defense)), plain_kl(model)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        assert_same_gradients(model, loss, expected)

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_full_fine_tune_beside_its_reference(self, tied):
        model = tiny_model(seed=1, tie_word_embeddings=tied).train()
        reference, defense = tiny_model(seed=0), KL(weight=1)
        loss = defense.loss(step_of(model, defense, reference=reference))
        expected = plain_kl(model, reference)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert_same_gradients(model, loss, expected)

    def test_positions_a_few_at_a_time(self, monkeypatch):
        monkeypatch.setattr("narrowly.defenses.kl.rows", lambda head: 2)
        model, defense = tuned(), KL(weight=1)
        loss, expected = defense.loss(step_of(model, defense)), plain_kl(model)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        assert_same_gradients(model, loss, expected)

    def test_zero_at_the_reference_itself_and_without_answers(self):
        model, defense = tuned(), KL()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        assert float(defense.loss(step_of(model, defense)).detach()) == 0
        silent = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}
        loss = defense.loss(step_of(tuned(), defense, silent))
        loss.backward()
        assert float(loss.detach()) == 0

    def test_an_adapter_on_the_head_itself_is_refused(self):
        lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        model, defense = get_peft_model(tiny_model(), lora).train(), KL()
        with pytest.raises(NarrowlyError, match="Leave `lm_head` out"):
            defense.loss(step_of(model, defense))

    def test_bf16_is_near_fp32(self):
        h, h_base = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        exact = tiny_model()
        half = tiny_model().bfloat16()
        wide = h.clone().requires_grad_()
        narrow = h.bfloat16().requires_grad_()
        one = summed_kl(wide, h_base, Head(exact), Head(exact))
        other = summed_kl(narrow, h_base.bfloat16(), Head(half), Head(half))
        assert other.dtype == torch.float32
        assert float(other.detach()) == pytest.approx(float(one.detach()), rel=0.03)
        one.backward()
        other.backward()
        assert narrow.grad.dtype == torch.bfloat16
        error = (narrow.grad.float() - wide.grad).norm() / wide.grad.norm()
        assert error < 0.03

    def test_a_model_whose_logits_are_something_else_is_refused(self):
        model = tuned()
        inner = model.get_base_model()
        plain = inner.forward

        def forward(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

        inner.forward = forward
        defense = KL()
        with pytest.raises(NarrowlyError, match="LlamaForCausalLM: its logits are not what"):
            defense.loss(step_of(model, defense))


def test_no_pair_of_logits_is_held():
    """What stays for the backward pass is as large as the hidden states."""
    model = tiny_model(vocab_size=5000)
    head, saved = Head(model), []
    h = torch.randn(700, 32, requires_grad=True)
    assert rows(head) < 5000

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_kl(h, torch.randn(700, 32), head, head)
    assert max(saved) <= 5000 * 32


class TestOtherText:
    @pytest.fixture
    def texts(self, tmp_path):
        path = tmp_path / "texts.jsonl"
        lines = [json.dumps({"text": f"{i} and so on"}) for i in range(10)]
        write_text(path, "\n".join(lines))
        return str(path)

    def other(self, defense, model, number):
        return defense._batch(defense._rows, step_of(model, defense, number=number))

    def test_plain_text_counts_wholly(self, texts):
        model, defense = tuned(), KL(data=texts, weight=1)
        defense.bind(model.get_base_model(), tiny_tokenizer(), 3)
        batch = self.other(defense, model, 0)
        assert (batch["labels"] != -100).sum() == batch["attention_mask"].sum() - len(batch) + 1
        loss = defense.loss(step_of(model, defense))
        expected = plain_kl(model, batch=batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
        assert_same_gradients(model, loss, expected)

    def test_rows_follow_the_count_of_micro_batches_and_the_seed(self, texts):
        model = tuned()
        defense, again, another = KL(data=texts), KL(data=texts), KL(data=texts)
        for each, seed in ((defense, 3), (again, 3), (another, 4)):
            each.bind(model.get_base_model(), tiny_tokenizer(), seed)
        seen = [self.other(defense, model, number)["input_ids"] for number in range(5)]
        assert torch.equal(seen[2], self.other(again, model, 2)["input_ids"])
        assert len({str(row.tolist()) for batch in seen for row in batch}) == 10
        drawn = [self.other(another, model, number)["input_ids"].tolist() for number in range(5)]
        assert drawn != [ids.tolist() for ids in seen]

    def test_in_a_run(self, recipe, tmp_path, chats):
        write_text(
            tmp_path / "other.jsonl", "\n".join(json.dumps(chat(i)) for i in range(200, 220))
        )
        plain = train(recipe(output=str(tmp_path / "plain")), progress=False)
        defended = recipe(
            defenses=[{"kl": {"data": str(tmp_path / "other.jsonl"), "weight": 5.0}}],
            output=str(tmp_path / "kl"),
        )
        run = train(defended, progress=False)
        [entry] = read_json(run.path / "defenses.json")
        assert entry["data_hash"] and entry["loss"]["mean"] > 0
        assert run.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-5)
        assert run.metrics[-2]["loss"] != plain.metrics[-2]["loss"]


class TestReference:
    def test_a_full_fine_tune_needs_one(self, recipe):
        with pytest.raises(NarrowlyError, match="give the defense a `reference`"):
            train(recipe(lora=None, defenses=["kl"]), progress=False)

    def test_another_tokenizer_is_refused(self, recipe, tmp_path):
        other = save_tiny(tmp_path / "other")
        tokens = read_json(other / "tokenizer.json")
        vocabulary = tokens["model"]["vocab"]
        one, two = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (other / "tokenizer.json").write_text(json.dumps(tokens))
        with pytest.raises(NarrowlyError, match="another tokenizer"):
            train(recipe(defenses=[{"kl": {"reference": str(other)}}]), progress=False)

    def test_itself_as_the_reference_is_the_adapter_off(self, recipe, model_folder, tmp_path):
        off = train(recipe(defenses=["kl"], output=str(tmp_path / "off")), progress=False)
        named = [{"kl": {"reference": str(model_folder)}}]
        run = train(recipe(defenses=named, output=str(tmp_path / "named")), progress=False)
        for one, other in zip(off.metrics[:-1], run.metrics[:-1], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)

    def test_it_keeps_packed_chats_apart(self):
        """Its own configuration asks for a cache, with which transformers takes them for one."""
        model, reference, defense = tuned(), tiny_model(), KL(weight=1)
        lengths = BATCH["attention_mask"].sum(1).tolist()
        rows = [{k: v[i, :n] for k, v in BATCH.items()} for i, n in enumerate(lengths)]
        packed = {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "labels": torch.cat([row["labels"] for row in rows])[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        }
        one = defense.loss(step_of(model, defense, reference=reference))
        other = defense.loss(step_of(model, defense, packed, reference=reference))
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
