from __future__ import annotations

import uuid

import pytest

from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from controlplane.security import tokens as security_tokens
from controlplane.security.tokens import JoinToken
from controlplane.store import hosts, requests, tables
from controlplane.v1 import host_pb2, instance_pb2, instance_service_pb2
from controlplane.v1 import host_service_pb2 as pb
from tests.controlplane.api.conftest import Api, refusal
from tests.controlplane.machines import make_domain
from tests.support.csr import make_csr


async def announce(api: Api, host: str = "c") -> JoinToken:
    answer = await api.hosts.AddHost(pb.AddHostRequest(host_id=host))
    assert answer.host.state == host_pb2.Host.STATE_JOINING
    return JoinToken.decode(answer.join_token)


def join_request(token: JoinToken, **changes: object) -> pb.JoinHostRequest:
    values: dict[str, object] = {
        "secret": token.secret,
        "host_id": token.host,
        "csr_pem": make_csr(),
        "address": "10.0.0.3:7442",
    }
    return pb.JoinHostRequest(**(values | changes))  # type: ignore[arg-type]


async def test_a_host_joins_with_its_token_and_gets_its_own_identity(api: Api) -> None:
    token = await announce(api)
    answer = await api.enrollment.JoinHost(join_request(token))
    assert api.enroller.issued_to(answer.certificate_pem) == [host_identity("lab", "c").uri]
    assert (answer.fleet, answer.ca_pem) == ("lab", api.enroller.ca_pem)
    host = await api.hosts.GetHost(pb.GetHostRequest(name="hosts/c"))
    assert host.state == host_pb2.Host.STATE_ENABLED
    assert host.address == "10.0.0.3:7442"
    assert not host.alive
    assert not host.HasField("facts")


async def test_a_token_works_once(api: Api) -> None:
    token = await announce(api)
    await api.enrollment.JoinHost(join_request(token))
    error = await refusal(api.enrollment.JoinHost(join_request(token)))
    assert error.reason is Reason.JOIN_TOKEN_INVALID


async def test_an_expired_token_is_refused(api: Api) -> None:
    token = await announce(api)
    api.clock.advance(hours=2)
    error = await refusal(api.enrollment.JoinHost(join_request(token)))
    assert error.reason is Reason.JOIN_TOKEN_INVALID


async def test_another_hosts_token_is_refused_and_stays_good_for_its_own(api: Api) -> None:
    token = await announce(api, "c")
    await announce(api, "d")
    error = await refusal(api.enrollment.JoinHost(join_request(token, host_id="d")))
    assert error.reason is Reason.JOIN_TOKEN_INVALID
    await api.enrollment.JoinHost(join_request(token))


async def test_a_wrong_secret_is_refused_without_telling_which_hosts_exist(api: Api) -> None:
    token = await announce(api)
    wrong = await refusal(api.enrollment.JoinHost(join_request(token, secret="x")))
    unknown = await refusal(
        api.enrollment.JoinHost(join_request(token, secret="x", host_id="nobody"))
    )
    assert wrong.reason is unknown.reason is Reason.JOIN_TOKEN_INVALID
    assert wrong.message.replace("hosts/c", "") == unknown.message.replace("hosts/nobody", "")


async def test_a_bad_request_does_not_use_the_token_up(api: Api) -> None:
    token = await announce(api)
    for changes in ({"csr_pem": b"nonsense"}, {"address": "nowhere"}, {"address": "::1:7442"}):
        error = await refusal(api.enrollment.JoinHost(join_request(token, **changes)))
        assert error.reason is Reason.INVALID_FIELD
    await api.enrollment.JoinHost(join_request(token))


async def test_announcing_again_replaces_the_token(api: Api) -> None:
    first = await announce(api)
    second = await announce(api)
    error = await refusal(api.enrollment.JoinHost(join_request(first)))
    assert error.reason is Reason.JOIN_TOKEN_INVALID
    await api.enrollment.JoinHost(join_request(second))
    again = await refusal(api.hosts.AddHost(pb.AddHostRequest(host_id="c")))
    assert again.reason is Reason.ALREADY_EXISTS


async def test_the_token_is_nowhere_in_the_database(api: Api) -> None:
    request = pb.AddHostRequest(host_id="c", request_id=str(uuid.uuid4()))
    first = await api.hosts.AddHost(request)
    repeated = await api.hosts.AddHost(request)
    assert repeated.host == first.host
    secret = JoinToken.decode(repeated.join_token).secret
    answer = await api.run(
        lambda tx: requests.find(
            tx, "drover://lab/admin/ada", "AddHost", request.request_id, api.clock()
        )
    )
    assert answer is not None
    assert first.join_token.encode() not in answer.response
    rows = await api.run(lambda tx: tx.execute(tables.join_tokens.select()).all())
    assert [row.secret_sha256 for row in rows] == [security_tokens.secret_digest(secret)]
    await api.enrollment.JoinHost(join_request(JoinToken.decode(repeated.join_token)))
    late = await api.hosts.AddHost(request)
    assert late.join_token == ""


@pytest.mark.parametrize("name", ["", "a", "hosts/", "hosts/UPPER", "instances/a"])
async def test_malformed_host_names_are_refused(api: Api, name: str) -> None:
    error = await refusal(api.hosts.GetHost(pb.GetHostRequest(name=name)))
    assert error.reason is Reason.INVALID_NAME


async def test_unknown_hosts_are_not_found(api: Api) -> None:
    error = await refusal(api.hosts.GetHost(pb.GetHostRequest(name="hosts/zz")))
    assert (error.reason, error.subject) == (Reason.HOST_NOT_FOUND, "hosts/zz")
    error = await refusal(api.hosts.AddHost(pb.AddHostRequest(host_id="UPPER")))
    assert error.reason is Reason.INVALID_NAME


async def test_a_host_is_disabled_and_enabled_and_an_old_etag_is_refused(api: Api) -> None:
    await api.add_host("a")
    before = await api.hosts.GetHost(pb.GetHostRequest(name="hosts/a"))
    await api.report()
    disabled = await api.hosts.DisableHost(
        pb.DisableHostRequest(name="hosts/a", reason="new disks", etag=before.etag)
    )
    assert disabled.state == host_pb2.Host.STATE_DISABLED
    assert (disabled.alive, disabled.state_reason) == (True, "new disks")
    for etag in (before.etag, "nonsense", "g99999999999999999999"):
        stale = await refusal(api.hosts.EnableHost(pb.EnableHostRequest(name="hosts/a", etag=etag)))
        assert stale.reason is Reason.ETAG_MISMATCH
    enabled = await api.hosts.EnableHost(pb.EnableHostRequest(name="hosts/a", etag=disabled.etag))
    assert enabled.state == host_pb2.Host.STATE_ENABLED
    long = await refusal(
        api.hosts.DisableHost(pb.DisableHostRequest(name="hosts/a", reason="x" * 501))
    )
    assert long.reason is Reason.INVALID_FIELD


async def test_a_host_that_has_not_joined_cannot_be_enabled(api: Api) -> None:
    await announce(api)
    error = await refusal(api.hosts.EnableHost(pb.EnableHostRequest(name="hosts/c")))
    assert error.reason is Reason.HOST_NOT_JOINED


async def test_a_host_declared_gone_stays_gone_until_it_joins_anew(api: Api) -> None:
    a = await api.add_host("a")
    domain = make_domain()
    a.put(domain)
    await api.report()
    empty = await refusal(api.hosts.DeclareHostGone(pb.DeclareHostGoneRequest(name="hosts/a")))
    assert empty.reason is Reason.INVALID_FIELD
    # Its machines would come to run twice.
    answers = await refusal(
        api.hosts.DeclareHostGone(pb.DeclareHostGoneRequest(name="hosts/a", reason="burnt down"))
    )
    assert answers.reason is Reason.HOST_ALIVE
    api.clock.advance(seconds=60)
    gone = await api.hosts.DeclareHostGone(
        pb.DeclareHostGoneRequest(name="hosts/a", reason="burnt down")
    )
    assert gone.state == host_pb2.Host.STATE_GONE
    assert not await api.poller.poll("a")
    for call in (
        api.hosts.EnableHost(pb.EnableHostRequest(name="hosts/a")),
        api.hosts.DisableHost(pb.DisableHostRequest(name="hosts/a")),
    ):
        assert (await refusal(call)).reason is Reason.HOST_GONE
    lost = await api.instances.GetInstance(
        instance_service_pb2.GetInstanceRequest(name="instances/web1")
    )
    assert lost.vm_state == instance_pb2.Instance.VM_STATE_MISSING
    token = await announce(api, "a")
    await api.enrollment.JoinHost(join_request(token))
    back = await api.hosts.GetHost(pb.GetHostRequest(name="hosts/a"))
    assert back.state == host_pb2.Host.STATE_ENABLED


async def test_hosts_come_in_pages_bound_to_their_list(api: Api) -> None:
    for name in ("d", "b", "a", "c", "e"):
        await api.run(lambda tx, name=name: hosts.create(tx, name, adopt_domains=True))  # type: ignore[misc]
    names: list[str] = []
    token = ""
    while True:
        page = await api.hosts.ListHosts(pb.ListHostsRequest(page_size=2, page_token=token))
        names += [host.name for host in page.hosts]
        token = page.next_page_token
        if not token:
            break
    assert names == ["hosts/a", "hosts/b", "hosts/c", "hosts/d", "hosts/e"]
    first = await api.hosts.ListHosts(pb.ListHostsRequest(page_size=2))
    foreign = await refusal(
        api.instances.ListInstances(
            instance_service_pb2.ListInstancesRequest(page_token=first.next_page_token)
        )
    )
    assert foreign.reason is Reason.INVALID_PAGE_TOKEN
    for damaged in (first.next_page_token[:-3], "%%%", "e30", "A" * 5000):
        error = await refusal(api.hosts.ListHosts(pb.ListHostsRequest(page_token=damaged)))
        assert error.reason is Reason.INVALID_PAGE_TOKEN
    negative = await refusal(api.hosts.ListHosts(pb.ListHostsRequest(page_size=-1)))
    assert negative.reason is Reason.INVALID_FIELD


async def test_usage_sums_what_is_promised(api: Api) -> None:
    a = await api.add_host("a")
    a.put(make_domain("web1"))
    a.put(make_domain("web2", vcpus=3))
    await api.report()
    host = await api.hosts.GetHost(pb.GetHostRequest(name="hosts/a"))
    assert (host.usage.vcpus, host.usage.memory_mib, host.usage.instances) == (5, 2048, 2)
    assert host.facts.cpus == 8
    assert host.alive
    api.clock.advance(seconds=30)
    assert not (await api.hosts.GetHost(pb.GetHostRequest(name="hosts/a"))).alive
