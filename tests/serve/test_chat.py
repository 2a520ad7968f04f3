"""`LLM.chat`: a conversation becomes a prompt, by the checkpoint's template or by DeepSeek's encoding."""

import pytest

from tests.serve import engine_harness
from v4jax.checkpoint import save
from v4jax.core.errors import UserError
from v4jax.serve import LLM, SamplingParams

pytestmark = pytest.mark.slow

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
LIMITS = {
    name: getattr(engine_harness.LIMITS, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "To be?"}]


@pytest.fixture(scope="module")
def llm(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    save(model, path, format="orbax")
    tokenizer.save(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return LLM(path, **LIMITS)


def test_chat_generates_from_the_rendered_template(llm):
    pytest.importorskip("jinja2")
    text = "system: Be brief.\nuser: To be?\nassistant:"
    [reply] = llm.chat(TALK, GREEDY)
    assert reply.prompt_token_ids == llm.tokenizer.encode_document(text, add_special_tokens=False)
    [expected] = llm.generate([{"prompt_token_ids": reply.prompt_token_ids}], GREEDY)
    assert reply.outputs == expected.outputs and len(reply.token_ids) == 8


def test_chat_takes_several_conversations(llm):
    pytest.importorskip("jinja2")
    both = llm.chat([TALK, TALK[1:]], GREEDY)
    assert [reply.outputs for reply in both] == [llm.chat(each, GREEDY)[0].outputs for each in (TALK, TALK[1:])]
    [open_prompt] = llm.chat(TALK[1:], GREEDY, add_generation_prompt=False)
    assert llm.tokenizer.decode(open_prompt.prompt_token_ids) == "user: To be?\n"


@pytest.mark.parametrize(
    "messages, message",
    [
        ("To be?", "messages are 'To be\\?'; give a list of messages"),
        ([], "messages are \\[\\]; give a list of messages"),
        ([{"role": "poet", "content": "To be?"}], "poet"),
    ],
)
def test_chat_refuses_malformed_messages(llm, messages, message):
    pytest.importorskip("jinja2")
    with pytest.raises(UserError, match=message):
        llm.chat(messages, GREEDY)


def test_chat_without_template_needs_the_tokens_of_the_encoding(model, tokenizer):
    with pytest.raises(UserError, match="the tokenizer has no token .*; add a chat_template.jinja"):
        LLM(model, tokenizer=tokenizer, **LIMITS).chat(TALK, GREEDY)
    with pytest.raises(UserError, match="a chat needs a tokenizer"):
        LLM(model, **LIMITS).chat(TALK, GREEDY)
