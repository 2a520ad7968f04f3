"""Replies to a conversation: the engine's outputs, decoded into reasoning, text and tool calls, for every protocol."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from v4jax.data.chat.conversation import Conversation
from v4jax.data.chat.decoding import DecodedToolCall, Delta, DeltaKind, Reply, ReplyDecoder
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.chat.encoding import END_THINK
from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.output_processor import RequestState
from v4jax.serve.outputs import Logprob, RequestOutput

# Arguments of `ChatTemplate.render`, which other fields of a request set.
_RESERVED = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}
_THINKING = ("thinking", "enable_thinking")  # names under which vLLM's clients turn thinking on and off


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Options of a chat prompt.

    Attributes:
        body: object of the request, with `thinking` taken from `chat_template_kwargs` if only that has it.
        add_generation_prompt: the prompt ends with the beginning of a reply.
        template: further variables of a chat template.
    """

    body: dict
    add_generation_prompt: bool = True
    template: dict = dataclasses.field(default_factory=dict)


def chat_options(body: dict) -> ChatOptions:
    """Return the options of a chat request. `chat_template_kwargs` and `add_generation_prompt` are vLLM's.

    Raises:
        ApiError: a field is invalid.
    """
    if body.get("chat_template") is not None:
        raise bad_request("chat_template is not accepted from a request; put chat_template.jinja into the checkpoint")
    template = protocol.mapping(body, "chat_template_kwargs")
    if reserved := _RESERVED & template.keys():
        raise bad_request(f"chat_template_kwargs has {sorted(reserved)[0]!r}; set it in the request itself")
    if body.get("thinking") is None and body.get("reasoning_effort") is None:
        for name in _THINKING:
            if template.get(name) is not None:
                body = body | {"thinking": {"type": "enabled" if protocol.flag(template, name) else "disabled"}}
    continues = protocol.flag(body, "continue_final_message")
    add = protocol.flag(body, "add_generation_prompt", not continues)
    if add and continues:
        raise bad_request("continue_final_message and add_generation_prompt exclude each other")
    return ChatOptions(body, add or continues, template)


def encode_prompt(encoder: ChatEncoder, conversation: Conversation, settings: ChatOptions) -> list[int]:
    """Return the token ids of the prompt of a conversation."""
    return encoder.encode_conversation(
        conversation, add_generation_prompt=settings.add_generation_prompt, template_options=settings.template
    )


@dataclasses.dataclass
class ReplyState:
    """One reply while it is generated.

    Attributes:
        index: number of the reply.
        decoder: decoder of its text.
        texts: text of each output.
        deltas: all deltas so far.
        ids, positions: generated tokens and their log-probabilities.
        finish_reason: "stop", "length" or "tool_calls"; None until the end.
        stop_reason: stop string or stop token that ended it.
        reasons: only reasoning has been decoded so far.
    """

    index: int
    decoder: ReplyDecoder
    texts: list[str] = dataclasses.field(default_factory=list)
    deltas: list[Delta] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    positions: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reasons: bool = True

    def reply(self) -> Reply:
        """Return the reply so far."""
        text = {kind: "".join(d.text for d in self.deltas if d.kind is kind) for kind in DeltaKind}
        has_reasoning = any(delta.kind is DeltaKind.REASONING for delta in self.deltas)
        arguments: dict[int, list[str]] = {}
        for delta in self.deltas:
            if delta.kind is DeltaKind.ARGUMENTS:
                arguments.setdefault(delta.index, []).append(delta.text)
        calls = [d for d in self.deltas if d.kind is DeltaKind.TOOL_CALL]
        return Reply(
            text[DeltaKind.REASONING] if has_reasoning else None,
            text[DeltaKind.CONTENT],
            tuple(DecodedToolCall(d.id, d.name, "".join(arguments.get(d.index, ()))) for d in calls),
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """What one output adds to a reply: deltas, and the new tokens with their log-probabilities."""

    state: ReplyState
    deltas: list[Delta]
    ids: list[int]
    positions: list[dict[int, Logprob]]


class Replies:
    """The replies to one conversation. `start` makes it; `parts` runs it once.

    Attributes:
        states: state of each reply.
    """

    def __init__(self, call: Call, requests: list[RequestState], decoders: list[ReplyDecoder], stops: Sequence[str]):
        self.states = [ReplyState(index, decoder) for index, decoder in enumerate(decoders)]
        self._call, self._requests, self._stops = call, requests, stops

    @classmethod
    async def start(
        cls,
        call: Call,
        conversation: Conversation,
        options: dict[str, Any],
        max_tokens: int | None,
        count: int = 1,
        settings: ChatOptions | None = None,
    ) -> Replies:
        """Encode a conversation and make the engine's requests.

        Args:
            call: admitted call.
            conversation: the conversation.
            options: options of `SamplingParams` (`protocol.sampling_options`).
            max_tokens: most tokens of a reply; None fills the context.
            count: number of replies.
            settings: options of the prompt.

        Raises:
            ApiError, UserError: an option is invalid, or the prompt is too long.
        """
        service, settings = call.service, settings or ChatOptions(call.body)
        encoder = service.encoder
        stops = options.pop("stop", ())
        stops = [stops] if isinstance(stops, str) else stops
        protocol.make_sampling({"stop": stops}, {})  # stop strings end the answer, so the decoder looks for them
        options |= _structured_outputs(conversation)

        def encode() -> tuple[list[int], list[ReplyDecoder]]:
            ids = encode_prompt(encoder, conversation, settings)
            decoder = lambda: encoder.decoder(conversation, stop=stops, template_options=settings.template)
            return ids, [decoder() for _ in range(count)]

        ids, decoders = await asyncio.to_thread(encode)
        if max_tokens is None:
            max_tokens = service.llm.default_sampling_params.get("max_tokens")
            room = service.frontend.room(len(ids))
            max_tokens = room if max_tokens is None else min(max_tokens, room)
        options |= {"max_tokens": max_tokens}
        sampling = protocol.continuations(options, service.llm.default_sampling_params, count)
        prompt = {"prompt_token_ids": ids}
        if (salt := service.cache_salt(call)) is not None:
            prompt["cache_salt"] = salt
        requests = await service.frontend.make_requests([prompt] * count, sampling)
        call.prompt_tokens = len(ids)
        return cls(call, requests, decoders, stops)

    async def parts(self) -> AsyncIterator[Part | None]:
        """Yield the parts of all replies as they are generated, and None after a time without one."""
        generation = self._call.generation(self._requests)
        async with contextlib.aclosing(generation.outputs()) as outputs:
            async for event in outputs:
                if event is None:
                    yield None
                    continue
                index, output = event
                part = self._decode(self.states[index], output)
                if part.state.finish_reason is not None:
                    generation.stop(index)
                if part.deltas or part.ids or part.state.finish_reason is not None:
                    yield part

    def _decode(self, state: ReplyState, output: RequestOutput) -> Part:
        """Decode one output, and end the reply where its text or its tokens end."""
        state.texts.append(output.text)
        deltas = state.decoder.push(output.text)
        is_complete = state.decoder.finished  # before the end of the tokens
        if output.finished:
            deltas += state.decoder.finish()
        state.deltas += deltas
        state.ids += output.token_ids
        positions = output.logprobs or []
        state.positions += positions
        self._count(state, output, deltas)
        if output.finished or state.decoder.finished:
            calls = any(delta.kind is DeltaKind.TOOL_CALL for delta in state.deltas)
            cut = output.finish_reason == "length" and not is_complete
            state.finish_reason = "length" if cut else "tool_calls" if calls else "stop"
            state.stop_reason = output.stop_reason
            if is_complete and not calls:
                state.stop_reason = _stop_string("".join(state.texts), self._stops)
            self._call.finish_reasons.append(state.finish_reason)
        return Part(state, deltas, output.token_ids, positions)

    def _count(self, state: ReplyState, output: RequestOutput, deltas: list[Delta]) -> None:
        call = self._call
        call.completion_tokens += len(output.token_ids)
        state.reasons = state.reasons and all(delta.kind is DeltaKind.REASONING for delta in deltas)
        if state.reasons and any(delta.kind is DeltaKind.REASONING for delta in state.deltas):
            call.reasoning_tokens += len(output.token_ids)
        if state.index == 0 and len(state.ids) == len(output.token_ids):  # the first output of the first reply
            call.cached_tokens = output.num_cached_tokens or 0


def _stop_string(text: str, stops: Sequence[str]) -> str | None:
    """Return the stop string that ended the answer in `text`: the one whose end comes first, of several the longest."""
    answer = text.rpartition(END_THINK)[2]
    found = [(answer.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in answer]
    return min(found)[2] if found else None


def _structured_outputs(conversation: Conversation) -> dict[str, Any]:
    """Return the sampling option that enforces the format of the answer; {} for free text."""
    format = conversation.response_format
    if format.type == "text":
        return {}
    if conversation.thinking:  # the reasoning would have to have the format too
        raise bad_request("response_format needs a reply without reasoning; turn thinking off", "response_format")
    if format.type == "json_schema":
        return {"structured_outputs": {"json": format.schema}}
    if format.type == "regex":
        return {"structured_outputs": {"regex": format.regex}}
    return {"structured_outputs": {"json_object": True}}
