"""Replies of a model that generates what a test wants: the engine is replaced by a list of texts."""

import contextlib
import threading

from v4jax.serve.outputs import CompletionOutput, RequestOutput

TOOL_CALL = (
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="find">\n'
    '<｜DSML｜parameter name="q" string="true">ä x</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
TOOL = {"name": "find", "description": "finds", "parameters": {"type": "object", "properties": {}}}


@contextlib.contextmanager
def playing(llm, monkeypatch, *texts, finish_reason="stop", error=None, pause=0.0):
    """Inside the context, every request of `llm` gets `texts`, a token each, and after them `error`."""
    requests = []

    def submit(request, on_output):
        requests.append(request)
        threading.Thread(target=play, args=(request, on_output)).start()
        return len(requests)

    def play(request, on_output):
        for number, text in enumerate(texts):
            threading.Event().wait(pause)
            last = number == len(texts) - 1 and error is None
            one = CompletionOutput(0, text, [7], None, finish_reason if last else None)
            on_output(RequestOutput(None, request.prompt_token_ids, [one], None, 2))
        if error is not None:
            on_output(error() if isinstance(error, type) else error)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine_loop, "submit", submit)
        patch.setattr(llm.engine_loop, "abort", lambda id: None)
        yield requests


@contextlib.contextmanager
def held(llm):
    """Inside the context, the engine makes no step."""
    release, holding = threading.Event(), threading.Event()

    def hold():
        holding.set()
        release.wait(60)

    thread = threading.Thread(target=lambda: llm.engine_loop.do(hold))
    thread.start()
    holding.wait(60)
    try:
        yield
    finally:
        release.set()
        thread.join()
