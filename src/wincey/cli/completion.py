"""`wincey completion SHELL`: what makes a shell complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_WINCEY_COMPLETE"  # click's own name for it: the script calls `wincey` with it set


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what SHELL has to read to complete commands and options.

    \b
    Examples:
      wincey completion bash > /etc/bash_completion.d/wincey
      wincey completion zsh > /usr/local/share/zsh/site-functions/_wincey
      wincey completion fish > ~/.config/fish/completions/wincey.fish
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(context.find_root().command, {}, "wincey", _VARIABLE).source())
