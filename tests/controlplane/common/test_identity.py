from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.common.identity import Identity, Role

names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", fullmatch=True)


@given(names, st.sampled_from(Role), names, names)
def test_an_identity_is_read_as_it_was_written(
    fleet: str, role: Role, name: str, project: str
) -> None:
    identity = Identity(fleet, role, name, project if role is Role.MEMBER else "")
    assert Identity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "drover://lab/admin",
        "drover://lab/admin/",
        "drover://lab/admin/ada\n",
        "drover://lab/admin/ada/",
        "drover://lab/admin/ada/shop",
        "drover://lab/member/mo",
        "drover://lab/root/ada",
        "drover://lab/Admin/ada",
        "drover://lab/admin/-ada",
        "drover://lab/admin/" + "a" * 64,
        "drover://lab/admin/ada?x",
        "drover:///admin/ada",
        "spiffe://lab/admin/ada",
        " drover://lab/admin/ada",
    ],
)
def test_anything_else_is_nobody(uri: str) -> None:
    with pytest.raises(ValueError, match=r"form|role|project"):
        Identity.parse(uri)


@given(st.text(max_size=200))
def test_any_text_is_an_identity_or_refused(uri: str) -> None:
    try:
        assert Identity.parse(uri).uri == uri
    except ValueError:
        return
