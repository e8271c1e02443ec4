"""aws-vpc hosts against EC2's API (moto, with what it lacks injected: see support.aws): whatever happens, the table converges
to the leases, and what is foreign is not touched."""

import asyncio
import logging
import sys

import pytest

from support.aws import REGION
from support.cloudhosts import CloudCluster, CloudServer, foreign_lease
from wincey.cloud import aws as dialect
from wincey.model.address import Subnet, parse_address
from wincey.model.cloud import CloudRoute, CloudTable, HostRef
from wincey.model.lease import LeaseKey
from wincey.model.state import Route

pytestmark = pytest.mark.slow

really_open = dialect._open

CONFIG = '{"Network": "10.3.0.0/16", "Backend": {"Type": "aws-vpc"}}'
KEYS = ["10.3.1.0-24", "10.3.2.0-24", "10.3.3.0-24"]


@pytest.fixture
async def stage(aws, tmp_path):
    """A VPC with three instances and a cluster of them, nobody joined."""
    network = aws.network()
    cluster = CloudCluster(CONFIG, tmp_path)
    for instance, address in zip(network.instances, network.addresses, strict=True):
        cluster.host(address, instance=instance, region=REGION)
    aws.calls.clear()
    yield aws, network, cluster
    await cluster.close()


def table_of(cluster, network):
    """What the routes should be: each lease to its instance."""
    by_address = dict(zip(network.addresses, network.instances, strict=True))
    return {
        f"{host.key.v4}": by_address[host.address] for host in cluster.hosts if host.key and host.key in cluster.leases
    }


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def joined(cluster):
    for host, key in zip(list(cluster.hosts), KEYS, strict=True):
        await cluster.join(host, key)


async def test_hosts_join_and_leave_and_the_table_is_the_leases_after_each_step(stage):
    _, network, cluster = stage
    everybody = list(cluster.hosts)
    for host, key in zip(everybody, KEYS, strict=True):
        await cluster.join(host, key)
        assert network.hosts() == table_of(cluster, network)
    assert all(network.forwards(each) for each in network.instances)
    for host in everybody[:2]:
        await cluster.leave(host)
        await cluster.wait(180)
        assert network.routes().keys() == table_of(cluster, network).keys()
    assert await everybody[2].clean_up() == []
    assert network.routes() == {}
    assert not list(everybody[2].directory.iterdir())


async def test_a_quiet_cluster_makes_few_calls_and_a_restart_none_that_changes(stage):
    aws, _, cluster = stage
    await joined(cluster)
    await cluster.wait(120)
    aws.calls.clear()
    await cluster.wait(1800)
    # 3 hosts, a look each 5 minutes, a quarter more or less (and up to an audit late): 2 calls a look.
    assert 3 * 3 * 2 <= len(aws.calls) <= 3 * 9 * 2
    assert set(aws.calls) == {"DescribeInstances", "DescribeRouteTables"}
    aws.calls.clear()
    for host in cluster.hosts:
        await host.kill()
    assert await cluster.settle() == []
    assert not {"CreateRoute", "ReplaceRoute", "DeleteRoute", "ModifyNetworkInterfaceAttribute"} & set(aws.calls)


async def test_what_somebody_deletes_or_changes_is_put_back(stage):
    aws, network, cluster = stage
    await joined(cluster)
    aws.admin.delete_route(RouteTableId=network.main, DestinationCidrBlock="10.3.1.0/24")
    aws.admin.replace_route(
        RouteTableId=network.main,
        DestinationCidrBlock="10.3.2.0/24",
        NetworkInterfaceId=network.interface(network.instances[2])["NetworkInterfaceId"],
    )
    await cluster.wait(420)
    assert network.hosts() == table_of(cluster, network)


async def test_foreign_routes_are_not_touched(stage):
    aws, network, cluster = stage
    gateway = aws.admin.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    aws.admin.attach_internet_gateway(InternetGatewayId=gateway, VpcId=network.vpc)
    other = network.interface(network.add("10.99.0.77"))["NetworkInterfaceId"]
    hand_made = {"0.0.0.0/0": gateway, "172.20.0.0/16": other, "10.3.200.0/24": other, "10.3.240.0/20": gateway}
    for destination, hop in hand_made.items():
        target = {"GatewayId": hop} if hop == gateway else {"NetworkInterfaceId": hop}
        aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock=destination, **target)
    # One of a host of ours outside the cluster network, and one that overlaps a lease but is no lease's.
    mine = network.interface(network.instances[0])["NetworkInterfaceId"]
    for destination in ("192.168.7.0/24", "10.3.1.128/25"):
        aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock=destination, NetworkInterfaceId=mine)
        hand_made[destination] = mine
    everybody = list(cluster.hosts)
    await joined(cluster)
    await cluster.wait(600)
    for host in everybody[1:]:
        await cluster.leave(host)
    await cluster.wait(600)
    routes = network.routes()
    assert {to: hop for to, hop in routes.items() if to in hand_made} == hand_made
    assert routes.keys() - hand_made.keys() == {"10.3.1.0/24"}


async def test_stale_and_blackhole_routes_go_those_of_leases_are_replaced(stage):
    aws, network, cluster = stage
    gone = network.interface(network.add("10.99.0.78"))["NetworkInterfaceId"]
    for destination in ("10.3.90.0/24", "10.3.1.0/24", "10.9.0.0/16"):
        aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock=destination, NetworkInterfaceId=gone)
    # What this host had before it got another lease.
    mine = network.interface(network.instances[0])["NetworkInterfaceId"]
    aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock="10.3.91.0/24", NetworkInterfaceId=mine)
    aws.blackholes.add(gone)
    await joined(cluster)
    assert network.hosts().items() >= table_of(cluster, network).items()
    assert "DeleteRoute" not in aws.calls, "nothing is deleted before it has been stale for a while"
    assert aws.calls.count("ReplaceRoute") == 1
    await cluster.wait(180)
    assert network.routes().keys() == {*table_of(cluster, network), "10.9.0.0/16"}
    assert aws.calls.count("DeleteRoute") == 2


async def test_a_host_that_is_cut_off_from_the_store_deletes_nothing(stage):
    aws, network, cluster = stage
    first, second, third = cluster.hosts
    await joined(cluster)
    await cluster.leave(third)
    # Before the others' patience is at its end the store can't be reached, and the third host takes its subnet again.
    first.current = second.current = False
    again = cluster.host(network.addresses[2], instance=network.instances[2], region=REGION)
    await cluster.join(again, KEYS[2])
    aws.calls.clear()
    await cluster.wait(900)
    assert "DeleteRoute" not in aws.calls
    first.current = second.current = True
    await cluster.wait(900)
    assert network.hosts() == table_of(cluster, network)
    assert len(cluster.leases) == 3
    assert "DeleteRoute" not in aws.calls


@pytest.mark.parametrize(
    "action", ["DescribeInstances", "DescribeRouteTables", "CreateRoute", "ModifyNetworkInterfaceAttribute"]
)
async def test_throttled_it_calls_less_and_converges(stage, caplog, action):
    aws, network, cluster = stage
    aws.fail_always(action, 503, "RequestLimitExceeded", "Request limit exceeded.")
    host = cluster.hosts[0]
    await cluster.join(host, KEYS[0])
    before = aws.calls.count(action)
    for _ in range(30):  # ten minutes of a reconciler's retries
        cluster.clock.now += 20
        await host.settle()
    assert aws.calls.count(action) - before <= 9, "the pauses grow to minutes"
    assert len(lines(caplog)) == 1
    assert "is throttled (RequestLimitExceeded" in lines(caplog)[0]
    assert f"ec2:{action}" in lines(caplog)[0]
    aws.heal()
    await cluster.wait(360)
    assert network.hosts() == table_of(cluster, network)
    assert network.forwards(network.instances[0])


@pytest.mark.parametrize(
    ("action", "named"),
    [
        ("DescribeInstances", "allow ec2:DescribeInstances on *"),
        ("DescribeRouteTables", "allow ec2:DescribeRouteTables on *"),
        ("CreateRoute", "allow ec2:CreateRoute on route table rtb-"),
        ("ModifyNetworkInterfaceAttribute", "allow ec2:ModifyNetworkInterfaceAttribute on network interface eni-"),
    ],
)
async def test_denied_one_line_names_the_permission(stage, caplog, action, named):
    aws, network, cluster = stage
    aws.fail_always(action, 403, "UnauthorizedOperation", "You are not authorized to perform this operation.")
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(600, step=20)
    (line,) = lines(caplog)
    assert named in line
    assert "test-secret-never-shown" not in line
    if action == "ModifyNetworkInterfaceAttribute":  # a matter of its own
        assert network.hosts() == table_of(cluster, network)
    aws.heal()
    await cluster.wait(360)
    assert network.hosts() == table_of(cluster, network)
    assert network.forwards(network.instances[0])


async def test_denied_replace_and_delete(stage, caplog):
    aws, network, cluster = stage
    gone = network.interface(network.add("10.99.0.78"))["NetworkInterfaceId"]
    for destination in ("10.3.1.0/24", "10.3.90.0/24"):
        aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock=destination, NetworkInterfaceId=gone)
    aws.blackholes.add(gone)
    for action in ("ReplaceRoute", "DeleteRoute"):
        aws.fail_always(action, 403, "UnauthorizedOperation", "no")
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(600)
    assert any("allow ec2:ReplaceRoute on route table" in line for line in lines(caplog))
    aws.heal()
    await cluster.wait(600)
    assert network.routes().keys() == {"10.3.1.0/24"}
    assert network.hosts() == table_of(cluster, network)


async def test_without_credentials_one_line(stage, caplog, monkeypatch):
    aws, _, cluster = stage
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(300)
    (line,) = lines(caplog)
    assert "needs credentials" in line
    assert "instance profile" in line
    assert aws.calls == []


async def test_the_quota_is_told_before_it_is_hit_and_respected(stage, caplog):
    aws, network, cluster = stage
    aws.quota = 3  # the local route is one of them
    await joined(cluster)
    assert network.hosts().keys() == {"10.3.1.0/24", "10.3.2.0/24"}
    assert aws.calls.count("CreateRoute") == 2, "the call that would fail is not made"
    full = [line for line in lines(caplog) if "which is its quota (3)" in line]
    assert len(full) == 1
    assert "no route for 10.3.3.0/24 until the quota is raised" in full[0]
    await cluster.wait(600)
    assert len([line for line in lines(caplog) if "which is its quota (3)" in line]) == 1
    aws.quota = 50
    await cluster.wait(600)
    assert network.hosts() == table_of(cluster, network)


async def test_nearly_full_is_one_warning(stage, caplog):
    aws, network, cluster = stage
    gateway = aws.admin.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    aws.admin.attach_internet_gateway(InternetGatewayId=gateway, VpcId=network.vpc)
    for number in range(6):
        aws.admin.create_route(
            RouteTableId=network.main, DestinationCidrBlock=f"172.20.{number}.0/24", GatewayId=gateway
        )
    aws.quota = 10
    await joined(cluster)
    await cluster.wait(900)
    told = [line for line in lines(caplog) if "have it raised before more hosts join" in line]
    assert len(told) == 3, "one of each host"
    assert told[0].startswith(f"{network.main} holds 9 routes and its quota is 10")


async def test_a_quota_that_can_not_be_seen_is_hit_with_one_line(stage, caplog):
    aws, network, cluster = stage
    aws.quota, aws.quota_visible = 3, False
    await joined(cluster)
    await cluster.wait(600)
    assert network.hosts().keys() == {"10.3.1.0/24", "10.3.2.0/24"}
    assert len([line for line in lines(caplog) if "is full (RouteLimitExceeded" in line]) == 1
    aws.quota = 50
    await cluster.wait(600)
    assert network.hosts() == table_of(cluster, network)


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        ("DescribeInstances", "drop"),
        ("DescribeRouteTables", "drop"),
        ("CreateRoute", "drop"),
        ("CreateRoute", "drop-after"),
        ("ModifyNetworkInterfaceAttribute", "drop"),
        ("ModifyNetworkInterfaceAttribute", "drop-after"),
    ],
)
async def test_a_lost_call_or_answer_and_a_killed_daemon(stage, action, fault):
    aws, network, cluster = stage
    aws.fail(action, fault)
    host = cluster.hosts[0]
    await cluster.join(host, KEYS[0])
    await host.kill()  # between that call and what would have come next
    assert await host.settle() == []
    assert network.hosts() == table_of(cluster, network)
    assert network.forwards(network.instances[0])


async def test_a_subnet_that_moves_is_replaced_in_place(stage):
    aws, network, cluster = stage
    first, second, _ = cluster.hosts
    await cluster.join(first, KEYS[0])
    # The lease ended while the daemon was down, and another host got the subnet.
    cluster.hosts.remove(first)
    await first.driver.close()
    del cluster.leases[first.key]
    await cluster.join(second, KEYS[0])
    assert network.hosts() == {"10.3.1.0/24": network.instances[1]}
    assert "DeleteRoute" not in aws.calls
    first.start()
    cluster.hosts.append(first)
    await cluster.join(first, KEYS[1])
    await cluster.wait(600)
    assert network.hosts() == table_of(cluster, network)
    assert "DeleteRoute" not in aws.calls


async def test_a_leased_destination_that_leads_to_a_gateway_is_refused_with_one_line(stage, caplog):
    aws, network, cluster = stage
    gateway = aws.admin.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    aws.admin.attach_internet_gateway(InternetGatewayId=gateway, VpcId=network.vpc)
    aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock="10.3.1.0/24", GatewayId=gateway)
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(600)
    assert network.routes() == {"10.3.1.0/24": gateway}
    (line,) = lines(caplog)
    assert f"{network.main} has a route 10.3.1.0/24 to what is no host" in line
    aws.admin.delete_route(RouteTableId=network.main, DestinationCidrBlock="10.3.1.0/24")
    await cluster.wait(600)
    assert network.hosts() == table_of(cluster, network)


async def test_tables_that_the_config_names(aws, tmp_path):
    network = aws.network(2)
    tables = [network.new_table(), network.new_table()]
    cluster = CloudCluster(CONFIG.replace('-vpc"', f'-vpc", "RouteTableID": ["{tables[0]}", "{tables[1]}"]'), tmp_path)
    for instance, address, key in zip(network.instances, network.addresses, KEYS, strict=False):
        await cluster.join(cluster.host(address, instance=instance, region=REGION), key)
    for table in tables:
        assert network.hosts(table) == table_of(cluster, network)
    assert network.routes() == {}
    await cluster.close()


async def test_the_table_of_the_subnet_comes_before_the_main_one(aws, tmp_path):
    network = aws.network(1)
    table = network.new_table()
    aws.admin.associate_route_table(RouteTableId=table, SubnetId=network.subnet)
    cluster = CloudCluster(CONFIG, tmp_path)
    await cluster.join(cluster.host("10.99.0.1", instance=network.instances[0], region=REGION), KEYS[0])
    assert network.hosts(table) == table_of(cluster, network)
    assert network.routes() == {}
    await cluster.close()


async def test_a_table_that_is_not_there_is_one_line(aws, tmp_path, caplog):
    network = aws.network(1)
    cluster = CloudCluster(CONFIG.replace('-vpc"', '-vpc", "RouteTableID": "rtb-0123456789abcdef0"'), tmp_path)
    await cluster.join(cluster.host("10.99.0.1", instance=network.instances[0], region=REGION), KEYS[0])
    await cluster.wait(300)
    (line,) = lines(caplog)
    assert "there is no route table rtb-0123456789abcdef0 in this region" in line
    assert "correct RouteTableID in the network config" in line
    await cluster.close()


async def test_an_address_that_is_not_the_instances_is_refused(aws, tmp_path, caplog):
    network = aws.network(2)
    cluster = CloudCluster(CONFIG, tmp_path)
    await cluster.join(cluster.host("10.99.0.2", instance=network.instances[0], region=REGION), KEYS[0])
    assert network.routes() == {}
    (line,) = lines(caplog)
    assert f"no instance {network.instances[0]} (10.99.0.2)" in line
    await cluster.close()


async def test_another_backend_takes_over_after_a_while_and_the_route_goes(stage):
    _, network, cluster = stage
    host = cluster.hosts[0]
    await cluster.join(host, KEYS[0])
    desired = host.reconciler.desired
    desired.put("", ())
    desired.put("other", [Route(Subnet.parse("10.3.9.0/24"), "eth0")])
    await host.reconciler.settle()
    assert network.hosts(), "peers have to learn of the other way first"
    cluster.clock.now += 61
    assert await host.reconciler.settle() == []
    assert network.routes() == {}


async def test_leases_of_flannel_are_not_stale(stage):
    """flannel's hosts put their routes themselves; their leases say neither type nor instance."""
    aws, network, cluster = stage
    theirs = network.interface(network.instances[1])["NetworkInterfaceId"]
    aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock="10.3.50.0/24", NetworkInterfaceId=theirs)
    lease = foreign_lease("10.3.50.0-24", network.addresses[1])
    cluster.leases[lease.key] = lease
    aws.blackholes.add(theirs)
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(600)
    assert network.routes().keys() == {"10.3.1.0/24", "10.3.50.0/24"}
    del cluster.leases[lease.key]
    await cluster.wait(600)
    assert network.routes().keys() == {"10.3.1.0/24"}


async def test_a_route_that_was_put_between_anothers_look_and_deletion_is_put_back(stage):
    """EC2 deletes by destination, whatever is there by then: the one moment that patience can't close."""
    aws, network, cluster = stage
    first, second, _ = cluster.hosts
    gone = network.interface(network.add("10.99.0.78"))["NetworkInterfaceId"]
    aws.admin.create_route(RouteTableId=network.main, DestinationCidrBlock="10.3.2.0/24", NetworkInterfaceId=gone)
    aws.blackholes.add(gone)
    await cluster.join(first, KEYS[0])
    loop, seen = asyncio.get_running_loop(), []

    def join_meanwhile():
        second.key = LeaseKey.parse(KEYS[1])
        cluster.leases[second.key] = second.lease
        asyncio.run_coroutine_threadsafe(second.settle(), loop).result(30)
        seen.append(network.hosts())

    aws.fail("DeleteRoute", join_meanwhile)
    while not seen:
        cluster.clock.now += 60
        await first.settle()
    assert seen == [table_of(cluster, network)]
    assert network.hosts().keys() == {"10.3.1.0/24"}, "deleted"
    await cluster.wait(120)
    assert network.hosts() == table_of(cluster, network)
    await cluster.wait(600)
    assert aws.calls.count("DeleteRoute") == 1


async def test_without_boto3_one_line(stage, caplog, monkeypatch):
    _, _, cluster = stage
    monkeypatch.setattr(dialect, "_open", really_open)
    monkeypatch.setitem(sys.modules, "boto3", None)
    await cluster.join(cluster.hosts[0], KEYS[0])
    await cluster.wait(300)
    (line,) = lines(caplog)
    assert line.startswith("the backend aws-vpc needs boto3, which is not installed: pip install 'wincey[aws]'")


async def test_a_denial_is_told_without_its_encoded_part(stage, caplog):
    aws, _, cluster = stage
    said = "You are not authorized to perform this operation. Encoded authorization failure message: " + "x" * 900
    aws.fail_always("CreateRoute", 403, "UnauthorizedOperation", said)
    await cluster.join(cluster.hosts[0], KEYS[0])
    (line,) = lines(caplog)
    assert "(UnauthorizedOperation: You are not authorized to perform this operation.): allow ec2:CreateRoute" in line
    assert "xxx" not in line


async def test_a_server_keeps_the_table_for_clients_without_credentials(aws, tmp_path):
    """Of our clients, which name their instance, and of flannel's 0.5, found by its address."""
    network = aws.network()
    # Which tells the VPC: an address alone may be that of instances in several.
    cluster = CloudCluster(CONFIG.replace('-vpc"', f'-vpc", "RouteTableID": "{network.main}"'), tmp_path)
    server = CloudServer(cluster, {"region": REGION})
    cluster.hosts.append(server)
    clients = [
        cluster.host(address, instance=instance, region=REGION, served="yes")
        for instance, address in zip(network.instances, network.addresses, strict=True)
    ]
    for client, key in zip(clients[:2], KEYS, strict=False):
        await cluster.join(client, key)
    flannel = foreign_lease(KEYS[2], network.addresses[2])
    cluster.leases[flannel.key] = flannel
    await cluster.settle()
    assert network.hosts() == dict(zip(("10.3.1.0/24", "10.3.2.0/24", "10.3.3.0/24"), network.instances, strict=True))
    assert all(network.forwards(each) for each in network.instances)
    calls = len(aws.calls)
    cluster.hosts.remove(server)
    cluster.clock.now += 600
    assert await cluster.settle() == []
    assert await clients[0].clean_up() == []
    assert len(aws.calls) == calls, "clients never call"
    assert len(network.routes()) == 3
    # Another server takes over, and sees the leases end.
    await server.kill()
    cluster.hosts.append(server)
    await cluster.settle()
    cluster.leases.clear()
    await cluster.wait(180)
    assert network.routes() == {}
    await cluster.close()


async def test_a_host_that_gets_a_keeping_server_leaves_its_route_to_it(aws, tmp_path):
    network = aws.network(1)
    cluster = CloudCluster(CONFIG, tmp_path)
    host = cluster.host("10.99.0.1", instance=network.instances[0], region=REGION)
    await cluster.join(host, KEYS[0])
    await host.kill()
    host.found = {**host.found, "served": "yes"}
    await cluster.wait(300)
    assert await host.clean_up() == []
    assert network.hosts() == table_of(cluster, network)
    await cluster.close()


def test_objects_tell_what_they_are():
    ref = HostRef("i-1", parse_address("10.99.0.1"))
    assert str(CloudRoute(Subnet.parse("10.3.1.0/24"), ref)) == "cloud route 10.3.1.0/24 to i-1 (10.99.0.1)"
    table = CloudTable("ali-vpc", Subnet.parse("10.3.0.0/16"), secrets=(("AccessKeySecret", "hush"),))
    assert "hush" not in f"{table} {table!r} {[table]}"
