"""Completion of `v4jax` in bash and zsh: a static script made from the declared flags, which starts no process."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from v4jax import config as config_lib
from v4jax.cli_flags import Command, config_paths
from v4jax.core.errors import UserError

# Fixed text; @CASES@ fills `words` with the candidates for the word under the cursor, which is $word. bash breaks words
# at "=" and replaces what follows it, zsh replaces the whole word. Without candidates both complete file names.
_BASH = """\
# Completion of v4jax. bash: source <(v4jax completion bash). zsh: source <(v4jax completion zsh), after compinit.
_v4jax() {
  local line=${COMP_LINE:0:$COMP_POINT} word before words="" prefix="" candidate
  word=${line##*[[:space:]]}
  before=${line%"$word"}
  before=${before#*[[:space:]]}
  if [[ -z $before ]]; then
    words=@COMMANDS@
  else
    case "${before%%[[:space:]]*} $word" in
@CASES@
    esac
  fi
  if [[ -z ${ZSH_VERSION-} && $word == *=* ]]; then prefix="${word%%=*}="; fi
  COMPREPLY=()
  while IFS= read -r candidate; do
    if [[ -n $candidate && $candidate == "$word"* ]]; then COMPREPLY+=("${candidate#"$prefix"}"); fi
  done <<< "$words"
  if [[ -z ${ZSH_VERSION-} && ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
"""
_REGISTER = {
    "bash": "complete -o default -F _v4jax v4jax\n",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\ncomplete -o nospace -o default -F _v4jax v4jax\n",
}


def script(commands: Mapping[str, Command], arguments: Sequence[str]) -> str:
    """Return the completion script of the shell named in `arguments`; raise UserError for an unknown shell."""
    if len(arguments) != 1 or arguments[0] not in _REGISTER:
        raise UserError("completion needs the shell: v4jax completion bash, or v4jax completion zsh")
    cases = [case for name, command in commands.items() for case in _cases(name, command)]
    words = _list([*commands, "completion", "--help", "--version"])
    return _BASH.replace("@COMMANDS@", words).replace("@CASES@", "\n".join(cases)) + _REGISTER[arguments[0]]


def _cases(name: str, command: Command) -> list[str]:
    """Return the `case` branches of one command: values of enumerations and presets, config fields, flags."""
    cases = []
    starts = [f"--{flag.name}=" for flag in command.flags]
    for flag in command.flags:
        if flag.values:
            cases.append(_case(f"{name} --{flag.name}=", [f"--{flag.name}={value}" for value in flag.values]))
    if command.has_config:
        starts += ["--config=", "--config.", "--show_config"]
        cases.append(_case(f"{name} --config=", [f"--config={preset}" for preset in config_lib.preset_names()]))
        cases.append(_case(f"{name} --config.", [f"--config.{path}=" for path in config_paths()]))
    cases.append(f'      "{name} --"*=*) ;;')
    cases.append(_case(f"{name} -", starts))
    return cases


def _case(pattern: str, words: Sequence[str]) -> str:
    return f'      "{pattern}"*) words={_list(words)} ;;'


def _list(words: Sequence[str]) -> str:
    return shlex.quote("\n".join(words))
