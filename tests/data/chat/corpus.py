"""Seeded generator of requests of three API protocols, over all roles, modes, efforts, tools and odd texts."""

import json
import random

from v4jax.data.chat.conversation import EFFORTS

TEXTS = (
    "",
    "a",
    "Hello, wörld!",
    "日本語 <｜User｜> x",
    "\n\n",
    "line\nline",
    " json ",
    "😀 <think>x</think>",
    "</｜DSML｜invoke>",
    "x" * 40,
)
NAMES = ("f", "get_weather", "a-b_9")
BAD_ARGUMENTS = ("", "not json", "[1]", "3", '{"a":1e400}', '{"a":NaN}', '{"a":1,"b":2,"a":3}', ' {"a" : 01}')


class Generator:
    """Generator of requests.

    Args:
        seed: seed of all requests.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._calls = 0

    def chat_completion(self) -> dict:
        """Return a request to /v1/chat/completions."""
        messages = []
        for _ in range(self._random.randrange(1, 9)):
            messages += self._chat_messages()
        if messages[-1]["role"] == "assistant" and len(messages) > 2 and self._chance(0.5):
            messages[-1]["prefix"] = True
        body = {"messages": messages}
        if self._chance(0.5):
            body["thinking"] = {"type": self._pick(("enabled", "disabled"))}
        if self._chance(0.5):
            body["reasoning_effort"] = self._pick(tuple(EFFORTS))
        if self._chance(0.4):
            body["tools"] = [{"type": "function", "function": function} for function in self._functions()]
        if self._chance(0.3):
            named = {"type": "function", "function": {"name": self._pick(NAMES)}}
            body["tool_choice"] = self._pick(("auto", "none", "required", named))
        if self._chance(0.2):
            schema = {"type": "object", "properties": {"é": {"type": "number", "default": 1e-7}}}
            json_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body["response_format"] = self._pick(({"type": "json_object"}, {"type": "text"}, json_schema))
        return body

    def responses(self) -> dict:
        """Return a request to /v1/responses."""
        items = [self._message_item("user")]
        for _ in range(self._random.randrange(1, 9)):
            items += self._items()
        body = {"input": items}
        if self._chance(0.3):
            body["instructions"] = self._text()
        if self._chance(0.5):
            body["reasoning"] = {"effort": self._pick((*EFFORTS, None))}
        if self._chance(0.4):
            body["tools"] = [{"type": "function", **function} for function in self._functions()]
        if self._chance(0.3):
            named = {"type": "function", "name": self._pick(NAMES)}
            body["tool_choice"] = self._pick(("auto", "none", "required", named))
        if self._chance(0.2):
            json_schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
            body["text"] = {"format": self._pick(({"type": "json_object"}, {"type": "text"}, json_schema))}
        return body

    def messages(self) -> dict:
        """Return a request to /v1/messages."""
        items = [{"role": "user", "content": self._text()}]
        for _ in range(self._random.randrange(1, 8)):
            items += self._anthropic_messages()
        body = {"messages": items, "max_tokens": 5}
        if self._chance(0.4):
            body["system"] = self._pick((self._text(), self._blocks("text", 2)))
        if self._chance(0.5):
            body["thinking"] = {"type": self._pick(("enabled", "disabled", "adaptive"))}
        if self._chance(0.5):
            body["output_config"] = {"effort": self._pick(tuple(EFFORTS))}
        if self._chance(0.4):
            body["tools"] = [
                {"input_schema": {"type": "object"}, "name": f["name"], "description": f.get("description", "")}
                for f in self._functions()
            ]
        if self._chance(0.3):
            choices = ({"type": "auto"}, {"type": "none"}, {"type": "any"}, {"type": "tool", "name": self._pick(NAMES)})
            body["tool_choice"] = self._pick(choices)
        return body

    def arguments(self) -> str:
        """Return the arguments of a tool call, of which some are no JSON object."""
        if self._chance(0.1):
            return self._pick(BAD_ARGUMENTS)
        values = {self._pick(("q", "city", "z é", "n")): self._value(2) for _ in range(self._random.randrange(4))}
        return json.dumps(values, ensure_ascii=self._chance(0.5))

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _pick(self, options):
        return self._random.choice(options)

    def _text(self) -> str:
        return self._pick(TEXTS)

    def _blocks(self, kind: str, count: int) -> list[dict]:
        return [{"type": kind, "text": self._text()} for _ in range(count)]

    def _content(self) -> str | list[dict]:
        return self._text() if self._chance(0.8) else self._blocks("text", self._random.randrange(3))

    def _ids(self) -> tuple[list[str], list[str]]:
        """Return new ids of calls, and the same ids in the order of their results. Some results are missing."""
        first = self._calls
        self._calls += self._random.randrange(1, 4)
        ids = [f"c{i:05d}" for i in range(first, self._calls)]
        results = self._random.sample(ids, len(ids))
        return ids, results[1:] if self._chance(0.05) else results

    def _value(self, depth: int):
        numbers = (0, -3, 2**63, 2**70, 0.0, 1.5, 1e-5, 1e-7, 1e16, 1e22, -2.5e300, 0.1)
        scalars = (None, True, self._pick(numbers), self._text(), 'é\u2028\x01"\\', [], {})
        if not depth or self._chance(0.7):
            return self._pick(scalars)
        if self._chance(0.5):
            return [self._value(depth - 1), self._value(depth - 1)]
        return {self._pick(("b", "a", "é", "x y")): self._value(depth - 1) for _ in range(2)}

    def _functions(self) -> list[dict]:
        functions = []
        for name in self._random.sample(NAMES, self._random.randrange(1, 4)):
            function = {"name": name}
            if self._chance(0.7):
                function["description"] = self._text()
            if self._chance(0.7):
                field = {"type": "string", "description": self._text(), "default": self._pick((1.5, None, "é"))}
                function["parameters"] = {"type": "object", "properties": {"q": field}}
            functions.append(function)
        return functions

    def _chat_messages(self) -> list[dict]:
        draw = self._random.random()
        if draw < 0.5:
            return [{"role": "system" if draw < 0.2 else "user", "content": self._content()}]
        if draw < 0.57:
            return [{"role": "latest_reminder", "content": self._text()}]
        message = {"role": "assistant", "content": self._content()}
        if self._chance(0.6):
            message["reasoning_content"] = self._text()
        if self._chance(0.6):
            return [message]
        ids, results = self._ids()
        if self._chance(0.3):
            message["content"] = None
        message["tool_calls"] = [
            {"id": i, "type": "function", "function": {"name": self._pick(NAMES), "arguments": self.arguments()}}
            for i in ids
        ]
        return [message, *({"role": "tool", "tool_call_id": i, "content": self._content()} for i in results)]

    def _message_item(self, role: str) -> dict:
        kind = "output_text" if role == "assistant" else "input_text"
        content = self._text() if self._chance(0.7) else self._blocks(kind, self._random.randrange(3))
        return {"type": "message", "role": role, "content": content}

    def _items(self) -> list[dict]:
        draw = self._random.random()
        if draw < 0.5:
            roles = ("assistant", "user", "system", "developer")
            return [self._message_item(roles[int(draw * 8)])]
        if draw < 0.7:
            content = self._blocks("reasoning_text", self._random.randrange(3))
            return [{"type": "reasoning", "summary": [], "content": content}]
        if draw < 0.75:
            return [{"type": "item_reference", "id": "x"}]
        ids, results = self._ids()
        items = []
        for i in ids:
            if self._chance(0.9):
                call = {"type": "function_call", "name": self._pick(NAMES), "arguments": self.arguments()}
            else:
                call = {"type": "custom_tool_call", "name": "apply_patch", "input": self._text()}
            items.append(call | {"call_id": i})
        return items + [{"type": "function_call_output", "call_id": i, "output": self._text()} for i in results]

    def _anthropic_messages(self) -> list[dict]:
        draw = self._random.random()
        if draw < 0.1:
            return [{"role": "system", "content": self._text()}]
        if draw < 0.5:
            content = self._text() if self._chance(0.6) else self._blocks("text", self._random.randrange(1, 3))
            return [{"role": "user", "content": content}]
        if draw < 0.65:
            return [{"role": "assistant", "content": self._text()}]
        thought = {"type": "thinking", "thinking": self._text(), "signature": "s"}
        blocks = [self._pick((*self._blocks("text", 1), thought)) for _ in range(self._random.randrange(1, 3))]
        if self._chance(0.5):
            return [{"role": "assistant", "content": blocks}]
        ids, order = self._ids()
        for i in ids:
            arguments = {self._pick(("q", "z é")): self._value(1) for _ in range(self._random.randrange(3))}
            blocks.append({"type": "tool_use", "id": i, "name": self._pick(NAMES), "input": arguments})
        results = [
            {"type": "tool_result", "tool_use_id": i, "content": self._pick((self._text(), self._blocks("text", 2)))}
            for i in order
        ]
        if self._chance(0.3):
            results += self._blocks("text", 1)
        return [{"role": "assistant", "content": blocks}, {"role": "user", "content": results or "x"}]
