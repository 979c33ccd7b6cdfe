"""Groups that are asked for while ``roundhouse serve`` runs: from a text to engine and files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from deploy.groups import GroupType, LocalGroup, check_adapters, one_group
from deploy.options import UserError


class FurtherGroups:
    """Makes groups by the options of the command that runs, which hold for them, too.

    ``context`` is that of the command, ``model_id`` what all its groups serve.
    """

    def __init__(self, context: click.Context, model_id: str) -> None:
        self._context = context
        self._model_id = model_id

    def parse(self, text: str) -> dict[str, Any]:
        """A group's own values, from what ``--group`` takes. Raises ``UserError``."""
        params = self._context.command.params
        option = next(param for param in params if isinstance(param.type, GroupType))
        try:
            values: dict[str, Any] = option.type.convert(text, option, self._context)
        except click.BadParameter as error:
            raise UserError(error.message) from error
        return values

    def find(self, own: Mapping[str, Any]) -> LocalGroup:
        """The group of such values, named after its engine if they do not say; to be made unique.

        Takes its time, and downloads what is not here. Raises ``UserError``.
        """
        group = one_group(self._context.params | dict(own))
        model = replace(group.model, model_id=self._model_id)
        group = LocalGroup(own.get("name") or group.name, model, group.workers)
        check_adapters(group)
        return group
