"""The secrets of URLs: passwords and queries. They are shown and written as `***`, and never name anything.

A query may be a signature that anybody can use (`?X-Amz-Signature=…`), so it is hidden whole. What a URL names is
another question: `identity` leaves out only what changes when a URL is signed again; other parameters choose the file.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
# Each pattern takes linear time, whatever the text.
# The second form: a password with a slash in it, as AWS makes them. A port, an IPv6 address and an ARN are none.
_USERINFO = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,20})://"
    r"(?P<userinfo>[^\s/?#]*(?=@)|[^\s/?#@:\[]+:(?!\d{1,5}(?:[/?#\s]|$))[^\s@:]*(?=@))@"
)
_QUERY = re.compile(r"(://(?:(?!://)[^\s?])*)\?\S*[^\s'\"<>:;,.)\]}`]")  # what follows a URL in a sentence stays
# `github://OWNER:REPOSITORY@BRANCH/PATH` holds no password.
_WITHOUT_PASSWORD = ("github", "git")
# Parameters that sign a URL or let somebody in.
_CREDENTIALS = (
    r"x-(?:amz|goog|oss|obs|cos|ms)-[\w-]+|q-(?:sign|ak|key|header|url)[\w-]*|(?:aws|oss|obs)?accesskeyid|"
    r"googleaccessid|key-pair-id|policy|expires|exp|sig|hdn[a-z]+|jwt|hmac|sas|auth|authorization|"
    r"(?:[\w-]*[_-])?(?:signature|token|secret|password|passwd|pwd|credentials?)|api[_-]?key|(?:secret|access)[_-]?key"
)
_CREDENTIAL = re.compile(_CREDENTIALS, re.IGNORECASE)
_PARAMETER = re.compile(rf"([?&;](?:{_CREDENTIALS})=)[^\s&'\"<>)]+", re.IGNORECASE)
# Azure signs these; they have such short names that they only count beside `sig`.
_AZURE = "sv|st|se|sr|sp|spr|sip|srt|ss|sdd|si|scid|skoid|sktid|skt|ske|sks|skv|saoid|suoid|ses"
_AZURE_CREDENTIAL = re.compile(rf"{_CREDENTIALS}|{_AZURE}", re.IGNORECASE)
_SHORTEST = 6  # a shorter piece of a URL is replaced nowhere: it may be part of any word


def redact(text: str, *urls: str) -> str:
    """Return a text with `***` in place of the passwords and queries of all URLs in it.

    Args:
        text: a URL, or a sentence that may contain some.
        urls: URLs whose secrets may also stand alone in the text, as in a message of a library that opened them.
    """
    for url in urls:
        for piece in sorted(_pieces(url), key=len, reverse=True):
            text = text.replace(piece, HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1?{HIDDEN}", _USERINFO.sub(_without_userinfo, text))
    return _PARAMETER.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def redacted(value: Any) -> Any:
    """Return JSON values, or the value of a setting, with every text in them redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    return type(value)(map(redacted, value)) if type(value) in (list, tuple) else value


def is_redacted(url: str) -> bool:
    """Whether a URL has been stored without its secrets, so that it can be shown and not opened."""
    return f"//{HIDDEN}@" in url or url.endswith(f"?{HIDDEN}")


def address(url: str) -> str:
    """Return a URL without password and query: what is shown of it as the name of a shard."""
    return _USERINFO.sub(lambda found: found["scheme"] + "://" if _is_secret(found) else found[0], url).partition("?")[
        0
    ]


def identity(url: str) -> str:
    """Return what a URL names, the same however often it is signed: no password, no parameter that lets somebody in."""
    if "://" not in url:
        return url

    def named(found: re.Match[str]) -> str:
        if not _is_secret(found):
            return found[0]
        user, colon, _ = found["userinfo"].partition(":")
        return f"{found['scheme']}://" + (f"{user}@" if colon else "")

    place, mark, query = _USERINFO.sub(named, url, count=1).partition("?")
    parameters = query.split("&")
    names = [unquote(parameter.partition("=")[0]).lower() for parameter in parameters]
    signs = _AZURE_CREDENTIAL if "sig" in names else _CREDENTIAL
    kept = [parameter for parameter, name in zip(parameters, names, strict=True) if not signs.fullmatch(name)]
    return place + (mark + "&".join(kept) if kept else "")


def _is_secret(found: re.Match[str]) -> bool:
    """Whether what stands before the host is a secret: a password, or a token as the user of a web server."""
    scheme, userinfo = found["scheme"].lower(), found["userinfo"]
    return scheme not in _WITHOUT_PASSWORD and (":" in userinfo or scheme in ("http", "https"))


def _without_userinfo(found: re.Match[str]) -> str:
    return f"{found['scheme']}://{HIDDEN}@" if _is_secret(found) else found[0]


def _pieces(url: str) -> Iterator[str]:
    """Yield the secrets of a URL, as they stand in it and decoded."""
    found = _USERINFO.search(url)
    query = url.partition("?")[2]
    raw = [query, *(part.partition("=")[2] for part in query.split("&"))]
    if found and _is_secret(found):
        raw += [found["userinfo"], found["userinfo"].partition(":")[2]]
    for piece in raw:
        yield from (form for form in {piece, unquote(piece)} if len(form) >= _SHORTEST)
