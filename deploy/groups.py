"""From options to groups of workers: each with its engine, its model files and its own settings.

The options of the command line hold for every group. ``--group ENGINE,KEY=VALUE,...`` asks for one
group, whose own values win; several of them serve the model together, under one name.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from deploy.adapters import find_adapters
from deploy.config_file import as_typed, option_name
from deploy.engines import ENGINES, GGUF, choose, importable
from deploy.interpreters import interpreter_of
from deploy.models import Model, ModelNotFound, resolve
from deploy.options import UserError
from deploy.workers import WorkerOptions
from shards.config import GRACEFUL_TERMINATION_TIMEOUT_S
from shards.engines import lacking, own_types

AUTO = "auto"
# The options that a group may have for itself.
GROUP_KEYS = (
    *("model", "file", "revision", "engine", "engine-option", "num-shard", "threads", "kv-tokens"),
    *("sequences-max", "step-tokens-max", "device", "dtype", "adapter", "lora-adapters"),
    "worker-python",
)


@dataclass(frozen=True, slots=True)
class LocalGroup:
    """One group on this machine: its name in reports, its model, and how its workers start."""

    name: str
    model: Model
    workers: WorkerOptions


class GroupType(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases alone
    """``ENGINE,KEY=VALUE,...`` or a table of a config file: a group's own values, checked."""

    name = "group"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """The values by parameter of the command. Fails with one line that names the key."""
        assert ctx is not None, "a group is an option of a command"
        params = {option_name(str(param.name)): param for param in ctx.command.params}
        values: dict[str, Any] = {}
        for key, given in self._pairs(value).items():
            if key == "name":
                values["name"] = str(given)
                continue
            if key not in GROUP_KEYS:
                self.fail(f"unknown key {key}; there is name, {', '.join(GROUP_KEYS)}", param, ctx)
            own = params[key]
            try:
                typed = as_typed(given, own.multiple)
                values[str(own.name)] = own.type_cast_value(ctx, typed)
            except (ValueError, click.BadParameter) as error:
                told = error.message if isinstance(error, click.BadParameter) else str(error)
                self.fail(f"{key}: {told}", param, ctx)
        return values

    def _pairs(self, value: object) -> dict[str, object]:
        """The keys and their values as they were written."""
        if isinstance(value, dict):
            return {option_name(key): one for key, one in value.items()}
        pairs: dict[str, object] = {}
        for place, item in enumerate(str(value).split(",")):
            key, equals, text = item.partition("=")
            if not equals and place:
                self.fail(f"{item!r} is not KEY=VALUE")
            key, text = (option_name(key), text) if equals else ("engine", key)
            before = pairs.get(key, [])
            pairs[key] = [*before, text] if isinstance(before, list) and key in _LISTS else text
        return pairs


_LISTS = ("engine-option", "adapter")


def local_groups(options: Mapping[str, Any]) -> list[LocalGroup]:
    """The groups that the options of ``serve`` ask for, all under the first one's model name.

    Downloads what is not here. Raises ``UserError``.
    """
    owns: tuple[dict[str, Any], ...] = options["group"] or ({},)
    groups = [one_group(dict(options) | own) for own in owns]
    engines = Counter[str]()
    named = []
    for own, group in zip(owns, groups, strict=True):
        engine = group.workers.engine
        engines[engine] += 1
        again = f"-{engines[engine]}" if engines[engine] > 1 else ""
        model = replace(group.model, model_id=groups[0].model.model_id)
        named.append(LocalGroup(own.get("name") or f"{engine}{again}", model, group.workers))
    check_names([group.name for group in named])
    for group in named:
        check_adapters(group)
    return named


def check_names(names: Sequence[str]) -> None:
    """Raises ``UserError`` if two groups have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two groups are called {twice[0]}; give each its own name=...")


def check_adapters(group: LocalGroup) -> None:
    """Raises ``UserError`` if an adapter has the name of its model: requests could mean either."""
    model_id = group.model.model_id
    if any(pair.partition("=")[0] == model_id for pair in group.workers.adapters):
        raise UserError(
            f"an adapter is called {model_id}, as the model is: give it another name, or the model "
            "by --served-model-name"
        )


def one_group(values: Mapping[str, Any], world: int = 0) -> LocalGroup:
    """One group, of ``world`` ranks or as many as the values say. Raises ``UserError``."""
    world = world or values["num_shard"]
    engine, why = chosen_engine(values, world)
    _check_before_download(engine, values)
    try:
        model = resolve(
            values["model"], engine=engine, file=values["file"], revision=values["revision"]
        )
        adapters = find_adapters(engine, values["adapter"], values["lora_adapters"])
    except ModelNotFound as error:
        raise UserError(str(error)) from error
    model = replace(
        model,
        model_id=values["served_model_name"] or model.model_id,
        chat_template=values["chat_template"] or model.chat_template,
        remark="; ".join(filter(None, (model.remark, why))),
    )
    workers = WorkerOptions(
        engine=engine,
        world=world,
        threads=values["threads"],
        kv_tokens=values["kv_tokens"],
        sequences_max=values["sequences_max"],
        step_tokens_max=values["step_tokens_max"],
        device=values["device"],
        dtype=values["dtype"],
        adapters=adapters,
        engine_options=tuple(values["engine_option"]),
        interpreter=values["worker_python"] or interpreter_of(engine),
        graceful_termination_timeout_s=values.get(  # a command whose workers just end has none
            "graceful_termination_timeout_s", GRACEFUL_TERMINATION_TIMEOUT_S
        ),
    )
    return LocalGroup(engine, model, workers)


def chosen_engine(values: Mapping[str, Any], world: int) -> tuple[str, str]:
    """The engine that is asked for; for ``auto`` the one chosen, and why in some words."""
    engine: str = values["engine"]
    if engine != AUTO:
        return engine, ""
    return choose(values["model"], file=values["file"], world=world)


def _check_before_download(engine: str, values: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for what the worker would say as well, once the model is here."""
    facts = ENGINES[engine]
    here = not values["worker_python"] and interpreter_of(engine) == sys.executable
    if here and not importable(engine):
        raise UserError(lacking(engine, facts.module))
    if values["dtype"] and facts.formats == (GGUF,):
        raise UserError(own_types(engine, values["dtype"]))
    if not values["model"] and facts.formats and GGUF not in facts.formats:
        raise UserError(
            f"engine {engine} does not read the embedded model, which is a GGUF file: name a MODEL,"
            " a folder with config.json and safetensors or a hub id"
        )
