"""The chat template of a directory, a Jinja program of unknown origin that turns messages into a prompt.

A template runs in the sandbox of jinja2, with the filters, functions and blocks that transformers gives it. In addition
`limits.py` bounds its steps, its time, its output and the values it builds.
"""

from __future__ import annotations

import os
import pathlib

from v4jax.core import untrusted_json
from v4jax.core.errors import UserError
from v4jax.data import tokenizer_file

FILE_NAME = "chat_template.jinja"
_CONFIG_NAMES = ("special_tokens_map.json", "tokenizer_config.json")
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates read the reasoning
_MAX_SOURCE = 1 << 20  # characters; published templates have up to 30,000
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of the final message in the output


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        tokens: special tokens that the template may name, such as {"bos_token": "<s>"}.
        where: the origin of the source, for messages.

    Raises:
        UserError: jinja2 is missing, or the source is no template.
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None, *, where: str = "the chat template"):
        if len(source) > _MAX_SOURCE:
            raise UserError(f"{where} has {len(source):,} characters, and {_MAX_SOURCE:,} are the most that is read")
        try:
            from v4jax.data.chat import limits
        except ImportError as error:
            raise UserError(f"{where} needs jinja2>=3.1.6; run pip install 'v4jax[serve]'") from error
        self.source = source
        self._tokens = dict(tokens or {})
        self._where = where
        self._program = limits.Program(source, where)

    def render(
        self,
        messages: list[dict],
        *,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables,
    ) -> str:
        """Return the prompt of messages.

        Args:
            messages: messages as in the Chat Completions API.
            tools: definitions of functions; None for none.
            documents: documents of a template for retrieval.
            add_generation_prompt: end with the beginning of the next reply.
            continue_final_message: end directly behind the content of the final message.
            variables: further variables of the template.

        Raises:
            UserError: the template refuses the messages, fails, or exceeds a limit.
        """
        messages = [_with_reasoning_names(message) for message in messages]
        if continue_final_message:
            content = messages[-1].get("content") if messages else None
            if not isinstance(content, str):
                raise UserError("the final message has no text content that the model could continue")
            messages[-1]["content"] = content + _TAG
        arguments = {"messages": messages, "tools": tools, "documents": documents}
        arguments["add_generation_prompt"] = add_generation_prompt
        text = self._program.run(self._tokens | variables | arguments)
        if not continue_final_message:
            return text
        end = text.rfind(_TAG.strip())
        if end < 0:
            raise UserError(f"{self._where} does not put out the final message as it is, so it cannot be continued")
        return text[:end] if text.startswith(_TAG, end) else text[:end].rstrip()


class TemplateSet:
    """The named templates of a directory. "tool_use" serves requests with tools, if there is one.

    Args:
        templates: templates by name; "default" serves all other requests.
    """

    def __init__(self, templates: dict[str, ChatTemplate]):
        self._templates = templates
        self.source = "\n".join(template.source for template in templates.values())

    def render(self, messages: list[dict], *, tools: list[dict] | None = None, **options) -> str:
        """Return the prompt of messages; see `ChatTemplate.render`."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        return self._templates[name].render(messages, tools=tools, **options)


def find_template(directory: str | os.PathLike) -> TemplateSet | None:
    """Return the chat templates of a checkpoint directory; None if it has none.

    The file chat_template.jinja has priority over the field chat_template of tokenizer_config.json.

    Raises:
        UserError: a file cannot be read, or a template has an error.
    """
    directory = pathlib.Path(directory)
    config: dict = {}
    for name in _CONFIG_NAMES:
        if (directory / name).is_file():
            config |= tokenizer_file.read_config(directory / name)
    tokens = {name: _spelling(config.get(name)) for name in _TOKENS}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    sources = _named_sources(config.get("chat_template"), directory)
    file = directory / FILE_NAME
    if file.is_file():
        sources = {"default": _read_text(file)}
    if not sources:
        return None
    where = {name: f"the chat template {name!r} of {directory}" for name in sources}
    return TemplateSet({name: ChatTemplate(text, tokens, where=where[name]) for name, text in sources.items()})


def _named_sources(field: object, directory: pathlib.Path) -> dict[str, str]:
    """Return {name: source} of the field chat_template, which is text or a list of {"name": ..., "template": ...}."""
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    try:
        sources = {item["name"]: item["template"] for item in field}
    except (KeyError, TypeError):
        sources = {}
    if not all(isinstance(text, str) for text in [*sources, *sources.values()]) or "default" not in sources:
        raise UserError(
            f"chat_template in {directory}/tokenizer_config.json has no template 'default'; download it again"
        )
    return sources


def _read_text(file: pathlib.Path) -> str:
    try:
        return untrusted_json.read_bytes(file, 4 * _MAX_SOURCE).decode("utf-8")
    except (untrusted_json.JsonError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no chat template ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _spelling(token: object) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _with_reasoning_names(message: dict) -> dict:
    """Return a copy of a message that has its reasoning under every name that templates read."""
    found = [message[name] for name in _REASONING if message.get(name) is not None]
    return dict(message) | (dict.fromkeys(_REASONING, found[0]) if found else {})
