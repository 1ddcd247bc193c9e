"""The command ``completion``: a script that lets a shell complete commands, options and names of methods."""

from __future__ import annotations

import argparse
from typing import Any

from attrib_zoo.errors import check_choice

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# attrib-zoo, completed by {shell}: put this line into ~/.{shell}rc
#   eval "$(attrib-zoo completion {shell})"
{head}_attrib_zoo() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$current"))
    return
  fi
  case "$before" in
{values}
  esac
  if [[ "$current" == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  else
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _attrib_zoo attrib-zoo
"""


def completion(options: Any, parser: argparse.ArgumentParser) -> str:
    """The script for ``options.shell``, made from the parser."""
    from attrib_zoo.cli.shared import SCORES, methods

    shell = check_choice("shell", options.shell, SHELLS)
    values = {
        "--method": tuple(methods()),
        "--score": SCORES,
        "--scale": ("min-max", "rank"),
        "--recipe": ("rows", "paper", "released"),
        "--masking": ("raw", "standardized", "blur", "auto"),
        "--schedule": ("short", "paper", "auto"),
        "--device": ("auto", "cpu", "cuda"),
    }
    commands = _commands(parser)
    reply = 'COMPREPLY=($(compgen -W "{}" -- "$current")); return ;;'
    cases = [f"    {name}) {reply.format(' '.join(known))}" for name, known in values.items()]
    return _SCRIPT.format(
        shell=shell,
        head="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=" ".join(commands),
        values="\n".join(cases),
        options="\n".join(f'      {name}) words="{" ".join(words)}" ;;' for name, words in commands.items()),
    ).rstrip()


def _commands(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Each command with its long options."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {
        name: [word for action in command._actions for word in action.option_strings if word.startswith("--")]
        for name, command in found.choices.items()
    }
