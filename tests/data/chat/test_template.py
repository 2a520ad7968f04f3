"""Chat templates: equal to transformers', and hostile ones end in one line."""

import json
import sys

import pytest

import v4jax.data.chat

pytest.importorskip("jinja2", reason="jinja2, which the extra `serve` installs, is missing")

from v4jax.core.errors import UserError
from v4jax.data.chat import limits
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.chat.template import ChatTemplate, find_template
from v4jax.data.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <b>short</b> & clear."},
    {"role": "user", "content": " What is 2 + 2? é😀 "},
    {"role": "assistant", "content": "4 ", "reasoning_content": "easy"},
    {"role": "user", "content": "And 3 + 3?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <", "parameters": {"type": "object"}}}]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}\n"
        "{%- for m in messages -%}\n  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('roles must alternate') }}{%- endif -%}\n"
        "  {%- if m['role'] == 'user' -%}[INST] {% if loop.first and system is defined %}<<SYS>>{{ system }}<</SYS>>"
        "{% endif %}{{ m['content'] | trim }} [/INST]{%- else -%}"
        "{% generation %} {{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}{%- endif -%}\n{%- endfor -%}"
    ),
    "tools": (
        "{% macro show(tool, indent=2) %}{{ tool.function.name }}: {{ tool | tojson(indent=indent) }}{% endmacro %}\n"
        "{% if tools %}# Tools\n{% for tool in tools %}{{ show(tool) }}\n{{ show(tool, indent=none) }}\n{% endfor %}"
        "{% endif %}{% set ns = namespace(last='', n=0) %}\n"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.last = ns.last ~ m.role ~ ',' %}{% set ns.n = ns.n + 1 %}"
        "{{ m.thinking or '' }}{{ m.content.strip().replace('2', 'two').split(' ') | join('_') }}|{% endfor %}\n"
        "{{ ns.last }}{{ ns.n * 3 }}{{ '%s-%03d' | format('x', ns.n) }}{{ '{:>5}'.format(ns.n) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}"
        "{% set block %}[{{ ns.last | upper }}]{% endset %}{{ block }}"
        "{{ range(3) | list }}{{ {'a': 1} | items | list }}"
        "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    Tokenizer().save(path)
    return path


def write_template(directory, template) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize(
    "name, continued", [("chatml", False), ("chatml", True), ("llama", False), ("llama", True), ("tools", False)]
)
def test_template_equals_transformers(directory, name, continued):
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle of templates, is missing")
    write_template(directory, TEMPLATES[name])
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    messages = MESSAGES[:3] if continued else MESSAGES
    options = {"tools": TOOLS, "add_generation_prompt": not continued, "continue_final_message": continued}
    expected = reference.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
    assert find_template(directory).render(messages, enable_thinking=False, **options) == expected


def test_message_that_the_template_changes_cannot_be_continued():
    with pytest.raises(UserError, match="cannot be continued"):
        ChatTemplate("{{ messages[-1].content | length }}").render(MESSAGES[:3], continue_final_message=True)


def test_encoder_uses_the_template_of_the_directory(directory):
    write_template(directory, "{{ bos_token }}" + CHATML)
    tokenizer = Tokenizer(directory)
    encoder = ChatEncoder.from_dir(directory, tokenizer)
    ids = encoder.encode(MESSAGES[:2])
    assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
    text = "<|im_start|>system\nBe <b>short</b> & clear.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer.decode(ids).startswith(text)
    deltas = encoder.decoder(encoder.conversation(MESSAGES[:2])).push("\n</think>x")
    assert "".join(delta.text for delta in deltas) == "\n</think>x"


def test_encoder_decodes_reasoning_that_the_template_opens(directory):
    write_template(directory, CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}")
    encoder = ChatEncoder.from_dir(directory, Tokenizer(directory))
    deltas = encoder.decoder(encoder.conversation(MESSAGES[:2])).push("r</think>\n\nx")
    assert [(delta.kind.value, delta.text) for delta in deltas] == [("reasoning", "r"), ("content", "x")]


def test_template_file_has_priority_over_the_config(directory, tmp_path):
    assert find_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert find_template(tmp_path).render(MESSAGES) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(tmp_path).render(MESSAGES) == "file"


def test_named_template_serves_requests_with_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path).render(MESSAGES) == "plain"
    assert find_template(tmp_path).render(MESSAGES, tools=TOOLS) == "with tools"


GROW = "{% set ns = namespace(x=VALUE) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{",
        "{% include 'other' %}",
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ x" + "|upper" * 3000 + " }}",
        "{{ 'x' | no_such_filter }}",
        "{{ raise_exception('no') }}",
        "{{ missing.field }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ lipsum(100000) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 2 ** (10 ** 9) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (1000000000, 3) }}",
        "{{ '{:1000000000}'.format('a') }}",
        "{{ '{:{}}'.format('a', 1000000000) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a' | indent(10**9) }}",
        "{{ 'a' | wordwrap(10**10) }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ ('a' * 100000).replace('a', 'a' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
        "{{ ('a' * 1000000).join('b' * 100000) }}",
        "{{ ('b' * 100000) | join('a' * 1000000) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        GROW.replace("VALUE", "'a'").replace("STEP", "ns.x + ns.x"),
        GROW.replace("VALUE", "'a'").replace("STEP", "ns.x ~ ns.x"),
        GROW.replace("VALUE", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
        GROW.replace("VALUE", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
        GROW.replace("VALUE", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ '%s' % ns.x }}",
    ],
)
def test_hostile_template_ends_in_one_line(source):
    with pytest.raises(UserError) as error:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(error.value) and str(error.value).startswith("the chat template")


@pytest.mark.parametrize("limit, value, complaint", [("_MAX_STEPS", 1000, "steps"), ("_MAX_SECONDS", 0.05, "seconds")])
def test_endless_template_is_stopped(monkeypatch, limit, value, complaint):
    monkeypatch.setattr(limits, limit, value)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=complaint):
        ChatTemplate(loops).render(MESSAGES)


def test_template_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no chat template"):
        find_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for field in (3, [], [{"name": "default"}], {"default": "x"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
        with pytest.raises(UserError, match="no template 'default'"):
            find_template(tmp_path)


def test_template_without_jinja2_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "v4jax.data.chat.limits")
    monkeypatch.delattr(v4jax.data.chat, "limits")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"v4jax\[serve\]"):
        ChatTemplate("x")
