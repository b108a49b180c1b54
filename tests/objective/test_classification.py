"""Classification: the objective on every architecture, the head, the terms, and the traps of classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from classifiers import KINDS, batch, classifier
from peft import LoraConfig, PeftModel, get_peft_model

from balora_plugin import BaLoraConfig, BaLoraModel, RegularizerConfig, get_ba_lora_model
from balora_plugin.checkpoint.names import HEAD_FILE
from balora_plugin.classification.data import check_labels
from balora_plugin.objective import classification_terms as terms
from balora_plugin.objective.classification import classification_step, features, samples_of
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.classifier_head import hand_over, head_names, teacher_head
from balora_plugin.pretrained.fingerprint import model_fingerprint
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.regularizers import consistency, covariance, spectral
from balora_plugin.schedules import Lambdas
from balora_plugin.training.checks.model import check_model, check_tokenizer, resolve
from balora_plugin.training.checks.teacher import check_same_head

pytestmark = pytest.mark.hosts

ALL = Lambdas(0.5, 0.1, 0.2)


@pytest.fixture(autouse=True)
def _one_thread(_seed):
    torch.set_num_threads(1)  # two would wait for each other more than they compute on models this small


def adapted(kind="bert", *, targets=None, **changes):
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=targets)
    model = get_ba_lora_model(classifier(kind, **changes), config)
    install(model.get_base_model(), classification_step)
    return model


def request(lambdas=ALL, **changes):
    settings = {key: changes.pop(key) for key in list(changes) if key in RegularizerConfig.__dataclass_fields__}
    return StepRequest(config=RegularizerConfig(**settings).resolved("nlu"), lambdas=lambdas, **changes)


def trained(model, steps=2, **kind):
    """A few steps on everything that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(steps):
        model(**batch(seed=step, **kind)).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind, tmp_path):
    """Consistency is 0 at step 0, the head trains and is saved whole, stock PEFT loads the same classifier."""
    model = adapted(kind, dropout=0.2)
    base = model.get_base_model()
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert type(model).__name__ == "BaLoraModelForSequenceClassification"
    assert {
        name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name
    } == set(head_names(base))
    for lambdas in (Lambdas(1.0, 0.0, 0.0), ALL):
        assert model.eval()(**batch(), ba_lora=request(lambdas)).consistency == 0.0
    model.train()
    out = model(**batch(), ba_lora=request(measure_shares=True))
    assert out.consistency > 0  # the student's dropout; the teacher has none
    out.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert torch.isfinite(out.shares).all() and (out.shares > 0).all()
    trained(model).eval().save_pretrained(tmp_path)
    with torch.no_grad():
        ours = model(**batch()).logits
        stock = PeftModel.from_pretrained(classifier(kind, seed=7, dropout=0.2), tmp_path).eval()
        copy_weights(base, stock.get_base_model())
        torch.testing.assert_close(stock(**batch()).logits, ours, rtol=0, atol=1e-5)


def copy_weights(base, other):
    """The pre-trained backbone into a model that was made with another random one; heads stay as they are."""
    names = {name for name, _ in base.named_parameters()}
    source = {
        n.replace(".base_layer", ""): p for n, p in base.named_parameters() if n.split(".")[0] not in head_names(base)
    }
    for name, p in other.named_parameters():
        key = name.replace(".base_layer", "")
        if name in names and "lora_" not in name and key in source:
            p.data.copy_(source[key])


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "modernbert", "llama"])
def test_all_linear_leaves_the_head_alone(kind):
    model = adapted(kind, targets="all-linear")
    heads = head_names(model.get_base_model())
    layers = [name.removeprefix("base_model.model.") for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert layers and not [name for name in layers if name.split(".")[0] in heads]
    assert model.eval()(**batch(), ba_lora=request()).consistency == 0.0


# --- the definitions


def test_the_loss_is_the_definition():
    """Paper's forms on logits, iclr2026's, and features; the task loss is the model's own."""
    model = trained(adapted()).eval()
    data = batch(6)
    with torch.no_grad():
        plain = model(**data, output_hidden_states=True)
        with TeacherSwitch(model).off():
            teacher = model(**data).logits
    z = plain.logits
    for settings, expected in (
        (
            {"preset": "paper", "svd_top_k": 2},
            (consistency(z, teacher, form="mse"), covariance(z), spectral(z, k=2, norm="none")),
        ),
        (
            {"preset": "iclr2026", "svd_input": "centered_logits", "svd_top_k": 1},
            (consistency(z, teacher, temperature=2.0), covariance(z), spectral(z, k=1, centered=True)),
        ),
        (
            {"preset": "iclr2026", "svd_input": "features", "diversity_input": "features", "svd_top_k": 3},
            (
                consistency(z, teacher, temperature=2.0),
                covariance(plain.hidden_states[-1][:, 0]),
                spectral(plain.hidden_states[-1][:, 0], k=3),
            ),
        ),
    ):
        out = model(**data, ba_lora=request(**settings))
        assert out.count == 6
        for name, value in zip(("task", "consistency", "diversity", "svd"), (plain.loss, *expected), strict=True):
            torch.testing.assert_close(getattr(out, name) / 6, value, rtol=1e-5, atol=1e-7)
        total = plain.loss + sum(weight * value for weight, value in zip(ALL, expected, strict=True))
        torch.testing.assert_close(out.loss / 6, total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["modernbert", "llama", "roberta"])
def test_features_are_what_the_head_reads(kind):
    """The logits of a padded sample's features are the model's, so padding is left out as the model leaves it out."""
    model, data = classifier(kind).eval(), batch()
    with torch.no_grad():
        hidden = model.base_model(**{k: v for k, v in data.items() if k != "labels"}).last_hidden_state
        rows = features(model, hidden, data)
        if kind == "llama":
            logits = model.score(rows)
        elif kind == "roberta":
            logits = model.classifier(rows.unsqueeze(1))
        else:
            logits = model.classifier(model.head(rows))
        torch.testing.assert_close(logits, model(**data).logits)
        assert not torch.allclose(rows, hidden[:, -1], atol=1e-3)


def test_shares_are_gradient_norms_at_the_final_hidden_states():
    model = trained(adapted()).train()
    out = model(**batch(), ba_lora=request(measure_shares=True, teacher_factor=1))
    doubled = model(**batch(), ba_lora=request(Lambdas(1.0, 0.2, 0.4), measure_shares=True))
    torch.testing.assert_close(doubled.shares, 2 * out.shares, rtol=1e-4, atol=0)
    only = model(**batch(), ba_lora=request(Lambdas(0.0, 0.0, 0.4), measure_shares=True))
    torch.testing.assert_close(only.shares, doubled.shares * torch.tensor([0.0, 0.0, 1.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "llama"])
def test_regression(kind):
    """One output: squared differences; classes' forms would be 0 (KL) or without gradient (normalised rows)."""
    model = trained(adapted(kind, num_labels=1), regression=True)
    data = batch(5, regression=True)
    with torch.no_grad():
        plain = model(**data)
        with TeacherSwitch(model).off():
            teacher = model(**data).logits
    out = model(**data, ba_lora=request(preset="iclr2026"))
    torch.testing.assert_close(out.task / 5, plain.loss)
    expected = (plain.logits.reshape(-1) - teacher.reshape(-1)).square().mean()
    torch.testing.assert_close(out.consistency / 5, expected)
    assert expected > 0
    for form in ("kl", "mse"):  # the naive versions
        z = plain.logits.reshape(-1, 1).clone().requires_grad_()
        consistency(z, teacher.reshape(-1, 1), form=form).backward()
        assert z.grad.abs().max() < 1e-6
    assert out.diversity == 0 and out.diversity_count == 0 and out.svd_used_k == 0  # said at the log
    rows = model(**data, ba_lora=request(preset="iclr2026", svd_input="features", diversity_input="features"))
    assert rows.diversity > 0 and rows.diversity_count == 5 and rows.svd_used_k == 4
    whole = {**data, "labels": data["labels"].long()}
    assert model(**whole, ba_lora=request()).loss.requires_grad  # DeBERTa rounds its outputs to whole numbers by itself


def test_several_labels_a_sample():
    model = trained(adapted(), multi=True)
    data = batch(4, multi=True)
    with torch.no_grad():
        plain = model(**data)
        with TeacherSwitch(model).off():
            teacher = model(**data).logits
    out = model(**data, ba_lora=request(preset="iclr2026"))
    assert model.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(out.task / 4, plain.loss)
    p, q = (torch.distributions.Bernoulli(logits=z / 2.0) for z in (teacher, plain.logits))
    expected = 4.0 * torch.distributions.kl_divergence(p, q).sum(dim=-1).mean()
    torch.testing.assert_close(out.consistency / 4, expected)
    assert samples_of(data["labels"], 12) == 4 and samples_of(torch.zeros(12), 12) == 12


# --- traps


def test_k_is_clamped_where_the_ratio_would_be_constant():
    """GLUE has at most three classes, the paper's k is 5."""
    z = torch.randn(6, 3, requires_grad=True)
    naive = spectral(z, k=5)
    naive.backward()
    assert naive == -1.0 and z.grad.abs().max() < 1e-6
    value, used = terms.spectrum_of_samples(z, k=5, norm="nuclear", centered=False)
    assert used == 2 and value > -1.0
    assert torch.autograd.grad(value, z)[0].abs().max() > 1e-3
    assert terms.spectrum_of_samples(z, k=5, norm="nuclear", centered=True)[1] == 1  # centred rows lose a direction
    assert terms.spectrum_of_samples(z[:, :2], k=5, norm="nuclear", centered=True) is None
    assert terms.spectrum_of_samples(z, k=5, norm="none", centered=False)[1] == 3
    assert terms.spectrum_of_samples(z[:, :1], k=5, norm="none", centered=False) is None


@pytest.mark.parametrize("norm", ["nuclear", "frobenius", "none"])
def test_a_batch_of_one_sample(norm):
    """The last batch of an epoch may be one: its covariance is NaN, its ratio constant."""
    model = adapted()
    data = batch(1)
    z = model(**data).logits
    centred = z - z.mean(dim=0)
    assert (centred.T @ centred / (len(z) - 1)).isnan().any()  # the naive covariance
    out = model(**data, ba_lora=request(svd_norm=norm, measure_shares=True))
    out.loss.backward()
    assert torch.isfinite(out.loss) and out.diversity_count == 0 and out.svd_count == 0 and out.svd_used_k == 0
    torch.testing.assert_close(out.loss.detach(), out.task)


def test_a_second_random_head_is_no_teacher():
    model, other = adapted().eval(), classifier(seed=1)
    data, base = batch(), model.get_base_model()
    torch.nn.init.normal_(other.classifier.weight, std=1.0)
    naive = model(**data, ba_lora=request(preset="iclr2026", teacher=other.eval()))
    assert naive.consistency / 4 > 0.1
    assert model(**data, ba_lora=request(preset="iclr2026")).consistency == 0.0
    with pytest.raises(ValueError, match=r"another head than the model \(classifier\.weight\).*copy\.deepcopy"):
        check_same_head(base, other)
    check_same_head(base, copy.deepcopy(classifier()))


def test_the_teacher_keeps_the_first_head_and_has_no_dropout():
    model = adapted(dropout=0.3)
    first = model.eval()(**batch()).logits
    trained(model.train())
    with TeacherSwitch(model).off():
        assert torch.equal(model(**batch()).logits, first)
    naive = model.train()  # adapters off, but dropout on and the head that trains
    with TeacherSwitch(model).layers_off():
        assert (naive(**batch()).logits - first).abs().max() > 1e-3


def test_terms_are_float32_under_autocast():
    model = trained(adapted())
    data = batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**data, ba_lora=request(return_logits=True))
        z = out.logits.detach().float()
        centred = z - z.mean(dim=0)
        half = (centred.T @ centred).float()  # the naive version
    assert out.logits.dtype == torch.bfloat16
    assert out.diversity.dtype == out.svd.dtype == out.consistency.dtype == torch.float32
    torch.testing.assert_close(out.diversity / 6, covariance(z), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.svd / 6, spectral(z, k=5, norm="none"), rtol=1e-6, atol=0)
    assert not torch.equal(half, centred.T @ centred)


def test_a_frozen_or_partly_frozen_head_is_refused():
    """PEFT trains `classifier` alone: DeBERTa's pooler is new too, and would be lost."""
    terms_ = RegularizerConfig()
    for kind, config, missing in (
        ("bert", LoraConfig(r=2), "classifier"),
        ("deberta-v2", LoraConfig(r=2, task_type="SEQ_CLS"), "pooler"),
        ("deberta-v2", LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"), "pooler"),
    ):
        model = get_peft_model(classifier(kind), config)
        with pytest.raises(ValueError, match=rf"{missing}, a part of .* head, is not trained.*task_type='SEQ_CLS'"):
            resolve(model.get_base_model(), terms_)
    config = LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["pooler"])
    resolve(get_peft_model(classifier("deberta-v2"), config).get_base_model(), terms_)
    resolve(classifier(), terms_)  # full fine-tuning
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM' with BertForSequenceClassification"):
        get_ba_lora_model(classifier(), BaLoraConfig(r=2, task_type="CAUSAL_LM"))


def test_the_family_is_the_models(llama):
    assert resolve(classifier(), RegularizerConfig()).task == "nlu"
    assert resolve(llama, RegularizerConfig()).task == "nlg"
    with pytest.raises(ValueError, match=r"task='nlg' with BertForSequenceClassification.*AutoModelForCausalLM"):
        resolve(classifier(), RegularizerConfig(task="nlg"))
    with pytest.raises(ValueError, match=r"task='nlu' with LlamaForCausalLM.*AutoModelForSequenceClassification"):
        resolve(llama, RegularizerConfig(task="nlu"))


def test_padding_that_the_head_would_read_is_refused(tokenizer):
    model = adapted("llama", pad_token_id=90)
    with pytest.raises(ValueError, match=r"pad_token_id=90 .* padded with 0.*pad_token_id = 0"):
        model(**batch(), ba_lora=request())
    with pytest.raises(ValueError, match=r"pad_token_id=90 .* the tokenizer pads with 0"):
        check_tokenizer(model.get_base_model(), tokenizer)
    check_tokenizer(classifier("llama"), tokenizer)
    none = classifier("gpt2", pad_token_id=None)
    with pytest.raises(ValueError, match="pad_token_id=None in the config of GPT2ForSequenceClassification"):
        check_model(none, RegularizerConfig().resolved("nlu"), adapter_follows=True)


def test_the_teachers_head_is_saved_and_restored(tmp_path):
    """A resumed run builds its model with another random head; it must not become the teacher's."""
    model = trained(adapted())
    first = teacher_head(model.get_base_model())
    model.save_pretrained(tmp_path)
    fresh = classifier(seed=1)
    torch.nn.init.normal_(fresh.classifier.weight)
    assert model_fingerprint(fresh) == model_fingerprint(classifier(seed=1))  # the head is no part of the base
    again = BaLoraModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    assert all(torch.equal(value, first[name]) for name, value in teacher_head(again.get_base_model()).items())
    with TeacherSwitch(again).off(), TeacherSwitch(model).off():
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)
    assert torch.equal(again.eval()(**batch()).logits, model.eval()(**batch()).logits)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is missing"):
        BaLoraModel.from_pretrained(classifier(), tmp_path, is_trainable=True)


def test_a_linear_probe_moves_the_head_alone_and_hands_it_over():
    model = adapted(dropout=0.1)
    base = model.get_base_model()
    no_terms = Lambdas(0.0, 0.0, 0.0)
    for p in model.parameters():
        p.grad = None
    model(**batch(), ba_lora=request(no_terms, head_only=True)).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert torch.is_grad_enabled()
    trained(model)
    assert not torch.equal(teacher_head(base)["classifier.weight"], base.classifier.weight)
    hand_over(base, None, "default")
    assert torch.equal(teacher_head(base)["classifier.weight"], base.classifier.weight)


def test_settings_of_the_other_family_are_refused(tmp_path):
    for changes in (
        {"svd_layout": "flattened"},
        {"diversity_top_k": 5},
        {"teacher_cache": str(tmp_path)},
        {"svd_max_rows": 5},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* with task='nlu'"):
            RegularizerConfig(**changes).resolved("nlu")
        RegularizerConfig(**changes).resolved("nlg")
    for changes in ({"diversity_input": "features"}, {"gather_batch_statistics": True}, {"head_warmup_steps": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* with task='nlg'"):
            RegularizerConfig(**changes).resolved("nlg")
        RegularizerConfig(**changes).resolved("nlu")
    with pytest.raises(ValueError, match="the batch holds no labels"):
        adapted()(**{key: value for key, value in batch().items() if key != "labels"}, ba_lora=request())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_labels_that_are_not_finite_are_refused(value, num_labels):
    with pytest.raises(ValueError, match=rf"rows, row 1: label {value!r} is not a .*num_labels={num_labels}: remove"):
        check_labels([0, value], num_labels, "rows")
    check_labels([0, 0.0], num_labels, "rows")


def test_a_quantised_base_with_a_head_in_floats(tmp_path):
    """A quantised head cannot train; with the head left out a 4-bit base has the 4-bit teacher, exactly."""
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    classifier("roberta", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)

    def load(**changes):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **changes)
        return AutoModelForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
        ).train()

    with pytest.raises(
        ValueError, match=r"classifier, a part of .* is quantised.*llm_int8_skip_modules=\['classifier'\]"
    ):
        resolve(load(llm_int8_skip_modules=["nothing"]), RegularizerConfig(), adapter_follows=True)
    model = get_ba_lora_model(load(llm_int8_skip_modules=["classifier"]), BaLoraConfig(r=2, lora_alpha=2))
    resolve(model.get_base_model(), RegularizerConfig())
    install(model.get_base_model(), classification_step)
    assert any(type(m).__name__ == "Linear4bit" for m in model.modules())
    assert model(**batch(), ba_lora=request()).consistency < 1e-10
    trained(model, steps=1)
    assert model(**batch(), ba_lora=request()).consistency > 1e-10
