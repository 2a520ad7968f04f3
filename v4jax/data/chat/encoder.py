"""Chat of one checkpoint: its encoding or template, from messages to token ids and from reply text to its parts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable

from v4jax.core.errors import UserError
from v4jax.data.chat import encoding
from v4jax.data.chat.anthropic import from_messages
from v4jax.data.chat.chat_completions import from_chat_completions, to_chat_messages, to_chat_tools
from v4jax.data.chat.conversation import Conversation
from v4jax.data.chat.decoding import ReplyDecoder, Start
from v4jax.data.chat.responses import from_responses
from v4jax.data.chat.template import ChatTemplate, find_template
from v4jax.data.tokenizer import Tokenizer


class ChatEncoder:
    """Encoder of conversations and decoder of replies, for one tokenizer.

    Args:
        tokenizer: tokenizer of the model.
        version: "v4" or "v4.1". None takes V4.1 if the tokenizer has the token <｜System｜>, else V4.
        template: chat template that replaces DeepSeek's encoding; None for none.

    Raises:
        UserError: the version is unknown.
    """

    def __init__(self, tokenizer: Tokenizer, *, version: str | None = None, template: ChatTemplate | None = None):
        if version is None:
            version = "v4.1" if tokenizer.added_token_id(encoding.SYSTEM) is not None else "v4"
        if version not in encoding.VERSIONS:
            raise UserError(f"the chat encoding {version!r} is unknown; options: {', '.join(encoding.VERSIONS)}")
        self.version = encoding.VERSIONS[version]
        self.template = template
        self._tokenizer = tokenizer

    @classmethod
    def from_dir(cls, directory: str | os.PathLike, tokenizer: Tokenizer, *, version: str | None = None) -> ChatEncoder:
        """Return the encoder of a checkpoint directory.

        A file chat_template.jinja, or else the field chat_template of tokenizer_config.json, replaces DeepSeek's
        encoding.

        Raises:
            UserError: a file cannot be read, or the template has an error.
        """
        return cls(tokenizer, version=version, template=find_template(directory))

    def conversation(
        self,
        messages: Iterable[dict],
        *,
        tools: list[dict] | None = None,
        tool_choice: str | dict | None = None,
        parallel_tool_calls: bool | None = None,
        thinking: bool | None = None,
        reasoning_effort: str | None = None,
        response_format: dict | None = None,
        continue_final_message: bool = False,
    ) -> Conversation:
        """Return a conversation whose arguments are the fields of a Chat Completions request.

        Args:
            messages: objects with `role`, `content` and, of assistants, `reasoning_content` and `tool_calls`.
            tools: definitions of functions.
            tool_choice: "auto", "none", "required" or the name of one function in an object.
            parallel_tool_calls: whether a reply may have several calls. None means yes.
            thinking: whether the model reasons before it answers. None means yes, unless the effort is "none".
            reasoning_effort: "none", "minimal", "low", "medium", "high", "xhigh" or "max".
            response_format: {"type": "text"}, "json_object", "json_schema" or "regex" with its field.
            continue_final_message: the model continues the final assistant message.

        Raises:
            UserError: an argument is malformed or contradicts another one.
        """
        body = {
            "messages": list(messages),
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "reasoning_effort": reasoning_effort,
            "response_format": response_format,
            "continue_final_message": continue_final_message,
        }
        if thinking is not None:
            body["thinking"] = {"type": "enabled" if thinking else "disabled"}
        return from_chat_completions(body)

    def from_chat_completions(self, body: dict) -> Conversation:
        """Return the conversation of a request to /v1/chat/completions."""
        return from_chat_completions(body)

    def from_responses(self, body: dict) -> Conversation:
        """Return the conversation of a request to /v1/responses."""
        return from_responses(body)

    def from_messages(self, body: dict) -> Conversation:
        """Return the conversation of a request to /v1/messages."""
        return from_messages(body, wrap_system=self.template is None and self.version is encoding.V4)

    def encode(self, messages: Iterable[dict], *, add_generation_prompt: bool = True, **options) -> list[int]:
        """Return the token ids of the prompt of messages. `options` are those of `conversation`."""
        conversation = self.conversation(messages, **options)
        return self.encode_conversation(conversation, add_generation_prompt=add_generation_prompt)

    def encode_conversation(
        self, conversation: Conversation, *, add_generation_prompt: bool = True, template_options: dict | None = None
    ) -> list[int]:
        """Return the token ids of the prompt of a conversation.

        Text of messages and tools never becomes a special token in DeepSeek's encoding. A template mixes its own text
        with that of the messages, so special tokens are recognized everywhere in its output, as in transformers.

        Args:
            conversation: messages, tools and settings.
            add_generation_prompt: end with the beginning of the next reply.
            template_options: further variables of a template, such as {"enable_thinking": False}.

        Raises:
            UserError: the tokenizer lacks a special token of the encoding, or the template fails.
        """
        if self.template is not None:
            text = self._apply_template(conversation, add_generation_prompt, template_options or {})
            return self._tokenizer.encode_document(text, add_special_tokens=False, parse_special_tokens=True)
        ids: list[int] = []
        for part in self._render(conversation, add_generation_prompt):
            if isinstance(part, encoding.Special):
                ids.append(self._special_ids[part.token])
            else:
                ids += self._tokenizer.encode_plain(part)
        return ids

    def render(
        self, conversation: Conversation, *, add_generation_prompt: bool = True, template_options: dict | None = None
    ) -> str:
        """Return the prompt of a conversation as text; otherwise like `encode_conversation`."""
        if self.template is not None:
            return self._apply_template(conversation, add_generation_prompt, template_options or {})
        return encoding.text_of(self._render(conversation, add_generation_prompt))

    def decoder(
        self,
        conversation: Conversation,
        *,
        stop: Iterable[str] = (),
        new_id: Callable[[], str] | None = None,
        template_options: dict | None = None,
    ) -> ReplyDecoder:
        """Return the decoder of the reply to a conversation.

        Args:
            conversation: conversation that was encoded.
            stop: texts that end the reply when they occur in the answer.
            new_id: function that returns the id of a new tool call.
            template_options: those of `encode_conversation`.
        """
        options = {"stop": stop} | ({} if new_id is None else {"new_id": new_id})
        if self.template is not None:
            source = self.template.source
            prompt = self._apply_template(conversation, True, template_options or {})
            if prompt.rstrip().endswith(encoding.THINK):
                start = Start.REASONING
            elif encoding.END_THINK in source:
                start = Start.CONTENT_CONTINUED if conversation.continue_final_message else Start.OPEN
            else:
                start = Start.PLAIN
            return ReplyDecoder(start, parse_tool_calls=encoding.DSML in source, **options)
        return ReplyDecoder(
            _start(conversation),
            parse_tool_calls=conversation.parses_tool_calls,
            json_output=conversation.response_format.type == "json_object",
            **options,
        )

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> list[encoding.Part]:
        return encoding.render(conversation, self.version, add_generation_prompt=add_generation_prompt)

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        ids = {token: self._tokenizer.added_token_id(token) for token in self.version.specials}
        missing = [token for token, i in ids.items() if i is None]
        if missing:
            raise UserError(
                f"the tokenizer has no token {missing[0]}, which the chat encoding {self.version.name} needs; "
                "add a chat_template.jinja to the directory of the model, or use its own tokenizer.json"
            )
        return ids

    def _apply_template(self, conversation: Conversation, add_generation_prompt: bool, options: dict) -> str:
        variables = {"thinking": conversation.thinking, "enable_thinking": conversation.thinking}
        if conversation.reasoning_effort is not None:
            variables["reasoning_effort"] = conversation.reasoning_effort
        return self.template.render(
            to_chat_messages(conversation),
            tools=to_chat_tools(conversation),
            add_generation_prompt=add_generation_prompt and not conversation.continue_final_message,
            continue_final_message=conversation.continue_final_message,
            **(variables | options),
        )


def _start(conversation: Conversation) -> Start:
    """Return where the reply to the prompt of DeepSeek's encoding begins."""
    if conversation.tool_choice == "required" and conversation.tools:
        return Start.TOOL_CALLS
    if not conversation.continue_final_message:
        return Start.REASONING if conversation.thinking else Start.CONTENT
    if not conversation.thinking:
        return Start.CONTENT
    return Start.CONTENT_CONTINUED if conversation.messages[-1].content else Start.REASONING_CONTINUED
