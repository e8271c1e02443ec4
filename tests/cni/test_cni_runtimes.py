"""Real runtimes on two hosts: what podman, `ctr --cni` and CRI start on one reaches what they start on the other."""

import secrets

import pytest

from support.cni import require, require_plugins
from support.dockerd import remove_cgroups
from support.runtimes import IMAGE, Machine, Pod, addresses, decode, make_image, veths
from wincey.cli.install_cni import DEFAULT_CONFLIST, DEFAULT_NAME, install, plugin_script
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config
from wincey.lab.process import wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def fabric():
    """Two hosts with a running daemon, and no containers yet."""
    require_plugins()
    require("podman", "containerd", "ctr", "runc", "curl", "busybox")
    with Lab(LabSpec(name=f"cni-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=2, containers=0)) as lab:
        yield lab


@pytest.fixture
def machines(fabric, tmp_path):
    made = []
    try:
        for host in fabric.hosts:
            made.append(Machine(host, tmp_path / host.name, "cbr0"))
            install(made[-1].path("opt/cni/bin/flannel"), plugin_script(), mode=0o755)
        yield made
    finally:
        for machine in made:
            machine.close()
            remove_cgroups(machine.host.netns)


def put_conflist(machine):
    # In the machine's own view: a change below an overlay is not seen above it.
    machine.run("sh", "-c", f"cat > /etc/cni/net.d/.draft && mv /etc/cni/net.d/.draft /etc/cni/net.d/{DEFAULT_NAME}",
                input=DEFAULT_CONFLIST)  # fmt: skip


def nothing_is_left(machines):
    for machine in machines:
        assert addresses(machine) == []
        assert veths(machine) == []
        assert [each.name for each in machine.path("var/lib/cni/flannel").iterdir()] == [".attachments"]


def test_podman(machines, tmp_path):
    first, second = machines
    for machine in machines:
        put_conflist(machine)
    make_image(tmp_path, first)
    second.podman("import", "-c", 'CMD ["/bin/sleep","1000000"]', str(tmp_path / "root.tar"), IMAGE)
    first.podman("run", "-d", "--name", "a", "--cgroup-parent", f"/{first.host.netns}", IMAGE)
    [address] = addresses(first)
    pinged = second.podman(
        "run", "--rm", "--cgroup-parent", f"/{second.host.netns}", IMAGE, "/bin/ping", "-c2", "-W5", address
    )
    assert "2 packets received" in pinged.stdout
    assert "ttl=62" in pinged.stdout  # through both hosts
    shown = first.podman("exec", "a", "ip", "-o", "address", "show", "eth0").stdout
    assert f"inet {address}/24" in shown
    assert f"mtu {first.host.mtu} " in first.podman("exec", "a", "ip", "link", "show", "eth0").stdout
    first.podman("rm", "-f", "-t0", "a")
    nothing_is_left(machines)


def test_ctr_and_cri(machines, tmp_path):
    first, second = machines
    archive = make_image(tmp_path, first)
    for machine in machines:
        machine.start_containerd()
        machine.ctr("images", "import", "--index-name", IMAGE, str(archive))
        assert not network_ready(machine)
        put_conflist(machine)
        assert wait_for(lambda machine=machine: network_ready(machine), 30)
    pods = [Pod(machine, f"pod-{machine.host.name}") for machine in machines]
    for pod, other in (pods, reversed(pods)):
        code, output = pod.exec("/bin/ping", "-c2", "-W5", other.address)
        assert code == 0, output
        assert "ttl=62" in output
    done = second.ctr("run", "--rm", "--cni", IMAGE, "t1", "/bin/ping", "-c2", "-W5", pods[0].address)
    assert "ttl=62" in done.stdout
    assert len(addresses(second)) == 1  # of the pod; ctr has given its own back
    for pod in pods:
        pod.remove()
    nothing_is_left(machines)


def network_ready(machine):
    """Of the conditions of CRI's Status, the one named NetworkReady."""
    conditions = [decode(each) for each in decode(machine.cri("Status", {})[1][0])[1]]
    return next(bool(each.get(2)) for each in conditions if each[1] == [b"NetworkReady"])
