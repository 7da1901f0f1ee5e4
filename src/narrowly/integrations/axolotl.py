"""Defenses in axolotl (0.19), as a plug-in.

plugins: [narrowly.integrations.axolotl.NarrowlyPlugin]
narrowly:
  defenses:              # as in a recipe; or the path of a YAML file that holds `defenses:`
    - ablate: {concepts: concepts/}

axolotl prints an import error of a plug-in and trains on without it, so see afterwards that
`narrowly defenses OUTPUT_DIR` finds the record of what was active. Nothing heavy is imported before
axolotl asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from narrowly.errors import NarrowlyError

if TYPE_CHECKING:
    from narrowly.defenses import Defense
    from narrowly.training import DefenseCallback


class NarrowlyArgs(BaseModel):
    """The key that this plug-in adds to axolotl's configuration."""

    narrowly: dict[str, Any] | None = None


class NarrowlyPlugin(BasePlugin):
    """Defends the Trainer that axolotl builds; does nothing to its inference, chat and merging."""

    def __init__(self) -> None:
        super().__init__()
        self.guard: DefenseCallback | None = None

    def get_input_args(self) -> str:
        """Where axolotl finds `NarrowlyArgs`."""
        return f"{__name__}.{NarrowlyArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Check the configuration before anything is loaded.

        Raises:
            NarrowlyError: no defenses, a mistake in one, or one that changes the data.
        """
        _defenses(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Defend the Trainer. axolotl calls this for training alone."""
        from narrowly.training import defend

        self.guard = defend(trainer, _defenses(cfg))

    def post_train(self, cfg: Any, model: Any) -> None:
        """Fail if training ended without the defenses (axolotl calls this twice).

        Raises:
            NarrowlyError: the Trainer never told the callback that training ended.
        """
        if self.guard is None or not self.guard.finished:
            raise NarrowlyError(
                "axolotl trained, but not with the defenses of `narrowly`: another plug-in may "
                "have replaced the Trainer. What it saved is undefended."
            )


def _defenses(cfg: Any) -> list[Defense]:
    from narrowly.training import make_defenses

    given = cfg.get("narrowly")
    if not given or set(given) != {"defenses"}:
        raise NarrowlyError(
            "axolotl's configuration lists the plug-in of narrowly: say what to do under its key, "
            f"`narrowly: {{defenses: [...]}}`, and nothing else there (found: {given or 'none'})."
        )
    defenses = make_defenses(_plain(given["defenses"]))
    for defense in defenses:
        if defense.opens("prepare_data"):
            raise NarrowlyError(
                f"{type(defense).__name__} changes the chats, which axolotl reads by itself. Write "
                "them once, `narrowly.prepare_data(chats, defenses).to_json('defended.jsonl')`, "
                "name that file under `datasets`, and take the defense out of `narrowly`."
            )
    return defenses


def _plain(value: Any) -> Any:
    """axolotl's dictionaries, which answer None to every key, as ordinary ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
