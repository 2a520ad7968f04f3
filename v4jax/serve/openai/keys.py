"""API keys: a file of hashes, and budgets of requests and tokens for each key."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time

from starlette.datastructures import Headers

from v4jax.core import untrusted_json
from v4jax.core.errors import UserError
from v4jax.serve.openai.errors import ApiError
from v4jax.serve.sampling_params import is_int

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BUDGETS = ("requests_per_minute", "tokens_per_minute")


class Budget:
    """An allowance that refills steadily; one minute's worth can be used at once.

    Args:
        per_minute: allowance of a minute; None for no limit.
    """

    def __init__(self, per_minute: int | None):
        self._per_minute = per_minute
        self._left = float(per_minute or 0)
        self._time = time.monotonic()

    def wait(self, amount: float) -> float:
        """Return the seconds until `amount` is left; 0 if it is now."""
        if self._per_minute is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._time) * self._per_minute / 60)
        self._time = now
        return max(0.0, (amount - self._left) * 60 / self._per_minute)

    def use(self, amount: float) -> None:
        """Use an amount, which may exceed what is left."""
        self._left -= amount


@dataclasses.dataclass
class Key:
    """One client.

    Attributes:
        name: name of the client in the audit log; also part of its cache salt.
        requests, tokens: its budgets. Tokens are those of prompts and of continuations.
    """

    name: str
    requests: Budget
    tokens: Budget

    def admit(self) -> None:
        """Use one request of the budget.

        Raises:
            ApiError: a budget is used up (429).
        """
        for budget, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if seconds := budget.wait(1):
                raise ApiError(429, f"the budget of {what} per minute is used up; try again later", retry_after=seconds)
        self.requests.use(1)


class Keys:
    """The keys of a server.

    Args:
        keys: SHA-256 of a key in hexadecimal -> key.
    """

    def __init__(self, keys: dict[str, Key]):
        self._keys = keys

    def authenticate(self, headers: Headers) -> Key:
        """Return the key of a request, from `Authorization: Bearer KEY` or `x-api-key: KEY`.

        Raises:
            ApiError: there is no key, or it is unknown (401).
        """
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get("x-api-key", "")
        key = self._keys.get(hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).hexdigest())
        if key is None:
            what = "is unknown" if secret else "is missing; send it as Authorization: Bearer KEY"
            raise ApiError(401, f"the API key {what}", headers={"www-authenticate": "Bearer"})
        return key


def read_keys(path: str) -> Keys:
    """Return the keys of a JSON file.

    The file is an object with a list `keys`. An item has `name`, `sha256` (of the key, in hexadecimal) and optionally
    `requests_per_minute` and `tokens_per_minute`.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    try:
        content = untrusted_json.parse(untrusted_json.read_bytes(path))
    except OSError as error:
        raise UserError(f"cannot read --api_keys={path}: {error.strerror}") from error
    except untrusted_json.JsonError as error:  # the text of the error could repeat a secret
        raise UserError(f'--api_keys={path} is no JSON; write {{"keys": [{{"name": ..., "sha256": ...}}]}}') from error
    items = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        raise UserError(f"--api_keys={path} has no list 'keys' of at least one key")
    keys: dict[str, Key] = {}
    names: set[str] = set()
    for number, item in enumerate(items):
        digest, key = _key(item, f"--api_keys={path}: keys[{number}]")
        if key.name in names or digest in keys:
            raise UserError(f"--api_keys={path}: keys[{number}] has a name or a hash that an earlier key has")
        keys[digest] = key
        names.add(key.name)
    return Keys(keys)


def _key(item: object, where: str) -> tuple[str, Key]:
    if not isinstance(item, dict):
        raise UserError(f"{where} is no object")
    name, digest = item.get("name"), item.get("sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}.name must be 1 to 64 letters, digits and any of _ . -")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise UserError(f"{where}.sha256 must be 64 hexadecimal digits; printf %s KEY | sha256sum prints them")
    for budget in _BUDGETS:
        if item.get(budget) is not None and (not is_int(item[budget]) or item[budget] < 1):
            raise UserError(f"{where}.{budget} must be an integer of at least 1")
    if unknown := item.keys() - {"name", "sha256", *_BUDGETS}:
        raise UserError(f"{where} has the unknown field {sorted(unknown)[0]!r}")
    return digest, Key(name, *(Budget(item.get(budget)) for budget in _BUDGETS))
