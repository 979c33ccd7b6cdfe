"""The options of the ``roundhouse`` command, each with its environment variable.

Those that set a router are listed in ``router.options``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from router.options import (
    BATCH,
    DEFAULTS,
    ENCRYPTION,
    FAILURES,
    KNOBS,
    LIMITS,
    LISTEN,
    MARK,
    OUTPUT,
    Knob,
    number,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MODEL, WORKER, ROUTER = "Model", "Worker", "Router"
SECTIONS = (MODEL, WORKER, ROUTER, LISTEN, ENCRYPTION, LIMITS, MARK, BATCH, FAILURES, OUTPUT)
CLUSTER = ("cluster-ca", "cluster-cert", "cluster-key")


class UserError(click.ClickException):
    """Something that the user can mend; one line on standard error, exit status 1."""


class ToldAsJson(click.ClickException):
    """An error of a command that was to speak JSON; its one line is an object, too."""

    def __init__(self, error: click.ClickException) -> None:
        super().__init__(error.format_message())
        self.status: int = error.exit_code


class SectionedOption(click.Option):
    """An option that knows under which heading of the help it belongs."""

    def __init__(self, *args: Any, section: str = OUTPUT, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help groups the options under headings, in the order of ``sections``."""

    sections: tuple[str, ...] = SECTIONS

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it. Its errors are told as all of its lines are."""
        try:
            return super().invoke(ctx)
        except ToldAsJson:
            raise
        except click.ClickException as error:
            if ctx.params.get("json_output"):
                raise ToldAsJson(error) from error
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one block of options for each heading."""
        for section in self.sections:
            rows = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
                and getattr(param, "section", OUTPUT) == section
                and (record := param.get_help_record(ctx))
            ]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)


def option(section: str, *names: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """``click.option`` under a heading of the help, with its environment variable shown."""
    attributes.setdefault("envvar", names[0].lstrip("-").upper().replace("-", "_"))
    return click.option(
        *names, cls=SectionedOption, section=section, show_envvar=True, **attributes
    )


def router_options(command: Decorated) -> Decorated:
    """Adds all options that fill ``Settings``, in the order of the table."""
    return some_router_options(*(knob.name for knob in KNOBS))(command)


def some_router_options(*names: str) -> Callable[[Decorated], Decorated]:
    """Adds those of the options that fill ``Settings`` that have these names."""

    def add(command: Decorated) -> Decorated:
        for knob in reversed(KNOBS):
            if knob.name in names:
                command = _knob_option(knob)(command)
        return command

    return add


def _knob_option(knob: Knob) -> Callable[[Decorated], Decorated]:
    """One option of the table, shaped by the default of its setting."""
    default = DEFAULTS[knob.setting]
    shape: dict[str, Any] = {"default": default, "show_default": default is not None}
    match default:
        case bool():
            shape |= {"is_flag": True, "show_default": default}
        case tuple():
            shape |= {"multiple": True, "default": None, "show_default": "any"}
        case str():
            shape |= {"type": str}
        case None if knob.text:
            shape |= {"type": str}
        case _:
            shape |= {"type": number}
    return option(
        knob.section,
        f"--{knob.name}/--no-{knob.name}" if default is True else f"--{knob.name}",
        knob.setting,
        metavar=knob.metavar or None,
        help=knob.help,
        envvar=knob.envvar,
        **shape,
    )
