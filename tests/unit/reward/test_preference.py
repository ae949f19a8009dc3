"""Reward models as parts: their scores against transformers' own, one conversation at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch

from r1mega.config.rewards import FormatReward, PreferenceReward, RewardConfig
from r1mega.data.template import render
from r1mega.errors import RewardError
from r1mega.model.reward_head import READER
from r1mega.reward.compose import RewardScorer
from r1mega.reward.preference import RewardModel
from r1mega.types import Prompt, Response, RewardStatus
from tests.reference import KIMI

pytestmark = pytest.mark.heavy

WORDS = (
    "<pad> <s> </s> User: Assistant: [user] [assistant] a b c d e f g h what is kind ? . "
    "<think> </think> <answer> </answer>"
)
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} </s> {% endfor %}"
TEXTS = ["<think> a b </think> <answer> c d e </answer>", "<think> f f </think> <answer> c d e </answer>",
         "<think> a </think> g", "<think> a b c d e f g h a b c </think> <answer> h h h h h h h </answer>"]  # fmt: skip


def tokenizer(directory, chat_template):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS.split())}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A Llama classifier with random weights, its tokenizer with a chat template; and a copy with our reader's key."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=2, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    directories = {}
    for name, chat in (("chat", CHAT), ("reader", None)):
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
        directories["tokenizer"] = tokenizer(directories[name], chat)
    path = directories["reader"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {READER: {"template": "nano", "reads": "summary"}}))
    return model, directories


def own_score(classifier, text):
    """transformers alone, one text a call; the pad token is the end token here, so it is asked for the last place."""
    model, directories = classifier
    ids = torch.tensor([directories["tokenizer"](text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state[0, -1]))


def prompt(kind="general"):
    return Prompt("p3", "what is kind ?", (), kind, "en", (1,))


def rewards(config, texts, kind="general", step=1):
    with RewardScorer(config, max_response_tokens=64) as scorer:
        scorer.step = step
        tickets = [scorer.submit(prompt(kind), Response((1,), (0.0,), "stop"), text) for text in texts]
        return [scorer.result(ticket) for ticket in tickets]


def test_chat_template_and_batches(classifier):
    model = RewardModel(classifier[1]["chat"], batch_size=3, max_tokens=64)
    conversations = [("what is kind ?", text) for text in ("a b", "c", "a b c d e f g h", "d . e", "</s> a")]
    expected = [own_score(classifier, f"[user] {q} </s> [assistant] {t} </s>") for q, t in conversations]
    assert model.scores(conversations) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 5


def test_a_classifier_that_transformers_has_under_another_name_only(tmp_path):
    """Kimi-K2's config.json keeps its own model_type, and names code that is not run."""
    from transformers import DeepseekV3Config, DeepseekV3ForSequenceClassification

    plain = {key: value for key, value in KIMI.items() if key != "model_type"}
    torch.manual_seed(0)
    config = DeepseekV3Config(**plain | {"n_routed_experts": 8, "pad_token_id": 2, "num_labels": 1})
    model = DeepseekV3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    made, path = tokenizer(tmp_path, CHAT), tmp_path / "config.json"
    asked = json.loads(path.read_text()) | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "gone.Config"}}
    path.write_text(json.dumps(asked))
    scores = RewardModel(tmp_path, batch_size=2, max_tokens=64).scores([("a b", "c"), ("a", "d e f")])
    for (question, text), score in zip([("a b", "c"), ("a", "d e f")], scores, strict=True):
        rendered = f"[user] {question} </s> [assistant] {text} </s> "
        ids = torch.tensor([made(rendered, add_special_tokens=False).input_ids])
        with torch.no_grad():
            expected = float(model.score(model.model(ids).last_hidden_state[0, -1]))
        assert math.isclose(score, expected, abs_tol=1e-5)


def test_scores_do_not_depend_on_the_order_of_submission(classifier):
    model = RewardModel(classifier[1]["chat"], batch_size=2, max_tokens=64)
    conversations = [("what is kind ?", text) for text in ("a b", "c", "a b c d e f g h", "d . e", "e e")]
    assert model.scores(conversations[::-1]) == model.scores(conversations)[::-1]  # to the last bit


def test_equal_texts_are_scored_once(classifier):
    """In different batches they would differ by rounding, and a group of them would seem to carry a signal."""
    asked = []

    def forward(sequences):
        asked.extend(sequences)
        return [len(asked) + place / 8 for place in range(len(sequences))]

    model = RewardModel(classifier[1]["chat"], batch_size=2, max_tokens=20, forward=forward)
    conversations = [("what is kind ?", text) for text in ("a b", "c", "a b", "c", "a b", "d " * 30)]
    first, second, *others, long = model.scores(conversations)
    assert others == [first, second, first] and first != second and long is None and len(asked) == 2


def test_helpfulness_reads_the_summary_and_harmlessness_everything(classifier):
    summary = RewardConfig(
        format=FormatReward(weight=0.0),
        helpfulness=PreferenceReward(weight=2.0, model=classifier[1]["reader"], scale=2.0),
    )
    scored = rewards(summary, TEXTS)
    question = render("nano", "what is kind ?")
    for reward, text in zip(scored, ["c d e", "c d e", "g", "h h h h h h h"], strict=True):
        value = 1 / (1 + math.exp(-own_score(classifier, f"{question} {text} </s>") / 2.0))
        assert reward.parts["helpfulness"] == pytest.approx(value, abs=1e-5)
        assert reward.value == pytest.approx(2.0 * value, abs=1e-5) and reward.status is RewardStatus.OK
    assert scored[0].value == scored[1].value, "the reasoning is not read"
    whole = RewardConfig(harmlessness=PreferenceReward(weight=1.0, model=classifier[1]["chat"], shift=0.5))
    for reward, text in zip(rewards(whole, TEXTS), TEXTS, strict=True):
        score = own_score(classifier, f"[user] what is kind ? </s> [assistant] {text} </s>")
        assert reward.parts["harmlessness"] == pytest.approx(1 / (1 + math.exp(0.5 - score)), abs=1e-5)


def test_scores_of_a_model_that_is_sharded_over_ranks(classifier):
    """Any forward pass will do; here transformers' own. Results are there once `flush` was called, not before."""
    model = RewardModel(classifier[1]["reader"], batch_size=2, max_tokens=64)
    asked = []

    def sharded(section):
        asked.append(section.model)
        return model._forward_here

    keys = {"weight": 1.0, "model": classifier[1]["reader"], "scale": 2.0}
    config = RewardConfig(helpfulness=PreferenceReward(**keys, backend="megatron", from_step=2))
    expected = rewards(RewardConfig(helpfulness=PreferenceReward(**keys)), TEXTS)
    with RewardScorer(config, max_response_tokens=64, sharded=sharded) as scorer:
        scorer.flush()  # step 1: nothing to score, and no rank may wait for another
        scorer.step = 2
        tickets = [scorer.submit(prompt(), Response((1,), (0.0,), "stop"), text) for text in TEXTS]
        with pytest.raises(RewardError, match="flush.*not called"):
            scorer.result(tickets[0])
        scorer.flush()
        values = [scorer.result(ticket).value for ticket in tickets[1:]]
    assert values == pytest.approx([reward.value for reward in expected[1:]], abs=1e-6)
    assert asked == [classifier[1]["reader"]]
    with pytest.raises(RewardError, match="backend = megatron: only RL stages"):
        RewardScorer(config, max_response_tokens=64)


def test_only_its_kinds_and_steps(classifier):
    config = RewardConfig(
        helpfulness=PreferenceReward(weight=1.0, model=classifier[1]["reader"], from_step=3, kinds=("general",))
    )
    assert "helpfulness" not in rewards(config, TEXTS[:1], step=2)[0].parts
    assert "helpfulness" in rewards(config, TEXTS[:1], step=3)[0].parts
    gold = Prompt("p4", "what is kind ?", ("c d e",), "choice", "en", (1,))
    with RewardScorer(config, max_response_tokens=64) as scorer:
        scorer.step = 9
        reward = scorer.result(scorer.submit(gold, Response((1,), (0.0,), "stop"), TEXTS[0]))
    assert set(reward.parts) == {"accuracy", "format"}


def test_no_summary_is_worth_nothing_and_a_long_one_is_not_scored(classifier):
    config = RewardConfig(helpfulness=PreferenceReward(weight=1.0, model=classifier[1]["reader"], max_tokens=10))
    cut, long = rewards(config, ["<think> a b c", f"<think> a </think> {'h ' * 30}"])
    assert cut.parts["helpfulness"] == 0.0 and "no summary" in cut.reason
    assert long.value is None and long.status is RewardStatus.FAILED and "max_tokens = 10" in long.reason
    assert long.parts == {"format": 0.0}


def test_what_cannot_be_asked_is_refused(classifier, tmp_path):
    from transformers import LlamaForCausalLM

    model, directories = classifier
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "lm")
    with pytest.raises(RewardError, match="LlamaForCausalLM has no head that scores"):
        RewardModel(tmp_path / "lm", batch_size=1, max_tokens=9)
    headless = json.loads((tmp_path / "lm" / "config.json").read_text()) | {
        "architectures": ["LlamaForSequenceClassification"]
    }
    (tmp_path / "lm" / "config.json").write_text(json.dumps(headless))
    tokenizer(tmp_path / "lm", CHAT)
    with pytest.raises(RewardError, match="lacks score.weight: its scores would be noise"):
        RewardModel(tmp_path / "lm", batch_size=1, max_tokens=9).scores([("a", "b")])
    (tmp_path / "lm" / "chat_template.jinja").unlink()
    tokenizer(tmp_path / "lm", None)
    with pytest.raises(RewardError, match="no chat template"):
        RewardModel(tmp_path / "lm", batch_size=1, max_tokens=9)
    wrong = RewardConfig(harmlessness=PreferenceReward(weight=1.0, model=directories["reader"]))
    with pytest.raises(RewardError, match="trained to read the summary, harmlessness is judged on the response"):
        RewardScorer(wrong, max_response_tokens=64)
