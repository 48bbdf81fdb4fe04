"""What an owner's word for a target means: a board's profile, a chip, or this node."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from millhand.errors import ConfigError, suggestion
from millhand.profiles import Profile
from millhand.workshop.recipe import CPU, Target
from millhand.workshop.targets import target_name


def target_named(word: str, here: Mapping[str, Target], profiles: Sequence[Profile]) -> Target:
    """`cpu`, `sm80`, a profile's name, or a part of one that names one chip, such as `a100` or `orin`.

    here: this node's targets by accelerator; where one of them is meant it is returned, and candidates run. Any other
    has no accelerator. Raises ConfigError with what is known.
    """
    chip = re.fullmatch(r"sm(\d+)(\d)", word)
    if word == CPU or chip:
        capability, profile = (f"{chip[1]}.{chip[2]}" if chip else ""), None
    else:
        profile = _plainest(word, profiles)
        capability = profile.compute_capability
    name = target_name(capability)
    for target in here.values():
        if target.name == name:
            return target
    return Target(
        name=name,
        accelerator="",
        compute_capability=capability,
        profile=profile.name if profile else "",
        precisions=tuple(profile.precisions) if profile else (),
    )


def _plainest(word: str, profiles: Sequence[Profile]) -> Profile:
    """Of the profiles that a word means the one of the lowest priority. Raises ConfigError."""
    found = [profile for profile in profiles if profile.name == word]
    found = found or [profile for profile in profiles if word in profile.name.split("-")]
    names = [profile.name for profile in profiles]
    known = f"'{CPU}', a chip such as 'sm80', or one of {', '.join(names)}"
    if not found:
        raise ConfigError(f"target '{word}' is not known{suggestion(word, [CPU, *names])}", hint=f"give {known}")
    chips = {profile.compute_capability for profile in found}
    if len(chips) > 1:
        which = ", ".join(profile.name for profile in found)
        raise ConfigError(f"target '{word}' means several chips: {which}", hint="give one of these names")
    plainest = min(found, key=lambda profile: (profile.match.priority, profile.name))
    if chips == {""} and plainest.worker.isolation != "shared":
        raise ConfigError(f"profile '{plainest.name}' names no chip (key 'compute_capability')", hint=f"give {known}")
    return plainest
