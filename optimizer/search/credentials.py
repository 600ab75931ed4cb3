"""Addresses of databases without their passwords.

Whatever holds an address (settings, records, messages, Hydra's files) holds it masked; the whole one
is only in the environment of this process and of those that it starts, and is looked up where a
connection is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from optimizer.errors import ConfigError

VARIABLE = "MEZZOTINT_STORAGE"  # whole addresses, one a line
MASK = "***"
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
ADDRESS = re.compile(SCHEME + r"[^\s'\"\]}]*")
USER = re.compile(r"([^:@/?]*?)(?::|%3[aA])(.*)", re.DOTALL)
PLAIN = re.compile(r"[\w.%+-]*")  # a user's name that is no more than that
SETTINGS = re.compile(r"[?&;#]")
# settings whose values anybody may see; of a name that isn't here nobody knows
OPEN = frozenset(
    [
        "application_name",
        "cache",
        "charset",
        "check_same_thread",
        "connect_timeout",
        "dbname",
        "driver",
        "host",
        "hostaddr",
        "mode",
        "port",
        "service",
        "sslcert",
        "sslmode",
        "sslrootcert",
        "target_session_attrs",
        "timeout",
        "uri",
        "user",
    ]
)
INNER = re.compile(r"(?:pass|pwd)\w*\s*=", re.IGNORECASE)
SHORT = 4  # characters; a shorter password can't be told from other text in a message


def masked(address: str) -> str:
    """The address with `***` for its password, however that is written: user:PASSWORD@host,
    ?password=PASSWORD, percent-encoded. What can't be understood is masked as a whole."""
    match = re.match(SCHEME, address)
    if match is None:
        return address if re.fullmatch(r"[\w./\\~-]*", address) else MASK
    head, rest = match[0], address[match.end() :]
    user, at, place = rest.rpartition("@")
    if at:
        split = USER.fullmatch(user)
        if split is not None:
            user = f"{split[1]}:{MASK}"
        elif not PLAIN.fullmatch(user):  # such as oracle://USER/PASSWORD@host
            user = MASK
    elif _no_port(place):
        return f"{head}{place.split(':')[0]}:{MASK}"
    return head + user + at + _without_settings(place)


def _no_port(place: str) -> bool:
    """Whether what stands where a port may be is none: a password whose @host is missing."""
    host = re.split(r"[/?]", place, maxsplit=1)[0]
    port = host.rpartition(":")[2] if ":" in host and not host.startswith("[") else ""
    return bool(port) and not port.isdigit()


def _without_settings(place: str) -> str:
    """Nothing of the first setting that may be a secret, or behind it: an unescaped & may be a part of
    it."""
    marks = [found.start() for found in SETTINGS.finditer(place)]
    for start, end in pairwise([*marks, len(place)]):
        name, equals, value = place[start + 1 : end].partition("=")
        if name and (name.lower() not in OPEN or INNER.search(unquote(value))):
            shown = f"{name}=" if equals and PLAIN.fullmatch(name) else ""
            return f"{place[: start + 1]}{shown}{MASK}"
    return place


def hidden(address: str | None) -> str | None:
    """The masked address; the whole one is kept where `whole` finds it."""
    if address is None or masked(address) == address:
        return address
    known = _known()
    if address not in known:
        os.environ[VARIABLE] = "\n".join([*known, address.replace("\n", "")])
    return masked(address)


def whole(address: str) -> str:
    """The address to connect to. Raises ConfigError where its password isn't known here."""
    if MASK not in address:
        return address
    for known in reversed(_known()):
        if masked(known) == address:
            return known
    raise ConfigError(
        f"The password of {address} was left out of every record. Write the address with it again, or "
        f"set {VARIABLE} to the whole address; PostgreSQL also reads PGPASSWORD and ~/.pgpass."
    )


def _known() -> list[str]:
    return [line for line in os.environ.get(VARIABLE, "").split("\n") if line]


# ---------------------------------------------------------------- texts that hold addresses


def clean(text: str) -> str:
    """A text with every address in it masked, and every password that is known here."""
    for address in _known():
        text = text.replace(address, masked(address))
        text = text.replace(address.replace("'", "''"), masked(address))
    text = ADDRESS.sub(lambda found: masked(found[0]), text)
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return text


def _secrets() -> list[str]:
    """The passwords themselves, as written and decoded, the longest first."""
    found: set[str] = set()
    for address in _known():
        for secret in _taken_out(address):
            found |= {secret, unquote(secret)}
    return sorted((secret for secret in found if len(secret) >= SHORT), key=len, reverse=True)


def _taken_out(address: str) -> list[str]:
    """What `masked` replaces."""
    pieces = map(re.escape, masked(address).split(MASK))
    match = re.fullmatch("(.*)".join(pieces), address, re.DOTALL)
    return list(match.groups()) if match else []


def clean_file(file: Path, write: Callable[[Path, bytes], Path]) -> None:
    """Rewrite a file that somebody else's code wrote with a password in it."""
    text = file.read_text(encoding="utf-8")
    if clean(text) != text:
        write(file, clean(text).encode())


def clean_argument(argument: str) -> str:
    """A word of the command line with its addresses masked; the whole ones are kept. Raises
    ConfigError for a password beside an interpolation, which only Hydra can put together."""
    key, equals, value = argument.partition("=")
    if equals and key.lstrip("+~") == "search.storage":
        return key + equals + _clean_value(value)
    if "storage" not in argument:
        return argument
    return ADDRESS.sub(lambda found: _clean_value(found[0]), argument)


def _clean_value(value: str) -> str:
    quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    quote = value[0] if quoted else ""
    inner = value[1:-1].replace(f"\\{quote}", quote) if quoted else value
    several = [] if quoted else re.split(rf",(?={SCHEME})", inner)
    if len(several) > 1:  # of a sweep
        return ",".join(map(_clean_value, several))
    if "${" in inner:
        if any(_taken_out(re.sub(r"\$\{[^}]*\}", "", inner))):
            raise ConfigError(
                "The address in search.storage mixes a password and an interpolation. Put the whole "
                "address into an environment variable: 'search.storage=${oc.env:NAME}'."
            )
        return value
    return value if hidden(inner) == inner else f"{quote}{hidden(inner)}{quote}"
