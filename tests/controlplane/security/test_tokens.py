"""Join tokens."""

from __future__ import annotations

import base64
import json

import pytest

from controlplane.security import tokens
from controlplane.security.tokens import JoinToken


def make_token() -> JoinToken:
    return JoinToken(
        v=tokens.TOKEN_VERSION,
        server="10.0.0.1:7441",
        server_name="api.controlplane.lab.drover.internal",
        fleet="lab",
        host="c",
        secret=tokens.new_secret(),
        ca_pem="-----BEGIN CERTIFICATE-----\n...\n",
    )


def test_token_is_one_word_of_base64url_json() -> None:
    token = make_token()

    word = token.encode()

    assert set(word) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    assert content == {
        "v": 1,
        "server": "10.0.0.1:7441",
        "server_name": "api.controlplane.lab.drover.internal",
        "fleet": "lab",
        "host": "c",
        "secret": token.secret,
        "ca_pem": token.ca_pem,
    }
    assert JoinToken.decode(word) == token


@pytest.mark.parametrize("cut", [1, 2, 3, 10])
def test_cut_off_token_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        JoinToken.decode(make_token().encode()[:-cut])


def test_other_version_is_refused() -> None:
    raw = json.dumps({"v": 2, **{k: "" for k in JoinToken.__struct_fields__ if k != "v"}})
    word = base64.urlsafe_b64encode(raw.encode()).rstrip(b"=").decode()

    with pytest.raises(ValueError, match="version 2"):
        JoinToken.decode(word)


def test_secret_is_stored_as_digest_and_not_shown() -> None:
    token = make_token()

    assert token.secret not in repr(token)
    assert token.secret not in tokens.secret_digest(token.secret)
    assert tokens.secret_digest(tokens.new_secret()) != tokens.secret_digest(token.secret)
    assert len({tokens.new_secret() for _ in range(100)}) == 100
